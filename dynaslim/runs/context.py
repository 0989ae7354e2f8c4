"""Code shared by the runs of both stages: processes, signals, evaluation, callbacks after steps."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dynaslim._files import write_atomic
from dynaslim.data.feed import Training, open_training
from dynaslim.data.skipped import report_lines
from dynaslim.distributed import gather, largest, rank, world_size
from dynaslim.errors import UsageError, check
from dynaslim.evaluation import Evaluation, evaluate
from dynaslim.model_names import checkpoint_file
from dynaslim.nn.net import ElasticNet
from dynaslim.progress import Bar, note, progress
from dynaslim.recipes import DataRecipe, GateRecipe, RunOptions, SupernetRecipe
from dynaslim.runs.curves import curves_figure
from dynaslim.runs.folder import (
    TRAINED_ON,
    RunFolder,
    read_metrics,
    record_trained_on,
    trained_on,
    write_json,
)
from dynaslim.runtime.cache import usable_cores
from dynaslim.spec import Route


class Stopped(BaseException):
    """The run was stopped by a signal; if it is resumed, it continues from its last snapshot.

    Not an `Exception`, so that no error handler catches it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """Records SIGTERM or SIGINT as a request to stop; another SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self) -> int | None:
        """The signal that any process of the run received, so that all stop after the same step."""
        return largest(self.number or 0) or None

    def check(self) -> None:
        """Raise `Stopped` if a signal was received; for work that a resumed run repeats."""
        if self.number is not None:
            raise Stopped(self.number)

    def checked(self, callback: Callable[..., object]) -> Callable[..., None]:
        """A progress callback that calls `check` and then `callback`."""

        def call(*done: int) -> None:
            self.check()
            callback(*done)

        return call


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A context in which SIGTERM and SIGINT are recorded as requests to stop."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python lets only the main thread handle signals
        return
    before = {n: signal.signal(n, request.receive) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note_if_busy() -> None:
    """Print a warning if other programs keep the processor busy.

    The number of threads is not changed, because results depend on it.
    """
    if hasattr(os, "getloadavg") and "OMP_NUM_THREADS" not in os.environ:
        line = busy(os.getloadavg()[0], usable_cores(), torch.get_num_threads())
        if line is not None:
            note(line)


def busy(load: float, cores: int, threads: int) -> str | None:
    """The warning for a load average of `load`; None if enough cores are free."""
    if threads == 1 or load < cores / 2:
        return None
    return (
        f"warning: other programs keep this machine busy (load {load:.1f} on {cores} cores), and "
        f"{threads} threads that wait for one another can be several times slower than fewer: stop "
        f"this and start it with OMP_NUM_THREADS={max(1, min(threads, int(cores - load)))}"
    )


@contextmanager
def launched(device: str) -> Iterator[torch.device]:
    """Join the run's other processes, if torchrun started any; yields the device to use.

    Raises:
        UsageError: if there is no such device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations at import
        from lightning_fabric import Fabric
        from lightning_fabric.utilities.exceptions import MisconfigurationException

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    try:
        fabric = Fabric(
            accelerator=device,
            devices=here,
            num_nodes=hosts,
            # only its process group is used: a step averages the gradients of all its passes once,
            # whereas a wrapper around the module would average them once per pass
            strategy="ddp" if here * hosts > 1 else "auto",
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UsageError(f"device {device}: {' '.join(str(error).split())}") from None
    fabric.launch()
    if fabric.device.type == "cpu":
        note_if_busy()
    try:
        yield fabric.device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class RunContext:
    folder: RunFolder
    options: RunOptions
    stop: StopRequest
    device: torch.device

    def open_images(
        self, data: DataRecipe, recipe: SupernetRecipe | GateRecipe, channels: int
    ) -> Training:
        """Call `open_training` with a progress bar; it can be stopped while it reads into memory.

        Prints the numbers of images and writes their digests to the run's folder.
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
            f"{opened.feed.name}: {opened.feed.num_images} images to train on, "
            f"{opened.held_back} held out, {skipped.count} skipped"
        )
        for line in report_lines(skipped.lines):
            note(line)
        record = self.folder.file(TRAINED_ON)
        if self.folder.is_main and not (self.folder.state is not None and record.exists()):
            seen = set(opened.feed.digests()) - {""}
            base = recipe.supernet if isinstance(recipe, GateRecipe) else recipe.init
            if base is not None:  # its weights come from a run on other images
                seen |= trained_on(checkpoint_file(base))
            record_trained_on(self.folder.path, seen)
        return opened

    def evaluate(
        self,
        net: ElasticNet,
        data: Training,
        label: str = "",
        *,
        routes: Sequence[Route] | None = None,
        dynamic: bool = True,
    ) -> Evaluation | None:
        """Evaluate on the held-out images, with a progress bar if `label`; None without images."""
        if data.validation is None:
            return None
        with progress(label and f"evaluating {label}", len(data.validation)) as bar:
            return evaluate(
                net,
                data.validation,
                data.preprocessing,
                routes=routes,
                on_batch=self.stop.checked(bar.advance),
                dynamic=dynamic,
            )

    def write_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write curves and results on the first process; returns the results."""
        if rank() == 0:
            if lines := read_metrics(self.folder.path):
                picture = write_atomic(self.folder.file("curves.png"), curves_figure(lines))
                results["files"]["curves"] = str(picture)
            write_json(self.folder.file("results.json"), results)
        return results

    def results(self) -> dict[str, Any] | None:
        """The results of a resumed run that has already ended, else None."""
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
    single_process_for: str = "",
) -> Iterator[RunContext]:
    """A context that joins the other processes, handles signals and opens the folder.

    `single_process_for` names a feature that needs a single process, for the message.

    Raises:
        UsageError: as `RunFolder`, for an unknown device, or for several processes where one is
            needed.
        OSError: if the folder cannot be written.
    """
    options = options or RunOptions()
    with launched(options.device) as device, stop_requests() as stop:
        check(
            not single_process_for or world_size() == 1,
            f"{single_process_for}: runs in one process; leave torchrun out",
        )
        folder = RunFolder(
            Path(out), stage, recipe.to_dict(), resume=options.resume, force=options.force
        )
        with folder:
            yield RunContext(folder, options, stop, device)


