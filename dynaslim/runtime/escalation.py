"""Escalation: rows whose answer is unsure are run again along a wider path.

The *margin* of a row measures how sure its answer is. A step of escalation runs rows with a margin
below *tau* along a *target* path, starting from the trunk's features, which were kept; the new
answer replaces the old one. Once a row's margin has passed a step, it takes no further step. The
last step may be a *second look*: for rows whose answer is from the target path, the mirror image is
run along the same path from the first layer on, and both answers are averaged.

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
    """One step: rows with a margin below `tau` continue along `target`, where that is possible."""

    tau: float
    target: Path
    mirror: bool = False
    """Whether the step is a second look: rows whose last answer is from `target` run mirrored."""


def margins(logits_BN: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """Probability of the likeliest class minus that of the next one (B,), in the logits' dtype.

    In 0..1; 1 if there is only one class.
    """
    rows, classes = logits_BN.shape
    if classes == 1:
        return np.ones(rows, logits_BN.dtype)
    top_BN = np.partition(logits_BN, (classes - 2, classes - 1), axis=1)
    highest_B = top_BN[:, classes - 1]
    # relative to the highest, to avoid overflow
    sum_B = np.exp(logits_BN - highest_B[:, None]).sum(1)
    return np.asarray(-np.expm1(top_BN[:, classes - 2] - highest_B) / sum_B, logits_BN.dtype)


def escalation_cost(table: CostTable, target: Sequence[int], *, mirror: bool = False) -> float:
    """Cost that escalation adds to a row: the target path without the trunk, which is not repeated.

    A second look costs the whole path, because the mirror image has different features.
    """
    return table.route_cost(target) - (0.0 if mirror else table.segments[0][0][0])


def averaged(
    logits_BN: npt.NDArray[np.floating[Any]], other_BN: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[Any]:
    """Scores (B, N) whose softmax is the mean of the two answers' probabilities.

    Evaluation averages views in the same way; the released code averages logits.
    """
    log_probs_BN, other_probs_BN = map(log_softmax, (logits_BN, other_BN))
    mean_BN = np.logaddexp(log_probs_BN, other_probs_BN) - math.log(2)
    return np.asarray(mean_BN, logits_BN.dtype)


def probabilities(logits_BN: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """Softmax of every row (B, N), in the logits' dtype."""
    powers_BN = np.exp(logits_BN - logits_BN.max(1, keepdims=True))
    return np.asarray(powers_BN / powers_BN.sum(1, keepdims=True))


def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """Log probabilities over the last axis, in the logits' dtype."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


class EscalationState:
    """Tracks, over the steps, which rows may still escalate."""

    def __init__(self, rows: int) -> None:
        self._open_B: Bools = np.ones(rows, bool)

    def next(self, able_B: Bools, margin_B: npt.NDArray[Any], tau: float) -> Bools:
        """Rows (B,) that escalate: open, able and unsure. Closes those that are able but sure."""
        candidates_B = self._open_B & able_B
        escalated_B: Bools = candidates_B & (margin_B < tau)
        self._open_B &= escalated_B | ~candidates_B
        return escalated_B

    def close(self, members: Ints) -> None:
        """Exclude rows from further steps; they keep their answers although these are unsure."""
        self._open_B[members] = False
