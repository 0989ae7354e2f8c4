"""Small data sets whole in memory as uint8: decoded once, augmented in batches.

Suffixes: N images, B rows of a batch, C channels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynaslim.data.decode import decode_image
from dynaslim.data.source import ImageSource
from dynaslim.errors import DataError
from dynaslim.preprocessing import Preprocessing


@dataclass(frozen=True)
class MemoryImages:
    """Decoded images (N, C, S, S) uint8 with labels (N,) int64 and the names of the classes."""

    images_NCSS: Tensor
    labels_N: Tensor
    class_names: tuple[str, ...]
    name: str = ""

    def __len__(self) -> int:
        return len(self.labels_N)

    def check_fits(self, preprocessing: Preprocessing, num_classes: int) -> None:
        """Raise `DataError` unless pixels and classes are what the two say."""
        name = self.name or "data"
        if not len(self):
            raise DataError(f"{name}: no images")
        size, channels = preprocessing.image_size_px, preprocessing.channels
        if tuple(self.images_NCSS.shape[1:]) != (channels, size, size):
            raise DataError(
                f"{name}: images of shape {tuple(self.images_NCSS.shape[1:])}, the preprocessing "
                f"says {(channels, size, size)}"
            )
        if len(self.class_names) != num_classes:
            raise DataError(
                f"{name}: has {len(self.class_names)} classes, the network has {num_classes}"
            )
        if not 0 <= int(self.labels_N.min()) <= int(self.labels_N.max()) < num_classes:
            raise DataError(f"{name}: has labels outside 0 to {num_classes - 1}")

    def batches(
        self, batch_size: int, order: Tensor | None = None, *, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images, labels) in the given order (by default as stored)."""
        indices = torch.arange(len(self)) if order is None else order
        for rows in torch.split(indices, batch_size):
            if len(rows) == batch_size or not drop_last:
                yield self.images_NCSS[rows], self.labels_N[rows]

    def relabelled(self, order: Sequence[int], class_names: Sequence[str]) -> MemoryImages:
        """The same images with class c renumbered to `order[c]`, whose names are given."""
        labels_N = torch.tensor(order)[self.labels_N]
        return MemoryImages(self.images_NCSS, labels_N, tuple(class_names), self.name)

    def subset(self, rows: Tensor) -> MemoryImages:
        """The images of the given rows."""
        return MemoryImages(
            self.images_NCSS[rows], self.labels_N[rows], self.class_names, self.name
        )


def load_images(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    on_image: Callable[[], None] | None = None,
) -> MemoryImages:
    """Decode a whole split into memory; `on_image` is called after each image.

    Raises:
        DataError: if an image cannot be decoded; the message names it.
    """
    size, channels = preprocessing.image_size_px, preprocessing.channels
    pixels = np.empty((len(source), channels, size, size), dtype=np.uint8)
    labels = np.empty(len(source), dtype=np.int64)
    for row, (where, content, label) in enumerate(source):
        pixels[row] = decode_image(content, preprocessing, where)
        labels[row] = label
        if on_image is not None:
            on_image()
    return MemoryImages(
        torch.from_numpy(pixels), torch.from_numpy(labels), source.class_names, source.name
    )


def channel_statistics(images: MemoryImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of values in 0..1."""
    # a histogram is exact in integers, and needs no float copy of the set
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.images_NCSS.shape[1]):
        counts = torch.bincount(images.images_NCSS[:, channel].flatten().int(), minlength=256)
        share = counts.double() / counts.sum()
        mean = float((share * values).sum())
        means.append(round(mean, 4))
        stds.append(round(float((share * (values - mean) ** 2).sum().sqrt()), 4))
    return tuple(means), tuple(stds)
