"""Build a network with gates from a captured model: groups, order, widths, operations, costs."""

from __future__ import annotations

import bisect
import copy
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn

from dynaslim.conversion.capture import (
    BATCH,
    arguments,
    capture,
    operation,
    shape_of,
    where,
)
from dynaslim.conversion.channels import FIXED, NORMALISING, PASSED, POINTWISE, Analysis, Value
from dynaslim.conversion.verify import refuse_at, verify_whole, verify_widths
from dynaslim.cost import operation_madds
from dynaslim.errors import UsageError, check, first_line
from dynaslim.graph import (
    IMAGE,
    PACKED,
    WHOLE,
    Axis,
    GateInput,
    GraphSpec,
    Group,
    Node,
    OtherSize,
    TensorSpec,
    VariantCost,
    kept_count,
)
from dynaslim.nn.net import SlimNet
from dynaslim.nn.program import Step
from dynaslim.nn.sorting import Importance, sort_channels
from dynaslim.spec import GateSpec

MOST_TENSORS: Final = 8
"""The most tensors that may cross a gate."""
TRUNK: Final = 1 / 3
"""The share of the multiply-adds that should come before the gate, by default."""
MULTIPLE: Final = 8
"""Widths are rounded to multiples of so many channels."""


def convert(
    model: nn.Module,
    example: Tensor,
    *,
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    images: Iterable[Tensor] | None = None,
    gate_at: Sequence[str] = (),
    protect: Sequence[str] = (),
    name: str | None = None,
    other_sizes: Sequence[tuple[int, int]] = (),
    importance: Importance | None = None,
) -> SlimNet:
    """Convert `model` into a dynamic slimmable network that gives the same answers at full width.

    `example` holds images (B, C, H, W) that the model accepts, of the size that it will run on.
    `widths` are the shares of channels kept after the gate, rising to 1. Channels are sorted by
    importance over `images`, batches of network inputs; without images, by the scale and shift of
    batch normalisation. `importance` names the rule explicitly: `activation`, `bn`, or `weight`,
    the norm of the weights alone. `gate_at` names the modules after which gates are placed; by
    default there is one gate, after about a third of the multiply-adds. Channels of modules at or
    below a path in `protect` are never cut. `other_sizes` are further image sizes (height, width)
    in pixels for which `net.at_size` can return the network.

    Raises:
        UsageError: if the model cannot be converted; the message names the place and the reason.
    """
    conversion = Conversion(model, example, widths, gate_at, protect, name)
    return conversion.net(images, other_sizes, importance)


