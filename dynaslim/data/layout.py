"""Find the files of a data set by split: parquet files or class folders of images.

They are opened in `dynaslim.data.source`. This module does not import torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dynaslim.data.decode import is_image_file
from dynaslim.errors import DataError

MINI: Final = Path(__file__).parent / "fashion_mnist_mini"
"""The data set that ships with the package."""
WHOLE: Final = "whole"
"""Name of the only split of a data set without splits."""
_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "test": ("test", "validation"),
    "val": ("validation",),
    "valid": ("validation",),
}
_TOKEN: Final = re.compile(r"(?<![a-z])(train|test|validation|valid|val)(?![a-z])")
_HUB_NAME: Final = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?")


def check_path(path: str | Path) -> None:
    """Raise `DataError` if there is no data set at a path; a cheap check before long work."""
    source = Path(path)
    if not source.exists():
        check_hub_name(str(path))
    if source.is_file():
        tables_of(source)
    elif source.is_dir() and not any(
        f.is_dir() or f.suffix == ".parquet" for f in source.iterdir()
    ):
        class_folders(source)


def check_hub_name(name: str) -> None:
    """Raise `DataError` unless a name has the form of a data set on the hub: OWNER/NAME.

    Names without an owner, as a few old data sets have, are refused. Most of them are folders that
    do not exist, and without a connection a hub look-up takes half a minute.
    """
    if _HUB_NAME.fullmatch(name) is None:
        raise DataError(f"{name}: no such file or folder; a data set on the hub is OWNER/NAME")


def tables_of(source: Path) -> dict[str, list[str]]:
    """Split name -> parquet files of a path; empty for a folder without any."""
    if source.is_file():
        if source.suffix != ".parquet":
            raise DataError(f"{source}: expected a .parquet file or a folder")
        return {WHOLE: [str(source)]}
    tables: dict[str, list[str]] = {}
    for table in sorted(source.rglob("*.parquet")):
        tables.setdefault(_split_of(table.relative_to(source)), []).append(str(table))
    return tables


def _split_of(table: Path) -> str:
    """The split in the name of a table or, failing that, of a folder above it; else `WHOLE`."""
    for part in (table.stem, *reversed(table.parts[:-1])):
        if found := _TOKEN.findall(part.lower()):
            last = str(found[-1])
            return _ALIASES.get(last, (last,))[0]
    return WHOLE


def class_folders(source: Path) -> dict[str, list[tuple[str, str]]]:
    """Split name -> (file, class) of images in class folders, which may be in split folders.

    A split folder is recognised by its whole name. The folder reader of `datasets` is not used,
    because it takes a class called `bus_test` for a split.

    Raises:
        DataError: if no class folder contains an image.
    """
    folders = sorted(f for f in source.iterdir() if f.is_dir() and not f.name.startswith("."))
    names = [f.name.lower() for f in folders]
    splits = [bool(_TOKEN.fullmatch(name)) for name in names]
    if any(splits) and not all(splits):
        # a class may be called `val`, but split folders hold folders; then others are ignored
        kept = [f for f, is_split in zip(folders, splits, strict=True) if is_split]
        if all(any(inner.is_dir() for inner in f.iterdir()) for f in kept):
            folders, names = kept, [f.name.lower() for f in kept]
            splits = [True] * len(kept)
    if any(splits) and all(splits):
        roots = {_ALIASES.get(n, (n,))[0]: f for n, f in zip(names, folders, strict=True)}
    else:
        roots = {WHOLE: source}
    found: dict[str, list[tuple[str, str]]] = {}
    loose: list[Path] = []
    for split, root in roots.items():
        files = [f for f in sorted(root.rglob("*")) if is_image_file(f)]
        for file in files:
            _check_name(file)
        found[split] = [
            (str(file), file.relative_to(root).parts[0]) for file in files if file.parent != root
        ]
        loose += [file for file in files if file.parent == root]
    if not any(found.values()):
        raise DataError(_no_classes(source, loose))
    return found


def _check_name(file: Path) -> None:
    """Raise `DataError` for a name that is not UTF-8, which tables cannot store."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(file).decode("utf-8", "backslashreplace")
        raise DataError(f"{shown}: its name is not UTF-8; rename it") from None


def _no_classes(source: Path, loose: list[Path]) -> str:
    """The message for a folder without images in class folders."""
    expected = f"expected {source}/CLASS/FILE, a folder of images for each class"
    if not loose:
        return f"{source}: holds no images; {expected}, or .parquet files"
    many = f"{len(loose)} images are" if len(loose) > 1 else "an image is"
    return (
        f"{source}: {many} outside any class folder ({loose[0].name}), so that there are no "
        f"labels; {expected}"
    )


def pick_split(name: str, split: str, available: list[str]) -> str:
    """The available split that `split` refers to; raises `DataError` if there is none."""
    for candidate in (*_ALIASES.get(split, (split,)), split, WHOLE):
        if candidate in available:
            return candidate
    raise DataError(f"{name}: has no split {split!r}, only {', '.join(map(repr, available))}")
