"""Find the channels of a captured model that must be cut together, that is removed together.

Every index of a layer's output axis has a label, and an activation carries the labels of its
elements. Operations that move elements are applied to the labels themselves. Operations that
combine elements unite their labels, and those that mix all channels fix them, so that they are
never cut. An operation without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx

from dynaslim.conversion.capture import (
    BATCH,
    Captured,
    arguments,
    operation,
    refuse,
    shape_of,
    where,
)
from dynaslim.errors import ConversionError, first_line

FIXED: Final = 0
"""The label of positions that are never cut."""
LEAST: Final = 8
"""Layers with fewer output channels are never cut."""
_ROW: Final = 1 << 40

PASSED: Final = frozenset(
    """
    contiguous clone alias detach lift_fresh_copy dropout feature_dropout alpha_dropout to
    _to_copy type_as positive
    """.split()  # noqa: SIM905
)
"""Operations that change no values in evaluation mode."""
POINTWISE: Final = PASSED | frozenset(
    """
    relu relu6 hardtanh silu sigmoid hardsigmoid hardswish gelu leaky_relu elu selu celu mish
    tanh softplus softsign square sqrt rsqrt exp log neg abs erf reciprocal clamp clamp_min
    clamp_max log_sigmoid
    """.split()  # noqa: SIM905
)
COMBINING: Final = frozenset(
    """
    add sub mul div maximum minimum pow rsub true_divide prelu addcmul addcdiv lerp where
    """.split()  # noqa: SIM905
)
MOVING: Final = frozenset(
    """
    view reshape _unsafe_view flatten unflatten unsqueeze squeeze permute transpose t slice
    select narrow split split_with_sizes chunk unbind getitem cat concat concatenate stack
    expand expand_as repeat repeat_interleave roll flip pixel_shuffle pixel_unshuffle
    channel_shuffle unfold
    movedim swapaxes view_as reshape_as index index_select
    """.split()  # noqa: SIM905
)
SPATIAL: Final = frozenset(
    """
    max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool2d avg_pool2d
    adaptive_avg_pool2d adaptive_max_pool2d max_pool3d avg_pool3d upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d reflection_pad2d
    replication_pad2d pad constant_pad_nd lp_pool2d
    """.split()  # noqa: SIM905
)
REDUCING: Final = frozenset(
    """
    mean sum amax amin std var softmax log_softmax linalg_vector_norm
    """.split()  # noqa: SIM905
)
CONVOLVING: Final = frozenset(
    """
    conv1d conv2d conv3d conv_transpose2d
    """.split()  # noqa: SIM905
)
NORMALISING: Final = frozenset(
    """
    batch_norm layer_norm group_norm instance_norm
    """.split()  # noqa: SIM905
)
MIXING: Final = frozenset(
    """
    matmul bmm baddbmm scaled_dot_product_attention einsum cumsum im2col argmax topk
    """.split()  # noqa: SIM905
)


@dataclass
class Value:
    """The labels of a tensor: an array of size 1 along each axis on which they do not differ."""

    shape: tuple[int, ...]
    labels: np.ndarray
    rows: tuple[int, ...]
    """For every axis that runs over the batch, its size divided by the batch size; 0 for others."""

    @property
    def axis(self) -> int | None:
        """The only axis along which labels differ, or None."""
        varying = [axis for axis, size in enumerate(self.labels.shape) if size > 1]
        assert len(varying) < 2
        return varying[0] if varying else None

    @property
    def has_batch_axis(self) -> bool:
        """Whether the first axis is the batch axis, and no other axis runs over the batch."""
        return self.rows[:1] == (1,) and not any(self.rows[1:])

    @property
    def axis_of_channels(self) -> int:
        """The axis along which labels differ. Without one it is guessed from the shape: of an image
        (B, C, H, W) or (B, H, W, C), of tokens (B, tokens, C), or of features (B, C).
        """
        if self.axis is not None:
            return self.axis
        last = len(self.shape) == 4 and self.shape[1] == self.shape[2] != self.shape[3]
        return len(self.shape) - 1 if last or len(self.shape) < 4 else 1

    def along(self, axis: int) -> np.ndarray:
        """Labels along an axis."""
        return self.labels.ravel() if axis == self.axis else np.zeros(self.shape[axis], np.int64)

    def flat(self) -> np.ndarray:
        """Labels of all values of a row, flattened."""
        labels = np.zeros(1, np.int64) if self.axis is None else self.labels[0]
        return np.broadcast_to(labels, self.shape[1:]).ravel()


class Labels:
    """Sets of labels that are cut together (union-find)."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int) -> np.ndarray:
        """Make new labels, each in its own set."""
        first = len(self._parent)
        made = np.arange(first, first + count)
        self._parent = np.concatenate([self._parent, made])
        return made

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """The representative of each label's set; `FIXED` for labels that are never cut."""
        found: np.ndarray = self._parent[labels]
        while True:
            further: np.ndarray = self._parent[found]
            if (further == found).all():
                return found
            found = further

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Merge the sets of corresponding labels of two arrays."""
        pairs = np.unique(np.stack([a.ravel(), b.ravel()], 1), axis=0)
        for x, y in pairs[pairs[:, 0] != pairs[:, 1]].tolist():
            low, high = sorted((self._root(x), self._root(y)))
            self._parent[high] = low

    def _root(self, label: int) -> int:
        path = []
        while self._parent[label] != label:
            path.append(label)
            label = int(self._parent[label])
        for passed in path:
            self._parent[passed] = label
        return label

    def fix(self, labels: np.ndarray) -> None:
        """Mark labels as never cut."""
        self.unite(labels, np.zeros_like(labels))


class Analysis:
    """Labels of every activation and every axis of every parameter of a captured model."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.labels = Labels()
        self.values: dict[fx.Node, Value | list[Value]] = {}
        self.axes: dict[str, list[np.ndarray | None]] = {
            name: [None] * tensor.ndim for name, tensor in captured.tensors.items()
        }
        self.fixed_because: dict[fx.Node, str] = {}
        self.counted: dict[fx.Node, dict[str, Any]] = {}
        """Arguments that are or contain a number of channels: the labels counted, by operation."""
        self.readers: dict[Any, fx.Node] = {}
        """The operation that reads each parameter of a layer."""
        self.made: list[tuple[fx.Node, np.ndarray]] = []
        """Operations that make new channels, and the labels of these channels."""
        shape = shape_of(captured.image)
        plain = np.zeros((1,) * len(shape), np.int64)
        self.values[captured.image] = Value(shape, plain, (1, *[0] * (len(shape) - 1)))
        for node in captured.nodes:
            self.values[node] = self._rule(node)
        self.fix(captured.output, "the model's output")

    # -- access -------------------------------------------------------------------------------

    def value(self, node: Any) -> Value:
        """The labels of an activation, or of a parameter that is used as one."""
        if node in self.captured.names:
            tensor = self.captured.tensors[self.captured.names[node]]
            return Value(
                tuple(tensor.shape), np.zeros((1,) * tensor.ndim, np.int64), (0,) * tensor.ndim
            )
        found = self.values[node]
        assert isinstance(found, Value)
        return found

    def fix(self, node: fx.Node, reason: str) -> None:
        """Mark the labels of an activation as never cut, and record the reason."""
        labels = self.value(node).labels
        if (self.labels.roots(labels) != FIXED).any():
            self.fixed_because.setdefault(node, reason)
            self.labels.fix(labels)

    def along(self, node: fx.Node, axis: int, reason: str) -> np.ndarray:
        """The label of each position of an axis. If labels differ along another, they are fixed."""
        value = self.value(node)
        axis %= len(value.shape)
        if value.axis not in (None, axis):
            self.fix(node, reason)
            return np.zeros(value.shape[axis], np.int64)
        return np.broadcast_to(
            np.moveaxis(value.labels, axis, -1).reshape(-1)[: value.labels.shape[axis]],
            (value.shape[axis],),
        ).copy()

    def use(self, node: Any, axis: int, labels: np.ndarray) -> None:
        """Cut a parameter's axis together with these labels."""
        if node is None:
            return
        name = self.captured.names.get(node)
        assert name is not None
        before = self.axes[name][axis]
        if before is None:
            self.axes[name][axis] = labels
        else:
            self.labels.unite(before, labels)

    # -- rules --------------------------------------------------------------------------------

    def _rule(self, node: fx.Node) -> Value | list[Value]:
        kind = operation(node)
        for names, rule in self._rules():
            if kind in names:
                try:
                    return rule(node)
                except ConversionError:
                    raise
                except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    raise refuse(
                        node, f"its channels cannot be followed: {first_line(error)}"
                    ) from None
        raise refuse(node, "not an operation that can be converted")

    def _rules(self) -> Sequence[tuple[frozenset[str], Callable[[fx.Node], Value | list[Value]]]]:
        return (
            (CONVOLVING, self._convolution),
            (frozenset(["linear"]), self._linear),
            (NORMALISING, self._normalisation),
            (POINTWISE, self._pointwise),
            (COMBINING, self._combining),
            (SPATIAL, self._spatial),
            (MOVING, self._moving),
            (REDUCING, self._reducing),
            (MIXING, self._mixing),
        )

    def _made(self, node: fx.Node, axis: int, labels: np.ndarray, rows: tuple[int, ...]) -> Value:
        shape = shape_of(node)
        spread = [1] * len(shape)
        spread[axis] = len(labels)
        return Value(shape, labels.reshape(spread), rows)

    def _fresh(self, node: fx.Node, count: int, least: int = LEAST) -> np.ndarray:
        if count < least:
            return np.zeros(count, np.int64)
        labels = self.labels.fresh(count)
        self.made.append((node, labels))
        return labels

    def _parameter(self, node: fx.Node, argument: Any, what: str) -> fx.Node:
        first = self.readers.setdefault(argument, node)
        if first is not node:
            raise refuse(
                node, f"shares its {what} with {where(first) or 'the model'}: tied weights"
            )
        if argument not in self.captured.names:
            raise refuse(node, f"its {what} is computed from the image (as in CondConv)")
        assert isinstance(argument, fx.Node)
        return argument

    def _convolution(self, node: fx.Node) -> Value:
        given = arguments(node)
        x, weight = given["input"], self._parameter(node, given["weight"], "weight")
        channel = 1
        into = self.along(x, channel, "its positions hold channels")
        groups = given["groups"]
        outs = shape_of(node)[1]
        transposed = operation(node) == "conv_transpose2d"
        out_axis, in_axis = (1, 0) if transposed else (0, 1)
        rows = self.value(x).rows
        if groups == 1:
            self.use(weight, in_axis, into)
            out = self._fresh(node, outs)
            self.use(weight, out_axis, out)
        else:
            size, made = len(into) // groups, outs // groups
            self.counted[node] = {"groups": into.reshape(groups, size)[:, 0]}
            if transposed:
                self.fix(x, "a transposed convolution in groups")
                out = np.zeros(outs, np.int64)
            elif size == 1:
                out = np.repeat(into, made)
            elif groups > size:  # whole groups are cut
                blocks = into.reshape(groups, size)
                self.labels.unite(blocks, np.repeat(blocks[:, :1], size, 1))
                out = np.repeat(blocks[:, 0], made)
            else:  # every group is cut alike
                blocks = into.reshape(groups, size)
                self.labels.unite(blocks, np.repeat(blocks[:1], groups, 0))
                self.use(weight, 1, blocks[0])
                out = np.tile(self._fresh(node, made), groups)
            if not transposed:
                self.use(weight, 0, out)
        if given["bias"] is not None:
            self.use(self._parameter(node, given["bias"], "bias"), 0, out)
        return self._made(node, channel, out, rows)

    def _linear(self, node: fx.Node) -> Value:
        given = arguments(node)
        x, weight = given["input"], self._parameter(node, given["weight"], "weight")
        before, shape = self.value(x), shape_of(node)
        beside = before.axis not in (None, len(shape) - 1)
        # if beside: it mixes positions, in the same way for each channel
        out = self._fresh(node, shape[-1], least=shape[-1] + 1 if beside else LEAST)
        self.use(
            weight, 1, np.zeros(before.shape[-1], np.int64) if beside else self.along(x, -1, "")
        )
        self.use(weight, 0, out)
        if given["bias"] is not None:
            self.use(self._parameter(node, given["bias"], "bias"), 0, out)
        if beside:
            return Value(shape, before.labels, before.rows)
        return self._made(node, len(shape) - 1, out, before.rows)

    def _normalisation(self, node: fx.Node) -> Value:
        given, kind = arguments(node), operation(node)
        x = given["input"]
        value = self.value(x)
        if kind == "layer_norm":
            dims = len(given["normalized_shape"])
            first = len(value.shape) - dims
            for offset in range(dims):
                labels = self.along(x, first + offset, "layer norm over several axes")
                for name in ("weight", "bias"):
                    if given[name] is not None:
                        self.use(given[name], offset, labels)
            return Value(shape_of(node), self.value(x).labels, value.rows)
        labels = self.along(x, 1, f"{kind} of an axis that holds channels and pixels")
        if kind == "group_norm" and given["num_groups"] > 1:
            blocks = labels.reshape(given["num_groups"], -1)
            self.labels.unite(blocks, np.repeat(blocks[:, :1], blocks.shape[1], 1))
            self.counted[node] = {"num_groups": blocks[:, 0]}
        for name in ("weight", "bias", "running_mean", "running_var"):
            if given.get(name) is not None:
                self.use(self._parameter(node, given[name], name), 0, labels)
        return Value(shape_of(node), self.value(x).labels, value.rows)

    def _pointwise(self, node: fx.Node) -> Value:
        value = self.value(node.all_input_nodes[0])
        return Value(value.shape, value.labels, value.rows)

    def _combining(self, node: fx.Node) -> Value:
        shape = shape_of(node)
        given = [n for n in node.all_input_nodes if n not in self.captured.names]
        if operation(node) == "prelu":
            labels = self.along(node.args[0], 1, "prelu")  # type: ignore[arg-type]
            weight = node.args[1]
            if len(self.captured.tensors[self.captured.names[weight]]) > 1:  # type: ignore[index]
                self.use(weight, 0, labels)
            return self._pointwise(node)
        made: Value | None = None
        for other in given:
            value = _aligned(self.value(other), shape)
            made = value if made is None else self._united(made, value, shape)
        assert made is not None
        for parameter in node.all_input_nodes:
            if parameter in self.captured.names:
                self._broadcast(node, parameter, made, shape)
        return Value(shape, made.labels, made.rows)

    def _united(self, a: Value, b: Value, shape: tuple[int, ...]) -> Value:
        rows = tuple(max(x, y) for x, y in zip(a.rows, b.rows, strict=True))
        left, right = np.broadcast_arrays(a.labels, b.labels)
        both = (left != FIXED) & (right != FIXED)
        for one, other in ((a, b), (b, a)):
            # positions that are never cut fix those that they are combined with
            if one.axis is not None and other.shape[one.axis] > 1:
                both[:] = True
        if both.any():
            self.labels.unite(left[both], right[both])
        made = Value(shape, np.where(left != FIXED, left, right), rows)
        return self._tied(made)

    def _broadcast(
        self, node: fx.Node, parameter: fx.Node, value: Value, shape: tuple[int, ...]
    ) -> None:
        """Label a parameter that is combined with an activation element by element."""
        name = self.captured.names[parameter]
        tensor = self.captured.tensors[name]
        lead = len(shape) - tensor.ndim
        if lead == 0 and value.rows[0] and len(tensor) > 1:  # one entry for each row of the batch
            if len(parameter.users) > 1 or bool((tensor != tensor[:1]).any()):
                raise refuse(node, "a constant with a value for every row of the batch")
            tensor = self.captured.tensors[name] = tensor[:1].clone()
        for axis, size in enumerate(tensor.shape):
            at = lead + axis
            if size > 1 and value.axis == at:
                self.use(parameter, axis, value.labels.reshape(-1))

    def _spatial(self, node: fx.Node) -> Value | list[Value]:
        x = node.all_input_nodes[0]
        if isinstance(node.meta["val"], tuple):  # values and indices
            value, (*_, height, width) = self.value(x), node.meta["val"][0].shape
            shape = (*value.shape[:-2], int(height), int(width))
            if value.axis is not None and value.axis >= len(shape) - 2:
                raise refuse(node, "along an axis that holds channels")
            return [Value(shape, value.labels, value.rows)] * 2
        value, shape = self.value(x), shape_of(node)
        if operation(node) in ("pad", "constant_pad_nd"):
            pads = list(arguments(node)["pad"])
            axis = value.axis
            at = None if axis is None else 2 * (len(shape) - 1 - axis)
            if at is not None and at < len(pads) and (pads[at] or pads[at + 1]):
                inside = self.along(x, axis, "padding")  # type: ignore[arg-type]
                ends = [self._fresh(node, pad, least=0) for pad in pads[at : at + 2]]
                self.counted[node] = {"pad": [*pads[:at], *ends, *pads[at + 2 :]]}
                labels = np.concatenate([ends[0], inside, ends[1]])
                return self._made(node, axis, labels, value.rows)  # type: ignore[arg-type]
            return Value(shape, value.labels, value.rows)
        spatial = 1 if "1d" in operation(node) else 3 if "3d" in operation(node) else 2
        if value.axis is not None and value.axis >= len(shape) - spatial:
            self.fix(x, f"{operation(node)} along an axis that holds channels")
            return Value(shape, np.zeros((1,) * len(shape), np.int64), value.rows)
        return Value(shape, value.labels, value.rows)

    def _moving(self, node: fx.Node) -> Value | list[Value]:
        if operation(node) == "getitem":
            source = self.values[node.args[0]]  # type: ignore[index]
            assert isinstance(source, list)
            return source[node.args[1]]  # type: ignore[index]

        if operation(node) in ("expand", "repeat") and node.args[0] in self.captured.names:
            shape = shape_of(node)
            return Value(shape, np.zeros((1,) * len(shape), np.int64), (1, *[0] * (len(shape) - 1)))
        self._fix_if_picked(node)

        def full(argument: fx.Node) -> Tensor:
            if argument in self.captured.names:
                tensor = self.captured.tensors[self.captured.names[argument]]
                return torch.zeros(tensor.shape, dtype=torch.int64)
            return _full(self.value(argument))

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), full)
        moved = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(moved, Tensor):
            return self._collapsed(node, moved)
        return [self._collapsed(node, part) for part in moved]

    def _fix_if_picked(self, node: fx.Node) -> None:
        """Fix the channels if an operation picks, repeats or reorders single ones."""
        kind, given = operation(node), arguments(node)
        x = node.all_input_nodes[0]
        if x in self.captured.names:
            return
        value = self.value(x)
        if value.axis is None:
            return
        dims = len(value.shape)
        if kind in ("select", "unbind", "unfold", "index_select"):
            picked = given.get("dim", given.get("dimension", 0)) % dims == value.axis
        elif kind == "slice":
            along = given["dim"] % dims == value.axis
            picked = along and given["step"] != 1
            if along:
                labels = value.labels.reshape(-1)
                begin, end, _ = slice(given["start"], given["end"]).indices(len(labels))
                self.counted[node] = {"start": labels[:begin], "end": labels[:end]}
        elif kind in ("roll", "flip"):
            picked = not given["dims"] or value.axis in {d % dims for d in given["dims"]}
        elif kind == "index":
            indexed = [axis for axis, i in enumerate(given["indices"]) if i is not None]
            picked = value.axis in indexed
        else:
            picked = kind == "repeat" and given["repeats"][value.axis - dims] != 1
        if picked:
            self.fix(x, f"{kind} along the channels")

    def _collapsed(self, node: fx.Node, full: Tensor) -> Value:
        row, labels = (full // _ROW).numpy(), (full % _ROW).numpy()
        rows = []
        for axis, size in enumerate(row.shape):
            lead = np.take(row, [0], axis)
            varies = (row != lead).any()
            rows.append(size // BATCH if varies else 0)
            if varies:
                along = np.repeat(np.arange(BATCH), size // BATCH)
                spread = [-1 if a == axis else 1 for a in range(row.ndim)]
                if len(along) != size or (row != along.reshape(spread)).any():
                    raise refuse(node, "puts the rows of the batch in another order")
        value = Value(tuple(full.shape), _shrunk(labels), tuple(rows))
        several = len(np.unique(self.labels.roots(value.labels))) > 1
        value = self._tied(value)
        if several and value.axis is None:
            reason = f"{operation(node)} mixes channels with other positions"
            self.fixed_because.setdefault(node, reason)
        return value

    def _tied(self, value: Value) -> Value:
        """Where labels differ along two axes, unite them along the smaller axis."""
        while True:
            roots = self.labels.roots(value.labels)
            labels = _shrunk(roots)
            varying = [axis for axis, size in enumerate(labels.shape) if size > 1]
            if len(varying) < 2:
                return Value(value.shape, labels, value.rows)
            axis = min(varying, key=lambda a: labels.shape[a])
            first = np.take(labels, [0], axis)
            self.labels.unite(labels, np.broadcast_to(first, labels.shape))

    def _reducing(self, node: fx.Node) -> Value:
        x = node.all_input_nodes[0]
        value, shape = self.value(x), shape_of(node)
        given = arguments(node)
        if "softmax" in operation(node):
            return Value(shape, value.labels, value.rows)
        dims = given.get("dim")
        every = range(len(value.shape)) if dims in (None, []) else dims
        axes = {d % len(value.shape) for d in ([every] if isinstance(every, int) else every)}
        if any(value.rows[axis] for axis in axes):
            raise refuse(node, "reduces over the rows of the batch")
        labels = value.labels
        for axis in axes:
            labels = (
                np.take(labels, [0], axis)
                if labels.shape[axis] == 1
                else np.zeros_like(np.take(labels, [0], axis))
            )
        rows = list(value.rows)
        if not given.get("keepdim", False):
            kept = [axis for axis in range(len(value.shape)) if axis not in axes]
            labels = labels.reshape([labels.shape[axis] for axis in kept])
            rows = [rows[axis] for axis in kept]
        return Value(shape, labels, tuple(rows))

    def _mixing(self, node: fx.Node) -> Value:
        for x in node.all_input_nodes:
            if x not in self.captured.names:
                self.fix(x, f"{operation(node)} mixes its channels")
        first = self.value(node.all_input_nodes[0])
        shape = shape_of(node)
        rows = [0] * len(shape)
        if first.rows[0]:
            rows[0] = shape[0] // BATCH
        return Value(shape, np.zeros((1,) * len(shape), np.int64), tuple(rows))


def _aligned(value: Value, shape: tuple[int, ...]) -> Value:
    lead = len(shape) - len(value.shape)
    ones = (1,) * lead
    return Value(
        ones + value.shape,
        value.labels.reshape(ones + value.labels.shape),
        (0,) * lead + value.rows,
    )


def _full(value: Value) -> Tensor:
    labels = torch.from_numpy(np.ascontiguousarray(value.labels)).expand(value.shape).clone()
    for axis, per_row in enumerate(value.rows):
        if per_row:
            row = torch.arange(BATCH).repeat_interleave(per_row) * _ROW
            labels += row.reshape([-1 if a == axis else 1 for a in range(len(value.shape))])
    return labels


def _shrunk(labels: np.ndarray) -> np.ndarray:
    """Reduce every axis along which no labels differ to size 1."""
    for axis in range(labels.ndim):
        first = np.take(labels, [0], axis)
        if labels.shape[axis] > 1 and (labels == first).all():
            labels = first
    return labels
