"""Stopping between two steps when the system, or a person, asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dynaslim.distributed import largest


class Stopped(BaseException):
    """The run was asked to stop and has saved what it needs to go on.

    Not an `Exception`: nothing on the way up should take it for a failure that it can handle.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """Whether SIGTERM or SIGINT has come; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self) -> int | None:
        """The signal that came to any of the run's processes, so that all stop after one step."""
        return largest(self.number or 0) or None

    def check(self) -> None:
        """Stop now if asked to; for work that starts anew when it is resumed."""
        if self.number is not None:
            raise Stopped(self.number)

    def checked(self, tell: Callable[..., object] | None = None) -> Callable[..., None]:
        """`tell`, for work to call on its way, with a `check` before each call."""

        def call(*done: int) -> None:
            self.check()
            if tell is not None:
                tell(*done)

        return call


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take SIGTERM and SIGINT as requests while inside."""
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
