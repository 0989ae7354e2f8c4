"""Search for budget curves: shifts and escalation thresholds tried jointly on held-out images.

Thousands of settings are compared in seconds, using the table of `runtime.calibrate_budget`. The
best of many settings looks better than it is, by chance. Therefore they are compared by expected
accuracy, which depends little on single labels (`runtime.opinion_pool`), and their accuracy is
measured afterwards.

Suffixes: N images, K options of a gate, P paths, S settings, T thresholds, V thresholds of a
second step, M thresholds of a second look, U units of cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dynaslim.cascade_spec import CascadeSpec
from dynaslim.cost import CostTable
from dynaslim.errors import check
from dynaslim.runtime.budget import MOST_SHARE, BudgetCurve, BudgetPoint, option_costs
from dynaslim.runtime.calibrate_budget import PathAnswers, Walked, walk
from dynaslim.runtime.escalation import Bools, Floats, Ints, escalation_cost

SHIFTS: Final = 41
"""Shifts tried, besides 0 and the two that send all images along the cheapest or widest route."""
TAUS: Final = 25
"""Thresholds tried for each shift and target."""
TAUS_OF_TWO: Final = 12
"""Thresholds tried for each of two steps, per shift and pair of targets."""
TAUS_OF_LOOKS: Final = 8
"""Thresholds tried for a second look, and for each step before it."""
MOST_ESCALATED: Final = 0.6
"""Largest share of escalated images that is tried; beyond it, a wider first route is better."""
LEAST_IMAGES: Final = 100
"""With fewer images, a curve is mostly chance."""
FEW_IMAGES: Final = 1000
"""With fewer images, the points of a curve are hard to tell apart."""
Z: Final = NormalDist().inv_cdf(0.975)
KEPT: Final = 20
"""Maximum number of points kept of each front, about evenly spaced by cost."""
NOISE: Final = 1.0
"""Standard errors by which gates must beat a single route, and a second look must beat none."""
SMALLEST_GROUP: Final = 0.01
"""Share of the images that a group must have: the mean cost of fewer is too noisy to judge by."""
_ROUNDING: Final = 1e-12
"""Relative tolerance for sums of costs."""


def fit_curve(answers: PathAnswers, *, latency: CostTable | None = None) -> BudgetCurve:
    """Find the settings worth having, from cheap to accurate; see `BudgetCurve`.

    `latency` is a table in ms for the same network, which adds the curve by milliseconds.

    Raises:
        UsageError: if `latency` is in another unit or for another network.
    """
    if latency is not None:
        check(latency.unit == "ms", f"latency table in {latency.unit}: expected ms")
        latency.check_fits(answers.spec)
    tried = _Tried(answers, latency)
    points, gate_points = tried.fronts(unit=0)
    ms_points, ms_gate_points = ((), ()) if latency is None else tried.fronts(unit=1)
    cheapest, widest = tried.point(tried.cheapest), tried.point(tried.widest)
    return BudgetCurve(
        image_size_px=answers.image_size_px,
        images=len(answers),
        widest_madds=widest.madds,
        widest_ms=widest.ms,
        widest_top1=widest.top1,
        cheapest_madds=cheapest.madds,
        cheapest_ms=cheapest.ms,
        cheapest_top1=cheapest.top1,
        points=points,
        gate_points=gate_points,
        ms_points=ms_points,
        ms_gate_points=ms_gate_points,
    )


class Interval(NamedTuple):
    """Bounds of a 95% confidence interval."""

    low: float
    high: float


def accuracy_interval(top1: float, images: int) -> Interval:
    """Wilson score interval (95%) of an accuracy (0..1) measured on `images` images."""
    assert images > 0
    spread = Z * Z / images
    centre = (top1 + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(top1 * (1 - top1) / images + spread / 4 / images)
    # rounding may put a bound on the wrong side of the accuracy, of 0 or of 1
    return Interval(max(0.0, min(centre - half, top1)), min(1.0, max(centre + half, top1)))


def shift_grid(answers: PathAnswers) -> Floats:
    """Shifts worth trying, ascending: 0, quantiles of where decisions change, and two extremes.

    With the extremes, every image takes the last option of every gate, or the first. A cascade's
    gate decides the same for all images, so there is one shift for each rung.
    """
    if isinstance(answers.spec, CascadeSpec):
        (costs_K,) = option_costs(answers.table)
        changes_K = _changes(answers.gate_logits[0][0, :1].astype(np.float64), costs_K)[0]
        far = math.ceil(4 * np.abs(changes_K).max()) + 1.0
        between = (changes_K[1:] + changes_K[:-1]) / 2
        return np.unique(np.concatenate([between, [0.0, -far, far]]))
    shares = (np.arange(SHIFTS) + 0.5) / SHIFTS
    quantiles, farthest = [], 0.0
    for logits_QNK, costs_K in zip(answers.gate_logits, option_costs(answers.table), strict=True):
        changes = _changes(logits_QNK.reshape(-1, len(costs_K)).astype(np.float64), costs_K)
        changes = changes[np.isfinite(changes)]
        if len(changes):
            quantiles.append(np.quantile(changes, shares))
            farthest = max(farthest, float(np.abs(changes).max()))
    # every gate has the same weight, however many prefixes lead to it
    grid = np.quantile(np.concatenate(quantiles), shares) if quantiles else np.zeros(0)
    # far beyond the values seen, so that it also works for images not seen
    far = math.ceil(4 * farthest) + 1.0
    return np.unique(np.concatenate([grid, [0.0, -far, far]]))


def _changes(logits_NK: Floats, costs_K: Floats) -> Floats:
    """Shifts (N, K - 1) above which a row's option is k or lower, for every k but the last."""
    count = len(costs_K)
    if count == 1:
        return np.zeros((len(logits_NK), 0))
    with np.errstate(divide="ignore", invalid="ignore"):  # options of the same cost never change
        below_NKK = (logits_NK[:, None, :] - logits_NK[:, :, None]) / (
            costs_K[None, :] - costs_K[:, None]
        )
    # below this shift, some option after k beats k
    beaten_NK = np.stack([below_NKK[:, k, k + 1 :].max(1) for k in range(count - 1)], axis=1)
    return np.asarray(np.minimum.accumulate(beaten_NK, axis=1))


