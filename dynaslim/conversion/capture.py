"""A user's `nn.Module` as a flat list of operations: `torch.export`, parameters under their names.

What depends on parameters alone (standardised weights, say) is computed once and becomes a
parameter; operations in place become ordinary ones.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from dynaslim.errors import UsageError

BATCH: Final = 2
"""Rows of the example that a model is captured with: axes that hold them are found by it."""


@dataclass
class Captured:
    """Operations in order; what they read and compute with.

    Arguments of a node are nodes, parameters (`Parameter`) and plain values.
    """

    nodes: list[fx.Node]
    image: fx.Node
    output: fx.Node
    tensors: dict[str, Tensor]
    """Parameters and buffers by name."""
    trained: set[str]
    """Names of those that are parameters."""
    names: dict[fx.Node, str] = field(default_factory=dict)
    """Nodes that stand for a tensor of `tensors`."""


def where(node: fx.Node) -> str:
    """The path of the module that an operation belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return (paths[-1] if paths else "") or "the model itself"


def refuse(node: fx.Node, reason: str) -> UsageError:
    """An error that names an operation and its place in the model."""
    return UsageError(f"{where(node)}: {operation(node)}: {reason}")


def operation(node: fx.Node) -> str:
    """An operation's name, such as `conv2d`; without the overload, in place or not."""
    target = node.target
    if target is operator.getitem:
        return "getitem"
    name = getattr(target, "_schema", None)
    short = name.name.split("::")[-1] if name is not None else str(target)
    return short[:-1] if short.endswith("_") and not short.endswith("__") else short


def capture(model: nn.Module, example: Tensor) -> Captured:
    """The operations of a model on images like `example` (B, C, H, W).

    Raises:
        UsageError: if the model is in training mode, has weights that are not finite, or cannot be
            captured; the message names the place.
    """
    for name, module in model.named_modules():
        if module.training:
            raise UsageError(f"{name or 'model'}: in training mode; call model.eval() first")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UsageError(f"{name}: has values that are not finite")
    if example.ndim != 4 or not len(example):
        raise UsageError(f"example of shape {tuple(example.shape)}: expected (rows, C, H, W)")
    x = example[:1].expand(BATCH, -1, -1, -1).contiguous()
    try:
        with torch.no_grad():
            model(x)
    except Exception as error:  # whatever the user's code raises
        raise UsageError(
            f"the model does not run on an example of shape {tuple(example.shape)}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    try:
        with torch.no_grad():
            program = torch.export.export(model, (x,), strict=False)
    except Exception as error:  # torch.export raises many kinds
        raise UsageError(
            f"the model cannot be captured by torch.export: {str(error).splitlines()[0]}"
        ) from None
    return _flat(program)


def _flat(program: torch.export.ExportedProgram) -> Captured:
    signature = program.graph_signature
    if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
        raise UsageError(
            f"the model has {len(signature.user_inputs)} inputs and "
            f"{len(signature.user_outputs)} outputs: expected one of each"
        )
    tensors: dict[str, Tensor] = dict(program.state_dict)
    tensors |= {k: v for k, v in program.constants.items() if isinstance(v, Tensor)}
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    trained = set(signature.inputs_to_parameters.values())
    names: dict[fx.Node, str] = {}
    image: fx.Node | None = None
    nodes: list[fx.Node] = []
    graph = program.graph
    _out_of_place(graph)
    for node in list(graph.nodes):
        if node.op == "placeholder":
            if node.name in lifted:
                names[node] = lifted[node.name]
            else:
                image = node
        elif node.op == "call_function":
            if str(node.target).startswith("aten._assert") or operation(node) in SKIPPED:
                continue
            if all(n in names for n in node.all_input_nodes):
                _fold(node, tensors, names, trained)
            else:
                nodes.append(node)
    assert image is not None
    (output,) = (node for node in graph.nodes if node.op == "output")
    (result,) = output.args[0]
    live = set(_needed(result))
    nodes = [node for node in nodes if node in live]
    return Captured(nodes, image, result, tensors, trained, names)


SKIPPED: Final = ("_assert_tensor_metadata", "sym_constrain_range_for_size", "_assert_scalar")


def _needed(result: fx.Node) -> Iterator[fx.Node]:
    seen, left = {result}, [result]
    while left:
        node = left.pop()
        yield node
        for other in node.all_input_nodes:
            if other not in seen:
                seen.add(other)
                left.append(other)


def _fold(
    node: fx.Node, tensors: dict[str, Tensor], names: dict[fx.Node, str], trained: set[str]
) -> None:
    """Compute what depends on parameters alone."""

    def value(argument: fx.Node) -> Tensor:
        return tensors[names[argument]]

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
    with torch.no_grad():
        made = node.target(*args, **kwargs)  # type: ignore[operator]
    base = next((names[n] for n in node.all_input_nodes), "constant")
    if not isinstance(made, Tensor):
        raise refuse(node, "computes several values of parameters alone")
    name = f"{base}_{node.name}"
    tensors[name] = made
    names[node] = name
    if any(names[n] in trained for n in node.all_input_nodes):
        trained.add(name)


def _out_of_place(graph: fx.Graph) -> None:
    """Let everything behind an operation in place read its result, not what it overwrote."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        changed = node.args[0]
        if operation(node) in ("setitem", "index_put", "copy") or not isinstance(changed, fx.Node):
            raise refuse(node, "writes into a part of a tensor")
        if _is_view(changed) and any(
            order[user] > order[node] for user in _base(changed).users if user is not changed
        ):
            raise refuse(node, "changes a view of a tensor that is read again")
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)


VIEWS: Final = (
    "view", "slice", "select", "permute", "transpose", "unsqueeze", "squeeze", "expand", "split",
    "chunk", "getitem", "narrow", "unbind", "t",
)  # fmt: skip


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and operation(node) in VIEWS


def _base(node: fx.Node) -> fx.Node:
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operation's arguments by the names of its schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {"self": node.args[0], "index": node.args[1]}
    found: dict[str, Any] = {}
    for number, argument in enumerate(schema.arguments):
        if number < len(node.args):
            found[argument.name] = node.args[number]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of an operation's result, for `BATCH` rows."""
    value = node.meta["val"]
    return tuple(int(size) for size in value.shape)
