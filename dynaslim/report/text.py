"""Formats numbers and names for a report; some functions are filters in its templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

NONE: Final = "\u2013"
"""A dash, shown for an unknown value."""
MINUS: Final = "\u2212"
TIMES: Final = "\u00d7"
_MAX_NAME: Final = 80
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def clean(text: str) -> str:
    """Replace characters unfit for a page: controls, surrogates, changes of text direction."""
    return _UNPRINTABLE.sub("\ufffd", text)


def name_of(name: str | None, index: int) -> str:
    """A class's name in one line, shortened if needed; without a name, "class" and its index."""
    line = " ".join(clean(name or "").split())
    return shorten(line, _MAX_NAME) if line else f"class {index}"


def shorten(text: str, most: int) -> str:
    """Shorten text to at most `most` characters; an ellipsis marks that it was cut."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def percent(share: float | None, digits: int = 2) -> str:
    """A share in 0..1 as 85.35%."""
    return NONE if share is None else f"{share:.{digits}%}"


def interval(ends: Sequence[float] | None) -> str:
    """A confidence interval of an accuracy as 84.1% to 87.9%."""
    return NONE if ends is None else f"{percent(ends[0], 1)} to {percent(ends[1], 1)}"


def points(difference: float, digits: int = 2) -> str:
    """A difference of two shares in percentage points, with its sign: −0.85."""
    value = round(100 * difference, digits) + 0.0  # no minus before a zero
    return f"{value:+.{digits}f}".replace("-", MINUS)


def millions(madds: float | None) -> str:
    """Multiply-adds as 1.29 M."""
    return NONE if madds is None else f"{madds / 1e6:.2f} M"


def megabytes(weights: int | None) -> str:
    """The size of this many four-byte weights, as 12.9 MB."""
    return NONE if weights is None else f"{three_digits(4e-6 * weights)} MB"


def milliseconds(ms: float | None) -> str:
    """A time in ms with three significant digits."""
    return NONE if ms is None else f"{three_digits(ms)} ms"


def three_digits(value: float) -> str:
    """A positive number with three significant digits: 0.0707, 1.52 or 153."""
    exponent = next((e for e in (2, 1, 0, -1, -2, -3) if value >= 10.0**e), -4)
    return f"{value:.{2 - exponent}f}"


def count(number: int) -> str:
    """A whole number with thousands separators: 2,000."""
    return f"{number:,}"


def times(ratio: float | None) -> str:
    """A ratio as 1.42×."""
    return NONE if ratio is None else f"{ratio:.2f}{TIMES}"


def plural(number: int, noun: str) -> str:
    """A number with its noun: 1 core, 2 cores."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def widths_of(widths: Sequence[int]) -> str:
    """A route as 12-24-48."""
    return "-".join(map(str, widths))
