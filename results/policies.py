"""What ways of choosing a route give, as arithmetic on tables of answers.

A table has, for every image and every route of a network (cheapest first), whether the route is
right, and how sure it is of its answer. An image that runs twice costs twice; only escalation
within one network keeps what the trunk computed. Everything here is a pure function of arrays.

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
    """Means over images: cost in the unit of the costs given, top-1 and the share that ran twice
    in 0..1.
    """

    cost: float
    top1: float
    escalated: float = 0.0


# -- what to compare with --------------------------------------------------------------------------


def uniform_line(costs_R: Sequence[float], top1_R: Sequence[float], cost: float) -> float:
    """The best top-1 at a mean cost without looking at the images: the upper hull of the routes.

    The hull between two routes is what a random choice between them gives. Below the
    cheapest route's cost there is nothing: the cheapest's top-1; above the dearest, the best.
    """
    points = sorted(zip(costs_R, top1_R, strict=True))
    if not points:
        raise ValueError("no routes to draw a line through")
    hull: list[tuple[float, float]] = []
    for x, y in points:
        if hull and y <= hull[-1][1]:
            continue  # dearer and no better
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
    """What images give on average that are sent along the routes at random, in these shares."""
    if not np.isclose(sum(shares_R), 1):
        raise ValueError(f"shares {list(shares_R)}: must add up to 1")
    parts = list(zip(costs_R, top1_R, shares_R, strict=True))
    return Outcome(sum(c * s for c, _, s in parts), sum(t * s for _, t, s in parts))


def oracle(correct_NR: Bools, costs_R: Sequence[float]) -> Outcome:
    """Every image along the cheapest route that is right; along the cheapest if none is."""
    costs = np.asarray(costs_R, float)
    order = np.argsort(costs, kind="stable")
    first_N = correct_NR[:, order].argmax(1)  # 0 where none is right
    return Outcome(float(costs[order][first_N].mean()), float(correct_NR.any(1).mean()))


def seen_twice(correct_N: Bools, mirrored_N: Bools, cost: float) -> Outcome:
    """One route for an image and its mirror image, right at least once: the oracle's control.

    No choice of routes is in it. What of an oracle's lead it reaches as well is luck of many
    answers, and no headroom for choosing among routes.
    """
    return Outcome(2 * cost, float((correct_N | mirrored_N).mean()), 1.0)


# -- policies --------------------------------------------------------------------------------------


def gated(correct_NR: Bools, costs_R: Sequence[float], option_N: Ints) -> Outcome:
    """Every image along the route that a gate chose for it."""
    everyone = np.arange(len(correct_NR))
    return Outcome(
        float(np.asarray(costs_R, float)[option_N].mean()),
        float(correct_NR[everyone, option_N].mean()),
    )


def ladder(
    correct_NR: Bools,
    sure_NR: Floats,
    costs_R: Sequence[float],
    trunk: float,
    steps: Sequence[int],
    taus: Sequence[float],
) -> Outcome:
    """Escalation in several steps: the first route for all, on to the next where unsure.

    A step goes on from the trunk's features, which were kept: it costs its route less `trunk`.
    `taus` has one threshold for every step but the last. `escalated` counts the second passes
    and all later ones, per image.
    """
    if len(taus) != len(steps) - 1:
        raise ValueError(f"{len(steps)} steps need {len(steps) - 1} thresholds, got {len(taus)}")
    costs = np.asarray(costs_R, float)
    right_N = correct_NR[:, steps[0]].copy()
    cost_N = np.full(len(correct_NR), costs[steps[0]])
    on_N = np.ones(len(correct_NR), bool)
    again = 0.0
    for before, step, tau in zip(steps, steps[1:], taus, strict=False):
        on_N &= sure_NR[:, before] < tau
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
    """Two separate networks: where the first is less sure than tau, the second runs as a whole."""
    escalated_N = sure_first_N < tau
    right_N = np.where(escalated_N, correct_second_N, correct_first_N)
    share = float(escalated_N.mean())
    return Outcome(costs[0] + share * costs[1], float(right_N.mean()), share)


# -- thresholds ------------------------------------------------------------------------------------


def threshold_for(sure_N: Floats, share: float) -> float:
    """A threshold under which just so many of the images are, to the nearest whole image.

    Between two of them where there is room, so that rounding changes no image's side.
    """
    ordered = np.sort(np.asarray(sure_N, np.float64))
    count = round(share * len(ordered))
    if count <= 0:
        return float(ordered[0])  # no image is below the smallest margin
    if count >= len(ordered):
        return float(np.nextafter(ordered[-1], np.inf))
    return float((ordered[count - 1] + ordered[count]) / 2)


def best_settings(costs_S: Floats, top1_S: Floats, limits: Sequence[float]) -> list[int]:
    """For every limit the setting of the highest top-1 that costs no more; of equals the cheapest.

    Where none is cheap enough, the cheapest of all.
    """
    order = np.lexsort((costs_S, -top1_S))  # best first, of equals the cheapest
    found = []
    for limit in limits:
        within = order[costs_S[order] <= limit * (1 + 1e-9)]
        found.append(int(within[0]) if len(within) else int(np.argmin(costs_S)))
    return found
