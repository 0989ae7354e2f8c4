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
WHOLE: Final = "whole"
"""Name of the only split of a set that is not divided."""
_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "test": ("test", "validation"),
    "val": ("validation",),
    "valid": ("validation",),
}
_TOKEN: Final = re.compile(r"(?<![a-z])(train|test|validation|valid|val)(?![a-z])")


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
            if image is None:
                raise DataError(f"{where}: has no image")
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

    `path` is a parquet file, a folder of parquet files (their names or folders say train, test or
    validation), a folder of images (`[split/]class/file`) or the name of a data set on the hub.
    `split` "test" also takes validation; a set that is not divided is taken whole.

    Raises:
        DataError: if there is nothing there, no such split, or no image and label columns.
    """
    source = Path(path)
    datasets.disable_progress_bars()
    if source.exists():
        loaded = _open_local(source)
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


def _open_local(source: Path) -> Mapping[str, Any]:
    """Split name -> dataset of what is on disk."""
    if source.is_file():
        if source.suffix != ".parquet":
            raise DataError(f"{source}: expected a .parquet file or a folder")
        tables = {WHOLE: [str(source)]}
    else:
        tables = {}
        for table in sorted(source.rglob("*.parquet")):
            tables.setdefault(_split_of(table.relative_to(source)), []).append(str(table))
    if not tables:
        return _image_folder(source)
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset("parquet", data_files=tables)
    except Exception as error:  # datasets lets through what its readers raise, of many kinds
        raise DataError(f"{source}: cannot be read as parquet: {_first_line(error)}") from None
    return loaded


def _split_of(table: Path) -> str:
    """The split that a table's name, or else a folder above it, says; `WHOLE` if none does."""
    for part in (table.stem, *reversed(table.parts[:-1])):
        if found := _TOKEN.findall(part.lower()):
            last = str(found[-1])
            return _ALIASES.get(last, (last,))[0]
    return WHOLE


def _image_folder(source: Path) -> dict[str, Any]:
    """Class folders of images, or split folders of those; only whole folder names count.

    Not by the library's own folder reader: it takes a class called `bus_test` for a split.
    """
    folders = sorted(f for f in source.iterdir() if f.is_dir() and not f.name.startswith("."))
    names = [f.name.lower() for f in folders]
    if folders and all(_TOKEN.fullmatch(name) for name in names):
        roots = {_ALIASES.get(n, (n,))[0]: f for n, f in zip(names, folders, strict=True)}
    else:
        roots = {WHOLE: source}
    found: dict[str, list[tuple[str, str]]] = {}
    for split, root in roots.items():
        found[split] = [
            (str(file), file.relative_to(root).parts[0])
            for file in sorted(root.rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES and file.parent != root
        ]
    classes = sorted({label for rows in found.values() for _, label in rows})
    if not classes:
        raise DataError(
            f"{source}: holds no images; expected class folders of images or .parquet files"
        )
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


def _pick_split(name: str, split: str, available: list[str]) -> str:
    for candidate in (*_ALIASES.get(split, (split,)), split, WHOLE):
        if candidate in available:
            return candidate
    raise DataError(f"{name}: has no split {split!r}, only {', '.join(map(repr, available))}")


def _source(name: str, split: str, dataset: Any) -> ImageSource:
    images = [n for n, f in dataset.features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)]
    if not images:
        raise DataError(f"{name}: has no image column, only {', '.join(dataset.features)}")
    if labels:
        column = labels[0]
        class_names = tuple(dataset.features[column].names)
    elif "label" in dataset.features and "int" in str(dataset.features["label"].dtype):
        column = "label"
        highest = max((label for label in dataset[column] if label is not None), default=-1)
        class_names = tuple(map(str, range(highest + 1)))
    else:
        raise DataError(f"{name}: has no label column, only {', '.join(dataset.features)}")
    dataset = dataset.select_columns([images[0], column])
    dataset = dataset.cast_column(images[0], datasets.Image(decode=False))
    return ImageSource(name, split, class_names, dataset, images[0], column)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
