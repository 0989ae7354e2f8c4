"""Cascades of whole existing networks, run by the engine; no training is needed."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dynaslim.cascade_spec import CascadeSpec, RungSpec, TrunkSpec
from dynaslim.checkpoint import Checkpoint, read, stored
from dynaslim.checkpoint_content import add_tensors
from dynaslim.cost import madds, operation_madds, params, route_costs, segment_cost
from dynaslim.errors import DynaslimWarning, UsageError, check, first_line
from dynaslim.model_names import find_model, is_hub_address
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.cascade_source import (
    CascadeSource,
    Parts,
    RungProgram,
    inputs_of,
    resize_madds,
)
from dynaslim.runtime.libraries import onnx_session, require
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.onnx_graph import INPUT, LOGITS, to_onnx
from dynaslim.runtime.package import Package, open_package
from dynaslim.runtime.program_net import ProgramCheckpoint, ProgramNet
from dynaslim.runtime.variants import RouteVariant, variant_table
from dynaslim.spec import Route

_WITH_ROUTE: Final = re.compile(r"(?P<name>.+)@(?P<route>\d+(?:-\d+)*)")
_ROWS: Final = 2
"""Rows of the example with which a network is tried: enough to see whether it takes batches."""


@dataclass(frozen=True)
class Rung:
    """A classifier for a cascade, with the preprocessing of its images."""

    model: nn.Module | str | Path
    """A torch module in evaluation mode, or an ONNX file: images (B, C, S, S) to scores (B, N)."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    """Class names in order; None means the same order as in the other rungs."""
    name: str = ""
    """Name in messages and tables; by default that of the module's type or of the file."""


def cascade(rungs: Sequence[Any], *, name: str = "cascade") -> Checkpoint:
    """Make a cascade of whole networks, usable as a checkpoint by `Engine`, `evaluate` and export.

    A rung is a `Checkpoint` (its widest route), a pair of a `Checkpoint` and a route, the name of a
    checkpoint or of an exported package (`FILE@ROUTE` for a route other than the widest), an ONNX
    file of fixed image size (`FILE.onnx@SIZE` if the size is not fixed; images are normalised as
    for ImageNet), or a `Rung`. All rungs have the same class names, in any order. Rungs that are
    not in the order of their multiply-adds are sorted, with a warning.

    Images are prepared for the rung with the largest image size; among several, the costliest.

    Raises:
        UsageError: for a single rung, classes or channels that differ, rungs of the same cost, or
            a network that cannot be run on images of its size.
        CheckpointError, PackageError: if a file cannot be read.
    """
    check(
        isinstance(rungs, Sequence) and not isinstance(rungs, str) and len(rungs) >= 2,
        "a cascade needs at least two networks: give [small, large]",
    )
    opened = [open_rung(rung) for rung in rungs]
    costs = _costs(opened)
    order = sorted(range(len(opened)), key=lambda number: costs[number])
    if order != list(range(len(opened))):
        listed = ", ".join(f"{opened[n].name} ({costs[n] / 1e6:.1f} M)" for n in order)
        warnings.warn(
            f"rungs are not in the order of their multiply-adds; they run as {listed}",
            DynaslimWarning,
            stacklevel=2,
        )
    opened, costs = [opened[n] for n in order], [costs[n] for n in order]
    first = opened[0]
    for one, cost, before in zip(opened[1:], costs[1:], costs[:-1], strict=True):
        check(
            one.preprocessing.channels == first.preprocessing.channels,
            f"{one.name}: takes {one.preprocessing.channels} channels, {first.name} "
            f"{first.preprocessing.channels}",
        )
        check(
            cost > before,
            f"{one.name}: costs as much as the rung before it ({cost / 1e6:.1f} M multiply-adds); "
            f"leave one of them out",
        )
    names = next((one.class_names for one in opened if one.class_names is not None), None)
    # among several of the same size, the costliest
    largest = max(reversed(opened), key=lambda one: one.preprocessing.image_size_px)
    given = largest.preprocessing
    rungs = tuple(
        RungSpec(one.name, one.preprocessing.image_size_px, cost, one.params, one.peak)
        for one, cost in zip(opened, costs, strict=True)
    )
    size = (given.channels, given.image_size_px)
    spec = CascadeSpec(name, first.num_classes, *size, rungs, _trunk(opened, given))
    behind = [spec.behind_trunk(number)[0] for number in range(len(rungs))]
    if any(after <= before for before, after in itertools.pairwise(behind)):
        spec = replace(spec, trunk=None)  # the options of a gate must rise in cost
    programs = [replace(one, order=_order(one, names, first)) for one in opened]
    return ProgramCheckpoint(
        ProgramNet(CascadeSource(spec, given, programs)),
        class_names=names,
        preprocessing=given,
        mirror=all(one.mirror for one in opened),
    )


