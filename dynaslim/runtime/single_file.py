"""A whole routed network in one ONNX graph, for applications that run one image at a time.

Every decision is an `If` node, which runs only the branch taken. Weights are stored once, in the
main graph, and branches refer to them, so the file grows with the differences between variants, not
with their number. Segments follow each other instead of being nested, so the file does not grow
with the number of routes either. Each gate's logits get a bias, an input with a default of zero,
through which a budget can be set from outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from dynaslim.errors import check
from dynaslim.runtime.libraries import require
from dynaslim.runtime.onnx_graph import IR_VERSION, OPSET
from dynaslim.runtime.variants import SegmentVariant, VariantSource, variant_table

if TYPE_CHECKING:
    import onnx


class _Parts:
    """Loads the graphs of variants, with unique names and common weights."""

    def __init__(self, source: VariantSource) -> None:
        self._onnx = require("onnx")
        self._source = source
        self._shared: dict[bytes, str] = {}
        self.weights: list[Any] = []

    def nodes(self, variant: SegmentVariant, x: str, prefix: str) -> tuple[list[Any], list[str]]:
        """The nodes of a variant with input `x`, and the names of its outputs."""
        graph = self._onnx.load_from_string(self._source.onnx(variant)).graph
        names = {"x": x}
        for tensor in graph.initializer:
            own = tensor.name
            names[own] = self._weight(tensor)
        for node in graph.node:
            node.input[:] = [names.get(name, prefix + name) for name in node.input]
            node.output[:] = [prefix + name for name in node.output]
            node.name = prefix + node.name
        return list(graph.node), [prefix + output.name for output in graph.output]

    def _weight(self, tensor: Any) -> str:
        dims = f"{tensor.data_type} {list(tensor.dims)}".encode()
        digest = hashlib.sha256(dims + tensor.raw_data).digest()
        if digest not in self._shared:
            tensor.name = self._shared[digest] = f"weight_{len(self._shared)}"
            self.weights.append(tensor)
        return self._shared[digest]


def single_file(source: VariantSource) -> onnx.ModelProto:
    """Build the network as one ONNX model.

    Inputs: `x` (1, channels, height, width), and for each gate g an optional `bias_g` (options,),
    which is added to the gate's logits. Outputs: `logits` (1, classes) and `choices` (1, gates)
    int64, the width index that each gate chose.

    Raises:
        UsageError: if the network has no gates, or the package `onnx` is not installed.
    """
    spec = source.spec
    check(bool(spec.gates), f"{spec.name} has no gates")
    helper, numpy_helper = require("onnx").helper, require("onnx.numpy_helper")
    kinds, parts = require("onnx").TensorProto, _Parts(source)

    def constant(value: np.ndarray, name: str) -> str:
        parts.weights.append(numpy_helper.from_array(value, name))
        return name

    def info(name: str, shape: Sequence[Any], kind: int = kinds.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    def node(kind: str, inputs: Sequence[str], out: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs, [out], name=out, **attributes)

    def outputs(names: Sequence[str], number: int) -> list[Any]:
        if number == len(spec.gates):
            return [info(names[0], [1, spec.num_classes])]
        # the number of channels depends on the branch
        options = len(spec.gates[number].choices)
        return [info(names[0], [1, None, None, None]), info(names[1], [1, options])]

    def branches(
        number: int, cases: Sequence[SegmentVariant], first: int, x: str, case: str, at: str
    ) -> Any:
        """A tree of `If`s that runs variant number `case` among `cases`, numbered from `first`."""
        last = number == len(spec.gates)
        results = [f"{at}_logits"] if last else [f"{at}_features", f"{at}_gate"]
        if len(cases) == 1:
            nodes, made = parts.nodes(cases[0], x, f"{at}_form_")
            same = [
                helper.make_node("Identity", [a], [b], name=f"{b}_same")
                for a, b in zip(made, results, strict=True)
            ]
            return helper.make_graph([*nodes, *same], at, [], outputs(results, number))
        # bisect, so that a variant is reached in few steps
        middle = len(cases) // 2
        bound = constant(np.array([first + middle], np.int64), f"{at}_bound")
        less = node("Less", [case, bound], f"{at}_less")
        flat = node("Squeeze", [f"{at}_less"], f"{at}_condition")  # a condition is a scalar
        choose = helper.make_node(
            "If",
            [f"{at}_condition"],
            results,
            name=f"{at}_if",
            then_branch=branches(number, cases[:middle], first, x, case, f"{at}a"),
            else_branch=branches(number, cases[middle:], first + middle, x, case, f"{at}b"),
        )
        return helper.make_graph([less, flat, choose], at, [], outputs(results, number))

    table = variant_table(spec)
    nodes, (x, logits) = parts.nodes(table[0][0][0], "x", "trunk_")
    inputs = [info("x", [1, spec.in_channels, "height", "width"])]
    chosen, before_option = [], ""
    for number, gate in enumerate(spec.gates, start=1):
        options = len(gate.choices)
        at = f"s{number}"
        constant(np.zeros(options, np.float32), f"bias_{number - 1}")
        inputs.append(info(f"bias_{number - 1}", [options]))
        nodes.append(node("Add", [logits, f"bias_{number - 1}"], f"{at}_sum"))
        nodes.append(node("ArgMax", [f"{at}_sum"], f"{at}_option", axis=1, keepdims=0))
        case = f"{at}_option"
        if number > 1:  # the variant depends on both choices
            scale = constant(np.array([options], np.int64), f"{at}_options")
            nodes.append(node("Mul", [before_option, scale], f"{at}_row"))
            nodes.append(node("Add", [f"{at}_row", case], f"{at}_case"))
            case = f"{at}_case"
        tree = branches(number, list(chain.from_iterable(table[number])), 0, x, case, at)
        nodes += list(tree.node)
        widths = constant(np.array(gate.choices, np.int64), f"{at}_choices")
        nodes.append(node("Gather", [widths, f"{at}_option"], f"{at}_choice"))
        chosen.append(f"{at}_choice")
        x, logits = (tree.output[0].name, tree.output[-1].name)
        before_option = f"{at}_option"
    axes = constant(np.array([1], np.int64), "choice_axis")
    for name in chosen:
        nodes.append(node("Unsqueeze", [name, axes], f"{name}_2d"))
    nodes.append(node("Concat", [f"{name}_2d" for name in chosen], "choices", axis=1))
    nodes.append(node("Identity", [x], "logits"))
    results = [
        info("logits", [1, spec.num_classes]),
        info("choices", [1, len(spec.gates)], kinds.INT64),
    ]
    graph = helper.make_graph(nodes, spec.name, inputs, results, initializer=parts.weights)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="dynaslim"
    )
    model.ir_version = IR_VERSION
    require("onnx").checker.check_model(model)
    return model
