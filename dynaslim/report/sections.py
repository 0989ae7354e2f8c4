"""The parts of a report between its headline and how it was made, ready for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dynaslim.evaluation import ClassMetrics
from dynaslim.report import text
from dynaslim.report.charts import (
    Bar,
    Chart,
    Line,
    Table,
    curves_chart,
    histogram,
    ramp,
    share_bars,
)
from dynaslim.report.facts import Facts
from dynaslim.report.gallery import RouteGallery, Strip, make_gallery
from dynaslim.report.numbers import confusion
from dynaslim.report.stats import accuracy_interval
from dynaslim.report.subject import Curves

MOST_ROUTES: Final = 6
"""Routes that are told apart; the rest are "other routes"."""
MOST_CLASSES: Final = 30
"""Classes that are listed; of more, the ends of the list are."""
_END: Final = 12
MATRIX_CLASSES: Final = 20
_PAIRS: Final = 20
_PAIRS_BESIDE: Final = 10
"""Confusions that are listed beside a matrix."""
_MOST_GATES: Final = 4
_NO_LOSSES: Final = frozenset({"kind", "step", "epoch", "lr", "images_per_s", "gate", "mean_cost"})


@dataclass(frozen=True)
class RouteColumn:
    """A route that the report tells apart, or (`number` None) all others together."""

    number: int | None
    """In `DynamicMetrics.route_shares`, and in `Evaluation.taken`."""
    style: str
    widths: str
    madds: str
    share: float

    @property
    def name(self) -> str:
        """Widths and cost."""
        return f"{self.widths} ({self.madds})" if self.number is not None else self.widths


def route_columns(facts: Facts) -> tuple[RouteColumn, ...]:
    """The most used routes, cheapest first, and what is left of the images."""
    if facts.numbers is None or facts.numbers.dynamic is None:
        return ()
    shares = facts.numbers.dynamic.route_shares
    order = sorted(range(len(shares)), key=lambda n: (-shares[n].share, n))[:MOST_ROUTES]
    cost = {n: facts.cost_of(shares[n].widths) for n in order}
    order.sort(key=lambda n: (cost[n] or 0, shares[n].widths))
    columns = [
        RouteColumn(
            number,
            ramp(place, len(order)),
            text.widths_of(shares[number].widths),
            text.millions(cost[number]),
            shares[number].share,
        )
        for place, number in enumerate(order)
    ]
    if len(shares) > len(order):
        left = sum(one.share for n, one in enumerate(shares) if n not in order)
        others = f"{len(shares) - len(order)} other routes"
        columns.append(RouteColumn(None, "other", others, "", left))
    return tuple(columns)


def class_names(facts: Facts) -> tuple[str, ...]:
    """What each class is called on the page."""
    known = facts.subject.chosen.checkpoint.class_names
    names: Sequence[str | None] = known or ()
    if not names and facts.numbers is not None:
        names = [one.name for one in facts.numbers.per_class]
    if not names:
        names = (None,) * facts.spec.num_classes
    return tuple(text.name_of(name, index) for index, name in enumerate(names))


# -- routes ---------------------------------------------------------------------------------------


def taken_table(facts: Facts, columns: Sequence[RouteColumn]) -> Table | None:
    """Each route that images took: how many, and how right it and the widest are on just these."""
    evaluation, details = facts.evaluation, facts.details
    if evaluation is None or details is None or evaluation.dynamic is None:
        return None
    right_N = (evaluation.predictions == evaluation.labels).numpy()
    widest_N = details.widest_right_N.numpy()
    number_N = evaluation.taken_number.numpy()
    told = [column.number for column in columns if column.number is not None]
    rows = []
    for column in columns:
        own = number_N == column.number
        if column.number is None:
            own = ~np.isin(number_N, told)
        images = int(own.sum())
        rows.append(
            (
                column.widths,
                column.madds or text.NONE,
                text.count(images),
                text.percent(images / evaluation.images, 1),
                text.percent(right_N[own].mean() if images else None),
                text.percent(widest_N[own].mean() if images else None),
            )
        )
    head = ("route", "MAdds", "images", "share", "top-1 of these", "widest route on these")
    return Table(head, tuple(rows))


# -- classes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """What every class costs and how often it is right."""

    bars: Chart | None
    table: Table
    listed: int
    classes: int
    """Classes that have images."""
    order: str


def classes(facts: Facts, columns: Sequence[RouteColumn], names: Sequence[str]) -> Classes | None:
    """Bars of the routes and a table by class; the costliest first, or else the hardest."""
    numbers = facts.numbers
    if numbers is None:
        return None
    found = [one for one in numbers.per_class if one.images]
    if not found:
        return None
    gated = numbers.dynamic is not None
    if gated:
        found.sort(key=lambda one: (-(one.mean_madds or 0.0), one.index))
        order = "Classes by what their images cost on average, the costliest first"
    else:
        found.sort(key=lambda one: (one.top1 or 0.0, one.index))
        order = "Classes by their accuracy, the lowest first"
    shown = found if len(found) <= MOST_CLASSES else [*found[:_END], *found[-_END:]]
    told = [column.number for column in columns if column.number is not None]

    def shares(all_shares: Sequence[float]) -> tuple[float, ...]:
        named = [all_shares[number] for number in told]
        others = sum(s for n, s in enumerate(all_shares) if n not in told)
        return tuple(named) if len(named) == len(columns) else (*named, others)

    bars = None
    if gated and columns:
        assert numbers.dynamic is not None
        rows = [
            Bar("all images", tuple(column.share for column in columns), _cost(numbers.dynamic)),
            *(Bar(names[one.index], shares(one.route_shares), _cost(one)) for one in shown),
        ]
        bars = share_bars(
            rows,
            [(column.style, column.name) for column in columns],
            label="Routes per class: share of each class's images along each route. "
            + "; ".join(f"{row.name} {row.end}" for row in rows[:6]),
            end="mean MAdds",
        )
    table = Table(
        ("class", "images", "top-1", "95% interval", *(("mean MAdds",) if gated else ())),
        tuple(_class_row(one, names[one.index], gated=gated) for one in shown),
    )
    return Classes(bars, table, len(shown), len(found), order)


def _cost(one: Any) -> str:
    return text.millions(one.mean_madds)


def _class_row(one: ClassMetrics, name: str, *, gated: bool) -> tuple[str, ...]:
    assert one.top1 is not None
    interval = accuracy_interval(one.top1, one.images)
    return (
        name,
        text.count(one.images),
        text.percent(one.top1),
        f"{text.percent(interval.low, 1)} to {text.percent(interval.high, 1)}",
        *((text.millions(one.mean_madds),) if gated else ()),
    )


# -- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """Pictures of the most used routes, and mistakes."""

    routes: tuple[tuple[RouteColumn | None, RouteGallery], ...]
    mistakes: Strip | None


def gallery(facts: Facts, columns: Sequence[RouteColumn], names: Sequence[str]) -> Gallery | None:
    """Pictures by route; without gates of the one route that was taken."""
    evaluation, details, opened = facts.evaluation, facts.details, facts.opened
    if evaluation is None or details is None or opened is None:
        return None
    by_number = {c.number: c for c in columns if c.number is not None and c.share > 0}
    numbers = list(by_number) or [0]
    galleries, mistakes = make_gallery(evaluation, details, opened.images, names, numbers)
    return Gallery(tuple((by_number.get(one.route), one) for one in galleries), mistakes)


# -- confidence -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distribution:
    """A histogram with what it says in words."""

    title: str
    chart: Chart
    words: str


def confidence(facts: Facts) -> tuple[Distribution, ...]:
    """How sure the gates are of their choices, and the network of its answers."""
    evaluation, details = facts.evaluation, facts.details
    if evaluation is None or details is None:
        return ()
    right_N = (evaluation.predictions == evaluation.labels).numpy()
    found = []
    gates = details.gate_probability_GN.numpy()
    for number, value_N in enumerate(gates[:_MOST_GATES]):
        which = "the gate" if len(gates) == 1 else f"gate {number + 1} of {len(gates)}"
        words = _halves(value_N, right_N, "gate")
        chart = histogram(
            value_N,
            right_N,
            unit="probability of the chosen width",
            label=f"Histogram of the probability that {which} gives its choice. {words}",
        )
        found.append(Distribution(f"How sure {which} is of its choice", chart, words))
    margin_N = details.margin_N.numpy()
    words = _halves(margin_N, right_N, "network")
    chart = histogram(
        margin_N,
        right_N,
        unit="margin between the two likeliest classes",
        label=f"Histogram of the margin of the answers. {words}",
    )
    found.append(Distribution("How sure the network is of its answer", chart, words))
    return tuple(found)


def _halves(value_N: np.ndarray, right_N: np.ndarray, what: str) -> str:
    """How right the answers are where it is surest, and where it is least sure."""
    order = np.argsort(value_N, kind="stable")
    half = len(order) // 2
    if not half:
        return ""
    low, high = (
        text.percent(float(right_N[own].mean()), 1) for own in (order[:half], order[half:])
    )
    return (
        f"Of the half of the images of which the {what} is surest {high} are answered right, of "
        f"the other half {low}."
    )


# -- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """The curves of a stage."""

    title: str
    charts: tuple[tuple[str, Chart], ...]


def training(curves: Sequence[Curves]) -> tuple[Training, ...]:
    """Losses and accuracies over the steps of every stage that left a metrics file."""
    found = []
    for one in curves:
        charts = []
        losses = curves_chart(
            _losses(one.lines), unit="training loss", label=f"{one.title}: losses", signs=False
        )
        if losses is not None:
            charts.append(("Losses", losses))
        accuracy = curves_chart(
            _accuracies(one.lines),
            unit="held-out top-1, %",
            label=f"{one.title}: accuracy on held-out images",
            signs=True,
        )
        if accuracy is not None:
            charts.append(("Accuracy on held-out images", accuracy))
        if charts:
            found.append(Training(one.title, tuple(charts)))
    return tuple(found)


def _losses(lines: Sequence[Mapping[str, Any]]) -> list[Line]:
    train = [line for line in lines if line["kind"] == "train"]
    names = [name for name in (train[0] if train else {}) if name not in _NO_LOSSES]
    found = []
    for place, name in enumerate(names[:5]):
        pairs = [
            (float(line["step"]), value)
            for line in train
            if (value := _mean(line.get(name))) is not None
        ]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            shown = text.shorten(text.clean(name.replace("_", " ")), 40)
            found.append(Line(shown, f"line l{place}", steps, values))
    return found


def _accuracies(lines: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The first and the last route of every evaluation on the way."""
    rows = []
    for line in lines:
        top1 = line.get("top1")
        if line["kind"] == "val" and isinstance(top1, list) and top1:
            ends = (_mean(top1[0]), _mean(top1[-1]))
            if ends[0] is not None and ends[1] is not None:
                rows.append((float(line["step"]), 100 * ends[1], 100 * ends[0]))
    if not rows:
        return []
    steps, widest, cheapest = zip(*rows, strict=True)
    return [
        Line("last route (widest)", "line l0", steps, widest),
        Line("first route (cheapest)", "line l2", steps, cheapest),
    ]


