"""Static networks to hold a run against, from a file of people's own numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dynaslim.errors import UsageError

FILE: Final = "baselines.json"
"""What such a file is called in the folder of a run."""
_FORM: Final = '[{"name": "resnet18", "top1": 0.7, "madds": 1.8e9, "ms": 9.5}, ...]'
_MOST: Final = 50


@dataclass(frozen=True)
class Baseline:
    """A network of one width: accuracy 0..1, multiply-adds and milliseconds per image if known."""

    name: str
    top1: float
    madds: float | None
    ms: float | None


def read_baselines(path: Path) -> tuple[Baseline, ...]:
    """The baselines of a JSON file: a list of objects with name, top1 and madds, ms or both.

    Raises:
        UsageError: if it cannot be read or is of another form.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error}); expected {_FORM}") from None
    if not isinstance(raw, list) or len(raw) > _MOST:
        raise UsageError(f"{path}: expected at most {_MOST} baselines, {_FORM}")
    return tuple(_baseline(one, f"{path}: entry {number}") for number, one in enumerate(raw))


def _baseline(raw: Any, at: str) -> Baseline:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str) or not raw["name"]:
        raise UsageError(f"{at}: expected an object with a name, as in {_FORM}")
    unknown = set(raw) - {"name", "top1", "madds", "ms"}
    if unknown:
        raise UsageError(f"{at}: unknown key {min(unknown)!r}; expected name, top1, madds, ms")
    top1, madds, ms = (_number(raw, key, at) for key in ("top1", "madds", "ms"))
    if top1 is None or top1 > 1:
        raise UsageError(f"{at}: top1 {raw.get('top1')!r}: expected a share of 0 to 1")
    if madds is None and ms is None:
        raise UsageError(f"{at}: give madds or ms, or both")
    return Baseline(raw["name"], top1, madds, ms)


def _number(raw: dict[str, Any], key: str, at: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{at}: {key} {value!r}: expected a number of at least 0")
    return float(value)
