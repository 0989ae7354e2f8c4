"""What both stages do between two steps: tell, save, and stop if asked to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from dynaslim.progress import Bar
from dynaslim.runs.folder import RunFolder
from dynaslim.runs.options import RunOptions
from dynaslim.runs.signals import Stopped, StopRequest


class Callbacks:
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
        self._saved = self._last = time.monotonic()
        self._window: deque[float] = deque(maxlen=options.log_every)
        self.seconds = 0.0
        """Seconds spent on steps so far, evaluations left out."""

    def after_step(self, step: int, values: dict[str, Any], note: str, *, save: bool) -> None:
        """Tell of step number `step`; snapshot if asked to, or if the time has come.

        Raises:
            Stopped: if the run was asked to stop; a snapshot has been written.
        """
        now = time.monotonic()
        self._window.append(now - self._last)
        self.seconds += now - self._last
        rate = self._batch_size * len(self._window) / max(sum(self._window), 1e-9)
        self._bar.advance(note=f"{rate:.0f} img/s  {note}")
        if step % self._options.log_every == 0:
            self._folder.log("train", step, {**values, "images_per_s": round(rate, 1)})
        number = self._stop.agreed()
        if save or number is not None or now - self._saved >= self._options.save_every_s:
            self._folder.save_state(self._state())
            self._saved = time.monotonic()
        if number is not None:
            raise Stopped(number)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin the time of the next step now: what came before was another thing."""
        self._last = time.monotonic()
