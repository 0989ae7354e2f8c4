"""Atomic writing of files, and validated reading of untrusted ones."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import reprlib
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from dynaslim.errors import UsageError

T = TypeVar("T")
_DIGITS: Final = 20
"""Most digits of an integer in a file. We write no longer ones, and they are slow to parse."""
_NOT_SHOWN: Final = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, surrogates, and line and paragraph separators."""
_TURNING: Final = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the surrounding text."""


def check_writable(path: str | Path) -> Path:
    """Return the path if a file can be written there; a cheap check before long work.

    Raises:
        UsageError: if it is a folder or an empty name.
        OSError: if its nearest existing parent folder is not writable.
    """
    target = Path(path)
    if not target.name or target.is_dir():
        raise UsageError(f"{str(path)!r}: is a folder; name a file to write")
    nearest = next(p for p in target.absolute().parents if os.path.exists(p))
    if nearest.is_dir() and not os.access(nearest, os.W_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(nearest).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(target))
    return target


def write_atomic(path: str | Path, content: bytes) -> Path:
    """Write a file atomically: to a temporary file beside it, which is synced and then renamed.

    Parent folders are created. On any error the temporary file is removed and an existing file of
    that name stays unchanged.

    Raises:
        UsageError: as in `check_writable`.
        OSError: if the file cannot be written; the error names it.
    """
    target = check_writable(path)
    with naming(target):
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make every `OSError` raised inside name this file.

    The error of a full disk names no file, and others would name our temporary file. An error that
    names one of the file's parent folders keeps that name.
    """
    try:
        yield
    except OSError as error:
        # some libraries put long messages in place of the system's short one
        error.strerror = str(error) if error.errno is None else os.strerror(error.errno)
        named = error.filename
        if not isinstance(named, str | bytes) or Path(os.fsdecode(named)) not in path.parents:
            error.filename, error.filename2 = str(path), None
        raise


# -- reading --------------------------------------------------------------------------------------


def parse_json(content: bytes) -> Any:
    """Parse untrusted JSON into plain values.

    Raises:
        UsageError: if it is not JSON, is nested too deeply, or contains a duplicate key, a number
            that is not finite or has too many digits, or text that is unsafe to display.
    """
    try:
        value = json.loads(
            content.decode(),
            object_pairs_hook=_object,
            parse_int=_whole_number,
            parse_float=_finite_number,
            parse_constant=_finite_number,
        )
        check_text(value)
    except UsageError:
        raise
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"not JSON: {error}") from None
    except RecursionError:
        raise UsageError("nested too deeply") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise UsageError(f"has the key {twice!r:.60} twice")
    return made


def _whole_number(text: str) -> int:
    if len(text) > _DIGITS:
        raise UsageError(f"a number of {len(text)} digits: must have at most {_DIGITS}")
    return int(text)


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UsageError(f"{text}: must be a finite number")
    return value


def check_text(value: Any) -> None:
    """Raise `UsageError` if a string in plain values, or a key, is unsafe to display."""
    if isinstance(value, str):
        for character in value if not value.isprintable() else ():
            if not is_shown(character):
                shown = ascii(character)
                raise UsageError(f"text {value!a:.60}: has the control character {shown}")
    elif isinstance(value, Mapping):
        for key, held in value.items():
            check_text(key)
            check_text(held)
    elif isinstance(value, list | tuple):
        for held in value:
            check_text(held)


def is_shown(character: str) -> bool:
    """Whether a terminal or a page can safely show a character as part of a name."""
    return character not in _TURNING and unicodedata.category(character) not in _NOT_SHOWN


def validated(data: Any, kind: type[T], what: str, *, whole: bool = False) -> T:
    """Build a dataclass or `msgspec.Struct` from plain values, checking the type of every field.

    The only conversions are from int to float and from list to tuple. With `whole`, all keys must
    be present; otherwise missing fields take their defaults.

    Raises:
        UsageError: for a value of the wrong type, a missing or unknown key, or a value that the
            class itself rejects; the message begins with `what` and names the place.
    """
    import msgspec

    try:
        made = msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        raise UsageError(f"{what}: {_in_plain_words(str(error), data)}") from None
    _check_keys(data, made, what, whole)
    return made


def _in_plain_words(message: str, data: Any) -> str:
    """The library's message with the offending value added."""
    problem, _, place = message.replace("`", "").partition(" - at $")
    place = place.removeprefix(".")
    problem = re.sub(r"^Object missing required field (\w+)$", r"has no '\1'", problem)
    if problem.startswith("Expected "):
        problem, value = problem[0].lower() + problem[1:], data
        if "[...]" not in place:  # msgspec writes [...] for the key of a mapping
            for key, index in re.findall(r"(\w+)|\[(\d+)\]", place):
                value = value[key or int(index)]
            return f"{place} {reprlib.repr(value)}: {problem}".lstrip()
    return f"{place}: {problem}" if place else problem


NOT_IN_OLD_FILES: Final = {"not_in_old_files": True}
"""`metadata` of a dataclass field that files of earlier versions lack."""


def _check_keys(data: Any, made: Any, what: str, whole: bool) -> None:
    """Raise `UsageError` for unknown keys, which msgspec ignores in dataclasses, and missing ones.

    Missing keys are errors only if the data must be `whole`.
    """
    if isinstance(made, list | tuple):
        for one, other in zip(data, made, strict=True):
            _check_keys(one, other, what, whole)
        return
    names: Sequence[str] | None = getattr(made, "__struct_fields__", None)
    later: set[str] = set()
    if dataclasses.is_dataclass(made):
        fields = dataclasses.fields(made)
        names = [field.name for field in fields]
        later = {field.name for field in fields if field.metadata == NOT_IN_OLD_FILES}
    if names is None:
        return
    for key in data:
        if key not in names:
            raise UsageError(f"{what}: has an unknown key {key!r:.60}")
    for name in names:
        if name in data:
            _check_keys(data[name], getattr(made, name), what, whole)
        elif whole and name not in later:
            raise UsageError(f"{what}: has no {name!r}")


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file into plain values.

    Raises:
        UsageError: if it cannot be read or is not YAML; the message is one line and names the file.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
