"""Cost and accuracy of ways to choose a route, computed from tables of answers.

A table has, for every image and every route of a network (cheapest first), whether the route's
answer is right, and its margin. An image that runs twice costs twice; only escalation within one
network reuses the trunk's features. All functions are pure functions of arrays.

Suffixes: N images, R routes, S settings of a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]


class Outcome(NamedTuple):
    """Means over images: cost (in the unit of the given costs), top-1 and the share of images that
    escalated, both in 0..1.
    """

    cost: float
    top1: float
    escalated: float = 0.0


# -- what to compare with --------------------------------------------------------------------------


def uniform_line(costs_R: Sequence[float], top1_R: Sequence[float], cost: float) -> float:
    """The best top-1 at a mean cost if routes do not depend on the image: the routes' upper hull.

    The hull between two routes is the mean result of a random choice between them. Below the
    cheapest route's cost the result is that route's top-1; above the dearest one's, the best top-1.
    """
    points = sorted(zip(costs_R, top1_R, strict=True))
    if not points:
        raise ValueError("no routes to draw a line through")
    hull: list[tuple[float, float]] = []
    for x, y in points:
        if hull and y <= hull[-1][1]:
            continue  # more expensive and no better
        while len(hull) > 1 and _below(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return float(np.interp(cost, [x for x, _ in hull], [y for _, y in hull]))


def _below(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def random_routing(
    costs_R: Sequence[float], top1_R: Sequence[float], shares_R: Sequence[float]
) -> Outcome:
    """The expected outcome if images take the routes at random, in these shares."""
    if not np.isclose(sum(shares_R), 1):
        raise ValueError(f"shares {list(shares_R)}: must add up to 1")
    parts = list(zip(costs_R, top1_R, shares_R, strict=True))
    return Outcome(sum(c * s for c, _, s in parts), sum(t * s for _, t, s in parts))


def oracle(correct_NR: Bools, costs_R: Sequence[float]) -> Outcome:
    """Every image takes the cheapest route whose answer is right; the cheapest if none is."""
    costs = np.asarray(costs_R, float)
    order = np.argsort(costs, kind="stable")
    first_N = correct_NR[:, order].argmax(1)  # 0 where none is right
    return Outcome(float(costs[order][first_N].mean()), float(correct_NR.any(1).mean()))


def seen_twice(correct_N: Bools, mirrored_N: Bools, cost: float) -> Outcome:
    """The oracle's control: one route for an image and its mirror image, right at least once.

    It involves no choice of routes. The part of an oracle's lead that it reaches as well comes from
    having several answers, so it is no headroom for choosing among routes.
    """
    return Outcome(2 * cost, float((correct_N | mirrored_N).mean()), 1.0)


# -- policies --------------------------------------------------------------------------------------


def gated(correct_NR: Bools, costs_R: Sequence[float], option_N: Ints) -> Outcome:
    """Every image takes the route that a gate chose for it."""
    everyone = np.arange(len(correct_NR))
    return Outcome(
        float(np.asarray(costs_R, float)[option_N].mean()),
        float(correct_NR[everyone, option_N].mean()),
    )


def ladder(
    correct_NR: Bools,
    margins_NR: Floats,
    costs_R: Sequence[float],
    trunk: float,
    steps: Sequence[int],
    taus: Sequence[float],
) -> Outcome:
    """Escalation in several steps: all images take the first route, unsure ones also the next.

    A step reuses the trunk's features, so it costs its route's cost less `trunk`. `taus` has one
    threshold for every step but the last. `escalated` is the mean number of passes per image after
    the first.
    """
    if len(taus) != len(steps) - 1:
        raise ValueError(f"{len(steps)} steps need {len(steps) - 1} thresholds, got {len(taus)}")
    costs = np.asarray(costs_R, float)
    right_N = correct_NR[:, steps[0]].copy()
    cost_N = np.full(len(correct_NR), costs[steps[0]])
    on_N = np.ones(len(correct_NR), bool)
    again = 0.0
    for before, step, tau in zip(steps, steps[1:], taus, strict=False):
        on_N &= margins_NR[:, before] < tau
        right_N[on_N] = correct_NR[on_N, step]
        cost_N[on_N] += costs[step] - trunk
        again += float(on_N.mean())
    return Outcome(float(cost_N.mean()), float(right_N.mean()), again)


def cascade(
    correct_first_N: Bools,
    sure_first_N: Floats,
    correct_second_N: Bools,
    costs: tuple[float, float],
    tau: float,
) -> Outcome:
    """Two separate networks: if the first's margin is below tau, the second runs as a whole."""
    escalated_N = sure_first_N < tau
    right_N = np.where(escalated_N, correct_second_N, correct_first_N)
    share = float(escalated_N.mean())
    return Outcome(costs[0] + share * costs[1], float(right_N.mean()), share)


# -- thresholds ------------------------------------------------------------------------------------


def threshold_for(sure_N: Floats, share: float) -> float:
    """A threshold such that a given share of the margins is below it, to the nearest whole image.

    It is halfway between two margins, so that rounding does not move an image across it.
    """
    ordered = np.sort(np.asarray(sure_N, np.float64))
    count = round(share * len(ordered))
    if count <= 0:
        return float(ordered[0])  # no image is below the smallest margin
    if count >= len(ordered):
        return float(np.nextafter(ordered[-1], np.inf))
    return float((ordered[count - 1] + ordered[count]) / 2)


def best_settings(costs_S: Floats, top1_S: Floats, limits: Sequence[float]) -> list[int]:
    """For every limit, the number of the setting of highest top-1 among those within the limit.

    Ties go to the cheapest. If no setting is cheap enough, it is the cheapest of all.
    """
    order = np.lexsort((costs_S, -top1_S))  # best first, ties by cost
    found = []
    for limit in limits:
        within = order[costs_S[order] <= limit * (1 + 1e-9)]
        found.append(int(within[0]) if len(within) else int(np.argmin(costs_S)))
    return found