class _Settings(NamedTuple):
    """Settings that were tried, and their results."""

    shift_S: Floats
    tau_S: Floats
    """NaN without escalation."""
    target_S: Ints
    """Number of the target; -1 without escalation."""
    tau_then_S: Floats
    """NaN without a second step."""
    target_then_S: Ints
    tau_mirror_S: Floats
    """NaN without a second look."""
    escalated_S: Ints
    """Number of escalated images."""
    expected_S: Floats
    """Expected number of correctly classified images."""
    cost_US: Floats
    """Mean costs over all images, in MAdds and, with a latency table, in ms."""

    @classmethod
    def of(
        cls,
        shift: float,
        escalated_S: Ints,
        expected_S: Floats,
        cost_US: Floats,
        *,
        tau: Floats | float = np.nan,
        target: Ints | int = -1,
        tau_then: Floats | float = np.nan,
        target_then: Ints | int = -1,
        tau_mirror: Floats | float = np.nan,
    ) -> _Settings:
        """Settings with one shift; other scalars also apply to all of them."""
        steps = (shift, tau, target, tau_then, target_then, tau_mirror)
        columns = [np.broadcast_to(values, len(escalated_S)) for values in steps]
        # settings with the same answers must not differ by the order of summation
        expected_S = expected_S.round(6)
        return cls(*columns, escalated_S, expected_S, cost_US)  # type: ignore[call-arg]


