"""All that a report says, gathered: read from the run, evaluated on images, timed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from dynaslim import shipped
from dynaslim.cost import madds
from dynaslim.data.transforms import readable_batches
from dynaslim.errors import UsageError, check
from dynaslim.evaluation import Evaluation, RouteMetrics, RouteShare, evaluate
from dynaslim.pretrained import local_path, run_checkpoints
from dynaslim.progress import progress
from dynaslim.report.baselines import FILE, Baseline, read_baselines
from dynaslim.report.images import NoImagesError, Opened, open_images
from dynaslim.report.numbers import Details, Numbers, look_closer, stored_numbers
from dynaslim.report.stats import Difference, paired_difference
from dynaslim.report.subject import Subject, Trained, find_subject
from dynaslim.report.timing import (
    BATCH_SIZE,
    Times,
    batches_per_round,
    measure_times,
    noise,
    pixels_at,
    representative,
)
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.calibrate_budget import answer_paths, count_paths, simulate
from dynaslim.runtime.engine import Engine
from dynaslim.spec import NetSpec, Route

MOST_TIMED: Final = 16
"""Static routes that are timed, of a network that has more."""
_BUDGETS: Final = 8
_NOISY: Final = 0.3


@dataclass(frozen=True)
class Request:
    """What a report is asked for; see `make_report`."""

    run: Path
    data: str | None = None
    split: str | None = None
    target: float | None = None
    images: int | None = None
    baselines: Path | None = None
    backend: str = "auto"
    rounds: int | None = None
    batch_size: int = 256
    device: torch.device | str = "cpu"
    cache_dir: str | Path | None = "auto"
    """Where the engine that is timed keeps compiled programs, as `EngineOptions.cache_dir`."""

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("rounds", 0), ("batch_size", 1)):
            value = getattr(self, name)
            flag = name.replace("_", "-")
            check(value is None or value >= least, f"--{flag} {value}: must be at least {least}")
        check(self.rounds != 1, "--rounds 1: one says nothing of the spread; take more, or 0")


@dataclass(frozen=True)
class Gate:
    """A trained gate of the run, and its numbers if there are any."""

    trained: Trained
    numbers: Numbers | None
    timed: int
    """Its number in `Times`."""


@dataclass(frozen=True)
class Budget:
    """A point of the budget curve, and what it gives."""

    point: BudgetPoint
    madds: float
    """Mean per image."""
    top1: float
    images: int | None
    """How many it was measured on; None if calibration measured it and does not say."""


@dataclass(frozen=True)
class Facts:
    """What was gathered; what could not be had is None, and `notes` say why."""

    request: Request
    subject: Subject
    numbers: Numbers | None
    """Of the chosen network."""
    gates: tuple[Gate, ...]
    """Every trained gate by its target, the chosen one among them."""
    opened: Opened | None
    evaluation: Evaluation | None
    details: Details | None
    times: Times | None
    budgets: tuple[Budget, ...]
    """Some points of the curve of the chosen gate, cheapest first."""
    baselines: tuple[Baseline, ...]
    notes: tuple[str, ...]

    @property
    def spec(self) -> NetSpec:
        """Of the chosen network."""
        return self.subject.chosen.checkpoint.net.spec

    @cached_property
    def widest(self) -> RouteMetrics | None:
        """What everything is held against."""
        return None if self.numbers is None else self.numbers.widest(self.spec)

    def cost_of(self, widths: Sequence[int]) -> int | None:
        """Multiply-adds of a route; None if nothing says how large images are."""
        pre = self.subject.chosen.checkpoint.preprocessing
        if pre is None:
            return None
        return madds(self.spec, Route(tuple(widths)), pre.image_size_px)

    @cached_property
    def against_widest(self) -> Difference | None:
        """The dynamic mode's accuracy less the widest route's, on the same images."""
        if self.details is None or self.evaluation is None or self.evaluation.dynamic is None:
            return None
        right_N = self.evaluation.predictions == self.evaluation.labels
        widest_N = self.details.widest_right_N
        better, worse = int((right_N & ~widest_N).sum()), int((~right_N & widest_N).sum())
        return paired_difference(better, worse, len(right_N))


def gather(request: Request) -> Facts:
    """Read, evaluate and time; progress goes to standard error.

    Raises:
        UsageError: if there is no run, or an argument makes no sense.
        CheckpointError: if a checkpoint cannot be read.
        DataError: if images that were named cannot be read or do not fit the network.
    """
    baselines = () if request.baselines is None else read_baselines(request.baselines)
    path = shipped.resolve(request.run)
    subject = find_subject(path if run_checkpoints(path) else local_path(path), request.target)
    if request.baselines is None and (subject.path / FILE).is_file():
        baselines = read_baselines(subject.path / FILE)
    chosen = subject.chosen
    notes = [*subject.notes]
    curve = _curve(chosen, notes)
    chosen.checkpoint.net.to(request.device)
    engine = _engine(request, chosen, notes)
    opened = None
    try:
        opened = open_images(
            chosen.checkpoint, data=request.data, split=request.split, limit=request.images
        )
    except NoImagesError as error:
        notes.append(
            f"There are no images to look at: {error}. Pictures, confidence and confusions are "
            f"left out, and accuracies are those that training stored. Give images with "
            f"--data PATH."
        )
    ordered = (chosen, *(gate for gate in subject.gates if gate is not chosen))
    evaluation = details = None
    found: dict[Path, Numbers | None] = {}
    if opened is not None:
        evaluation, details = _evaluate(chosen, opened, request)
        found[chosen.file] = Numbers.of(evaluation)
        for gate in ordered[1:]:
            found[gate.file] = _evaluate_gate(gate, opened, request)
        notes += _about_images(opened, evaluation)
    else:
        for gate in ordered:
            checkpoint = gate.checkpoint
            found[gate.file] = stored_numbers(checkpoint.metrics, checkpoint.net.spec)
        if found[chosen.file] is None:
            notes.append(f"{chosen.file.name} has no accuracies stored.")
    budgets = _budgets(curve, chosen, opened, request)
    times = None
    if engine is not None:
        times = _times(engine, request, ordered, found, opened, evaluation, budgets)
        if times.noise > _NOISY:
            notes.append(
                f"The machine was busy while times were taken: quartiles lie up to "
                f"{times.noise:.0%} of the median apart. Make the report again when it is idle, or "
                f"with more --rounds."
            )
    gates = tuple(Gate(g, found[g.file], ordered.index(g)) for g in subject.gates)
    return Facts(
        request,
        subject,
        found[chosen.file],
        gates,
        opened,
        evaluation,
        details,
        times,
        budgets,
        baselines,
        tuple(notes),
    )


def _budgets(
    curve: BudgetCurve | None, chosen: Trained, opened: Opened | None, request: Request
) -> tuple[Budget, ...]:
    """Points of the curve, evenly apart in their order; measured on the images if there are any."""
    if curve is None:
        return ()
    last = len(curve.points) - 1
    places = sorted({round(n * last / (_BUDGETS - 1)) for n in range(_BUDGETS)})
    points = [curve.points[place] for place in places]
    if opened is None:
        images = curve.reporting_images
        return tuple(Budget(point, point.madds, point.top1, images) for point in points)
    pre, net = chosen.checkpoint.preprocessing, chosen.checkpoint.net
    assert pre is not None
    with progress("running every path", len(opened.images)) as bar:
        answers = answer_paths(
            net,
            readable_batches(opened.images, pre, request.batch_size),
            mirror=chosen.checkpoint.mirror,
            on_batch=bar.advance,
        )
    budgets = []
    for point in points:
        outcome = simulate(answers, point.shift, point.escalations)
        budgets.append(Budget(point, outcome.madds, outcome.top1, len(answers)))
    return tuple(budgets)


def _curve(chosen: Trained, notes: list[str]) -> BudgetCurve | None:
    raw = chosen.checkpoint.budget
    if raw is None:
        return None
    try:
        curve = BudgetCurve.from_dict(raw)
        curve.check_fits(chosen.checkpoint.net.spec, mirror=chosen.checkpoint.mirror)
        count_paths(chosen.checkpoint.net.spec)
    except UsageError as error:
        notes.append(f"The budget curve is left out: {error}.")
        return None
    return curve


def _evaluate(chosen: Trained, opened: Opened, request: Request) -> tuple[Evaluation, Details]:
    checkpoint = chosen.checkpoint
    pre, spec = checkpoint.preprocessing, checkpoint.net.spec
    assert pre is not None
    routes = spec.routes
    if chosen.has_gates:
        routes = tuple(dict.fromkeys((*routes, spec.widest_choice)))
    with progress("evaluating", len(opened.images)) as bar:
        evaluation = evaluate(
            checkpoint.net,
            opened.images,
            pre,
            batch_size=request.batch_size,
            routes=routes,
            on_batch=bar.advance,
            dynamic=chosen.has_gates,
        )
    with progress("looking closer", evaluation.images) as bar:
        details = look_closer(
            checkpoint.net,
            opened.images,
            pre,
            evaluation,
            batch_size=request.batch_size,
            on_batch=bar.advance,
        )
    return evaluation, details


def _evaluate_gate(gate: Trained, opened: Opened, request: Request) -> Numbers:
    """The dynamic mode of another gate of the run."""
    pre = gate.checkpoint.preprocessing
    assert pre is not None
    with progress(f"evaluating {gate.label}", len(opened.images)) as bar:
        return Numbers.of(
            evaluate(
                gate.checkpoint.net.to(request.device),
                opened.images,
                pre,
                batch_size=request.batch_size,
                routes=(),
                on_batch=bar.advance,
            )
        )


def _about_images(opened: Opened, evaluation: Evaluation) -> list[str]:
    notes = []
    if opened.trained_on:
        notes.append(
            "The network was trained on these images: expect less than these numbers elsewhere."
        )
    if evaluation.skipped:
        names = "; ".join(opened.images.skipped.names[:3])
        images = f"{evaluation.skipped} image{'' if evaluation.skipped == 1 else 's'}"
        notes.append(f"{images} could not be read: {names}.")
    return notes


def _engine(request: Request, chosen: Trained, notes: list[str]) -> Engine | None:
    """What is timed; made before long work, so that a backend that is not there is told at once."""
    checkpoint = chosen.checkpoint
    spec = checkpoint.net.spec
    if request.rounds == 0:
        notes.append("Milliseconds are left out, as asked for (--rounds 0).")
        return None
    if not spec.gates or checkpoint.preprocessing is None:
        why = "it has no gates" if not spec.gates else "nothing says how large its images are"
        notes.append(f"Milliseconds are left out: the engine does not run {spec.name}, {why}.")
        return None
    return Engine(checkpoint, backend=request.backend, cache_dir=request.cache_dir)


def _times(
    engine: Engine,
    request: Request,
    ordered: Sequence[Trained],
    found: dict[Path, Numbers | None],
    opened: Opened | None,
    evaluation: Evaluation | None,
    budgets: Sequence[Budget],
) -> Times:
    """Milliseconds on images that stand for all, or on noise if there are none."""
    spec, pre = engine.spec, engine.preprocessing
    assert pre is not None
    rows = BATCH_SIZE * batches_per_round(spec, pre.image_size_px)
    shares: list[Sequence[RouteShare]] | None = []
    if opened is not None and evaluation is not None:
        places = evaluation.rows[representative(evaluation, rows)]
        x = pixels_at(opened.images, pre, places)
        shares = None if evaluation.dynamic is not None else []
    else:
        x = noise(spec, rows, pre.image_size_px)
        if ordered[0].has_gates:
            shares = [_stored_shares(found[gate.file]) for gate in ordered]
    with progress("timing", request.rounds) as bar:
        return measure_times(
            engine,
            [gate.checkpoint for gate in ordered[1:]],
            x,
            cache_dir=request.cache_dir,
            routes=_timed_routes(spec),
            budgets=[budget.point for budget in budgets] if opened is not None else [],
            shares=shares,
            rounds=request.rounds,
            on_round=lambda: bar.advance(),
        )


def _stored_shares(numbers: Numbers | None) -> Sequence[RouteShare]:
    return () if numbers is None or numbers.dynamic is None else numbers.dynamic.route_shares


def _timed_routes(spec: NetSpec) -> list[tuple[int, ...]]:
    """The uniform routes, evenly thinned where there are many, and the widest choice."""
    last = len(spec.routes) - 1
    count = min(len(spec.routes), MOST_TIMED)
    places = sorted({round(n * last / max(1, count - 1)) for n in range(count)})
    routes = [spec.routes[place].widths for place in places]
    return list(dict.fromkeys([*routes, spec.widest_choice.widths]))
