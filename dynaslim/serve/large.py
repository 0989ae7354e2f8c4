"""Large pictures: decoded in processes of their own, a few at a time, the smallest first.

A call of Pillow cannot be stopped, and some keep Python's lock for as long as they take; a process
can be ended, gives all its memory back, is kept to a limit of memory, and leaves the cores to those
who answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from dynaslim.data.decode import decode_image
from dynaslim.data.skipped import CorruptImageError
from dynaslim.preprocessing import Preprocessing

if TYPE_CHECKING:
    from dynaslim.serve.pictures import Need

MOST_PROCESSES: Final = 4
IDLE_S: Final = 5.0
"""Without work, after which a process is ended."""
_LOOK_S: Final = 0.02
"""How often it is looked whether a picture is still wanted."""
_NICE: Final = 10
_SLACK: Final = 32_000_000
"""Bytes that a process may take beyond what a picture needs."""
_FINE: Final = b"+"
_DAMAGED: Final = b"-"
_NO_MEMORY: Final = b"m"
# first of all, so that its imports take no time from those who answer either
_MAIN: Final = f"import os; os.nice({_NICE}); from dynaslim.serve.large import main; main()"


class NoMemoryError(Exception):
    """A picture took more than was reckoned."""


class _Task(NamedTuple):
    need: Need
    content: bytes
    wanted: Callable[[], bool]
    deliver: Callable[[np.ndarray | Exception], None]


class LargePictures:
    """Pictures that wait for memory and a process."""

    def __init__(self, preprocessing: Preprocessing, memory: int, processes: int) -> None:
        self._preprocessing = preprocessing
        self._free = memory
        """Bytes that none of the pictures in work needs."""
        self._changed = threading.Condition()
        self._tasks: list[_Task] = []
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"dynaslim-serve-large-{n}", daemon=True)
            for n in range(min(processes, MOST_PROCESSES))
        ]
        for thread in self._threads:
            thread.start()

    def put(
        self,
        need: Need,
        content: bytes,
        wanted: Callable[[], bool],
        deliver: Callable[[np.ndarray | Exception], None],
    ) -> None:
        """Decode it when its turn comes, and `deliver` pixels, uint8 (C, S, S), or an error.

        `deliver` is called by any thread, unless the picture is not `wanted` any more by then.
        """
        with self._changed:
            self._tasks.append(_Task(need, content, wanted, deliver))
            self._tasks.sort(key=lambda task: task.need.work)
            self._changed.notify()

    def close(self) -> None:
        """End the processes and threads; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        process: _Process | None = None
        while True:
            task = self._next(None if process is None else IDLE_S)
            if task is not None:
                result: np.ndarray | Exception | None
                try:
                    process = process or _Process(self._preprocessing)
                    result = process.decode(task, self._is_wanted)
                except Exception as error:
                    result = error
                with self._changed:
                    self._free += task.need.memory
                    self._changed.notify_all()
                if result is not None:
                    task.deliver(result)
            if process is not None and (task is None or process.spent):
                process.end()
                process = None
            if self._closed:
                return
            del task

    def _is_wanted(self, task: _Task) -> bool:
        return not self._closed and task.wanted()

    def _next(self, patience_s: float | None) -> _Task | None:
        """The smallest picture that there is memory for; None after that time, and at the end."""
        with self._changed:
            while not self._closed:
                self._tasks = [task for task in self._tasks if task.wanted()]
                for place, task in enumerate(self._tasks):
                    if task.need.memory <= self._free:
                        del self._tasks[place]
                        self._free -= task.need.memory
                        return task
                if not self._changed.wait(patience_s) and not self._tasks:
                    return None
            return None


class _Process:
    """One that decodes, seen from the server."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._shape = (preprocessing.channels, *(preprocessing.image_size_px,) * 2)
        self.spent = False
        """Whether it is of no more use."""
        self._connection, other = Pipe()
        with other:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-P", "-c", _MAIN, str(other.fileno()),
                    json.dumps(preprocessing.to_dict()),
                ],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # where libraries write what they think of a picture
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )  # fmt: skip

    def decode(self, task: _Task, wanted: Callable[[_Task], bool]) -> np.ndarray | Exception | None:
        """Its pixels, uint8 (C, S, S), or what is wrong; None if it is not wanted any more."""
        self.spent = True
        try:
            self._connection.send_bytes(str(task.need.memory).encode())
            self._connection.send_bytes(task.content)
            while not self._connection.poll(_LOOK_S):
                if not wanted(task):
                    return None
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            return CorruptImageError("image", "the process that decoded it has failed")
        kind, rest = answer[:1], answer[1:]
        if kind == _NO_MEMORY:
            return NoMemoryError()
        self.spent = False
        if kind == _DAMAGED:
            return CorruptImageError("image", rest.decode())
        return np.frombuffer(rest, np.uint8).reshape(self._shape)

    def end(self) -> None:
        """At once, with all that it holds."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


# -- the process ----------------------------------------------------------------------------------


def main() -> None:
    """Decode what comes until nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the server ends this one
    preprocessing = Preprocessing.from_dict(json.loads(sys.argv[2]))
    start = _address_space()
    with Connection(int(sys.argv[1])) as connection, suppress(EOFError, OSError):
        while True:
            memory = int(connection.recv_bytes())
            content = connection.recv_bytes()
            _limit(start + memory + _SLACK)
            connection.send_bytes(_decoded(content, preprocessing))
            del content


def _decoded(content: bytes, preprocessing: Preprocessing) -> bytes:
    try:
        return _FINE + decode_image(content, preprocessing, "image").tobytes()
    except CorruptImageError as error:
        if isinstance(error.__context__, MemoryError):
            return _NO_MEMORY
        return _DAMAGED + error.reason.encode("utf-8", "replace")


def _address_space() -> int:
    """Bytes of this process's; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _limit(most: int) -> None:
    import resource  # not on all systems

    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