class _Tried:
    """All settings that are tried, and their Pareto fronts."""

    def __init__(self, answers: PathAnswers, latency: CostTable | None) -> None:
        self.answers = answers
        self.tables = [answers.table] if latency is None else [answers.table, latency]
        self.costs_UP = np.stack([answers.costs(table) for table in self.tables])
        differ_N = answers.correct_NP[:, 0] != answers.correct_NP[:, -1]
        self.noise = math.sqrt(np.count_nonzero(differ_N))
        """Standard error of the difference between two settings, in correctly classified images."""
        parts = [part for shift in shift_grid(answers) for part in self._of_shift(float(shift))]
        self.all = _Settings(*(np.concatenate(column, -1) for column in zip(*parts, strict=True)))
        # shifts are ascending: from the widest to the cheapest
        alone = np.flatnonzero(self._is_alone)
        self.widest, self.cheapest = int(alone[0]), int(alone[-1])
        self._wasteful: dict[int, bool] = {}

    @property
    def _is_alone(self) -> Bools:
        """Which settings (S,) use the gate alone."""
        return (self.all.target_S < 0) & np.isnan(self.all.tau_mirror_S)

    def _of_shift(self, shift: float) -> Iterator[_Settings]:
        """Settings of one shift: the gate alone, thresholds for every target, for every pair of
        targets, and those with a second look.
        """
        answers = self.answers
        own_N, everyone = answers.taken(shift), np.arange(len(answers))
        expected = answers.expected_NP[everyone, own_N].sum()
        cost_U = self.costs_UP[:, own_N].mean(1)
        yield _Settings.of(shift, np.array([0]), np.array([expected]), cost_U[:, None])
        for target in range(len(answers.targets)):
            yield from self._in_steps(shift, own_N, -1, target, count=TAUS)
        for first, then in itertools.combinations(range(len(answers.targets)), 2):
            yield from self._in_steps(shift, own_N, first, then, count=TAUS_OF_TWO)
        if answers.expected_look_N is not None:
            last, looked_N = len(answers.targets) - 1, answers.expected_look_N
            for first in range(-1, last):
                yield from self._in_steps(shift, own_N, first, last, looked_N, count=TAUS_OF_LOOKS)

    def _in_steps(
        self,
        shift: float,
        own_N: Ints,
        first: int,
        then: int,
        looked_N: Floats | None = None,
        *,
        count: int,
    ) -> Iterator[_Settings]:
        """Settings with steps to target `first`, then to a wider one, `then`, then a second look.

        See `escalation.EscalationState`. Each step has `count` thresholds. With `first` -1, the
        step to `then` is the only one, and settings without it are included. The second look
        follows only the widest target; its answers are right with the probabilities `looked_N`.
        """
        answers, everyone = self.answers, np.arange(len(self.answers))
        targets = answers.targets[first], answers.targets[then]
        middle, last = map(answers.paths.index, targets)
        able_N = answers.may_escalate(targets[0])[own_N] & (first >= 0)
        # the path of a row's answer before the second step, if the first step escalated it
        stands_N = np.where(able_N, middle, own_N)
        able_then_N = answers.may_escalate(targets[1])[stands_N]
        margin_N = answers.margins_NP[everyone, own_N]
        then_N = answers.margins_NP[everyone, stands_N]
        if first >= 0 and not able_then_N[able_N].any():
            return
        none, never = np.array([np.nan], np.float32), np.zeros(1, np.float32)
        tau_T = none if first < 0 else _thresholds(np.sort(margin_N[able_N]), len(answers), count)
        # rows that reach the second step for some threshold of the first
        reached_N = able_then_N & (~able_N | (margin_N < tau_T[-1]))
        if first >= 0 and not reached_N.any():
            return
        tau_V = never[: first < 0]
        if reached_N.any():
            tau_V = np.append(tau_V, _thresholds(np.sort(then_N[reached_N]), len(answers), count))
        end_N, tau_M, there_N = answers.margins_NP[:, last], none, stands_N == last
        if looked_N is not None:
            reached_N = there_N | (reached_N & (then_N < tau_V[-1]))
            if not reached_N.any():
                return
            tau_M = _thresholds(np.sort(end_N[reached_N]), len(answers), count)
        # index of the lowest threshold of each step under which a row falls; a row that a step
        # cannot escalate proceeds to the next step at every threshold
        from_T_N = np.where(able_N, np.searchsorted(tau_T, margin_N, side="right"), 0)
        from_V_N = np.where(able_then_N, np.searchsorted(tau_V, then_N, side="right"), len(tau_V))
        from_V_N[there_N] = 0
        from_M_N = np.searchsorted(tau_M, end_N, side="right")
        shape = len(tau_T) + 1, len(tau_V) + 1, len(tau_M) + 1
        cell_N = np.ravel_multi_index((from_T_N, from_V_N, from_M_N), shape)

        def run(step: int, weight_N: Floats | Bools) -> Floats:
            """Sums of weights over the rows that run a step: (T, 1, 1), (T, V, 1) or (T, V, M)."""
            counts = np.bincount(cell_N, weight_N, math.prod(shape)).reshape(shape)
            sums: Floats = counts.cumsum(0).cumsum(1).cumsum(2)
            under, everywhere = slice(0, -1), slice(-1, None)
            return sums[under, under if step > 0 else everywhere, under if step > 1 else everywhere]

        own_right_N = answers.expected_NP[everyone, own_N]
        stands_right_N = answers.expected_NP[everyone, stands_N]
        last_right_N = answers.expected_NP[:, last]
        expected = own_right_N.sum() + run(0, able_N * (stands_right_N - own_right_N))
        expected = expected + run(1, able_then_N * (last_right_N - stands_right_N))
        runs = [run(0, able_N), run(1, able_then_N)]
        once = runs[0] + run(1, able_then_N & ~able_N)
        if looked_N is not None:
            expected = expected + run(2, looked_N - last_right_N)
            runs.append(run(2, np.ones(len(answers))))
            once = once + run(2, there_N)
        grid = (len(tau_T), len(tau_V), len(tau_M))
        costs = []
        for table, costs_P in zip(self.tables, self.costs_UP, strict=True):
            more = [
                escalation_cost(table, target, mirror=step == 2)
                for step, target in enumerate((*targets, targets[1])[: len(runs)])
            ]
            spent = sum(each * ran for each, ran in zip(more, runs, strict=True)) / len(answers)
            costs.append(np.broadcast_to(costs_P[own_N].mean() + spent, grid).ravel())
        tau_TVM, then_TVM, mirror_TVM = (
            taus.ravel().astype(np.float64)
            for taus in np.meshgrid(tau_T, tau_V, tau_M, indexing="ij")
        )
        if first < 0:  # `then` becomes the first step; a threshold of 0 means no step
            stays_S = then_TVM == 0
            steps: dict[str, Any] = {
                "tau": np.where(stays_S, np.nan, then_TVM),
                "target": np.where(stays_S, -1, then),
            }
        else:
            steps = {"tau": tau_TVM, "target": first, "tau_then": then_TVM, "target_then": then}
        escalated, expected = (np.broadcast_to(values, grid).ravel() for values in (once, expected))
        yield _Settings.of(
            shift, escalated, expected, np.stack(costs), **steps, tau_mirror=mirror_TVM
        )

    def fronts(self, unit: int) -> tuple[tuple[BudgetPoint, ...], tuple[BudgetPoint, ...]]:
        """Front points of all settings, and of the gate alone, by cost in one unit.

        Both include the widest route, which is the last point of the gate alone. Only points with
        a second look cost more.
        """
        cost_S, looks_S = self.all.cost_US[unit], ~np.isnan(self.all.tau_mirror_S)
        # without a second look, no budget leads to more than the widest route's cost
        most_S = cost_S[self.widest] * np.where(looks_S, MOST_SHARE, 1) * (1 + _ROUNDING)
        within = np.flatnonzero(cost_S <= most_S)
        while True:
            both, alone = self._fronts(within, cost_S)
            wasteful = [number for number in both.tolist() if self._is_wasteful(number)]
            if not wasteful:
                return self._points(both, cost_S), self._points(alone, cost_S)
            within = np.setdiff1d(within, wasteful)

    def _is_wasteful(self, number: int) -> bool:
        """Whether some group of rows would cost less if it took the widest route directly.

        Groups are the rows that the gates send along one route, and the rows that run one step of
        escalation. Their mean cost, including all later steps, must not exceed that of taking the
        widest route directly. A second look is not counted: it would cost the same after that.
        """
        if number not in self._wasteful:
            point, answers = self._unmeasured(number), self.answers
            steps = [step for step in point.escalations if not step.mirror]
            walked = [
                walk(answers, point.shift, steps[:count]).madds_N for count in range(len(steps) + 1)
            ]
            own_N, total_N = answers.taken(point.shift), walked[-1]
            groups = [
                (own_N == path, total_N, answers.table.widest_cost) for path in np.unique(own_N)
            ]
            at_once = escalation_cost(answers.table, answers.paths[-1])
            for before_N, after_N in itertools.pairwise(walked):
                groups.append((after_N > before_N, total_N - before_N, at_once))
            least = max(1, len(answers) * SMALLEST_GROUP)
            self._wasteful[number] = any(
                np.count_nonzero(who_N) >= least and cost_N[who_N].mean() > most * (1 + _ROUNDING)
                for who_N, cost_N, most in groups
            )
        return self._wasteful[number]

    def _fronts(self, within: Ints, cost_S: Floats) -> tuple[Ints, Ints]:
        """The fronts of all and of the gate-only settings among those `within`."""
        looks_S = ~np.isnan(self.all.tau_mirror_S)
        once, twice = within[~looks_S[within]], within[looks_S[within]]
        alone = self._thinned(within[self._is_alone[within]], cost_S)
        worth = self._better_than_uniform(once, cost_S)
        # gate-only points are candidates too, so that escalation never makes a budget worse
        kept = [self._thinned(worth, cost_S), alone[np.isin(alone, worth)]]
        if len(twice):
            worth_twice = self._better_than_uniform(within, cost_S)
            kept.append(self._worth_second_look(worth_twice[looks_S[worth_twice]], worth, cost_S))
        return self._front(np.concatenate(kept), cost_S), alone

    def _worth_second_look(self, settings: Ints, without: Ints, cost_S: Floats) -> Ints:
        """The best settings with a second look that beat the best without one at the same cost.

        They must do so by a standard error of the difference, which is estimated from the images
        that only one of the two gets right.
        """
        if not len(settings):
            return settings
        front, worth = self._front(without, cost_S), []
        for number in self._thinned(settings, cost_S).tolist():
            rival = front[np.searchsorted(cost_S[front], cost_S[number], side="right") - 1]
            ours, theirs = self._walk(number), self._walk(int(rival))
            differ = np.count_nonzero(ours.right_N != theirs.right_N)
            gained = float((ours.expected_N - theirs.expected_N).sum())
            if gained > NOISE * math.sqrt(differ):
                worth.append(number)
        return np.array(worth, np.int64)

    def _walk(self, number: int) -> Walked:
        """A setting's outcome for every image."""
        point = self._unmeasured(number)
        return walk(self.answers, point.shift, point.escalations)

    def _better_than_uniform(self, settings: Ints, cost_S: Floats) -> Ints:
        """Drop settings whose gates gain no more than chance over a single first route.

        The best of many shifts looks good by chance. A setting whose gates divide the images must
        beat, by a standard error, those with a single first route for all images at its cost.
        """
        if isinstance(self.answers.spec, CascadeSpec):  # its gate sends all images the same way
            return settings
        expected_S, shift_S = self.all.expected_S, self.all.shift_S
        alike = np.isin(shift_S[settings], (shift_S[self.widest], shift_S[self.cheapest]))
        front = self._front(settings[alike], cost_S)
        at = np.searchsorted(cost_S[front], cost_S[settings], side="right") - 1
        beaten = expected_S[front][at]
        return np.asarray(settings[alike | (expected_S[settings] > beaten + NOISE * self.noise)])

    def _front(self, settings: Ints, cost_S: Floats) -> Ints:
        """The Pareto front by cost and expected accuracy, ascending in both."""
        expected_S = self.all.expected_S
        order = settings[np.lexsort((-expected_S[settings], cost_S[settings]))]
        best = np.maximum.accumulate(expected_S[order])
        better: Ints = order[np.append(True, best[1:] > best[:-1])]
        return better

    def _thinned(self, settings: Ints, cost_S: Floats) -> Ints:
        """The front of the settings, reduced to the best within each of `KEPT` spaced costs."""
        front = self._front(settings, cost_S)
        costs = cost_S[front]
        limits = np.linspace(costs[0], costs[-1], KEPT) * (1 + _ROUNDING)
        thinned: Ints = front[np.unique(np.searchsorted(costs, limits, side="right") - 1)]
        return thinned

    def _points(self, settings: Ints, cost_S: Floats) -> tuple[BudgetPoint, ...]:
        numbers = settings.tolist()
        if self.widest not in numbers:
            place = np.searchsorted(cost_S[settings], cost_S[self.widest], side="right")
            numbers.insert(int(place), self.widest)
        return tuple(self.point(number) for number in numbers)

    def point(self, number: int) -> BudgetPoint:
        """Convert a setting to a point of a curve, and measure its accuracy."""
        top1 = float(self._walk(number).right_N.mean())
        interval = accuracy_interval(top1, len(self.answers))
        return replace(self._unmeasured(number), top1=top1, top1_interval=interval)

    def _unmeasured(self, number: int) -> BudgetPoint:
        """The point without its accuracy."""
        target, then = int(self.all.target_S[number]), int(self.all.target_then_S[number])
        tau_mirror = float(self.all.tau_mirror_S[number])
        costs = self.all.cost_US[:, number].tolist()
        images = len(self.answers)
        return BudgetPoint(
            shift=float(self.all.shift_S[number]),
            tau=None if target < 0 else float(self.all.tau_S[number]),
            escalate_to=None if target < 0 else self.answers.targets[target],
            madds=costs[0],
            share=costs[0] / self.answers.table.widest_cost,
            ms=costs[1] if len(costs) > 1 else None,
            top1=0.0,
            escalated=float(self.all.escalated_S[number]) / images,
            top1_selecting=min(1.0, float(self.all.expected_S[number]) / images),
            tau_then=None if then < 0 else float(self.all.tau_then_S[number]),
            escalate_then=None if then < 0 else self.answers.targets[then],
            tau_mirror=None if math.isnan(tau_mirror) else tau_mirror,
            mirror_along=None if math.isnan(tau_mirror) else self.answers.paths[-1],
        )


def _thresholds(
    margins_N: npt.NDArray[np.float32], images: int, count: int
) -> npt.NDArray[np.float32]:
    """At most `count` ascending thresholds (T,) below which evenly spaced shares of margins fall.

    `margins_N` are those of the images that can escalate, sorted. A threshold is midway between
    two margins where possible, so that rounding elsewhere moves no image across it. At least one
    margin is below it.
    """
    most = min(len(margins_N), math.ceil(MOST_ESCALATED * images))
    count_T = np.unique(np.ceil(np.arange(1, count + 1) * most / count).astype(np.int64))
    below_T = margins_N[count_T - 1]
    above_T = np.append(margins_N, np.float32(1))[count_T]
    between_T = below_T + (above_T - below_T) / 2
    return np.unique(np.where(between_T > below_T, between_T, np.nextafter(below_T, np.float32(2))))
