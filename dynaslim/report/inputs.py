"""Reads the inputs of a report: a run's files, images to evaluate on, stored metrics, baselines.

Only the checkpoints must be valid. Other files of a run may be missing, truncated or in another
format; they are then ignored, and `RunInfo.notes` names those that exist.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from dynaslim._files import parse_json, validated
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.checkpoint import Checkpoint, read
from dynaslim.data.images import HeldOut, ImageDataset, data_recipes, held_out
from dynaslim.data.images import open_images as open_for
from dynaslim.data.layout import MINI, WHOLE
from dynaslim.data.source import ImageSource, open_source
from dynaslim.errors import CheckpointError, DataError, UsageError, check
from dynaslim.evaluation import Metrics
from dynaslim.model_names import MANIFEST, is_package, run_checkpoints
from dynaslim.runs.folder import METRICS, read_metrics
from dynaslim.runtime.program_net import read_model
from dynaslim.spec import NetSpec

Kind = Literal["supernet run", "gate run", "demo", "checkpoint", "package"]

BASELINES: Final = "baselines.json"
"""Name of the baselines file that is read from a run's folder by default."""
_EXPECTED: Final = (
    "expected a checkpoint file, or the folder of a run: with gate*.safetensors, last.safetensors, "
    "best.safetensors or (the demo's) checkpoint.safetensors"
)
_BASELINES_FORM: Final = '[{"name": "resnet18", "top1": 0.7, "madds": 1.8e9, "ms": 9.5}, ...]'
_MAX_BASELINES: Final = 50


# -- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    file: Path
    checkpoint: Checkpoint
    target: float | None = None
    """Target mean cost of the gate, as a share of the widest route's; None if unknown."""

    @property
    def has_trained_gates(self) -> bool:
        """Whether the network has gates that were trained.

        A network of stage I has gates, too, but with their initial weights.
        """
        recipe = self.checkpoint.recipe
        return bool(self.checkpoint.net.spec.gates) and not (
            "supernet" in recipe and "gate" not in recipe
        )

    @property
    def label(self) -> str:
        """Name of the model's dynamic mode; it is unique among the targets of a run."""
        return "dynamic" if self.target is None else f"dynamic, target {self.target:g}"


@dataclass(frozen=True)
class Curves:
    """The lines of a metrics file, titled by the training stage."""

    title: str
    lines: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class RunInfo:
    """The models of a run and the content of its other files."""

    path: Path
    kind: Kind
    model: Model
    """The model that the report shows in detail."""
    gated: tuple[Model, ...]
    """All models with trained gates, sorted by target; includes `model` if it has such gates."""
    curves: tuple[Curves, ...] = ()
    environments: tuple[Mapping[str, Any], ...] = ()
    """Versions and hardware, for each start of the run."""
    results: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    """Notes on files that could not be read, or on the networks of a cascade."""


def read_run(path: Path, target: float | None = None) -> RunInfo:
    """Read the folder of a run or package, or a checkpoint; `target` selects one of its models.

    The default is the middle one by target.

    Raises:
        UsageError: if there is no run at the path, or no gate for the target.
        CheckpointError: if a checkpoint cannot be read.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; {_EXPECTED}")
    if is_package(path):
        model = Model(path / MANIFEST, read_model(path)[0])
        rungs = tuple(_notes_on_rungs(model.checkpoint))
        return RunInfo(path, "package", _select(path, [model], target), (model,), notes=rungs)
    if path.is_file():
        model = _select(path, [_read_model(path)], target)
        return RunInfo(path, "checkpoint", model, (model,) if model.has_trained_gates else ())
    kind, files = _checkpoints_of(path)
    models = [_read_model(file) for file in files]
    models.sort(key=lambda one: (one.target is not None, one.target or 0.0, one.file.name))
    model = _select(path, models, target)
    notes: list[str] = []
    results = _read_json(path / "results.json", dict, notes)
    starts = _read_json(path / "environment.json", list, notes) or []
    return RunInfo(
        path,
        kind,
        model,
        tuple(one for one in models if one.has_trained_gates),
        curves=tuple(_curves(path, kind, model, models)),
        environments=tuple(start for start in starts if isinstance(start, dict)),
        results=results,
        notes=tuple(notes),
    )


def _notes_on_rungs(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a note for each route of a cascade: its network, and how well signals rank errors."""
    spec, ranked = checkpoint.net.spec, getattr(checkpoint, "notes", {}).get("risk_coverage")
    for number, rung in enumerate(spec.rungs if isinstance(spec, CascadeSpec) else (), start=1):
        areas = ""
        if isinstance(ranked, list) and len(ranked) == len(spec.rungs):
            ranks = ", ".join(f"{k} {v:.4f}" for k, v in ranked[number - 1].items())
            areas = f" Risk-coverage areas on the images of its budget curve: {ranks}."
        yield f"Route {number} is {rung.name}, for {rung.image_size_px} px.{areas}"


