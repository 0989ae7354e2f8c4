"""How a report writes numbers and names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

LONGEST_NAME: Final = 80
NONE: Final = "\u2013"
"""What stands in a table for what is not known: a dash."""
MINUS: Final = "\u2212"
TIMES: Final = "\u00d7"
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def clean(text: str) -> str:
    """Text that any file and any page can hold: control characters and stray surrogates replaced.

    What would turn the writing direction of the text behind it is replaced too.
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def name_of(name: str | None, index: int) -> str:
    """A class's name, or its number; names without end are cut."""
    return shorten(clean(name), LONGEST_NAME) if name else f"class {index}"


def shorten(text: str, most: int) -> str:
    """At most so many characters; the last is an ellipsis where some are left out."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def percent(share: float | None, digits: int = 2) -> str:
    """A share of 0..1 as 85.35%; a dash for none."""
    return NONE if share is None else f"{share:.{digits}%}"


def points(difference: float, digits: int = 2) -> str:
    """A difference of two shares in percentage points, with its sign: −0.85."""
    value = round(100 * difference, digits) + 0.0  # no minus before a zero
    return f"{value:+.{digits}f}".replace("-", MINUS)


def millions(madds: float | None) -> str:
    """Multiply-adds as 1.29 M; a dash for none."""
    return NONE if madds is None else f"{madds / 1e6:.2f} M"


def milliseconds(ms: float | None) -> str:
    """Three digits of a time in ms; a dash for none."""
    return NONE if ms is None else f"{three_digits(ms)} ms"


def three_digits(value: float) -> str:
    """A positive number as 0.0707, 1.52 or 153."""
    return f"{value:.{max(0, 2 - _exponent(value))}f}"


def _exponent(value: float) -> int:
    """The decimal exponent of a positive number, at most 2 and at least -4."""
    return next((e for e in (2, 1, 0, -1, -2, -3) if value >= 10.0**e), -4)


def count(number: int) -> str:
    """A whole number with its thousands apart: 2,000."""
    return f"{number:,}"


def times(ratio: float) -> str:
    """A ratio as 1.42×."""
    return f"{ratio:.2f}{TIMES}"


def widths_of(widths: Sequence[int]) -> str:
    """A route as 12-24-48."""
    return "-".join(map(str, widths))
