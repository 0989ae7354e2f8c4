"""Threads that take the pieces of a step, and the buffers that calls work in."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from dynaslim.runtime.arrays import Array, Arrays
from dynaslim.runtime.backends import Backend

Task = Callable[[], None]


class Workers:
    """Runs tasks side by side, in the order they are given; calls of several threads may overlap.

    The caller takes tasks too, unless the backend keeps off its thread.
    """

    def __init__(self, backend: Backend) -> None:
        self._helpers = backend.workers if backend.own_threads else backend.workers - 1
        self._caller_works = not backend.own_threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._start = backend.start_worker

    def run(self, tasks: Iterable[Task]) -> None:
        """Run all tasks; raises what the first of them to fail raised."""
        waiting = deque(tasks)

        def work() -> None:
            while True:
                try:
                    task = waiting.popleft()  # atomic: whoever is idle takes the next
                except IndexError:
                    return
                try:
                    task()
                except BaseException:
                    waiting.clear()  # the batch has failed: nobody need go on
                    raise

        count = min(self._helpers, len(waiting) - (1 if self._caller_works else 0))
        futures = [self._threads().submit(work) for _ in range(count)]
        try:
            if self._caller_works:
                work()
        finally:
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                pool = ThreadPoolExecutor(self._helpers, "dynaslim", initializer=self._start)
                # all of them start here: starting one changes the whole process for a moment
                met = threading.Barrier(self._helpers)
                for future in [pool.submit(met.wait) for _ in range(self._helpers)]:
                    future.result()
                self._pool = pool
            return self._pool

    def close(self) -> None:
        """Let the threads go."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=True)
                self._pool = None


class Workspace:
    """Buffers of one call, kept for the next: each grows to the largest it has had to be."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._buffers: dict[object, Array] = {}

    def rows(self, key: object, rows: int, row: tuple[int, ...], *, floats: bool = False) -> Array:
        """A buffer (rows, *row); one that is asked for under a key again is the same memory."""
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
        """One that nobody uses, to be given back."""
        try:
            return self._idle.pop()
        except IndexError:
            return Workspace(self._arrays)

    def give_back(self, workspace: Workspace) -> None:
        """For the next call."""
        self._idle.append(workspace)

    def of_thread(self) -> Workspace:
        """The calling thread's own, for what lives no longer than a task."""
        found: Workspace | None = getattr(self._of_thread, "workspace", None)
        if found is None:
            found = self._of_thread.workspace = Workspace(self._arrays)
        return found
