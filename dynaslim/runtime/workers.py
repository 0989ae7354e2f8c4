"""Threads that take the pieces of a step, and the buffers that calls work in."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Final

from dynaslim.runtime.arrays import Array, Arrays
from dynaslim.runtime.backends import Backend

Task = Callable[[], None]
_Inbox = SimpleQueue[Callable[[], None] | None]
_Outcomes = SimpleQueue[BaseException | None]
_LOOK_S: Final = 0.5


class Workers:
    """Runs tasks side by side, in the order they are given; calls of several threads may overlap.

    The caller takes tasks too, unless the backend keeps off its thread. Work is handed over by
    queues that wait on a bare lock: a step of a small network takes a millisecond, and the futures
    of a thread pool took a tenth of that.
    """

    def __init__(self, backend: Backend) -> None:
        self._helpers = backend.workers if backend.own_threads else backend.workers - 1
        self._caller_works = not backend.own_threads
        self._start = backend.start_worker
        self._lock = threading.Lock()
        self._inbox: _Inbox | None = None
        self._threads: list[threading.Thread] = []

    def run(self, tasks: Iterable[Task]) -> None:
        """Run all tasks; raises what the first of them to fail raised, the caller's own first."""
        waiting = deque(tasks)
        total = left = len(waiting)
        # one for each task that a helper took; nothing waits for a helper that wakes too late
        outcomes: _Outcomes = SimpleQueue()

        def help_out() -> None:
            while waiting:
                try:
                    task = waiting.popleft()  # atomic: an idle thread takes the next
                except IndexError:
                    return
                try:
                    task()
                except BaseException as error:  # the batch has failed: none need go on
                    for _ in range(_drop(waiting)):
                        outcomes.put(None)
                    outcomes.put(error)
                    return
                outcomes.put(None)

        count = min(self._helpers, total - (1 if self._caller_works else 0))
        failure: BaseException | None = None
        try:
            if count > 0:
                self._hand_over(help_out, count)
            while self._caller_works and waiting:
                try:
                    task = waiting.popleft()
                except IndexError:
                    break
                left -= 1
                task()
        except Exception as error:
            left -= _drop(waiting)
            failure = error
        except BaseException:  # an interrupt, maybe between taking a task and counting it
            _drop(waiting)
            raise
        try:
            failures = [failure, *(_next(outcomes) for _ in range(left))]
        except BaseException:  # an interrupt
            _drop(waiting)
            raise
        for failure in failures:
            if failure is not None:
                raise failure

    def _hand_over(self, work: Task, count: int) -> None:
        """Have so many helpers do it; starts them at the first call."""
        with self._lock:  # dismissed helpers would never take it
            inbox = self._started() if self._inbox is None else self._inbox
            for _ in range(count):
                inbox.put(work)

    def _started(self) -> _Inbox:
        inbox, outcomes = _Inbox(), _Outcomes()
        threads = [
            threading.Thread(
                target=_serve,
                args=(inbox, self._start, outcomes),
                name=f"dynaslim_{number}",
                daemon=True,  # they end with the workers, or at exit
            )
            for number in range(self._helpers)
        ]
        try:
            # all of them start here: starting one changes the whole process for a moment
            for thread in threads:
                thread.start()
            for failure in [_next(outcomes) for _ in threads]:
                if failure is not None:
                    raise failure
        except BaseException:
            _dismiss(inbox, self._helpers)
            raise
        self._inbox, self._threads = inbox, threads
        # not joined there: the collector runs at any time, in any thread
        weakref.finalize(self, _dismiss, inbox, self._helpers).atexit = False
        _LIVE.add(self)
        _HELPERS.update(threads)
        return inbox

    def close(self) -> None:
        """Let the threads go, as soon as they have done what they are at."""
        with self._lock:
            inbox, threads = self._inbox, self._threads
            self._inbox, self._threads = None, []  # first: an interrupt may come while they end
            if inbox is not None:
                _dismiss(inbox, self._helpers)
                for thread in threads:
                    thread.join()

    def forget(self) -> None:
        """Start anew: this is a child of the process whose threads these were."""
        self._lock = threading.Lock()
        self._inbox, self._threads = None, []


_LIVE: weakref.WeakSet[Workers] = weakref.WeakSet()
_HELPERS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Nobody is inside a library when it is taken down, nor on the way out of one."""
    for workers in list(_LIVE):
        workers.close()
    for thread in list(_HELPERS):  # of workers that were collected a moment ago
        thread.join()


def _forget_all() -> None:
    _HELPERS.clear()
    for workers in list(_LIVE):
        workers.forget()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forget_all)


def _next(outcomes: _Outcomes) -> BaseException | None:
    """The next outcome; looks up now and then: a signal just before a wait does not end it."""
    while True:
        try:
            return outcomes.get(timeout=_LOOK_S)
        except Empty:
            continue


def _drop(waiting: deque[Task]) -> int:
    """Take what is left; returns how many these were."""
    dropped = 0
    while waiting:
        try:
            waiting.popleft()
        except IndexError:
            break
        dropped += 1
    return dropped


def _dismiss(inbox: _Inbox, helpers: int) -> None:
    for _ in range(helpers):
        inbox.put(None)


def _serve(inbox: _Inbox, start: Callable[[], None], outcomes: _Outcomes) -> None:
    """What a helper runs: work from the inbox until it is dismissed."""
    try:
        start()
    except BaseException as error:
        outcomes.put(error)
        return
    outcomes.put(None)
    while (work := inbox.get()) is not None:
        work()
        del work  # and with it the buffers of its call


class Workspace:
    """Buffers of one call, kept for the next: each grows to the largest it has had to be."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._buffers: dict[object, Array] = {}

    def rows(self, key: object, rows: int, row: tuple[int, ...], *, floats: bool = False) -> Array:
        """A buffer (rows, *row); the same key gives the same memory again."""
        buffer = self._buffers.get((key, row))
        if buffer is None or len(buffer) < rows:
            buffer = self._arrays.empty(rows, row, floats=floats)
            self._buffers[key, row] = buffer
        return buffer[:rows]


class Workspaces:
    """As many workspaces as there are calls at once."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._idle: deque[Workspace] = deque()
        self._of_thread = threading.local()

    def borrow(self) -> Workspace:
        """One that is not in use, to be given back."""
        try:
            return self._idle.pop()
        except IndexError:
            return Workspace(self._arrays)

    def give_back(self, workspace: Workspace) -> None:
        self._idle.append(workspace)

    def of_thread(self) -> Workspace:
        """The calling thread's own, for what lives no longer than a task."""
        found: Workspace | None = getattr(self._of_thread, "workspace", None)
        if found is None:
            found = self._of_thread.workspace = Workspace(self._arrays)
        return found
