"""Converts a call's budget, escalation and cap into decisions for the router.

Suffixes: B rows, G gates, K options of a gate, N classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Final

import numpy as np

from dynaslim.cascade_spec import CascadeSpec
from dynaslim.errors import UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.runtime import budget as budgets
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint, PathCosts, needed_curve
from dynaslim.runtime.escalation import Escalation, EscalationState, Ints, margins
from dynaslim.runtime.router import Escalated, Routed
from dynaslim.spec import TEACHER_INDEX, Route

Budget = float | str | BudgetPoint
CASCADE_BUDGET: Final = "drop=0.5"
"""Default budget of a cascade with a curve. Without one, its gate would send all images to the
first rung."""
SMALL_CALL: Final = 16
"""Calls with fewer rows than this use lower thresholds until enough of the budget is saved up."""
_HALVINGS: Final = 40


@dataclass(frozen=True)
class Decisions:
    """How the rows of a call choose their routes; reusable for any number of calls."""

    spec: AnySpec
    costs: PathCosts
    shift: float
    escalations: tuple[Escalation, ...]
    """Steps of escalation, in order."""
    limits: tuple[int, ...] | None
    """The highest allowed option of every gate; None without a cap."""
    held: float | None = None
    """Bound on the mean cost, as a share of the widest route's; None without `hold`."""

    @cached_property
    def _prices(self) -> list[np.ndarray]:
        limits = self.limits or [None] * len(self.costs.options)
        return [
            budgets.prices(self.shift, costs_K, limit)
            for costs_K, limit in zip(self.costs.options, limits, strict=True)
        ]

    @cached_property
    def _widths(self) -> list[np.ndarray]:
        return [np.array(gate.choices) for gate in self.spec.gates]

    def decide(self, gate: int, logits_BK: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Options (B,) that the rows take; see `router.Decide`."""
        if not self.shift and self.limits is None:
            options: np.ndarray = logits_BK.argmax(1)
            return options
        return budgets.choose_by_prices(logits_BK, self._prices[gate])

    def escalating(
        self, logits_BN: np.ndarray, options_BG: np.ndarray, call: HeldCall | None = None
    ) -> Iterator[Escalated]:
        """Yield the rows that escalate, step by step; with `call`, only those it can afford."""
        if not self.escalations:
            return
        margin_B = margins(logits_BN)
        # most single images are sure, and what follows takes as long as a small layer
        if not (margin_B < max(step.tau for step in self.escalations)).any():
            return
        state, last_BG, changed = EscalationState(len(logits_BN)), options_BG.copy(), False
        for number, step in enumerate(self.escalations):
            able_B = self.costs.may_escalate(last_BG, step.target, mirror=step.mirror)
            if changed:
                margin_B = margins(logits_BN)
            tau = step.tau if call is None else step.tau * call.tau_factor
            members = state.next(able_B, margin_B, tau).nonzero()[0]
            if call is not None:
                afforded = call.afforded(members, margin_B, number)
                state.close(np.setdiff1d(members, afforded, assume_unique=True))
                members = afforded
            if len(members):
                yield Escalated(members, step.target, step.mirror)
                last_BG[members] = step.target
                changed = True

    def within(self, rows: int, allowance: float) -> HeldCall:
        """Decisions for one call whose rows together may cost `allowance` widest routes."""
        assert self.held is not None
        widest = self.costs.table.widest_cost
        return HeldCall(self, rows, allowance * widest, self.held * widest)

    def results(self, routed: Routed) -> tuple[np.ndarray, ...]:
        """Logits (B, N), width indices (B, G) of the routes that gave them, multiply-adds (B,)
        float64, rows that escalated (B,) bool, and those of them with a second look (B,) bool.
        """
        logits_BN, options_BG, passes = routed
        madds_B = self.costs.of(options_BG)
        escalated_B, mirrored_B = np.zeros((2, len(madds_B)), bool)
        for rows in passes:
            escalated_B[rows.members] = True
            mirrored_B[rows.members] |= rows.mirror
            target = self.costs.target(rows.path)
            madds_B[rows.members] += target.cost if rows.mirror else target.extra
            options_BG[rows.members] = rows.path
        widths_BG = np.empty_like(options_BG)
        for gate, widths_K in enumerate(self._widths):
            widths_BG[:, gate] = widths_K.take(options_BG[:, gate])
        return logits_BN, widths_BG, madds_B, escalated_B, mirrored_B


class HeldCall:
    """The decisions of one call whose rows together may cost no more than an allowance.

    Every row can at least take the cheapest route. If the gates' choices cost more than is left,
    the gates are shifted towards cheaper options until it suffices. If more rows are unsure than
    can be afforded, those with the smallest margins escalate. A call with few rows has few to
    choose from: its thresholds are lowered, the more so the less is saved up.
    """

    def __init__(self, decisions: Decisions, rows: int, allowance: float, limit: float) -> None:
        """`allowance` is for all rows together, `limit` is the mean per row; in multiply-adds."""
        costs = decisions.costs
        self._decisions = decisions
        self._extra = costs.extra
        self._options = costs.options
        self._before_B = np.zeros(rows, np.int64)
        self._savings = max(0, SMALL_CALL - rows) * (limit - costs.cheapest)
        self._left = allowance - rows * costs.cheapest

    def decide(self, gate: int, logits_BK: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Like `Decisions.decide`, within what is left."""
        decisions = self._decisions
        limit = None if decisions.limits is None else decisions.limits[gate]
        extra_BK = self._extra[gate][self._before_B[rows]]
        each = np.arange(len(rows))
        option_B = decisions.decide(gate, logits_BK, rows)
        if extra_BK[each, option_B].sum() > self._left:
            dear, cheap, step = decisions.shift, decisions.shift, 1.0
            for _ in range(_HALVINGS):  # double the step until the shift is cheap enough
                cheap, step = cheap + step, 2 * step
                option_B = budgets.choose(logits_BK, cheap, self._options[gate], limit)
                if extra_BK[each, option_B].sum() <= self._left:
                    break
            else:
                option_B = np.zeros(len(rows), np.int64)
            for _ in range(_HALVINGS):
                middle = (dear + cheap) / 2
                tried_B = budgets.choose(logits_BK, middle, self._options[gate], limit)
                if extra_BK[each, tried_B].sum() <= self._left:
                    cheap, option_B = middle, tried_B
                else:
                    dear = middle
        self._before_B[rows] = option_B
        self._left -= float(extra_BK[each, option_B].sum())
        return option_B

    def escalating(self, logits_BN: np.ndarray, options_BG: np.ndarray) -> Iterator[Escalated]:
        """Like `Decisions.escalating`, within what is left."""
        return self._decisions.escalating(logits_BN, options_BG, self)

    @property
    def tau_factor(self) -> float:
        """Factor on thresholds, 0..1: in a small call, the less is saved up, the smaller."""
        return min(1.0, max(0.0, self._left) / self._savings) if self._savings else 1.0

    def afforded(self, members: Ints, margin_B: np.ndarray, number: int) -> Ints:
        """The rows with the smallest margins that step `number` can afford; deducts their cost.

        Each step may spend an equal part of what is left, and the last step all of it, so that
        cheap early steps do not use up what expensive later ones need.
        """
        steps, left = self._decisions.escalations, max(0.0, self._left)  # rounding may overdraw
        step = steps[number]
        target = self._decisions.costs.target(step.target)
        extra = target.cost if step.mirror else target.extra
        count = int(left / (len(steps) - number) / extra)
        if count < len(members):
            members = np.sort(members[margin_B[members].argsort(kind="stable")[:count]])
        self._left -= len(members) * extra
        return members


def make_decisions(
    spec: AnySpec,
    costs: PathCosts,
    curve: BudgetCurve | None,
    *,
    mirror: bool,
    budget: Budget | None,
    shift: float | None,
    escalate: str | float | None,
    max_route: Route | str | Sequence[int] | None,
    hold: bool = False,
) -> Decisions:
    """Make decisions from a call's arguments; `mirror` allows second looks at mirror images.

    Raises:
        UsageError: for a budget without a curve, both a budget and a shift, an `escalate` that is
            not a margin, a second look where mirroring is not allowed, a cap below the cheapest
            route, or a `hold` without a budget or with one below the cheapest route's cost.
    """
    check(budget is None or shift is None, "give a budget or a shift, not both")
    point = None
    if isinstance(spec, CascadeSpec) and curve is not None and escalate == "auto":
        budget = CASCADE_BUDGET if budget is None and shift is None else budget
    if isinstance(budget, BudgetPoint):
        budget.check_fits(spec, mirror=mirror)
        point = budget
    elif budget is not None:
        curve = needed_curve(curve, f"budget {budget!r}")
        point = curve.at(budget, escalate=escalate == "auto")
    if point is not None:
        shift = point.shift
    limits = None if max_route is None else _limits(spec, max_route)
    steps: tuple[Escalation, ...] = ()
    if escalate == "auto":
        steps = () if point is None else point.escalations
    elif escalate is not None:
        check(
            isinstance(escalate, Real) and not isinstance(escalate, bool) and 0 <= escalate <= 1,
            f"escalate {escalate!r}: give 'auto', None, or a margin from 0 to 1",
        )
        widest = tuple(len(gate.choices) - 1 for gate in spec.gates)
        # in a cascade, every rung in turn
        targets = [(n + 1,) for n in range(*widest)] if isinstance(spec, CascadeSpec) else [widest]
        steps = tuple(Escalation(float(escalate), target) for target in targets)
    if limits is not None:
        steps = tuple(step._replace(target=tuple(map(min, step.target, limits))) for step in steps)
    shift = 0.0 if shift is None else shift
    # decisions are cached by their arguments: no tensor, because its value may change
    check(
        isinstance(shift, Real) and bool(np.isfinite(shift)), f"shift {shift}: give a finite number"
    )
    held = _held(costs, curve, budget) if hold else None
    steps = tuple(step for step in steps if step.tau)  # no margin is below a tau of 0
    return Decisions(spec, costs, float(shift), steps, limits, held)


def _held(costs: PathCosts, curve: BudgetCurve | None, budget: Budget | None) -> float:
    """The bound on the mean cost, as a share of the widest route's."""
    if budget is None:
        raise UsageError("hold: give the budget that is to hold")
    if isinstance(budget, BudgetPoint):
        share, budget = budget.share, f"of {budget.share:.4g}"
    else:
        assert curve is not None, "make_decisions has looked the budget up"
        share = curve.share_of(budget)
    lowest = costs.cheapest / costs.table.widest_cost
    check(
        share >= lowest * (1 - budgets.ROUNDING),
        f"budget {budget}: cannot hold, as every image costs at least {lowest:.3g} of the widest "
        f"route's multiply-adds",
    )
    return share


def _limits(spec: AnySpec, max_route: Route | str | Sequence[int]) -> tuple[int, ...]:
    """For every gate, the highest option whose width is at most the route's."""
    route = spec.coerce_route(max_route)
    limits = []
    for gate, most in zip(spec.gates, spec.segment_indices(route)[1:], strict=True):
        allowed = [n for n, c in enumerate(gate.choices) if c <= most or most == TEACHER_INDEX]
        check(
            bool(allowed),
            f"max_route {route}: below the cheapest route of the gates, {spec.cheapest_choice}",
        )
        limits.append(allowed[-1])
    return tuple(limits)
