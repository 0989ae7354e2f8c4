"""Slice-able layers: the functions of `functional` with parameters. Suffixes as there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynaslim.nn.functional import (
    AnyWidth,
    SoftWidth,
    gated_batch_norm,
    slim_batch_norm,
    slim_conv2d,
)


class SlimConv2d(nn.Module):
    """Bias-free "same" convolution that runs on any leading part of its channels.

    (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)) with C up to `in_channels` and
    out up to `out_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.groups = out_channels if depthwise else 1
        shape = (out_channels, in_channels // self.groups, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation by fan-out (of one group), as MobileNets are trained from."""
        out, _, kernel, _ = self.weight.shape
        nn.init.normal_(self.weight, std=math.sqrt(2.0 * self.groups / (kernel * kernel * out)))

    def forward(self, x: Tensor, out_channels: int) -> Tensor:
        return slim_conv2d(x, self.weight, out_channels, stride=self.stride, groups=self.groups)


class SlimBatchNorm2d(nn.Module):
    """Batch normalisation with one set of running statistics per width, scale and shift shared.

    `slot_channels` are this layer's channels for each set ("slot"), of which there is one per
    width and perhaps one for the teacher (`NetSpec.num_slots`). Buffers: `running_mean`,
    `running_var` (slots, M), `num_batches_tracked` (slots,). Values beyond a slot's channels are
    never used. `momentum` None averages cumulatively, as in `torch.nn.BatchNorm2d`.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        slot_channels: Sequence[int],
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.slot_channels = tuple(slot_channels)
        slots, channels = len(slot_channels), max(slot_channels)
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        mean = torch.zeros(slots, channels, device=device, dtype=dtype)
        self.register_buffer("running_mean", mean)
        # not by ones_like, which on the meta device imports sympy
        var = torch.ones(slots, channels, device=device, dtype=dtype)
        self.register_buffer("running_var", var)
        counts = torch.zeros(slots, device=device, dtype=torch.int64)
        self.register_buffer("num_batches_tracked", counts)

    def reset_statistics(self) -> None:
        """Forget all running statistics."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.num_batches_tracked.zero_()

    def _count_batch(self, slot: int) -> float:
        """In training, count a batch of a slot; the weight of its statistics."""
        if not self.training:
            return 0.0
        count = self.num_batches_tracked[slot].add_(1)
        return self.momentum if self.momentum is not None else 1.0 / float(count)

    def forward(self, x: Tensor, width: AnyWidth) -> Tensor:
        """Normalise x (B, C, H, W); widths chosen per row always use running statistics."""
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
        momentum = self._count_batch(width)
        # sliced by the slot, not by x: a tensor of another width is an error, not another network
        channels = self.slot_channels[width]
        return slim_batch_norm(
            x,
            self.running_mean[width, :channels],
            self.running_var[width, :channels],
            self.weight,
            self.bias,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
        )


class ConvBN(nn.Module):
    """Convolution, batch normalisation and, unless `activation` is None, a non-linearity.

    Runs at the channels that the batch normalisation has for the width asked for.
    """

    def __init__(self, conv: SlimConv2d, bn: SlimBatchNorm2d, activation: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.act = activation if activation is not None else nn.Identity()

    def forward(self, x: Tensor, width: AnyWidth) -> Tensor:
        widest = width.slots[-1] if isinstance(width, SoftWidth) else width
        out: Tensor = self.act(self.bn(self.conv(x, self.bn.slot_channels[widest]), width))
        return out
