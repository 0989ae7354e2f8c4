"""One loader for labelled images: parquet files, image folders and hub names, by `datasets`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import torch
from torch import Tensor

from dynaslim.data.layout import class_folders, is_hub_name, pick_split, tables_of
from dynaslim.data.skipped import CorruptImageError
from dynaslim.errors import DataError


class Entry(NamedTuple):
    """One labelled image, still encoded."""

    where: str
    """Its file, or its place in the set."""
    content: bytes | None
    label: int
    on_disk: bool = False
    """The bytes are in the file `where`."""

    def read(self) -> bytes:
        """The encoded image; raises `CorruptImageError` if there is none to be had."""
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
    """A split of labelled images, still encoded: iterate for (where, image bytes, label)."""

    name: str
    """The path or hub name it came from, for messages."""
    split: str
    class_names: tuple[str, ...]
    dataset: Any
    image_column: str
    label_column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[str, bytes, int]]:
        for entry in self.entries():
            yield entry.where, entry.read(), entry.label

    def __getitem__(self, row: int) -> Entry:
        """The entry of one row.

        Raises:
            DataError: if its label is none of the classes.
        """
        return self._entry(row, self.dataset[row])

    def entries(self) -> Iterator[Entry]:
        """Every entry in turn; one whose image is missing says so when it is read."""
        for row, columns in enumerate(self.dataset):
            yield self._entry(row, columns)

    def labels(self) -> Tensor:
        """The label of every row, int64, without a look at the images.

        Raises:
            DataError: if one is none of the classes; the message names its row.
        """
        labels = self.dataset.select_columns([self.label_column])[:][self.label_column]
        for row, label in enumerate(labels):
            check_label(label, self.class_names, self._where(row))
        return torch.tensor(labels, dtype=torch.int64)

    def _where(self, row: int) -> str:
        return f"{self.name} [{self.split}] row {row}"

    def _entry(self, row: int, columns: Mapping[str, Any]) -> Entry:
        return entry_of(
            columns[self.image_column],
            columns[self.label_column],
            self.class_names,
            self._where(row),
        )


def digest(content: bytes) -> str:
    """What tells an image's file from all others: 16 hexadecimal digits of its content."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def entry_of(
    image: Mapping[str, Any] | None, label: object, class_names: Sequence[str], where: str
) -> Entry:
    """The entry of an image column's undecoded value; `where` names one that is in no file.

    Raises:
        DataError: if the label is none of the classes.
    """
    content = path = None
    if image is not None:
        content, path = image["bytes"], image["path"]
    on_disk = content is None and path is not None
    if on_disk:
        where = str(path)
    return Entry(where, content, check_label(label, class_names, where), on_disk)


def check_label(label: object, class_names: Sequence[str], where: str) -> int:
    """The label, if it is the number of a class; raises `DataError` otherwise."""
    if not isinstance(label, int) or not 0 <= label < len(class_names):
        raise DataError(f"{where}: label {label!r} is none of the {len(class_names)} classes")
    return label


def open_source(path: str | Path, split: str = "test") -> ImageSource:
    """Open a split of a data set; nothing is decoded yet.

    `path` is a parquet file, a folder of parquet files (their names or folders say train, test or
    validation), a folder of images (`[split/]class/file`) or the name of a data set on the hub.
    `split` "test" also takes validation; a set that is not divided is taken whole.

    Raises:
        DataError: if there is nothing there, no such split, or no image and label columns.
    """
    source = Path(path)
    datasets.disable_progress_bars()
    tables = tables_of(source) if source.exists() else {}
    if tables:
        name = pick_split(str(path), split, list(tables))
        dataset = open_tables(str(path), name, tables[name])
    else:
        loaded = _image_folder(source) if source.exists() else open_hub(str(path))
        name = pick_split(str(path), split, list(loaded))
        dataset = loaded[name]
    if not len(dataset):
        raise DataError(f"{path}: split {name} is empty")
    return _source(str(path), name, dataset)


def open_tables(path: str, split: str, tables: list[str], *, streaming: bool = False) -> Any:
    """The dataset of one split's parquet files; raises `DataError` if they cannot be read."""
    # splits are opened one at a time: together, all would get the class names of one
    options = {"streaming": True} if streaming else {}
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors; we report the outcome
    try:
        return datasets.load_dataset("parquet", data_files={split: tables}, split=split, **options)
    except Exception as error:  # datasets lets through what its readers raise, of many kinds
        if "corresponds to no data" in str(error):
            raise DataError(f"{path}: split {split} is empty") from None
        raise DataError(f"{path}: cannot be read as parquet: {first_line(error)}") from None


def open_hub(name: str, *, streaming: bool = False) -> Mapping[str, Any]:
    """Split name -> dataset of a data set on the hub; raises `DataError` if there is none."""
    if not is_hub_name(name):
        raise DataError(f"{name}: no such file or folder")
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries; we report the outcome
    try:
        options = {"streaming": True} if streaming else {}
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


def _source(name: str, split: str, dataset: Any) -> ImageSource:
    image_column, column = pick_columns(name, dataset.features)
    label = dataset.features[column]
    if isinstance(label, datasets.ClassLabel):
        class_names = tuple(label.names)
    else:
        highest = max((label for label in dataset[column] if label is not None), default=-1)
        class_names = tuple(map(str, range(highest + 1)))
    dataset = dataset.select_columns([image_column, column])
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return ImageSource(name, split, class_names, dataset, image_column, column)


def pick_columns(name: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of images and of labels: class labels, or else numbers called `label`.

    Raises:
        DataError: if there is no such column.
    """
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if not images:
        raise DataError(f"{name}: has no image column, only {', '.join(features)}")
    if not labels and "label" in features and "int" in str(features["label"].dtype):
        labels = ["label"]
    if not labels:
        raise DataError(f"{name}: has no label column, only {', '.join(features)}")
    return images[0], labels[0]


def first_line(error: Exception) -> str:
    """What an error of another library says, for a message of one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
