"""Losses as functions of tensors. Suffixes: B rows, N classes, K choices of a gate."""

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
    """The loss of one route of the supernet, a scalar.

    `soft_weight` times the cross-entropy against a teacher's probabilities `soft_BN`, plus
    `label_weight` times that against smoothed labels, classes (B,) or probabilities (B, N). With
    `soft_BN` None it is the cross-entropy against the labels, at weight 1.
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
    """The mean probabilities (B, N) of several predictions: the target of the smallest route in
    in-place ensemble bootstrapping (IEB).

    Source: arXiv 2103.13258, section 3.2.
    """
    return torch.stack([logits.softmax(1) for logits in teacher_logits]).mean(0)


def sgs_target(easy_B: Tensor, choices: int, hopeless_B: Tensor | None = None) -> Tensor:
    """Sandwich gate sparsification labels (B,): first choice if easy, else the last ("try best").

    An image is easy if the smallest route classifies it correctly (arXiv 2103.13258, section 3.3).
    If `hopeless_B` is given, the images that even the widest route gets wrong also get the first
    choice ("give up").
    """
    return torch.where(labelled_first(easy_B, hopeless_B), 0, choices - 1)


def labelled_first(easy_B: Tensor, hopeless_B: Tensor | None) -> Tensor:
    """Mask (B,) of the images that are labelled with the first choice: see `sgs_target`."""
    return easy_B if hopeless_B is None else easy_B | hopeless_B


def sgs_weights(
    easy_B: Tensor,
    easy_share: float | None,
    hopeless_B: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Weights (B,) of the images in the SGS loss; they sum to 1.

    `easy_share` is the total weight of the images labelled with the first choice, whatever their
    number. None weights every image equally, as in the paper. For a batch in several parts,
    `counts` (2,) holds the numbers of images so labelled and of the others, as means over the
    parts; by default the rows themselves are counted.
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

    The released code passes probabilities to a cross-entropy that applies softmax again; this one
    does not. See `sgs_target` for `hopeless_B`, and `sgs_weights` for `easy_share` and `counts`.
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
