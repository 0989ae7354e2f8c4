"""The operations of a graph at given widths: a program of one segment."""

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
"""What is left of an axis: the first so many positions, these, or (None) all."""


def slicer(axis: Axis, units: Units) -> Slicer:
    """What is left of an axis."""
    left, whole = kept_count(axis, units), kept_count(axis, {})
    if left == whole:
        return None
    if len(axis) == 1:  # one run is cut at its end
        return left
    kept = kept_positions(axis, units)
    return left if kept == list(range(left)) else tuple(kept)


def cut(tensor: Tensor, slicers: Sequence[Slicer]) -> Tensor:
    """A tensor with what is left of each axis: a view where the first positions are."""
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


def program(graph: Graph, segment: int, before: int, choice: int) -> list[Step]:
    """A segment's operations at width index `choice` behind one at `before`."""
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
    """The module that keeps a batch normalisation's statistics."""
    return str(node.args[3]["tensor"]).removesuffix(".running_mean")


def norm_slot(graph: Graph, node: Node, before: int, choice: int) -> int:
    """The statistics that a batch normalisation uses: of what feeds it, at its own width."""
    axis = graph.tensors[node.args[3]["tensor"]].axes[0]
    segments = {graph.groups[run[0]].segment for run in axis if run[0] != WHOLE}
    return before if segments and max(segments) < node.segment and before >= 0 else choice


# Python's own bindings of the frequent ones: a call takes half as long
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
    """The function of an operation."""
    if op in _BOUND:
        return _BOUND[op]
    name, _, kind = op.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, name), kind)
    return found


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
