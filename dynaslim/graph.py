"""A converted network as frozen data: operations, channel groups, gates. Does not import torch.

Terms: a *unit* is the smallest part that is cut as a whole, such as channel 7 of a residual stream
in all layers that read or write it. A *group* is an ordered sequence of units; a width keeps its
first n. An *axis* of a tensor gives the group and unit of each position. A *segment* is the part of
a network between two gates. One tensor crosses each gate: if a model needs several tensors there,
or one that is not a feature map, operations pack them into one before the gate and unpack it
behind it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Self

from dynaslim._files import NOT_IN_OLD_FILES, validated
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.errors import UsageError, check
from dynaslim.spec import GateSpec, NetSpec, Route, Routed

WHOLE: Final = -1
"""The group of positions that are never cut."""
IMAGE: Final = "image"
"""The name of the network's input."""
PACKED: Final = "_packed"
"""Suffix of the name of an operation that packs several tensors into one; the name before it is
that of the last of these tensors."""

Run = tuple[int, int, int, int]
"""Consecutive positions of an axis: group, first unit, number of units, positions per unit."""
Axis = tuple[Run, ...]
Units = Mapping[int, int]
"""Number of units kept, by group; groups that are not listed are whole."""


def kept_positions(axis: Axis, units: Units) -> list[int]:
    """The positions of an axis that are kept, in order."""
    found: list[int] = []
    at = 0
    for group, first, count, each in axis:
        for unit in range(first, first + count):
            if group == WHOLE or unit < units.get(group, unit + 1):
                found += range(at, at + each)
            at += each
    return found


def kept_count(axis: Axis, units: Units) -> int:
    """How many positions of an axis are kept."""
    total = 0
    for group, first, count, each in axis:
        kept = count if group == WHOLE or group not in units else units[group] - first
        total += each * min(count, max(0, kept))
    return total


@dataclass(frozen=True)
class Group:
    """Channels that are cut together, the most important units first."""

    units: int
    segment: int
    """The segment whose width index decides how many units are kept."""
    widths: tuple[int, ...]
    """Number of units kept at each width index."""


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer of the whole network."""

    axes: tuple[Axis, ...]
    kind: str
    """`weight` (trained), `constant`, or `statistics` (of batch normalisation)."""
    dtype: str = ""
    """The dtype if it is not a floating-point one, such as `int64`."""


@dataclass(frozen=True)
class Node:
    """An operation.

    `args` and `kwargs` may contain references: {"node": name} and {"tensor": name} are its inputs,
    {"axis": axis} is the number of kept positions of an axis, and {"rows": k} is k times the batch
    size (k: a number or an axis).
    """

    name: str
    op: str
    """Name of the ATen operator, such as `conv2d.default`."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    segment: int
    path: str = ""
    """Path of the module that it was captured in."""

    def reads(self, kind: str) -> list[str]:
        """Names of the operations ("node") or parameters ("tensor") that it reads."""
        found = references((self.args, self.kwargs))
        return [name for key, name in found if key == kind]


