"""The network: one set of weights that runs along a route, by gates, or segment by segment.

Suffixes: B rows, C channels in use, H W pixels, K choices of a gate, N classes.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaslim._memory import LARGE
from dynaslim.blocks import graph_of
from dynaslim.cost import route_costs
from dynaslim.graph import IMAGE, WHOLE, AnySpec, Graph, GraphSpec, Node, TensorSpec, kept_count
from dynaslim.nn.functional import SoftWidth
from dynaslim.nn.gate import Gate
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.nn.program import (
    Cut,
    Read,
    Rows,
    Slicer,
    Step,
    cut,
    norm_of,
    overload,
    program,
    reads,
    slicer,
)
from dynaslim.spec import TEACHER_INDEX, NetSpec, Route

Choose = Callable[[Tensor, int], Tensor]
"""Turns slimming logits into a choice: (logits_BK, gate number) -> one-hot (or soft) gate_BK."""


class GatedOutput(NamedTuple):
    """Logits and choices of a gated forward; the two tuples have one entry per gate."""

    logits: Tensor
    gate_logits: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]


class SegmentOutput(NamedTuple):
    """A segment's features and the next gate's logits; class logits and None at the end."""

    features: Tensor
    gate_logits: Tensor | None


class Crossing(NamedTuple):
    """A segment's result: the tensor that crosses the next gate, and the one that gate reads."""

    out: Tensor
    seen: Tensor


RunSegment = Callable[[int, Tensor, int, Tensor | None], Tensor]
"""(segment number, x, width index, dropout mask) -> the features of `SlimNet.segment`."""

Function = TypeVar("Function", bound=Callable[..., Any])


