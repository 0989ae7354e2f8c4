"""Make a slimmable network from a trained wide one by sorting its channels by importance.

All tensors that carry or read a channel belong to one group and are reordered together: filters and
their batch normalisation, both ends of a shortcut, a depthwise layer and a gate in between, and the
columns of the layers that read it. The widest network's answers do not depend on the order.

Suffixes: C channels of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from dynaslim.distributed import average_
from dynaslim.errors import check
from dynaslim.graph import WHOLE, Axis, GraphSpec, Group
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.nn.program import Step
from dynaslim.spec import GateSpec, NetSpec

Importance = Literal["activation", "bn", "weight"]
"""The rule by which channels are ranked."""


@dataclass
class ChannelGroup:
    """Units of channels that are reordered together; each has the same number of positions."""

    units: int
    carriers: list[tuple[Tensor, int]] = field(default_factory=list)
    """Parameters and buffers with entries for each channel, and the axis of these entries."""
    consumers: list[tuple[Tensor, int]] = field(default_factory=list)
    """Weights that read the channels, and the axis of their input channels."""
    positions: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Positions along each of these axes (units, positions per unit), by tensor id and axis."""

    @torch.no_grad()
    def reorder(self, order_C: Tensor) -> None:
        """Put unit `order_C[i]` in place i, in all tensors of the group."""
        for tensor, axis in (*self.carriers, *self.consumers):
            places = self.positions[id(tensor), axis].to(order_C.device)
            index = torch.arange(tensor.shape[axis], device=order_C.device)
            index[places] = places[order_C]
            tensor.copy_(tensor.index_select(axis, index.to(tensor.device)))


def widest_only(spec: NetSpec) -> NetSpec:
    """A spec with only the last width of every stage."""
    stages = tuple(
        replace(stage, widths=stage.widths[-1:], gate=stage.gate and GateSpec((0,)))
        for stage in spec.stages
    )
    return spec.replace(stages=stages)


def slimmable(wide: SlimNet, spec: NetSpec, batches: Iterable[Tensor]) -> SlimNet:
    """A network of `spec` that gives the same answers along its largest route as `wide`.

    `wide` is a network of `widest_only(spec)`, with any number of classes. The channels of each
    group are sorted by importance over `batches`, network inputs (B, C, H, W). Every width starts
    with the BN statistics of `wide`. Slimming heads are initialised with torch's global generator.
    The network is in evaluation mode. If several processes run, each passes its own batches.
    """
    spec = spec.replace(num_classes=wide.spec.num_classes)
    net = SlimNet(spec, device=wide.device)
    own = net.state_dict()
    for name, value in wide.state_dict().items():
        if not name.endswith("slimming_weight"):
            own[name].copy_(value)  # one BN slot becomes all of them
    sort_channels(net.eval(), batches)
    return net


@torch.no_grad()
def sort_channels(
    net: ElasticNet, batches: Iterable[Tensor] = (), rule: Importance = "activation"
) -> None:
    """Sort the channels of each group in place, the most important first.

    `net` is in evaluation mode. Its answers along the largest route do not change. A channel's
    importance is the root mean square of its activations times the norm of the weights that read
    it, summed over the layers that read it. `batches` as in `slimmable`. The rule `bn` replaces the
    activations by scale and shift of batch normalisation; `weight` uses the norms alone.

    Raises:
        UsageError: if the rule is `activation` and there are no batches.
    """
    assert isinstance(net, SlimNet)
    readers = _readers(net)
    power = dict.fromkeys(readers.values(), torch.ones((), device=net.device))
    if rule == "activation":
        power = _powers(net, readers, batches)
        check(bool(power), "images: at least one is needed to sort channels by")
    for group in channel_groups(net):
        scores = torch.zeros(group.units, dtype=torch.float64)
        for name, total in power.items():
            weight = net.tensor(name)
            for axis in (axis for tensor, axis in group.consumers if tensor is weight):
                norms = weight.transpose(0, axis).flatten(1).norm(dim=1) * total.sqrt()
                scores += norms[group.positions[id(weight), axis]].sum(1).cpu()
        if rule == "bn":
            scores *= _rms_of_norms(net, group)
        group.reorder(scores.argsort(descending=True, stable=True))
    if isinstance(net.spec, GraphSpec):
        net.spec = replace(net.spec, sorted_by="statistics" if rule == "bn" else rule)


