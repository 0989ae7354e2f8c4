"""A converted network: the operations of a `GraphSpec` with one set of weights, at any width.

Suffixes: B rows, C channels, H W pixels, K choices of a gate, N classes.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaslim.graph import AnySpec, Axis, GraphSpec, Node, Units, kept_count, kept_positions
from dynaslim.nn.functional import AnyWidth, SoftWidth
from dynaslim.nn.gate import Gate
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.nn.net import Choose, ElasticNet, GatedOutput, SegmentOutput, SlimNet

IMAGE = "image"
"""The name of the network's input."""

Slicer = int | tuple[int, ...] | None
"""What is left of an axis: the first so many positions, these, or (None) all."""


def slicer(axis: Axis, units: Units) -> Slicer:
    """What is left of an axis."""
    kept, whole = kept_positions(axis, units), kept_count(axis, {})
    if len(kept) == whole:
        return None
    return len(kept) if kept == list(range(len(kept))) else tuple(kept)


def cut(tensor: Tensor, slicers: Sequence[Slicer]) -> Tensor:
    """A tensor with what is left of each axis: a view where the first positions are."""
    for axis, left in enumerate(slicers):
        if isinstance(left, int):
            tensor = tensor.narrow(axis, 0, left)
        elif left is not None:
            tensor = tensor.index_select(axis, torch.tensor(left, device=tensor.device))
    return tensor


@dataclass(frozen=True)
class Read:
    """The result of an operation."""

    name: str


@dataclass(frozen=True)
class Cut:
    """A parameter at the widths of a program."""

    name: str
    slicers: tuple[Slicer, ...]


@dataclass(frozen=True)
class Rows:
    """So many times the rows of the batch."""

    times: int


@dataclass(frozen=True)
class Step:
    """An operation of a program: its arguments are plain values, `Read`, `Cut` and `Rows`."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    norm: tuple[str, int] | None = None
    """Of batch normalisation, the module and the slot of its statistics."""


def program(spec: GraphSpec, segment: int, before: int, choice: int) -> list[Step]:
    """A segment's operations at width index `choice` behind one at `before`."""
    units = spec.units(segment, before, choice)

    def resolve(value: Any) -> Any:
        if isinstance(value, Mapping):
            ((key, inner),) = value.items()
            if key == "node":
                return Read(inner)
            if key == "rows":
                return Rows(inner if isinstance(inner, int) else kept_count(inner, units))
            if key == "axis":
                return kept_count(inner, units)
            if key == "dtype":
                return getattr(torch, inner)
            axes = spec.tensors[inner].axes
            return Cut(inner, tuple(slicer(axis, units) for axis in axes))
        if isinstance(value, list | tuple):
            return [resolve(inner) for inner in value]
        return value

    steps = []
    for node in spec.nodes:
        if node.segment != segment:
            continue
        kwargs = {name: resolve(value) for name, value in node.kwargs.items()}
        norm = None
        if node.op == "batch_norm.default":
            norm = (norm_of(node), norm_slot(spec, node, before, choice))
        steps.append(Step(node.name, node.op, tuple(map(resolve, node.args)), kwargs, norm))
    return steps


def norm_of(node: Node) -> str:
    """The module that keeps a batch normalisation's statistics."""
    return str(node.args[3]["tensor"]).removesuffix(".running_mean")


def norm_slot(spec: GraphSpec, node: Node, before: int, choice: int) -> int:
    """The statistics that a batch normalisation uses: of what feeds it, at its own width."""
    if node.segment == 0:
        return 0
    axis = spec.tensors[node.args[3]["tensor"]].axes[0]
    segments = {spec.groups[run[0]].segment for run in axis if run[0] >= 0}
    return before if segments and max(segments) < node.segment and before >= 0 else choice


def overload(op: str) -> Any:
    """The function of an operation."""
    if op == "getitem":
        return operator.getitem
    name, _, kind = op.partition(".")
    return getattr(getattr(torch.ops.aten, name), kind)


