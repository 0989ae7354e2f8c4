"""The parameters of a prediction."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from dynaslim.serve.budgets import Escalate
from dynaslim.serve.problems import Problem

NAMES: Final = ("budget", "top_k", "escalate", "deadline_ms")
TOP_K: Final = 5
LEAST_DEADLINE_MS: Final = 1.0
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_COUNT: Final = re.compile(r"[0-9]{1,1000}")


class Query(NamedTuple):
    """The parameters, checked as far as they can be without a model."""

    budget: str | None
    top_k: int
    escalate: Escalate
    deadline_ms: float | None


@lru_cache(maxsize=256)
def parse_query(query: bytes) -> Query:
    """From the part of the URL behind the question mark.

    Raises:
        Problem: 422 for a parameter that is unknown, given twice, or of a wrong form.
    """
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise _bad("the query has too many parameters") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name not in NAMES:
            raise _bad(f"parameter {name!r:.60}: there are {', '.join(NAMES)}")
        if name in values:
            raise _bad(f"parameter {name}: give it once")
        values[name] = value
    return Query(
        values.get("budget"),
        _count(values.get("top_k")),
        _escalate(values.get("escalate", "auto")),
        _milliseconds(values.get("deadline_ms")),
    )


def _bad(message: str) -> Problem:
    return Problem(422, "bad_parameter", message)


def _count(text: str | None) -> int:
    if text is None:
        return TOP_K
    if not _COUNT.fullmatch(text) or not int(text):
        raise _bad(f"top_k {text!r:.60}: must be a whole number of at least 1")
    return int(text)


def _escalate(text: str) -> Escalate:
    if text == "auto":
        return "auto"
    if text == "never":
        return None
    margin = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not 0 <= margin <= 1:
        raise _bad(f"escalate {text!r:.60}: give auto, never, or a margin from 0 to 1")
    return margin


def _milliseconds(text: str | None) -> float | None:
    if text is None:
        return None
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not LEAST_DEADLINE_MS <= value < math.inf:
        raise _bad(f"deadline_ms {text!r:.60}: must be a number of at least {LEAST_DEADLINE_MS:g}")
    return value
