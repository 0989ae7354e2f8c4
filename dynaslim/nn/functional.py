"""Sliceable operations as pure functions: the active width is an argument, never state.

Shape suffixes: B rows, C channels in use, H W pixels, K choices of a gate,
M channels of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SoftWidth(NamedTuple):
    """A width per row, chosen by a gate: `gate_BK` is one-hot (or soft) over the BN `slots`.

    Layers run at the widest choice; the BN after them zeroes the channels that a row does not use.
    """

    gate_BK: Tensor
    slots: tuple[int, ...]


AnyWidth = int | SoftWidth
"""The width at which a layer runs, as a BN slot: one for the whole batch, or one per row."""


def gated_batch_norm(
    x_BCHW: Tensor,
    mean_KM: Tensor,
    var_KM: Tensor,
    weight_M: Tensor,
    bias_M: Tensor,
    gate_BK: Tensor,
    ends: Sequence[int],
    *,
    eps: float,
) -> Tensor:
    """Normalise every row with the running statistics of the width that its gate chose.

    `ends` is the number of channels of each choice. Scale and shift are zero beyond it, so they are
    also the mask: with one-hot gates each row equals the output of the sliced network, and
    the gradient of a choice is the difference that the choice would make.
    """
    channels = x_BCHW.shape[1]
    scale_KC = weight_M[:channels] * torch.rsqrt(var_KM[:, :channels] + eps)
    shift_KC = bias_M[:channels] - mean_KM[:, :channels] * scale_KC
    ends_K1 = torch.tensor(ends, device=x_BCHW.device)[:, None]
    mask_KC = torch.arange(channels, device=x_BCHW.device) < ends_K1
    # `where`, not a product: statistics beyond a width are never updated and must not leak in
    scale_BC = gate_BK @ torch.where(mask_KC, scale_KC, 0.0)
    shift_BC = gate_BK @ torch.where(mask_KC, shift_KC, 0.0)
    return x_BCHW * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]


def argmax_one_hot(logits_BK: Tensor) -> Tensor:
    """The evaluation gate: one-hot at the highest logit, no noise; ties to the cheaper choice."""
    return F.one_hot(logits_BK.argmax(1), logits_BK.shape[1]).to(logits_BK.dtype)


def straight_through_one_hot(logits_BK: Tensor, tau: float) -> Tensor:
    """The argmax gate, exactly one-hot, with the gradient of softmax(logits / tau)."""
    soft_BK = torch.softmax(logits_BK / tau, dim=1)
    hard_BK = argmax_one_hot(soft_BK.detach())
    # (soft - soft.detach()) is exactly zero, so the forward value stays exactly one-hot
    return hard_BK + (soft_BK - soft_BK.detach())


def gumbel_one_hot(
    logits_BK: Tensor,
    tau: float,
    generator: torch.Generator | None,
    *,
    part: int = 0,
    parts: int = 1,
) -> Tensor:
    """The training gate: a one-hot sample with the Gumbel-softmax gradient (arXiv 1611.01144).

    The forward value is exactly one-hot; the gradient is that of softmax((logits + noise) / tau)
    (straight-through). The noise is drawn on the generator's device. If a batch is split into
    `parts` equal parts, each call draws the noise of the whole batch and uses the slice of its
    `part`, so the parts together get the same noise as the whole batch would.
    """
    device = logits_BK.device if generator is None else generator.device
    rows, options = logits_BK.shape
    whole = torch.empty(rows * parts, options, device=device, dtype=logits_BK.dtype)
    noise_BK = whole.exponential_(generator=generator)[rows * part : rows * (part + 1)]
    return straight_through_one_hot(logits_BK - noise_BK.log().to(logits_BK.device), tau)
