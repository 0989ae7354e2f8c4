"""Small data sets whole in memory as uint8: decoded once, augmented in batches.

Suffixes: N images, B rows of a batch, C channels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dynaslim.data.decode import decode_entry
from dynaslim.data.skipped import LIMIT, CorruptImageError, Skipped
from dynaslim.data.source import Entry, ImageSource, digest
from dynaslim.errors import DataError
from dynaslim.preprocessing import Preprocessing

_THREADS: Final = 4
_PER_TASK: Final = 64
"""Images that a thread decodes at a time: handing over a small one costs as much as decoding it."""


@dataclass(frozen=True)
class MemoryImages:
    """Decoded images (N, C, S, S) uint8 with labels (N,) int64 and the names of the classes."""

    images_NCSS: Tensor
    labels_N: Tensor
    class_names: tuple[str, ...]
    name: str = ""
    where: tuple[str, ...] = ()
    """The file or place of each image; empty for images that came from none."""
    skipped: tuple[str, ...] = ()
    """A line `file: reason` for each image that was left out because it does not decode."""
    digests: tuple[str, ...] = ()
    """`digest` of each image's file; empty for images that came from none."""
    rows: tuple[int, ...] = ()
    """Each image's row of its source; empty for images that came from none."""

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
        check_classes(name, len(self.class_names), num_classes)
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
        return replace(self, labels_N=labels_N, class_names=tuple(class_names))

    def subset(self, rows: Tensor) -> MemoryImages:
        """The images of the given rows."""
        return replace(
            self,
            images_NCSS=self.images_NCSS[rows],
            labels_N=self.labels_N[rows],
            where=tuple(self.where[row] for row in rows.tolist()) if self.where else (),
            digests=tuple(self.digests[row] for row in rows.tolist()) if self.digests else (),
            rows=tuple(self.rows[row] for row in rows.tolist()) if self.rows else (),
        )


def check_classes(name: str, classes: int, num_classes: int) -> None:
    """Raise `DataError` unless the set `name` has as many classes as the network."""
    if classes != num_classes:
        raise DataError(f"{name}: has {classes} classes, the network has {num_classes}")


def load_images(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    on_image: Callable[[], None] | None = None,
    corrupt_limit: float = LIMIT,
) -> MemoryImages:
    """Decode a whole split into memory; `on_image` is called for each image.

    Images that do not decode are left out and named in `skipped`.

    Raises:
        DataError: if more than the share `corrupt_limit` of the images do not decode, or a label
            is none of the classes; the message names them.
    """
    size, channels = preprocessing.image_size_px, preprocessing.channels
    pixels = np.empty((len(source), channels, size, size), dtype=np.uint8)
    labels = np.empty(len(source), dtype=np.int64)
    where: list[str] = []
    digests: list[str] = []
    rows: list[int] = []
    numbers = count()
    skipped = Skipped(source.name, len(source), limit=corrupt_limit)

    def decode(entries: Sequence[Entry]) -> list[tuple[np.ndarray | CorruptImageError, str]]:
        return [_decoded(entry, preprocessing) for entry in entries]

    entries = source.entries()
    # Pillow decodes without the interpreter's lock; the order stays that of the source
    with ThreadPoolExecutor(_THREADS) as pool:
        while chunk := list(islice(entries, _THREADS * _PER_TASK)):
            parts = [chunk[at : at + _PER_TASK] for at in range(0, len(chunk), _PER_TASK)]
            decoded = [image for part in pool.map(decode, parts) for image in part]
            for entry, (image, hashed) in zip(chunk, decoded, strict=True):
                row = next(numbers)
                if isinstance(image, CorruptImageError):
                    skipped.add(image.where, image.reason)
                    skipped.check()
                else:
                    pixels[len(where)], labels[len(where)] = image, entry.label
                    where.append(entry.where)
                    digests.append(hashed)
                    rows.append(row)
                if on_image is not None:
                    on_image()
    kept = len(where)
    return MemoryImages(
        torch.from_numpy(pixels[:kept]),
        torch.from_numpy(labels[:kept]),
        source.class_names,
        source.name,
        tuple(where),
        skipped.lines,
        tuple(digests),
        tuple(rows),
    )


def _decoded(
    entry: Entry, preprocessing: Preprocessing
) -> tuple[np.ndarray | CorruptImageError, str]:
    """The pixels of an entry and the digest of its file, read once."""
    try:
        content = entry.read()
    except CorruptImageError as error:
        return error, ""
    return decode_entry(entry._replace(content=content), preprocessing), digest(content)


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
