"""What the runs of both stages work with, opened once and closed together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynaslim._files import write_atomic
from dynaslim.data.feed import Training, open_training
from dynaslim.data.skipped import report_lines
from dynaslim.distributed import gather, world_size
from dynaslim.errors import check
from dynaslim.pretrained import checkpoint_file
from dynaslim.progress import Bar, note, progress
from dynaslim.recipes import DataRecipe, GateRecipe, SupernetRecipe
from dynaslim.runs.callbacks import Callbacks
from dynaslim.runs.folder import TRAINED_ON, RunFolder, trained_on
from dynaslim.runs.launch import launched
from dynaslim.runs.options import RunOptions
from dynaslim.runs.signals import StopRequest, stop_requests


@dataclass(frozen=True)
class RunContext:
    """A run's folder, its options, the requests to stop it and the device it works on."""

    folder: RunFolder
    options: RunOptions
    stop: StopRequest
    device: torch.device

    def open_images(
        self, data: DataRecipe, recipe: SupernetRecipe | GateRecipe, channels: int
    ) -> Training:
        """`open_training` with a bar; can be stopped while it reads images into memory.

        How many images there are is said, and which they are is kept in the run's folder.
        """
        with progress("reading images", None) as bar:
            opened = open_training(
                data,
                recipe.augment,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                workers=self.options.workers,
                channels=channels,
                on_image=self.stop.checked(bar.advance),
            )
        skipped = opened.feed.skipped
        note(
            f"{opened.name}: {opened.feed.num_images} images to train on, "
            f"{opened.held_back} held back, {skipped.count} skipped"
        )
        note_skipped(skipped.lines)
        known = self.folder.file(TRAINED_ON)
        if self.folder.is_main and not (self.folder.state is not None and known.exists()):
            seen = set(opened.feed.digests()) - {""}
            base = recipe.supernet if isinstance(recipe, GateRecipe) else recipe.init
            if base is not None:  # what it starts from has seen those of its own run
                seen |= trained_on(checkpoint_file(base))
            write_atomic(known, "".join(f"{one}\n" for one in sorted(seen)).encode())
        return opened

    def callbacks(
        self, state: Callable[[], dict[str, Any]], bar: Bar, batch_size: int
    ) -> Callbacks:
        """The callbacks of a loop over steps whose `state` is to be saved."""
        return Callbacks(self.folder, self.stop, self.options, state, bar, batch_size=batch_size)

    def results(self) -> dict[str, Any] | None:
        """What a resumed run has written already of what came of it."""
        path = self.folder.file("results.json")
        if not (self.options.resume and path.exists()):
            return None
        written: dict[str, Any] = json.loads(path.read_text())
        return written


@contextmanager
def opened(
    stage: str,
    recipe: SupernetRecipe | GateRecipe,
    out: str | Path,
    options: RunOptions | None,
    *,
    alone_for: str = "",
) -> Iterator[RunContext]:
    """Join the other processes, take signals as requests and open the folder, while inside.

    `alone_for` names what cannot be done by several processes.

    Raises:
        UsageError: as `RunFolder`, for an unknown device, or for several processes where one is
            needed.
        OSError: if the folder cannot be written.
    """
    options = options or RunOptions()
    with launched(options.device) as device, stop_requests() as stop:
        check(
            not alone_for or world_size() == 1,
            f"{alone_for}: runs in one process; leave torchrun out",
        )
        folder = RunFolder(
            Path(out), stage, recipe.to_dict(), resume=options.resume, force=options.force
        )
        with folder:
            yield RunContext(folder, options, stop, device)


def note_skipped(lines: Sequence[str]) -> None:
    """Note which images were skipped."""
    for line in report_lines(lines):
        note(line)


def skipped_lines(data: Training) -> list[str]:
    """A line for every image, to train on or held out, that a process of the run left out."""
    lines = data.validation.skipped.lines if data.validation is not None else ()
    everywhere = gather([*data.feed.skipped.lines, *lines])
    return sorted({line for part in everywhere for line in part})
