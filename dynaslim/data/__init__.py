"""Labelled images: from a hub name, an image folder or parquet, to batches for a network."""

from dynaslim.data.memory import MemoryImages, load_images
from dynaslim.data.source import ImageSource, open_source

__all__ = ["ImageSource", "MemoryImages", "load_images", "open_source"]
