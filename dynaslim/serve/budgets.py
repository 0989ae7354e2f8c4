"""The budget that a row runs with: its request's, the server's, or a cheaper one under load.

Nothing here has a thread or a clock of its own.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from dynaslim.errors import UsageError, check
from dynaslim.runtime.budget import MOST_SHARE, ROUNDING, BudgetCurve, BudgetPoint
from dynaslim.serve.options import ServeOptions

LEVELS: Final = 8
"""Largest number of levels of an adaptive budget."""
WINDOW: Final = 9
"""Batches that the throughput is the median of."""
LEAST_BATCHES: Final = 3
"""Batches that the throughput needs: a single one may have been held up."""
SETTLE_S: Final = 0.1
"""Time after lowering the budget before it may be lowered again."""
CALM_S: Final = 2.0
"""Time almost without waiting after which the budget rises by a level."""
LONGEST_CALM_S: Final = 60.0
CALM_SHARE: Final = 0.25
"""Part of the target wait below which the load counts as calm."""
PANIC: Final = 3.0
"""Multiple of the target wait at which the budget drops to its lowest level at once."""

Escalate = str | float | None


class Setting(NamedTuple):
    """How the engine runs a request's rows; rows with the same setting can share a batch."""

    point: BudgetPoint | None = None
    """None: as trained."""
    escalate: Escalate = "auto"
    asked: str | None = None
    """The budget as the request, or else the server, named it."""
    used: str | None = None
    """The budget that `point` was looked up for."""
    hold: bool = False
    """Whether the mean cost of all images with this budget is kept below it."""

    def runs_as(self, other: Setting) -> bool:
        """Whether rows of both can share a batch."""
        budget = (self.used, other.used) if self.hold else (self.point, other.point)
        return budget[0] == budget[1] and self.escalate == other.escalate


class Budgets:
    """The budgets of a network, fixed or adaptive."""

    def __init__(self, curve: BudgetCurve | None, options: ServeOptions, now: float) -> None:
        """Check the options against the curve.

        Raises:
            UsageError: for a budget, fixed or adaptive, without a budget curve, or for a range that
                holds fewer than two points of the curve.
        """
        self._curve = curve
        self._default = options.budget
        self._hold = options.hold
        self._levels: list[str] = []
        self._control: BudgetControl | None = None
        if options.adaptive_budget is not None:
            check(
                curve is not None,
                f"--adaptive-budget {options.adaptive_budget}: the network has no budget curve; "
                f"measure one with: dynaslim calibrate-budget CHECKPOINT --data HELD_OUT",
            )
            assert curve is not None
            self._levels = _levels(curve, *options.adaptive_range())
            check(
                len(self._levels) > 1,
                f"--adaptive-budget {options.adaptive_budget}: the budget curve has no two points "
                f"in that range; its cheapest is {curve.points[0].share:.4g}",
            )
            self._default = self._levels[-1]
            self._control = BudgetControl(len(self._levels), options.adaptive_wait_ms / 1000, now)
        self.setting(None, "auto")

    def setting(self, budget: str | None, escalate: Escalate) -> Setting:
        """The setting of a request; raises `UsageError` if the network cannot run with it."""
        check(
            escalate in ("auto", None)
            or (isinstance(escalate, int | float) and 0 <= escalate <= 1),
            f"escalate {escalate!r}: give auto, never, or a margin from 0 to 1",
        )
        asked = self._default if budget is None else budget
        if asked is None:
            return Setting(None, escalate)
        if self._curve is None:
            raise UsageError(
                f"budget {asked!r}: the network has no budget curve; measure one with: "
                f"dynaslim calibrate-budget CHECKPOINT --data HELD_OUT"
            )
        point = self._curve.at(asked, escalate=escalate == "auto")
        lowest = self._curve.points[0].share
        check(
            not self._hold or self._curve.share_of(asked) >= lowest * (1 - ROUNDING),
            f"budget {asked}: cannot hold, as every image costs at least {lowest:.3g} of the "
            f"widest route's multiply-adds",
        )
        return Setting(point, escalate, asked, asked, self._hold)

    def observe(self, wait_s: float, now: float) -> None:
        """Adapt to the expected wait of a row that comes now."""
        if self._control is not None:
            self._control.observe(wait_s, now)

    def in_use(self, setting: Setting) -> Setting:
        """The setting at the present load: the cheaper of its own budget and the level's."""
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
        """The setting of a request that names no budget."""
        return self.in_use(self.setting(None, "auto"))


