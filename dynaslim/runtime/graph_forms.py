"""Segments of a converted network as plain modules: weights of their width, BN folded in."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dynaslim.errors import UsageError, check
from dynaslim.graph import kept_count
from dynaslim.nn.gate import Gate
from dynaslim.nn.graph_net import (
    IMAGE,
    Cut,
    GraphNet,
    GraphNorm,
    Read,
    Rows,
    Step,
    cut,
    overload,
    program,
    reads,
)
from dynaslim.runtime.forms import Form
from dynaslim.spec import Route


def plain_form(net: GraphNet, form: Form) -> fx.GraphModule:
    """A form as a plain module, on a copy of the weights that it uses.

    A segment gives (features, the next gate's logits), the last one class logits; so does a route.

    Raises:
        RuntimeError: if the network is in training mode.
    """
    if net.training:
        raise RuntimeError("extraction fixes running statistics: call net.eval() first")
    if form.route is not None:
        return _plain_route(net, form.route)
    builder = _Builder(net)
    out = builder.segment(form.segment, form.before, form.choice)
    if form.segment < len(net.gates):
        gate = net.gates[form.segment]
        assert isinstance(gate, Gate)
        units = net.spec.units(form.segment, form.before, form.choice)
        channels = kept_count(net.spec.cut_axes[form.segment], units)
        return builder.finish((out, builder.gate(gate, out, channels)))
    return builder.finish(out)


def _plain_route(net: GraphNet, route: Route) -> fx.GraphModule:
    builder = _Builder(net)
    indices = net.spec.segment_indices(route)
    out: fx.Node | None = None
    for number, index in enumerate(indices):
        out = builder.segment(number, indices[number - 1] if number > 1 else 0, index)
    assert out is not None
    return builder.finish(out)


class _Builder:
    """Writes operations of a converted network into a graph of their own."""

    def __init__(self, net: GraphNet) -> None:
        self.net = net
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.x = self.graph.placeholder("x")
        self.results: dict[str, fx.Node] = {}
        self.count = 0

    def finish(self, out: Any) -> fx.GraphModule:
        self.graph.output(out)
        return fx.GraphModule(self.root, self.graph).eval().requires_grad_(False)

    def constant(self, value: Tensor) -> fx.Node:
        name = f"w{self.count}"
        self.count += 1
        self.root.register_parameter(name, nn.Parameter(value.detach().clone(), False))
        return self.graph.get_attr(name)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def segment(self, number: int, before: int, choice: int) -> fx.Node:
        spec = self.net.spec
        source = spec.cuts[number - 1] if number else IMAGE
        self.results.setdefault(source, self.x)
        steps = program(spec, number, before, choice)
        last = spec.cuts[number] if number < len(spec.cuts) else spec.output
        folded = _folds(steps, last)
        for step in steps:
            if step.name in folded.values():
                self.results[step.name] = self.results[step.args[0].name]  # within its convolution
                continue
            norm = next((s for s in steps if s.name == folded.get(step.name)), None)
            self.results[step.name] = self.step(step, norm)
        return self.results[last]

    def step(self, step: Step, norm: Step | None) -> fx.Node:
        if step.norm is not None:
            return self.normalised(step)
        if norm is not None:
            return self.folded(step, norm)
        # the batch is what is left over: traced, a number of rows would become a constant
        sizes = step.op == "reshape.default"
        args = [self.value(argument, sizes=sizes) for argument in step.args]
        return self.call(overload(step.op), *args, **self._kwargs(step.kwargs))

    def _kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self.value(value) for name, value in kwargs.items()}

    def value(self, argument: Any, *, sizes: bool = False) -> Any:
        if isinstance(argument, Read):
            return self.results[argument.name]
        if isinstance(argument, Cut):
            return self.constant(self._cut(argument))
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

    def _affine(self, step: Step) -> tuple[Tensor, Tensor]:
        """Scale and shift of batch normalisation, in double: rounded once."""
        assert step.norm is not None
        norm = self.net.get_submodule(step.norm[0])
        assert isinstance(norm, GraphNorm)
        mean, var, weight, bias = (t.detach().double() for t in norm.affine(step.norm[1]))
        scale = weight * torch.rsqrt(var + norm.eps)
        return scale, bias - mean * scale

    def normalised(self, step: Step) -> fx.Node:
        """Batch normalisation that no convolution before it can carry."""
        assert step.norm is not None
        norm = self.net.get_submodule(step.norm[0])
        assert isinstance(norm, GraphNorm)
        mean, var, weight, bias = map(self.constant, norm.affine(step.norm[1]))
        x = self.value(step.args[0])
        return self.call(
            torch.ops.aten.batch_norm.default,
            *(x, weight, bias, mean, var, False, 0.0, norm.eps, False),
        )

    def folded(self, step: Step, norm: Step) -> fx.Node:
        """A convolution with the batch normalisation behind it."""
        scale, shift = self._affine(norm)
        weight_cut, bias_cut = step.args[1], step.args[2]
        weight = self._cut(weight_cut)
        bias = torch.zeros_like(scale) if bias_cut is None else self._cut(bias_cut).double()
        made = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
        return self.call(
            overload(step.op),
            self.value(step.args[0]),
            self.constant(made.to(weight.dtype)),
            self.constant((bias * scale + shift).to(weight.dtype)),
            *map(self.value, step.args[3:]),
            **self._kwargs(step.kwargs),
        )

    def gate(self, gate: Gate, x: fx.Node, channels: int) -> fx.Node:
        """The gate's logits (B, K) of features (B, C, H, W)."""
        aten = torch.ops.aten
        pooled = self.call(aten.mean.dim, x, [2, 3])
        assert gate.slimming_weight is not None
        hidden = self.call(
            aten.linear.default,
            pooled,
            self.constant(gate.reduce_weight[:, :channels]),
            self.constant(gate.reduce_bias),
        )
        return self.call(
            aten.linear.default,
            self.call(aten.relu.default, hidden),
            self.constant(gate.slimming_weight),
        )


def _times(rows: int, times: int) -> int:
    return rows * times


def _folds(steps: Sequence[Step], last: str) -> dict[str, str]:
    """Convolutions that nothing but a batch normalisation reads: name of each, and of that."""
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
            and step.name != last
        ):
            found[step.name] = reading[0].name
    return found


def to_onnx(plain: nn.Module, example: Tensor, outputs: Sequence[str], name: str) -> bytes:
    """A plain form as an ONNX model; the batch stays dynamic.

    Raises:
        UsageError: if an operation has no ONNX form.
    """
    check(all(w.dtype == torch.float32 for w in plain.parameters()), f"{name}: not float32")
    buffer = io.BytesIO()
    axes = {key: {0: "batch"} for key in ("x", *outputs)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plain,
                (example,),
                buffer,  # type: ignore[arg-type]
                input_names=["x"],
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=17,
                dynamo=False,
            )
    except Exception as error:
        raise UsageError(f"{name}: no ONNX form: {str(error).splitlines()[0]}") from None
    return buffer.getvalue()
