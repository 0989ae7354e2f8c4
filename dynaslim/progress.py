"""Progress on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What a running job reports to."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Report that `steps` more are done; `note` is shown behind the bar."""
        ...


class _Lines:
    """Plain lines, at most one in ten seconds, and one at the end."""

    EVERY_S = 10.0

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.done, self.note = 0, ""
        self.started = self.printed = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.note = note or self.note
        now = time.monotonic()
        if now - self.printed >= self.EVERY_S or self.done >= self.total:
            self.printed = now
            elapsed = now - self.started
            sys.stderr.write(
                f"{self.label}: {self.done}/{self.total} in {elapsed:.0f} s  {self.note}".rstrip()
                + "\n"
            )
            sys.stderr.flush()


@contextmanager
def progress(label: str, total: int) -> Iterator[Bar]:
    """Show the progress of a job of `total` steps while inside."""
    if not sys.stderr.isatty():
        yield _Lines(label, total)
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
        task = bars.add_task(label, total=total, note="")

        class _Bar:
            def advance(self, steps: int = 1, note: str = "") -> None:
                if note:
                    bars.update(task, advance=steps, note=note)
                else:
                    bars.update(task, advance=steps)

        yield _Bar()
