"""Collects the data of a report: reads the run, evaluates on images, times on this machine.

Suffixes: N images, B rows of a batch, C channels, S side in pixels, G gates, K options of a gate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from dynaslim.cost import madds, params, program_params
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import normalise
from dynaslim.errors import UsageError
from dynaslim.evaluation import Evaluation, Metrics, RouteMetrics, RouteShare, evaluate
from dynaslim.model_names import run_or_checkpoint
from dynaslim.nn.net import ElasticNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.progress import progress
from dynaslim.recipes import ReportOptions
from dynaslim.report import text
from dynaslim.report.inputs import (
    BASELINES,
    Baseline,
    Model,
    NoImagesError,
    ReportImages,
    RunInfo,
    open_images,
    read_baselines,
    read_run,
    stored_metrics,
)
from dynaslim.report.timing import (
    Times,
    budget_mode,
    gate_mode,
    measure_times,
    noise_images,
    representative_images,
    route_mode,
    rows_per_round,
)
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.budget_search import Interval, Z, accuracy_interval
from dynaslim.runtime.calibrate_budget import answer_images, count_paths, simulate
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.escalation import margins
from dynaslim.runtime.program_net import for_evaluation
from dynaslim.spec import NetSpec, Route

_MAX_TIMED: Final = 16
"""Most static routes of a network that are timed."""
_BUDGETS: Final = 8
AS_ACCURATE: Final = 0.005
"""A mode whose top-1 is at most this much below a baseline's counts as about as accurate."""
_NOISY: Final = 0.3


# -- what was measured ----------------------------------------------------------------------------


class Difference(NamedTuple):
    """A difference of two accuracies with the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(better: int, worse: int, images: int) -> Difference:
    """The difference of two accuracies (0..1) on the same images, with its 95% interval.

    On `better` images only the first is right, on `worse` images only the second. Images on which
    both are right or both wrong do not add to the variance, so the interval is usually narrower
    than for accuracies on different images.
    """
    assert images > 0
    value = (better - worse) / images
    variance = (better + worse - (better - worse) ** 2 / images) / images**2
    half = Z * math.sqrt(max(variance, 0.0))
    return Difference(value, value - half, value + half)


def at_cost(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """The accuracy at a cost, interpolated in (cost, accuracy) points; None outside their range."""
    for (left, low), (right, high) in itertools.pairwise(sorted(points)):
        if left <= cost <= right:
            share = (cost - left) / (right - left) if right > left else 0.0
            return low + share * (high - low)
    return None


@dataclass(frozen=True)
class Gate:
    """A model with trained gates, its metrics if there are any, and its key in `Times.ms`."""

    model: Model
    metrics: Metrics | None
    timed_as: str


@dataclass(frozen=True)
class Budget:
    """A point of the budget curve with its result on the report's images or at calibration."""

    point: BudgetPoint
    madds: float
    """Mean multiply-adds per image."""
    top1: float
    images: int | None
    """Number of images that `top1` was measured on; None if the curve does not record it."""

    @property
    def name(self) -> str:
        return f"budget {self.point.share:.3f}"


@dataclass(frozen=True)
class Details:
    """Confidence of the gates and the network on each image, in the evaluation's order."""

    margin_N: Tensor
    """(N,) float32, 0..1: the highest class probability minus the second highest."""
    gate_probability_GN: Tensor
    """(G, N) float32, 0..1: each gate's probability of its choice; (0, N) if no gate was run."""
    widest_correct_N: Tensor
    """(N,) bool: whether the widest route (of those that trained gates can take) is right."""


@dataclass(frozen=True)
class Mode:
    """One way to run the network, or a baseline: a row of the table and a point of the charts."""

    kind: Literal["uniform", "dynamic", "budget", "baseline"]
    name: str
    top1: float
    madds: float | None
    """Mean multiply-adds per image."""
    images: int | None = None
    """Number of images that `top1` was measured on, if known."""
    label: str = ""
    """Text beside the mode's point in a chart."""
    ms: float | None = None
    """Median milliseconds per image."""
    quartiles: tuple[float, float] | None = None
    """Quartiles of `ms`, if it was measured for this report."""
    speed: float | None = None
    """How many times as fast as the widest route."""
    weights: int | None = None
    """Number of weights that its programs hold in memory: of all variants, if routes are mixed."""

    @property
    def interval(self) -> Interval | None:
        return None if self.images is None else accuracy_interval(self.top1, self.images)