def _trunk(opened: Sequence[RungProgram], given: Preprocessing) -> TrunkSpec | None:
    """The trunk that the first rung shares with rungs of the same network, if there is one."""
    first, own = opened[0], opened[0].parts
    if own is None:
        return None
    sharing = [
        number
        for number, one in enumerate(opened)
        if one.parts is not None
        and (one.parts.key, one.preprocessing) == (own.key, first.preprocessing)
    ]
    if len(sharing) < 2:
        return None
    sizes = (given.channels, given.image_size_px, first.preprocessing.image_size_px)
    values = math.prod(own.cost.out)
    if len(sharing) < len(opened):
        values += given.channels * given.image_size_px**2
    return TrunkSpec(
        tuple(sharing),
        own.cost.madds + own.cost.pool_adds + resize_madds(*sizes),
        own.cost.params,
        max(own.cost.peak, values),
        values,
    )


def _costs(opened: Sequence[RungProgram]) -> list[int]:
    """Multiply-adds of each rung, including resizing from the largest image size."""
    side = max(one.preprocessing.image_size_px for one in opened)
    return [
        one.madds + resize_madds(one.preprocessing.channels, side, one.preprocessing.image_size_px)
        for one in opened
    ]


def _order(
    one: RungProgram, names: tuple[str, ...] | None, first: RungProgram
) -> tuple[int, ...] | None:
    """For each class of the cascade, the rung's class index; None if the order is the same."""
    check(
        one.num_classes == first.num_classes,
        f"{one.name}: has {one.num_classes} classes, {first.name} {first.num_classes}",
    )
    own = one.class_names
    if own is None or names is None or own == names:
        return None
    for missing in (name for name in names if name not in own):
        raise UsageError(f"{one.name}: has no class {missing!r}, which another rung has")
    check(len(set(own)) == len(own), f"{one.name}: two of its classes have the same name")
    return tuple(own.index(name) for name in names)


# -- rungs ----------------------------------------------------------------------------------------


def open_rung(given: Any) -> RungProgram:
    """Open a rung, given as for `cascade`, and try it on two images; raises like `cascade`."""
    if isinstance(given, Checkpoint):
        return _of_checkpoint(given, None, given.net.spec.name)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Checkpoint):
        return _of_checkpoint(*given, given[0].net.spec.name)
    if isinstance(given, Rung):
        if isinstance(given.model, nn.Module):
            return _of_module(given, given.model)
        return _of_onnx(given, Path(given.model))
    check(
        isinstance(given, str | Path),
        f"rung of type {type(given).__name__}: give a checkpoint, the name of a file, or "
        f"dynaslim.Rung(model, preprocessing)",
    )
    text, route = split_name(str(given))
    if Path(text).suffix == ".onnx":
        return open_rung(onnx_rung(str(given)))
    model = find_model(text, ("checkpoint", "package"))
    if model.kind == "package":
        return _of_package(open_package(model.path), route, _short(text))
    return _of_checkpoint(read(model.path), route, _short(text))


def split_name(text: str) -> tuple[str, str | None]:
    """Split a rung's name into the name proper and the route or image size after an @, or None."""
    found = _WITH_ROUTE.fullmatch(text)
    if found is None or Path(text).exists() or is_hub_address(text):
        return text, None
    return found["name"], found["route"]


