"""Verify a conversion against the model, against zeroed channels and against extracted segments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, fx

from dynaslim.conversion.capture import BATCH, Outputs, arguments, operation
from dynaslim.conversion.channels import REDUCING, Value
from dynaslim.errors import ConversionError, UsageError
from dynaslim.graph import GraphSpec, Node, VariantCost, kept_count, kept_positions
from dynaslim.nn.net import SlimNet
from dynaslim.runtime.extract import extract_segment

if TYPE_CHECKING:
    from dynaslim.conversion.build import Conversion

WHOLE_TOLERANCE: Final = 1e-5
"""Tolerance of answers at full width, relative to the largest."""
SEGMENT_TOLERANCE: Final = 1e-4
"""Tolerance of segments, relative to the largest value. Extracted segments that exceed it are
compared again in double precision."""

Results = dict[str, Tensor]
"""Results of operations by name."""


@torch.no_grad()
def verify_whole(conversion: Conversion, net: SlimNet, out: Tensor) -> float:
    """The error of the network at full width against the model, relative to the largest answer.

    `out` is the network's output for the first image of the example.

    Raises:
        UsageError: if the error is above 1e-5; the message names the first operation that differs.
    """
    image, route = conversion.example[:1], net.spec.largest
    error = relative_error(out, conversion.captured.outputs.logits)
    if error > WHOLE_TOLERANCE:  # perhaps rounding; what remains in double is a real error
        model, twice = copy.deepcopy(conversion.model).double(), copy.deepcopy(net).double()
        error = relative_error(
            twice(image.double(), route), Outputs.of(model(image.double())).logits
        )
    if not error <= WHOLE_TOLERANCE:
        own: Results = {}
        theirs = conversion.results(image)
        features, before = image.expand(BATCH, -1, -1, -1), 0
        for segment, choice in enumerate(net.spec.segment_indices(route)):
            watch = _watch(own)
            features = net.run_segment(segment, features, before, choice, watch=watch).out
            before = choice
        # sorted, because the channels are in another order
        theirs, own = ({k: v.flatten().sort()[0] for k, v in r.items()} for r in (theirs, own))
        raise refuse_at(
            _first_apart(net.spec, own, theirs),
            f"the converted network differs from the model at full width, in the end by "
            f"{error:.1e} of the largest answer: it is not to be used",
        )
    return error


@torch.no_grad()
def verify_widths(
    conversion: Conversion,
    net: SlimNet,
    x: Tensor,
    runs: Sequence[tuple[VariantCost, Tensor, Tensor]],
) -> bool:
    """Compare every segment at every width with its extracted module, and with the segment at full
    width in which the weights that read the other channels are zero.

    `runs` holds the cost, input and output of each for the first row of `x`. Returns False if not
    all could be compared with zeros: an operation computes with all channels at once, or overflows.

    Raises:
        UsageError: if they differ; the message names the operation.
    """
    masked = Masked.of(conversion, net)
    compared = masked is not None
    for variant, source, out in runs:
        _verify_extracted(net, variant, source, out)
        if masked is not None and variant.segment and variant.choice < net.spec.num_widths - 1:
            compared &= masked.verify(variant, source, out)
    last = net.spec.num_segments - 1
    alone = next(out for variant, _, out in runs if (variant.segment, variant.choice) == (last, 0))
    error = relative_error(net(x, net.spec.smallest)[:1], alone)
    if not error <= SEGMENT_TOLERANCE:
        raise UsageError(
            f"{net.spec.name}: an image has other answers in a batch than alone, by {error:.1e} of "
            f"the largest: it cannot be routed"
        )
    return compared


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _verify_extracted(net: SlimNet, variant: VariantCost, source: Tensor, out: Tensor) -> None:
    at = (variant.segment, variant.before, variant.choice)
    plain = extract_segment(net, *at)
    error = relative_error(_features(plain(source)), out)
    if error > SEGMENT_TOLERANCE:
        net, source = copy.deepcopy(net).double(), source.double()
        plain, out = extract_segment(net, *at), net.run_segment(at[0], source, *at[1:]).out
        error = relative_error(_features(plain(source)), out)
    if not error <= SEGMENT_TOLERANCE:
        own: Results = {}
        net.run_segment(at[0], source, *at[1:], watch=_watch(own))
        other = _Recorder(plain)
        other.run(source)
        raise refuse_at(
            _first_apart(net.spec, other.results, own),
            f"{_width(net.spec, variant)} the extracted network differs from the converted one by "
            f"{error:.1e} of the largest value: it is not to be used",
        )


def _features(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


class _Recorder(fx.Interpreter):
    """Runs an extracted network and keeps the results of its operations."""

    def __init__(self, plain: fx.GraphModule) -> None:
        super().__init__(plain)
        self.results: Results = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if "step" in n.meta and isinstance(out, Tensor):
            self.results[n.meta["step"]] = out
        return out


class Masked:
    """Two copies of a network. In one, the weights that read channels beyond a width are zero; at
    full width it must compute what the other computes at that width.
    """

    def __init__(self, conversion: Conversion, net: SlimNet, spec: GraphSpec) -> None:
        self.conversion, self.spec = conversion, spec
        self.net = copy.copy(net)
        self.net.spec = spec
        self.masked = copy.deepcopy(self.net)
        self.mixed = spec.nodes != net.spec.nodes
        self.nodes = {node.name: node for node in conversion.captured.nodes}
        self.readers: dict[int, list[tuple[str, int]]] = {}
        for node in spec.nodes:
            if node.op.startswith(("conv", "linear.")):
                axis = 0 if node.op.startswith("conv_transpose") else 1
                reader = (str(node.args[1]["tensor"]), axis)
                self.readers.setdefault(node.segment, []).append(reader)

    @classmethod
    def of(cls, conversion: Conversion, net: SlimNet) -> Masked | None:
        """Make the copies, with replacements for operations that compute with all channels at
        once; None if one of these has no replacement.
        """
        nodes = {node.name: node for node in conversion.captured.nodes}
        made: list[Node] = []
        for node in net.spec.nodes:
            captured = nodes.get(node.name) if node.segment else None
            others = [node] if captured is None else _unmixed(conversion, captured, node)
            if not others:
                return None
            made += others
        return cls(conversion, net, replace(net.spec, nodes=tuple(made)))

    def verify(self, variant: VariantCost, source: Tensor, out: Tensor) -> bool:
        """Compare a segment that maps `source` to `out` at a width; False if it overflows.

        Raises:
            UsageError: if the two differ; the message names the operation.
        """
        spec, number, last = self.spec, variant.segment, self.spec.num_widths - 1
        units = spec.units(number, variant.before, variant.choice)
        for name, axis in self.readers.get(number, []):
            tensor = self.masked.tensor(name)
            tensor.copy_(self.net.tensor(name))
            along = spec.tensors[name].axes[axis]
            gone = np.setdiff1d(np.arange(tensor.shape[axis]), kept_positions(along, units))
            tensor.index_fill_(axis, torch.from_numpy(gone), 0)
        entry = spec.cut_axes[number - 1]
        padded = source.new_zeros(1, kept_count(entry, {}), *source.shape[2:])
        arriving = spec.units(number - 1, variant.before, variant.before)
        padded[:, kept_positions(entry, arriving)] = source
        whole = (number, padded, last if number > 1 else 0, last)
        sliced = (number, source, variant.before, variant.choice)
        if self.mixed:
            out = self.net.run_segment(*sliced).out
            if not torch.isfinite(out).all():
                return False
        end = spec.output if number == len(spec.gates) else spec.cuts[number]
        error = relative_error(out, self._kept(end, self.masked.run_segment(*whole).out, units))
        if not error <= SEGMENT_TOLERANCE:
            own: Results = {}
            masked: Results = {}
            self.net.run_segment(*sliced, watch=_watch(own))
            self.masked.run_segment(*whole, watch=_watch(masked))
            kept = {
                name: self._kept(name, value, units)
                for name, value in masked.items()
                if name in self.nodes
            }
            raise refuse_at(
                _first_apart(spec, own, kept),
                f"{_width(spec, variant)} the network differs from the whole one without the "
                f"others, by {error:.1e} of the largest value: it is not to be used",
            )
        return True

    def _kept(self, name: str, result: Tensor, units: dict[int, int]) -> Tensor:
        if name not in self.nodes:  # several tensors packed into one
            axis = self.spec.cut_axes[self.spec.cuts.index(name)]
            return result[:, kept_positions(axis, units)]
        value = self.conversion.analysis.values.get(self.nodes[name])
        if not isinstance(value, Value) or value.axis is None:
            return result
        axis = self.conversion.axis(value.labels.reshape(-1)[: result.shape[value.axis]])
        kept = torch.tensor(kept_positions(axis, units), dtype=torch.int64)
        return result.index_select(value.axis, kept)


def _unmixed(conversion: Conversion, captured: fx.Node, node: Node) -> list[Node]:
    """Operations to compare with in place of one that combines channels that may be cut.

    In their results each channel depends on itself alone. The list is `[node]` if the operation
    combines none, and empty if there is no replacement. Replacements are bounded (tanh); that of a
    reduction is also positive (sigmoid), because later operations may divide by it.
    """
    kind, given = operation(captured), arguments(captured)
    bounded = replace(node, op="tanh.default", args=node.args[:1], kwargs={})
    if kind == "layer_norm" or (kind == "group_norm" and given["num_groups"] == 1):
        return [bounded]
    if kind not in REDUCING:
        return [node]
    value = conversion.analysis.value(captured.all_input_nodes[0])
    size = len(value.shape)
    dims = given["dim"] if isinstance(given["dim"], list) else [given["dim"]]
    every = None in dims or not dims
    cut = set(conversion.analysis.labels.roots(value.labels).ravel().tolist()) & set(
        conversion.unit
    )
    if not cut or not (every or value.axis in {d % size for d in dims}):
        return [node]
    assert value.axis is not None
    if "softmax" in kind:
        return [bounded]
    axis = conversion.axis(value.labels.reshape(-1))
    least = kept_positions(axis, dict.fromkeys(range(len(conversion.groups)), 1))
    if every or len(dims) > 1 or least[:1] != [0]:  # all widths must keep position 0
        return []
    taken: tuple[Any, ...] = (node.args[0], value.axis, 0)
    op = "select.int"
    if given.get("keepdim"):
        taken, op = (*taken, 1), "slice.Tensor"
    first = replace(node, name=f"{node.name}_first", op=op, args=taken, kwargs={})
    return [first, replace(node, op="sigmoid.default", args=({"node": first.name},), kwargs={})]


def _watch(results: Results) -> Callable[[Any, Sequence[Any], Any], None]:
    def keep(step: Any, _args: Sequence[Any], value: Any) -> None:
        if isinstance(value, Tensor):
            results[step.name] = value.clone()  # a later in-place operation may overwrite it

    return keep


def _first_apart(spec: GraphSpec, got: Results, expected: Results) -> Node:
    """The first operation with different results, or else the last operation."""
    for node in spec.nodes:
        if node.name in got and node.name in expected:
            found = relative_error(got[node.name].double(), expected[node.name].double())
            if not found <= SEGMENT_TOLERANCE:
                return node
    return spec.nodes[-1]


def refuse_at(node: Node, reason: str) -> ConversionError:
    """An error that names an operation and its place in the model."""
    return ConversionError(node.path, node.op.partition(".")[0], reason)


def _width(spec: GraphSpec, variant: VariantCost) -> str:
    if not variant.segment:
        return "before the gate"
    return f"at {spec.percents[variant.choice]} % of the channels"
