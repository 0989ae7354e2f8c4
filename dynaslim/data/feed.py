"""Training batches: what every kind of feed gives, and how a recipe's feed is opened.

Everything random is a function of (seed, epoch), so that a resumed run gets the batches of a
straight one; and several processes together see what one sees.

Suffixes: B rows of a batch, C channels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

from dynaslim.data.disk import DiskFeed, DiskImages
from dynaslim.data.memory import MemoryImages, channel_statistics, load_images
from dynaslim.data.order import EpochOrder, holdout, own_rows, whole_batches
from dynaslim.data.skipped import Skipped
from dynaslim.data.source import ImageSource, open_source
from dynaslim.data.stream import StreamFeed, fetched, open_stream
from dynaslim.data.transforms import Augment
from dynaslim.errors import DataError, UsageError, check
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe, DataRecipe

HASHED: Final = 20_000
"""Most files on the disk that are read to be told again, beside training."""
Images = TypeVar("Images", MemoryImages, DiskImages)


class Feed(Protocol):
    """Batches of uint8 pixels with labels, epoch after epoch."""

    name: str
    """The data set, for messages."""
    class_names: tuple[str, ...]
    batch_size: int
    """Images of one step, over all processes."""
    steps_per_epoch: int
    """Whole batches only; images that do not fill one are left out of the epoch."""
    resized: bool
    """The pixels are already a random resized crop of their picture."""
    skipped: Skipped
    """Images that this process met and that do not decode."""

    def batches(
        self, start: int, stop: int, *, purpose: str = "train"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Global steps start to stop - 1: uint8 pixels (B, C, S, S) and int64 labels (B,).

        B is this process's share of the batch; each purpose has an order of its own.

        Raises:
            DataError: if too many images do not decode, or there are fewer than was said.
        """
        ...


