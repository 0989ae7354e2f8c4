"""What images really cost: beside what a budget's curve promises, and of a budget that holds.

A curve's costs are means over the images that it was measured on. `Spending` compares the images
that came with that; a `Ledger` is what calls that must keep a budget share. No torch here.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable
from typing import Final

CLEAR: Final = 3.0
"""Standard errors from which on a difference is not put down to chance."""
LEAST_DIFFERENCE: Final = 0.1
"""Of the curve's cost; smaller ones are no news."""
LEAST_SPREAD: Final = 1.0
"""Of the curve's cost, between single images: a few that happen to cost the same show little."""


class Spending:
    """The cost of images as a multiple of what the curve has for their budgets."""

    def __init__(self, last: int | None = None) -> None:
        """Count all images, or the `last` so many."""
        self.images = 0
        self._recent: deque[float] | None = None if last is None else deque(maxlen=last)
        self._sum = self._squares = 0.0

    def add(self, madds: Iterable[float], expected: float) -> None:
        """Count images: what each cost, and the curve's mean for their budget."""
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
        """The mean, 1 for what the curve promises; NaN before the first image."""
        return self._sum / self.images if self.images else math.nan

    @property
    def differs(self) -> bool:
        """Whether the images cost clearly more or less than those of the curve."""
        if not self.images:
            return False
        variance = max(0.0, self._squares / self.images - self.ratio**2)
        error = max(math.sqrt(variance), LEAST_SPREAD) / math.sqrt(self.images)
        return abs(self.ratio - 1) > max(CLEAR * error, LEAST_DIFFERENCE)


class Ledger:
    """What is left of a budget that holds, over the calls that share it; for several threads.

    In shares of the widest route's cost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0.0

    def reserve(self, rows: int, limit: float) -> float:
        """Add what so many rows may cost, and take all that is left: others must not spend it."""
        with self._lock:
            allowance, self._left = self._left + rows * limit, 0.0
            return allowance

    def give_back(self, share: float) -> None:
        """What a call has not spent; where it failed, all of what it was given."""
        with self._lock:
            self._left += share