class GraphNorm(SlimBatchNorm2d):
    """Batch normalisation of a converted network: which channels a width keeps is a list."""

    def __init__(
        self, kept: Sequence[Slicer], channels: int, *, eps: float, momentum: float | None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        # the last slot is that of the whole network, so the widest of them has all channels
        counts = [_count(left, channels) for left in kept]
        super().__init__(counts, eps=eps, momentum=momentum, device=device, dtype=dtype)
        self.kept = tuple(kept)

    def forward(self, x: Tensor, width: AnyWidth) -> Tensor:
        """Normalise x (B, C, ...) with the statistics of a slot."""
        assert not isinstance(width, SoftWidth)
        mean, var, weight, bias = self.affine(width)
        momentum = self._count_batch(width)
        left = self.kept[width]
        if self.training and isinstance(left, tuple):  # of a copy; written back
            out = F.batch_norm(x, mean, var, weight, bias, True, momentum, self.eps)
            index = torch.tensor(left, device=x.device)
            self.running_mean[width].index_copy_(0, index, mean.to(self.running_mean.dtype))
            self.running_var[width].index_copy_(0, index, var.to(self.running_var.dtype))
            return out
        return F.batch_norm(x, mean, var, weight, bias, self.training, momentum, self.eps)

    def affine(self, slot: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, scale and shift of what a slot keeps."""
        left = (self.kept[slot],)
        return (
            cut(self.running_mean[slot], left),
            cut(self.running_var[slot], left),
            cut(self.weight, left),
            cut(self.bias, left),
        )


def _count(left: Slicer, whole: int) -> int:
    if left is None:
        return whole
    return left if isinstance(left, int) else len(left)


_Compiled = tuple[tuple[Step, Any, tuple[str, ...]], ...]
"""Steps of a program, each with its function and the results that nothing needs after it."""


# beside the networks: what is made at run time is neither copied nor saved with them
_PROGRAMS: WeakKeyDictionary[GraphNet, dict[tuple[int, int, int], _Compiled]] = WeakKeyDictionary()
_MODULES: WeakKeyDictionary[GraphNet, dict[str, weakref.ref[nn.Module]]] = WeakKeyDictionary()


class GraphNet(ElasticNet):
    """A converted network, used as `SlimNet` is; parameters have the names they had.

    `net(x, route)` runs one sub-network, `net.segment(j, x, index)` a piece of it.
    """

    spec: GraphSpec

    def __init__(
        self,
        spec: GraphSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norms = {norm_of(node): node for node in spec.nodes if node.op == "batch_norm.default"}
        for name, node in norms.items():
            _put(self, name, self._norm(node, place))
        for name, tensor in spec.tensors.items():
            path, _, leaf = name.rpartition(".")
            if tensor.kind == "statistics" or (path in norms and leaf in ("weight", "bias")):
                continue
            shape = [kept_count(axis, {}) for axis in tensor.axes]
            made = torch.empty(shape, **place)
            if tensor.dtype:
                made = made.to(getattr(torch, tensor.dtype))
            if tensor.kind == "weight":
                nn.init.normal_(made, std=0.01)
                _put(self, name, nn.Parameter(made))
            else:
                _put(self, name, made.zero_())
        gates = []
        for axis, gate in zip(spec.cut_axes, spec.gates, strict=True):
            channels = kept_count(axis, {})
            gates.append(Gate(channels, spec.hidden, len(gate.choices), None, **place))
        self.gates = nn.ModuleList(gates)

    def _norm(self, node: Node, place: Mapping[str, Any]) -> GraphNorm:
        spec, name = self.spec, str(node.args[3]["tensor"])
        axis = spec.tensors[name].axes[0]
        kept: list[Slicer] = [None]
        if node.segment:
            kept = []
            for index in range(spec.num_widths):
                units = {
                    g: group.widths[index] for g, group in enumerate(spec.groups) if group.segment
                }
                kept.append(slicer(axis, units))
        momentum, eps = float(node.args[6]), float(node.args[7])
        return GraphNorm(kept, kept_count(axis, {}), eps=eps, momentum=momentum, **place)

    # -- one piece ----------------------------------------------------------------------------

    def _compiled(self, segment: int, before: int, choice: int) -> _Compiled:
        programs = _PROGRAMS.setdefault(self, {})
        key = (segment, before, choice)
        if key not in programs:
            steps = program(self.spec, segment, before, choice)
            last: dict[str, int] = {}
            for number, step in enumerate(steps):
                for name in reads(step):
                    last[name] = number
            keep = {self.spec.output, *self.spec.cuts}
            programs[key] = tuple(
                (
                    step,
                    overload(step.op),
                    tuple(n for n, at in last.items() if at == number and n not in keep),
                )
                for number, step in enumerate(steps)
            )
        return programs[key]

    def run_segment(
        self,
        number: int,
        x: Tensor,
        before: int,
        choice: int,
        dropout_mask: Tensor | None = None,
        *,
        watch: Callable[[Step, Sequence[Any], Any], None] | None = None,
    ) -> Tensor:
        """A segment's operations on what the one before gives (segment 0: on images).

        `watch` is called with each operation, its arguments and its result.
        """
        spec = self.spec
        source = spec.cuts[number - 1] if number else IMAGE
        results: dict[str, Any] = {source: x}
        rows = x.shape[0]
        classifier = spec.nodes[-1].name if spec.features else None

        def value(argument: Any) -> Any:
            if isinstance(argument, Read):
                return results[argument.name]
            if isinstance(argument, Cut):
                return cut(self.tensor(argument.name), argument.slicers)
            if isinstance(argument, Rows):
                return rows * argument.times
            if isinstance(argument, list):
                return [value(inner) for inner in argument]
            return argument

        for step, function, freed in self._compiled(number, before, choice):
            if step.norm is not None:
                norm = self._module(step.norm[0])
                args = [value(step.args[0])]
                results[step.name] = norm(args[0], step.norm[1])
            else:
                args = [value(argument) for argument in step.args]
                if step.name == classifier and dropout_mask is not None:
                    args[0] = args[0] * dropout_mask
                kwargs = {name: value(argument) for name, argument in step.kwargs.items()}
                results[step.name] = function(*args, **kwargs)
            if watch is not None:
                watch(step, args, results[step.name])
            for name in freed:
                results.pop(name, None)
        last = spec.cuts[number] if number < len(spec.cuts) else spec.output
        out: Tensor = results[last]
        return out

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its name."""
        path, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self._module(path), leaf)
        return found

    def _module(self, path: str) -> nn.Module:
        modules = _MODULES.setdefault(self, {})
        if path not in modules:
            modules[path] = weakref.ref(self.get_submodule(path))
        found = modules[path]()
        assert found is not None
        return found

    def at_size(self, height: int, width: int) -> GraphNet:
        """The network for images of another size that it was converted for: with the same
        parameters, and statistics of batch normalisation of its own, which are to be recalibrated.

        Raises:
            UsageError: for a size that it was not converted for.
        """
        spec = self.spec.at_size(height, width)
        shared = {id(parameter): parameter for parameter in self.parameters()}
        made = copy.deepcopy(self, shared)
        made.spec = spec
        return made

    def before(self, number: int, x: Tensor) -> int:
        """The width index of the segment before, from the channels that come from it."""
        if number < 2:
            return 0
        axis = self.spec.cut_axes[number - 1]
        for index in range(self.spec.num_widths):
            if kept_count(axis, self.spec.units(number - 1, index, index)) == x.shape[1]:
                return index
        raise ValueError(f"segment {number}: {x.shape[1]} channels are of none of its widths")

    def segment(
        self,
        number: int,
        x: Tensor,
        choice: int | Tensor,
        *,
        decide: bool = True,
        dropout_mask: Tensor | None = None,
    ) -> SegmentOutput:
        """Run segment `number` on what the one before it returned, as `SlimNet.segment`."""
        assert isinstance(choice, int)
        x = self.run_segment(number, x, self.before(number, x), choice, dropout_mask)
        if number < len(self.gates) and decide:
            gate = self.gates[number]
            assert isinstance(gate, Gate)
            return SegmentOutput(x, gate(x, decide=True)[1])
        return SegmentOutput(x, None)

    def segment_hidden(self, number: int, x: Tensor, choice: int | Tensor) -> tuple[Tensor, Tensor]:
        """As `segment`, with the next gate's hidden features (B, R) in place of its logits."""
        assert isinstance(choice, int)
        features = self.run_segment(number, x, self.before(number, x), choice)
        gate = self.gates[number]
        assert isinstance(gate, Gate)
        return features, gate.hidden(features)

    def forward_gated(self, x: Tensor, choose: Choose) -> GatedOutput:
        """Gated forward, differentiable through the gates: the sum over all options, each times its
        gate. images (B, C, H, W) -> logits (B, N), gate logits and gates (B, K) each.

        Raises:
            RuntimeError: in training mode.
        """
        self._check_gated(x)
        gate_logits: list[Tensor] = []
        gates: list[Tensor] = []
        options: list[tuple[int, Tensor | None, Tensor]] = [(0, None, x)]
        for number in range(self.spec.num_segments):
            choices = (0,) if number == 0 else self.spec.gates[number - 1].choices
            gate_BK = gates[-1] if gates else None
            made = []
            for at, choice in enumerate(choices):
                parts = [
                    self.run_segment(number, features, before, choice)
                    * (1.0 if weight is None else _spread(weight, self._out_dims(number)))
                    for before, weight, features in options
                ]
                share = None if gate_BK is None else gate_BK[:, at]
                made.append((choice, share, torch.stack(parts).sum(0)))
            if number == len(self.gates):
                outs = [z if w is None else z * w[:, None] for _, w, z in made]
                return GatedOutput(torch.stack(outs).sum(0), tuple(gate_logits), tuple(gates))
            gate = self.gates[number]
            assert isinstance(gate, Gate)
            # a gate reads what its row has: the features of the option that it took
            hidden_BR = torch.relu(
                F.linear(
                    torch.stack([_pooled(z, w, gate) for _, w, z in made]).sum(0),
                    gate.reduce_weight,
                    gate.reduce_bias,
                )
            )
            assert gate.slimming_weight is not None
            logits_BK = F.linear(hidden_BR, gate.slimming_weight)
            gate_logits.append(logits_BK)
            gates.append(choose(logits_BK, number))
            options = made
        raise AssertionError("no last segment")

    def _out_dims(self, number: int) -> int:
        return 2 if number == len(self.gates) else 4


def _pooled(x_BCHW: Tensor, weight_B: Tensor | None, gate: Gate) -> Tensor:
    """Means of features (B, C), filled up to the gate's channels and times a row's weight."""
    pooled_BC = F.pad(x_BCHW.mean((2, 3)), (0, gate.reduce_weight.shape[1] - x_BCHW.shape[1]))
    return pooled_BC if weight_B is None else pooled_BC * weight_B[:, None]


def _spread(weight_B: Tensor, dims: int) -> Tensor:
    return weight_B.reshape(-1, *[1] * (dims - 1))


def reads(step: Step) -> Iterator[str]:
    """Names of the operations whose results a step takes, as often as it takes them."""

    def inner(value: Any) -> Iterator[str]:
        if isinstance(value, Read):
            yield value.name
        elif isinstance(value, list | tuple):
            for part in value:
                yield from inner(part)

    yield from inner(step.args)
    yield from inner(list(step.kwargs.values()))


def _put(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Register a module, parameter or buffer under a dotted name."""
    *path, leaf = name.split(".")
    at = root
    for part in path:
        if part not in at._modules:
            at.add_module(part, nn.Module())
        at = at.get_submodule(part)
    if isinstance(value, nn.Module):
        at.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        at.register_parameter(leaf, value)
    else:
        at.register_buffer(leaf, value)


def make_net(
    spec: AnySpec,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ElasticNet:
    """A new network of a spec, with random weights."""
    kind = GraphNet if isinstance(spec, GraphSpec) else SlimNet
    return kind(spec, device=device, dtype=dtype)  # type: ignore[arg-type]
