"""Selects the budget of a row: its request's, the server's, or a cheaper one under load.

This module starts no threads and reads no clock; callers pass the time.
"""

from __future__ import annotations

from typing import NamedTuple

from dynaslim.errors import check
from dynaslim.runtime.adaptive import BudgetControl, levels
from dynaslim.runtime.budget import ROUNDING, BudgetCurve, BudgetPoint, needed_curve
from dynaslim.runtime.engine import Escalate
from dynaslim.serve.options import ServeOptions


class Setting(NamedTuple):
    """How the engine runs a request's rows; rows with the same setting can share a batch."""

    point: BudgetPoint | None = None
    """The budget's point on the curve; None to run the gates as trained."""
    escalate: Escalate = "auto"
    requested: str | None = None
    """The budget as given by the request, or else by the server's options."""
    used: str | None = None
    """The budget that `point` was looked up for."""
    hold: bool = False
    """Whether the mean cost of all images with this budget is kept below the budget."""

    def runs_as(self, other: Setting) -> bool:
        """Whether rows of both can share a batch."""
        budget = (self.used, other.used) if self.hold else (self.point, other.point)
        return budget[0] == budget[1] and self.escalate == other.escalate


class Budgets:
    """Selects the settings of a network's requests, with a fixed or an adaptive budget."""

    def __init__(self, curve: BudgetCurve | None, options: ServeOptions, now: float) -> None:
        """Raises `UsageError` if the network cannot run with the options' budget, or if an adaptive
        range holds fewer than two points of the curve.
        """
        self._curve = curve
        self._default = options.budget
        self._hold = options.hold
        self._levels: list[str] = []
        self._control: BudgetControl | None = None
        if options.adaptive_budget is not None:
            curve = needed_curve(curve, f"--adaptive-budget {options.adaptive_budget}")
            self._levels = levels(curve, *options.adaptive_range())
            check(
                len(self._levels) > 1,
                f"--adaptive-budget {options.adaptive_budget}: the budget curve has no two points "
                f"in that range; its cheapest is {curve.points[0].share:.4g}",
            )
            self._default = self._levels[-1]
            self._control = BudgetControl(len(self._levels), options.adaptive_wait_ms / 1000, now)
        self.parse(None, "auto")

    def parse(self, budget: str | None, escalate: Escalate) -> Setting:
        """The setting of a request; raises `UsageError` if the network cannot run with it."""
        check(
            escalate in ("auto", None)
            or (isinstance(escalate, int | float) and 0 <= escalate <= 1),
            f"escalate {escalate!r}: give auto, never, or a margin from 0 to 1",
        )
        requested = self._default if budget is None else budget
        if requested is None:
            return Setting(None, escalate)
        curve = needed_curve(self._curve, f"budget {requested!r}")
        point = curve.at(requested, escalate=escalate == "auto")
        lowest = curve.points[0].share
        check(
            not self._hold or curve.share_of(requested) >= lowest * (1 - ROUNDING),
            f"budget {requested}: cannot hold, as every image costs at least {lowest:.3g} of the "
            f"widest route's multiply-adds",
        )
        return Setting(point, escalate, requested, requested, self._hold)

    def observe(self, wait_s: float, now: float) -> None:
        """Adapt the budget to the expected wait of a row that arrives now."""
        if self._control is not None:
            self._control.observe(wait_s, now)

    def limited_by_load(self, setting: Setting) -> Setting:
        """The setting at the present load, with the cheaper of its budget and the current level."""
        if self._control is None or self._curve is None or setting.point is None:
            return setting
        level = self._levels[self._control.level]
        if level == setting.used:
            return setting
        point = self._curve.at(level, escalate=setting.escalate == "auto")
        if point.madds >= setting.point.madds:
            return setting
        return setting._replace(point=point, used=level)

    @property
    def current(self) -> Setting:
        """The setting of a request without a budget, at the present load."""
        return self.limited_by_load(self.parse(None, "auto"))
