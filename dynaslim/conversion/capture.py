"""Capture a user's `nn.Module` by `torch.export` as a flat list of operations and named parameters.

Values that depend on parameters alone (such as standardised weights) are computed once and become
parameters. In-place operations become out-of-place ones.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dynaslim.errors import ConversionError, UsageError, check, first_line

CALL: Final = "call_function"
BATCH: Final = 7
"""Batch size of the capture: a number that is seldom the size of another axis."""


class Outputs(NamedTuple):
    """The outputs of a model: the class logits, and others, which a converted network omits."""

    position: int
    logits: Tensor
    others: list[str]
    """Places and shapes of the other outputs."""

    @classmethod
    def of(cls, answer: Any) -> Outputs:
        """Find the class logits in a model's output, a tensor or a nested structure.

        Raises:
            UsageError: if there are several outputs and none, or more than one, is named `logits`.
        """
        if isinstance(answer, Mapping):  # of any type
            answer = dict(answer)
        outputs, _ = pytree.tree_flatten_with_path(answer)
        shown = []
        for path, value in outputs:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            shown.append(f"{pytree.keystr(path)} {what}".lstrip())
        # the key of a dict, the name of a field
        names = [[getattr(key, "key", getattr(key, "name", "")) for key in p] for p, _ in outputs]
        found = [n for n, path in enumerate(names) if len(names) == 1 or path[-1] == "logits"]
        if len(found) != 1 or not isinstance(outputs[found[0]][1], Tensor):
            raise UsageError(
                f"the model returns {', '.join(shown) or 'nothing'}: expected class logits alone, "
                f"or named `logits` in a dict or a named tuple"
            )
        position = found[0]
        others = shown[:position] + shown[position + 1 :]
        return cls(position, outputs[position][1], others)


@dataclass
class Captured:
    """The operations of a model in order, with its input, output and tensors.

    Arguments of a node are plain values and other nodes, including those of parameters (`names`).
    """

    nodes: list[fx.Node]
    image: fx.Node
    output: fx.Node
    tensors: dict[str, Tensor]
    """Parameters and buffers by name."""
    trained: set[str]
    """Names of the tensors that are parameters."""
    names: dict[fx.Node, str]
    """Nodes that represent a parameter or buffer, and its name in `tensors`."""
    outputs: Outputs
    """The model's outputs for the first image of the example."""


def where(node: fx.Node) -> str:
    """The path of the module that an operation belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return paths[-1] if paths else ""


def refuse(node: fx.Node, reason: str) -> ConversionError:
    """An error that names an operation and its place in the model."""
    return ConversionError(where(node), operation(node), reason)


def operation(node: fx.Node) -> str:
    """An operation's name without overload and in-place underscore, such as `conv2d`."""
    target = node.target
    if target is operator.getitem:
        return "getitem"
    name = getattr(target, "_schema", None)
    short = name.name.split("::")[-1] if name is not None else str(target)
    return short[:-1] if short.endswith("_") and not short.endswith("__") else short


def capture(model: nn.Module, example: Tensor) -> Captured:
    """Capture the operations of a model on images like `example` (B, C, H, W).

    Raises:
        UsageError: if the model is in training mode, has weights that are not finite, or cannot be
            captured; the message names the place.
    """
    for name, module in model.named_modules():
        if module.training:
            raise ConversionError(name, "", "in training mode; call model.eval() first")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ConversionError(name, "", "has values that are not finite")
    if example.ndim != 4 or not len(example):
        raise UsageError(f"example of shape {tuple(example.shape)}: expected (rows, C, H, W)")
    try:
        with torch.no_grad():
            answer = model(example[:1])
    except Exception as error:  # whatever the user's code raises
        reason = f"does not run on an example of shape {tuple(example.shape)}"
        raise ConversionError(_module(model, error), "", f"{reason}: {first_line(error)}") from None
    outputs = Outputs.of(answer)
    x = example[:1].expand(BATCH, -1, -1, -1).contiguous()
    try:
        with torch.no_grad():
            program = torch.export.export(model, (x,), strict=False)
    except Exception as error:  # torch.export raises many kinds
        reason = "cannot be captured by torch.export"
        if "DataDependent" in type(error).__name__:
            reason = "which operations run depends on values of the image; it " + reason
        raise ConversionError(_module(model, error), "", f"{reason}: {first_line(error)}") from None
    return _flat(program, outputs)