def _short(text: str) -> str:
    return text if is_hub_address(text) else Path(text).name


def _prepared(preprocessing: Preprocessing | None, name: str) -> Preprocessing:
    if preprocessing is None:
        raise UsageError(f"{name}: does not say how images are prepared (preprocessing)")
    return preprocessing


def _of_checkpoint(checkpoint: Checkpoint, route: Route | str | None, name: str) -> RungProgram:
    net, spec = checkpoint.net, checkpoint.net.spec
    pre = _prepared(checkpoint.preprocessing, name)
    side = pre.image_size_px
    check(net.has_weights, f"{name}: is a cascade or a package; name its folder")
    taken = spec.widest_choice if route is None else spec.coerce_route(route)
    source = NetworkSource(net)
    variant = RouteVariant(taken)
    return RungProgram(
        name if route is None else f"{name}@{taken}",
        pre,
        checkpoint.class_names,
        spec.num_classes,
        madds(spec, taken, side),
        params(spec, taken),
        max(cost.peak for cost in route_costs(spec, taken, (side, side))),
        source.module(variant),
        lambda: require("onnx").load_from_string(source.onnx(variant)),
        f"{source.key} {taken}",
        mirror=checkpoint.mirror,
        parts=_parts(source, taken, side),
    )


def _parts(source: NetworkSource, route: Route, side: int) -> Parts | None:
    """A route divided into trunk and rest, if the network's other routes share this trunk."""
    spec = source.spec
    if not spec.gates or spec.segment_indices(route)[0] != 0:
        return None
    return Parts(
        source.key,
        source.trunk,
        partial(source.tail, route),
        segment_cost(spec, 0, 0, 0, (side, side)),
    )