def _left_to_python(function: Function) -> Function:
    """Do what `torch.compiler.disable(recursive=False)` does, without importing the compiler.

    That import takes as long as the rest of torch, and most processes compile nothing.
    """
    try:
        from torch._C._dynamo import eval_frame

        skip: Any = eval_frame._FrameAction.SKIP
        then: Any = eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(
            function.__code__, eval_frame._FrameExecStrategy(skip, then)
        )
    except (ImportError, AttributeError):  # another version of torch
        return cast(Function, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


_disabled = cache(torch.compiler.disable)
"""`torch.compiler.disable` of a function: neither the function nor its callees are traced."""

Program = Callable[["ElasticNet", Tensor, Tensor | None], Tensor]

# not attributes of the networks: functions made at run time cannot be pickled or copied
_PROGRAMS: WeakKeyDictionary[ElasticNet, dict[tuple[int, ...], Program]] = WeakKeyDictionary()


def _make_program(indices: tuple[int, ...]) -> Program:
    """The static forward for given width indices, as a function with its own code object."""

    def run(net: ElasticNet, x: Tensor, dropout_mask: Tensor | None) -> Tensor:
        for number, index in enumerate(indices):
            x = net.segment(number, x, index, decide=False, dropout_mask=dropout_mask).features
        return x

    name = "route_" + "_".join(map(str, indices)).replace("-", "minus")
    code = run.__code__.replace(co_name=name)
    return FunctionType(code, run.__globals__, name, None, run.__closure__)


class _Weight(NamedTuple):
    """A parameter or buffer, and the part of each axis that is kept."""

    owner: nn.Module
    leaf: str
    slicers: tuple[Slicer, ...]


class _BoundStep(NamedTuple):
    """A step of a program with its function and arguments resolved."""

    step: Step
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    freed: tuple[str, ...]
    """Results that are no longer needed after this step."""


class ElasticNet(nn.Module, ABC):
    """Base class of all networks: a `spec`, and segments that run along a route."""

    # defined by `dynaslim.interop.hub`
    save_pretrained: ClassVar[Callable[..., Path]]
    push_to_hub: ClassVar[Callable[..., str]]
    from_pretrained: ClassVar[Callable[..., ElasticNet]]

    spec: Any
    has_weights: ClassVar[bool] = True
    """Whether the network has weights to train and to save in a checkpoint."""

    @property
    def plain_backend(self) -> str:
        """The engine backend that runs the network without compiling."""
        return "eager"

    @abstractmethod
    def segment(
        self,
        number: int,
        x: Tensor,
        choice: int,
        *,
        decide: bool = True,
        dropout_mask: Tensor | None = None,
    ) -> SegmentOutput:
        """Run segment `number` on the previous segment's features (segment 0: on images)."""

    def prepare(self, number: int, choice: int) -> None:
        """Build what a segment needs to run, so that a compiler does not trace the construction."""

    def _features(self, number: int, x: Tensor, index: int, dropout_mask: Tensor | None) -> Tensor:
        return self.segment(number, x, index, decide=False, dropout_mask=dropout_mask).features

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def rows_at_once(self, image_size_px: int, most: int) -> int:
        """The number of rows, at most `most`, to run in one forward pass without gradients.

        On a CPU it keeps float32 feature maps below the size at which memory becomes slow
        (`dynaslim._memory`). ONNX Runtime needs that too: every session keeps the memory of its
        largest run.
        """
        if self.device.type != "cpu":
            return most
        routes = (self.spec.smallest, self.spec.largest)
        costs = (cost for route in routes for cost in route_costs(self.spec, route, image_size_px))
        return max(1, min(most, LARGE // (4 * max(cost.peak for cost in costs))))

    def check_input(self, x: Tensor) -> None:
        """Raise `ValueError` unless x is a batch of images that the network accepts."""
        if x.ndim != 4 or x.shape[1] != self.spec.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: {self.spec.name} takes "
                f"(rows, {self.spec.in_channels}, height, width)"
            )
        self.spec.check_image_size(x.shape[2], x.shape[3])

    def _resolve(self, x: Tensor, route: Route | str | Sequence[int]) -> Program:
        self.check_input(x)
        checked = route if isinstance(route, Route) else Route.parse(route)
        indices = self.spec.segment_indices(checked)
        programs = _PROGRAMS.setdefault(self, {})
        if indices not in programs:
            for number, index in enumerate(indices):
                self.prepare(number, index)
            programs[indices] = _make_program(indices)
        return programs[indices]

    # Each route's program has its own code object, and this dispatcher is not compiled:
    # torch.compile silently gives up on a code object after 8 shapes or constants.
    @_left_to_python
    def forward(
        self, x: Tensor, route: Route | str | Sequence[int], *, dropout_mask: Tensor | None = None
    ) -> Tensor:
        """Static forward: images (B, in_channels, H, W) along one route -> logits (B, classes).

        `route` is a `Route`, its text or its widths. `dropout_mask` multiplies the pooled features;
        the caller draws it, so randomness is an argument.

        Raises:
            UsageError: if the network has no such route, or does not take images of this size.
            ValueError: if x is not a batch of images with the spec's channels.
        """
        resolve = ElasticNet._resolve
        if "torch._dynamo" in sys.modules:  # else nothing is being compiled
            resolve = _disabled(resolve)
        return resolve(self, x, route)(self, x, dropout_mask)

    def forward_many(
        self,
        x: Tensor,
        routes: Sequence[Route | str | Sequence[int]],
        *,
        dropout_mask: Tensor | None = None,
        run_segment: RunSegment | None = None,
        after_trunk: bool = False,
    ) -> list[Tensor]:
        """Static forward along several routes -> logits (B, classes) of each, in order.

        Leading segments that routes share, such as the trunk, run once, with equal results and
        gradients. In training mode their BN running statistics are updated once. `run_segment`
        replaces this network's `segment`, for example by a compiled one. With `after_trunk`, x is
        the output of segment 0, (B, C, H, W), and segment 0 does not run.

        Raises:
            As `forward`.
        """
        if not after_trunk:
            self.check_input(x)
        run = run_segment or self._features
        paths = [self.spec.segment_indices(self.spec.coerce_route(route)) for route in routes]
        done: dict[tuple[int, ...], Tensor] = {(0,) if after_trunk else (): x}
        for path in paths:
            for number, index in enumerate(path):
                here = path[: number + 1]
                if here not in done:
                    done[here] = run(number, done[path[:number]], index, dropout_mask)
        return [done[path] for path in paths]

    def slimming_parameters(self) -> list[nn.Parameter]:
        """The weights of the slimming heads, the only parameters that stage II trains."""
        weights = (m.slimming_weight for m in self.modules() if isinstance(m, Gate))
        return [weight for weight in weights if weight is not None]


class SlimNet(ElasticNet):
    """A dynamic slimmable network built from the spec of a zoo network or a converted one.

    `net(x, route)` runs one sub-network. `net.forward_gated(x, choose)` lets the gates choose for
    every row, and is differentiable through them. `net.segment(j, x, index)` runs one segment;
    `dynaslim.Engine` calls it on buckets of rows. All three agree to float tolerance. The route is
    an argument: nothing is stored on the module between calls.

    A static forward does not use the slimming heads, so freeze them (stage I) before wrapping the
    network in `DistributedDataParallel`. `torch.compile(net, fullgraph=True)` works. If the network
    is part of another module that is compiled, leave `fullgraph` off.
    """

    graph: Graph
    """The operations that the spec describes."""

    def __init__(
        self,
        spec: AnySpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        tensors = self.graph.tensors
        convs = {n.args[1].get("tensor"): n for n in self.graph.nodes if n.op.startswith("conv")}
        norms = {norm_of(n): n for n in self.graph.nodes if n.op == "batch_norm.default"}
        made: set[str] = set()
        make: Callable[[], nn.Module]
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner in norms and (tensor.kind == "statistics" or leaf in ("weight", "bias")):
                make = partial(self._norm, norms[owner], place)
            elif f"{owner}.reduce_weight" in tensors:
                make = partial(self._gate, owner, place)
            elif owner == self._spec.classifier:
                make = partial(self._linear, owner, place)
            else:
                if tensor.kind != "statistics":
                    _put(self, name, _initial(tensor, convs.get(name), place))
                continue
            if owner not in made:
                _put(self, owner, make())
                made.add(owner)

    @property
    def spec(self) -> Any:
        """The description of the network, a `NetSpec` or a `GraphSpec`."""
        return self._spec

    @spec.setter
    def spec(self, spec: AnySpec) -> None:
        assert isinstance(spec, NetSpec | GraphSpec)
        self._spec, self.graph = spec, graph_of(spec)
        self._index_by_channels = [
            self._indices_by_channels(n) for n in range(len(self.graph.cuts))
        ]
        self._segments: dict[tuple[int, int, int], tuple[_BoundStep, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # bound segments refer to these parameters; a copy has other ones
        return {**self.__dict__, "_segments": {}}

    def at_size(self, height: int, width: int) -> SlimNet:
        """The network for another image size that it was converted for.

        It shares the parameters but has its own BN statistics, which must be recalibrated.

        Raises:
            UsageError: if the network was not converted for this size.
        """
        made = copy.deepcopy(self, {id(parameter): parameter for parameter in self.parameters()})
        made.spec = self.spec.at_size(height, width)
        return made

    def _norm(self, node: Node, place: Mapping[str, Any]) -> SlimBatchNorm2d:
        groups = self.graph.groups
        axis = self.graph.tensors[node.args[3]["tensor"]].axes[0]
        own = {run[0]: groups[run[0]].widths for run in axis if run[0] != WHOLE}
        slots = max(map(len, own.values()), default=self.spec.num_widths if node.segment else 1)
        kept = [slicer(axis, {g: widths[k] for g, widths in own.items()}) for k in range(slots)]
        momentum, eps = float(node.args[6]), float(node.args[7])
        return SlimBatchNorm2d(kept, kept_count(axis, {}), eps=eps, momentum=momentum, **place)

    def _shape(self, name: str) -> list[int]:
        """The shape of a parameter, or an empty list if there is none of that name."""
        tensor = self.graph.tensors.get(name)
        return [] if tensor is None else [kept_count(axis, {}) for axis in tensor.axes]

    def _gate(self, name: str, place: Mapping[str, Any]) -> nn.Module:
        hidden, channels = self._shape(f"{name}.reduce_weight")
        choices, *_ = self._shape(f"{name}.slimming_weight") or [0]
        return Gate(channels, hidden, choices, getattr(self.spec, "attention", None), **place)

    def _linear(self, name: str, place: Mapping[str, Any]) -> nn.Module:
        outs, ins = self._shape(f"{name}.weight")
        linear = nn.Linear(ins, outs, bool(self._shape(f"{name}.bias")), **place)
        nn.init.normal_(linear.weight, std=0.01)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        return linear

    def _indices_by_channels(self, segment: int) -> dict[int, int]:
        """Map a segment's number of output channels to its width index."""
        axis, found = self.graph.cut_axes[segment], dict[int, int]()
        for index in (0, TEACHER_INDEX) if segment == 0 else range(self.spec.num_widths):
            units = self.graph.units(segment, index if segment > 1 else 0, index)
            found.setdefault(kept_count(axis, units), index)
        return found

    # -- one piece ----------------------------------------------------------------------------

    def bound_steps(self, segment: int, before: int, choice: int) -> tuple[_BoundStep, ...]:
        """A segment's program with its arguments resolved, built on first use."""
        key = (segment, before, choice)
        if key not in self._segments:
            steps = program(self.graph, *key)
            last = {name: number for number, step in enumerate(steps) for name in reads(step)}
            inputs = (self.graph.gate_input(n).node for n in range(len(self.graph.cuts)))
            for kept in (self.graph.output, *self.graph.cuts, *inputs):
                last.pop(kept, None)
            freed: dict[int, list[str]] = {}
            for name, number in last.items():
                freed.setdefault(number, []).append(name)
            self._segments[key] = tuple(
                _BoundStep(
                    step,
                    self._function(step),
                    tuple(map(self._bind, step.args)),
                    {name: self._bind(value) for name, value in step.kwargs.items()},
                    tuple(freed.get(number, ())),
                )
                for number, step in enumerate(steps)
            )
        return self._segments[key]

    def _function(self, step: Step) -> Callable[..., Any]:
        if step.norm is not None:
            return self.get_submodule(step.norm[0])
        return self.get_submodule(step.name) if step.op == "gate" else overload(step.op)

    def _bind(self, argument: Any) -> Any:
        if isinstance(argument, Cut):
            path, _, leaf = argument.name.rpartition(".")
            return _Weight(self.get_submodule(path), leaf, argument.slicers)
        if isinstance(argument, list):
            inner = [self._bind(value) for value in argument]
            # a list without references is a constant
            return (
                inner if any(isinstance(v, Read | _Weight | Rows) for v in inner) else tuple(inner)
            )
        return argument

    def prepare(self, number: int, choice: int) -> None:
        for before in (0,) if number == 0 else self._index_by_channels[number - 1].values():
            self.bound_steps(number, before, choice)

    def run_segment(
        self,
        number: int,
        x: Tensor,
        before: int,
        choice: int,
        dropout_mask: Tensor | None = None,
        *,
        soft: SoftWidth | None = None,
        watch: Callable[[Step, Sequence[Any], Any], None] | None = None,
    ) -> Crossing:
        """Run a segment's operations on the previous segment's output (segment 0: on images).

        `before` and `choice` are the width indices of the previous segment and of this one. With
        `soft`, widths chosen per row, `choice` is the widest of them. `watch` is called with each
        operation, its arguments and its result.
        """
        graph = self.graph
        results: dict[str, Any] = {graph.cuts[number - 1] if number else IMAGE: x}
        rows = x.shape[0]
        classifier = graph.nodes[-1].name if self.spec.features else None

        def value(argument: Any) -> Any:
            if isinstance(argument, Read):
                return results[argument.name]
            if isinstance(argument, _Weight):
                return cut(getattr(argument.owner, argument.leaf), argument.slicers)
            if isinstance(argument, Rows):
                return rows * argument.times
            if isinstance(argument, list):
                return [value(inner) for inner in argument]
            return argument

        for step, function, arguments, named, freed in self.bound_steps(number, before, choice):
            if step.norm is not None:
                args = [value(arguments[0])]
                made = function(args[0], step.norm[1] if soft is None else soft)
            elif step.op == "gate":
                args = [value(arguments[0])]
                made = function(args[0])[0]
            else:
                args = [value(argument) for argument in arguments]
                if step.name == classifier and dropout_mask is not None:
                    args[0] = args[0] * dropout_mask
                made = function(*args, **{name: value(inner) for name, inner in named.items()})
            results[step.name] = made
            if watch is not None:
                watch(step, args, made)
            for name in freed:
                results.pop(name, None)
        if number == len(graph.cuts):
            return Crossing(results[graph.output], results[graph.output])
        return Crossing(results[graph.cuts[number]], results[graph.gate_input(number).node])

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its name."""
        path, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(path), leaf)
        return found

    def gate(self, number: int) -> Gate:
        """The gate after a segment."""
        gate = self.get_submodule(self.graph.gates[number])
        assert isinstance(gate, Gate)
        return gate

    def segment(
        self,
        number: int,
        x: Tensor,
        choice: int,
        *,
        decide: bool = True,
        dropout_mask: Tensor | None = None,
    ) -> SegmentOutput:
        """Run segment `number` on the previous segment's features (segment 0: on images).

        `choice` is the width index of the segment: 0 for the trunk, `TEACHER_INDEX` for the
        teacher's trunk. With `decide` the next gate's logits are computed as well. `dropout_mask`,
        (B, C) or broadcastable, multiplies the pooled features of the last segment.
        """
        out, seen = self._before_gate(number, x, choice, dropout_mask)
        if number == len(self.graph.gates):
            return SegmentOutput(out, None)
        return SegmentOutput(*self.gate(number)(out, seen, decide=decide))

    def segment_hidden(self, number: int, x: Tensor, choice: int) -> tuple[Tensor, Tensor]:
        """Like `segment`, but with the next gate's hidden features (B, R) in place of its logits.

        A slimming head (K, R) maps them linearly to its logits. Not for the last segment, which no
        gate follows.
        """
        (out, seen), gate = self._before_gate(number, x, choice), self.gate(number)
        hidden_BR = gate.hidden(seen.mean((2, 3)))
        return gate.attend(out, hidden_BR), hidden_BR

    def _before_gate(
        self, number: int, x: Tensor, choice: int, dropout_mask: Tensor | None = None
    ) -> Crossing:
        """Run a segment's operations up to the next gate."""
        before, channels = 0, x.shape[1]
        if number:
            if channels not in self._index_by_channels[number - 1]:
                raise ValueError(f"segment {number}: {channels} channels are of none of its widths")
            before = self._index_by_channels[number - 1][channels]
        return self.run_segment(number, x, before, choice, dropout_mask)

    def forward_gated(self, x: Tensor, choose: Choose) -> GatedOutput:
        """Gated forward: every row runs at the widths that its gates choose; differentiable.

        images (B, in_channels, H, W) -> logits (B, classes), gate logits and gates (B, K) each.
        In a zoo network, batch normalisation masks the rows, and the cost is that of the widest
        choices. The operations of a converted network may not preserve a mask, so its result is the
        sum over all options, each times its gate. For speed use `Engine`.

        Raises:
            RuntimeError: in training mode. Rows of one batch differ in width, so there are no
                batch statistics to use. The supernet is frozen while gates are trained.
        """
        if self.training:
            raise RuntimeError("forward_gated uses running statistics: call net.eval() first")
        self.check_input(x)
        gate_logits: list[Tensor] = []
        gates: list[Tensor] = []
        options = [_Option(0, None, Crossing(x, x))]
        for number in range(self.spec.num_segments):
            options = self._options(number, options, gates[-1] if gates else None)
            if number == len(self.graph.gates):
                break
            gate = self.gate(number)
            # a gate reads the features of the options that the row took
            hidden_BR = gate.hidden(_sum((o.share_B, o.x.seen.mean((2, 3))) for o in options))
            gate_logits.append(gate.decide(hidden_BR))
            gates.append(choose(gate_logits[-1], number))
            options = [
                o._replace(x=o.x._replace(out=gate.attend(o.x.out, hidden_BR))) for o in options
            ]
        logits = _sum((o.share_B, o.x.out) for o in options)
        return GatedOutput(logits, tuple(gate_logits), tuple(gates))

    def _options(
        self, number: int, before: Sequence[_Option], gate_BK: Tensor | None
    ) -> list[_Option]:
        """Run a segment for rows of different widths: once per option of the previous gate, or once
        for all rows if batch normalisation can mask them.
        """
        choices = self.spec.gates[number - 1].choices if number else (0,)
        if isinstance(self.spec, NetSpec):
            ((last, _, x),) = before
            soft = None
            if gate_BK is not None and len(choices) > 1:
                soft = SoftWidth(gate_BK, choices)
            x = self.run_segment(number, x.out, last, choices[-1], soft=soft)
            return [_Option(choices[-1], None, x)]
        options = []
        for at, choice in enumerate(choices):
            made = [self.run_segment(number, o.x.out, o.choice, choice) for o in before]
            shares = [o.share_B for o in before]
            x = Crossing(
                *(_sum(zip(shares, parts, strict=True)) for parts in zip(*made, strict=True))
            )
            options.append(_Option(choice, None if gate_BK is None else gate_BK[:, at], x))
        return options


class _Option(NamedTuple):
    """Features of all rows at one width, and each row's weight for this option (B,)."""

    choice: int
    share_B: Tensor | None
    x: Crossing


def _sum(options: Iterable[tuple[Tensor | None, Tensor]]) -> Tensor:
    """The sum of features, each times its row weights. Narrow ones are padded with zeros."""
    parts = [_weighted(x, share_B) for share_B, x in options]
    if len(parts) == 1:
        return parts[0]
    widest = max(part.shape[1] for part in parts)
    pads = ((*[0, 0] * (part.ndim - 2), 0, widest - part.shape[1]) for part in parts)
    return torch.stack(list(map(F.pad, parts, pads))).sum(0)


def _weighted(x: Tensor, weight_B: Tensor | None) -> Tensor:
    return x if weight_B is None else x * weight_B.reshape(-1, *[1] * (x.ndim - 1))


def _initial(tensor: TensorSpec, conv: Node | None, place: Mapping[str, Any]) -> Tensor:
    """A new parameter with random values, or a buffer of zeros."""
    shape = [kept_count(axis, {}) for axis in tensor.axes]
    made = torch.zeros(shape, **place)
    if tensor.dtype:
        made = made.to(getattr(torch, tensor.dtype))
    if tensor.kind != "weight":
        return made
    if conv is not None:
        # He initialisation by the fan-out of one group, as is usual for MobileNets
        groups = conv.args[6]
        groups = kept_count(groups["axis"], {}) if isinstance(groups, Mapping) else groups
        nn.init.normal_(made, std=math.sqrt(2.0 * groups / (math.prod(shape[2:]) * shape[0])))
    elif len(shape) > 1:
        nn.init.normal_(made, std=0.01)
    return nn.Parameter(made)


def _put(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Register a module, parameter or buffer under a dotted name."""
    *path, leaf = name.split(".")
    at = root
    for part, following in itertools.pairwise((*path, leaf)):
        if part not in at._modules:
            at.add_module(part, nn.ModuleList() if following.isdigit() else nn.Module())
        at = at.get_submodule(part)
    if isinstance(value, nn.Module):
        at.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        at.register_parameter(leaf, value)
    else:
        at.register_buffer(leaf, value)
