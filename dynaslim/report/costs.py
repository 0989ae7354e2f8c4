"""The part of a report on accuracy against cost: two charts and one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dynaslim.report import text
from dynaslim.report.charts import Chart, Point, Series, Table, cost_chart
from dynaslim.report.facts import Budget, Facts
from dynaslim.report.stats import accuracy_interval
from dynaslim.report.timing import BATCH_SIZE, budget_mode, gate_mode, route_mode


@dataclass(frozen=True)
class Costs:
    """Accuracy against multiply-adds, and against milliseconds where they were measured."""

    by_madds: Chart
    by_ms: Chart | None
    table: Table
    timing: str
    """How the milliseconds were taken; empty without them."""


def costs(facts: Facts) -> Costs | None:
    """None where nothing was measured at all."""
    numbers = facts.numbers
    if numbers is None or not (numbers.routes or numbers.dynamic):
        return None
    by_madds = cost_chart(
        _all_series(facts, by_ms=False),
        unit="million multiply-adds per image (mean)",
        label=_spoken(facts),
        digits=2,
    )
    by_ms = None
    if facts.times is not None:
        series = _all_series(facts, by_ms=True)
        if any(one.points for one in series):
            by_ms = cost_chart(
                series,
                unit="milliseconds per image (median)",
                label=f"Accuracy against measured milliseconds. {_timing(facts)}",
                digits=4,
            )
    return Costs(by_madds, by_ms, _table(facts), _timing(facts))


def _spoken(facts: Facts) -> str:
    """The chart in words."""
    numbers = facts.numbers
    assert numbers is not None
    parts = [
        f"{text.percent(route.top1)} at {text.millions(route.madds)}"
        for route in numbers.routes[:6]
    ]
    said = f"Accuracy against multiply-adds. One route for all images: {', '.join(parts)}."
    if numbers.dynamic is not None:
        said += (
            f" Dynamic: {text.percent(numbers.dynamic.top1)} at "
            f"{text.millions(numbers.dynamic.mean_madds)}."
        )
    return said


class Cost(NamedTuple):
    """A cost as it is drawn, and its quartiles if it was measured."""

    value: float
    ends: tuple[float, float] | None = None


def _measured(facts: Facts, mode: str) -> Cost | None:
    """Milliseconds of a mode; None if it was not timed."""
    spread = None if facts.times is None else facts.times.spread(mode)
    return None if spread is None else Cost(spread["median"], (spread["q1"], spread["q3"]))


def _all_series(facts: Facts, *, by_ms: bool) -> list[Series]:
    return [
        _uniform(facts, by_ms=by_ms),
        _budgets(facts, by_ms=by_ms),
        _baselines(facts, by_ms=by_ms),
        _dynamic(facts, by_ms=by_ms),
    ]


def _point(name: str, cost: Cost, top1: float, images: int | None, label: str = "") -> Point:
    interval = None
    if images is not None:
        low, high = accuracy_interval(top1, images)
        interval = (100 * low, 100 * high)
    return Point(name, cost.value, 100 * top1, interval, cost.ends, label)


def _uniform(facts: Facts, *, by_ms: bool) -> Series:
    assert facts.numbers is not None
    points = []
    for route in sorted(facts.numbers.routes, key=lambda route: route.madds):
        cost = Cost(route.madds / 1e6)
        found = _measured(facts, route_mode(route.widths)) if by_ms else cost
        if found is not None:
            name, label = text.widths_of(route.widths), f"{100 * route.top1:.2f}"
            points.append(_point(name, found, route.top1, facts.numbers.images, label))
    return Series("one route for all images", "uniform", tuple(points), line=True)


def _dynamic(facts: Facts, *, by_ms: bool) -> Series:
    points = []
    several = len(facts.gates) > 1
    for gate in facts.gates:
        if gate.numbers is None or gate.numbers.dynamic is None:
            continue
        dynamic = gate.numbers.dynamic
        cost = Cost(dynamic.mean_madds / 1e6)
        found = _measured(facts, gate_mode(gate.timed)) if by_ms else cost
        if found is not None:
            target = f"{gate.trained.target:g}: " if several and gate.trained.target else ""
            label = f"{target}{100 * dynamic.top1:.2f}"
            images = gate.numbers.images
            points.append(_point(gate.trained.label, found, dynamic.top1, images, label))
    points.sort(key=lambda point: point.cost)
    name = "dynamic: the gate chooses for every image" + (", by target" if several else "")
    return Series(name, "dynamic", tuple(points))


def _budgets(facts: Facts, *, by_ms: bool) -> Series:
    points = []
    for number, budget in enumerate(facts.budgets):
        cost = Cost(budget.madds / 1e6)
        found = _measured(facts, budget_mode(number)) if by_ms else cost
        if found is not None:
            points.append(Point(_budget_name(budget), found.value, 100 * budget.top1))
    where = "" if facts.opened is not None else " (as calibration measured them)"
    return Series(f"budgets of the gate{where}", "budget", tuple(points), line=True)


def _budget_name(budget: Budget) -> str:
    return f"budget {budget.point.share:.3f}"


def _baselines(facts: Facts, *, by_ms: bool) -> Series:
    points = []
    for one in facts.baselines:
        cost = one.ms if by_ms else None if one.madds is None else one.madds / 1e6
        if cost is not None:
            name = text.name_of(one.name, 0)
            points.append(Point(name, cost, 100 * one.top1, label=text.shorten(name, 14)))
    points.sort(key=lambda point: point.cost)
    return Series("static networks to compare with", "baseline", tuple(points))


@dataclass(frozen=True)
class _Mode:
    """A row of the table."""

    name: str
    madds: float | None
    top1: float
    images: int | None
    timed: str = ""
    """Its name in `Times`."""
    told_ms: float | None = None
    """What people say of a network that is not timed here."""


def _modes(facts: Facts) -> list[_Mode]:
    """Every mode that was measured, routes first."""
    numbers = facts.numbers
    assert numbers is not None
    modes = [
        _Mode(
            text.widths_of(route.widths),
            route.madds,
            route.top1,
            numbers.images,
            route_mode(route.widths),
        )
        for route in sorted(numbers.routes, key=lambda one: one.madds)
    ]
    for gate in facts.gates:
        if gate.numbers is not None and gate.numbers.dynamic is not None:
            dynamic, images = gate.numbers.dynamic, gate.numbers.images
            timed = gate_mode(gate.timed)
            name = gate.trained.label
            modes.append(_Mode(name, dynamic.mean_madds, dynamic.top1, images, timed))
    for number, budget in enumerate(facts.budgets):
        name = _budget_name(budget)
        modes.append(_Mode(name, budget.madds, budget.top1, budget.images, budget_mode(number)))
    for one in facts.baselines:
        name = text.name_of(one.name, 0)
        modes.append(_Mode(name, one.madds, one.top1, None, told_ms=one.ms))
    return modes


def _table(facts: Facts) -> Table:
    head = ["", "MAdds", "of the widest", "top-1", "95% interval"]
    if facts.times is not None:
        head += ["ms per image", "quartiles", "speed"]
    return Table(tuple(head), tuple(_row(facts, mode) for mode in _modes(facts)))


def _row(facts: Facts, mode: _Mode) -> tuple[str, ...]:
    widest, times = facts.widest, facts.times
    share = text.NONE
    if widest is not None and mode.madds is not None:
        share = text.percent(mode.madds / widest.madds, 0)
    interval = text.NONE
    if mode.images is not None:
        low, high = accuracy_interval(mode.top1, mode.images)
        interval = f"{text.percent(low, 1)} to {text.percent(high, 1)}"
    cells = (mode.name, text.millions(mode.madds), share, text.percent(mode.top1), interval)
    if times is None:
        return cells
    ms = times.spread(mode.timed)
    speed = None if widest is None else times.ratio(route_mode(widest.widths), mode.timed)
    return (
        *cells,
        text.milliseconds(mode.told_ms if ms is None else ms["median"]),
        text.NONE if ms is None else _quartiles(ms),
        text.NONE if speed is None else text.times(speed["median"]),
    )


def _quartiles(ms: Mapping[str, float]) -> str:
    return f"{text.three_digits(ms['q1'])} to {text.three_digits(ms['q3'])}"


def _timing(facts: Facts) -> str:
    times = facts.times
    if times is None:
        return ""
    machine = times.hardware
    images = f"{times.images} images" if facts.opened is not None else f"{times.images} of noise"
    cores = f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'}"
    said = (
        f"Medians of {times.rounds} interleaved rounds of {images}, in batches of {BATCH_SIZE}, by "
        f"{times.backend} on {cores} of {machine['processor']}"
    )
    if facts.opened is None and facts.numbers is not None and facts.numbers.dynamic is not None:
        said += "; the dynamic mode was made to take the routes in the shares that were stored"
    return said + "."
