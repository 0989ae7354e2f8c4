"""Progress on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """A progress display that a running job updates."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Report `steps` more steps as done; `note` is shown behind the bar."""
        ...


class _Nothing:
    def advance(self, steps: int = 1, note: str = "") -> None: ...


class _Lines:
    """Plain lines, at most one every ten seconds, and one at the end."""

    EVERY_S = 10.0

    def __init__(self, label: str, total: int | None, done: int) -> None:
        self.label, self.total = label, total
        self.first = self.done = done
        self.note = ""
        self.started = self.printed = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.note = note or self.note
        now = time.monotonic()
        if now - self.printed >= self.EVERY_S or self.done == self.total:
            self.printed = now
            elapsed = now - self.started
            line = f"{self.label}: {self.done} in {_duration(elapsed)}"
            if self.total is not None:
                left = elapsed / max(1, self.done - self.first) * (self.total - self.done)
                eta = f", {_duration(left)} left" if left > 0 else ""
                line = f"{self.label}: {self.done}/{self.total} in {_duration(elapsed)}{eta}"
            sys.stderr.write(f"{line}  {self.note}".rstrip() + "\n")
            sys.stderr.flush()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _rank() -> int:
    """Rank of this process in the run; 0 if torch is not imported."""
    if sys.modules.get("torch") is None:
        return 0
    from dynaslim.distributed import rank

    return rank()


def note(line: str) -> None:
    """Print a line on standard error, in the first process of a run only."""
    if not _rank():
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@contextmanager
def progress(label: str, total: int | None, *, done: int = 0) -> Iterator[Bar]:
    """Show the progress of a job of `total` steps, of which `done` are already finished.

    `total` is None if the number of steps is unknown. Nothing is shown if the label is empty, or in
    processes other than the first of a run.
    """
    if not label or _rank():
        yield _Nothing()
        return
    if not sys.stderr.isatty():
        yield _Lines(label, total, done)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(f"{label:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=total, completed=done, note="")

        class _Bar:
            def advance(self, steps: int = 1, note: str = "") -> None:
                if note:
                    bars.update(task, advance=steps, note=note)
                else:
                    bars.update(task, advance=steps)

        yield _Bar()
