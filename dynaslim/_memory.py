"""Reuse of freed memory for large tensors.

glibc allocates tensors of more than 32 MB with mmap and returns them to the kernel as soon as they
are freed. The kernel must then clear the pages of every new tensor, which takes longer than most
operations on it: at 224 px, two thirds of a forward pass of 64 rows.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

LARGE: Final = 1 << 25
"""Bytes of the largest tensor whose freed memory glibc reuses by default."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4


class FreedMemory:
    """Makes glibc keep freed memory for later tensors, for the rest of the process.

    For training loops: call `after_step` after each step. The process then uses at most about
    twice the memory of the first step. Nothing changes where that much is not available, or with
    another C library.
    """

    def __init__(self, processes: int = 1) -> None:
        """`processes` is the number of the run's processes on this machine."""
        self.processes = processes
        self.limit: int | None = None
        """Resident bytes above which free memory is returned to the kernel; 0 if none is kept."""

    def after_step(self) -> None:
        """Start keeping memory (first call), or trim free memory if the limit is exceeded."""
        with suppress(OSError, AttributeError, ImportError, ValueError):
            if self.limit is None:
                self.limit = 0
                self.limit = _keep(available_bytes() // self.processes)
            elif self.limit and process_bytes("resident") > self.limit:
                ctypes.CDLL(None).malloc_trim(0)


def _keep(available: int) -> int:
    import resource  # missing on some systems

    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    library = ctypes.CDLL(None)
    if not library.gnu_get_libc_version or available < 2 * taken:
        return 0
    never = library.mallopt(_M_TRIM_THRESHOLD, -1)
    return 2 * taken if never and library.mallopt(_M_MMAP_MAX, 0) else 0


def process_bytes(kind: Literal["address space", "resident"]) -> int:
    """Bytes of this process's address space, or of its resident memory.

    Raises:
        OSError: where /proc is missing.
    """
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[kind == "resident"]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Bytes that this process may still allocate, by the limits of machine and control group.

    Raises:
        OSError: where /proc is missing.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free
