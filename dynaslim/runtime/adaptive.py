"""A budget that adapts to the load: levels along a network's curve, and control over them.

Nothing here starts a thread or reads a clock.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Final

from dynaslim.runtime.budget import MOST_SHARE, BudgetCurve, BudgetPoint

LEVELS: Final = 8
"""Largest number of levels of an adaptive budget."""
WINDOW: Final = 9
"""Batches over which the median throughput is taken."""
LEAST_BATCHES: Final = 3
"""Batches needed before the throughput is known: a single batch may have been delayed."""
SETTLE_S: Final = 0.1
"""Time after lowering the budget before it may be lowered again."""
CALM_S: Final = 2.0
"""Time almost without waiting after which the budget rises by one level."""
LONGEST_CALM_S: Final = 60.0
CALM_SHARE: Final = 0.25
"""Fraction of the target wait below which the load counts as calm."""
PANIC: Final = 3.0
"""Multiple of the target wait at which the budget drops to its lowest level at once."""


def share_text(point: BudgetPoint) -> str:
    """The smallest share, to four decimals, that affords the point."""
    return f"{min(MOST_SHARE, math.ceil(point.share * 1e4 - 1e-6) / 1e4):g}"


def levels(curve: BudgetCurve, low: float, high: float) -> list[str]:
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
    """Work (rows or multiply-adds) per second of busy time: the median over recent batches."""

    def __init__(self) -> None:
        self._seconds_per_row: deque[float] = deque(maxlen=WINDOW)
        self._median = 0.0

    def add(self, rows: float, seconds: float) -> None:
        """Record a batch."""
        self._seconds_per_row.append(seconds / rows)
        if len(self._seconds_per_row) >= LEAST_BATCHES:
            self._median = statistics.median(self._seconds_per_row)

    def seconds_for(self, rows: float) -> float:
        """Expected time for `rows` rows; 0 until there are enough batches."""
        return rows * self._median

    def rows_in(self, seconds: float, least: int, most: int) -> int:
        """Rows that fit in a time, within bounds; `most` until there are enough batches."""
        if seconds >= most * self._median:
            return most
        return max(least, int(seconds / self._median))


class BudgetControl:
    """Chooses a cost level such that the wait stays below a target.

    The level falls as soon as the wait is too long, and rises after a calm period. The period
    doubles whenever the wait becomes too long again soon after a rise, so that the level does not
    oscillate under a steady load that the higher level cannot handle.
    """

    def __init__(self, levels: int, target_s: float, now: float) -> None:
        assert levels >= 1
        self.level = levels - 1
        """Current level; 0 is the cheapest."""
        self._highest = levels - 1
        self._target_s = target_s
        self._calm_since = now
        self._calm_s = CALM_S
        self._lowered = -math.inf
        self._raised = -math.inf

    def observe(self, wait_s: float, now: float) -> int:
        """Update the level, given the expected wait of a row that arrives now; returns it."""
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
