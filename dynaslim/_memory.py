"""How this process gets memory for large tensors.

glibc gets tensors of more than 32 MB from the kernel and gives them back at once. Each is then
cleared page by page, which takes longer than most operations on it: at 224 px two thirds of a
forward pass of 64 rows.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Final

LARGE: Final = 1 << 25
"""Bytes of the largest tensor that glibc keeps memory for."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4


def keep_freed_memory() -> bool:
    """Keep memory that is freed for the next tensor, for the rest of the process.

    For trainings: call it after a step. A process takes up to 1.5 times as much memory then; where
    twice of what it has taken so far is not available, or where another C library or allocator is
    used, nothing changes, and the answer is False.
    """
    with suppress(OSError, AttributeError, TypeError, ValueError):
        import resource

        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        library = ctypes.CDLL(None)
        if library.gnu_get_libc_version and _available() > 2 * taken:
            never = library.mallopt(_M_TRIM_THRESHOLD, -1)
            return bool(never and library.mallopt(_M_MMAP_MAX, 0))
    return False


def _available() -> int:
    """Bytes that this process may still take: of the machine, and of the control group it is in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free
