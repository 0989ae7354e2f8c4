"""Pictures that the page offers to try."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from PIL import Image

from dynaslim.data.decode import is_image_file
from dynaslim.errors import DataError, check
from dynaslim.serve.pictures import FORMATS

MOST: Final = 24
_SHIPPED: Final = "dynaslim.data.fashion_mnist_mini"


class Sample(NamedTuple):
    """A picture."""

    name: str
    content: bytes
    type: str


def find_samples(
    folder: Path | None, model: Path | None, class_names: Sequence[str] | None
) -> list[Sample]:
    """The pictures of a folder, or of the model's folder `samples`, or shipped ones that fit.

    Raises:
        UsageError: if `folder` is none, or has no pictures.
    """
    if folder is not None:
        check(folder.is_dir(), f"--samples {folder}: no such folder")
        found = _in_folder(folder)
        check(bool(found), f"--samples {folder}: has no pictures ({', '.join(FORMATS)})")
        return found
    if model is not None and (model / "samples").is_dir():
        return _in_folder(model / "samples")
    return _shipped(class_names)


def _in_folder(folder: Path) -> list[Sample]:
    found: list[Sample] = []
    for path in sorted(folder.iterdir()):
        if not is_image_file(path) or len(found) == MOST:
            continue
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                kind = Image.MIME.get(image.format or "", "application/octet-stream")
        except Exception as error:  # Pillow's plugins raise of many kinds for damaged files
            raise DataError(f"{path}: not a picture that can be shown ({error})") from None
        found.append(Sample(path.stem, content, kind))
    return found


def _shipped(class_names: Sequence[str] | None) -> list[Sample]:
    """One Fashion-MNIST image of each class, for networks of just these classes."""
    if class_names is None or len(class_names) != 10:
        return []
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError:  # a package runs without it too
        return []
    with resources.as_file(resources.files(_SHIPPED) / "test.parquet") as path:
        file = parquet.ParquetFile(path)
        names = _label_names(file.schema_arrow.metadata)
        if sorted(names) != sorted(class_names):
            return []
        rows = next(file.iter_batches(batch_size=200)).to_pylist()
    by_label: dict[int, bytes] = {}
    for row in rows:
        by_label.setdefault(row["label"], row["image"]["bytes"])
    return [Sample(names[n], by_label[n], "image/png") for n in sorted(by_label)]


def _label_names(metadata: Any) -> list[str]:
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    names: list[str] = features["label"]["names"]
    return names