def _mean(value: Any) -> float | None:
    """A number, or the mean of a list of them; None for anything else."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(v) in (int, float) and np.isfinite(v) for v in values):
        return None
    return float(np.mean(values))


# -- confusion ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """How many images of a class got an answer, and their share of the class."""

    count: str
    share: float
    right: bool


@dataclass(frozen=True)
class Confusion:
    """A matrix of few classes, or the most frequent confusions of many."""

    names: tuple[str, ...]
    matrix: tuple[tuple[Cell, ...], ...]
    pairs: Table
    wrong: int


def confusions(facts: Facts, names: Sequence[str]) -> Confusion | None:
    """What classes are taken for, in the dynamic mode, or along the widest route."""
    evaluation = facts.evaluation
    if evaluation is None:
        return None
    counts = confusion(evaluation, len(names))
    totals = counts.sum(1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    most = _PAIRS_BESIDE if len(names) <= MATRIX_CLASSES else _PAIRS
    flat = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [
        (names[row], names[column], text.count(n), text.percent(n / int(totals[row]), 1))
        for row, column in zip(*np.unravel_index(flat, wrong.shape), strict=True)
        if (n := int(wrong[row, column]))
    ]
    matrix: tuple[tuple[Cell, ...], ...] = ()
    if len(names) <= MATRIX_CLASSES:
        matrix = tuple(
            tuple(
                Cell(text.count(int(n)), float(n / max(1, total)), row == column)
                for column, n in enumerate(line)
            )
            for row, (line, total) in enumerate(zip(counts, totals, strict=True))
        )
    head = ("class", "taken for", "images", "of the class")
    return Confusion(tuple(names), matrix, Table(head, tuple(pairs)), int(wrong.sum()))
