"""Labelled images for a network: the dataset, held-out rows, and the mapping of its labels.

Suffixes: N images, B rows of a batch, C channels, S side in pixels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dynaslim.data.decode import decode_entry
from dynaslim.data.skipped import LIMIT, CorruptImageError, Skipped
from dynaslim.data.source import ImageSource, digest, open_source
from dynaslim.errors import DataError
from dynaslim.preprocessing import Preprocessing
from dynaslim.seeds import step_seed

if TYPE_CHECKING:
    from dynaslim.checkpoint import Checkpoint

_AHEAD: Final = 2
"""Number of batches to decode ahead."""
_PER_TASK: Final = 64
"""Images per task when decoding into memory: handing over a small image takes as long as decoding
it."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class ImageDataset:
    """Labelled images of one size, in memory or decoded from their source when they are read.

    `ImageDataset(pixels_NCSS, labels_N, class_names)` has uint8 pixels and int64 labels in memory.
    `ImageDataset.of` decodes images of a source whenever they are read, `loaded` only once.
    """

    pixels: Tensor | None
    """(N, C, S, S) uint8; None if the images are decoded when they are read."""
    labels_N: Tensor
    class_names: tuple[str, ...]
    name: str = ""
    source: ImageSource | None = None
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(N,) row of each image in the source; empty without a source."""
    preprocessing: Preprocessing | None = None
    """How images of the source are decoded."""
    skipped: Skipped = field(default_factory=lambda: Skipped(""))
    """Images that could not be decoded so far."""
    hashes: tuple[str, ...] = ()
    """`digest` of each image's file; empty if the files have not been read."""
    workers: int = 1
    """Number of decoding threads."""

    @classmethod
    def of(
        cls,
        source: ImageSource,
        preprocessing: Preprocessing,
        *,
        rows: Tensor | None = None,
        workers: int | None = None,
        corrupt_limit: float = LIMIT,
    ) -> ImageDataset:
        """The given rows of a source (default: all), decoded by `workers` threads (one per core).

        Raises:
            DataError: if a label is not one of the classes.
        """
        labels_N = source.labels()
        rows = torch.arange(len(labels_N)) if rows is None else rows
        return cls(
            pixels=None,
            labels_N=labels_N[rows],
            class_names=source.class_names,
            name=source.name,
            source=source,
            rows=rows,
            preprocessing=preprocessing,
            skipped=Skipped(source.name, len(rows), limit=corrupt_limit),
            workers=os.cpu_count() or 1 if workers is None else max(workers, 1),
        )

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def images_NCSS(self) -> Tensor:
        """The uint8 pixels of images in memory."""
        assert self.pixels is not None, "the images are not in memory"
        return self.pixels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        if self.preprocessing is None or self.pixels is not None:
            _, channels, height, width = self.images_NCSS.shape
            return channels, height, width
        size = self.preprocessing.image_size_px
        return self.preprocessing.channels, size, size

    @property
    def where(self) -> Sequence[str]:
        """The file or place of each image; empty without a source."""
        return () if self.source is None else _Places(self.source, self.rows)

    def check_fits(self, preprocessing: Preprocessing, num_classes: int) -> None:
        """Raise `DataError` unless size, channels and classes match those of a network."""
        name = self.name or "data"
        if not len(self):
            raise DataError(f"{name}: no images")
        size, channels = preprocessing.image_size_px, preprocessing.channels
        if self.shape != (channels, size, size):
            raise DataError(
                f"{name}: images of shape {self.shape}, the preprocessing "
                f"says {(channels, size, size)}"
            )
        if len(self.class_names) != num_classes:
            count = len(self.class_names)
            raise DataError(f"{name}: has {count} classes, the network has {num_classes}")
        if not 0 <= int(self.labels_N.min()) <= int(self.labels_N.max()) < num_classes:
            raise DataError(f"{name}: has labels outside 0 to {num_classes - 1}")

    def batches(
        self, batch_size: int, order: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 pixels (B, C, S, S), labels (B,)) in the given order, by default as stored.

        An image that does not decode has pixels of 0 and the label -1.

        Raises:
            DataError: if more images do not decode than `skipped` allows.
        """
        parts = torch.split(torch.arange(len(self)) if order is None else order, batch_size)
        if self.pixels is not None:
            for part in parts:
                yield self.pixels[part], self.labels_N[part]
            return
        indices = chain.from_iterable(part.tolist() for part in parts)
        with (
            ThreadPoolExecutor(self.workers) as pool,
            closing(map_ahead(pool, self._decode, indices, _AHEAD * batch_size)) as decoded,
        ):
            for part in parts:
                pixels_BCSS = np.zeros((len(part), *self.shape), dtype=np.uint8)
                labels_B = self.labels_N[part]
                for at, image in enumerate(islice(decoded, len(part))):
                    if isinstance(image, CorruptImageError):
                        self.skipped.add(image.where, image.reason)
                        labels_B[at] = -1
                    else:
                        pixels_BCSS[at] = image
                self.skipped.check()
                yield torch.from_numpy(pixels_BCSS), labels_B

    def loaded(self, on_image: Callable[[], None] | None = None) -> ImageDataset:
        """Decode into memory, without images that fail; `on_image` is called for each image.

        Raises:
            DataError: if more images do not decode than `skipped` allows.
        """
        assert self.source is not None

        def decode(rows: Tensor) -> list[tuple[np.ndarray | CorruptImageError, str]]:
            return [self._decode_hashed(row) for row in rows.tolist()]

        pixels = np.empty((len(self), *self.shape), dtype=np.uint8)
        kept: list[int] = []
        hashes: list[str] = []
        tasks = torch.split(torch.arange(len(self)), _PER_TASK)
        with (
            ThreadPoolExecutor(self.workers) as pool,
            closing(map_ahead(pool, decode, tasks, 2 * self.workers)) as decoded,
        ):
            for number, (image, hashed) in enumerate(chain.from_iterable(decoded)):
                if isinstance(image, CorruptImageError):
                    self.skipped.add(image.where, image.reason)
                    self.skipped.check()
                else:
                    pixels[len(kept)] = image
                    kept.append(number)
                    hashes.append(hashed)
                if on_image is not None:
                    on_image()
        rows = torch.tensor(kept, dtype=torch.int64)
        return replace(
            self,
            pixels=torch.from_numpy(pixels[: len(kept)]),
            labels_N=self.labels_N[rows],
            rows=self.rows[rows],
            hashes=tuple(hashes),
        )

    def relabelled(self, mapping: Sequence[int], class_names: Sequence[str]) -> ImageDataset:
        """The same images with label c replaced by `mapping[c]`, one of `class_names`."""
        labels_N = torch.tensor(mapping)[self.labels_N]
        return replace(self, labels_N=labels_N, class_names=tuple(class_names))

    def subset(self, rows: Tensor) -> ImageDataset:
        """The given rows of this set. For images on disk, the count of skipped ones restarts."""
        skipped = self.skipped
        if self.pixels is None:
            skipped = Skipped(self.name, len(rows), limit=skipped.limit)
        return replace(
            self,
            pixels=None if self.pixels is None else self.pixels[rows],
            labels_N=self.labels_N[rows],
            rows=self.rows[rows] if self.source is not None else self.rows,
            skipped=skipped,
            hashes=tuple(self.hashes[row] for row in rows.tolist()) if self.hashes else (),
        )

    def sample(self, count: int) -> ImageDataset:
        """At most `count` images, chosen at random with a fixed seed, in their original order."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        return self.subset(order[:count].sort().values)

    def digests(self, most: int | None = None) -> list[str]:
        """`digest` of every image's file; "" for one that cannot be read.

        Files that have not been read before are read now: if there are more than `most`, only an
        evenly spaced sample of them.
        """
        if self.hashes or self.source is None:
            return list(self.hashes)
        source = self.source
        rows = self.rows if most is None else self.rows[:: max(1, -(-len(self) // most))]

        def hashed(row: int) -> str:
            try:
                return digest(source[row].read())
            except CorruptImageError:
                return ""

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(hashed, rows.tolist()))

    def _decode(self, index: int) -> np.ndarray | CorruptImageError:
        return self._decode_hashed(index, hashed=False)[0]

    def _decode_hashed(
        self, index: int, *, hashed: bool = True
    ) -> tuple[np.ndarray | CorruptImageError, str]:
        """The pixels of an image, and the digest of its file, which is read once."""
        assert self.source is not None
        assert self.preprocessing is not None
        entry = self.source[int(self.rows[index])]
        try:
            content = entry.read()
        except CorruptImageError as error:
            return error, ""
        image = decode_entry(entry._replace(content=content), self.preprocessing)
        return image, digest(content) if hashed else ""


class _Places(Sequence[str]):
    """The places of the images of some rows, looked up one at a time."""

    def __init__(self, source: ImageSource, rows: Tensor) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return _Places(self._source, self._rows[at])
        return self._source[int(self._rows[at])].where


def map_ahead(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], count: int
) -> Generator[R, None, None]:
    """Yield `work(item)` for each item in order, with up to `count` tasks in the pool."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def load_images(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    on_image: Callable[[], None] | None = None,
    corrupt_limit: float = LIMIT,
) -> ImageDataset:
    """Decode a whole split into memory; `on_image` is called for each image.

    Images that do not decode are left out and named in `skipped`.

    Raises:
        DataError: if more than the share `corrupt_limit` of the images do not decode, or a label
            is not one of the classes; the message names them.
    """
    return ImageDataset.of(source, preprocessing, corrupt_limit=corrupt_limit).loaded(on_image)


def channel_statistics(images: ImageDataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images in memory, for values in 0..1."""
    # a histogram is exact in integers, and needs no float copy of the set
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[0]):
        counts = torch.bincount(images.images_NCSS[:, channel].flatten().int(), minlength=256)
        share = counts.double() / counts.sum()
        mean = float((share * values).sum())
        means.append(round(mean, 4))
        stds.append(round(float((share * (values - mean) ** 2).sum().sqrt()), 4))
    return tuple(means), tuple(stds)


