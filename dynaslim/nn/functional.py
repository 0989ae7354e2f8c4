"""Slice-able operations as pure functions: the width in use is an argument, never a state.

Shape suffixes: B rows, C channels in use, H W pixels, K choices of a gate, k kernel,
M channels of the whole (widest) layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SoftWidth(NamedTuple):
    """A width that a gate chose for every row: `gate_BK` one-hot (or soft) over BN slots.

    Layers run at the widest of the choices; the BN behind them zeroes what a row does not use.
    """

    gate_BK: Tensor
    slots: tuple[int, ...]


AnyWidth = int | SoftWidth
"""The width that a layer is to use, as its BN slot: one for the whole batch, or one per row."""


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
    """Batch normalisation of every row by the running statistics of the width its gate chose.

    `ends` are the channels of each choice. Scale and shift are tables that are zero beyond them,
    so this is the mask too: with one-hot gates a row equals the sliced network's, and the gradient
    of an option is the difference that the option would make.
    """
    channels = x_BCHW.shape[1]
    scale_KC = weight_M[:channels] * torch.rsqrt(var_KM[:, :channels] + eps)
    shift_KC = bias_M[:channels] - mean_KM[:, :channels] * scale_KC
    ends_K1 = torch.tensor(ends, device=x_BCHW.device)[:, None]
    mask_KC = torch.arange(channels, device=x_BCHW.device) < ends_K1
    # `where`, not a product: statistics beyond a width are never written and must not leak in
    scale_BC = gate_BK @ torch.where(mask_KC, scale_KC, 0.0)
    shift_BC = gate_BK @ torch.where(mask_KC, shift_KC, 0.0)
    return x_BCHW * scale_BC[:, :, None, None] + shift_BC[:, :, None, None]


def argmax_one_hot(logits_BK: Tensor) -> Tensor:
    """The evaluation gate: one-hot of the highest logit, ties to the cheaper choice. No noise."""
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
    """The training gate: a one-hot sample with the Gumbel-softmax's gradient (arXiv 1611.01144).

    Forward exactly one-hot, backward that of softmax((logits + noise) / tau) (straight-through).
    The noise is drawn on the generator's device. Of a batch in several equal parts, each draws the
    noise of the whole and takes its own, so that together they are what the whole would be.
    """
    device = logits_BK.device if generator is None else generator.device
    rows, options = logits_BK.shape
    whole = torch.empty(rows * parts, options, device=device, dtype=logits_BK.dtype)
    noise_BK = whole.exponential_(generator=generator)[rows * part : rows * (part + 1)]
    return straight_through_one_hot(logits_BK - noise_BK.log().to(logits_BK.device), tau)
