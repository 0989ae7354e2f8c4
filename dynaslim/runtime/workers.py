"""Threads that run the pieces of a step, and the buffers that calls use."""

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
    """Runs tasks in parallel, starting them in order; calls of several threads may overlap.

    The calling thread runs tasks too, unless the backend must not use it (`own_threads`). Work is
    passed through queues that wait on a bare lock: a step of a small network takes a millisecond,
    and the futures of a thread pool took a tenth of that.
    """

    def __init__(self, backend: Backend) -> None:
        self._helpers = backend.workers if backend.own_threads else backend.workers - 1
        self._caller_works = not backend.own_threads
        self._start_worker = backend.start_worker
        self._lock = threading.Lock()
        self._inbox: _Inbox | None = None
        self._threads: list[threading.Thread] = []

    def run(self, tasks: Iterable[Task]) -> None:
        """Run all tasks; re-raise the first error, preferring one from the calling thread."""
        waiting = deque(tasks)
        total = left = len(waiting)
        # one per task that a helper took, so that no helper that wakes up too late is waited for
        outcomes: _Outcomes = SimpleQueue()

        def help_out() -> None:
            while waiting:
                try:
                    task = waiting.popleft()  # atomic: an idle thread takes the next
                except IndexError:
                    return
                try:
                    task()
                except BaseException as error:  # the batch has failed: drop the remaining tasks
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
        except BaseException:  # an interrupt, possibly between taking a task and counting it
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
        """Pass the work to `count` helpers; the first call starts them."""
        with self._lock:  # helpers that were dismissed meanwhile would never take it
            inbox = self._started() if self._inbox is None else self._inbox
            for _ in range(count):
                inbox.put(work)

    def _started(self) -> _Inbox:
        inbox, outcomes = _Inbox(), _Outcomes()
        threads = [
            threading.Thread(
                target=_serve,
                args=(inbox, self._start_worker, outcomes),
                name=f"dynaslim_{number}",
                daemon=True,  # they end with the workers, or at exit
            )
            for number in range(self._helpers)
        ]
        try:
            # start all of them now: `start_worker` briefly changes a setting of the whole process
            for thread in threads:
                thread.start()
            for failure in [_next(outcomes) for _ in threads]:
                if failure is not None:
                    raise failure
        except BaseException:
            _dismiss(inbox, self._helpers)
            raise
        self._inbox, self._threads = inbox, threads
        # the finaliser does not join them: garbage collection may run in any thread
        weakref.finalize(self, _dismiss, inbox, self._helpers).atexit = False
        _LIVE.add(self)
        _HELPERS.update(threads)
        return inbox

    def close(self) -> None:
        """End the threads once they have finished their current work."""
        with self._lock:
            inbox, threads = self._inbox, self._threads
            self._inbox, self._threads = None, []  # first, as an interrupt may come during joins
            if inbox is not None:
                _dismiss(inbox, self._helpers)
                for thread in threads:
                    thread.join()

    def forget(self) -> None:
        """Reset in a forked child process, where the parent's threads do not exist."""
        self._lock = threading.Lock()
        self._inbox, self._threads = None, []


_LIVE: weakref.WeakSet[Workers] = weakref.WeakSet()
_HELPERS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End all helpers before libraries are unloaded, so that none is still running their code."""
    for workers in list(_LIVE):
        workers.close()
    for thread in list(_HELPERS):  # of `Workers` that were garbage-collected just now
        thread.join()


def _forget_all() -> None:
    _HELPERS.clear()
    for workers in list(_LIVE):
        workers.forget()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forget_all)


def _next(outcomes: _Outcomes) -> BaseException | None:
    """The next outcome. Waits with timeouts: a signal just before a wait would not end it."""
    while True:
        try:
            return outcomes.get(timeout=_LOOK_S)
        except Empty:
            continue


def _drop(waiting: deque[Task]) -> int:
    """Remove the remaining tasks; return how many there were."""
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
        del work  # releases the buffers of its call


class Workspace:
    """Buffers of one call, reused by later calls; each grows to the largest size requested."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._buffers: dict[object, Array] = {}

    def rows(self, key: object, rows: int, row: tuple[int, ...], *, floats: bool = False) -> Array:
        """A buffer (rows, *row); the same key and row shape return the same memory."""
        buffer = self._buffers.get((key, row))
        if buffer is None or len(buffer) < rows:
            buffer = self._arrays.empty(rows, row, floats=floats)
            self._buffers[key, row] = buffer
        return buffer[:rows]


class Workspaces:
    """A pool with as many workspaces as there are concurrent calls."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._idle: deque[Workspace] = deque()
        self._of_thread = threading.local()

    def borrow(self) -> Workspace:
        """Take a workspace that is not in use; return it with `give_back`."""
        try:
            return self._idle.pop()
        except IndexError:
            return Workspace(self._arrays)

    def give_back(self, workspace: Workspace) -> None:
        self._idle.append(workspace)

    def of_thread(self) -> Workspace:
        """The calling thread's own workspace, for data that lives no longer than a task."""
        found: Workspace | None = getattr(self._of_thread, "workspace", None)
        if found is None:
            found = self._of_thread.workspace = Workspace(self._arrays)
        return found
