"""What a call's budget, escalation and cap ask of the router.

Suffixes: B rows, G gates, K options of a gate, N classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dynaslim.cost import CostTable
from dynaslim.errors import UsageError, check
from dynaslim.runtime import budget as budgets
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.router import Again
from dynaslim.spec import NetSpec, Route

Budget = float | str | BudgetPoint


@dataclass(frozen=True)
class Decisions:
    """How the rows of a call choose their routes."""

    spec: NetSpec
    size: tuple[int, int]
    shift: float
    tau: float | None
    """Rows of a smaller margin run once more; None lets none."""
    target: tuple[int, ...]
    """The option of every gate on the path that they then take."""
    limits: tuple[int, ...] | None
    """The highest option of every gate that is allowed."""

    @cached_property
    def _table(self) -> CostTable:
        return CostTable.from_madds(self.spec, self.size)

    @cached_property
    def _option_costs(self) -> tuple[np.ndarray, ...]:
        return budgets.option_costs(self._table)

    def decide(self, gate: int, logits_BK: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Options (B,) that the rows take; see `router.Decide`."""
        if not self.shift and self.limits is None:
            options: np.ndarray = logits_BK.argmax(1)
            return options
        limit = None if self.limits is None else self.limits[gate]
        return budgets.choose(logits_BK, self.shift, self._option_costs[gate], limit)

    @property
    def again(self) -> Callable[[np.ndarray, np.ndarray], Again] | None:
        """Which rows run once more; None if none can."""
        return None if self.tau is None else self._unsure

    def _unsure(self, logits_BN: np.ndarray, options_BG: np.ndarray) -> Again:
        assert self.tau is not None
        paths, which_B = np.unique(options_BG, axis=0, return_inverse=True)
        may = np.array(
            [budgets.may_escalate(self._table, path, self.target) for path in paths.tolist()]
        )
        below_B = budgets.margins(logits_BN) < self.tau
        return Again(np.flatnonzero(below_B & may[which_B.reshape(-1)]), self.target)

    def costs(self, options_BG: np.ndarray, first_BG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Multiply-adds of every row (B,) float64, and whether it ran twice (B,) bool."""
        madds_B = self._path_costs(first_BG)
        if first_BG is options_BG:
            return madds_B, np.zeros(len(madds_B), bool)
        again_B = (first_BG != options_BG).any(1)
        madds_B[again_B] += self._path_costs(options_BG[again_B]) - self._table.segments[0][0][0]
        return madds_B, again_B

    def _path_costs(self, options_BG: np.ndarray) -> np.ndarray:
        total_B = np.full(len(options_BG), self._table.segments[0][0][0])
        before_B = np.zeros(len(options_BG), np.int64)
        for segment, option_B in zip(self._table.segments[1:], options_BG.T, strict=True):
            total_B += np.array(segment)[before_B, option_B]
            before_B = option_B
        return total_B


def make_decisions(
    spec: NetSpec,
    size: tuple[int, int],
    curve: BudgetCurve | None,
    *,
    budget: Budget | None,
    shift: float | None,
    escalate: str | float | None,
    max_route: Route | Sequence[int] | None,
) -> Decisions:
    """From what a caller says.

    Raises:
        UsageError: for a budget without a curve, a budget and a shift, an `escalate` that is no
            margin, or a cap below the cheapest route.
    """
    check(budget is None or shift is None, "give a budget or a shift, not both")
    point = None
    if budget is not None:
        if curve is None and not isinstance(budget, BudgetPoint):
            raise UsageError(
                f"budget {budget!r}: the network has no budget curve; measure one with: "
                f"dynaslim calibrate-budget CHECKPOINT --data HELD_OUT"
            )
        asked = budget if curve is None else curve.at(budget, escalate=escalate == "auto")
        assert isinstance(asked, BudgetPoint)
        point, shift = asked, asked.shift
    limits = None if max_route is None else _limits(spec, max_route)
    target = tuple(len(gate.choices) - 1 for gate in spec.gates)
    tau: float | None = None
    if escalate == "auto":
        if point is not None and point.tau is not None and point.escalate_to is not None:
            tau, target = point.tau, point.escalate_to
    elif escalate is not None:
        check(
            isinstance(escalate, int | float) and 0 <= escalate <= 1,
            f"escalate {escalate!r}: give 'auto', None, or a margin from 0 to 1",
        )
        tau = float(escalate)
    if limits is not None:
        target = tuple(map(min, target, limits))
    shift = 0.0 if shift is None else float(shift)
    check(bool(np.isfinite(shift)), f"shift {shift}: must be finite")
    return Decisions(spec, size, shift, tau or None, target, limits)


def _limits(spec: NetSpec, max_route: Route | Sequence[int]) -> tuple[int, ...]:
    """The highest option of every gate whose width is at most the route's."""
    route = spec.coerce_route(max_route)
    widths = [route.widths[stage] for stage in spec.gated_stages]
    limits = []
    for stage, gate, most in zip(spec.gated_stages, spec.gates, widths, strict=True):
        allowed = [n for n, c in enumerate(gate.choices) if spec.stages[stage].widths[c] <= most]
        check(
            bool(allowed),
            f"max_route {route}: below the cheapest route of the gates, {spec.cheapest_choice}",
        )
        limits.append(allowed[-1])
    return tuple(limits)
