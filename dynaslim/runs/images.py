"""The images of a run, opened as its recipe says."""

from __future__ import annotations

from dynaslim.data.feed import Training, open_training
from dynaslim.data.skipped import Skipped
from dynaslim.distributed import gather
from dynaslim.progress import progress
from dynaslim.recipes import DataRecipe, GateRecipe, SupernetRecipe
from dynaslim.runs.options import RunOptions
from dynaslim.runs.signals import StopRequest


def skipped_lines(data: Training) -> list[str]:
    """A line for every image, to train on or held out, that a process of the run left out."""
    held_out = data.validation.skipped if data.validation is not None else ()
    lines = held_out.lines if isinstance(held_out, Skipped) else held_out
    everywhere = gather([*data.feed.skipped.lines, *lines])
    return sorted({line for part in everywhere for line in part})


def open_images(
    data: DataRecipe,
    recipe: SupernetRecipe | GateRecipe,
    options: RunOptions,
    stop: StopRequest,
    channels: int,
) -> Training:
    """`open_training` with a bar; can be stopped while it reads images into memory."""
    with progress("reading images", None) as bar:

        def tell() -> None:
            stop.check()
            bar.advance()

        return open_training(
            data,
            recipe.augment,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            workers=options.workers,
            channels=channels,
            on_image=tell,
        )
