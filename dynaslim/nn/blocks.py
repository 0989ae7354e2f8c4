"""The blocks. Each is `front`, then its gate, then `back`: a segment ends between the two.

`width_in` is the width of the stage before, `width` that of the block's own stage. `front` runs
at the first, because the gate that decides the second has not spoken yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dynaslim.nn.functional import AnyWidth
from dynaslim.nn.gate import Gate
from dynaslim.nn.layers import ConvBN, SlimBatchNorm2d, SlimConv2d
from dynaslim.spec import Activation, BlockKind, StageSpec

_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
}


class LayerFactory:
    """Makes `ConvBN`s for a network: activation, device and dtype in one place."""

    def __init__(
        self,
        activation: Activation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.activation = activation
        self.device = device
        self.dtype = dtype

    def act(self) -> nn.Module:
        """The network's non-linearity."""
        return _ACTIVATIONS[self.activation]()

    def conv_bn(
        self,
        in_channels: int,
        slot_channels: Sequence[int],
        kernel: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        act: bool = True,
    ) -> ConvBN:
        """A convolution whose output channels are `slot_channels[slot]`."""
        out = max(slot_channels)
        conv = SlimConv2d(
            in_channels,
            out,
            kernel,
            stride=stride,
            depthwise=depthwise,
            device=self.device,
            dtype=self.dtype,
        )
        bn = SlimBatchNorm2d(slot_channels, device=self.device, dtype=self.dtype)
        return ConvBN(conv, bn, self.act() if act else None)


class Block(nn.Module):
    """A block of a stage: `back(gate(front(x)))`; `gate` is None where it has no heads."""

    gate: Gate | None

    def front(self, x: Tensor, width_in: AnyWidth) -> Tensor:
        """What comes before the gate."""
        raise NotImplementedError

    def back(self, x: Tensor, width: AnyWidth) -> Tensor:
        """What comes behind the gate."""
        raise NotImplementedError

    def forward(self, x: Tensor, width_in: AnyWidth, width: AnyWidth) -> Tensor:
        """The whole block where its gate does not decide anything."""
        x = self.front(x, width_in)
        if self.gate is not None:
            x, _ = self.gate(x)
        return self.back(x, width)


class ConvBlock(Block):
    """Convolution, BN, activation and perhaps a 3x3 max pool of stride 2: stems and heads."""

    def __init__(
        self,
        make: LayerFactory,
        stage: StageSpec,
        stride: int,
        ins: Sequence[int],
        outs: Sequence[int],
    ) -> None:
        super().__init__()
        self.gate = None
        self.body = make.conv_bn(max(ins), outs, stage.kernel, stride=stride)
        self.pool = nn.MaxPool2d(3, 2, 1) if stage.max_pool else nn.Identity()

    def front(self, x: Tensor, width_in: AnyWidth) -> Tensor:
        return x

    def back(self, x: Tensor, width: AnyWidth) -> Tensor:
        out: Tensor = self.pool(self.body(x, width))
        return out


class DepthwiseSeparable(Block):
    """MobileNetV1's block: depthwise, gate, pointwise; no shortcut."""

    def __init__(
        self,
        make: LayerFactory,
        stage: StageSpec,
        stride: int,
        ins: Sequence[int],
        outs: Sequence[int],
    ) -> None:
        super().__init__()
        self.depthwise = make.conv_bn(max(ins), ins, stage.kernel, stride=stride, depthwise=True)
        self.gate = None
        self.pointwise = make.conv_bn(max(ins), outs, 1)

    def front(self, x: Tensor, width_in: AnyWidth) -> Tensor:
        out: Tensor = self.depthwise(x, width_in)
        return out

    def back(self, x: Tensor, width: AnyWidth) -> Tensor:
        out: Tensor = self.pointwise(x, width)
        return out


class InvertedResidual(Block):
    """MobileNetV2's block: expand, depthwise, gate, project; a shortcut but in the first block."""

    def __init__(
        self,
        make: LayerFactory,
        stage: StageSpec,
        stride: int,
        ins: Sequence[int],
        outs: Sequence[int],
        *,
        shortcut: bool,
    ) -> None:
        super().__init__()
        inner = [channels * stage.expansion for channels in ins]
        self.expand = make.conv_bn(max(ins), inner, 1) if stage.expansion != 1 else None
        self.depthwise = make.conv_bn(
            max(inner), inner, stage.kernel, stride=stride, depthwise=True
        )
        self.gate = None
        self.project = make.conv_bn(max(inner), outs, 1, act=False)
        self.shortcut = shortcut

    def front(self, x: Tensor, width_in: AnyWidth) -> Tensor:
        if self.expand is not None:
            x = self.expand(x, width_in)
        out: Tensor = self.depthwise(x, width_in)
        return out

    def back(self, x: Tensor, width: AnyWidth) -> Tensor:
        out: Tensor = self.project(x, width)
        return out

    def forward(self, x: Tensor, width_in: AnyWidth, width: AnyWidth) -> Tensor:
        out = super().forward(x, width_in, width)
        return x + out if self.shortcut else out


class Residual(Block):
    """ResNet's basic and bottleneck blocks; the gate, where there is one, is at the entrance."""

    def __init__(
        self,
        make: LayerFactory,
        stage: StageSpec,
        stride: int,
        ins: Sequence[int],
        outs: Sequence[int],
        *,
        project: bool,
    ) -> None:
        super().__init__()
        self.gate = None
        widest = max(outs)
        if stage.block == "bottleneck":
            inner = [channels // stage.expansion for channels in outs]
            body = [
                make.conv_bn(max(ins), inner, 1),
                make.conv_bn(max(inner), inner, stage.kernel, stride=stride),
                make.conv_bn(max(inner), outs, 1, act=False),
            ]
        else:
            body = [
                make.conv_bn(max(ins), outs, stage.kernel, stride=stride),
                make.conv_bn(widest, outs, stage.kernel, act=False),
            ]
        self.body = nn.ModuleList(body)
        # the first block of a stage always projects: its widths differ from the stage's before
        self.shortcut = (
            make.conv_bn(max(ins), outs, 1, stride=stride, act=False) if project else None
        )
        self.act = make.act()

    def front(self, x: Tensor, width_in: AnyWidth) -> Tensor:
        return x

    def back(self, x: Tensor, width: AnyWidth) -> Tensor:
        short = x if self.shortcut is None else self.shortcut(x, width)
        for layer in self.body:
            x = layer(x, width)
        out: Tensor = self.act(x + short)
        return out


def make_block(
    make: LayerFactory, stage: StageSpec, index: int, ins: Sequence[int], outs: Sequence[int]
) -> Block:
    """Block number `index` of a stage; `ins` and `outs` are channels per BN slot."""
    stride = stage.stride if index == 0 else 1
    kind: BlockKind = stage.block
    match kind:
        case "conv":
            return ConvBlock(make, stage, stride, ins, outs)
        case "depthwise_separable":
            return DepthwiseSeparable(make, stage, stride, ins, outs)
        case "inverted_residual":
            return InvertedResidual(make, stage, stride, ins, outs, shortcut=index > 0)
        case "basic" | "bottleneck":
            return Residual(make, stage, stride, ins, outs, project=index == 0)