def _checkpoints_of(folder: Path) -> tuple[Kind, list[Path]]:
    files = run_checkpoints(folder)
    if files:
        first = files[0].stem
        is_gate = first.startswith("gate")
        return "gate run" if is_gate else "demo" if first == "checkpoint" else "supernet run", files
    if (folder / METRICS).is_file():
        raise UsageError(f"{folder}: the run has written no checkpoint yet; continue it")
    raise UsageError(f"{folder}: holds no run; {_EXPECTED}")


def _read_model(file: Path) -> Model:
    checkpoint = read(file)
    target = checkpoint.recipe.get("target")
    if isinstance(target, int | float) and 0 < target <= 1:
        return Model(file, checkpoint, float(target))
    return Model(file, checkpoint)


def _select(path: Path, models: Sequence[Model], target: float | None) -> Model:
    if target is None:
        return models[len(models) // 2]
    for model in models:
        if model.target is not None and math.isclose(model.target, target, rel_tol=1e-6):
            return model
    targets = ", ".join(f"{one.target:g}" for one in models if one.target is not None)
    raise UsageError(
        f"--target {target:g}: {path} has "
        + (f"gates for {targets}" if targets else "no gates for targets; leave it out")
    )


def _curves(folder: Path, kind: Kind, model: Model, models: Sequence[Model]) -> Iterator[Curves]:
    """The run's curves; for a gate run, its supernet's and then the selected gate's."""
    lines = tuple(read_metrics(folder))
    if kind != "gate run":
        if lines:
            yield Curves("Training", lines)
        return
    recipe = model.checkpoint.recipe.get("gate")
    gate: Mapping[str, Any] = recipe if isinstance(recipe, Mapping) else {}
    supernet = gate.get("supernet")
    if isinstance(supernet, str) and supernet:
        stage1 = Path(supernet).parent
        # if the run was moved, its supernet's run is usually still in the same parent folder
        first = read_metrics(stage1) or read_metrics(folder.parent / stage1.name)
        if first:
            yield Curves("Stage I: the supernet", tuple(first))
    number = models.index(model)
    # gates are trained in the recipe's order, which may differ from the order of targets
    targets = gate.get("targets")
    if isinstance(targets, list) and model.target in targets:
        number = targets.index(model.target)
    lines = tuple(line for line in lines if line.get("gate", number) == number)
    if lines:
        yield Curves("Stage II: the gate", lines)


def _read_json(file: Path, kind: type[Any], notes: list[str]) -> Any:
    """The value in a JSON file; None if missing, or with a note, if invalid or of another type."""
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if isinstance(value, kind):
        return value
    notes.append(f"{file.name} cannot be read; its content is left out.")
    return None


# -- images ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportImages:
    """The images that the report evaluates on."""

    images: ImageDataset
    data: str
    """The data set, as named by the user or the recipe."""
    split: str
    held_back: float | None
    """The share of the split that training held out, if the images are that part; else None."""
    total: int
    """Number of images before `limit`."""
    trained_on: bool
    """Whether the recipe names these images as its training images."""


class NoImagesError(Exception):
    """No images were given and the recipe's are not available; the message is the reason."""


def open_images(
    checkpoint: Checkpoint, *, data: str | None, split: str | None, limit: int | None
) -> ReportImages:
    """Open the images that `data` names, or else those that training held out.

    With `limit`, that many images are selected at random, with a fixed seed.

    Raises:
        NoImagesError: if `data` is None and the recipe's images are not available.
        DataError: if the images of `data` cannot be read, or their classes are not the network's.
        CheckpointError: if `data` is given and the checkpoint has no preprocessing.
    """
    pre = checkpoint.preprocessing
    if pre is None:
        reason = "the checkpoint does not say how images are prepared (preprocessing)"
        raise CheckpointError(reason) if data is not None else NoImagesError(reason)
    if data is not None:
        return _open(checkpoint, HeldOut(data, split or "test", None), limit)
    stages = held_out(checkpoint.recipe)
    try:
        if not stages:
            return _open(checkpoint, _shipped(checkpoint, split), limit)
        source = stages[0]
        if source is None:
            raise NoImagesError("training held out no images")
        if not Path(source.path).exists():
            raise NoImagesError(f"the run's images are not at {source.path} here")
        if split is not None:
            source = HeldOut(source.path, split, None)
        return _open(checkpoint, source, limit)
    except DataError as error:
        raise NoImagesError(f"the run's images cannot be read ({error})") from None


def _shipped(checkpoint: Checkpoint, split: str | None) -> HeldOut:
    """The data set shipped with dynaslim, for a network that the demo trained on it."""
    stages = [checkpoint.recipe.get(stage) for stage in ("supernet", "gate")]
    names = checkpoint.class_names
    if all(isinstance(stage, Mapping) for stage in stages) and names is not None:
        source = HeldOut(str(MINI), split or "test", None)
        if open_source(MINI, source.split).class_names == names:
            return source
    raise NoImagesError("the checkpoint does not record its training images")


def _open(checkpoint: Checkpoint, which: HeldOut, limit: int | None) -> ReportImages:
    images = open_for(checkpoint, which.path, which.split, share=which.share)
    total = len(images)
    if limit is not None and limit < total:
        images = images.sample(limit)
    assert checkpoint.preprocessing is not None
    assert images.source is not None
    images.check_fits(checkpoint.preprocessing, checkpoint.net.spec.num_classes)
    trained_on = which.share is None and _is_trained_on(checkpoint.recipe, images.source)
    split = images.source.split
    return ReportImages(images, which.path, split, which.share, total, trained_on)


def _is_trained_on(recipe: Mapping[str, Any], source: ImageSource) -> bool:
    for data in data_recipes(recipe):
        path = Path(data["path"] or MINI)
        same = path.exists() and path.resolve() == Path(source.name).resolve()
        if same and source.split in (data.get("split"), WHOLE):
            return True
    return False


# -- stored metrics -------------------------------------------------------------------------------


def stored_metrics(metrics: Mapping[str, Any], spec: NetSpec) -> Metrics | None:
    """Read `Evaluation.to_dict` from a checkpoint's metrics; None if it is not valid."""
    try:
        found = msgspec.convert(metrics.get("val", metrics), Metrics)
        shares = found.dynamic.route_shares if found.dynamic else ()
        for widths in [one.widths for one in found.routes] + [one.widths for one in shares]:
            spec.coerce_route(widths)
    except (msgspec.ValidationError, UsageError):
        return None
    modes = (*found.routes, *((found.dynamic,) if found.dynamic else ()))
    costs = [found.dynamic.mean_madds if found.dynamic else 0.0]
    costs += [one.mean_madds or 0.0 for one in found.per_class]
    accuracies = [value for mode in modes for value in (mode.top1, mode.top5)]
    accuracies += [one.top1 or 0.0 for one in found.per_class]
    accuracies += [share.share for share in shares]
    accuracies += [share for one in found.per_class for share in one.route_shares]
    is_valid = (
        found.images > 0
        and len(found.per_class) == spec.num_classes
        and all(math.isfinite(cost) for cost in costs)
        and all(0 <= accuracy <= 1 for accuracy in accuracies)
    )
    return found if is_valid else None


# -- baselines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """A static network to compare with, as measured by the user; costs are per image."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    top1: Annotated[float, msgspec.Meta(ge=0, le=1)]
    madds: Annotated[float, msgspec.Meta(ge=0)] | None = None
    ms: Annotated[float, msgspec.Meta(ge=0)] | None = None
    images: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """Number of images that `top1` was measured on, for its confidence interval."""
    params: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """Number of parameters, from which the memory of the weights is computed."""

    def __post_init__(self) -> None:
        check(self.madds is not None or self.ms is not None, "give madds or ms, or both")


def read_baselines(path: Path) -> tuple[Baseline, ...]:
    """Read a JSON file with a list of baselines.

    Raises:
        UsageError: if the file cannot be read or has another format.
    """
    try:
        raw = parse_json(path.read_bytes())
        is_list = isinstance(raw, list) and len(raw) <= _MAX_BASELINES
        check(is_list, f"not a list of at most {_MAX_BASELINES} baselines")
        return tuple(validated(one, Baseline, f"entry {n}") for n, one in enumerate(raw))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}; the form is {_BASELINES_FORM}") from None
