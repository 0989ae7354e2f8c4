"""How likely an answer is to be right, judged by the answers of several routes together.

Settings of a budget are compared by how many images they get right. Counted on a few hundred
images, that number is mostly chance: two settings differ in a few images whose labels decide.
`OpinionPool` replaces each count of 0 or 1 by a probability. It is that of a logarithmic opinion
pool (Genest and Zidek 1986; Heskes 1998): the log probabilities of all members are added with
weights, which are fitted to the labels. Only these few weights depend on the labels.

Suffixes: B rows of a batch, N images, A answers, M members, C classes, K candidates, D weights.
The candidates of an image are the classes of its answers, and one for all other classes.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from dynaslim.runtime.escalation import Bools, Floats, Ints, log_softmax

LEAST: Final = 1e-9
"""Least probability that a member gives to all classes that are no answer."""
RIDGE: Final = 1.0
"""Pull of the weights towards a plain mean, for members that never err; it is weak from a few
hundred images on. Where probabilities hardly differ between images, so that weights must be large,
it is less."""
LEAST_RIDGE: Final = 1e-6
ROWS: Final = 4096
"""Images that are summed at once, which bounds the memory."""
STEPS: Final = 50
"""Newton steps at most; fewer than ten are usual."""


class OpinionPool:
    """Collects the answers for labelled images, batch by batch."""

    def __init__(self) -> None:
        self._features: list[npt.NDArray[np.float32]] = []
        self._candidates: list[Ints] = []
        self._labels: list[Ints] = []

    def add(self, classes_BA: Ints, logits_MBC: npt.NDArray[np.floating], labels_B: Ints) -> None:
        """Add a batch: the classes that were answered, the members' logits, and the labels."""
        logs_MBC = log_softmax(logits_MBC.astype(np.float64))
        # the first of the answers with the same class
        candidate_BA = (classes_BA[:, :, None] == classes_BA[:, None, :]).argmax(2)
        first_BA = candidate_BA == np.arange(classes_BA.shape[1])
        logs_MBA = np.take_along_axis(logs_MBC, classes_BA[None], 2)
        rest_MB = 1 - (np.exp(logs_MBA) * first_BA).sum(2)
        logs_MBK = np.dstack([logs_MBA, np.log(np.maximum(rest_MB, LEAST))])
        right_BA = classes_BA == labels_B[:, None]
        last = classes_BA.shape[1]
        self._features.append(np.moveaxis(logs_MBK, 0, 2).astype(np.float32))
        self._candidates.append(candidate_BA)
        self._labels.append(np.where(right_BA.any(1), right_BA.argmax(1), last))

    def probabilities(self) -> Floats:
        """The probability (N, A) that each answer is right."""
        features_NKM = np.concatenate(self._features)
        candidate_NA = np.concatenate(self._candidates)
        label_N = np.concatenate(self._labels)
        members = features_NKM.shape[2]
        # a constant for the other classes, since members may be too sure of their answers
        prior_D = weight_D = np.append(np.full(members, 1 / members), 0.0)
        spread = float(features_NKM[:, 0].astype(np.float64).var(0).mean())
        ridge = RIDGE * min(1.0, max(spread, LEAST_RIDGE))
        parts = [
            _Part(
                features_NKM[at : at + ROWS], candidate_NA[at : at + ROWS], label_N[at : at + ROWS]
            )
            for at in range(0, len(label_N), ROWS)
        ]

        def loss(weight_D: Floats) -> float:
            pull = ridge / 2 * float(np.square(weight_D - prior_D).sum())
            return pull + sum(part.loss(weight_D) for part in parts)

        least = loss(weight_D)
        for _ in range(STEPS):
            sums = [part.derivatives(weight_D) for part in parts]
            slope_D = sum(slope for slope, _ in sums) + ridge * (weight_D - prior_D)
            step_D = np.linalg.solve(
                sum(curvature for _, curvature in sums) + ridge * np.eye(members + 1), slope_D
            )
            # the loss is convex, so a short enough step lowers it
            while (found := loss(weight_D - step_D)) > least and np.abs(step_D).max() > 1e-9:
                step_D = step_D / 2
            if least - found < 1e-6:
                break
            weight_D, least = weight_D - step_D, found
        return np.concatenate([part.probabilities(weight_D) for part in parts])


class _Part:
    """Some of the images."""

    def __init__(
        self, features_NKM: npt.NDArray[np.float32], candidate_NA: Ints, label_N: Ints
    ) -> None:
        count, candidates, _ = features_NKM.shape
        other_NK1 = np.zeros((count, candidates, 1))
        other_NK1[:, -1] = 1
        self.features_NKD: Floats = np.concatenate([features_NKM, other_NK1], 2)
        self.candidate_NA, self.label_N = candidate_NA, label_N
        repeated_NA = candidate_NA != np.arange(candidates - 1)
        self.repeated_NK: Bools = np.pad(repeated_NA, ((0, 0), (0, 1)))

    def _logs(self, weight_D: Floats) -> Floats:
        """Log probabilities (N, K) of the candidates."""
        return log_softmax(np.where(self.repeated_NK, -math.inf, self.features_NKD @ weight_D))

    def loss(self, weight_D: Floats) -> float:
        """Sum of cross-entropies in nats."""
        return -float(np.take_along_axis(self._logs(weight_D), self.label_N[:, None], 1).sum())

    def derivatives(self, weight_D: Floats) -> tuple[Floats, Floats]:
        """The first (D,) and second (D, D) derivatives of the loss."""
        shares_NK = np.exp(self._logs(weight_D))
        mean_ND = np.einsum("nk,nkd->nd", shares_NK, self.features_NKD)
        label_N11 = self.label_N[:, None, None]
        label_ND = np.take_along_axis(self.features_NKD, label_N11, 1)[:, 0]
        away_NKD = self.features_NKD - mean_ND[:, None]
        weighted_NKD = away_NKD * shares_NK[:, :, None]
        curvature_DD = np.tensordot(weighted_NKD, away_NKD, ((0, 1), (0, 1)))
        return (mean_ND - label_ND).sum(0), curvature_DD

    def probabilities(self, weight_D: Floats) -> Floats:
        """The probability (N, A) of each answer."""
        return np.take_along_axis(np.exp(self._logs(weight_D)), self.candidate_NA, 1)
