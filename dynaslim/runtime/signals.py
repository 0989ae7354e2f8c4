"""How well confidence signals rank a network's errors, by risk-coverage curves.

Suffixes: B rows of a batch, N images (for logits: classes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dynaslim.runtime.escalation import Bools, Ints, margins, probabilities

Sureness = npt.NDArray[np.float64]


def aurc(sure_N: npt.NDArray[Any], right_N: Bools) -> float:
    """Area under the risk-coverage curve, 0..1: the lower, the better a signal ranks errors.

    The mean over k of the error rate of the k surest images (Geifman et al., arXiv 1805.08206).
    The errors of equally sure images are shared evenly among them.
    """
    _, place_N, count = np.unique(-sure_N, return_inverse=True, return_counts=True)
    wrong = np.bincount(place_N, ~right_N) / count
    wrong_N = np.repeat(wrong, count)
    answered_N = np.arange(1, len(wrong_N) + 1)
    return float((wrong_N.cumsum() / answered_N).mean())


def _entropy(logits_BN: npt.NDArray[np.float32]) -> Sureness:
    p_BN = probabilities(logits_BN.astype(np.float64))
    found: Sureness = (p_BN * np.log(np.maximum(p_BN, 1e-300))).sum(1)
    return found


SIGNALS: Final[Mapping[str, Callable[[npt.NDArray[np.float32]], Sureness]]] = {
    "margin": lambda logits_BN: margins(logits_BN).astype(np.float64),
    "probability": lambda logits_BN: probabilities(logits_BN.astype(np.float64)).max(1),
    "entropy": _entropy,
}
"""Signal name -> function from logits (B, N) to how sure each row is (B,)."""
AGREEMENT: Final = "agreement"
"""The margin, plus 1 for rows that the previous rung gave the same class."""


class SignalTable:
    """Collects the answers of rungs, to tabulate how well each signal ranks their errors."""

    def __init__(self, rungs: int) -> None:
        self._sure: list[list[dict[str, Sureness]]] = [[] for _ in range(rungs)]
        self._picked: list[list[Ints]] = [[] for _ in range(rungs)]
        self._right: list[list[Bools]] = [[] for _ in range(rungs)]

    def add(self, rung: int, logits_BN: npt.NDArray[np.float32], labels_B: Ints) -> None:
        """Add the answers of one rung for a batch."""
        picked_B = logits_BN.argmax(1)
        self._sure[rung].append({name: of(logits_BN) for name, of in SIGNALS.items()})
        self._picked[rung].append(picked_B)
        self._right[rung].append(picked_B == labels_B)

    def rows(self) -> list[dict[str, float]]:
        """For every rung, its error rate and the `aurc` of each signal."""
        found, before_N = [], None
        for sure, picked, right in zip(self._sure, self._picked, self._right, strict=True):
            right_N, picked_N = np.concatenate(right), np.concatenate(picked)
            row = {"errors": float(1 - right_N.mean())}
            sure_N = {name: np.concatenate([one[name] for one in sure]) for name in SIGNALS}
            if before_N is not None:
                sure_N[AGREEMENT] = sure_N["margin"] + (picked_N == before_N)
            row |= {name: aurc(values_N, right_N) for name, values_N in sure_N.items()}
            found.append(row)
            before_N = picked_N
        return found
