"""Programs: the operations of one segment of a graph at given widths."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynaslim.graph import WHOLE, Axis, Graph, Node, Units, kept_count, kept_positions

Slicer = int | tuple[int, ...] | None
"""The kept part of an axis: an int n keeps the first n positions, a tuple those, None all."""


def slicer(axis: Axis, units: Units) -> Slicer:
    """The kept part of an axis, given the units kept of each group."""
    left, whole = kept_count(axis, units), kept_count(axis, {})
    if left == whole:
        return None
    if len(axis) == 1:  # a single run keeps its first positions
        return left
    kept = kept_positions(axis, units)
    return left if kept == list(range(left)) else tuple(kept)


def cut(tensor: Tensor, slicers: Sequence[Slicer]) -> Tensor:
    """Slice a tensor along each axis; the result is a view if only first positions are kept."""
    for axis, left in enumerate(slicers):
        if left is None:
            continue
        if isinstance(left, int):
            tensor = tensor.narrow(axis, 0, left)
        else:
            tensor = tensor.index_select(axis, torch.tensor(left, device=tensor.device))
    return tensor


@dataclass(frozen=True)
class Read:
    """A reference to the result of an operation."""

    name: str


@dataclass(frozen=True)
class Cut:
    """A parameter or buffer, sliced to the widths of a program."""

    name: str
    slicers: tuple[Slicer, ...]


@dataclass(frozen=True)
class Rows:
    """A multiple of the batch size."""

    times: int


@dataclass(frozen=True)
class Step:
    """An operation of a program. Its arguments are plain values, `Read`, `Cut` and `Rows`."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    norm: tuple[str, int] | None = None
    """For batch normalisation, its module and the slot of its statistics."""


def program(graph: Graph, segment: int, before: int, choice: int) -> list[Step]:
    """A segment's operations at width index `choice`, after a segment at `before`."""
    units = graph.units(segment, before, choice)

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
            axes = graph.tensors[inner].axes
            return Cut(inner, tuple(slicer(axis, units) for axis in axes))
        if isinstance(value, list | tuple):
            return [resolve(inner) for inner in value]
        return value

    steps = []
    for node in graph.nodes:
        if node.segment != segment:
            continue
        kwargs = {name: resolve(value) for name, value in node.kwargs.items()}
        norm = None
        if node.op == "batch_norm.default":
            norm = (norm_of(node), norm_slot(graph, node, before, choice))
        steps.append(Step(node.name, node.op, tuple(map(resolve, node.args)), kwargs, norm))
    return steps


def norm_of(node: Node) -> str:
    """The name of the module that holds a batch normalisation's statistics."""
    return str(node.args[3]["tensor"]).removesuffix(".running_mean")


def norm_slot(graph: Graph, node: Node, before: int, choice: int) -> int:
    """The slot of a batch normalisation's statistics: `before` if all its cut channels come from
    earlier segments (and there is a `before`), else `choice`.
    """
    axis = graph.tensors[node.args[3]["tensor"]].axes[0]
    segments = {graph.groups[run[0]].segment for run in axis if run[0] != WHOLE}
    return before if segments and max(segments) < node.segment and before >= 0 else choice


# Python bindings of frequent operations: a call takes half as long as through torch.ops
_BOUND: Mapping[str, Callable[..., Any]] = {
    "add.Tensor": torch.add,
    "conv2d.default": torch.conv2d,
    "getitem": operator.getitem,
    "hardtanh.default": F.hardtanh,
    "linear.default": F.linear,
    "max_pool2d.default": torch.max_pool2d,
    "mean.dim": torch.mean,
    "mul.Tensor": torch.mul,
    "relu.default": torch.relu,
    "silu.default": F.silu,
}


def overload(op: str) -> Callable[..., Any]:
    """The callable that computes an operation."""
    if op in _BOUND:
        return _BOUND[op]
    name, _, kind = op.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, name), kind)
    return found


def reads(step: Step) -> Iterator[str]:
    """Names of the operations whose results a step reads, with repetitions."""

    def inner(value: Any) -> Iterator[str]:
        if isinstance(value, Read):
            yield value.name
        elif isinstance(value, list | tuple):
            for part in value:
                yield from inner(part)

    yield from inner(step.args)
    yield from inner(list(step.kwargs.values()))
