"""Sub-networks cut out of a supernet: plain torch layers with weights of exactly their width.

A slice of a wide weight is not contiguous, so backends repack it at every call; and batch
normalisation with fixed statistics is an affine map that the convolution before it can carry. What
comes out here has neither slices nor BN, and knows nothing of the supernet: it can be compiled or
exported like any other module.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dynaslim.errors import UsageError, check
from dynaslim.nn.blocks import (
    Block,
    ConvBlock,
    DepthwiseSeparable,
    InvertedResidual,
    Residual,
)
from dynaslim.nn.gate import Gate
from dynaslim.nn.graph_net import GraphNet
from dynaslim.nn.layers import ConvBN
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.runtime.forms import Form
from dynaslim.runtime.graph_forms import plain_form
from dynaslim.spec import LARGEST, Route

Features = tuple[Tensor, Tensor]


class PlainGate(nn.Module):
    """A gate at one width: scaled features and, where it decides, the choices' logits (B, K)."""

    def __init__(self, gate: Gate, channels: int, *, decides: bool) -> None:
        super().__init__()
        self.reduce = _linear(gate.reduce_weight[:, :channels], gate.reduce_bias)
        assert gate.expand_weight is not None
        assert gate.expand_bias is not None
        self.expand = _linear(gate.expand_weight[:channels], gate.expand_bias[:channels])
        self.slimming: nn.Linear | None = None
        if decides:
            assert gate.slimming_weight is not None
            self.slimming = _linear(gate.slimming_weight, None)
        self.sigmoid = gate.attention == "sigmoid"

    def forward(self, x: Tensor) -> Tensor | Features:
        hidden = torch.relu(self.reduce(x.mean((2, 3))))
        scale = self.expand(hidden)
        scale = torch.sigmoid(scale) if self.sigmoid else 1.0 + torch.tanh(scale)
        scaled = x * scale[:, :, None, None]
        return scaled if self.slimming is None else (scaled, self.slimming(hidden))


class PlainResidual(nn.Module):
    """Body and shortcut, added and activated."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.shortcut(x) + self.body(x))
        return out


class PlainShortcut(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class PlainHead(nn.Module):
    """Global average pool and the classifier."""

    def __init__(self, classifier: nn.Linear, channels: int) -> None:
        super().__init__()
        self.classifier = _linear(classifier.weight[:, :channels], classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


def extract(net: ElasticNet, route: Route) -> nn.Module:
    """The sub-network along a route as a plain module: images (B, C, H, W) -> logits (B, classes).

    Equal to `net(x, route)` to float tolerance, on a copy of the weights, in evaluation mode.

    Raises:
        UsageError: if the route is not one of the network's.
        RuntimeError: if the network is in training mode: its BN statistics still move.
    """
    spec = net.spec
    if isinstance(net, GraphNet):
        return plain_form(net, Form.whole(spec.coerce_route(route)))
    assert isinstance(net, SlimNet)
    indices = spec.segment_indices(spec.coerce_route(route))
    parts = [
        extract_segment(net, number, 0 if number == 0 else indices[number - 1], index, decide=False)
        for number, index in enumerate(indices)
    ]
    return nn.Sequential(*(layer for part in parts for layer in part)).eval()


def extract_segment(
    net: SlimNet,
    number: int,
    before: int,
    choice: int,
    *,
    decide: bool = True,
    shared: dict[Any, list[nn.Module]] | None = None,
) -> nn.Sequential:
    """Segment `number` at width index `choice`, behind one at `before`, as a plain module.

    Takes what the segment before gives; segment 0 takes images, and ignores `before`. Gives
    (features, logits (B, K) of the next gate), without `decide` the features alone; the last
    segment gives class logits. Equal to `net.segment` to float tolerance.

    The forms of a segment that differ in `before` alone differ in their first layers alone: those
    that are made with one dict `shared` have all others, and their memory, in common.

    Raises:
        UsageError: if there is no such segment.
        RuntimeError: if the network is in training mode.
    """
    spec = net.spec
    check(0 <= number < spec.num_segments, f"segment {number}: {spec.name} has {spec.num_segments}")
    if net.training:
        raise RuntimeError("extraction fixes running statistics: call net.eval() first")
    for index in (before, choice):
        if index != LARGEST and not 0 <= index < spec.num_widths:
            raise UsageError(f"width index {index}: {spec.name} has 0 to {spec.num_widths - 1}")
    if number == 0:
        entry, channels, slot, done = [], spec.in_channels, -1, 0
    else:  # the front of its first block was the segment before's
        start = spec.gated_stages[number - 1]
        first, arriving = _blocks(net, start)[0], spec.width(start - 1, before)
        width = spec.width(start, choice)
        inner = _inner_channels(first, arriving.slot, arriving.channels)
        entry, done = _back(first, inner, arriving.channels, width.slot), 1
        channels, slot = width.channels, width.slot
    key = (number, choice, decide)
    rest = None if shared is None else shared.get(key)
    if rest is None:
        rest = _rest(net, number, choice, channels, slot, done, decide=decide)
        if shared is not None:
            shared[key] = rest
    return nn.Sequential(*entry, *rest).eval().requires_grad_(False)


def _rest(
    net: SlimNet, number: int, choice: int, channels: int, slot: int, done: int, *, decide: bool
) -> list[nn.Module]:
    """A segment from behind the `done` blocks of its first stage to its end."""
    spec = net.spec
    starts = (0, *spec.gated_stages, len(spec.stages))
    start, stop = starts[number], starts[number + 1]
    layers: list[nn.Module] = []
    for stage in range(start, stop):
        width = spec.width(stage, choice)
        for block in _blocks(net, stage)[done if stage == start else 0 :]:
            layers += _whole(block, channels, slot, width.slot)
            slot, channels = width.slot, width.channels
    if stop == len(spec.stages):
        layers.append(PlainHead(net.classifier, channels))
    else:
        block = _blocks(net, stop)[0]
        layers += _front(block, channels, slot)
        assert block.gate is not None
        inner = _inner_channels(block, slot, channels)
        layers.append(PlainGate(block.gate, inner, decides=decide))
    return layers


def _blocks(net: SlimNet, stage: int) -> list[Block]:
    blocks = net.stages[stage]
    assert isinstance(blocks, nn.ModuleList)
    found = []
    for block in blocks:
        assert isinstance(block, Block)
        found.append(block)
    return found


def _whole(block: Block, channels: int, slot_in: int, slot: int) -> list[nn.Module]:
    """A block whose gate, if it has one, decides nothing."""
    inner = _inner_channels(block, slot_in, channels)
    layers = _front(block, channels, slot_in)
    if block.gate is not None:
        layers.append(PlainGate(block.gate, inner, decides=False))
    layers += _back(block, inner, channels, slot)
    if isinstance(block, InvertedResidual) and block.shortcut:
        return [PlainShortcut(nn.Sequential(*layers))]
    return layers


def _inner_channels(block: Block, slot_in: int, channels: int) -> int:
    """Channels at the block's gate."""
    if isinstance(block, DepthwiseSeparable | InvertedResidual):
        return block.depthwise.bn.slot_channels[slot_in]
    return channels


