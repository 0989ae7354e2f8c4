"""Sets larger than the disk: read from end to end in every epoch, shuffled among a buffer.

Suffixes: B images of a batch, C channels, S side in pixels.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import datasets
import numpy as np
import pyarrow.parquet  # type: ignore[import-untyped]
import torch
from torch import Tensor

from dynaslim.data.decode import decode_entry, random_crop
from dynaslim.data.layout import pick_split, tables_of
from dynaslim.data.order import order_seed, own_rows, whole_batches
from dynaslim.data.skipped import LIMIT, CorruptImageError, Skipped
from dynaslim.data.source import (
    Entry,
    ImageSource,
    entry_of,
    first_line,
    open_hub,
    open_source,
    open_tables,
    pick_columns,
)
from dynaslim.errors import DataError, UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe

_AHEAD: Final = 3
"""Batches that are read and decoded ahead."""
_JUDGED: Final = 1_000
"""Images of a stream to be seen before the share of corrupt ones is judged."""


@dataclass(frozen=True)
class ImageStream:
    """A split of labelled images, still encoded, that can only be read from end to end."""

    name: str
    """The path or hub name it came from, for messages."""
    split: str
    class_names: tuple[str, ...]
    num_images: int | None
    """None where the set does not say."""
    dataset: Any
    """An iterable data set, or, for a folder of images, the list of its files."""
    image_column: str
    label_column: str

    def entries(self, seed: int, buffer: int, start: int = 0) -> Generator[Entry, None, None]:
        """The images from number `start` of the order that `seed` gives; nothing is decoded.

        A table's pieces are shuffled, and its images among `buffer` of them; the images of a folder
        are shuffled freely. What comes before `start` is read, for the order depends on it.

        Raises:
            DataError: if reading fails, or a label is none of the classes.
        """
        if isinstance(self.dataset, datasets.Dataset):
            shuffled = self.dataset.shuffle(seed=seed)
        else:
            shuffled = self.dataset.shuffle(seed=seed, buffer_size=buffer)
        for columns in self._read(shuffled.skip(start)):
            image = columns[self.image_column]
            where = _where(self.name, self.split, image)
            yield entry_of(image, columns[self.label_column], self.class_names, where)

    def in_order(self) -> Iterator[Mapping[str, Any]]:
        """The undecoded rows as they are stored."""
        return self._read(self.dataset)

    def _read(self, dataset: Any) -> Iterator[Mapping[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # network and format problems, of many kinds
            raise DataError(f"{self.name}: reading stopped: {first_line(error)}") from error


def _where(name: str, split: str, image: Mapping[str, Any] | None) -> str:
    """A name for an image of a shuffled stream, which does not tell the row."""
    if image is not None and image["path"]:
        return f"{name} [{split}] {image['path']}"
    content = b"" if image is None else image["bytes"] or b""
    return f"{name} [{split}] image with MD5 {hashlib.md5(content).hexdigest()}"


def open_stream(path: str | Path, split: str = "train") -> ImageStream:
    """Open a split as a stream: what `open_source` opens, but nothing is copied to the disk.

    Raises:
        DataError: if there is nothing there, no such split, or no image and label columns.
    """
    name = str(path)
    local = Path(path)
    number: int | None
    if local.exists():
        tables = tables_of(local)
        if not tables:
            source = open_source(path, split)
            return ImageStream(
                name,
                source.split,
                source.class_names,
                len(source),
                source.dataset,
                source.image_column,
                source.label_column,
            )
        chosen = pick_split(name, split, list(tables))
        dataset = open_tables(name, chosen, tables[chosen], streaming=True)
        number = _rows_of(name, tables[chosen])
    else:
        loaded = open_hub(name, streaming=True)
        chosen = pick_split(name, split, list(loaded))
        dataset = loaded[chosen]
        said = (dataset.info.splits or {}).get(chosen)
        number = said.num_examples if said is not None else None
    if dataset.features is None:
        dataset = dataset._resolve_features()  # from the first images
    image_column, label_column = pick_columns(name, dataset.features)
    label = dataset.features[label_column]
    if not isinstance(label, datasets.ClassLabel):
        raise DataError(f"{name}: a stream's label column must name its classes, {label} does not")
    dataset = dataset.select_columns([image_column, label_column])
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return ImageStream(
        name, chosen, tuple(label.names), number or None, dataset, image_column, label_column
    )


def _rows_of(name: str, tables: Sequence[str]) -> int:
    try:
        return sum(pyarrow.parquet.read_metadata(table).num_rows for table in tables)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name}: cannot be read as parquet: {first_line(error)}") from None


def fetched(path: str, split: str) -> ImageSource:
    """A whole split of a streamed set, for evaluation: `open_source` of it alone.

    Of a set on the hub, the split is copied to the disk as it is read, without the others.
    """
    if Path(path).exists():
        return open_source(path, split)
    stream = open_stream(path, split)
    dataset = datasets.Dataset.from_generator(
        _rows, gen_kwargs={"path": path, "split": split}, features=stream.dataset.features
    )
    return ImageSource(
        path,
        stream.split,
        stream.class_names,
        dataset,
        stream.image_column,
        stream.label_column,
    )


def _rows(path: str, split: str) -> Iterator[Mapping[str, Any]]:
    return open_stream(path, split).in_order()


@dataclass(frozen=True)
class _Batch:
    """A whole batch, of which this process's rows are being decoded."""

    entries: list[Entry]
    images: list[Future[np.ndarray | CorruptImageError] | None]
    decode: Callable[[int], np.ndarray | CorruptImageError]
    """Decodes a row that is another process's."""


