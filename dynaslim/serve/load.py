"""What the load is, and the budget that it leaves: no threads and no clocks of their own here."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Final

REMEMBERED: Final = 9
"""Batches that throughput is judged by."""
KNOWN: Final = 3
"""Batches from which on it is: one alone may have been held up."""
SETTLE_S: Final = 0.1
"""Time that a lower level has to show what it does before the next."""
CALM_S: Final = 2.0
"""Time without waiting after which the budget rises by a level."""
LONGEST_CALM_S: Final = 60.0
CALM_SHARE: Final = 0.25
"""Part of the target wait below which it is calm."""
PANIC: Final = 3.0
"""Times the target wait at which the budget falls to its lowest at once."""


class Throughput:
    """Rows per second of busy time, of late; one batch that was held up does not count."""

    def __init__(self) -> None:
        self._seconds_per_row: deque[float] = deque(maxlen=REMEMBERED)
        self._median = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """A batch of so many rows took so long."""
        self._seconds_per_row.append(seconds / rows)
        if len(self._seconds_per_row) >= KNOWN:
            self._median = statistics.median(self._seconds_per_row)

    def seconds_for(self, rows: int) -> float:
        """How long so many rows take; 0 while that is not known."""
        return rows * self._median

    def rows_in(self, seconds: float, least: int, most: int) -> int:
        """How many rows that time is enough for, within bounds; the most while it is not known."""
        if seconds >= most * self._median:
            return most
        return max(least, int(seconds / self._median))


class BudgetControl:
    """Chooses among levels of cost so that the wait stays below a target.

    Too long a wait lowers the level at once. It rises when there was hardly any wait for a while.
    That while doubles each time the wait comes straight back, so that a steady load which a level
    cannot carry does not make it swing.
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
        """The level, now that a row that comes is expected to wait so long."""
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


def spread(costs: Sequence[float], most: int) -> list[int]:
    """Which of rising costs to keep so that at most so many are left, evenly by their ratio."""
    if len(costs) <= most:
        return list(range(len(costs)))
    logs = [math.log(cost) for cost in costs]
    wanted = [logs[0] + (logs[-1] - logs[0]) * n / (most - 1) for n in range(most)]
    return sorted({min(range(len(logs)), key=lambda k: abs(logs[k] - w)) for w in wanted})