def _front(block: Block, channels: int, slot_in: int) -> list[nn.Module]:
    match block:
        case DepthwiseSeparable():
            return _conv(block.depthwise, channels, slot_in)
        case InvertedResidual():
            expand = [] if block.expand is None else _conv(block.expand, channels, slot_in)
            inner = block.depthwise.bn.slot_channels[slot_in]
            return [*expand, *_conv(block.depthwise, inner, slot_in)]
    return []


def _back(block: Block, inner: int, channels: int, slot: int) -> list[nn.Module]:
    match block:
        case ConvBlock():
            pool = [] if isinstance(block.pool, nn.Identity) else [copy.deepcopy(block.pool)]
            return [*_conv(block.body, channels, slot), *pool]
        case DepthwiseSeparable():
            return _conv(block.pointwise, inner, slot)
        case InvertedResidual():
            return _conv(block.project, inner, slot)
        case Residual():
            body: list[nn.Module] = []
            at = channels
            for layer in block.body:
                assert isinstance(layer, ConvBN)
                body += _conv(layer, at, slot)
                at = layer.bn.slot_channels[slot]
            shortcut = [] if block.shortcut is None else _conv(block.shortcut, channels, slot)
            skip = nn.Sequential(*shortcut) if shortcut else nn.Identity()
            return [PlainResidual(nn.Sequential(*body), skip, copy.deepcopy(block.act))]
    raise AssertionError(f"no plain form of {type(block).__name__}")


@torch.no_grad()
def _conv(layer: ConvBN, channels: int, slot: int) -> list[nn.Module]:
    """Convolution with BN folded in, and the activation."""
    conv, bn = layer.conv, layer.bn
    out = bn.slot_channels[slot]
    depthwise = conv.groups > 1
    weight = conv.weight[:out] if depthwise else conv.weight[:out, :channels]
    # in double: the folded weights are rounded once
    scale = bn.weight[:out].double() * torch.rsqrt(bn.running_var[slot, :out].double() + bn.eps)
    bias = bn.bias[:out].double() - bn.running_mean[slot, :out].double() * scale
    kernel = weight.shape[-1]
    plain = nn.Conv2d(
        out if depthwise else channels,
        out,
        kernel,
        conv.stride,
        kernel // 2,
        groups=out if depthwise else 1,
        device=weight.device,
        dtype=weight.dtype,
    )
    plain.weight.copy_(weight.double() * scale[:, None, None, None])
    assert plain.bias is not None
    plain.bias.copy_(bias)
    return [plain] if isinstance(layer.act, nn.Identity) else [plain, copy.deepcopy(layer.act)]


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, inside = weight.shape
    plain = nn.Linear(inside, out, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(bias)
    return plain