def data_results(data: Training) -> dict[str, Any]:
    """The entries of `results.json` on the images; `skipped` is over all processes."""
    held_out = data.validation.skipped.lines if data.validation is not None else ()
    everywhere = gather([*data.feed.skipped.lines, *held_out])
    return {
        "data": data.feed.name,
        "images_per_epoch": data.feed.steps_per_epoch * data.feed.batch_size,
        "train_images": data.feed.num_images,
        "val_images": data.held_back,
        "skipped": sorted({line for part in everywhere for line in part}),
    }


class Callbacks:
    """Logs the steps of a training loop and saves snapshots of its `state`."""

    def __init__(
        self,
        context: RunContext,
        state: Callable[[], dict[str, Any]],
        bar: Bar,
        batch_size: int,
    ) -> None:
        self._context, self._options = context, context.options
        self._state, self._bar, self._batch_size = state, bar, batch_size
        self._saved = self._last = time.monotonic()
        self._window: deque[float] = deque(maxlen=self._options.log_every)
        self.seconds = 0.0
        """Seconds spent on steps so far, without evaluations."""

    def after_step(self, step: int, values: dict[str, Any], note: str, *, save: bool) -> None:
        """Log step number `step`; save a snapshot if `save` or if the last one is old.

        Raises:
            Stopped: on SIGTERM or SIGINT; a snapshot has been written.
        """
        now = time.monotonic()
        self._window.append(now - self._last)
        self.seconds += now - self._last
        rate = self._batch_size * len(self._window) / max(sum(self._window), 1e-9)
        self._bar.advance(note=f"{rate:.0f} img/s  {note}")
        if step % self._options.log_every == 0:
            self._context.folder.log("train", step, {**values, "images_per_s": round(rate, 1)})
        number = self._context.stop.agreed()
        if save or number is not None or now - self._saved >= self._options.save_every_s:
            self._context.folder.save_state(self._state())
            self._saved = time.monotonic()
        if number is not None:
            raise Stopped(number)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start timing the next step now."""
        self._last = time.monotonic()