class Conversion:
    """The steps of a conversion and their results."""

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        gate_at: Sequence[str] = (),
        protect: Sequence[str] = (),
        name: str | None = None,
        *,
        cuts: Sequence[str] = (),
    ) -> None:
        rising = all(a < b for a, b in itertools.pairwise(widths))
        if not (widths and rising and widths[0] > 0 and widths[-1] == 1):
            raise UsageError(f"widths {tuple(widths)}: expected shares that rise to 1")
        self.model, self.example, self.widths = model, example, tuple(widths)
        self.protect = tuple(protect)
        self.name = name or type(model).__name__.lower()
        self.captured = capture(model, example)
        self.analysis = Analysis(self.captured)
        for prefix in protect:
            self._protect(prefix)
        self.elastic_share = self._elastic_share()
        """Share of the multiply-adds in layers with at least one side that could be cut."""
        self.position = {node: number for number, node in enumerate(self.captured.nodes)}
        self.crossing = self._crossing()
        """For each operation that a gate can follow: all results that are needed after it."""
        self.cuts = [node for node in self.captured.nodes if node.name in cuts]
        if not cuts:
            self.cuts = self._cuts(gate_at)
        self.cut_positions = sorted(self.position[cut] for cut in self.cuts)
        self._keep_trunk_whole()
        self._find_groups()

    # -- gates ----------------------------------------------------------------------------------

    def _madds(self, node: fx.Node) -> int:
        if not isinstance(node.meta.get("val"), Tensor):
            return 0
        values = [
            self.captured.tensors[self.captured.names[x]]
            if x in self.captured.names
            else x.meta["val"]
            for x in node.all_input_nodes
        ]
        shapes = [value.shape for value in values if isinstance(value, Tensor)]
        return operation_madds(operation(node), shapes, shape_of(node)) // BATCH

    def _crossing(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        nodes = self.captured.nodes
        last: dict[fx.Node, int] = {}
        for number, node in enumerate(nodes):
            for read in node.all_input_nodes:
                last[read] = number
        found: dict[fx.Node, tuple[fx.Node, ...]] = {}
        live = [self.captured.image]
        for number, node in enumerate(nodes):
            live = [n for n in (*live, node) if last.get(n, -1) > number]
            if live[-1:] != [node] or len(live) > MOST_TENSORS:
                continue
            values = [self.analysis.values.get(n) for n in live]
            by_rows = all(isinstance(v, Value) and v.has_batch_axis for v in values)
            if by_rows and len(shape_of(node)) in (3, 4):
                found[node] = tuple(live)
        return found

    def _is_single_map(self, node: fx.Node) -> bool:
        """Whether the result of an operation is a feature map and all that is needed after it."""
        value = self.analysis.value(node)
        return (
            self.crossing[node] == (node,) and len(value.shape) == 4 and value.axis_of_channels == 1
        )

    def _cuts(self, gate_at: Sequence[str]) -> list[fx.Node]:
        places = [list(filter(self._is_single_map, self.crossing)), list(self.crossing)]
        done, total = {}, 0
        for node in self.captured.nodes:
            total += self._madds(node)
            done[node] = total
        if gate_at:
            cuts = []
            for path in gate_at:
                inside = [
                    [n for n in nodes if f"{where(n)}.".startswith(f"{path}.")] for nodes in places
                ]
                if not inside[1]:
                    names = dict.fromkeys(where(n) for n in self.crossing if where(n))
                    raise UsageError(
                        f"gate at {path!r}: there is no such module behind which {MOST_TENSORS} "
                        f"tensors or fewer are all that is needed; a gate can be behind "
                        f"{', '.join(list(names)[:40])}"
                    )
                cuts.append(self._after_activations((inside[0] or inside[1])[-1]))
            check(len(set(cuts)) == len(cuts), f"gate_at {list(gate_at)}: two gates at one place")
            return sorted(cuts, key=self.position.__getitem__)
        parts = ((0.1, 0.6), (1e-9, 1 - 1e-9))
        near = next(
            filter(
                None,
                (
                    [n for n in nodes if low <= done[n] / max(1, total) <= high]
                    for low, high in parts
                    for nodes in places
                ),
            ),
            None,
        )
        if near is None:
            raise UsageError(
                f"{self.name}: at no place are {MOST_TENSORS} tensors or fewer all that is needed "
                f"behind it, so there is no place for a gate"
            )

        elastic = self._elastic_behind(near)

        def badness(node: fx.Node) -> float:
            away = abs(done[node] / total - TRUNK)
            # twice as many values across the gate cost as much as a twentieth of the multiply-adds
            values = math.log2(sum(math.prod(shape_of(live)) for live in self.crossing[node]))
            return 0.5 * away + 0.05 * values - elastic[node] / total

        return [self._after_activations(min(near, key=badness))]

    def _layers(self) -> Iterator[tuple[fx.Node, int, list[np.ndarray]]]:
        """Yield layers, their multiply-adds, and the channel labels of each side that has some."""
        for node in self.captured.nodes:
            madds = self._madds(node)
            if madds:
                weight = self.captured.names.get(arguments(node).get("weight"))  # type: ignore[arg-type]
                axes = [] if weight is None else self.analysis.axes[weight][:2]
                yield node, madds, [self.analysis.labels.roots(a) for a in axes if a is not None]

    def _elastic_share(self) -> float:
        elastic = total = 0
        for _, madds, sides in self._layers():
            total += madds
            elastic += madds * any((side != FIXED).mean() > 0.5 for side in sides)
        return elastic / max(1, total)

    def _elastic_behind(self, cuts: Sequence[fx.Node]) -> dict[fx.Node, float]:
        """For each gate position, the multiply-adds after it that could be cut.

        Each side of a layer counts half. A channel that any layer makes before the gate stays whole
        after it.
        """
        labels = self.analysis.labels
        first = np.full(len(labels), len(self.position), np.int64)
        for node, made in self.analysis.made:
            np.minimum.at(first, labels.roots(made), self.position[node])
        first[FIXED] = -1
        found = dict.fromkeys(cuts, 0.0)
        for node, madds, sides in self._layers():
            made_at = [np.median(first[side]) for side in sides]
            for cut in cuts:
                at = self.position[cut]
                if self.position[node] > at:
                    found[cut] += madds / 2 * sum(made > at for made in made_at)
        return found

    def _after_activations(self, node: fx.Node) -> fx.Node:
        """The last of the normalisations and activations that directly follow an operation."""
        nodes = self.captured.nodes
        while self.position[node] + 1 < len(nodes):
            following = nodes[self.position[node] + 1]
            as_many = len(self.crossing.get(following, ())) == len(self.crossing[node])
            if (
                not as_many
                or node not in following.all_input_nodes
                or operation(following) not in POINTWISE | NORMALISING
            ):
                break
            node = following
        return node

    def segment_of(self, node: fx.Node) -> int:
        """The segment of an operation: the number of gates before it."""
        return bisect.bisect_left(self.cut_positions, self.position[node])

    # -- groups -------------------------------------------------------------------------------

    def _protect(self, prefix: str) -> None:
        nodes = [n for n in self.captured.nodes if f"{where(n)}.".startswith(f"{prefix}.")]
        if not nodes:
            raise UsageError(f"protect {prefix!r}: the model has no such module")
        for node in nodes:
            if isinstance(self.analysis.values[node], Value):
                self.analysis.fix(node, "protected")

    def _keep_trunk_whole(self) -> None:
        """Fix the channels that are made before the first gate or on both sides of a gate."""
        labels = self.analysis.labels
        segments: dict[int, set[int]] = {}
        for node, made in self.analysis.made:
            segment = self.segment_of(node)
            for root in np.unique(labels.roots(made)).tolist():
                segments.setdefault(root, set()).add(segment)
        for number, cut in enumerate(self.cuts):  # channels may not cross two gates either
            for node in self.crossing[cut]:
                for root in np.unique(labels.roots(self.analysis.value(node).labels)).tolist():
                    made_in = segments.get(root)
                    if made_in and number > max(made_in):
                        made_in.add(0)
        self.segments: dict[int, int] = {}
        whole = []
        for root, found in segments.items():
            if root != FIXED and found == {max(found)} and 0 not in found:
                self.segments[root] = max(found)
            else:
                whole.append(root)
        labels.fix(np.array(whole, np.int64))

    def _vectors(self) -> Iterable[np.ndarray]:
        """Yield the label roots along every axis of a parameter or activation with channels."""
        labels = self.analysis.labels
        for axes in self.analysis.axes.values():
            for axis in axes:
                if axis is not None:
                    yield labels.roots(axis)
        for value in self.analysis.values.values():
            if isinstance(value, Value) and value.axis is not None:
                yield labels.roots(value.labels.reshape(-1))

    def _find_groups(self) -> None:
        """Form groups: roots that occur in the same axes, equally often, become units of one."""
        labels = self.analysis.labels
        size = len(labels)
        seen = np.zeros(size, np.uint64)
        rng = np.random.default_rng(0)
        first = np.full(size, -1, np.int64)
        order = 0
        most = np.zeros(size, np.int64)
        for vector in self._vectors():
            roots, index, counts = np.unique(vector, return_index=True, return_counts=True)
            key = rng.integers(1, 1 << 62, dtype=np.uint64)
            seen[roots] += key * counts.astype(np.uint64)
            most[roots] = np.maximum(most[roots], counts)
            new = first[roots] < 0
            first[roots[new]] = order + index[new]
            order += len(vector)
        self.unit: dict[int, tuple[int, int]] = {}
        self.groups: list[Group] = []
        roots = np.array(sorted(self.segments), np.int64)
        roots = roots[(labels.roots(roots) == roots) & (first[roots] >= 0)] if len(roots) else roots
        keys = seen[roots] + np.array([self.segments[r] for r in roots.tolist()], np.uint64)
        for key in dict.fromkeys(keys[np.argsort(first[roots])].tolist()):
            units = roots[keys == key]
            units = units[np.argsort(first[units])]
            number = len(self.groups)
            for unit, root in enumerate(units.tolist()):
                self.unit[root] = (number, unit)
            each = int(most[units[0]])
            self.groups.append(
                Group(
                    len(units),
                    self.segments[int(units[0])],
                    tuple(_kept(len(units), each, width) for width in self.widths),
                )
            )

    def axis(self, vector: np.ndarray) -> Axis:
        """Runs of units along an axis, from its labels."""
        roots = self.analysis.labels.roots(vector).tolist()
        runs: list[list[int]] = []
        for (group, unit), same in itertools.groupby(
            self.unit.get(root, (WHOLE, 0)) for root in roots
        ):
            each = sum(1 for _ in same)
            if group == WHOLE:
                runs.append([WHOLE, 0, each, 1])
            elif runs and runs[-1] == [group, unit - runs[-1][2], runs[-1][2], each]:
                runs[-1][2] += 1
            else:
                runs.append([group, unit, 1, each])
        return tuple((a, b, c, d) for a, b, c, d in runs)

    @torch.no_grad()
    def results(self, image: Tensor) -> dict[str, Tensor]:
        """Results of captured operations by name, on `BATCH` copies of an image (1, C, H, W)."""
        found: dict[fx.Node, Any] = {self.captured.image: image.expand(BATCH, -1, -1, -1)}
        for node, name in self.captured.names.items():
            found[node] = self.captured.tensors[name]
        kept = {}
        for node in self.captured.nodes:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), found.__getitem__)
            made = found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if isinstance(made, Tensor):
                kept[node.name] = made.clone()  # a later in-place operation may overwrite it
        return kept

    # -- operations ---------------------------------------------------------------------------

    def _sizes(self, value: Value) -> list[Any]:
        found: list[Any] = []
        for axis, (size, rows) in enumerate(zip(value.shape, value.rows, strict=True)):
            if rows and axis == value.axis:
                vector = value.labels.reshape(-1)[: size // BATCH]
                found.append({"rows": self.axis(vector)})
            elif rows:
                found.append({"rows": rows})
            elif axis == value.axis:
                found.append({"axis": self.axis(value.labels.reshape(-1))})
            else:
                found.append(int(size))
        return found

    def _count(self, counted: Any) -> Any:
        """Encode the number of kept positions with these labels; in a list, of each item."""
        if isinstance(counted, list):
            return list(map(self._count, counted))
        if isinstance(counted, int):
            return counted
        axis = self.axis(counted)
        return {"axis": axis} if any(run[0] != WHOLE for run in axis) else len(counted)

    def _nodes(self) -> list[Node]:
        self.alias: dict[fx.Node, str] = {self.captured.image: IMAGE}
        made = []
        self.crossed: list[tuple[str, Axis, GateInput]] = []
        for node in self.captured.nodes:
            if self.segment_of(node) > len(self.crossed):
                made += self._crossing_nodes()
            if operation(node) in PASSED:
                self.alias[node] = self.alias[node.all_input_nodes[0]]
                continue
            self.alias[node] = node.name
            op, args, kwargs = self._operation(node)
            made.append(
                Node(
                    node.name,
                    op,
                    tuple(map(self._encoded, args)),
                    self._encoded(kwargs),
                    self.segment_of(node),
                    where(node),
                )
            )
        return made

    def _encoded(self, value: Any) -> Any:
        """An argument in the form that a `Node` stores and its file contains: without tuples."""
        if isinstance(value, fx.Node):
            if value in self.captured.names:
                return {"tensor": self.captured.names[value]}
            return {"node": self.alias[value]}
        if isinstance(value, list | tuple):
            return list(map(self._encoded, value))
        if isinstance(value, dict):
            return {key: self._encoded(item) for key, item in value.items()}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        check(
            value is None or isinstance(value, bool | int | float | str),
            f"argument {value!r}: not of a kind that can be kept",
        )
        return value

    def _crossing_nodes(self) -> list[Node]:
        """Where necessary, operations that pack all tensors that cross the next gate into one
        feature map before it, and unpack them after it; `alias` then names the unpacked tensors.
        """
        number = len(self.crossed)
        cut = self.cuts[number]
        names = {node: self.alias[node] for node in self.crossing[cut]}  # copies have one name
        live = {name: node for node, name in names.items()}
        value, name = self.analysis.value(cut), names[cut]
        channels = value.axis_of_channels
        axis = self.axis(value.along(channels))
        if len(live) == 1 and len(value.shape) == 4 and channels == 1:
            self.crossed.append((name, axis, GateInput(name, axis)))
            return []
        made: list[Node] = []

        def add(kind: str, op: str, *args: Any, behind: bool = False) -> dict[str, str]:
            encoded = tuple(map(self._encoded, args))
            node = Node(f"{cut.name}{kind}", op, encoded, {}, number + behind, where(cut))
            made.append(node)
            return {"node": node.name}

        read: dict[str, str] = {"node": name}
        if channels != 1:
            others = [axis for axis in range(1, len(value.shape)) if axis != channels]
            read = add("_turned", "permute.default", read, [0, channels, *others])
        for missing in range(len(value.shape), 4):
            read = add(f"_as{missing + 1}d", "unsqueeze.default", read, -1)
        flat, sizes = [], []
        values: Axis = ()
        for at, (part, node) in enumerate(live.items()):
            own = self.axis(self.analysis.value(node).flat())
            sizes.append({"axis": own})
            values += own
            shape = [{"rows": 1}, sizes[-1], 1, 1]
            flat.append(add(f"_flat{at}", "reshape.default", {"node": part}, shape))
        packed = add(PACKED, "cat.default", flat, 1)
        self.crossed.append((packed["node"], values, GateInput(read["node"], axis)))
        parts = add("_parts", "split_with_sizes.default", packed, sizes, 1, behind=True)
        behind = {}
        for at, (part, node) in enumerate(live.items()):
            one = add(f"_one{at}", "getitem", parts, at, behind=True)
            shape = self._sizes(self.analysis.value(node))
            behind[part] = add(f"_part{at}", "reshape.default", one, shape, behind=True)["node"]
        self.alias.update((node, behind[part]) for node, part in names.items())
        return made

    def _operation(self, node: fx.Node) -> tuple[str, list[Any], dict[str, Any]]:
        """An operation, with those arguments that depend on widths encoded as axes."""
        kind, given = operation(node), arguments(node)
        analysis = self.analysis
        if node.target is operator.getitem:
            return "getitem", list(node.args), {}
        if kind in ("view", "reshape", "_unsafe_view", "unflatten"):
            return "reshape.default", [node.args[0], self._sizes(analysis.value(node))], {}
        if kind == "expand":
            return "expand.default", [node.args[0], self._sizes(analysis.value(node))], {}
        if kind in ("split", "split_with_sizes", "chunk"):
            source = analysis.value(given["self"])
            dim = given["dim"] % len(source.shape)
            parts = analysis.values[node]
            assert isinstance(parts, list)
            sizes = [self._sizes(part)[dim] for part in parts]
            return "split_with_sizes.default", [given["self"], sizes, dim], {}
        schema = node.target._schema  # type: ignore[union-attr]
        passed, kwargs = dict(given), {}
        for argument in schema.arguments:
            if argument.kwarg_only and argument.name in given:
                value = passed.pop(argument.name)
                if argument.default_value != value:
                    kwargs[argument.name] = value
        for name, counted in analysis.counted.get(node, {}).items():
            passed[name] = self._count(counted)
        if kind == "layer_norm":
            dims = len(given["normalized_shape"])
            passed["normalized_shape"] = self._sizes(analysis.value(given["input"]))[-dims:]
        elif kind == "repeat" and analysis.value(node.args[0]).rows != analysis.value(node).rows:
            passed["repeats"] = [{"rows": 1}, *given["repeats"][1:]]
        return f"{kind}.{schema.overload_name or 'default'}", list(passed.values()), kwargs

    # -- all together -------------------------------------------------------------------------

    def spec(self) -> GraphSpec:
        """The spec of the network, without the costs."""
        captured = self.captured
        nodes = self._nodes()
        used = {name for node in nodes for name in node.reads("tensor")}
        statistics = {
            captured.names[arguments(n)[part]]
            for n in captured.nodes
            if operation(n) == "batch_norm"
            for part in ("running_mean", "running_var")
            if arguments(n)[part] is not None
        }
        tensors = {}
        for name in sorted(used):
            tensor = captured.tensors[name]
            axes = []
            for axis, size in enumerate(tensor.shape):
                vector = self.analysis.axes[name][axis]
                axes.append(self.axis(np.zeros(size, np.int64) if vector is None else vector))
            kind = "statistics" if name in statistics else "constant"
            if name in captured.trained:
                kind = "weight"
            dtype = "" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
            tensors[name] = TensorSpec(tuple(axes), kind, dtype)
        out = shape_of(captured.output)
        check(len(out) == 2, f"{self.name}: gives {out[1:]} for an image, expected class logits")
        channels = int(self.example.shape[1])
        choices = GateSpec(tuple(range(len(self.widths))))
        cuts, cut_axes, inputs = zip(*self.crossed, strict=True)
        own = tuple(cuts) == tuple(read.node for read in inputs)
        return GraphSpec(
            name=self.name,
            num_classes=out[1],
            in_channels=channels,
            image_size=(int(self.example.shape[2]), int(self.example.shape[3])),
            percents=tuple(round(100 * width) for width in self.widths),
            groups=tuple(self.groups),
            tensors=tensors,
            nodes=tuple(nodes),
            cuts=cuts,
            cut_axes=cut_axes,
            output=self.alias[captured.output],
            gates=tuple(choices for _ in self.cuts),
            hidden=max(8, min(64, kept_count(inputs[0].axis, {}) // 4)),
            gate_inputs=() if own else inputs,
            forms=(),
        )

    def whole(self) -> dict[str, str]:
        """Modules after the first gate with channels that are never cut, and the reason."""
        found: dict[str, str] = {}
        for node, reason in self.analysis.fixed_because.items():
            if self.segment_of(node) and node is not self.captured.output:
                found.setdefault(where(node) or "the model itself", reason)
        return found

    def net(
        self,
        images: Iterable[Tensor] | None = None,
        other_sizes: Sequence[tuple[int, int]] = (),
        importance: Importance | None = None,
    ) -> SlimNet:
        """The converted network, verified against the model and at every width and size.

        Raises:
            UsageError: if a check fails (the message names the operation), or for an unknown rule
                or one that needs images without any.
        """
        rules = get_args(Importance)
        rule = importance or ("bn" if images is None else "activation")
        check(rule in rules, f"importance {rule!r}: expected one of {', '.join(rules)}")
        check(rule != "activation" or images is not None, "importance activation: needs images")
        net = SlimNet(self.spec())
        load_weights(net, self.captured.tensors)
        sort_channels(net.eval(), images or (), rule)
        self._verify(net)
        twins = [self._at_size(size, net) for size in other_sizes]
        changed = {
            node.name
            for twin in twins
            for node, other in zip(net.spec.nodes, twin.nodes, strict=True)
            if node != other
        }
        others = tuple(
            OtherSize(
                twin.image_size,
                tuple(n for n in twin.nodes if n.name in changed),
                twin.forms,
                twin.cut_axes if twin.gate_inputs else (),
            )
            for twin in twins
        )
        net.spec = replace(net.spec, other_sizes=others)
        return net

    def _verify(self, net: SlimNet) -> None:
        runs = list(variant_costs(net, self.example[:1]))
        net.spec = replace(net.spec, forms=tuple(cost for cost, _, _ in runs))
        self.error = verify_whole(self, net, runs[-1][2])
        two = torch.cat([self.example[:1], self.example[-1:].flip(3)])
        self.masked = verify_widths(self, net, two, runs)

    def _at_size(self, size: tuple[int, int], net: SlimNet) -> GraphSpec:
        """The spec for images of another size, verified in the same way."""
        height, width = size
        example = nn.functional.interpolate(self.example, size, mode="bilinear")
        other = Conversion(
            self.model,
            example,
            self.widths,
            (),
            self.protect,
            self.name,
            cuts=[cut.name for cut in self.cuts],
        )
        spec = other.spec()
        reason = f"{self.name}: at {height}x{width} px it is another network"
        pairs = itertools.zip_longest(spec.nodes, net.spec.nodes)
        for its, own in pairs:
            if its is None or own is None or (its.name, its.op) != (own.name, own.op):
                raise refuse_at(its or own, f"{reason}: its operations differ")
        for name, tensor in net.spec.tensors.items():
            found = other.captured.tensors.get(name)
            same = found is not None and torch.equal(found, self.captured.tensors[name])
            check(same and spec.tensors.get(name) == tensor, f"{reason}: {name} differs")
        same = spec.groups == net.spec.groups and spec.tensors == net.spec.tensors
        check(same, f"{reason}: its groups of channels differ")
        twin = copy.copy(net)
        twin.spec = spec
        other._verify(twin)
        return twin.spec


def load_weights(net: SlimNet, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a network by name; statistics are copied into every slot."""
    for name, value in net.state_dict().items():
        if name in tensors:
            value.copy_(tensors[name].expand_as(value))


def variant_costs(net: SlimNet, x: Tensor) -> Iterable[tuple[VariantCost, Tensor, Tensor]]:
    """Yield cost, input and output of every segment at every width, for one image (1, C, H, W).

    Raises:
        UsageError: if a segment does not run; the message names the operation.
    """
    spec = net.spec
    inputs: dict[tuple[int, int], Tensor] = {}
    whole = range(spec.num_widths)
    for segment in range(spec.num_segments):
        for before in whole if segment > 1 else (0,):
            into = x if segment == 0 else inputs[segment - 1, before]
            for choice in whole if segment else (0,):
                counted = _Counter()
                try:
                    with torch.no_grad():
                        out = net.run_segment(segment, into, before, choice, watch=counted).out
                except Exception as error:  # operations raise many kinds
                    mine = (node for node in spec.nodes if node.segment == segment)
                    raise refuse_at(
                        next(node for node in mine if node.name not in counted.done),
                        f"does not run at {spec.percents[choice]} % of the channels: "
                        f"{first_line(error)}",
                    ) from None
                if segment < 2 or before == choice:  # the outputs along the uniform routes
                    inputs[segment, choice] = out
                madds = counted.madds + spec.gate_madds(segment, before, choice)
                last = segment == len(spec.gates)
                size = (spec.num_classes, 1, 1) if last else (*out.shape[1:4],)
                yield VariantCost(segment, before, choice, madds, size, counted.peak), into, out


class _Counter:
    """Adds up the multiply-adds of a segment and finds its largest feature map."""

    def __init__(self) -> None:
        self.madds = self.peak = 0
        self.done: set[str] = set()

    def __call__(self, step: Step, args: Sequence[Any], result: Any) -> None:
        self.done.add(step.name)
        if not isinstance(result, Tensor):
            return
        self.peak = max(self.peak, result.numel())
        shapes = [argument.shape for argument in args if isinstance(argument, Tensor)]
        self.madds += operation_madds(step.op.partition(".")[0], shapes, result.shape)


def _kept(units: int, each: int, width: float) -> int:
    """Units kept at a width: at least one, and multiples of `MULTIPLE` channels if possible."""
    if width == 1:
        return units
    step = max(1, MULTIPLE // each)
    if units < 2 * step:
        step = 1
    return max(1, min(units, max(step, round(units * width / step) * step)))