def _module(model: nn.Module, error: Exception) -> str:
    """The path of the innermost module whose code raised an error."""
    paths = {id(module): path for path, module in model.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        found = paths.get(id(frame.tb_frame.f_locals.get("self")), found)
        frame = frame.tb_next
    return found


def _flat(program: torch.export.ExportedProgram, outputs: Outputs) -> Captured:
    signature = program.graph_signature
    inputs = len(signature.user_inputs)
    check(inputs == 1, f"the model has {inputs} inputs: expected images alone")
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
    _without_contexts(program.graph_module)
    values: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder":
            if node.name in lifted:
                names[node] = lifted[node.name]
                values[node] = tensors[names[node]]
            else:
                image = node
        elif node.op == CALL:
            if str(node.target).startswith("aten._assert") or operation(node) in SKIPPED:
                continue
            constant = all(n in values for n in node.all_input_nodes)
            if operation(node) in FILLED or (constant and not _spread(node)):
                values[node] = _computed(node, values)
            else:
                nodes.append(node)
    _out_of_place(graph, values)
    assert image is not None
    (output,) = (node for node in graph.nodes if node.op == "output")
    result = output.args[0][outputs.position - len(signature.user_outputs)]
    live = set(_needed(result))
    nodes = [node for node in nodes if node in live]
    for node in {n for other in nodes for n in other.all_input_nodes if n in values}:
        if node not in names:
            _keep(node, values[node], tensors, names, trained)
    return Captured(nodes, image, result, tensors, trained, names, outputs)


SKIPPED: Final = ("_assert_tensor_metadata", "sym_constrain_range_for_size", "_assert_scalar")
FILLED: Final = (
    "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like",
)  # fmt: skip
"""Operations that use a tensor's shape and type, but not its values."""


def _without_contexts(module: fx.GraphModule) -> None:
    """Inline the operations that run in a context (autocast, no_grad)."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != CALL or str(node.target) not in CONTEXTS:
            continue
        at = next(n for n, a in enumerate(node.args) if getattr(a, "op", "") == "get_attr")
        if "autocast" in str(node.target) and node.args[2]:
            raise refuse(node, "runs in reduced precision (autocast)")
        inner = getattr(module, node.args[at].target)
        _without_contexts(inner)
        given = iter(node.args[at + 1 :])
        places = {n: next(given) for n in inner.graph.nodes if n.op == "placeholder"}
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(inner.graph, places)
        for user in list(node.users):
            assert operation(user) == "getitem"
            number: Any = user.args[1]
            user.replace_all_uses_with(results[number])
            graph.erase_node(user)
        graph.erase_node(node)


CONTEXTS: Final = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def _needed(result: fx.Node, last: Sequence[str] = ()) -> Iterator[fx.Node]:
    """Yield an operation and all its dependencies, stopping at the operations named in `last`."""
    seen, left = {result}, [result]
    while left:
        node = left.pop()
        yield node
        if node.op == CALL and operation(node) in last:
            continue
        for other in node.all_input_nodes:
            if other not in seen:
                seen.add(other)
                left.append(other)


def _spread(node: fx.Node) -> bool:
    """Whether the operation repeats a parameter for every row of the batch (a class token)."""
    if operation(node) not in ("expand", "repeat"):
        return False
    before = shape_of(node.all_input_nodes[0])
    return shape_of(node)[0] == BATCH and (len(before) < len(shape_of(node)) or before[0] == 1)


def _computed(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Compute an operation on parameters and sizes alone; in-place ones change their tensors."""

    def value(argument: fx.Node) -> Any:
        if argument in values:
            return values[argument]
        return torch.empty(shape_of(argument), dtype=argument.meta["val"].dtype)

    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable and _base(node.all_input_nodes[0]).op != CALL:
        raise refuse(node, "changes a parameter")
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _keep(
    node: fx.Node, made: Any, tensors: dict[str, Tensor], names: dict[fx.Node, str],
    trained: set[str],
) -> None:  # fmt: skip
    """Store a computed value as a parameter or constant."""
    if not isinstance(made, Tensor):
        raise refuse(node, "computes several values of parameters alone")
    sources = [names[n] for n in _needed(node, FILLED) if n in names]
    name = f"{next(iter(sources), 'constant')}_{node.name}"
    tensors[name] = made.detach().clone()
    names[node] = name
    if made.is_floating_point() and any(source in trained for source in sources):
        trained.add(name)


def _out_of_place(graph: fx.Graph, constant: Mapping[fx.Node, Any]) -> None:
    """Make the operations after an in-place one read its result, not the overwritten tensor."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != CALL or node in constant:
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
    return node.op == CALL and operation(node) in VIEWS


def _base(node: fx.Node) -> fx.Node:
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operation's arguments by their names in its schema, including defaults."""
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
