"""A slimmable network out of a trained wide one: channels by importance, so the first are the best.

Whatever carries a channel belongs to one group and is reordered together: filters and their batch
normalisation, both ends of a shortcut, a depthwise layer and a gate in between, and the columns of
the layers that read it. The widest network's answers do not depend on the order.

Suffixes: C channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dynaslim.distributed import average_
from dynaslim.graph import WHOLE, Axis
from dynaslim.nn.blocks import Block, ConvBlock, DepthwiseSeparable, InvertedResidual, Residual
from dynaslim.nn.gate import Gate
from dynaslim.nn.graph_net import Cut, GraphNet, Step
from dynaslim.nn.layers import ConvBN
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.spec import GateSpec, NetSpec


@dataclass
class ChannelGroup:
    """Channels that are reordered together."""

    carriers: list[tuple[Tensor, int]] = field(default_factory=list)
    """Parameters and buffers with one entry per channel, and the axis that has them."""
    consumers: list[Tensor] = field(default_factory=list)
    """Weights of the dense layers that read the channels; axis 1 has them."""

    @torch.no_grad()
    def reorder(self, order_C: Tensor) -> None:
        """Put channel `order_C[i]` in place i, in all tensors of the group."""
        for tensor, axis in (*self.carriers, *((weight, 1) for weight in self.consumers)):
            tensor.copy_(tensor.index_select(axis, order_C))


def widest_alone(spec: NetSpec) -> NetSpec:
    """The network of the last width of every stage, and of no other."""
    stages = tuple(
        replace(stage, widths=stage.widths[-1:], gate=stage.gate and GateSpec((0,)))
        for stage in spec.stages
    )
    return spec.replace(stages=stages)


def slimmable(wide: SlimNet, spec: NetSpec, batches: Iterable[Tensor]) -> SlimNet:
    """A network of `spec` that answers along its largest route as `wide` does.

    `wide` is a network of `widest_alone(spec)`, of any number of classes. The channels of each
    group are sorted by importance over `batches`, network inputs (B, C, H, W). Every width begins
    with the BN statistics of `wide`; slimming heads are new, drawn by torch's global generator. The
    network is in evaluation mode. Where several processes run, each brings batches of its own.
    """
    spec = spec.replace(num_classes=wide.spec.num_classes)
    net = SlimNet(spec, device=wide.classifier.weight.device)
    own = net.state_dict()
    for name, value in wide.state_dict().items():
        if not name.endswith("slimming_weight"):
            own[name].copy_(value)  # one BN slot becomes all of them
    sort_channels(net.eval(), batches)
    return net


def sort_channels(net: ElasticNet, batches: Iterable[Tensor]) -> None:
    """Sort each group's channels, the most important first; changes `net`, in evaluation mode, but
    not its answers along the largest route.

    A channel's importance is the root mean square of its activations times the norm of the weights
    that read it, summed over the layers that do. `batches` as in `slimmable`.
    """
    if isinstance(net, GraphNet):
        _sort_graph(net, batches)
        return
    assert isinstance(net, SlimNet)
    groups = channel_groups(net)
    inputs = _InputPower([weight for group in groups for weight in group.consumers])
    with torch.no_grad(), inputs:
        for x in batches:
            net(x, net.spec.largest)
    average_(list(inputs.sums.values()))
    for group in groups:
        parts = []
        for weight in group.consumers:
            norms_C = weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
            parts.append(norms_C * inputs.sums[weight.data_ptr()].sqrt())
        group.reorder(torch.stack(parts).sum(0).argsort(descending=True, stable=True))


@torch.no_grad()
def _sort_graph(net: GraphNet, batches: Iterable[Tensor]) -> None:
    spec, power = net.spec, dict[str, Tensor]()
    widest = spec.segment_indices(spec.largest)

    def watch(step: Step, args: Sequence[Any], _result: Any) -> None:
        kind = step.op.partition(".")[0]
        weight = step.args[1] if kind == "linear" or kind.startswith("conv") else None
        grouped = kind != "linear" and len(args) > _GROUPS and args[_GROUPS] > 1
        if isinstance(weight, Cut) and not grouped:
            x, channels = args[0], args[0].ndim - 1 if kind == "linear" else 1
            mean = x.square().mean([axis for axis in range(x.ndim) if axis != channels])
            power[weight.name] = power.get(weight.name, 0.0) + mean
            inputs[weight.name] = 0 if kind == "conv_transpose2d" else 1

    inputs: dict[str, int] = {}
    """Of every weight that reads channels, the axis that has them."""
    for x in batches:
        before = 0
        for number, index in enumerate(widest):
            x = net.run_segment(number, x, before, index, watch=watch)
            before = index
    average_(list(power.values()))
    scores = [torch.zeros(group.units, device=net.device) for group in spec.groups]
    for name, axis in inputs.items():
        norm = net.tensor(name).transpose(0, axis).flatten(1).norm(dim=1)
        for group, (places, units) in _places(spec.tensors[name].axes[axis]).items():
            scores[group].index_add_(0, units, (norm * power[name].sqrt())[places])
    orders = [score.argsort(descending=True, stable=True) for score in scores]
    carriers = [(net.tensor(name), tensor.axes) for name, tensor in spec.tensors.items()]
    for gate, read in zip(net.gates, spec.cut_axes, strict=True):
        assert isinstance(gate, Gate)
        carriers.append((gate.reduce_weight, (read,)))
    for tensor, axes in carriers:
        # of statistics the first axis is the slot, of a gate its hidden features
        for number, along in enumerate(axes, start=tensor.ndim - len(axes)):
            for group, (places, units) in _places(along).items():
                by_unit = places[units.argsort(stable=True)].reshape(len(orders[group]), -1)
                order = torch.arange(tensor.shape[number])
                order[by_unit] = by_unit[orders[group].cpu()]
                tensor.copy_(tensor.index_select(number, order.to(tensor.device)))


_GROUPS: Final = 6
"""Where convolutions take their number of groups."""


def _places(axis: Axis) -> dict[int, tuple[Tensor, Tensor]]:
    """Positions along an axis, and the unit of each, by group."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    at = 0
    for group, first, count, each in axis:
        if group != WHOLE:
            places, units = found.setdefault(group, ([], []))
            places += range(at, at + count * each)
            units += [unit for unit in range(first, first + count) for _ in range(each)]
        at += count * each
    return {g: (torch.tensor(places), torch.tensor(units)) for g, (places, units) in found.items()}


