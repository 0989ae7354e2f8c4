"""Extraction of sub-networks from a supernet: plain operations with weights of exactly their width.

A slice of a wide weight is not contiguous, so backends would repack it at every call. Batch
normalisation with fixed statistics is an affine map that can be folded into the convolution before
it. Extracted modules have neither slices nor such BN and are independent of the supernet, so they
can be compiled or exported like any other module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dynaslim.errors import UsageError, check
from dynaslim.graph import IMAGE, Axis, kept_count
from dynaslim.nn.gate import Gate
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.nn.net import SlimNet
from dynaslim.nn.program import Cut, Read, Rows, Step, cut, overload, program, reads
from dynaslim.spec import TEACHER_INDEX, Route

Shared = dict[Any, nn.Parameter]
"""Weights shared by plain modules, by what they were made from."""


def extract(
    net: SlimNet, route: Route, *, behind_trunk: bool = False, shared: Shared | None = None
) -> fx.GraphModule:
    """Extract the sub-network of a route as a module: images (B, C, H, W) -> logits (B, classes).

    With `behind_trunk`, it omits segment 0 and takes that segment's output. Within float tolerance
    it is equal to `net(x, route)`. It has a copy of the weights and is in evaluation mode.

    Raises:
        UsageError: if the route is not one of the network's.
        RuntimeError: if the network is in training mode, in which BN statistics still change.
    """
    builder, graph, before = _Builder(net, shared), net.graph, 0
    for number, index in enumerate(net.spec.segment_indices(net.spec.coerce_route(route))):
        if behind_trunk and number == 0:
            before = index
            continue
        out = builder.segment(number, before, index)
        if number < net.spec.num_segments - 1:
            out, _ = builder.gate_behind(number, out)
            builder.results[graph.cuts[number]] = out
        before = index
    return builder.finish(out)


def extract_segment(
    net: SlimNet,
    number: int,
    before: int,
    choice: int,
    *,
    decide: bool = True,
    shared: Shared | None = None,
) -> fx.GraphModule:
    """Extract segment `number` at width index `choice`, after one at `before`, as a plain module.

    Its input is the previous segment's output; segment 0 takes images and ignores `before`. It
    returns (features, logits (B, K) of the next gate), or without `decide` only the features; the
    last segment returns class logits. Within float tolerance it is equal to `net.segment`.

    Variants of a segment that differ only in `before` differ only in their first layers. Those
    extracted with the same dict `shared` share the memory of all other layers.

    Raises:
        UsageError: if there is no such segment.
        RuntimeError: if the network is in training mode.
    """
    spec = net.spec
    check(0 <= number < spec.num_segments, f"segment {number}: {spec.name} has {spec.num_segments}")
    for index in (before, choice):
        if index != TEACHER_INDEX and not 0 <= index < spec.num_widths:
            raise UsageError(f"width index {index}: {spec.name} has 0 to {spec.num_widths - 1}")
    builder = _Builder(net, shared)
    out = builder.segment(number, before, choice)
    if number == spec.num_segments - 1:
        return builder.finish(out)
    out, logits = builder.gate_behind(number, out, decide)
    return builder.finish((out, logits) if decide else out)


class _Builder:
    """Writes some operations of a network into a new graph."""

    def __init__(self, net: SlimNet, shared: Shared | None) -> None:
        if net.training:
            raise RuntimeError("extraction fixes running statistics: call net.eval() first")
        self.net = net
        self.shared: Shared = {} if shared is None else shared
        self.graph = fx.Graph()
        self.root = nn.Module()
        x = self.graph.placeholder("x")
        self.results: dict[str, fx.Node] = {IMAGE: x}
        self.x = x

    def finish(self, out: Any) -> fx.GraphModule:
        self.graph.output(out)
        return fx.GraphModule(self.root, self.graph).eval().requires_grad_(False)

    def constant(self, made_of: tuple[Any, ...], make: Callable[[], Tensor]) -> fx.Node:
        """A weight, made if needed; `made_of` is its key among the shared ones."""
        if made_of not in self.shared:
            value = make().detach().clone(memory_format=torch.contiguous_format)
            self.shared[made_of] = nn.Parameter(value, requires_grad=False)
        name = f"w{len(self.root._parameters)}"
        self.root.register_parameter(name, self.shared[made_of])
        return self.graph.get_attr(name)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def segment(self, number: int, before: int, choice: int) -> fx.Node:
        """Append a segment's operations to the previous segment's, or else to the input."""
        graph = self.net.graph
        self.units = graph.units(number, before, choice)
        if number:
            self.results.setdefault(graph.cuts[number - 1], self.x)
        steps = program(graph, number, before, choice)
        last = graph.cuts[number] if number < len(graph.cuts) else graph.output
        kept = {last} if last == graph.output else {last, graph.gate_input(number).node}
        folded = _folds(steps, kept)
        norms = {step.name: step for step in steps if step.name in folded.values()}
        for step in steps:
            if step.name in norms:  # folded into its convolution
                made = self.results[step.args[0].name]
            elif step.norm is not None:
                made = self.normalised(step)
            elif step.name in folded:
                made = self.folded(step, norms[folded[step.name]])
            elif step.op == "gate":
                channels = graph.tensors[f"{step.name}.expand_bias"].axes[0]
                x = self.value(step.args[0])
                made, _ = self.gate(step.name, x, x, channels)
            else:
                # -1 for the batch: when traced, a number of rows would become a constant
                sizes = step.op == "reshape.default"
                args = [self.value(argument, sizes=sizes) for argument in step.args]
                if step.op in ("expand.default", "repeat.default"):  # their sizes may be traced
                    made = self.graph.call_method(step.op.partition(".")[0], tuple(args))
                else:
                    made = self.call(overload(step.op), *args, **self._kwargs(step.kwargs))
            made.meta["step"] = step.name
            self.results[step.name] = made
        return self.results[last]

    def _kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self.value(value) for name, value in kwargs.items()}

    def value(self, argument: Any, *, sizes: bool = False) -> Any:
        if isinstance(argument, Read):
            return self.results[argument.name]
        if isinstance(argument, Cut):
            return self.constant((argument,), lambda: self._cut(argument))
        if isinstance(argument, Rows):
            rows = self.graph.call_method("size", (self.x, 0))
            return rows if argument.times == 1 else self.call(_times, rows, argument.times)
        if isinstance(argument, list):
            if sum(isinstance(inner, Rows) for inner in argument) == 1 and sizes:
                argument = [-1 if isinstance(inner, Rows) else inner for inner in argument]
            return [self.value(inner) for inner in argument]
        return argument

    def _cut(self, argument: Cut) -> Tensor:
        return cut(self.net.tensor(argument.name), argument.slicers)

    def normalised(self, step: Step) -> fx.Node:
        """Batch normalisation that cannot be folded into a convolution."""
        assert step.norm is not None
        norm = self._norm(step)
        mean, var, weight, bias = (
            self.constant((step.norm, number), partial(torch.clone, part))
            for number, part in enumerate(norm.affine(step.norm[1]))
        )
        return self.call(
            torch.batch_norm,
            *(self.value(step.args[0]), weight, bias, mean, var, False, 0.0, norm.eps, False),
        )

    def _norm(self, step: Step) -> SlimBatchNorm2d:
        assert step.norm is not None
        norm = self.net.get_submodule(step.norm[0])
        assert isinstance(norm, SlimBatchNorm2d)
        return norm

    def _affine(self, step: Step) -> tuple[Tensor, Tensor]:
        """Scale and shift of batch normalisation, in double so that folding rounds only once."""
        assert step.norm is not None
        norm = self._norm(step)
        mean, var, weight, bias = (t.detach().double() for t in norm.affine(step.norm[1]))
        scale = weight * torch.rsqrt(var + norm.eps)
        return scale, bias - mean * scale

    def folded(self, step: Step, norm: Step) -> fx.Node:
        """A convolution with the following batch normalisation folded in."""
        weight_cut, bias_cut = step.args[1], step.args[2]

        def weight() -> Tensor:
            whole = self._cut(weight_cut)
            scale = self._affine(norm)[0].view(-1, *[1] * (whole.ndim - 1))
            return (whole.double() * scale).to(whole.dtype)

        def bias() -> Tensor:
            scale, shift = self._affine(norm)
            if bias_cut is not None:
                shift = self._cut(bias_cut).double() * scale + shift
            return shift.to(self.net.tensor(weight_cut.name).dtype)

        return self.call(
            overload(step.op),
            self.value(step.args[0]),
            self.constant((weight_cut, norm.norm), weight),
            self.constant((weight_cut, norm.norm, "bias"), bias),
            *map(self.value, step.args[3:]),
            **self._kwargs(step.kwargs),
        )

    def gate_behind(
        self, number: int, x: fx.Node, decide: bool = False
    ) -> tuple[fx.Node, fx.Node | None]:
        """Apply the gate behind a segment to its output x; returns the result and logits (B, K)."""
        seen, graph = self.net.graph.gate_input(number), self.net.graph
        return self.gate(graph.gates[number], x, self.results[seen.node], seen.axis, decide)

    def gate(
        self, path: str, x: fx.Node, seen: fx.Node, axis: Axis, decide: bool = False
    ) -> tuple[fx.Node, fx.Node | None]:
        """Apply a gate to x; returns the result and the gate's logits (B, K), or None.

        The gate reads the features `seen` (B, C, H, W), whose channels are those of `axis`.
        """
        gate = self.net.get_submodule(path)
        assert isinstance(gate, Gate)
        channels = kept_count(axis, self.units)
        if gate.expand_weight is None and not decide:
            return x, None

        def linear(x: fx.Node, head: str, *index: slice) -> fx.Node:
            def constant(kind: str, *index: slice) -> fx.Node | None:
                tensor = getattr(gate, f"{head}_{kind}", None)
                if tensor is None:
                    return None
                return self.constant((path, head, kind, channels), lambda: tensor[index])

            return self.call(F.linear, x, constant("weight", *index), constant("bias", *index[:1]))

        every, kept = slice(None), slice(channels)
        pooled = self.call(torch.mean, seen, (2, 3))
        hidden = self.call(torch.relu, linear(pooled, "reduce", every, kept))
        logits = linear(hidden, "slimming", every) if decide else None
        if gate.expand_weight is None:
            return x, logits
        scale = linear(hidden, "expand", kept)
        if gate.attention == "sigmoid":
            scale = self.call(torch.sigmoid, scale)
        else:
            scale = self.call(torch.add, self.call(torch.tanh, scale), 1.0)
        scale = self.call(torch.reshape, scale, [-1, channels, 1, 1])
        return self.call(torch.mul, x, scale), logits


def _times(rows: int, times: int) -> int:
    return rows * times


def _folds(steps: Sequence[Step], kept: Collection[str]) -> dict[str, str]:
    """Convolution -> batch normalisation, by name, where only the latter reads the former."""
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in reads(step):
            readers.setdefault(name, []).append(step)
    found = {}
    for step in steps:
        reading = readers.get(step.name, [])
        if (
            step.op.startswith(("conv1d.", "conv2d."))
            and len(reading) == 1
            and reading[0].norm is not None
            and step.name not in kept
        ):
            found[step.name] = reading[0].name
    return found
