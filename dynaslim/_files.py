"""Writing files so that a reader, or a crash, never sees half of one; reading people's YAML."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from dynaslim.errors import UsageError


def check_writable(path: str | Path) -> Path:
    """The path, if a file can have that name; cheap, so that it can be asked before long work.

    Raises:
        UsageError: for a folder, or a name that is none.
    """
    target = Path(path)
    if not target.name or target.is_dir():
        raise UsageError(f"{str(path)!r}: is a folder; name a file to write")
    return target


def write_atomic(path: str | Path, content: bytes) -> Path:
    """Write a file whole or not at all: to a temporary name beside it, synced, then renamed.

    Parent folders are made. On any error the temporary file is removed and an older file of that
    name is left as it was.
    """
    target = check_writable(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds, as plain values.

    Raises:
        UsageError: if it cannot be read, or is not YAML; in one line that names it.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
