"""Actual costs of images: compared with a budget's curve, or bounded by the budget (`hold`).

A curve's costs are means over the images it was measured on. `Spending` compares these with the
costs of the images that arrive. Calls that together must keep a budget share a `Ledger`. No torch
here.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable
from typing import Final

CLEAR: Final = 3.0
"""Number of standard errors above which a difference is not attributed to chance."""
LEAST_DIFFERENCE: Final = 0.1
"""Smallest difference that counts, as a fraction of the curve's cost."""
LEAST_SPREAD: Final = 1.0
"""Smallest standard deviation assumed between images, as a fraction of the curve's cost: a few
images that happen to cost the same prove little."""


class Spending:
    """The cost of images as a multiple of the curve's cost for their budgets."""

    def __init__(self, last: int | None = None) -> None:
        """Count all images, or only the `last` ones."""
        self.images = 0
        self._recent: deque[float] | None = None if last is None else deque(maxlen=last)
        self._sum = self._squares = 0.0

    def add(self, madds: Iterable[float], expected: float) -> None:
        """Count images, given the multiply-adds of each and the curve's mean for their budget."""
        for one in madds:
            ratio = one / expected
            if self._recent is not None:
                if len(self._recent) == self._recent.maxlen:
                    gone = self._recent[0]
                    self.images, self._sum = self.images - 1, self._sum - gone
                    self._squares -= gone * gone
                self._recent.append(ratio)
            self.images += 1
            self._sum += ratio
            self._squares += ratio * ratio

    @property
    def ratio(self) -> float:
        """The mean multiple; 1 if the curve is right, NaN before the first image."""
        return self._sum / self.images if self.images else math.nan

    @property
    def differs(self) -> bool:
        """Whether the images cost significantly more or less than those of the curve."""
        if not self.images:
            return False
        variance = max(0.0, self._squares / self.images - self.ratio**2)
        error = max(math.sqrt(variance), LEAST_SPREAD) / math.sqrt(self.images)
        return abs(self.ratio - 1) > max(CLEAR * error, LEAST_DIFFERENCE)


class Ledger:
    """Unspent part of a budget that several calls share; thread-safe.

    In units of the widest route's cost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0.0

    def reserve(self, rows: int, limit: float) -> float:
        """Add `limit` for each row, then take all that is left, so that no other call spends it."""
        with self._lock:
            allowance, self._left = self._left + rows * limit, 0.0
            return allowance

    def give_back(self, share: float) -> None:
        """Return what a call has not spent, or after an error what it took out."""
        with self._lock:
            self._left += share
