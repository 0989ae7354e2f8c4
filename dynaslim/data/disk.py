"""Sets too large for the memory: each image is decoded when its turn comes.

Suffixes: B images of a batch, C channels, S side in pixels.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynaslim.data.decode import decode_entry, random_crop
from dynaslim.data.memory import check_classes
from dynaslim.data.order import EpochOrder, own_rows, whole_batches
from dynaslim.data.skipped import LIMIT, CorruptImageError, Skipped
from dynaslim.data.source import ImageSource, digest
from dynaslim.errors import DataError, DynaslimError
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe

_AHEAD: Final = 2
"""Batches that each worker decodes ahead."""


class _Decoded(NamedTuple):
    """What a worker hands over for a step."""

    pixels_BCSS: Tensor
    labels_B: Tensor
    skipped: list[tuple[str, str]]
    """Where and why, of images that do not decode."""


class DiskFeed:
    """A `Feed` that decodes images as they are needed, in worker processes.

    The place of an image that does not decode is taken by the next one of the epoch's order that
    does, so that batches stay whole and depend on nothing that came before.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        augment: AugmentRecipe,
        batch_size: int,
        seed: int,
        workers: int = 0,
        *,
        rows: Tensor | None = None,
        corrupt_limit: float = LIMIT,
    ) -> None:
        """Feed the given rows of the source, by default all; 0 workers decode in this process.

        Raises:
            TrainingError: if the images do not fill one batch.
            UsageError: if the batch cannot be divided evenly among the processes.
        """
        rows = torch.arange(len(source)) if rows is None else rows
        self.name = source.name
        self.class_names = source.class_names
        self.batch_size = batch_size
        self.steps_per_epoch = whole_batches(source.name, len(rows), batch_size)
        self.resized = augment.crop == "resized"
        self.skipped = Skipped(source.name, len(rows), limit=corrupt_limit)
        self._source = source
        self._rows = rows
        self._preprocessing = preprocessing
        self._scale_min = augment.scale_min if self.resized else None
        self._seed = seed
        self._workers = workers
        own_rows(batch_size)

    def batches(
        self, start: int, stop: int, *, purpose: str = "train"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Feed.batches`."""
        # who this process is, is asked here: workers cannot
        steps = _Steps(
            self._source,
            self._rows,
            self._preprocessing,
            self._scale_min,
            self._seed,
            purpose,
            self.steps_per_epoch,
            self.batch_size,
            own_rows(self.batch_size),
        )
        loader: DataLoader[Any] = DataLoader(
            steps,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self._workers,
            prefetch_factor=_AHEAD if self._workers else None,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or it would draw from the global one
            multiprocessing_context=_context() if self._workers else None,
            worker_init_fn=_leave_stopping_to_the_run,
        )
        for decoded in loader:
            if isinstance(decoded, DynaslimError):
                raise decoded
            for where, reason in decoded.skipped:
                self.skipped.add(where, reason)
            self.skipped.check()
            yield decoded.pixels_BCSS, decoded.labels_B


@dataclass
class _Steps(Dataset[_Decoded | DynaslimError]):
    """The batch of each global step, for a worker."""

    source: ImageSource
    rows: Tensor
    preprocessing: Preprocessing
    scale_min: float | None
    seed: int
    purpose: str
    steps_per_epoch: int
    batch_size: int
    own: slice
    order: EpochOrder = field(init=False)

    def __post_init__(self) -> None:
        self.order = EpochOrder(len(self.rows), self.seed, self.purpose)

    def __getitem__(self, step: int) -> _Decoded | DynaslimError:
        try:
            return self._decoded(step)
        except DynaslimError as error:  # raised in a worker, it would come with its traceback
            return error

    def _decoded(self, step: int) -> _Decoded:
        epoch, at = divmod(step, self.steps_per_epoch)
        places = range(at * self.batch_size, (at + 1) * self.batch_size)[self.own]
        skipped: list[tuple[str, str]] = []
        pixels, labels = zip(*(self._image(epoch, place, skipped) for place in places), strict=True)
        return _Decoded(torch.from_numpy(np.stack(pixels)), torch.tensor(labels), skipped)

    def _image(
        self, epoch: int, place: int, skipped: list[tuple[str, str]]
    ) -> tuple[np.ndarray, int]:
        """The first image from this place of the epoch on that decodes, and its label."""
        order = self.order(epoch)
        for further in range(len(order)):
            row = int(self.rows[order[(place + further) % len(order)]])
            entry = self.source[row]
            crop = None
            if self.scale_min is not None:
                crop = random_crop(self.scale_min, f"{self.seed}/{epoch}/crop {self.purpose}/{row}")
            image = decode_entry(entry, self.preprocessing, crop)
            if not isinstance(image, CorruptImageError):
                return image, entry.label
            skipped.append((image.where, image.reason))
        raise DataError(f"{self.source.name}: no image can be decoded; {skipped[0][0]}")


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_stopping_to_the_run(_worker: int) -> None:
    """Launchers signal a whole process group: the run finishes its step and saves, and needs us."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _context() -> str | None:
    """How workers start; by fork where that is safe, as fresh ones import torch for seconds.

    Workers use neither the accelerator nor torch's threads (DataLoader limits them to one), which
    are what does not survive a fork.
    """
    if sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods():
        return "fork"
    return None


@dataclass(frozen=True)
class DiskImages:
    """Images to evaluate on, decoded by threads when their turn comes.

    A row that does not decode has pixels of 0 and the label -1.
    """

    source: ImageSource
    preprocessing: Preprocessing
    rows: Tensor
    """The rows of the source to take, in this order."""
    class_names: tuple[str, ...]
    classes: tuple[int, ...]
    """The class of each of the source's classes."""
    skipped: Skipped
    """Images that were met and do not decode."""
    workers: int = 1
    """Threads that decode."""

    @classmethod
    def of(
        cls,
        source: ImageSource,
        preprocessing: Preprocessing,
        *,
        rows: Tensor | None = None,
        workers: int = 1,
        corrupt_limit: float = LIMIT,
    ) -> DiskImages:
        """The given rows of a source, by default all, with its classes."""
        rows = torch.arange(len(source)) if rows is None else rows
        return cls(
            source,
            preprocessing,
            rows,
            source.class_names,
            tuple(range(len(source.class_names))),
            Skipped(source.name, len(rows), limit=corrupt_limit),
            max(workers, 1),
        )

    @property
    def name(self) -> str:
        """The data set, for messages."""
        return self.source.name

    @property
    def where(self) -> Sequence[str]:
        """The file or place of each image."""
        return _Places(self.source, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def check_fits(self, preprocessing: Preprocessing, num_classes: int) -> None:
        """Raise `DataError` unless pixels and classes are what the two say."""
        ours = self.preprocessing
        if (ours.channels, ours.image_size_px) != (
            preprocessing.channels,
            preprocessing.image_size_px,
        ):
            raise DataError(
                f"{self.name}: {ours.channels} channels of {ours.image_size_px} px, the "
                f"preprocessing says {preprocessing.channels} of {preprocessing.image_size_px} px"
            )
        check_classes(self.name, len(self.class_names), num_classes)

    def batches(
        self, batch_size: int, order: Tensor | None = None, *, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images, labels) in the given order (by default as stored).

        Raises:
            DataError: if more images do not decode than `skipped` allows.
        """
        indices = torch.arange(len(self)) if order is None else order
        batches = iter(
            [
                rows
                for rows in torch.split(self.rows[indices], batch_size)
                if len(rows) == batch_size or not drop_last
            ]
        )
        ahead: deque[list[Future[tuple[np.ndarray | CorruptImageError, int]]]] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            while True:
                for rows in islice(batches, _AHEAD - len(ahead)):
                    ahead.append([pool.submit(self._decode, row) for row in rows.tolist()])
                if not ahead:
                    return
                yield self._batch([future.result() for future in ahead.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)

    def relabelled(self, order: Sequence[int], class_names: Sequence[str]) -> DiskImages:
        """The same images with class c renumbered to `order[c]`, whose names are given."""
        classes = tuple(order[c] for c in self.classes)
        return replace(self, class_names=tuple(class_names), classes=classes)

    def subset(self, rows: Tensor) -> DiskImages:
        """The images of the given rows."""
        skipped = Skipped(self.name, len(rows), limit=self.skipped.limit)
        return replace(self, rows=self.rows[rows], skipped=skipped)

    def digests(self, most: int | None = None) -> list[str]:
        """`digest` of every image's file, of `most` images evenly taken; "" for one that is gone.

        Files are read and not decoded.
        """
        rows = self.rows if most is None else self.rows[:: max(1, -(-len(self.rows) // most))]

        def hashed(row: int) -> str:
            try:
                return digest(self.source[row].read())
            except CorruptImageError:
                return ""

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(hashed, rows.tolist()))

    def _decode(self, row: int) -> tuple[np.ndarray | CorruptImageError, int]:
        entry = self.source[row]
        return decode_entry(entry, self.preprocessing), self.classes[entry.label]

    def _batch(
        self, decoded: list[tuple[np.ndarray | CorruptImageError, int]]
    ) -> tuple[Tensor, Tensor]:
        size, channels = self.preprocessing.image_size_px, self.preprocessing.channels
        pixels_BCSS = np.zeros((len(decoded), channels, size, size), dtype=np.uint8)
        labels_B = torch.full((len(decoded),), -1)
        for at, (image, label) in enumerate(decoded):
            if isinstance(image, CorruptImageError):
                self.skipped.add(image.where, image.reason)
            else:
                pixels_BCSS[at], labels_B[at] = image, label
        self.skipped.check()
        return torch.from_numpy(pixels_BCSS), labels_B


@dataclass(frozen=True)
class _Places(Sequence[str]):
    """Where the images of some rows are, looked up when asked."""

    source: ImageSource
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return _Places(self.source, self.rows[at])
        return self.source[int(self.rows[at])].where