# -- labels ---------------------------------------------------------------------------------------


def label_mapping(
    name: str,
    data_classes: Sequence[str],
    net_classes: Sequence[str] | None,
    num_classes: int,
    owner: str = "the network",
) -> list[int]:
    """The network's label for each label of a data set, whose classes are matched by name.

    A network without class names uses the data set's labels unchanged. In messages, `owner` names
    the owner of `net_classes`.

    Raises:
        DataError: if the numbers of classes differ, or a name is not one of the network's.
    """
    if len(data_classes) != num_classes:
        raise DataError(f"{name}: has {len(data_classes)} classes, {owner} has {num_classes}")
    if net_classes is None:
        return list(range(num_classes))
    unknown = [c for c in data_classes if c not in net_classes]
    if unknown:
        known = ", ".join(net_classes)
        raise DataError(f"{name}: class {unknown[0]!r} is none of {owner}'s: {known}")
    return [list(net_classes).index(c) for c in data_classes]


def open_images(
    checkpoint: Checkpoint,
    path: str,
    split: str,
    *,
    share: float | None = None,
    corrupt_limit: float = LIMIT,
) -> ImageDataset:
    """Open images for a checkpoint's network, with the preprocessing and labels of its training.

    `share` selects only the part of the split that a training with that `val_share` holds out.

    Raises:
        DataError: if the images cannot be read, or their classes are not the network's.
    """
    assert checkpoint.preprocessing is not None
    source = open_source(path, split)
    classes = checkpoint.class_names
    mapping = label_mapping(
        source.name, source.class_names, classes, checkpoint.net.spec.num_classes
    )
    rows = None if share is None else holdout(source.labels(), share)[1]
    images = ImageDataset.of(
        source, checkpoint.preprocessing, rows=rows, corrupt_limit=corrupt_limit
    )
    return images.relabelled(mapping, source.class_names if classes is None else classes)