def references(value: Any) -> Iterator[tuple[str, Any]]:
    """Every reference within an argument, as (kind, target)."""
    if isinstance(value, Mapping):
        if len(value) == 1 and next(iter(value)) in ("node", "tensor", "axis", "rows"):
            yield next(iter(value.items()))
        else:
            for inner in value.values():
                yield from references(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from references(inner)


@dataclass(frozen=True)
class GateInput:
    """The feature map (B, C, H, W) whose spatial means are a gate's input."""

    node: str
    axis: Axis
    """Its channels."""


@dataclass(frozen=True)
class Operations:
    """The operations of a network and its groups of channels."""

    groups: tuple[Group, ...]
    tensors: Mapping[str, TensorSpec]
    """Parameters and buffers by name, in order of creation."""
    nodes: tuple[Node, ...]
    cuts: tuple[str, ...]
    """Operations whose results cross the gates, in order."""
    cut_axes: tuple[Axis, ...]
    """Channel axes of the tensors (B, C, H, W) that cross the gates."""
    output: str
    gate_inputs: tuple[GateInput, ...] = field(default=(), kw_only=True, metadata=NOT_IN_OLD_FILES)
    """The input of each gate; empty if gates read the tensors that cross them."""

    def gate_input(self, number: int) -> GateInput:
        """The input of a gate."""
        if self.gate_inputs:
            return self.gate_inputs[number]
        return GateInput(self.cuts[number], self.cut_axes[number])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def units(self, segment: int, before: int, choice: int) -> dict[int, int]:
        """Units kept of each group in a segment at width index `choice` behind one at `before`."""
        found = {}
        for number, group in enumerate(self.groups):
            if group.segment == segment:
                found[number] = group.widths[choice]
            elif group.segment == segment - 1:
                found[number] = group.widths[before]
        return found


@dataclass(frozen=True)
class Graph(Operations):
    """The operations of a network and its gates; the gates' tensors are the last ones."""

    gates: tuple[str, ...]
    """Paths of the modules of the choosing gates, in order."""


@dataclass(frozen=True)
class VariantCost:
    """Cost of a segment at width index `choice` behind one at `before`, for one image."""

    segment: int
    before: int
    choice: int
    madds: int
    out: tuple[int, int, int]
    """Channels, height and width of the output; (classes, 1, 1) for the last segment."""
    peak: int
    """Number of values in its largest feature map."""


@dataclass(frozen=True)
class OtherSize:
    """The parts of a converted network that differ for another image size."""

    image_size: tuple[int, int]
    nodes: tuple[Node, ...]
    """Operations that differ between any of the sizes."""
    forms: tuple[VariantCost, ...]
    cut_axes: tuple[Axis, ...] = field(default=(), metadata=NOT_IN_OLD_FILES)
    """Axes of the tensors that cross the gates; empty if equal to those of the network's size."""


@dataclass(frozen=True)
class GraphSpec(Routed, Operations):
    """The spec of a converted network, with the same interface as `NetSpec`.

    A route gives the width of each segment in percent: `100-25` runs the whole trunk and a quarter
    of the channels behind the gate.
    """

    name: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]
    """Height and width of the input images in pixels."""
    percents: tuple[int, ...]
    """Percentages of the channels behind a gate, by width index, rising to 100."""
    gates: tuple[GateSpec, ...]
    hidden: int
    """Number of hidden features of each gate."""
    forms: tuple[VariantCost, ...]
    sorted_by: str = ""
    """The criterion by which channels were sorted."""
    other_sizes: tuple[OtherSize, ...] = ()
    """Further image sizes that it was converted for; `at_size` returns the network for one."""

    def __hash__(self) -> int:
        return hash((self.name, self.num_classes, self.image_size, self.percents, self.gates))

    def __post_init__(self) -> None:
        check(len(self.gates) == len(self.cuts), "gates and cuts differ in number")
        check(self.num_classes >= 1, f"num_classes {self.num_classes}: must be at least 1")
        for gate in self.gates:
            rising = all(a < b for a, b in itertools.pairwise(gate.choices))
            inside = gate.choices and 0 <= gate.choices[0] <= gate.choices[-1] < self.num_widths
            check(
                bool(rising and inside),
                f"gate choices {gate.choices}: must be rising width indices, "
                f"0 to {self.num_widths - 1}",
            )

    # -- as NetSpec ---------------------------------------------------------------------------

    @property
    def num_widths(self) -> int:
        """Widths behind a gate; 1 for a network without gates."""
        return len(self.percents) if self.gates else 1

    @property
    def features(self) -> int:
        """Channels of the classifier's input at full width; 0 if the last layer is not linear."""
        name = self.classifier
        return 0 if name is None else kept_count(self.tensors[f"{name}.weight"].axes[1], {})

    @property
    def places(self) -> tuple[str, ...]:
        """The module behind which each gate is; the operation's name if it is in no module."""
        paths = {node.name: node.path for node in self.nodes}
        return tuple(paths[cut] or cut.removesuffix(PACKED) for cut in self.cuts)

    @property
    def classifier(self) -> str | None:
        """Name of the linear layer that computes the logits; None if there is none."""
        last = self.nodes[-1]
        names = last.reads("tensor")
        if last.op == "linear.default" and names and names[0].endswith(".weight"):
            return names[0].removesuffix(".weight")
        return None

    def route_at(self, indices: Sequence[int]) -> Route:
        """The route that takes width index `indices[g]` behind gate g.

        Raises:
            UsageError: for a wrong number of indices or one out of range.
        """
        self.check_indices(indices)
        return Route((100, *(self.percents[index] for index in indices)))

    @property
    def largest(self) -> Route:
        return self.routes[-1]

    def segment_indices(self, route: Route) -> tuple[int, ...]:
        """Width index of each segment on a route; the trunk's is 0.

        Raises:
            UsageError: if the network has no such route.
        """
        first, *rest = route.widths or (0,)
        if len(rest) != len(self.gates) or first != 100 or not set(rest) <= set(self.percents):
            raise UsageError(
                f"route {route.widths}: {self.name} takes 100 and one of {self.percents} for each "
                f"of its {len(self.gates)} gates, such as {self.smallest}"
            )
        return (0, *(self.percents.index(percent) for percent in rest))

    @property
    def usual_image_size(self) -> int:
        """The image side in pixels that it was converted for."""
        return self.image_size[0]

    def check_image_size(self, height: int, width: int) -> None:
        """Raise `UsageError` unless the image size is the one that it was converted for."""
        if (height, width) != tuple(self.image_size):
            others = ", ".join("{}x{}".format(*other.image_size) for other in self.other_sizes)
            raise UsageError(
                f"image size {height}x{width} px: {self.name} was converted for "
                f"{self.image_size[0]}x{self.image_size[1]} px"
                f"{f'; at_size gives it for {others} px' if others else ''}"
            )

    def at_size(self, height: int, width: int) -> GraphSpec:
        """The spec for another image size of those that the network was converted for.

        Raises:
            UsageError: for a size that it was not converted for.
        """
        if (height, width) == tuple(self.image_size):
            return self
        found = [o for o in self.other_sizes if tuple(o.image_size) == (height, width)]
        if not found:
            self.check_image_size(height, width)
        own, changed = found[0], {node.name: node for node in found[0].nodes}
        mine = OtherSize(
            self.image_size,
            tuple(node for node in self.nodes if node.name in changed),
            self.forms,
            self.cut_axes,
        )
        return dataclasses.replace(
            self,
            image_size=own.image_size,
            nodes=tuple(changed.get(node.name, node) for node in self.nodes),
            forms=own.forms,
            cut_axes=own.cut_axes or self.cut_axes,
            other_sizes=(mine, *(other for other in self.other_sizes if other is not own)),
        )

    def replace(self, **changes: Any) -> GraphSpec:
        """A copy with fields replaced; `num_classes` resizes the classifier.

        Raises:
            UsageError: if the number of classes changes but the last layer is not linear.
        """
        classes = changes.get("num_classes", self.num_classes)
        if classes != self.num_classes:
            name = self.classifier
            if name is None:
                raise UsageError(f"{self.name}: does not end in a linear layer, keeps its classes")
            rows: Axis = ((WHOLE, 0, classes, 1),)
            tensors = dict(self.tensors)
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in tensors:
                    old = tensors[key]
                    tensors[key] = dataclasses.replace(old, axes=(rows, *old.axes[1:]))
            changes["tensors"] = tensors
            changes["forms"] = tuple(self._with_classes(variant, classes) for variant in self.forms)
            changes["other_sizes"] = tuple(
                dataclasses.replace(
                    other,
                    forms=tuple(self._with_classes(variant, classes) for variant in other.forms),
                )
                for other in self.other_sizes
            )
        return dataclasses.replace(self, **changes)

    def _with_classes(self, variant: VariantCost, classes: int) -> VariantCost:
        if variant.segment != self.num_segments - 1:
            return variant
        axis = self.tensors[f"{self.classifier}.weight"].axes[1]
        inside = kept_count(axis, self.units(variant.segment, variant.before, variant.choice))
        more = (classes - self.num_classes) * inside
        return dataclasses.replace(variant, madds=variant.madds + more, out=(classes, 1, 1))

    def with_choices(self, *choices: Sequence[int]) -> GraphSpec:
        """A copy with another routing space: one sequence of width indices per gate, or for all."""
        return dataclasses.replace(self, gates=self._gates_of(choices))

    def to_dict(self) -> dict[str, Any]:
        return {"graph": dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphSpec:
        """Rebuild a spec from `to_dict`.

        Raises:
            UsageError: for unknown or missing fields, or values of another type.
        """
        return validated(data["graph"], cls, "not a converted network")

    @cached_property
    def graph(self) -> Graph:
        """The operations, with gates that only choose a width and do not scale channels."""
        tensors = dict(self.tensors)
        hidden: Axis = ((WHOLE, 0, self.hidden, 1),)
        for number, gate in enumerate(self.gates):
            axis = self.gate_input(number).axis
            choices: Axis = ((WHOLE, 0, len(gate.choices), 1),)
            tensors[f"gates.{number}.reduce_weight"] = TensorSpec((hidden, axis), "weight")
            tensors[f"gates.{number}.reduce_bias"] = TensorSpec((hidden,), "weight")
            tensors[f"gates.{number}.slimming_weight"] = TensorSpec((choices, hidden), "weight")
        gates = tuple(f"gates.{number}" for number in range(len(self.gates)))
        return Graph(
            *(self.groups, tensors, self.nodes, self.cuts, self.cut_axes, self.output, gates),
            gate_inputs=self.gate_inputs,
        )

    # -- costs --------------------------------------------------------------------------------

    @cached_property
    def costs(self) -> dict[tuple[int, int, int], VariantCost]:
        """Costs by (segment, before, choice)."""
        return {(f.segment, f.before, f.choice): f for f in self.forms}

    def gate_madds(self, segment: int, before: int, choice: int) -> int:
        """Multiply-adds of the gate at the end of a segment; 0 for the last segment."""
        if segment == len(self.gates):
            return 0
        channels = kept_count(self.gate_input(segment).axis, self.units(segment, before, choice))
        return self.hidden * (channels + len(self.gates[segment].choices))


AnySpec = NetSpec | GraphSpec | CascadeSpec


def spec_from_dict(data: Mapping[str, Any]) -> AnySpec:
    """Rebuild the spec of a zoo network, a converted network or a cascade from `to_dict`.

    Raises:
        UsageError: for unknown or missing fields, or values of another type.
    """
    if "cascade" in data:
        return CascadeSpec.from_dict(data)
    return GraphSpec.from_dict(data) if "graph" in data else NetSpec.from_dict(data)