class Comparison(NamedTuple):
    """A baseline, and the fastest mode that is at least about as accurate and is faster."""

    baseline: Mode
    mode: Mode | None
    """None if there is no such mode."""

    @property
    def speed(self) -> float | None:
        """The baseline's time divided by the mode's."""
        if self.mode is None or self.mode.ms is None or self.baseline.ms is None:
            return None
        return self.baseline.ms / self.mode.ms


@dataclass(frozen=True)
class ReportData:
    """All values of a report; missing ones are None, and `notes` explain why."""

    options: ReportOptions
    run: RunInfo
    metrics: Metrics | None
    """Metrics of `run.model`."""
    gates: tuple[Gate, ...]
    """Every model with trained gates, sorted by target."""
    images: ReportImages | None
    details: Details | None
    times: Times | None
    budgets: tuple[Budget, ...]
    """Points of the model's budget curve, the cheapest first."""
    baselines: tuple[Baseline, ...]
    notes: tuple[str, ...]

    @property
    def spec(self) -> NetSpec:
        spec: NetSpec = self.run.model.checkpoint.net.spec
        return spec

    @property
    def evaluation(self) -> Evaluation | None:
        """`metrics` if they were measured for this report, else None."""
        return self.metrics if isinstance(self.metrics, Evaluation) else None

    @cached_property
    def widest(self) -> RouteMetrics | None:
        """The reference: the gates' widest route; without a dynamic mode, the costliest route."""
        if self.metrics is None:
            return None
        if self.metrics.dynamic is None:
            return max(self.metrics.routes, key=lambda route: route.madds, default=None)
        widths = self.spec.widest_choice.widths
        return next((route for route in self.metrics.routes if route.widths == widths), None)

    @cached_property
    def against_widest(self) -> Difference | None:
        """The dynamic mode's accuracy minus the widest route's, on the same images."""
        evaluation = self.evaluation
        if self.details is None or evaluation is None or evaluation.dynamic is None:
            return None
        right_N = evaluation.predictions == evaluation.labels
        widest_N = self.details.widest_correct_N
        better, worse = int((right_N & ~widest_N).sum()), int((~right_N & widest_N).sum())
        return paired_difference(better, worse, len(right_N))

    @cached_property
    def modes(self) -> tuple[Mode, ...]:
        """All modes: uniform routes by cost, gates by target, budgets, then baselines."""
        modes, routed = [], program_params(self.spec)
        for route in sorted(self.metrics.routes if self.metrics else (), key=lambda r: r.madds):
            assert self.metrics is not None
            name, label = text.widths_of(route.widths), f"{100 * route.top1:.2f}"
            weights = params(self.spec, Route(tuple(route.widths)))
            images = self.metrics.images
            mode = Mode("uniform", name, route.top1, route.madds, images, label, weights=weights)
            modes.append(self._timed(mode, route_mode(route.widths)))
        for gate in self.gates:
            if gate.metrics is not None and gate.metrics.dynamic is not None:
                dynamic, images = gate.metrics.dynamic, gate.metrics.images
                target = f"{gate.model.target:g}: " if gate.model.target else ""
                label = f"{target if len(self.gates) > 1 else ''}{100 * dynamic.top1:.2f}"
                name = gate.model.label
                top1, cost = dynamic.top1, dynamic.mean_madds
                mode = Mode("dynamic", name, top1, cost, images, label, weights=routed)
                modes.append(self._timed(mode, gate.timed_as))
        for number, budget in enumerate(self.budgets):
            name, top1, cost = budget.name, budget.top1, budget.madds
            mode = Mode("budget", name, top1, cost, budget.images, weights=routed)
            modes.append(self._timed(mode, budget_mode(number)))
        for one in self.baselines:
            name = text.name_of(one.name, 0)
            label = text.shorten(name, 14)
            mode = Mode("baseline", name, one.top1, one.madds, one.images, label, one.ms)
            modes.append(replace(mode, weights=one.params))
        return tuple(modes)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Compares each baseline that has a time with the fastest mode about as accurate."""
        own = [mode for mode in self.modes if mode.kind != "baseline" and mode.ms is not None]
        found = []
        for baseline in self.modes:
            if baseline.kind == "baseline" and baseline.ms is not None:
                good = [mode for mode in own if mode.top1 >= baseline.top1 - AS_ACCURATE]
                best = min(good, key=lambda mode: mode.ms or 0.0, default=None)
                faster = best is not None and best.ms is not None and best.ms < baseline.ms
                found.append(Comparison(baseline, best if faster else None))
        return tuple(found)

    def _timed(self, mode: Mode, key: str) -> Mode:
        spread = self.times and self.times.spread(key)
        if not spread:
            return mode
        quartiles = (spread["q1"], spread["q3"])
        return replace(mode, ms=spread["median"], quartiles=quartiles, speed=self.speed(key))

    def speed(self, key: str) -> float | None:
        """The widest route's time divided by that of a mode in `times`; None if not timed."""
        if self.times is None or self.widest is None:
            return None
        return self.times.ratio(route_mode(self.widest.widths), key)

    def uniform_top1(self, cost: float, *, by_ms: bool) -> float | None:
        """Top-1 at a cost if all images take one route, interpolated between measured routes."""
        routes = [mode for mode in self.modes if mode.kind == "uniform"]
        costs = [mode.ms if by_ms else mode.madds for mode in routes]
        points = [(x, mode.top1) for x, mode in zip(costs, routes, strict=True) if x is not None]
        return at_cost(points, cost)

    def route_madds(self, widths: Sequence[int]) -> int | None:
        """Multiply-adds of a route; None if the image size is unknown."""
        pre = self.run.model.checkpoint.preprocessing
        if pre is None:
            return None
        return madds(self.spec, Route(tuple(widths)), pre.image_size_px)


