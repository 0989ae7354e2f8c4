"""Labelled images, from a hub name, an image folder or parquet to batches for a network.

Names are imported on first use, because images are also decoded without torch and datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynaslim.data.images import ImageDataset, load_images
    from dynaslim.data.source import ImageSource, open_source

_HOME = {
    "ImageDataset": "dynaslim.data.images",
    "ImageSource": "dynaslim.data.source",
    "load_images": "dynaslim.data.images",
    "open_source": "dynaslim.data.source",
}

__all__ = ["ImageDataset", "ImageSource", "load_images", "open_source"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynaslim.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
