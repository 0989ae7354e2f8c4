"""One loader for labelled images: parquet files, image folders and hub names, by `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import datasets
import huggingface_hub

from dynaslim.errors import DataError

IMAGE_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
_SPLITS: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train",),
    "test": ("test", "validation", "val", "valid"),
}


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
        for number, row in enumerate(self.dataset):
            image, label = row[self.image_column], row[self.label_column]
            where = f"{self.name} [{self.split}] row {number}"
            path, content = image["path"], image["bytes"]
            if content is None:
                where = path
                try:
                    content = Path(path).read_bytes()
                except OSError as error:
                    raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            if not isinstance(label, int) or not 0 <= label < len(self.class_names):
                raise DataError(
                    f"{where}: label {label!r} is none of the {len(self.class_names)} classes"
                )
            yield where, content, label


def open_source(path: str | Path, split: str = "test") -> ImageSource:
    """Open a split of a data set; nothing is decoded yet.

    `path` is a parquet file, a folder of parquet files (`train*.parquet`, `test*.parquet`), a
    folder of images (`[split/]class/file`) or the name of a data set on the hub. `split` "test"
    also takes one called validation; a set with one split only is taken as it is.

    Raises:
        DataError: if there is nothing there, no such split, or no image and label columns.
    """
    source = Path(path)
    datasets.disable_progress_bars()
    if source.exists():
        kind, files = _local_files(source)
        try:
            if kind == "parquet":
                loaded = datasets.load_dataset("parquet", data_files=files)
            else:
                loaded = datasets.load_dataset(
                    "imagefolder", data_dir=str(source), drop_labels=False
                )
        except Exception as error:  # datasets lets through what its readers raise, of many kinds
            raise DataError(f"{path}: cannot be read as {kind}: {_first_line(error)}") from None
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        huggingface_hub.utils.logging.set_verbosity_error()  # its retries; we report the outcome
        try:
            loaded = datasets.load_dataset(str(path))
        except Exception as error:  # network, access and format problems, of many kinds
            raise DataError(
                f"{path}: no such file or folder, and not to be had as a data set from the hub: "
                f"{_first_line(error)}"
            ) from None
    else:
        raise DataError(f"{path}: no such file or folder")
    name = _pick_split(str(path), split, list(loaded))
    dataset = loaded[name]
    if not len(dataset):
        raise DataError(f"{path}: split {name} is empty")
    return _source(str(path), name, dataset)


def _local_files(source: Path) -> tuple[str, dict[str, list[str]]]:
    """("parquet", files by split) or ("images", {})."""
    if source.is_file():
        if source.suffix != ".parquet":
            raise DataError(f"{source}: expected a .parquet file or a folder")
        return "parquet", {_split_of(source): [str(source)]}
    tables = sorted(source.glob("*.parquet")) or sorted(source.glob("data/*.parquet"))
    if tables:
        by_split: dict[str, list[str]] = {}
        for table in tables:
            by_split.setdefault(_split_of(table), []).append(str(table))
        return "parquet", by_split
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in source.rglob("*")):
        return "images", {}
    raise DataError(
        f"{source}: holds no images; expected class folders of images or .parquet files"
    )


def _split_of(table: Path) -> str:
    found = re.match(r"(train|test|validation|val|valid)(?![a-z])", table.stem)
    return found[1] if found else "train"


def _pick_split(name: str, split: str, available: list[str]) -> str:
    for candidate in _SPLITS.get(split, (split,)):
        if candidate in available:
            return candidate
    if len(available) == 1:
        return available[0]
    raise DataError(f"{name}: has no split {split!r}, only {', '.join(map(repr, available))}")


def _source(name: str, split: str, dataset: Any) -> ImageSource:
    images = [n for n, f in dataset.features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)]
    if not images:
        raise DataError(f"{name}: has no image column, only {', '.join(dataset.features)}")
    if labels:
        column = labels[0]
        class_names = tuple(dataset.features[column].names)
    elif "label" in dataset.features and dataset.features["label"].dtype.startswith("int"):
        column = "label"
        class_names = tuple(map(str, range(max(dataset[column]) + 1)))
    else:
        raise DataError(f"{name}: has no label column, only {', '.join(dataset.features)}")
    dataset = dataset.select_columns([images[0], column])
    dataset = dataset.cast_column(images[0], datasets.Image(decode=False))
    return ImageSource(name, split, class_names, dataset, images[0], column)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
