"""How this process gets memory for large tensors."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4


@cache
def keep_freed_memory() -> None:
    """Keep memory that is freed for the next tensor, for the rest of the process.

    glibc gets tensors of more than 32 MB from the kernel and gives them back at once. Each is then
    cleared page by page, which takes longer than most operations on it. Nothing changes where
    another C library or allocator is used, or one without these settings.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
