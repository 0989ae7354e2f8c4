"""The cache of compiled programs: one folder per network and kind of machine."""

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
"""Free bytes that a writable folder must have; about the size of a program."""


def cache_folder(key: str, cache_dir: str | Path = "auto") -> Path:
    """The folder for programs of a source with this key; created when the first is written.

    "auto" is the value of the environment variable `DYNASLIM_CACHE`, else `dynaslim` in
    `XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        RuntimeError: if neither variable is set and the user has no home directory.
    """
    folder = cache_root() if cache_dir == "auto" else Path(cache_dir)
    return folder / f"{key[:24]}-{machine_digest()}"


def cache_root() -> Path:
    """The root folder of the cache; see `cache_folder`."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dynaslim"


def open_cache(key: str, cache_dir: str | Path | None) -> Cache | None:
    """The cache of a source with this key; None if `cache_dir` is None or no folder can be found.

    `cache_dir` is as for `cache_folder`; None turns caching off.
    """
    if cache_dir is None:
        return None
    try:
        return Cache(cache_folder(key, cache_dir))
    except RuntimeError as error:
        _warn(f"compiled programs are not kept: {error}")
        return None


class Cache:
    """A folder of compiled programs; a problem with it causes one warning, never a failure.

    Existing programs are read even if none can be written. The first failure to write gives a
    `DynaslimWarning` with the reason; after that, no more writes are attempted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writable: bool | None = None  # not tried yet

    def find(self, name: str) -> Path | None:
        """The path of a file, or None if it does not exist or is not accessible."""
        path = self.folder / name
        try:
            return path if path.is_file() else None
        except OSError:
            return None

    def names(self, suffix: str) -> dict[str, int]:
        """Names of files with this suffix, and when each was last modified, in ns."""
        try:
            with os.scandir(self.folder) as entries:
                return {e.name: e.stat().st_mtime_ns for e in entries if e.name.endswith(suffix)}
        except OSError:
            return {}

    def writable(self) -> bool:
        """Whether programs can be written; the first call creates the folder and tests it."""
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
        """Write a file, whole or not at all; return whether this succeeded."""
        if self.writable():
            try:
                write_atomic(self.folder / name, content)
            except OSError as error:
                self.give_up(error.strerror or error)
        return self.writable()

    @contextmanager
    def room_for(self, name: str, suffix: str = ".tmp") -> Iterator[Path]:
        """A temporary path for a compiler to write to, which is renamed to `name` at the end.

        Other threads or processes may write the same program at the same time. After an error, the
        partial file is removed and the error propagates.
        """
        path = self.folder / f"{name}.{os.getpid()}.{threading.get_ident()}{suffix}"
        try:
            yield path
            os.replace(path, self.folder / name)
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def give_up(self, why: str | BaseException) -> None:
        """Stop writing; warn of what is wrong with the folder, or else of `why`."""
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
    """Warn once per process: all engines and backends use the same folder."""
    if message not in _reported:
        _reported.add(message)
        warnings.warn(
            f"{message}; each start compiles anew. Set {VARIABLE} to another folder, or go without "
            f"(--no-cache, cache_dir=None)",
            DynaslimWarning,
            stacklevel=2,
        )


def why_not_writable(folder: Path) -> str | None:
    """Why no programs can be written to a folder, which need not exist yet; None if they can."""
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
    """Digest of what compiled programs depend on: processor, its features, dynaslim's version."""
    text = f"{__version__} {platform.machine()} {processor_name()} {processor_flags()}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def usable_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's name, as far as the system provides it."""
    return _from_proc("model name") or platform.processor() or platform.machine()


def processor_flags() -> str:
    """The processor's instruction sets; empty if the system does not list them."""
    return _from_proc("flags")


def _from_proc(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