# -- gathering ------------------------------------------------------------------------------------


def gather(path: str | Path, options: ReportOptions) -> ReportData:
    """Read a run, evaluate and time it; progress is shown on standard error.

    Raises:
        UsageError: if there is no run, or an argument is invalid.
        CheckpointError: if a checkpoint cannot be read.
        DataError: if given images cannot be read or do not fit the network.
    """
    baselines = () if options.baselines is None else read_baselines(options.baselines)
    run = read_run(run_or_checkpoint(Path(path)), options.target)
    if options.baselines is None and (run.path / BASELINES).is_file():
        baselines = read_baselines(run.path / BASELINES)
    model = run.model
    notes = [*run.notes]
    curve = _budget_curve(model, notes)
    model.checkpoint.net.to(options.device)
    engine = _engine(options, model, notes)
    images = None
    try:
        images = open_images(
            model.checkpoint, data=options.data, split=options.split, limit=options.images
        )
    except NoImagesError as error:
        notes.append(
            f"There are no images to evaluate on: {error}. Pictures, confidence and confusions are "
            f"left out, and accuracies are those that training stored. Give images with "
            f"--data PATH."
        )
    models = [model, *(other for other in run.gated if other is not model)]
    details = None
    if images is not None:
        net, pre = model.checkpoint.net, model.checkpoint.preprocessing
        assert pre is not None
        routes = net.spec.routes
        if model.has_trained_gates:
            routes = tuple(dict.fromkeys((*routes, net.spec.widest_choice)))
        evaluation = _evaluate(model, images, options, routes)
        details = measure_details(
            net, images.images, pre, evaluation, batch_size=options.batch_size
        )
        others = [_evaluate(other, images, options, ()) for other in models[1:]]
        metrics: list[Metrics | None] = [evaluation, *others]
        notes += _notes_on_images(images, evaluation)
    else:
        metrics = [
            stored_metrics(one.checkpoint.metrics, one.checkpoint.net.spec) for one in models
        ]
        if metrics[0] is None:
            notes.append(f"{model.file.name} has no accuracies stored.")
    budgets = _budgets(curve, model, images, options)
    times = None
    if engine is not None:
        times = _times(engine, options, models, metrics, images, budgets)
        if times.noise > _NOISY:
            notes.append(
                f"The machine was busy while times were taken: quartiles lie up to "
                f"{times.noise:.0%} of the median apart. Make the report again when it is idle, or "
                f"with more --rounds."
            )
    positions = [models.index(one) for one in run.gated]
    return ReportData(
        options,
        run,
        metrics[0],
        tuple(Gate(models[n], metrics[n], gate_mode(n)) for n in positions),
        images,
        details,
        times,
        budgets,
        baselines,
        tuple(notes),
    )


