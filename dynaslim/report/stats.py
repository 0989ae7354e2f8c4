"""The few statistics of a report: how sure an accuracy is, and what a line between routes gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from dynaslim.runtime.budget_search import Z, accuracy_interval

__all__ = ["Difference", "accuracy_interval", "at_cost", "paired_difference"]


class Difference(NamedTuple):
    """A difference with the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def paired_difference(better: int, worse: int, images: int) -> Difference:
    """The difference of two accuracies on the same images, in 0..1, with its 95% interval.

    `better` images are right by the first alone, `worse` by the second alone; where the two agree
    they say nothing, which makes the interval narrower than that of either accuracy.
    """
    assert images > 0
    value = (better - worse) / images
    variance = (better + worse - (better - worse) ** 2 / images) / images**2
    half = Z * math.sqrt(max(variance, 0.0))
    return Difference(value, value - half, value + half)


def at_cost(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """The accuracy at a cost on the line through (cost, accuracy) points; None outside them."""
    points = sorted(points)
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= cost <= right:
            share = (cost - left) / (right - left) if right > left else 0.0
            return low + share * (high - low)
    return None
