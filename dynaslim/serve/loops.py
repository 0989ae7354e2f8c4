"""What belongs to one event loop: answers from other threads, and how far it is behind."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from dynaslim.serve.jobs import Job

TICK_S: Final = 0.02


class Outbox:
    """Jobs that other threads have finished, handed to the loop, many at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._done: deque[tuple[asyncio.Future[Job], Job]] = deque()
        self._called = False

    def put(self, future: asyncio.Future[Job], job: Job) -> None:
        """From any thread."""
        self._done.append((future, job))
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop has ended, and with it whoever waited
                self._done.clear()

    def _deliver(self) -> None:
        self._called = False  # first: what is put from here on calls again
        while self._done:
            future, job = self._done.popleft()
            if future.done():
                continue
            if job.error is None:
                future.set_result(job)
            else:
                future.set_exception(job.error)


class Lag:
    """How long a turn of the loop takes: a timer that looks how late it is.

    A turn serves all that is there, so what arrives waits for about one until it is looked at. The
    timer runs while there are requests.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: float | None = None
        self._asked = False
        self.seconds = 0.0

    def request(self) -> float:
        """A request is here; the lag of late."""
        self._asked = True
        if self._due is None:
            self._schedule()
        return self.seconds

    def _schedule(self) -> None:
        self._due = self._loop.time() + TICK_S
        self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        assert self._due is not None
        self.seconds = max(0.0, self._loop.time() - self._due)
        if self._asked:
            self._asked = False
            self._schedule()
        else:
            self._due, self.seconds = None, 0.0