def _budget_curve(model: Model, notes: list[str]) -> BudgetCurve | None:
    checkpoint = model.checkpoint
    if checkpoint.budget is None:
        return None
    try:
        curve = BudgetCurve.from_dict(checkpoint.budget)
        curve.check_fits(checkpoint.net.spec, mirror=checkpoint.mirror)
        count_paths(checkpoint.net.spec)
    except UsageError as error:
        notes.append(f"The budget curve is left out: {error}.")
        return None
    return curve


def _engine(options: ReportOptions, model: Model, notes: list[str]) -> Engine | None:
    """The engine to time; created early, so that a missing backend is reported at once."""
    spec = model.checkpoint.net.spec
    if options.rounds == 0:
        notes.append("Milliseconds are left out, because of --rounds 0.")
        return None
    if not spec.gates or model.checkpoint.preprocessing is None:
        why = "it has no gates" if not spec.gates else "its image size is unknown"
        notes.append(f"Milliseconds are left out: the engine does not run {spec.name}, {why}.")
        return None
    return Engine(model.checkpoint, backend=options.backend, cache_dir=options.cache_dir)


def _evaluate(
    model: Model, images: ReportImages, options: ReportOptions, routes: Sequence[Route]
) -> Evaluation:
    """Evaluate the routes, and the dynamic mode if the model has trained gates."""
    pre = model.checkpoint.preprocessing
    assert pre is not None
    model.checkpoint.net.to(options.device)
    with progress(f"evaluating {model.file.name}", len(images.images)) as bar:
        return evaluate(
            model.checkpoint,
            images.images,
            pre,
            batch_size=options.batch_size,
            routes=routes,
            on_batch=bar.advance,
            dynamic=model.has_trained_gates,
        )


def _notes_on_images(images: ReportImages, evaluation: Evaluation) -> list[str]:
    notes = []
    if images.trained_on:
        notes.append(
            "The network was trained on these images: expect less than these numbers elsewhere."
        )
    if evaluation.skipped:
        names = "; ".join(images.images.skipped.lines[:3])
        notes.append(f"{text.plural(evaluation.skipped, 'image')} could not be read: {names}.")
    return notes


@torch.inference_mode()
def measure_details(
    net: ElasticNet,
    images: ImageDataset,
    preprocessing: Preprocessing,
    evaluation: Evaluation,
    *,
    batch_size: int,
) -> Details:
    """Run the evaluated images again, along the routes they took and along the widest route."""
    spec, device = net.spec, net.device
    widest = spec.widest_choice if evaluation.dynamic is not None else evaluation.taken[0]
    margin: list[Tensor] = []
    gates: list[Tensor] = []
    right: list[Tensor] = []
    done = 0
    net, batch_size = for_evaluation(
        net, preprocessing.image_size_px, evaluation.images, batch_size
    )
    with progress("measuring confidence", evaluation.images) as bar:
        for pixels_BCSS, labels_B in images.batches(batch_size, evaluation.rows):
            x_BCSS = normalise(pixels_BCSS.to(device), preprocessing)
            rows = slice(done, done + len(labels_B))
            done = rows.stop
            widest_BN = net(x_BCSS, widest).float().cpu()
            if evaluation.dynamic is None:
                logits_BN, chosen_GB = widest_BN, torch.empty(0, len(labels_B))
            else:
                logits_BN, chosen_GB = _run_paths(net, x_BCSS, evaluation.choices[rows])
            margin.append(torch.from_numpy(margins(logits_BN.numpy())))
            gates.append(chosen_GB)
            right.append(widest_BN.argmax(1) == evaluation.labels[rows])
            bar.advance(len(labels_B))
    return Details(torch.cat(margin), torch.cat(gates, 1), torch.cat(right))


