"""The images that a report evaluates a network on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import dynaslim.data
from dynaslim.checkpoint import Checkpoint
from dynaslim.data.images import HeldOut, ImageDataset, held_out
from dynaslim.data.images import open_images as open_for
from dynaslim.data.layout import WHOLE
from dynaslim.data.source import ImageSource, open_source
from dynaslim.errors import CheckpointError, DataError

MINI: Final = Path(dynaslim.data.__file__).parent / "fashion_mnist_mini"
"""The set that ships with the package."""


@dataclass(frozen=True)
class Opened:
    """Images to evaluate on, and what they are."""

    images: ImageDataset
    data: str
    """The data set as it was named."""
    split: str
    held_back: float | None
    """Share of the split that training held back, which these are; None for the whole split."""
    whole: int
    """How many there are before a limit."""
    trained_on: bool
    """Whether these are the images that the network was trained on, as far as its recipe says."""


class NoImagesError(Exception):
    """There are none to be had without being told where; the message says why."""


def open_images(
    checkpoint: Checkpoint,
    *,
    data: str | None,
    split: str | None,
    limit: int | None,
) -> Opened:
    """Images for a network: those named, or else those that its training held back.

    `limit` takes so many at random, always the same.

    Raises:
        NoImagesError: if none are named and the recipe's are not to be had here.
        DataError: if those named cannot be read, or their classes are not the network's.
        CheckpointError: if images are named for a checkpoint that does not say how to prepare them.
    """
    pre = checkpoint.preprocessing
    if pre is None:
        reason = "the checkpoint does not say how images are prepared (preprocessing)"
        raise CheckpointError(reason) if data is not None else NoImagesError(reason)
    if data is not None:
        return _open(checkpoint, HeldOut(data, split or "test", None), limit)
    stages = held_out(checkpoint.recipe)
    try:
        if not stages:
            return _open(checkpoint, _shipped(checkpoint, split), limit)
        found = stages[0]
        if found is None:
            raise NoImagesError("training held no images back")
        if not Path(found.path).exists():
            raise NoImagesError(f"the run's images are not at {found.path} here")
        if split is not None:
            found = HeldOut(found.path, split, None)
        return _open(checkpoint, found, limit)
    except DataError as error:
        raise NoImagesError(f"the run's images cannot be read ({error})") from None


def _shipped(checkpoint: Checkpoint, split: str | None) -> HeldOut:
    """The set that ships, for a network that the demo made of it."""
    stages = [checkpoint.recipe.get(stage) for stage in ("supernet", "gate")]
    names = checkpoint.class_names
    if all(isinstance(stage, Mapping) for stage in stages) and names is not None:
        chosen = HeldOut(str(MINI), split or "test", None)
        if open_source(MINI, chosen.split).class_names == names:
            return chosen
    raise NoImagesError("the checkpoint does not say which images it was trained on")


def _open(checkpoint: Checkpoint, which: HeldOut, limit: int | None) -> Opened:
    images = open_for(checkpoint, which.path, which.split, share=which.share)
    whole = len(images)
    if limit is not None and limit < whole:
        picked = torch.randperm(whole, generator=torch.Generator().manual_seed(0))[:limit]
        images = images.subset(picked.sort().values)
    assert checkpoint.preprocessing is not None
    assert images.source is not None
    images.check_fits(checkpoint.preprocessing, checkpoint.net.spec.num_classes)
    trained_on = which.share is None and _is_trained_on(checkpoint.recipe, images.source)
    return Opened(images, which.path, images.source.split, which.share, whole, trained_on)


def _is_trained_on(recipe: Mapping[str, Any], source: ImageSource) -> bool:
    for stage in (recipe.get("gate"), recipe.get("supernet")):
        data = stage.get("data") if isinstance(stage, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(data.get("path"), str):
            continue
        path = Path(data["path"] or MINI)
        same = path.exists() and path.resolve() == Path(source.name).resolve()
        if same and source.split in (data.get("split"), WHOLE):
            return True
    return False
