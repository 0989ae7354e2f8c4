"""Where compiled programs are kept: a folder for every network, on every kind of machine."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import lru_cache
from pathlib import Path

from dynaslim import __version__

VARIABLE = "DYNASLIM_CACHE"


def cache_folder(key: str, cache_dir: str | Path = "auto") -> Path:
    """The folder for programs of a source with this key; made when the first is written.

    "auto" is what the environment variable `DYNASLIM_CACHE` says, else `~/.cache/dynaslim`.
    """
    if cache_dir == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_dir = os.environ.get(VARIABLE) or Path(base) / "dynaslim"
    return Path(cache_dir) / f"{key[:24]}-{machine_digest()}"


@lru_cache(maxsize=1)
def machine_digest() -> str:
    """Digest of what compiled programs depend on: processor, its features, and our version."""
    text = f"{__version__} {platform.machine()} {processor_name()} {processor_flags()}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's name, as far as the system tells."""
    return _from_proc("model name") or platform.processor() or platform.machine()


def processor_flags() -> str:
    """Instruction sets, as far as the system tells."""
    return _from_proc("flags")


def _from_proc(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
