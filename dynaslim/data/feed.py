"""Training batches: feeds of images in memory, on disk and in streams.

The order of images is a function of (seed, epoch), so a resumed run gets the same batches as an
uninterrupted one. Several processes together see the same images as one process, except for a
stream, whose order depends on the number of processes.

Suffixes: B rows of a batch, C channels, S side in pixels.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynaslim import distributed
from dynaslim.data.decode import Crop, decode_entry, random_crop
from dynaslim.data.images import ImageDataset, channel_statistics, holdout, label_mapping, map_ahead
from dynaslim.data.skipped import LIMIT, CorruptImageError, Skipped
from dynaslim.data.source import Entry, ImageSource, fetched, open_source
from dynaslim.data.transforms import Augment
from dynaslim.errors import DataError, DynaslimError, TrainingError, UsageError, check
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe, DataRecipe
from dynaslim.seeds import step_seed

_MOST_HASHED: Final = 20_000
"""The most files on disk to hash at the start of a run."""
_AHEAD: Final = 2
"""Number of batches that each worker decodes ahead."""
_READ_AHEAD: Final = 3
"""Number of batches of a stream to read and decode ahead."""
_LEAST_TRIED: Final = 1_000
"""Images of a stream to read before the share of corrupt ones is checked."""


class Feed(ABC):
    """Batches of uint8 pixels with labels, epoch after epoch.

    Raises:
        TrainingError: if the images do not fill one batch.
        UsageError: if the batch cannot be divided evenly among the processes.
    """

    def __init__(
        self,
        images: ImageDataset | ImageSource,
        num_images: int,
        batch_size: int,
        seed: int,
        skipped: Skipped,
        augment: AugmentRecipe | None,
        *,
        decodes: bool = True,
    ) -> None:
        if num_images < batch_size:
            raise TrainingError(
                f"{images.name or 'data'}: {num_images} images do not fill one batch of "
                f"{batch_size}"
            )
        self.name = images.name
        """The name of the data set, for messages."""
        self.class_names = images.class_names
        self.num_images = num_images
        """Number of training images."""
        self.batch_size = batch_size
        """Images per step, over all processes."""
        self.steps_per_epoch = num_images // batch_size
        """Number of full batches; the remaining images are left out of the epoch."""
        self.resized = decodes and augment is not None and augment.crop == "resized"
        """Whether the pixels are already random resized crops of the pictures."""
        self.skipped = skipped
        """Images that this process could not decode."""
        self.seed = seed
        self._augment = augment
        own_rows(batch_size)

    @abstractmethod
    def batches(
        self, start: int, stop: int, *, purpose: str = "train"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Global steps start to stop - 1: uint8 pixels (B, C, S, S) and int64 labels (B,).

        B is this process's share of the batch. Each purpose has its own order.

        Raises:
            DataError: if too many images do not decode, or there are fewer than expected.
        """

    def crop(self, epoch: int, purpose: str, place: int) -> Crop | None:
        """The crop of one image in an epoch; None if decoding makes no random crop."""
        if not self.resized or self._augment is None:
            return None
        return random_crop(self._augment.scale_min, f"{self.seed}/{epoch}/crop {purpose}/{place}")

    def digests(self) -> Sequence[str]:
        """`digest` of the training files: a sample for a large set on disk, none for a stream."""
        return ()

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs, as plain values."""
        return {"skipped": self.skipped.state(), "processes": distributed.world_size()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, in this or another process.

        Raises:
            UsageError: if the order of the images is not the one the run was started with.
        """
        self.skipped.load_state(state["skipped"])


def order_seed(seed: int, epoch: int, purpose: str) -> int:
    """The seed of an epoch's order; for "train" it is the same as in earlier versions."""
    return step_seed(seed, epoch, "order" if purpose == "train" else f"order {purpose}")


def own_rows(batch_size: int) -> slice:
    """The rows of each batch that this process takes.

    Raises:
        UsageError: if the batch cannot be divided evenly among the processes.
    """
    processes, rank = distributed.world_size(), distributed.rank()
    if batch_size % processes:
        raise UsageError(
            f"batch_size {batch_size}: cannot be divided evenly among {processes} processes"
        )
    share = batch_size // processes
    return slice(rank * share, (rank + 1) * share)


