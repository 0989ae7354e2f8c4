"""Where compiled programs are kept: a folder for every network, on every kind of machine."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from dynaslim._files import write_atomic
from dynaslim.errors import DynaslimWarning, first_line
from dynaslim.version import __version__

VARIABLE = "DYNASLIM_CACHE"
ROOM: Final = 1 << 20
"""Bytes that a folder must have room for to be called writable; a program takes about as many."""


def cache_folder(key: str, cache_dir: str | Path = "auto") -> Path:
    """The folder for programs of a source with this key; made when the first is written.

    "auto" is the value of the environment variable `DYNASLIM_CACHE`, else `~/.cache/dynaslim`.

    Raises:
        RuntimeError: if neither is set, and the user has no home.
    """
    folder = cache_root() if cache_dir == "auto" else Path(cache_dir)
    return folder / f"{key[:24]}-{machine_digest()}"


def cache_root() -> Path:
    """The folder of everything that is kept; see `cache_folder`."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dynaslim"


def open_cache(key: str, cache_dir: str | Path | None) -> Cache | None:
    """The cache of a source with this key; None where none is wanted, or there is no place for it.

    `cache_dir` as for `cache_folder`; None keeps nothing.
    """
    if cache_dir is None:
        return None
    try:
        return Cache(cache_folder(key, cache_dir))
    except RuntimeError as error:
        _warn(f"compiled programs are not kept: {error}")
        return None


class Cache:
    """A folder of compiled programs; a problem with it is one warning, and no failure.

    Programs that are there are read, even where none can be written. At the first that cannot be
    written a `DynaslimWarning` gives the reason, and no other is tried.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writable: bool | None = None  # not tried yet

    def find(self, name: str) -> Path | None:
        """The file of that name, if it is there and may be seen."""
        path = self.folder / name
        try:
            return path if path.is_file() else None
        except OSError:
            return None

    def names(self, suffix: str) -> dict[str, int]:
        """Files that end so, with when each was last written, in ns."""
        try:
            with os.scandir(self.folder) as entries:
                return {e.name: e.stat().st_mtime_ns for e in entries if e.name.endswith(suffix)}
        except OSError:
            return {}

    def writable(self) -> bool:
        """Whether programs can be kept; at first makes the folder and tries."""
        if self._writable is None:
            self._writable = True
            why = why_not_writable(self.folder)
            if why is None:
                with suppress(OSError):
                    self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self.give_up(why)
        return self._writable

    def write(self, name: str, content: bytes) -> bool:
        """Write a file, whole or not at all; whether that could be done."""
        if self.writable():
            try:
                write_atomic(self.folder / name, content)
            except OSError as error:
                self.give_up(error.strerror or error)
        return self.writable()

    @contextmanager
    def room_for(self, name: str, suffix: str = ".tmp") -> Iterator[Path]:
        """A path beside the file of that name, for a compiler to write to; renamed at the end.

        Others may be at the same program, in this process or another. After an error the half of a
        file is removed; the error is raised as it is.
        """
        path = self.folder / f"{name}.{os.getpid()}.{threading.get_ident()}{suffix}"
        try:
            yield path
            os.replace(path, self.folder / name)
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def give_up(self, why: str | BaseException) -> None:
        """Write no more; warn of what is wrong with the folder, or of `why` if that is unknown."""
        self._writable = False
        found = why_not_writable(self.folder)
        if found is None:
            found = why if isinstance(why, str) else first_line(why)
            with suppress(OSError):
                free_mb = shutil.disk_usage(self.folder).free / 1e6
                found = f"a program could not be written, {free_mb:.1f} MB are free ({found})"
        _warn(f"{self.folder.parent}: compiled programs are not kept there: {found}")


_reported: set[str] = set()


def _warn(message: str) -> None:
    """Once in a process: every engine and backend meets the same folder."""
    if message not in _reported:
        _reported.add(message)
        warnings.warn(
            f"{message}; each start compiles anew. Set {VARIABLE} to another folder, or go without "
            f"(--no-cache, cache_dir=None)",
            DynaslimWarning,
            stacklevel=2,
        )


def why_not_writable(folder: Path) -> str | None:
    """Why a folder that may yet have to be made can keep no programs; None if it can."""
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir():
            return f"{nearest} is a file, not a folder"
        with tempfile.TemporaryFile(dir=nearest, prefix=".dynaslim") as file:
            file.write(bytes(ROOM))
            file.flush()
    except PermissionError:
        return "no permission to write"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full ({os.strerror(error.errno)})"
        return error.strerror or str(error)
    return None


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
    """The processor's name, where the system has it."""
    return _from_proc("model name") or platform.processor() or platform.machine()


def processor_flags() -> str:
    """Instruction sets, where the system lists them."""
    return _from_proc("flags")


def _from_proc(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
