"""Batch normalisation with separate statistics for each width. Suffixes as in `functional`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaslim.nn.functional import AnyWidth, SoftWidth, gated_batch_norm
from dynaslim.nn.program import Slicer, cut


class SlimBatchNorm2d(nn.Module):
    """Batch normalisation with one set of running statistics per width; scale and shift are shared.

    Each set is a "slot": one per width, and possibly one for the teacher (`NetSpec.num_slots`).
    `kept` says which of the `channels` each slot uses; its other values are never read. Buffers:
    `running_mean`, `running_var` (slots, M), `num_batches_tracked` (slots,). With `momentum` None
    the average is cumulative, as in `torch.nn.BatchNorm2d`.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        kept: Sequence[Slicer],
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.kept = tuple(kept)
        self.slot_channels = tuple(_count(left, channels) for left in kept)
        slots = len(self.kept)
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        mean = torch.zeros(slots, channels, device=device, dtype=dtype)
        self.register_buffer("running_mean", mean)
        # not ones_like: on the meta device it imports sympy
        var = torch.ones(slots, channels, device=device, dtype=dtype)
        self.register_buffer("running_var", var)
        counts = torch.zeros(slots, device=device, dtype=torch.int64)
        self.register_buffer("num_batches_tracked", counts)

    def affine(self, slot: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, scale and shift of the channels that a slot uses."""
        left = (self.kept[slot],)
        mean, var = self.running_mean[slot], self.running_var[slot]
        return cut(mean, left), cut(var, left), cut(self.weight, left), cut(self.bias, left)

    def reset_statistics(self) -> None:
        """Reset the running statistics of all slots."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.num_batches_tracked.zero_()

    def _count_batch(self, slot: int) -> float:
        """Count a batch of a slot in training, and return the momentum for its statistics."""
        if not self.training:
            return 0.0
        count = self.num_batches_tracked[slot].add_(1)
        return self.momentum if self.momentum is not None else 1.0 / float(count)

    def forward(self, x: Tensor, width: AnyWidth) -> Tensor:
        """Normalise x (B, C, ...). Widths chosen per row always use the running statistics."""
        if isinstance(width, SoftWidth):
            slots = list(width.slots)
            return gated_batch_norm(
                x,
                self.running_mean[slots],
                self.running_var[slots],
                self.weight,
                self.bias,
                width.gate_BK,
                [self.slot_channels[slot] for slot in slots],
                eps=self.eps,
            )
        mean, var, weight, bias = self.affine(width)
        momentum, left = self._count_batch(width), self.kept[width]
        out = F.batch_norm(x, mean, var, weight, bias, self.training, momentum, self.eps)
        if self.training and isinstance(left, tuple):  # mean and var are copies: write them back
            index = torch.tensor(left, device=x.device)
            self.running_mean[width].index_copy_(0, index, mean.to(self.running_mean.dtype))
            self.running_var[width].index_copy_(0, index, var.to(self.running_var.dtype))
        return out


def _count(left: Slicer, whole: int) -> int:
    if left is None:
        return whole
    return left if isinstance(left, int) else len(left)
