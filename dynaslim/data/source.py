"""Open labelled images without decoding them: parquet files, image folders, hub names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import pyarrow.parquet  # type: ignore[import-untyped]
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from dynaslim.data.layout import check_hub_name, class_folders, pick_split, tables_of
from dynaslim.data.skipped import CorruptImageError
from dynaslim.distributed import rank, world_size
from dynaslim.errors import DataError, first_line


class Entry(NamedTuple):
    """One labelled image, still encoded."""

    where: str
    """The image's file, or its place in the data set."""
    content: bytes | None
    label: int
    on_disk: bool = False
    """Whether the bytes are in the file `where`."""

    def read(self) -> bytes:
        """The encoded image; raises `CorruptImageError` if it is missing or cannot be read."""
        if self.content is not None:
            return self.content
        if not self.on_disk:
            raise CorruptImageError(self.where, "has no image")
        try:
            return Path(self.where).read_bytes()
        except OSError as error:
            raise CorruptImageError(self.where, f"cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class ImageSource:
    """A split of labelled images, still encoded.

    Rows are read by number, or in a shuffled order; a stream can only be read in order.
    """

    name: str
    """The path or hub name, for messages."""
    split: str
    class_names: tuple[str, ...]
    dataset: Any
    """A `datasets.Dataset`, or the `datasets.IterableDataset` of a stream."""
    image_column: str
    label_column: str
    num_images: int | None
    """None for a stream of unknown length."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Entry:
        """The image of one row; raises `DataError` if its label is not one of the classes."""
        columns = self.dataset[row]
        return self._entry(columns[self.image_column], columns[self.label_column], self._row(row))

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    def labels(self) -> Tensor:
        """The label of every row, int64; images are not read.

        Raises:
            DataError: if a label is not one of the classes; the message names its row.
        """
        labels = self.dataset.select_columns([self.label_column])[:][self.label_column]
        for row, label in enumerate(labels):
            self._checked(label, self._row(row))
        return torch.tensor(labels, dtype=torch.int64)

    def shuffled(
        self, seed: int, buffer: int, start: int = 0, share: int = 0
    ) -> Generator[Entry, None, None]:
        """The images of this process in the order that `seed` gives, from number `start` on.

        The shards (files) of a stream are shuffled and divided among the processes, and each
        process shuffles its images in a buffer of `buffer` images. The parts of the processes may
        differ in size: a process that reaches the end of its part starts again, unless the part has
        less than half of the `share` images that a process takes in an epoch. Rows on disk are
        fully shuffled and divided evenly.

        Images before `start` are read but not decoded. The saved state of `datasets` would skip
        them, but it loses the images in the shuffle buffer.

        Raises:
            DataError: if reading fails, or a label is not one of the classes.
        """
        part = self._share(seed, buffer)
        if world_size() == 1:
            yield from map(self._shuffled_entry, self._read(part.skip(start)))
            return
        position = number = 0
        while position == 0 or 2 * number >= share:
            number = 0
            for columns in self._read(part):
                if position >= start:
                    yield self._shuffled_entry(columns)
                position += 1
                number += 1
            if not number:
                return

    def _share(self, seed: int, buffer: int) -> Any:
        """The shuffled images that this process reads."""
        dataset, processes = self.dataset, world_size()
        if isinstance(dataset, datasets.Dataset):
            return dataset.shuffle(seed=seed).shard(processes, rank(), contiguous=False)
        if dataset.num_shards < processes:
            dataset = dataset.reshard()  # by row groups
        shuffled = dataset.shuffle(seed=seed, buffer_size=buffer)
        if processes == 1:
            return shuffled
        if shuffled.num_shards >= processes:
            return shuffled.shard(processes, rank())
        # too few shards: each process reads the whole stream and drops images that are not its own
        return split_dataset_by_node(shuffled, rank(), processes)

    def in_order(self) -> Iterator[Mapping[str, Any]]:
        """The undecoded rows in stored order."""
        return self._read(self.dataset)

    def _read(self, dataset: Any) -> Iterator[Mapping[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # network and format problems, of many kinds
            raise DataError(f"{self.name}: reading stopped: {first_line(error)}") from error

    def _row(self, row: int) -> str:
        return f"{self.name} [{self.split}] row {row}"

    def _entry(self, image: Mapping[str, Any] | None, label: object, where: str) -> Entry:
        """The entry of undecoded columns; `where` names an image that is not a file."""
        content, path = (None, None) if image is None else (image["bytes"], image["path"])
        on_disk = content is None and path is not None
        if on_disk:
            where = str(path)
        return Entry(where, content, self._checked(label, where), on_disk)

    def _shuffled_entry(self, columns: Mapping[str, Any]) -> Entry:
        image = columns[self.image_column]
        if image is not None and image["path"]:
            where = image["path"]
        else:  # the row number is unknown
            content = b"" if image is None else image["bytes"] or b""
            where = f"image with MD5 {hashlib.md5(content).hexdigest()}"
        place = f"{self.name} [{self.split}] {where}"
        return self._entry(image, columns[self.label_column], place)

    def _checked(self, label: object, where: str) -> int:
        if not isinstance(label, int) or not 0 <= label < len(self.class_names):
            count = len(self.class_names)
            raise DataError(f"{where}: label {label!r} is none of the {count} classes")
        return label


def digest(content: bytes) -> str:
    """A hash of an image's file: 16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def open_source(path: str | Path, split: str = "test", *, streaming: bool = False) -> ImageSource:
    """Open a split of a data set without decoding images.

    `path` is a parquet file, a folder of parquet files (their names or folders contain train, test
    or validation), a folder of images (`[split/]class/file`) or the name of a data set on the hub.
    `split` "test" also accepts validation; a set without splits is opened whole. With `streaming`
    nothing is copied to disk.

    Raises:
        DataError: if there is no such data set or split, or it has no image or label column.
    """
    name, local = str(path), Path(path)
    datasets.disable_progress_bars()
    if datasets.config.PYARROW_VERSION.major > 24:
        # only older versions need it: a wait of seconds for threads after each pass over a stream
        datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    tables = tables_of(local) if local.exists() else {}
    if tables:
        chosen = pick_split(name, split, list(tables))
        dataset = _open_tables(name, chosen, tables[chosen], streaming)
    else:
        loaded = _image_folder(local) if local.exists() else _open_hub(name, streaming)
        chosen = pick_split(name, split, list(loaded))
        dataset = loaded[chosen]
    number: int | None
    if isinstance(dataset, datasets.Dataset):
        number = len(dataset)
    elif tables:
        number = _rows_of(name, tables[chosen])
    else:
        info = (dataset.info.splits or {}).get(chosen)
        number = None if info is None else info.num_examples or None
    if number == 0:
        raise DataError(f"{name}: split {chosen} is empty")
    if dataset.features is None:
        dataset = dataset._resolve_features()  # from the first images
    image_column, label_column = _pick_columns(name, dataset.features)
    class_names = _class_names(name, dataset, label_column)
    dataset = dataset.select_columns([image_column, label_column])
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return ImageSource(name, chosen, class_names, dataset, image_column, label_column, number)


def fetched(path: str, split: str) -> ImageSource:
    """Open a whole split of a streamed data set, for evaluation.

    From the hub, the split is copied to disk as it is read, without the other splits.
    """
    if Path(path).exists():
        return open_source(path, split)
    stream = open_source(path, split, streaming=True)
    dataset = datasets.Dataset.from_generator(
        _rows, gen_kwargs={"path": path, "split": split}, features=stream.dataset.features
    )
    return replace(stream, dataset=dataset, num_images=len(dataset))


def _rows(path: str, split: str) -> Iterator[Mapping[str, Any]]:
    return open_source(path, split, streaming=True).in_order()


def _open_tables(path: str, split: str, tables: list[str], streaming: bool) -> Any:
    """The dataset of one split's parquet files; raises `DataError` if they cannot be read."""
    # splits are opened one at a time: together, all would get the class names of one
    options = {"streaming": True} if streaming else {}
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors; we report the outcome
    try:
        return datasets.load_dataset("parquet", data_files={split: tables}, split=split, **options)
    except Exception as error:  # datasets passes on what its readers raise, of many kinds
        if "corresponds to no data" in str(error):
            raise DataError(f"{path}: split {split} is empty") from None
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            # a file that cannot be read, or no room for the copy that datasets makes
            where = cause.filename or str(datasets.config.HF_DATASETS_CACHE)
            raise OSError(cause.errno, os.strerror(cause.errno), where) from None
        raise DataError(f"{path}: cannot be read as parquet: {first_line(cause)}") from None


def _open_hub(name: str, streaming: bool) -> Mapping[str, Any]:
    """Split name -> dataset of a data set on the hub; raises `DataError` if there is none."""
    check_hub_name(name)
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries; we report the outcome
    options = {"streaming": True} if streaming else {}
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(name, **options)
    except Exception as error:  # network, access and format problems, of many kinds
        raise DataError(
            f"{name}: no such file or folder, and not to be had as a data set from the hub: "
            f"{first_line(error)}"
        ) from None
    return loaded


def _image_folder(source: Path) -> dict[str, Any]:
    """Split name -> dataset of a folder of images by class."""
    found = class_folders(source)
    classes = sorted({label for rows in found.values() for _, label in rows})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    return {
        split: datasets.Dataset.from_dict(
            {"image": [path for path, _ in rows], "label": [label for _, label in rows]},
            features=features,
        )
        for split, rows in found.items()
    }


def _rows_of(name: str, tables: Sequence[str]) -> int:
    try:
        return sum(pyarrow.parquet.read_metadata(table).num_rows for table in tables)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name}: cannot be read as parquet: {first_line(error)}") from None


def _pick_columns(name: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """The image column and the label column: class labels, or else integers called `label`."""
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if not images:
        raise DataError(f"{name}: has no image column, only {', '.join(features)}")
    if not labels and "label" in features and "int" in str(features["label"].dtype):
        labels = ["label"]
    if not labels:
        raise DataError(f"{name}: has no label column, only {', '.join(features)}")
    return images[0], labels[0]


def _class_names(name: str, dataset: Any, column: str) -> tuple[str, ...]:
    label = dataset.features[column]
    if isinstance(label, datasets.ClassLabel):
        return tuple(label.names)
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"{name}: a stream's label column must name its classes, {label} does not")
    highest = max((label for label in dataset[column] if label is not None), default=-1)
    return tuple(map(str, range(highest + 1)))
