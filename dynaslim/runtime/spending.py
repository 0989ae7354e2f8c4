"""What images really cost beside what a budget's curve promises, and budgets that hold.

A curve's costs are means over the images that it was measured on. `Spending` says how far the
images that came are from that; `Ledger` and `HeldCall` keep their mean under a budget whatever
they are, by letting fewer rows have more than the cheapest route.

No torch here. Suffixes: B rows, G gates, K options of a gate, N classes.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from dynaslim.runtime.budget import choose
from dynaslim.runtime.escalation import Ints
from dynaslim.runtime.router import WhoEscalates

if TYPE_CHECKING:
    from dynaslim.runtime.decisions import Decisions

CLEAR: Final = 3.0
"""Standard errors from which on a difference is not put down to chance."""
LEAST_DIFFERENCE: Final = 0.1
"""Of the curve's cost; smaller ones are no news."""
LEAST_SPREAD: Final = 1.0
"""Of the curve's cost, between single images: a few that happen to cost the same show little."""
SAVED: Final = 16
"""Images of which smaller calls have to save the budget up before thresholds are the curve's."""
_HALVINGS: Final = 40


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


class HeldCall:
    """The decisions of one call whose rows together may cost no more than an allowance.

    Every row may take the cheapest route. Where the gates want more than is left, they are shifted
    towards cheaper options until it suffices; where more rows are unsure than can be afforded,
    those of the smallest margins escalate. A call of a few rows cannot choose among them: there,
    the less is saved up, the smaller a margin has to be.
    """

    def __init__(self, decisions: Decisions, rows: int, allowance: float, limit: float) -> None:
        """`allowance` and `limit`, of all rows and of one, in multiply-adds."""
        costs = decisions.costs
        self._decisions = decisions
        self._more = costs.more
        self._options = costs.options
        self._before_B = np.zeros(rows, np.int64)
        self._savings = max(0, SAVED - rows) * (limit - costs.cheapest)
        self._left = allowance - rows * costs.cheapest

    def decide(self, gate: int, logits_BK: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Options (B,) that the rows take; see `router.Decide`."""
        decisions = self._decisions
        limit = None if decisions.limits is None else decisions.limits[gate]
        more_BK = self._more[gate][self._before_B[rows]]
        each = np.arange(len(rows))
        option_B = decisions.decide(gate, logits_BK, rows)
        if more_BK[each, option_B].sum() > self._left:
            dear, cheap, step = decisions.shift, decisions.shift, 1.0
            for _ in range(_HALVINGS):  # shifts that are dear enough are reached by doubling
                cheap, step = cheap + step, 2 * step
                option_B = choose(logits_BK, cheap, self._options[gate], limit)
                if more_BK[each, option_B].sum() <= self._left:
                    break
            else:
                option_B = np.zeros(len(rows), np.int64)
            for _ in range(_HALVINGS):
                middle = (dear + cheap) / 2
                tried_B = choose(logits_BK, middle, self._options[gate], limit)
                if more_BK[each, tried_B].sum() <= self._left:
                    cheap, option_B = middle, tried_B
                else:
                    dear = middle
        self._before_B[rows] = option_B
        self._left -= float(more_BK[each, option_B].sum())
        return option_B

    @property
    def escalate(self) -> WhoEscalates | None:
        """Which rows escalate; None if none can."""
        return partial(self._decisions.unsure, call=self) if self._decisions.escalations else None

    @property
    def ease(self) -> float:
        """Part of a threshold that holds: the less is saved up, the smaller."""
        return min(1.0, max(0.0, self._left) / self._savings) if self._savings else 1.0

    def afforded(self, members: Ints, margin_B: np.ndarray, number: int) -> Ints:
        """The rows of the smallest margins that a step of escalation can pay for; pays for them.

        Every step may spend an equal part of what is left, the last all of it: cheap first steps
        are not to use up what the dear ones need.
        """
        steps, left = self._decisions.escalations, max(0.0, self._left)  # rounding may overdraw
        step = steps[number]
        target = self._decisions.costs.target(step.target)
        more = target.cost if step.mirror else target.more
        count = int(left / (len(steps) - number) / more)
        if count < len(members):
            members = np.sort(members[margin_B[members].argsort(kind="stable")[:count]])
        self._left -= len(members) * more
        return members