class StreamFeed:
    """A `Feed` of a stream; threads read and decode ahead.

    Every process reads the whole stream in the same order and decodes its own rows of each batch:
    simple and exact for any number of processes, at the price of reading everything on each. The
    place of an image that does not decode is taken by the next one of its batch that does (after
    the last comes the first), so that batches do not depend on what came before.
    """

    def __init__(
        self,
        stream: ImageStream,
        preprocessing: Preprocessing,
        augment: AugmentRecipe,
        batch_size: int,
        seed: int,
        workers: int = 1,
        *,
        num_images: int | None = None,
        buffer: int = 10_000,
        corrupt_limit: float = LIMIT,
    ) -> None:
        """Feed the stream, shuffled among `buffer` images, decoded by `workers` threads.

        `num_images` is used where the stream does not say how many there are.

        Raises:
            UsageError: if nobody says how many images there are, or the batch cannot be divided
                evenly among the processes.
            TrainingError: if the images do not fill one batch.
        """
        images = stream.num_images or num_images
        if images is None:
            raise UsageError(
                f"{stream.name}: does not say how many images it has; give --data.stream_images"
            )
        self.name = stream.name
        self.class_names = stream.class_names
        self.batch_size = batch_size
        self.steps_per_epoch = whole_batches(stream.name, images, batch_size)
        self.resized = augment.crop == "resized"
        self.skipped = Skipped(stream.name, limit=corrupt_limit, at_least=_JUDGED)
        self._stream = stream
        self._images = images
        self._preprocessing = preprocessing
        self._scale_min = augment.scale_min if self.resized else None
        self._seed = seed
        self._workers = max(workers, 1)
        self._buffer = buffer
        own_rows(batch_size)

    def batches(
        self, start: int, stop: int, *, purpose: str = "train"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Feed.batches`; steps before `start` in its epoch are read, but not decoded.

        Raises:
            DataError: if the stream ends before the epoch's last whole batch.
        """
        while start < stop:
            epoch, at = divmod(start, self.steps_per_epoch)
            end = min(stop, (epoch + 1) * self.steps_per_epoch)
            yield from self._epoch(epoch, at, end - start, purpose)
            if end % self.steps_per_epoch == 0:
                self.skipped.check(complete=True)
            start = end

    def _epoch(
        self, epoch: int, first: int, steps: int, purpose: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        entries = self._stream.entries(
            order_seed(self._seed, epoch, purpose), self._buffer, first * self.batch_size
        )
        own = range(self.batch_size)[own_rows(self.batch_size)]
        reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(self._workers)

        def decode(entry: Entry, place: int) -> np.ndarray | CorruptImageError:
            crop = None
            if self._scale_min is not None:
                crop = random_crop(self._scale_min, f"{self._seed}/{epoch}/crop {purpose}/{place}")
            return decode_entry(entry, self._preprocessing, crop)

        def read(step: int) -> _Batch:
            at = step * self.batch_size
            batch = list(islice(entries, self.batch_size))
            if len(batch) < self.batch_size:
                raise DataError(
                    f"{self.name}: the stream ended after {at + len(batch)} images, where "
                    f"{self._images} were to be; correct --data.stream_images"
                )
            images = [
                decoders.submit(decode, entry, at + row) if row in own else None
                for row, entry in enumerate(batch)
            ]
            return _Batch(batch, images, lambda row: decode(batch[row], at + row))

        ahead: deque[Future[_Batch]] = deque()
        left = iter(range(first, first + steps))
        try:
            while True:
                ahead.extend(
                    reader.submit(read, step) for step in islice(left, _AHEAD - len(ahead))
                )
                if not ahead:
                    return
                batch = ahead.popleft().result()
                self.skipped.images = min(self.skipped.images + len(own), self._images)
                pixels, labels = zip(*(self._whole(batch, row) for row in own), strict=True)
                self.skipped.check()
                yield torch.from_numpy(np.stack(pixels)), torch.tensor(labels)
        finally:
            # closing is left to the reader: datasets sleeps for seconds when it closes parquet
            for unread in ahead:
                unread.cancel()
            with suppress(RuntimeError):  # at the interpreter's end nothing more is begun
                reader.submit(entries.close)
            reader.shutdown(wait=False)
            decoders.shutdown(wait=False, cancel_futures=True)

    def _whole(self, batch: _Batch, row: int) -> tuple[np.ndarray, int]:
        """The first image from this row of the batch on that decodes, and its label."""
        for further in range(self.batch_size):
            at = (row + further) % self.batch_size
            decoded = batch.images[at]
            image = batch.decode(at) if decoded is None else decoded.result()
            if not isinstance(image, CorruptImageError):
                return image, batch.entries[at].label
            self.skipped.add(image.where, image.reason)
        raise DataError(f"{self.name}: no image of a batch decodes; {self.skipped.names[-1]}")
