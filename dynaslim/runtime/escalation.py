"""Escalation: rows that are unsure of their answer get another one, along a wider path.

The *margin* of a row is how sure it is of its answer. A step of escalation sends rows of a margin
under *tau* on to a *target* path, from the trunk's features, which were kept; its answer replaces
the one before. A row that was sure enough for one step takes no further one. The last step may be a
*second look*: rows that stand on its target see their mirror image too, along the same path from
the first layer on, and both answers are averaged.

No torch here. A *path* is one option per gate: its position in `GateSpec.choices`.

Suffixes: B rows, G gates, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dynaslim.cost import CostTable

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Path = tuple[int, ...]


class Escalation(NamedTuple):
    """One step: rows of a margin under `tau`, if they can, go on along `target`."""

    tau: float
    target: Path
    mirror: bool = False
    """Whether it is a second look: of the mirror image, by rows whose last answer is `target`'s."""


def margins(logits_BN: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """Probability of the likeliest class minus that of the next (B,), in the type of the logits.

    In 0..1; 1 where there is a single class.
    """
    rows, classes = logits_BN.shape
    if classes == 1:
        return np.ones(rows, logits_BN.dtype)
    top_BN = np.partition(logits_BN, (classes - 2, classes - 1), axis=1)
    highest_B = top_BN[:, classes - 1]
    # relative to the highest, so that nothing overflows
    sum_B = np.exp(logits_BN - highest_B[:, None]).sum(1)
    return np.asarray(-np.expm1(top_BN[:, classes - 2] - highest_B) / sum_B, logits_BN.dtype)


def escalation_cost(table: CostTable, target: Sequence[int], *, mirror: bool = False) -> float:
    """What escalating a row adds to its cost: the target path without the trunk, which was kept.

    A second look costs the whole path: the mirror image has features of its own.
    """
    return table.route_cost(target) - (0.0 if mirror else table.segments[0][0][0])


def averaged(
    logits_BN: npt.NDArray[np.floating[Any]], other_BN: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[Any]:
    """Scores (B, N) whose softmax is the mean of the two answers' probabilities.

    As the views of an evaluation are averaged; the released code takes the mean of logits.
    """
    log_probs_BN, other_probs_BN = map(_log_softmax, (logits_BN, other_BN))
    mean_BN = np.logaddexp(log_probs_BN, other_probs_BN) - math.log(2)
    return np.asarray(mean_BN, logits_BN.dtype)


def probabilities(logits_BN: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """Softmax of every row (B, N), in the type of the logits."""
    powers_BN = np.exp(logits_BN - logits_BN.max(1, keepdims=True))
    return np.asarray(powers_BN / powers_BN.sum(1, keepdims=True))


def _log_softmax(logits_BN: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    shifted_BN = logits_BN - logits_BN.max(1, keepdims=True)
    return np.asarray(shifted_BN - np.log(np.exp(shifted_BN).sum(1, keepdims=True)))


class EscalationState:
    """Which rows may still escalate, step after step."""

    def __init__(self, rows: int) -> None:
        self._open_B: Bools = np.ones(rows, bool)

    def next(self, able_B: Bools, margin_B: npt.NDArray[Any], tau: float) -> Bools:
        """Which rows escalate (B,): of those open and able, the unsure. The sure are closed."""
        candidates_B = self._open_B & able_B
        escalated_B: Bools = candidates_B & (margin_B < tau)
        self._open_B &= escalated_B | ~candidates_B
        return escalated_B

    def close(self, members: Ints) -> None:
        """Rows that stay with the answer they have, though they are unsure."""
        self._open_B[members] = False