def _run_paths(net: ElasticNet, x_BCSS: Tensor, choices_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, N) of rows along their paths, and probabilities (G, B) of the gates' choices."""
    spec = net.spec
    logits_BN = torch.empty(len(x_BCSS), spec.num_classes)
    chosen_GB = torch.empty(len(spec.gates), len(x_BCSS))
    paths, path_B = torch.unique(choices_BG, dim=0, return_inverse=True)
    for number, path in enumerate(paths.tolist()):
        rows = torch.nonzero(path_B == number).flatten()
        features = x_BCSS[rows.to(x_BCSS.device)]
        for segment, index in enumerate((0, *path)):
            features, gate_logits_BK = net.segment(segment, features, index)
            if gate_logits_BK is not None:
                option = spec.gates[segment].choices.index(path[segment])
                chosen_GB[segment, rows] = gate_logits_BK.float().softmax(1)[:, option].cpu()
        logits_BN[rows] = features.float().cpu()
    return logits_BN, chosen_GB


def _budgets(
    curve: BudgetCurve | None, model: Model, images: ReportImages | None, options: ReportOptions
) -> tuple[Budget, ...]:
    """Evenly spaced points of the curve, measured on the images, if any."""
    if curve is None:
        return ()
    points = [curve.points[place] for place in _spaced(len(curve.points), _BUDGETS)]
    if images is None:
        return tuple(
            Budget(point, point.madds, point.top1, curve.measured_images) for point in points
        )
    answers = answer_images(model.checkpoint, images.images, options.batch_size)
    outcomes = [simulate(answers, point.shift, point.escalations) for point in points]
    return tuple(
        Budget(point, outcome.madds, outcome.top1, len(answers))
        for point, outcome in zip(points, outcomes, strict=True)
    )


def _times(
    engine: Engine,
    options: ReportOptions,
    models: Sequence[Model],
    metrics: Sequence[Metrics | None],
    images: ReportImages | None,
    budgets: Sequence[Budget],
) -> Times:
    """Time on images with representative shares of routes, or on noise if there are no images."""
    spec, pre = engine.spec, engine.preprocessing
    assert pre is not None
    rows = rows_per_round(spec, pre.image_size_px)
    evaluation = metrics[0]
    shares: list[Sequence[RouteShare]] | None = []
    if images is not None and isinstance(evaluation, Evaluation):
        x = representative_images(evaluation, images.images, pre, rows)
        shares = None if evaluation.dynamic is not None else []
    else:
        x = noise_images(spec, rows, pre.image_size_px)
        if models[0].has_trained_gates:
            shares = [one.dynamic.route_shares if one and one.dynamic else () for one in metrics]
    routes = [spec.routes[place].widths for place in _spaced(len(spec.routes), _MAX_TIMED)]
    with progress("timing", options.rounds) as bar:
        return measure_times(
            engine,
            [model.checkpoint for model in models[1:]],
            x,
            cache_dir=options.cache_dir,
            routes=list(dict.fromkeys([*routes, spec.widest_choice.widths])),
            budgets=[budget.point for budget in budgets] if images is not None else [],
            shares=shares,
            rounds=options.rounds,
            on_round=bar.advance,
        )


def _spaced(total: int, most: int) -> list[int]:
    """At most `most` evenly spaced positions out of `total`, including the first and the last."""
    count = max(min(total, most), 1)
    return sorted({round(n * (total - 1) / max(1, count - 1)) for n in range(count)})
