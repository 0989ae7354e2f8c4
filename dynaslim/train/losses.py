"""Losses: tensors in, tensors out. Suffixes: B rows, N classes, K choices of a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(logits_BN: Tensor, target_BN: Tensor) -> Tensor:
    """Mean cross-entropy against probabilities: -sum(target * log softmax(logits)), a scalar."""
    return F.cross_entropy(logits_BN, target_BN)


def ensemble_target(teacher_logits: Sequence[Tensor]) -> Tensor:
    """The mean of several predictions' probabilities (B, N): IEB's target for the smallest route.

    Source: arXiv 2103.13258, section 3.2.
    """
    return torch.stack([logits.softmax(1) for logits in teacher_logits]).mean(0)


def sgs_target(easy_B: Tensor, choices: int) -> Tensor:
    """Sandwich gate sparsification labels (B,): first choice if easy, else the last ("try best").

    An image is easy if the smallest route classifies it right (arXiv 2103.13258, section 3.3).
    """
    return torch.where(easy_B, 0, choices - 1)


def sgs_loss(
    gate_logits: Sequence[Tensor], easy_B: Tensor, *, easy_share: float | None = None
) -> Tensor:
    """Mean over gates of the cross-entropy of gate *logits* (B, K) against the SGS labels.

    The released code feeds probabilities to a cross-entropy that takes softmax again; ours does
    not. `easy_share` is the weight that easy images have together, whatever their number; None
    weighs every image the same, as in the paper.
    """
    weights_B = torch.full_like(gate_logits[0][:, 0], 1 / len(easy_B))
    if easy_share is not None and bool(easy_B.any()) and not bool(easy_B.all()):
        weights_B = torch.where(
            easy_B, easy_share / easy_B.sum(), (1 - easy_share) / (~easy_B).sum()
        ).to(weights_B.dtype)
    losses = [
        F.cross_entropy(g, sgs_target(easy_B, g.shape[1]), reduction="none") @ weights_B
        for g in gate_logits
    ]
    return torch.stack(losses).mean()


def cost_loss(cost_B: Tensor, scale: float) -> Tensor:
    """(mean cost / scale)², a scalar; cost and scale in the same unit (arXiv 2103.13258, eq. 9)."""
    return (cost_B.mean() / scale) ** 2
