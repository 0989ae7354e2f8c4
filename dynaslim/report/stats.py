"""The few statistics of a report: how sure an accuracy is, and what a line between routes gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, NamedTuple

Z: Final = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """The ends of a 95% confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A difference with the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def accuracy_interval(top1: float, images: int) -> Interval:
    """The binomial 95% interval of an accuracy (0..1) on so many images, by Wilson's score."""
    assert images > 0
    spread = Z * Z / images
    centre = (top1 + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(top1 * (1 - top1) / images + spread / 4 / images)
    # rounding may put an end on the wrong side of what was measured, or of 0 and 1
    return Interval(max(0.0, min(centre - half, top1)), min(1.0, max(centre + half, top1)))


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