def share_text(point: BudgetPoint) -> str:
    """The smallest share, to four decimals, that affords the point."""
    return f"{min(MOST_SHARE, math.ceil(point.share * 1e4 - 1e-6) / 1e4):g}"


def _levels(curve: BudgetCurve, low: float, high: float) -> list[str]:
    """Shares that afford points of the curve within a range, the cheapest first."""
    cheapest, dearest = curve.at(low), curve.at(high)
    points = [p for p in curve.points if cheapest.madds <= p.madds <= dearest.madds]
    kept = spread([p.madds for p in points], LEVELS)
    return [share_text(points[k]) for k in kept[:-1]] + [f"{high:.10g}"] if points else []


def spread(costs: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` of rising costs, spaced as evenly as possible by their ratio."""
    if len(costs) <= most:
        return list(range(len(costs)))
    logs = [math.log(cost) for cost in costs]
    wanted = [logs[0] + (logs[-1] - logs[0]) * n / (most - 1) for n in range(most)]
    return sorted({min(range(len(logs)), key=lambda k: abs(logs[k] - w)) for w in wanted})


class Throughput:
    """Rows per second of busy time, the median of recent batches."""

    def __init__(self) -> None:
        self._seconds_per_row: deque[float] = deque(maxlen=WINDOW)
        self._median = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """Record a batch."""
        self._seconds_per_row.append(seconds / rows)
        if len(self._seconds_per_row) >= LEAST_BATCHES:
            self._median = statistics.median(self._seconds_per_row)

    def seconds_for(self, rows: int) -> float:
        """Expected time of so many rows; 0 until there are enough batches."""
        return rows * self._median

    def rows_in(self, seconds: float, least: int, most: int) -> int:
        """Rows that fit in a time, within bounds; `most` until there are enough batches."""
        if seconds >= most * self._median:
            return most
        return max(least, int(seconds / self._median))


class BudgetControl:
    """Chooses among levels of cost so that the wait stays below a target.

    The level falls as soon as the wait is too long, and rises after a calm period. The period
    doubles each time the wait comes straight back, so that the level does not oscillate under a
    steady load that it cannot carry.
    """

    def __init__(self, levels: int, target_s: float, now: float) -> None:
        assert levels >= 1
        self.level = levels - 1
        """From 0, the cheapest."""
        self._highest = levels - 1
        self._target_s = target_s
        self._calm_since = now
        self._calm_s = CALM_S
        self._lowered = -math.inf
        self._raised = -math.inf

    def observe(self, wait_s: float, now: float) -> int:
        """The level for an expected wait of a row that comes now."""
        if wait_s > self._target_s:
            self._calm_since = now
            if self.level and now - self._lowered >= SETTLE_S:
                if now - self._raised < self._calm_s:
                    self._calm_s = min(2 * self._calm_s, LONGEST_CALM_S)
                self.level = 0 if wait_s > PANIC * self._target_s else self.level - 1
                self._lowered = now
                self._raised = -math.inf
        elif wait_s > CALM_SHARE * self._target_s:
            self._calm_since = now
        else:
            while self.level < self._highest and now - self._calm_since >= self._calm_s:
                self._calm_since += self._calm_s
                self.level += 1
                self._raised = self._calm_since
            if self.level == self._highest and now - self._calm_since >= self._calm_s:
                self._calm_s = max(CALM_S, self._calm_s / 2)
                self._calm_since = now
        return self.level
