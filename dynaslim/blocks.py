"""Builds the graph of operations of a `NetSpec` from the zoo's blocks. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from dynaslim.graph import (
    IMAGE,
    WHOLE,
    Axis,
    Graph,
    GraphSpec,
    Group,
    Node,
    TensorSpec,
)
from dynaslim.spec import GATE_AT_ENTRANCE, NetSpec, StageSpec

_ACTIVATIONS: Final[dict[str, tuple[Any, ...]]] = {
    "relu": ("relu.default",),
    "relu6": ("hardtanh.default", 0.0, 6.0),
    "silu": ("silu.default",),
}
_EPS: Final = 1e-5
_MOMENTUM: Final = 0.1


def gate_hidden(spec: NetSpec, max_in: int) -> int:
    """Hidden width of a gate in a block whose largest input width is `max_in`."""
    return max(1, round(spec.reduction * max_in))


def graph_of(spec: NetSpec | GraphSpec) -> Graph:
    """The operations of a network, in execution order."""
    return spec.graph if isinstance(spec, GraphSpec) else _zoo_graph(spec)


@lru_cache(maxsize=64)
def _zoo_graph(spec: NetSpec) -> Graph:
    writer = _Writer(spec)
    for number, stage in enumerate(spec.stages):
        for index in range(stage.blocks):
            writer.block(number, stage, index)
    writer.add("pool", "mean.dim", [2, 3])
    rows = _whole(spec.num_classes)
    weight = writer.tensor("classifier.weight", rows, writer.axis)
    writer.add("classifier", "linear.default", weight, writer.tensor("classifier.bias", rows))
    return writer.graph()


def _whole(positions: int) -> Axis:
    return ((WHOLE, 0, positions, 1),)


class _Writer:
    """Appends operations in order; `at` is the name of the last one, `axis` its output channels."""

    def __init__(self, spec: NetSpec) -> None:
        self.spec = spec
        self.groups: list[Group] = []
        self.tensors: dict[str, TensorSpec] = {}
        self.nodes: list[Node] = []
        self.gates: list[str] = []
        self.cuts: list[str] = []
        self.cut_axes: list[Axis] = []
        self.at, self.axis = IMAGE, _whole(spec.in_channels)
        self.slots: Sequence[int] = (spec.in_channels,)
        """Channels of the previous stage, by slot of its batch normalisation."""

    def graph(self) -> Graph:
        return Graph(
            tuple(self.groups),
            self.tensors,
            tuple(self.nodes),
            tuple(self.cuts),
            tuple(self.cut_axes),
            self.at,
            tuple(self.gates),
        )

    def add(self, name: str, op: str, *args: Any) -> None:
        """Append an operation on the last one's result."""
        read = {"node": self.at}
        self.nodes.append(Node(name, op, (read, *args), {}, len(self.cuts), name))
        self.at = name

    def tensor(self, name: str, *axes: Axis, kind: str = "weight") -> dict[str, str]:
        self.tensors[name] = TensorSpec(axes, kind)
        return {"tensor": name}

    def group(self, slots: Sequence[int]) -> Axis:
        """Add a group of channels with its own widths; `slots` are its channel counts by slot."""
        self.groups.append(Group(max(slots), len(self.cuts), tuple(slots)))
        return ((len(self.groups) - 1, 0, max(slots), 1),)

    def conv(
        self, path: str, out: Axis, kernel: int, stride: int = 1, *,
        depthwise: bool = False, act: bool = True,
    ) -> None:  # fmt: skip
        """Append a convolution, its batch normalisation, and the activation if `act`."""
        square = _whole(kernel)
        inside = _whole(1) if depthwise else self.axis
        weight = self.tensor(f"{path}.conv.weight", out, inside, square, square)
        groups = {"axis": out} if depthwise else 1
        strides, pads = [stride] * 2, [kernel // 2] * 2
        self.add(f"{path}.conv", "conv2d.default", weight, None, strides, pads, [1, 1], groups)
        affine = [self.tensor(f"{path}.bn.{name}", out) for name in ("weight", "bias")]
        statistics = [
            self.tensor(f"{path}.bn.{name}", out, kind="statistics")
            for name in ("running_mean", "running_var")
        ]
        self.add(
            f"{path}.bn", "batch_norm.default", *affine, *statistics, False, _MOMENTUM, _EPS, False
        )
        self.axis = out
        if act:
            self.act(f"{path}.act")

    def act(self, name: str) -> None:
        self.add(name, *_ACTIVATIONS[self.spec.activation])

    def join(self, path: str, other: str) -> None:
        self.add(f"{path}.add", "add.Tensor", {"node": other})

    def gate(self, path: str, stage: StageSpec, index: int, max_in: int) -> dict[str, TensorSpec]:
        """Add the gate or attention head of a block, if it has one; return the head's tensors."""
        chooses = index == 0 and stage.gate is not None
        if self.spec.attention_at == "gated" and not chooses:
            return {}
        hidden = _whole(gate_hidden(self.spec, max_in))
        found = {
            "reduce_weight": (hidden, self.axis),
            "reduce_bias": (hidden,),
            "expand_weight": (self.axis, hidden),
            "expand_bias": (self.axis,),
        }
        if chooses and stage.gate is not None:
            found["slimming_weight"] = (_whole(len(stage.gate.choices)), hidden)
            self.gates.append(path)
            self.cuts.append(self.at)
            self.cut_axes.append(self.axis)
        else:
            self.add(path, "gate")
        return {f"{path}.{name}": TensorSpec(axes, "weight") for name, axes in found.items()}

    def block(self, number: int, stage: StageSpec, index: int) -> None:
        spec, path = self.spec, f"stages.{number}.{index}"
        stride = stage.stride if index == 0 else 1
        slots, max_in = spec.slot_widths(number), max(self.slots)
        heads: dict[str, TensorSpec] = {}
        if GATE_AT_ENTRANCE.get(stage.block, False):
            heads = self.gate(f"{path}.gate", stage, index, max_in)
        entrance, kernel = (self.at, self.axis), stage.kernel
        match stage.block:
            case "conv":
                self.conv(f"{path}.body", self.group(slots), kernel, stride)
                if stage.max_pool:
                    self.add(f"{path}.pool", "max_pool2d.default", [3, 3], [2, 2], [1, 1])
            case "depthwise_separable":
                self.conv(f"{path}.depthwise", self.axis, kernel, stride, depthwise=True)
                heads = self.gate(f"{path}.gate", stage, index, max_in)
                self.conv(f"{path}.pointwise", self.group(slots), 1)
            case "inverted_residual":
                if stage.expansion != 1:
                    inner = self.group([channels * stage.expansion for channels in self.slots])
                    self.conv(f"{path}.expand", inner, 1)
                self.conv(f"{path}.depthwise", self.axis, kernel, stride, depthwise=True)
                heads = self.gate(f"{path}.gate", stage, index, max_in)
                out = entrance[1] if index > 0 else self.group(slots)
                self.conv(f"{path}.project", out, 1, act=False)
                if index > 0:
                    self.join(path, entrance[0])
            case "basic" | "bottleneck":
                self.residual(path, stage, slots, stride, shortcut=index > 0)
        self.tensors.update(heads)
        self.slots = slots

    def residual(
        self, path: str, stage: StageSpec, slots: Sequence[int], stride: int, *, shortcut: bool
    ) -> None:
        kernel, entrance = stage.kernel, (self.at, self.axis)
        out = self.axis if shortcut else self.group(slots)
        before = len(self.tensors)
        if not shortcut:
            self.conv(f"{path}.shortcut", out, 1, stride, act=False)
        projection = dict(list(self.tensors.items())[before:])
        short, (self.at, self.axis) = self.at, entrance
        if stage.block == "basic":
            self.conv(f"{path}.body.0", self.group(slots), kernel, stride)
            self.conv(f"{path}.body.1", out, kernel, act=False)
        else:
            inner = [channels // stage.expansion for channels in slots]
            self.conv(f"{path}.body.0", self.group(inner), 1)
            self.conv(f"{path}.body.1", self.group(inner), kernel, stride)
            self.conv(f"{path}.body.2", out, 1, act=False)
        for name in projection:  # the shortcut's tensors come after the body's
            self.tensors[name] = self.tensors.pop(name)
        self.join(path, short)
        self.act(f"{path}.act")
