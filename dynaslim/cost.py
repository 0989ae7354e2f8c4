"""What a route costs: multiply-adds and parameters as pure functions of the spec.

Nothing is run, hooked or cached on a module. `layer_costs` walks the same stages and blocks that
`dynaslim.nn` builds, and the tests hold the sum against torch's own FLOP counter. A table of costs,
counted or measured, can be kept in a JSON file.
A multiply-add (MAdd) is counted for convolutions and linear layers; biases and normalisation are
free, as in the papers. The released DS-Net code also adds one per input element of every average
pool; so do we, unless `pooling=False`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dynaslim._files import validated
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.errors import check
from dynaslim.graph import AnySpec, GraphSpec
from dynaslim.spec import GATE_AT_ENTRANCE, NetSpec, Route, StageSpec, Width

if TYPE_CHECKING:
    import torch

ImageSize = int | tuple[int, int]
"""Side of a square image, or (height, width), in pixels."""

Unit = Literal["madds", "ms"]


class LayerCost(NamedTuple):
    """The cost of one layer along one route."""

    segment: int
    name: str
    madds: int
    pool_adds: int
    params: int
    slimming_head: bool = False


class SegmentShape(NamedTuple):
    """The sizes of a segment along one route, per image."""

    out: tuple[int, int, int]
    """Channels, height and width of the features that leave it; (classes, 1, 1) at the end."""
    peak: int
    """Values of its largest feature map."""


class _Walk:
    """Walks the layers in forward order, keeping track of channels and feature-map size."""

    def __init__(self, spec: NetSpec, image_size: ImageSize) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        spec.check_image_size(*size)
        self.spec = spec
        self.size = size
        self.segment = 0
        self.channels = spec.in_channels

    def shrink(self, stride: int) -> None:
        # "same" padding by kernel // 2 with an odd kernel: the output is ceil(input / stride)
        self.size = (-(-self.size[0] // stride), -(-self.size[1] // stride))

    def conv(
        self, name: str, out: int, kernel: int, stride: int = 1, depthwise: bool = False
    ) -> LayerCost:
        """A convolution with BN behind it."""
        self.shrink(stride)
        weights = out * kernel**2 * (1 if depthwise else self.channels)
        self.channels = out
        pixels = self.size[0] * self.size[1]
        return LayerCost(self.segment, name, weights * pixels, 0, weights + 2 * out)

    def gate(self, name: str, stage: StageSpec, block: int, max_in: int) -> Iterator[LayerCost]:
        """Attention head of a block, and the slimming head where it has a gate."""
        gated = block == 0 and stage.gate is not None
        if self.spec.attention_at == "gated" and not gated:
            return
        hidden = gate_hidden(self.spec, max_in)
        pooled = self.channels * self.size[0] * self.size[1]
        weights = 2 * hidden * self.channels
        params = weights + hidden + self.channels
        yield LayerCost(self.segment, f"{name}.attention", weights, pooled, params)
        if gated and stage.gate is not None:
            head = hidden * len(stage.gate.choices)
            yield LayerCost(self.segment, f"{name}.slimming", head, 0, head, slimming_head=True)
            self.segment += 1


def gate_hidden(spec: NetSpec, max_in: int) -> int:
    """Hidden width of a gate in a block whose largest input width is `max_in`."""
    return max(1, round(spec.reduction * max_in))


def layer_costs(spec: NetSpec, route: Route, image_size: ImageSize) -> Iterator[LayerCost]:
    """Every layer's cost along a route, in forward order.

    Raises:
        UsageError: if the route is none of the network's or the image is too small for it.
    """
    return _layers(_Walk(spec, image_size), spec.segment_indices(route))


def _layers(walk: _Walk, indices: Sequence[int]) -> Iterator[LayerCost]:
    """The layers of a walk; between two of them the walk stands behind the former."""
    spec = walk.spec
    max_in = spec.in_channels
    for number, stage in enumerate(spec.stages):
        gate = spec.gate_of(number)
        width = spec.width(number, indices[0 if gate is None else gate + 1])
        for block in range(stage.blocks):
            yield from _block(walk, stage, number, block, width, max_in)
            max_in = stage.widths[-1]
    pooled = walk.channels * walk.size[0] * walk.size[1]
    weights = walk.channels * spec.num_classes
    yield LayerCost(walk.segment, "classifier", weights, pooled, weights + spec.num_classes)


def _block(
    walk: _Walk, stage: StageSpec, number: int, block: int, width: Width, max_in: int
) -> Iterator[LayerCost]:
    name = f"stages.{number}.{block}"
    stride = stage.stride if block == 0 else 1
    out = width.channels
    if GATE_AT_ENTRANCE.get(stage.block, False):
        yield from walk.gate(name, stage, block, max_in)
    match stage.block:
        case "conv":
            yield walk.conv(f"{name}.conv", out, stage.kernel, stride)
            if stage.max_pool:
                walk.shrink(2)
        case "depthwise_separable":
            yield walk.conv(f"{name}.dw", walk.channels, stage.kernel, stride, depthwise=True)
            yield from walk.gate(name, stage, block, max_in)
            yield walk.conv(f"{name}.pw", out, 1)
        case "inverted_residual":
            if stage.expansion != 1:
                yield walk.conv(f"{name}.expand", walk.channels * stage.expansion, 1)
            yield walk.conv(f"{name}.dw", walk.channels, stage.kernel, stride, depthwise=True)
            yield from walk.gate(name, stage, block, max_in)
            yield walk.conv(f"{name}.project", out, 1)
        case "basic":
            yield from _shortcut(walk, name, out, stride, project=block == 0)
            yield walk.conv(f"{name}.conv1", out, stage.kernel, stride)
            yield walk.conv(f"{name}.conv2", out, stage.kernel)
        case "bottleneck":
            yield from _shortcut(walk, name, out, stride, project=block == 0)
            inner = out // stage.expansion
            yield walk.conv(f"{name}.conv1", inner, 1)
            yield walk.conv(f"{name}.conv2", inner, stage.kernel, stride)
            yield walk.conv(f"{name}.conv3", out, 1)


def _shortcut(
    walk: _Walk, name: str, out: int, stride: int, *, project: bool
) -> Iterator[LayerCost]:
    if not project:
        return
    channels, size = walk.channels, walk.size
    yield walk.conv(f"{name}.shortcut", out, 1, stride)
    walk.channels, walk.size = channels, size


@lru_cache(maxsize=4096)
def _segment_totals(
    spec: AnySpec, route: Route, image_size: ImageSize, pooling: bool, slimming_heads: bool
) -> tuple[int, ...]:
    if isinstance(spec, GraphSpec):
        return _graph_totals(spec, route, image_size, slimming_heads)
    if isinstance(spec, CascadeSpec):
        spec.check_image_size(*((image_size,) * 2 if isinstance(image_size, int) else image_size))
        return 0, spec.rung(route).madds
    totals = [0] * spec.num_segments
    for layer in layer_costs(spec, route, image_size):
        if slimming_heads or not layer.slimming_head:
            totals[layer.segment] += layer.madds + (layer.pool_adds if pooling else 0)
    return tuple(totals)


def _graph_totals(
    spec: GraphSpec, route: Route, image_size: ImageSize, slimming_heads: bool
) -> tuple[int, ...]:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    spec.check_image_size(*size)
    indices = spec.segment_indices(route)
    totals = []
    for segment in spec.segments:
        form = spec.form(segment, indices)
        gate = segment < len(spec.gates) and not slimming_heads
        totals.append(form.madds - (spec.gate_madds(segment, form.out[0]) if gate else 0))
    return tuple(totals)


@lru_cache(maxsize=4096)
def segment_shapes(
    spec: AnySpec, route: Route, image_size: tuple[int, int]
) -> tuple[SegmentShape, ...]:
    """The sizes of every segment along a route, for images of (height, width) in pixels.

    Raises:
        UsageError: if the route is none of the network's or the image is too small for it.
    """
    if isinstance(spec, GraphSpec):
        spec.check_image_size(*image_size)
        indices = spec.segment_indices(route)
        forms = [spec.form(segment, indices) for segment in spec.segments]
        return tuple(SegmentShape(form.out, form.peak) for form in forms)
    if isinstance(spec, CascadeSpec):
        spec.check_image_size(*image_size)
        image = (spec.in_channels, *image_size)
        rung = spec.rung(route)
        return SegmentShape(image, math.prod(image)), SegmentShape(
            (spec.num_classes, 1, 1), rung.peak
        )
    walk = _Walk(spec, image_size)
    outs: list[tuple[int, int, int]] = []
    peaks = [0] * spec.num_segments
    for layer in _layers(walk, spec.segment_indices(route)):
        height, width = walk.size
        peaks[layer.segment] = max(peaks[layer.segment], walk.channels * height * width)
        if layer.slimming_head:
            outs.append((walk.channels, height, width))
    outs.append((spec.num_classes, 1, 1))
    return tuple(SegmentShape(out, peak) for out, peak in zip(outs, peaks, strict=True))


def madds(
    spec: AnySpec,
    route: Route | str | Sequence[int],
    image_size: ImageSize,
    *,
    pooling: bool = True,
    slimming_heads: bool = False,
) -> int:
    """Multiply-adds of one image along a route; `image_size` in pixels.

    Without `pooling` it equals `torch.utils.flop_counter.FlopCounterMode` / 2 of the static
    forward. `slimming_heads` adds what deciding costs, which a static forward does not pay.

    Raises:
        UsageError: if the route is none of the network's or the image is too small for it.
    """
    checked = spec.coerce_route(route)
    return sum(_segment_totals(spec, checked, image_size, pooling, slimming_heads))


def params(spec: AnySpec, route: Route | str | Sequence[int] | None = None) -> int:
    """Parameters of the whole supernet with its gates, or of the sub-network along a route."""
    if isinstance(spec, GraphSpec):
        indices = spec.segment_indices(spec.largest if route is None else spec.coerce_route(route))
        return sum(spec.form(segment, indices).params for segment in spec.segments)
    if isinstance(spec, CascadeSpec):
        rungs = spec.rungs if route is None else (spec.rung(spec.coerce_route(route)),)
        return sum(rung.params for rung in rungs)
    if route is None:
        largest = layer_costs(spec, spec.largest, spec.total_stride)
        return sum(layer.params for layer in largest)
    return sum(
        layer.params
        for layer in layer_costs(spec, spec.coerce_route(route), spec.total_stride)
        if not layer.slimming_head
    )


@dataclass(frozen=True)
class CostTable:
    """Cost of every segment form: `segments[j][a][b]` for in-choice a and out-choice b.

    Choices count the options of the gates on either side (position in `GateSpec.choices`, not
    width index); the trunk is 1x1, the segment behind the first gate 1xK. Unit: MAdds or ms per
    image, slimming heads and attention included.
    """

    unit: Unit
    segments: tuple[tuple[tuple[float, ...], ...], ...]

    @classmethod
    @lru_cache(maxsize=256)
    def from_madds(cls, spec: AnySpec, image_size: ImageSize) -> CostTable:
        """The table of MAdds for an image size in pixels."""
        choices = [(0,), *(gate.choices for gate in spec.gates)]
        segments = []
        for j in range(spec.num_segments):
            rows = []
            for before in choices[max(j - 1, 0)]:
                row = []
                for after in choices[j] if j else (0,):
                    # any route whose gates around segment j are (before, after) has its form
                    indices = [before] * max(j - 1, 0) + [after] * (len(spec.gates) - max(j - 1, 0))
                    route = spec.route_at(indices)
                    row.append(float(_segment_totals(spec, route, image_size, True, True)[j]))
                rows.append(tuple(row))
            segments.append(tuple(rows))
        return cls("madds", tuple(segments))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], spec: AnySpec) -> CostTable:
        """Rebuild a table from `to_dict` and check that it is one for the network's gates.

        Raises:
            UsageError: for missing or unknown keys, an unknown unit, shapes that are not the
                network's, or costs that are not finite numbers of at least 0.
        """
        table = validated(data, cls, "cost table", whole=True)
        table.check_fits(spec)
        return table

    def check_fits(self, spec: AnySpec) -> None:
        """Raise `UsageError` unless the table is one for the network's gates."""
        shapes = _segment_shapes(spec)
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
        """Cost of one image that takes the last option of every gate."""
        return self.route_cost([len(segment[0]) - 1 for segment in self.segments[1:]])

    def route_cost(self, choices: Sequence[int]) -> float:
        """Cost of one image whose gate g took its option number `choices[g]`."""
        path = (0, *choices)
        total = self.segments[0][0][0]
        for j in range(1, len(self.segments)):
            total += self.segments[j][path[j - 1]][path[j]]
        return total

    def expected(self, gates: Sequence[torch.Tensor]) -> torch.Tensor:
        """Cost per image (B,) of one-hot or soft gates, one (B, K) tensor each; differentiable.

        Consecutive gates enter as gᵀ·M·g', so the gradient of an option is what switching to it
        would change, which the product of two width sums is not.
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


def _segment_shapes(spec: AnySpec) -> list[tuple[int, int]]:
    """Options (before, behind) of every segment."""
    options = [1, *(len(gate.choices) for gate in spec.gates)]
    return [(1, 1), *itertools.pairwise(options)]
