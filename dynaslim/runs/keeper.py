"""What both stages do between two steps: tell, save, and stop if asked to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dynaslim.progress import Bar
from dynaslim.runs.folder import RunFolder
from dynaslim.runs.options import RunOptions
from dynaslim.runs.signals import Stopped, StopRequest


class Keeper:
    """Keeps a run's folder and bar up to date with its steps."""

    def __init__(
        self,
        folder: RunFolder,
        stop: StopRequest,
        options: RunOptions,
        state: Callable[[], dict[str, Any]],
        bar: Bar,
        *,
        batch_size: int,
    ) -> None:
        self._folder, self._stop, self._options = folder, stop, options
        self._state, self._bar, self._batch_size = state, bar, batch_size
        self._saved = self._logged = time.monotonic()
        self._steps_since_log = 0

    def after_step(self, step: int, values: dict[str, Any], note: str, *, save: bool) -> None:
        """Tell of step number `step`; snapshot if asked to, or if the time has come.

        Raises:
            Stopped: if the run was asked to stop; a snapshot has been written.
        """
        now = time.monotonic()
        self._steps_since_log += 1
        rate = self._batch_size * self._steps_since_log / max(now - self._logged, 1e-9)
        self._bar.advance(note=f"{rate:.0f} img/s  {note}")
        if step % self._options.log_every == 0:
            self._folder.log("train", step, {**values, "images_per_s": round(rate, 1)})
            self._logged, self._steps_since_log = now, 0
        number = self._stop.agreed()
        if save or number is not None or now - self._saved >= self._options.save_every_s:
            self._folder.save_state(self._state())
            self._saved = time.monotonic()
        if number is not None:
            raise Stopped(number)
