"""What a call's budget, escalation and cap ask of the router.

Suffixes: B rows, G gates, K options of a gate, N classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Final, NamedTuple

import numpy as np

from dynaslim.cascade_spec import CascadeSpec
from dynaslim.cost import CostTable
from dynaslim.errors import UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.runtime import budget as budgets
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.escalation import (
    Escalation,
    EscalationState,
    escalation_cost,
    margins,
    who_may_escalate,
)
from dynaslim.runtime.router import Escalated, Routed, WhoEscalates
from dynaslim.runtime.spending import HeldCall
from dynaslim.spec import LARGEST, Route

Budget = float | str | BudgetPoint
CASCADE_BUDGET: Final = "drop=0.5"
"""Of a cascade with a curve, where none is given: its gate alone would send all images to the first
rung."""


class _Target(NamedTuple):
    path_G: np.ndarray
    cost: float
    """Of the whole path."""
    more: float
    """What it adds to that of a row that goes on; a second look adds all of it."""


class RouteCosts:
    """What routes cost for one size of image, laid out for use at every call."""

    def __init__(self, spec: AnySpec, size: tuple[int, int]) -> None:
        self.spec = spec
        self.table = CostTable.from_madds(spec, size)
        self.options = budgets.option_costs(self.table)
        self.widths = [np.array(gate.choices) for gate in spec.gates]
        trunk, *segments = self.table.segments
        # up to the end of the segment behind the first gate, by its option
        self._first_K = trunk[0][0] + np.array(segments[0][0])
        self._segments = [np.array(segment) for segment in segments[1:]]
        self._targets: dict[tuple[int, ...], _Target] = {}
        self.cheapest = float(self._first_K[0] + sum(segment[0, 0] for segment in self._segments))
        """Of the route that takes the first option of every gate."""

    @cached_property
    def more(self) -> list[np.ndarray]:
        """For every gate (K before, K): what an option costs more than the first, and first options
        behind it; of the first gate (1, K).
        """
        own = [self._first_K[None, :], *self._segments]
        behind = [segment[:, 0] for segment in self._segments] + [np.zeros(len(own[-1][0]))]
        totals = [segment + rest_K for segment, rest_K in zip(own, behind, strict=True)]
        return [total - total[:, :1] for total in totals]

    def of_paths(self, options_BG: np.ndarray) -> np.ndarray:
        """Multiply-adds (B,) float64."""
        total_B: np.ndarray = self._first_K.take(options_BG[:, 0])
        for number, segment in enumerate(self._segments, start=1):
            total_B += segment[options_BG[:, number - 1], options_BG[:, number]]
        return total_B

    def target(self, path: tuple[int, ...]) -> _Target:
        """What going on along a path comes to."""
        known = self._targets.get(path)
        if known is None:
            known = _Target(
                np.array(path), self.table.route_cost(path), escalation_cost(self.table, path)
            )
            self._targets[path] = known
        return known

    def may_escalate(
        self, options_BG: np.ndarray, target: tuple[int, ...], *, mirror: bool = False
    ) -> np.ndarray:
        """For every row whether it may go on to `target`, or look again along it (B,) bool."""
        path_G, cost, _ = self.target(target)
        if mirror:
            stands_B: np.ndarray = (options_BG == path_G).all(1)
            return stands_B
        return who_may_escalate(options_BG, self.of_paths(options_BG), path_G, cost)


@dataclass(frozen=True)
class Decisions:
    """How the rows of a call choose their routes; good for any number of calls."""

    route_costs: RouteCosts
    shift: float
    escalations: tuple[Escalation, ...]
    """Rows of a margin under their taus escalate; none lets none."""
    limits: tuple[int, ...] | None
    """The highest option of every gate that is allowed."""
    held: float | None = None
    """What rows may cost on average, as a share of the widest route's; None if no budget holds."""

    @cached_property
    def _prices(self) -> list[np.ndarray]:
        limits = self.limits or [None] * len(self.route_costs.options)
        return [
            budgets.prices(self.shift, costs_K, limit)
            for costs_K, limit in zip(self.route_costs.options, limits, strict=True)
        ]

    def decide(self, gate: int, logits_BK: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Options (B,) that the rows take; see `router.Decide`."""
        if not self.shift and self.limits is None:
            options: np.ndarray = logits_BK.argmax(1)
            return options
        return budgets.choose_by_prices(logits_BK, self._prices[gate])

    @property
    def escalate(self) -> WhoEscalates | None:
        """Which rows escalate; None if none can."""
        return self._unsure if self.escalations else None

    def _unsure(self, logits_BN: np.ndarray, options_BG: np.ndarray) -> Iterator[Escalated]:
        asked, last_BG = EscalationState(len(logits_BN)), options_BG.copy()
        for tau, target, mirror in self.escalations:
            able_B = self.route_costs.may_escalate(last_BG, target, mirror=mirror)
            members = asked.next(able_B, margins(logits_BN), tau).nonzero()[0]
            if len(members):
                yield Escalated(members, target, mirror)
                last_BG[members] = target

    def within(self, rows: int, allowance: float) -> HeldCall:
        """These for one call of so many rows, which together may cost an allowance (a share)."""
        assert self.held is not None
        widest = self.route_costs.table.widest_cost
        return HeldCall(self, rows, allowance * widest, self.held * widest)

    def results(self, routed: Routed) -> tuple[np.ndarray, ...]:
        """Logits (B, N), width indices (B, G) of the routes that gave them, multiply-adds (B,)
        float64, which rows escalated and which of these looked at their mirror image (B,) bool.
        """
        logits_BN, options_BG, passes = routed
        madds_B = self.route_costs.of_paths(options_BG)
        escalated_B, mirrored_B = np.zeros((2, len(madds_B)), bool)
        for rows in passes:
            escalated_B[rows.members] = True
            mirrored_B[rows.members] |= rows.mirror
            target = self.route_costs.target(rows.path)
            madds_B[rows.members] += target.cost if rows.mirror else target.more
            options_BG[rows.members] = rows.path
        widths_BG = np.empty_like(options_BG)
        for gate, widths_K in enumerate(self.route_costs.widths):
            widths_BG[:, gate] = widths_K.take(options_BG[:, gate])
        return logits_BN, widths_BG, madds_B, escalated_B, mirrored_B


def make_decisions(
    costs: RouteCosts,
    curve: BudgetCurve | None,
    *,
    mirror: bool,
    budget: Budget | None,
    shift: float | None,
    escalate: str | float | None,
    max_route: Route | str | Sequence[int] | None,
    hold: bool = False,
) -> Decisions:
    """From what a caller says; `mirror` is whether the network may be shown mirror images.

    Raises:
        UsageError: for a budget without a curve, a budget and a shift, an `escalate` that is no
            margin, a second look where it may not be, a cap below the cheapest route, or a budget
            to hold that none was given for or that is below the cheapest route.
    """
    check(budget is None or shift is None, "give a budget or a shift, not both")
    spec, point = costs.spec, None
    if isinstance(spec, CascadeSpec) and curve is not None and escalate == "auto":
        budget = CASCADE_BUDGET if budget is None and shift is None else budget
    if isinstance(budget, BudgetPoint):
        budget.check_fits(spec, mirror=mirror)
        point = budget
    elif budget is not None:
        if curve is None:
            raise UsageError(
                f"budget {budget!r}: the network has no budget curve; measure one with: "
                f"dynaslim calibrate-budget CHECKPOINT --data HELD_OUT"
            )
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
        # of a cascade every rung in turn
        targets = [(n + 1,) for n in range(*widest)] if isinstance(spec, CascadeSpec) else [widest]
        steps = tuple(Escalation(float(escalate), target) for target in targets)
    if limits is not None:
        steps = tuple(step._replace(target=tuple(map(min, step.target, limits))) for step in steps)
    shift = 0.0 if shift is None else shift
    # what is kept by its arguments must be told by them: no tensor, whose value may change
    check(
        isinstance(shift, Real) and bool(np.isfinite(shift)), f"shift {shift}: give a finite number"
    )
    held = _held(costs, curve, budget) if hold else None
    steps = tuple(step for step in steps if step.tau)  # no margin is below 0
    return Decisions(costs, float(shift), steps, limits, held)


def _held(costs: RouteCosts, curve: BudgetCurve | None, budget: Budget | None) -> float:
    """The mean cost that holds, as a share of the widest route's."""
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
    """The highest option of every gate whose width is at most the route's."""
    route = spec.coerce_route(max_route)
    limits = []
    for gate, most in zip(spec.gates, spec.segment_indices(route)[1:], strict=True):
        allowed = [n for n, c in enumerate(gate.choices) if c <= most or most == LARGEST]
        check(
            bool(allowed),
            f"max_route {route}: below the cheapest route of the gates, {spec.cheapest_choice}",
        )
        limits.append(allowed[-1])
    return tuple(limits)
