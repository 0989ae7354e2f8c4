"""How this process gets memory for large tensors.

glibc gets tensors of more than 32 MB from the kernel and gives them back at once. Each is then
cleared page by page, which takes longer than most operations on it: at 224 px two thirds of a
forward pass of 64 rows.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

LARGE: Final = 1 << 25
"""Bytes of the largest tensor that glibc keeps memory for."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4


class FreedMemory:
    """Keeps memory that is freed for the next tensor, for the rest of the process.

    For trainings: `after_step` is to be called after each step. The process then takes at most
    about twice what it took in the first. Where that much is not available, or another C library
    is used, nothing changes.
    """

    def __init__(self, processes: int = 1) -> None:
        """`processes` are those of the run on this machine."""
        self.processes = processes
        self.limit: int | None = None
        """Bytes beyond which free memory is given back; 0 where nothing is kept."""

    def after_step(self) -> None:
        """Begin to keep memory, or give back what is more than the limit."""
        with suppress(OSError, AttributeError, ImportError, ValueError):
            if self.limit is None:
                self.limit = 0
                self.limit = _keep(_available() // self.processes)
            elif self.limit and process_bytes("resident") > self.limit:
                ctypes.CDLL(None).malloc_trim(0)


def _keep(available: int) -> int:
    import resource  # not on all systems

    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    library = ctypes.CDLL(None)
    if not library.gnu_get_libc_version or available < 2 * taken:
        return 0
    never = library.mallopt(_M_TRIM_THRESHOLD, -1)
    return 2 * taken if never and library.mallopt(_M_MMAP_MAX, 0) else 0


def process_bytes(kind: Literal["address space", "resident"]) -> int:
    """Bytes of this process's address space, or of what of it is in memory.

    Raises:
        OSError: where /proc is missing.
    """
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[kind == "resident"]) * os.sysconf("SC_PAGE_SIZE")


def _available() -> int:
    """Bytes that this process may still take: of the machine, and of the control group it is in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free