# -- images in memory or on the disk --------------------------------------------------------------


class ImageFeed(Feed):
    """Batches of a shuffled `ImageDataset`; images on disk are decoded in worker processes.

    With `augment`, a `resized` crop of images on disk is made in decoding. An image that does not
    decode is replaced by the next one in the epoch's order that does, so batches stay full and do
    not depend on earlier ones. With 0 workers this process decodes.
    """

    def __init__(
        self,
        images: ImageDataset,
        batch_size: int,
        seed: int,
        *,
        augment: AugmentRecipe | None = None,
        workers: int = 0,
    ) -> None:
        decodes = images.pixels is None
        super().__init__(
            images, len(images), batch_size, seed, images.skipped, augment, decodes=decodes
        )
        self.images = images
        self._workers = workers if decodes else 0

    def batches(
        self, start: int, stop: int, *, purpose: str = "train"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        steps = _Steps(self, purpose, own_rows(self.batch_size))  # the rank is not set in workers
        loader: DataLoader[Any] = DataLoader(
            steps,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self._workers,
            prefetch_factor=_AHEAD if self._workers else None,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # else it draws from the global one
            multiprocessing_context=_context() if self._workers else None,
            worker_init_fn=_ignore_signals,
        )
        for batch in loader:
            if isinstance(batch, DynaslimError):
                raise batch
            for where, reason in batch.skipped:
                self.skipped.add(where, reason)
            self.skipped.check()
            yield batch.pixels_BCSS, batch.labels_B

    def digests(self) -> Sequence[str]:
        return self.images.digests(_MOST_HASHED)


class _Batch(NamedTuple):
    """The batch of a step, as a worker returns it."""

    pixels_BCSS: Tensor
    labels_B: Tensor
    skipped: list[tuple[str, str]]
    """Place and reason for each image that does not decode."""


@dataclass
class _Steps(Dataset[_Batch | DynaslimError]):
    """The batch of each global step."""

    feed: ImageFeed
    purpose: str
    own: slice
    epoch: int = -1
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __getitem__(self, step: int) -> _Batch | DynaslimError:
        feed, images = self.feed, self.feed.images
        epoch, at = divmod(step, feed.steps_per_epoch)
        if epoch != self.epoch:
            seed = order_seed(feed.seed, epoch, self.purpose)
            generator = torch.Generator().manual_seed(seed)
            self.order = torch.randperm(len(images), generator=generator)
            self.epoch = epoch
        places = range(at * feed.batch_size, (at + 1) * feed.batch_size)[self.own]
        if images.pixels is not None:
            rows = self.order[places.start : places.stop]
            return _Batch(images.pixels[rows], images.labels_N[rows], [])
        skipped: list[tuple[str, str]] = []
        try:
            pixels, labels = zip(*(self._image(place, skipped) for place in places), strict=True)
        except DynaslimError as error:  # raised in a worker, its message would have a traceback
            return error
        return _Batch(torch.from_numpy(np.stack(pixels)), torch.stack(labels), skipped)

    def _image(self, place: int, skipped: list[tuple[str, str]]) -> tuple[np.ndarray, Tensor]:
        """The first image at or after a place of the epoch that decodes, and its label."""
        images = self.feed.images
        assert images.source is not None
        assert images.preprocessing is not None
        for further in range(len(self.order)):
            number = self.order[(place + further) % len(self.order)]
            row = int(images.rows[number])
            crop = self.feed.crop(self.epoch, self.purpose, row)
            image = decode_entry(images.source[row], images.preprocessing, crop)
            if not isinstance(image, CorruptImageError):
                return image, images.labels_N[number]
            skipped.append((image.where, image.reason))
        raise DataError(f"{images.name}: no image can be decoded; {skipped[0][0]}")


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals(_worker: int) -> None:
    """Ignore signals to the process group, because the run needs its workers to end its step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _context() -> str | None:
    """The start method of workers: fork where it is safe, since others import torch for seconds.

    The accelerator and torch's threads do not survive a fork, but workers use neither (DataLoader
    limits them to one thread).
    """
    if sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods():
        return "fork"
    return None


# -- streams --------------------------------------------------------------------------------------


class StreamFeed(Feed):
    """Batches of a stream, shuffled among `buffer` images; threads read and decode ahead.

    Each process reads its own part of the stream (see `ImageSource.shuffled`). An image that does
    not decode is replaced by the next one in its batch that does (the first follows the last), so
    batches do not depend on earlier ones. `num_images` is used if the stream has no known length.

    Raises:
        UsageError: if the number of images is unknown.
    """

    def __init__(
        self,
        stream: ImageSource,
        preprocessing: Preprocessing,
        augment: AugmentRecipe,
        batch_size: int,
        seed: int,
        workers: int = 1,
        *,
        num_images: int | None = None,
        buffer: int = 10_000,
        corrupt_limit: float = LIMIT,
    ) -> None:
        images = stream.num_images or num_images
        if images is None:
            raise UsageError(
                f"{stream.name}: does not say how many images it has; give --data.stream_images"
            )
        skipped = Skipped(stream.name, limit=corrupt_limit, at_least=_LEAST_TRIED)
        super().__init__(stream, images, batch_size, seed, skipped, augment)
        self._stream = stream
        self._preprocessing = preprocessing
        self._workers = max(workers, 1)
        self._buffer = buffer

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As `Feed.load_state`; also checks the number of processes, on which the order depends."""
        now = distributed.world_size()
        # if the state has no number, all processes read the order of one
        before = state.get("processes", 1)
        check(
            before == now,
            f"{self.name}: the order of a stream depends on the number of processes: the run was "
            f"started with the order of {before}, this is {now}; resume it with {before}, or start "
            f"a new run",
        )
        super().load_state(state)

    def batches(
        self, start: int, stop: int, *, purpose: str = "train"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Feed.batches`; images before `start` in its epoch are read, but not decoded."""
        while start < stop:
            epoch, at = divmod(start, self.steps_per_epoch)
            end = min(stop, (epoch + 1) * self.steps_per_epoch)
            yield from self._epoch(epoch, at, end - start, purpose)
            if end % self.steps_per_epoch == 0:
                self.skipped.check(complete=True)
            start = end

    def _epoch(
        self, epoch: int, first: int, steps: int, purpose: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        own = range(self.batch_size)[own_rows(self.batch_size)]
        entries = self._stream.shuffled(
            order_seed(self.seed, epoch, purpose),
            self._buffer,
            first * len(own),
            self.steps_per_epoch * len(own),
        )
        reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(self._workers)

        def decode(entry: Entry, place: int) -> np.ndarray | CorruptImageError:
            return decode_entry(entry, self._preprocessing, self.crop(epoch, purpose, place))

        def read(step: int) -> list[tuple[int, Future[np.ndarray | CorruptImageError]]]:
            at = step * self.batch_size + own.start
            batch = list(islice(entries, len(own)))
            if len(batch) < len(own):
                seen = step * len(own) + len(batch)
                raise DataError(
                    f"{self.name}: the stream ended after {seen} images, where "
                    f"{self.num_images // distributed.world_size()} were to be; correct "
                    f"--data.stream_images"
                )
            return [
                (entry.label, decoders.submit(decode, entry, place))
                for place, entry in enumerate(batch, at)
            ]

        try:
            with closing(
                map_ahead(reader, read, range(first, first + steps), _READ_AHEAD)
            ) as read_in:
                for batch in read_in:
                    seen = self.skipped.images + len(own)
                    self.skipped.images = min(seen, self.num_images)
                    images = [(image.result(), label) for label, image in batch]
                    yield self._whole(images)
        finally:
            # the reader thread closes it: datasets sleeps for seconds when it closes parquet
            with suppress(RuntimeError):  # at interpreter exit no task can start
                reader.submit(entries.close)
            reader.shutdown(wait=False)
            decoders.shutdown(wait=False, cancel_futures=True)

    def _whole(
        self, batch: list[tuple[np.ndarray | CorruptImageError, int]]
    ) -> tuple[Tensor, Tensor]:
        """The batch, with every image that does not decode replaced by the next that does."""
        pixels, labels = [], []
        for at in range(len(batch)):
            for image, label in (*batch[at:], *batch[:at]):
                if not isinstance(image, CorruptImageError):
                    pixels.append(image)
                    labels.append(label)
                    break
                self.skipped.add(image.where, image.reason)
            else:
                last = self.skipped.lines[-1]
                raise DataError(f"{self.name}: no image of a batch decodes; {last}")
        self.skipped.check()
        return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


# -- what a recipe trains on ----------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """The images of a training run."""

    feed: Feed
    augment: Augment
    """Turns the feed's pixels into network input."""
    validation: ImageDataset | None
    """Held-out images; None if the recipe holds none out."""
    preprocessing: Preprocessing

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.feed.class_names

    @property
    def held_back(self) -> int:
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
    """Open a recipe's images for a network with `channels` input channels (1 or 3).

    The held-out images do not depend on `seed`. A recipe without mean and std gets those of the
    training images if these are in memory, else ImageNet's (for one channel, the mean of its
    three). `workers` is the number of decoders of a `disk` or `stream` set; `on_image` is called
    for each image that is decoded into memory.

    Raises:
        UsageError: if the recipe names no images, or does not suit the network or the batch.
        TrainingError: if the images do not fill one batch.
        DataError: if images cannot be read, or the splits' classes differ.
    """
    check(bool(recipe.path), "name the images: --data.path PATH")
    preprocessing = _preprocessing(recipe, channels)
    in_memory, streaming = recipe.load == "memory", recipe.load == "stream"
    source = open_source(recipe.path, recipe.split, streaming=streaming)

    def dataset(source: ImageSource, rows: Tensor | None = None) -> ImageDataset:
        images = ImageDataset.of(
            source,
            preprocessing,
            rows=rows,
            workers=None if in_memory else workers,
            corrupt_limit=recipe.corrupt_limit,
        )
        return images.loaded(on_image) if in_memory else images

    feed: Feed
    images = validation = None
    if recipe.val_split is not None:
        opened = fetched if streaming else open_source
        other = opened(recipe.path, recipe.val_split)
        # a set without splits has the same images under every split name
        check(
            source.split != other.split,
            f"{recipe.path}: {recipe.split!r} and {recipe.val_split!r} are the same images here; "
            f"leave val_split out, and val_share holds some back",
        )
        names = source.class_names
        mapping = label_mapping(
            other.name, other.class_names, names, len(names), "the training split"
        )
        images = None if streaming else dataset(source)
        validation = dataset(other).relabelled(mapping, names)
    elif recipe.val_share:
        labels = source.labels()
        rows, held_rows = holdout(labels, recipe.val_share)
        check(
            len(held_rows) > 0,
            f"val_share {recipe.val_share}: of {len(labels)} images it holds none out",
        )
        if in_memory:  # decode once, and check skipped images together
            everything = dataset(source)
            held_N = torch.isin(everything.rows, held_rows)
            images = everything.subset((~held_N).nonzero().flatten())
            validation = everything.subset(held_N.nonzero().flatten())
        else:
            images, validation = dataset(source, rows), dataset(source, held_rows)
    elif not streaming:
        images = dataset(source)
    if images is None:
        feed = StreamFeed(
            source,
            preprocessing,
            augment,
            batch_size,
            seed,
            workers,
            num_images=recipe.stream_images,
            buffer=recipe.shuffle_buffer,
            corrupt_limit=recipe.corrupt_limit,
        )
    else:
        feed = ImageFeed(images, batch_size, seed, augment=augment, workers=workers)
        if in_memory and recipe.mean is None:
            mean, std = channel_statistics(images)
            preprocessing = replace(preprocessing, mean=mean, std=std)
    augmented = Augment(augment, preprocessing, resized_already=feed.resized)
    return Training(feed, augmented, validation, preprocessing)


def _preprocessing(recipe: DataRecipe, channels: int) -> Preprocessing:
    usual = Preprocessing(recipe.image_size_px, crop_fraction=recipe.crop_fraction)
    mean, std = recipe.mean or usual.mean, recipe.std or usual.std
    if recipe.mean is None and channels == 1:
        mean, std = (round(sum(mean) / 3, 3),), (round(sum(std) / 3, 3),)
    if len(mean) != channels:
        raise UsageError(f"mean {mean}: the network has {channels} input channels")
    return replace(usual, mean=mean, std=std)