def _of_module(rung: Rung, module: nn.Module) -> RungProgram:
    name = rung.name or type(module).__name__
    check(not module.training, f"{name}: in training mode; call model.eval() first")
    own, pre = copy.deepcopy(module).requires_grad_(False), rung.preprocessing
    weights = list(own.parameters())
    device = weights[0].device if weights else torch.device("cpu")
    x = _example(pre)
    counted, peak = FlopCounterMode(display=False), _Peak()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad(), counted, peak:
            made = own(x.to(device))
    except Exception as error:  # whatever the module raises
        raise _cannot_run(name, pre, error) from None
    check(isinstance(made, Tensor), f"{name}: returns {type(made).__name__}, not class scores")
    scores = made.float().cpu()
    _check_scores(name, scores, rung)
    digest = hashlib.sha256(repr(own).encode())
    add_tensors(digest, stored(own.state_dict()))
    # a module's code cannot be hashed: its answers represent it
    digest.update(scores.numpy().round(3).tobytes())

    def model() -> Any:
        content = to_onnx(copy.deepcopy(own).cpu(), x, (LOGITS,), name, any_size=False)
        return require("onnx").load_from_string(content)

    return RungProgram(
        name,
        pre,
        rung.class_names,
        scores.shape[1],
        max(1, counted.get_total_flops() // (2 * _ROWS)),
        sum(weight.numel() for weight in weights),
        max(1, peak.values // _ROWS),
        own,
        model,
        digest.hexdigest(),
        probabilities=_are_probabilities(scores),
    )


def _example(pre: Preprocessing) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_ROWS, pre.channels, *(pre.image_size_px,) * 2, generator=generator)


def _cannot_run(name: str, pre: Preprocessing, error: Exception) -> UsageError:
    side = pre.image_size_px
    return UsageError(
        f"{name}: does not run on {_ROWS} images of {side}x{side} px: {first_line(error):.200}"
    )


def _check_scores(name: str, scores: Tensor, rung: Rung) -> None:
    shape = tuple(scores.shape)
    check(
        len(shape) == 2 and shape[0] == _ROWS,
        f"{name}: returns values of shape {shape} for {_ROWS} images, not scores (rows, classes)",
    )
    check(bool(scores.isfinite().all()), f"{name}: returns scores that are not finite")
    names = rung.class_names
    check(
        names is None or len(names) == shape[1],
        f"{name}: {len(names or ())} class names do not fit {shape[1]} classes",
    )


def _are_probabilities(scores: Tensor) -> bool:
    """Whether rows are probabilities: not negative, with a sum of 1."""
    ones = torch.ones(len(scores))
    return bool((scores >= 0).all()) and torch.allclose(scores.sum(1), ones, atol=1e-3)


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of the largest tensor computed while it is active."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.values = max(self.values, made.numel())
        return made


# -- ONNX -----------------------------------------------------------------------------------------


def onnx_rung(
    text: str, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
) -> Rung:
    """Make a rung from an ONNX file, named as for `cascade`; by default normalised as for ImageNet.

    Raises:
        UsageError: if it is not a classifier of images of one size; the message says why.
    """
    name, size = split_name(text)
    file = Path(name)
    _, _, channels, *sides = _input_of(file, _load(file))
    if size is not None:
        check(size.isdigit(), f"{text}: give the image size in pixels, as in {file}@224")
        side = int(size)
    else:
        check(
            None not in sides and sides[0] == sides[1],
            f"{file}: its image size is not fixed; name the one that it runs at, as in {file}@224",
        )
        side = sides[0]
    grey = channels == 1
    usual = Preprocessing(side, (0.5,), (0.5,)) if grey else Preprocessing(side)
    return Rung(file, Preprocessing(side, mean or usual.mean, std or usual.std))


def _load(file: Path) -> Any:
    onnx = require("onnx")
    check(file.is_file(), f"{file}: no such file")
    try:
        return onnx.load(file)
    except Exception as error:  # from protocol buffers, or about a file of external weights
        why = first_line(error)
        raise UsageError(f"{file}: not readable as ONNX: {why:.200}") from None


def _input_of(file: Path, model: Any) -> tuple[str, Any, Any, Any, Any]:
    """The name and four sizes of a model's input; a size that is not fixed is None.

    Raises:
        UsageError: if there is not exactly one input and one output, or the input is not a float32
            batch of images of dynamic batch size.
    """
    inputs = inputs_of(model)
    for what, values in (("inputs", inputs), ("outputs", list(model.graph.output))):
        listed = ", ".join(value.name for value in values)
        check(len(values) == 1, f"{file}: has {len(values)} {what} ({listed}), a rung has one")
    kind = inputs[0].type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    is_float = kind.elem_type == require("onnx").TensorProto.FLOAT
    check(
        len(sizes) == 4 and is_float,
        f"{file}: its input {inputs[0].name} is no float32 batch of images (rows, channels, "
        f"height, width)",
    )
    check(
        sizes[0] is None,
        f"{file}: takes batches of {sizes[0]} alone; export it with a dynamic batch dimension",
    )
    check(sizes[1] in (None, 1, 3), f"{file}: takes {sizes[1]} channels; images have 1 or 3")
    return inputs[0].name, *sizes


def _of_onnx(rung: Rung, file: Path) -> RungProgram:
    name, pre = rung.name or file.name, rung.preprocessing
    model = _load(file)
    _, _, channels, *sides = _input_of(file, model)
    for fixed, own in ((channels, pre.channels), *((side, pre.image_size_px) for side in sides)):
        check(
            fixed in (None, own),
            f"{file}: takes images of {channels}x{sides[0]}x{sides[1]}, not "
            f"{pre.channels}x{pre.image_size_px}x{pre.image_size_px}",
        )
    return _of_model(name, model, rung)


def _of_model(name: str, model: Any, rung: Rung) -> RungProgram:
    pre, content = rung.preprocessing, model.SerializeToString()
    scores, shapes = _run_inside(name, model, pre)
    _check_scores(name, scores, rung)
    largest = max(math.prod(shapes[out]) for node in model.graph.node for out in node.output if out)
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == 1]
    return RungProgram(
        name,
        pre,
        rung.class_names,
        scores.shape[1],
        max(1, _onnx_madds(model, shapes) // _ROWS),
        sum(math.prod(tensor.dims) for tensor in weights),
        max(1, largest // _ROWS),
        None,
        partial(require("onnx").load_from_string, content),
        hashlib.sha256(content).hexdigest(),
        probabilities=_are_probabilities(scores),
    )


def _run_inside(
    name: str, model: Any, pre: Preprocessing
) -> tuple[Tensor, dict[str, tuple[int, ...]]]:
    """A model's answers for the example, and the shapes of all its tensors by name."""
    onnx, seen = require("onnx"), copy.deepcopy(model)
    outputs = {value.name for value in model.graph.output}
    inner = [out for node in model.graph.node for out in node.output if out]
    seen.graph.output.extend(onnx.ValueInfoProto(name=out) for out in inner if out not in outputs)
    ort, x = require("onnxruntime"), _example(pre).numpy()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnx_session(seen.SerializeToString(), options)
        (image,) = session.get_inputs()
        made = session.run(None, {image.name: x})
    except Exception as error:  # no common base class
        raise _cannot_run(name, pre, error) from None
    values = dict(zip((out.name for out in session.get_outputs()), made, strict=True))
    shapes = {out: np.shape(value) for out, value in values.items()}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    shapes[image.name] = x.shape
    return torch.from_numpy(values[model.graph.output[0].name]).float(), shapes


_KINDS: Final = {"Conv": "conv2d", "ConvTranspose": "conv_transpose2d", "MatMul": "matmul"}
"""ONNX operator -> operation of `cost.operation_madds`."""


def _onnx_madds(model: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiply-adds of convolutions and matrix products, for the rows that were run."""
    total = 0
    for node in model.graph.node:
        if node.op_type in _KINDS:
            first, second, made = (shapes[name] for name in (*node.input[:2], node.output[0]))
            total += operation_madds(_KINDS[node.op_type], [first, second], made)
        elif node.op_type == "Gemm":
            turned = any(a.name == "transA" and a.i for a in node.attribute)
            made = shapes[node.output[0]]
            total += math.prod(made) * shapes[node.input[0]][0 if turned else 1]
    return total


# -- packages -------------------------------------------------------------------------------------


def _of_package(package: Package, route: str | None, name: str) -> RungProgram:
    spec = package.spec
    pre = _prepared(package.preprocessing, name)
    check(package.source.precision == "fp32", f"{name}: is {package.source.precision}; give fp32")
    taken = spec.widest_choice if route is None else spec.coerce_route(route)
    try:
        path = (0, *spec.path_of(taken))
    except UsageError:
        raise UsageError(f"{name}: route {taken} is not in the package") from None
    table = variant_table(spec)
    steps = zip(table, (0, *path[:-1]), path, strict=True)
    model = _chained(package.source.onnx(segment[a][b]) for segment, a, b in steps)
    side = pre.image_size_px
    shown = name if route is None else f"{name}@{taken}"
    opened = _of_model(shown, model, Rung("", pre, package.class_names))
    return replace(
        opened,
        madds=madds(spec, taken, side),
        params=params(spec, taken),
        mirror=package.mirror,
    )


def _chained(models: Iterable[Path | bytes]) -> Any:
    """Merge consecutive segments into one model, without the gates' logits."""
    onnx, merged = require("onnx"), None
    compose = require("onnx.compose")
    for number, model in enumerate(models):
        read = onnx.load if isinstance(model, Path) else onnx.load_from_string
        own = compose.add_prefix(read(model), f"s{number}_", inplace=True)
        del own.graph.output[1:]
        if merged is None:
            merged = own
            continue
        last = merged.graph.output[0].name
        io_map = [(last, f"s{number}_{INPUT}")]
        merged = compose.merge_models(merged, own, io_map=io_map)
    assert merged is not None
    onnx.checker.check_model(merged)
    return merged
