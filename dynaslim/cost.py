"""The cost of a route: multiply-adds and parameters as pure functions of the spec.

No network is run, and modules get no hooks. `segment_cost` walks the operations that `dynaslim.nn`
runs; the tests compare the sum with torch's FLOP counter. The costs of a converted network were
counted at conversion, with `operation_madds`. A table of costs, counted or measured, can be stored
in a JSON file (`dynaslim.cost_file`).

Multiply-adds (MAdds) are counted for convolutions and linear layers, not for biases and
normalisation, as in the papers and in torch's FLOP counter. The released DS-Net code also adds one
per input element of every average pool. We do the same for networks of the zoo, so that their
numbers are the published ones; `pooling=False` turns this off. A converted network has no published
numbers to match, so its costs are multiply-adds only: use `pooling=False` to compare one of the zoo
with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dynaslim._files import validated
from dynaslim.blocks import graph_of
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.errors import check
from dynaslim.graph import (
    IMAGE,
    AnySpec,
    GraphSpec,
    Node,
    Operations,
    Units,
    kept_count,
)
from dynaslim.spec import NetSpec, Route

if TYPE_CHECKING:
    import torch

ImageSize = int | tuple[int, int]
"""Side of a square image, or (height, width), in pixels."""

Unit = Literal["madds", "ms"]


class SegmentCost(NamedTuple):
    """The cost of one variant of a segment (one width in, one width out), for one image."""

    madds: int
    """Multiply-adds of convolutions, linear layers and attention heads."""
    pool_adds: int
    """Additions of average pooling, one for each value."""
    head_madds: int
    """Multiply-adds of the gate's decision at the end of the segment."""
    params: int
    head_params: int
    out: tuple[int, int, int]
    """Channels, height and width of the output features; (classes, 1, 1) for the last segment."""
    peak: int
    """Number of values in its largest feature map."""


def operation_madds(kind: str, inputs: Sequence[Sequence[int]], out: Sequence[int]) -> int:
    """Multiply-adds of an operation, such as `conv2d`, from the shapes of its inputs and output."""
    if kind == "conv_transpose2d":
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if kind.startswith("conv"):
        return math.prod(out) * math.prod(inputs[1][1:])
    if kind == "linear":
        return math.prod(out) * inputs[1][1]
    if kind in ("matmul", "bmm"):
        return math.prod(out) * inputs[0][-1]
    if kind == "scaled_dot_product_attention":
        return 2 * math.prod(inputs[0]) * inputs[1][-2]
    return 0