def channel_groups(net: SlimNet) -> list[ChannelGroup]:
    """The groups of all channels but those of the images, which keep their order."""
    groups: list[ChannelGroup] = []

    def through(
        layer: nn.Module, source: ChannelGroup, into: ChannelGroup | None = None
    ) -> ChannelGroup:
        """The group behind a layer: the given one or a new one, of a depthwise layer `source`."""
        assert isinstance(layer, ConvBN)
        if layer.conv.groups > 1:
            into = source
        else:
            source.consumers.append(layer.conv.weight)
            if into is None:
                into = ChannelGroup()
                groups.append(into)
        bn = layer.bn
        into.carriers += [(tensor, 0) for tensor in (layer.conv.weight, bn.weight, bn.bias)]
        into.carriers += [(bn.running_mean, 1), (bn.running_var, 1)]
        return into

    here = ChannelGroup()
    for block in (module for module in net.modules() if isinstance(module, Block)):
        gated = here
        match block:
            case ConvBlock():
                here = through(block.body, here)
            case DepthwiseSeparable():
                here = through(block.pointwise, through(block.depthwise, here))
            case InvertedResidual():
                gated = here if block.expand is None else through(block.expand, here)
                through(block.depthwise, gated)
                here = through(block.project, gated, here if block.shortcut else None)
            case Residual():
                *inner, last = block.body
                for layer in inner:
                    here = through(layer, here)
                here = through(last, here, None if block.shortcut else gated)
                if block.shortcut is not None:
                    through(block.shortcut, gated, here)
            case _:
                raise AssertionError(f"no rule for {type(block).__name__}")
        if block.gate is not None:
            assert block.gate.expand_weight is not None
            assert block.gate.expand_bias is not None
            gated.consumers.append(block.gate.reduce_weight)
            gated.carriers += [(block.gate.expand_weight, 0), (block.gate.expand_bias, 0)]
    here.consumers.append(net.classifier.weight)
    return groups


class _InputPower(TorchFunctionMode):
    """Sums up, while active, the mean square of every channel that goes into the given layers."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        # a slice of all channels begins where its weight does
        self.sums = {w.data_ptr(): torch.zeros(w.shape[1], device=w.device) for w in weights}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (F.conv2d, F.linear):
            x, weight = args[:2]
            if (total := self.sums.get(weight.data_ptr())) is not None:
                total += x.square().mean([axis for axis in range(x.ndim) if axis != 1])
        return func(*args, **(kwargs or {}))