# -- held-out images ------------------------------------------------------------------------------


def holdout(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ascending rows to train on and to hold out: a function of (labels, share, seed).

    The same share of every class is held out, to within one image. `labels` are those of all rows,
    even if their images do not decode, so that every command finds the same rows.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, 0, "holdout"))
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]
    # class by class in random order, hold out a row wherever the rounded sum of shares rises
    passed = torch.arange(len(labels) + 1, dtype=torch.float64).mul(share).round()
    back = passed[1:] > passed[:-1]
    return order[~back].sort().values, order[back].sort().values


class HeldOut(NamedTuple):
    """Images that a training held out: a split, or a share of its training split."""

    path: str
    split: str
    share: float | None
    """The share for `holdout`; None for the whole split."""


def data_recipes(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The data of each stage of a checkpoint's recipe that names images, last stage first."""
    for stage in (recipe.get("gate"), recipe.get("supernet")):
        data = stage.get("data") if isinstance(stage, Mapping) else None
        if isinstance(data, Mapping) and isinstance(data.get("path"), str):
            yield data


def held_out(recipe: Mapping[str, Any]) -> list[HeldOut | None]:
    """The images that each stage of a checkpoint's recipe held out, last stage first.

    None for a stage that held nothing out; stages that name no images are omitted.
    """
    found: list[HeldOut | None] = []
    for data in data_recipes(recipe):
        path, split, share = data["path"], data.get("split"), data.get("val_share")
        if not path:
            continue
        if isinstance(data.get("val_split"), str):
            found.append(HeldOut(path, data["val_split"], None))
        elif isinstance(split, str) and isinstance(share, float) and 0 < share < 1:
            found.append(HeldOut(path, split, share))
        else:
            found.append(None)
    return found
