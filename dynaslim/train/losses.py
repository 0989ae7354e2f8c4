"""Losses: tensors in, tensors out. Suffixes: B rows, N classes, K choices of a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def supernet_loss(
    logits: Tensor,
    soft_BN: Tensor | None,
    *,
    labels: Tensor,
    soft_weight: float,
    label_weight: float,
    label_smoothing: float,
) -> Tensor:
    """What a route of the supernet minimises, a scalar.

    Cross-entropy against a teacher's probabilities times `soft_weight`, plus that against smoothed
    labels, classes (B,) or probabilities (B, N), times `label_weight`; without probabilities the
    labels' alone.
    """
    logits_BN = logits.float()
    if soft_BN is None:
        return F.cross_entropy(logits_BN, labels, label_smoothing=label_smoothing)
    loss = soft_weight * F.cross_entropy(logits_BN, soft_BN)
    if label_weight == 0:
        return loss
    hard = F.cross_entropy(logits_BN, labels, label_smoothing=label_smoothing)
    return loss + label_weight * hard


def ensemble_target(teacher_logits: Sequence[Tensor]) -> Tensor:
    """The mean of several predictions' probabilities (B, N): IEB's target for the smallest route.

    Source: arXiv 2103.13258, section 3.2.
    """
    return torch.stack([logits.softmax(1) for logits in teacher_logits]).mean(0)


def sgs_target(easy_B: Tensor, choices: int, hopeless_B: Tensor | None = None) -> Tensor:
    """Sandwich gate sparsification labels (B,): first choice if easy, else the last ("try best").

    An image is easy if the smallest route classifies it right (arXiv 2103.13258, section 3.3).
    Hopeless ones, which even the widest route gets wrong, take the first choice too where they are
    given ("give up").
    """
    return torch.where(labelled_first(easy_B, hopeless_B), 0, choices - 1)


def labelled_first(easy_B: Tensor, hopeless_B: Tensor | None) -> Tensor:
    """Which images (B,) are labelled with the first choice: see `sgs_target`."""
    return easy_B if hopeless_B is None else easy_B | hopeless_B


def sgs_weights(
    easy_B: Tensor,
    easy_share: float | None,
    hopeless_B: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Weight of every image (B,) in the SGS loss, together 1.

    `easy_share` is the weight that the images with the first choice as label have together,
    whatever their number; None weighs every image the same, as in the paper. `counts` (2,) are
    the numbers of images so labelled and of the others where they are not those of these rows
    alone: means over the parts of a batch.
    """
    first_B = labelled_first(easy_B, hopeless_B)
    first, others = (first_B.sum(), (~first_B).sum()) if counts is None else counts
    if easy_share is None or not bool(first) or not bool(others):
        return torch.full_like(easy_B, 1 / len(easy_B), dtype=torch.float32)
    return torch.where(first_B, easy_share / first, (1 - easy_share) / others)


def sgs_loss(
    gate_logits: Sequence[Tensor],
    easy_B: Tensor,
    *,
    easy_share: float | None = None,
    hopeless_B: Tensor | None = None,
    counts: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean over gates of the cross-entropy of gate *logits* (B, K) against the SGS labels.

    The released code feeds probabilities to a cross-entropy that takes softmax again; ours does
    not. See `sgs_target` for `hopeless_B` and `sgs_weights` for the others.
    """
    weights_B = sgs_weights(easy_B, easy_share, hopeless_B, counts).to(gate_logits[0].dtype)
    losses = [
        F.cross_entropy(
            g,
            sgs_target(easy_B, g.shape[1], hopeless_B),
            reduction="none",
            label_smoothing=label_smoothing,
        )
        @ weights_B
        for g in gate_logits
    ]
    return torch.stack(losses).mean()


def cost_loss(cost_B: Tensor, scale: float) -> Tensor:
    """(mean cost / scale)², a scalar; cost and scale in the same unit (arXiv 2103.13258, eq. 9)."""
    return (cost_B.mean() / scale) ** 2