class MemoryFeed:
    """A `Feed` of images in memory."""

    def __init__(self, images: MemoryImages, batch_size: int, seed: int) -> None:
        """Shuffle `images` by `seed`.

        Raises:
            TrainingError: if the images do not fill one batch.
            UsageError: if the batch cannot be divided evenly among the processes.
        """
        self.name = images.name
        self.class_names = images.class_names
        self.batch_size = batch_size
        self.steps_per_epoch = whole_batches(images.name, len(images), batch_size)
        self.resized = False
        self.skipped = Skipped.of(images.name, len(images) + len(images.skipped), images.skipped)
        self.images = images
        self._seed = seed
        own_rows(batch_size)

    def batches(
        self, start: int, stop: int, *, purpose: str = "train"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Feed.batches`."""
        order, own = EpochOrder(len(self.images), self._seed, purpose), own_rows(self.batch_size)
        for step in range(start, stop):
            epoch, at = divmod(step, self.steps_per_epoch)
            rows = order(epoch)[at * self.batch_size : (at + 1) * self.batch_size][own]
            yield self.images.images_NCSS[rows], self.images.labels_N[rows]


@dataclass(frozen=True)
class Training:
    """What a recipe's images are to a training run."""

    feed: Feed
    augment: Augment
    """From the feed's pixels to network input."""
    validation: MemoryImages | DiskImages | None
    """Images to choose by; None where the recipe holds none back."""
    preprocessing: Preprocessing
    images: int
    """How many there are to train on."""
    digests: Callable[[], Sequence[str]]
    """`digest` of the files trained on; of more than `HASHED` on the disk a sample, of a stream
    none."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the labels."""
        return self.feed.class_names

    @property
    def name(self) -> str:
        """The data set, for messages."""
        return self.feed.name

    @property
    def held_back(self) -> int:
        """How many there are to choose by."""
        return 0 if self.validation is None else len(self.validation)


def open_training(
    recipe: DataRecipe,
    augment: AugmentRecipe,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    channels: int,
    on_image: Callable[[], None] | None = None,
) -> Training:
    """Open a recipe's images for a network of so many input channels (1 or 3).

    The images held back do not depend on `seed`. A recipe without mean and std gets those of the
    training images where they are in memory, else ImageNet's (for one channel, the mean of its
    three). `workers` decode a `disk` or `stream` set; `on_image` is called for each image that is
    decoded into memory.

    Raises:
        UsageError: if the recipe names no images, or does not suit the network or the batch.
        TrainingError: if the images do not fill one batch.
        DataError: if images cannot be read, or the splits' classes differ.
    """
    check(bool(recipe.path), "name the images: --data.path PATH")
    preprocessing = _preprocessing(recipe, channels)
    feed: Feed
    validation: MemoryImages | DiskImages | None
    if recipe.load == "memory":
        images, validation = _in_memory(recipe, preprocessing, on_image)
        feed = MemoryFeed(images, batch_size, seed)
        count = len(images)
        digests: Callable[[], Sequence[str]] = partial(tuple, images.digests)
        if recipe.mean is None:
            mean, std = channel_statistics(images)
            preprocessing = replace(preprocessing, mean=mean, std=std)
    elif recipe.load == "disk":
        source, rows, validation = _on_disk(recipe, preprocessing, workers)
        feed = DiskFeed(
            source,
            preprocessing,
            augment,
            batch_size,
            seed,
            workers,
            rows=rows,
            corrupt_limit=recipe.corrupt_limit,
        )
        count = len(source) if rows is None else len(rows)
        trained = DiskImages.of(source, preprocessing, rows=rows, workers=max(workers, 1))
        digests = partial(trained.digests, HASHED)
    else:
        stream = open_stream(recipe.path, recipe.split)
        feed = StreamFeed(
            stream,
            preprocessing,
            augment,
            batch_size,
            seed,
            workers,
            num_images=recipe.stream_images,
            buffer=recipe.shuffle_buffer,
            corrupt_limit=recipe.corrupt_limit,
        )
        validation, digests = None, tuple
        count = stream.num_images or recipe.stream_images or 0
        if recipe.val_split is not None:
            source = fetched(recipe.path, recipe.val_split)
            _check_apart(recipe, stream.split, source.split)
            validation = _disk_images(source, recipe, preprocessing, workers)
            validation = _same_classes(validation, feed.class_names)
    augmented = Augment(augment, preprocessing, resized_already=feed.resized)
    return Training(feed, augmented, validation, preprocessing, count, digests)


def _in_memory(
    recipe: DataRecipe, preprocessing: Preprocessing, on_image: Callable[[], None] | None
) -> tuple[MemoryImages, MemoryImages | None]:
    """The images to train on and those to choose by."""

    def load(source: ImageSource) -> MemoryImages:
        return load_images(
            source,
            preprocessing,
            on_image=on_image,
            corrupt_limit=recipe.corrupt_limit,
        )

    source = open_source(recipe.path, recipe.split)
    if recipe.val_split is not None:
        other = open_source(recipe.path, recipe.val_split)
        _check_apart(recipe, source.split, other.split)
        images = load(source)
        return images, _same_classes(load(other), images.class_names)
    images = load(source)
    if not recipe.val_share:
        return images, None
    # divided by all rows, whether they decode or not: so does who measures on those held back
    _, held_back = _holdout(recipe, source.labels())
    held_N = torch.isin(torch.tensor(images.rows), held_back)
    return images.subset((~held_N).nonzero().flatten()), images.subset(held_N.nonzero().flatten())


def _on_disk(
    recipe: DataRecipe, preprocessing: Preprocessing, workers: int
) -> tuple[ImageSource, Tensor | None, DiskImages | None]:
    """The source to train on with its rows (None: all), and the images to choose by."""
    source = open_source(recipe.path, recipe.split)
    labels = source.labels()
    if recipe.val_split is not None:
        other = open_source(recipe.path, recipe.val_split)
        _check_apart(recipe, source.split, other.split)
        validation = _disk_images(other, recipe, preprocessing, workers)
        return source, None, _same_classes(validation, source.class_names)
    if not recipe.val_share:
        return source, None, None
    rows, held_back = _holdout(recipe, labels)
    return source, rows, _disk_images(source, recipe, preprocessing, workers, held_back)


def _check_apart(recipe: DataRecipe, split: str, val_split: str) -> None:
    """A set that is not divided gives the same images under every name."""
    check(
        split != val_split,
        f"{recipe.path}: {recipe.split!r} and {recipe.val_split!r} are the same images here; leave "
        f"val_split out, and val_share holds some back",
    )


def _preprocessing(recipe: DataRecipe, channels: int) -> Preprocessing:
    usual = Preprocessing(recipe.image_size_px, crop_fraction=recipe.crop_fraction)
    mean, std = recipe.mean or usual.mean, recipe.std or usual.std
    if recipe.mean is None and channels == 1:
        mean, std = (round(sum(mean) / 3, 3),), (round(sum(std) / 3, 3),)
    if len(mean) != channels:
        raise UsageError(f"mean {mean}: the network has {channels} input channels")
    return replace(usual, mean=mean, std=std)


def _holdout(recipe: DataRecipe, labels: Tensor) -> tuple[Tensor, Tensor]:
    rows, held_back = holdout(labels, recipe.val_share)
    check(
        len(held_back) > 0,
        f"val_share {recipe.val_share}: of {len(labels)} images it holds none back",
    )
    return rows, held_back


def _disk_images(
    source: ImageSource,
    recipe: DataRecipe,
    preprocessing: Preprocessing,
    workers: int,
    rows: Tensor | None = None,
) -> DiskImages:
    return DiskImages.of(
        source, preprocessing, rows=rows, workers=workers, corrupt_limit=recipe.corrupt_limit
    )


def _same_classes(images: Images, class_names: tuple[str, ...]) -> Images:
    """The images with their classes numbered as in training; raises `DataError` if they differ."""
    if images.class_names == class_names:
        return images
    if sorted(images.class_names) != sorted(class_names):
        raise DataError(f"{images.name}: the splits to train on and to choose by differ in classes")
    return images.relabelled([class_names.index(c) for c in images.class_names], class_names)