_GROUPS: Final = 6
"""Index of the `groups` argument of a convolution."""


def _readers(net: SlimNet) -> dict[str, str]:
    """Operations that mix all their input channels, mapped to the weights they use for it."""
    found = {}
    for node in net.graph.nodes:
        kind = node.op.partition(".")[0]
        if kind == "gate":
            found[node.name] = f"{node.name}.reduce_weight"
        elif kind == "linear" or (kind.startswith("conv") and node.args[_GROUPS] == 1):
            found[node.name] = node.args[1]["tensor"]
    for number, path in enumerate(net.graph.gates):
        if net.gate(number).expand_weight is not None:  # else a gate scales nothing
            found[path] = f"{path}.reduce_weight"
    return found


def _powers(
    net: SlimNet, readers: Mapping[str, str], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Mean squares of the channels that each weight reads, summed over batches."""
    power: dict[str, Tensor] = {}

    def add(reader: str, x: Tensor, channels: int) -> None:
        mean = x.square().mean([axis for axis in range(x.ndim) if axis != channels])
        weight = readers[reader]
        power[weight] = power.get(weight, torch.zeros_like(mean)) + mean

    def watch(step: Step, args: Sequence[Any], _result: Any) -> None:
        if step.name in readers:
            pooled = step.op == "gate"
            x = args[0].mean((2, 3)) if pooled else args[0]
            add(step.name, x, x.ndim - 1 if step.op.startswith("linear") else 1)

    widest = net.spec.segment_indices(net.spec.largest)
    for x in batches:
        before = widest[0]
        for number, index in enumerate(widest):
            x = net.run_segment(number, x, before, index, watch=watch).out
            before = index
            if number < len(net.graph.gates) and net.graph.gates[number] in readers:
                add(net.graph.gates[number], x.mean((2, 3)), 1)
                x, _ = net.gate(number)(x)
    average_(list(power.values()))
    return power


def _rms_of_norms(net: SlimNet, group: ChannelGroup) -> Tensor:
    """Root mean square of each unit after batch normalisation, or 1 if it has none."""
    total, count = torch.zeros(2, group.units, dtype=torch.float64)
    for node in net.graph.nodes:
        if node.op != "batch_norm.default" or node.args[1] is None:
            continue
        scale, shift = (net.tensor(node.args[place]["tensor"]) for place in (1, 2))
        places = group.positions.get((id(scale), 0))
        if places is not None:
            total += (scale.square() + shift.square())[places].sum(1).cpu()
            count += places.shape[1]
    return torch.where(count > 0, total / count.clamp_min(1), 1.0).sqrt()


def channel_groups(net: SlimNet) -> list[ChannelGroup]:
    """The groups of all channels that can be removed, in the order of `net.graph.groups`."""
    groups = [ChannelGroup(group.units) for group in net.graph.groups]
    transposed = {
        node.args[1].get("tensor")
        for node in net.graph.nodes
        if node.op.startswith("conv_transpose")
    }
    for name, spec in net.graph.tensors.items():
        tensor = net.tensor(name)
        # the first axis of statistics is the slot
        for number, axis in enumerate(spec.axes, start=tensor.ndim - len(spec.axes)):
            reads = number == (0 if name in transposed else 1) and spec.kind == "weight"
            for group, positions in _positions(axis, net.graph.groups).items():
                groups[group].positions[id(tensor), number] = positions
                into = groups[group].consumers if reads else groups[group].carriers
                into.append((tensor, number))
    return groups


def _positions(axis: Axis, groups: Sequence[Group]) -> dict[int, Tensor]:
    """Positions along an axis (units, positions per unit), by group."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    at = 0
    for group, first, count, each in axis:
        units = torch.arange(first, first + count).repeat_interleave(each)
        if group != WHOLE:
            found.setdefault(group, []).append((units, torch.arange(at, at + len(units))))
        at += len(units)
    made = {}
    for group, runs in found.items():
        units, places = map(torch.cat, zip(*runs, strict=True))
        made[group] = places[units.argsort(stable=True)].reshape(groups[group].units, -1)
    return made