@lru_cache(maxsize=8192)
def segment_cost(
    spec: AnySpec, segment: int, before: int, choice: int, size: tuple[int, int]
) -> SegmentCost:
    """The cost of a segment at width index `choice` behind one at `before`.

    `size` is the height and width of the images in pixels.

    Raises:
        UsageError: if the image is too small for the network.
    """
    if isinstance(spec, GraphSpec):
        spec = spec.at_size(*size)
        variant = spec.costs[segment, before, choice]
        gate = spec.gate_madds(segment, before, choice)
        graph, units = graph_of(spec), spec.units(segment, before, choice)
        own = [
            name for node in spec.nodes if node.segment == segment for name in _weights(graph, node)
        ]
        params = _values(graph, own, units)
        head = 0
        if segment < len(spec.gates):
            parts = ("reduce_weight", "reduce_bias", "slimming_weight")
            head = _values(graph, [f"{graph.gates[segment]}.{part}" for part in parts], units)
        return SegmentCost(variant.madds - gate, 0, gate, params, head, variant.out, variant.peak)
    spec.check_image_size(*size)
    if isinstance(spec, CascadeSpec):
        image, trunk = (spec.in_channels, *size), spec.trunk
        if segment == 0 and trunk is None:
            return SegmentCost(0, 0, 0, 0, 0, image, math.prod(image))
        if segment == 0 and trunk is not None:
            leaving = (trunk.values, 1, 1)
            return SegmentCost(trunk.madds, 0, 0, trunk.params, 0, leaving, trunk.peak)
        out = (spec.num_classes, 1, 1)
        madds, params = spec.behind_trunk(choice)
        return SegmentCost(madds, 0, 0, params, 0, out, spec.rungs[choice].peak)
    graph = graph_of(spec)
    units = graph.units(segment, before, choice)
    source, shape = IMAGE, (spec.in_channels, *size)
    if segment:
        source = graph.cuts[segment - 1]
        channels = kept_count(graph.cut_axes[segment - 1], units)
        shape = (channels, *segment_cost(spec, segment - 1, 0, 0, size).out[1:])
    shapes = {source: shape}
    madds = pool_adds = head = params = peak = 0

    def shape_of(name: str) -> tuple[int, ...]:
        return tuple(kept_count(axis, units) for axis in graph.tensors[name].axes)

    def linear(weight: tuple[int, ...]) -> int:
        return operation_madds("linear", [weight[1:], weight], weight[:1])

    def attention(path: str) -> None:
        nonlocal madds, params, pool_adds
        pool_adds += math.prod(shape)
        for part in ("reduce", "expand"):
            weight, bias = shape_of(f"{path}.{part}_weight"), shape_of(f"{path}.{part}_bias")
            madds += linear(weight)
            params += math.prod(weight) + math.prod(bias)

    for node in (node for node in graph.nodes if node.segment == segment):
        shape = shapes[node.reads("node")[0]]
        weights = list(map(shape_of, _weights(graph, node)))
        kind = node.op.partition(".")[0]
        if kind == "gate":
            attention(node.name)
        elif kind == "mean":
            pool_adds += math.prod(shape)
            shape = (shape[0], 1, 1)
        elif kind in ("conv2d", "max_pool2d"):
            # "same" padding by kernel // 2 with an odd kernel: the output is ceil(input / stride)
            stride = node.args[3 if kind == "conv2d" else 2][0]
            shape = (shape[0], -(-shape[1] // stride), -(-shape[2] // stride))
        if kind in ("conv2d", "linear"):
            shape = (weights[0][0], *shape[1:])
        madds += operation_madds(kind, [(), *weights], shape)
        params += sum(map(math.prod, weights))
        if kind != "linear":
            peak = max(peak, math.prod(shape))
        shapes[node.name] = shape
    if segment < len(spec.gates):
        shape = shapes[graph.cuts[segment]]
        attention(graph.gates[segment])
        head = linear(shape_of(f"{graph.gates[segment]}.slimming_weight"))
    return SegmentCost(madds, pool_adds, head, params, head, shape, peak)


def _weights(graph: Operations, node: Node) -> list[str]:
    """Names of the trained parameters that an operation reads."""
    return [name for name in node.reads("tensor") if graph.tensors[name].kind == "weight"]


def _values(graph: Operations, names: Iterable[str], units: Units) -> int:
    """Number of values that are kept of the named parameters, each counted once."""
    axes = (graph.tensors[name].axes for name in dict.fromkeys(names))
    return sum(math.prod(kept_count(axis, units) for axis in own) for own in axes)


def route_costs(spec: AnySpec, route: Route, image_size: ImageSize) -> list[SegmentCost]:
    """The cost of every segment on a route."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    indices = spec.segment_indices(route)
    if isinstance(spec, CascadeSpec):  # a rung that runs alone does not need the shared trunk
        spec = replace(spec, trunk=None)
    path = itertools.pairwise((indices[0], *indices))
    return [segment_cost(spec, number, a, b, size) for number, (a, b) in enumerate(path)]


def madds(
    spec: AnySpec,
    route: Route | str | Sequence[int],
    image_size: ImageSize,
    *,
    pooling: bool = True,
    slimming_heads: bool = False,
) -> int:
    """Multiply-adds of one image along a route; `image_size` in pixels.

    `pooling` counts the additions of average pooling in a network of the zoo. Without it the result
    is half of what `torch.utils.flop_counter.FlopCounterMode` counts in the static forward pass.
    `slimming_heads` adds the cost of the gates' decisions, which a static forward does not have.

    Raises:
        UsageError: if the network has no such route or the image is too small for it.
    """
    return sum(
        cost.madds + pooling * cost.pool_adds + slimming_heads * cost.head_madds
        for cost in route_costs(spec, spec.coerce_route(route), image_size)
    )


def params(spec: AnySpec, route: Route | str | Sequence[int] | None = None) -> int:
    """Number of parameters of the supernet with its gates, or of the sub-network along a route."""
    if isinstance(spec, CascadeSpec) and route is None:
        trunk = 0 if spec.trunk is None else spec.trunk.params
        return trunk + sum(spec.behind_trunk(number)[1] for number in range(len(spec.rungs)))
    size = _any_size(spec)
    costs = route_costs(spec, spec.largest if route is None else spec.coerce_route(route), size)
    return sum(cost.params + (route is None) * cost.head_params for cost in costs)


def program_params(spec: AnySpec) -> int:
    """Total parameters of a routed network's programs, one for every variant of every segment.

    Programs of ONNX Runtime and OpenVINO each have their own weights; torch programs share them.
    """
    if isinstance(spec, CascadeSpec):
        return params(spec)
    costs = (
        segment_cost(spec, number, a, b, _any_size(spec))
        for number, (before, behind) in enumerate(segment_choices(spec))
        for a, b in itertools.product(before, behind)
    )
    return sum(cost.params + cost.head_params for cost in costs)


def _any_size(spec: AnySpec) -> tuple[int, int]:
    """A valid image size, for counting parameters, whose number does not depend on it."""
    if isinstance(spec, GraphSpec):
        return spec.image_size
    side = spec.total_stride if isinstance(spec, NetSpec) else spec.usual_image_size
    return side, side


def segment_choices(spec: AnySpec) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The width indices that are possible before and behind every segment."""
    return itertools.pairwise([(0,), (0,), *(gate.choices for gate in spec.gates)])


@dataclass(frozen=True)
class CostTable:
    """The cost of every variant: `segments[j][a][b]` for segment j, option a in, option b out.

    Options are positions in `GateSpec.choices` of the gates on either side, not width indices. The
    trunk's table is 1x1, that of the segment behind the first gate 1xK. The unit is MAdds or ms per
    image, including slimming heads and attention.
    """

    unit: Unit
    segments: tuple[tuple[tuple[float, ...], ...], ...]

    @classmethod
    @lru_cache(maxsize=256)
    def from_madds(cls, spec: AnySpec, image_size: ImageSize) -> CostTable:
        """The table of MAdds for an image size in pixels."""
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        segments = []
        for number, (before, after) in enumerate(segment_choices(spec)):
            costs = [[segment_cost(spec, number, a, b, size) for b in after] for a in before]
            segments.append(
                tuple(
                    tuple(float(c.madds + c.pool_adds + c.head_madds) for c in row) for row in costs
                )
            )
        return cls("madds", tuple(segments))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], spec: AnySpec) -> CostTable:
        """Rebuild a table from `to_dict` and check that it fits the network's gates.

        Raises:
            UsageError: for missing or unknown keys, an unknown unit, shapes that do not fit the
                network, or costs that are not finite numbers of at least 0.
        """
        table = validated(data, cls, "cost table", whole=True)
        table.check_fits(spec)
        return table

    def check_fits(self, spec: AnySpec) -> None:
        """Raise `UsageError` unless shapes and costs of the table are valid for the network."""
        shapes = [(len(before), len(behind)) for before, behind in segment_choices(spec)]
        check(
            len(self.segments) == len(shapes),
            f"segments: {spec.name} has {len(shapes)}, expected a list of so many tables",
        )
        for j, (table, (rows, columns)) in enumerate(zip(self.segments, shapes, strict=True)):
            fits = len(table) == rows and all(len(row) == columns for row in table)
            check(fits, f"segment {j}: expected {rows} rows of {columns} costs")
            for value in itertools.chain.from_iterable(table):
                check(
                    math.isfinite(value) and value >= 0,
                    f"segment {j}: cost {value!r} must be a finite number of at least 0",
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {"unit": self.unit, "segments": [[list(r) for r in t] for t in self.segments]}

    @property
    def widest_cost(self) -> float:
        """Cost of one image for which every gate takes its last option."""
        return self.route_cost([len(segment[0]) - 1 for segment in self.segments[1:]])

    def route_cost(self, choices: Sequence[int]) -> float:
        """Cost of one image for which gate g takes option `choices[g]`."""
        path = (0, *choices)
        total = self.segments[0][0][0]
        for j in range(1, len(self.segments)):
            total += self.segments[j][path[j - 1]][path[j]]
        return total

    def expected(self, gates: Sequence[torch.Tensor]) -> torch.Tensor:
        """Cost per image (B,) of one-hot or soft gates, one (B, K) tensor each; differentiable.

        Consecutive gates g and g' contribute gᵀ·M·g', where M is the segment's table. The gradient
        for an option is then the change in cost from switching to it; a product of two expected
        widths does not have this property.
        """
        import torch

        first = gates[0]
        total = first.new_full((first.shape[0],), self.segments[0][0][0])
        before = first.new_ones(first.shape[0], 1)
        for gate_BK, segment in zip(gates, self.segments[1:], strict=True):
            matrix = torch.tensor(segment, dtype=gate_BK.dtype, device=gate_BK.device)
            total = total + ((before @ matrix) * gate_BK).sum(1)
            before = gate_BK
        return total
