"""A report's first lines: what the dynamic mode gives and costs, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dynaslim.evaluation import DynamicMetrics, RouteMetrics
from dynaslim.report import text
from dynaslim.report.facts import Facts, Gate
from dynaslim.report.stats import accuracy_interval, at_cost
from dynaslim.report.timing import BATCH_SIZE, CHOSEN_GATE, route_mode

_SAME_ROUTE: Final = 0.9
"""Share of the images on one route from which on a report remarks on it."""


@dataclass(frozen=True)
class Tile:
    """A number to see first."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Headline:
    """Sentences, the first of which carries the most, and numbers."""

    lead: str
    more: tuple[str, ...]
    tiles: tuple[Tile, ...]


def headline(facts: Facts) -> Headline:
    """The summary of whatever the run is."""
    numbers, widest = facts.numbers, facts.widest
    name = text.clean(facts.spec.name)
    if numbers is None or (not numbers.routes and numbers.dynamic is None):
        lead = f"{name} has not been measured yet: there are neither images nor stored accuracies."
        return Headline(lead, (), ())
    if numbers.dynamic is None or widest is None:
        return _of_routes(facts, numbers.routes, numbers.images)
    return _of_dynamic(facts, numbers.dynamic, widest, numbers.images)


def _of_dynamic(
    facts: Facts, dynamic: DynamicMetrics, widest: RouteMetrics, images: int
) -> Headline:
    share = dynamic.mean_madds / widest.madds
    lead = (
        f"With a route of its own for every image, {text.clean(facts.spec.name)} needs "
        f"{text.percent(share, 0)} of the multiply-adds of its widest route and is right on "
        f"{text.percent(dynamic.top1)} of {text.count(images)} images, "
        f"{_compared(dynamic.top1 - widest.top1)} the widest route."
    )
    more = [f"The widest route is right on {text.percent(widest.top1)}{_how_sure(facts)}."]
    more += [*_against_uniform(facts, dynamic), *_in_time(facts, widest), *_one_route(dynamic)]
    if len(facts.gates) > 1:
        more.append(
            f"The run has {len(facts.gates)} gates, for {_targets(facts.gates)} of the widest "
            f"route's cost; the details are of {_chosen(facts)}."
        )
    interval = accuracy_interval(dynamic.top1, images)
    gain = Tile(
        "Change of accuracy",
        text.points(dynamic.top1 - widest.top1),
        f"points of top-1, against the widest route's {text.percent(widest.top1)}",
    )
    tiles = [
        Tile(
            "Multiply-adds",
            text.percent(share, 0),
            f"of the widest route's: {text.millions(dynamic.mean_madds)} of "
            f"{text.millions(widest.madds)} per image",
        ),
        Tile(
            "Top-1 accuracy",
            text.percent(dynamic.top1),
            f"95% interval {text.percent(interval.low, 1)} to {text.percent(interval.high, 1)}",
        ),
        gain,
    ]
    return Headline(lead, tuple(more), (*tiles, *_time_tile(facts, widest)))


def _of_routes(facts: Facts, routes: tuple[RouteMetrics, ...], images: int) -> Headline:
    """Of a network without trained gates."""
    widest = max(routes, key=lambda route: route.madds)
    cheapest = min(routes, key=lambda route: route.madds)
    name = text.clean(facts.spec.name)
    lead = (
        f"{name} is right on {text.percent(widest.top1)} of {text.count(images)} images along its "
        f"widest route"
    )
    more = []
    if cheapest is not widest:
        lead += (
            f", and on {text.percent(cheapest.top1)} along its cheapest, for "
            f"{text.percent(cheapest.madds / widest.madds, 0)} of the multiply-adds"
        )
    if facts.spec.gates and not facts.subject.gates:
        more.append(
            "It is a supernet: one network of several widths, whose gates are not trained yet. "
            "What concerns the dynamic mode is left out of this report."
        )
    interval = accuracy_interval(widest.top1, images)
    tiles = [
        Tile(
            "Top-1, widest route",
            text.percent(widest.top1),
            f"95% interval {text.percent(interval.low, 1)} to {text.percent(interval.high, 1)}; "
            f"{text.millions(widest.madds)}",
        )
    ]
    if cheapest is not widest:
        tiles.append(
            Tile("Top-1, cheapest", text.percent(cheapest.top1), text.millions(cheapest.madds))
        )
    if facts.times is not None and (ratio := _ratio(facts, widest, route_mode(cheapest.widths))):
        tiles.append(
            Tile(
                "Speed, cheapest",
                text.times(ratio),
                f"the widest route's; {facts.times.backend}, batch {BATCH_SIZE}",
            )
        )
    return Headline(lead + ".", tuple(more), tuple(tiles))


def _how_sure(facts: Facts) -> str:
    """What chance has to say in the difference, to follow the widest route's accuracy."""
    difference = facts.against_widest
    if difference is None:
        return ""
    if difference.low == difference.high:
        return ", on just the same images"
    chance = "" if difference.is_clear else ", so chance alone could explain it"
    return (
        f"; the 95% interval of the difference is {text.points(difference.low)} to "
        f"{text.points(difference.high)} points{chance}"
    )


def _compared(difference: float) -> str:
    """A difference of accuracies as words that go before what it is against."""
    rounded = round(100 * abs(difference), 2)
    if not rounded:
        return "as many as"
    unit = "point" if rounded == 1 else "points"
    return f"{rounded:.2f} {unit} {'more' if difference > 0 else 'fewer'} than"


def _in_time(facts: Facts, widest: RouteMetrics) -> list[str]:
    """The same in milliseconds."""
    times = facts.times
    assert facts.numbers is not None
    if times is None or (ratio := _ratio(facts, widest, CHOSEN_GATE)) is None:
        return []
    speed = f"{text.times(ratio)} the widest route's speed"
    if ratio < 1:
        speed += ", which is slower: what routing costs is more than narrow routes save here"
    median = times.median(CHOSEN_GATE)
    assert median is not None
    said = (
        f"Measured here ({times.backend}, batches of {BATCH_SIZE}), an image takes "
        f"{text.milliseconds(median)} instead of "
        f"{text.milliseconds(times.median(route_mode(widest.widths)))}: {speed}."
    )
    routes = [
        (ms, route.top1)
        for route in facts.numbers.routes
        if (ms := times.median(route_mode(route.widths))) is not None
    ]
    uniform = at_cost(routes, median)
    if uniform is not None:
        said += f" In that time one route for all would be right on about {text.percent(uniform)}."
    return [said]


def _time_tile(facts: Facts, widest: RouteMetrics) -> tuple[Tile, ...]:
    times = facts.times
    if times is None or (ratio := _ratio(facts, widest, CHOSEN_GATE)) is None:
        return ()
    return (
        Tile(
            "Speed",
            text.times(ratio),
            f"the widest route's: {text.milliseconds(times.median(CHOSEN_GATE))} per image "
            f"({times.backend}, batch {BATCH_SIZE})",
        ),
    )


def _ratio(facts: Facts, widest: RouteMetrics, mode: str) -> float | None:
    """How many times as fast as the widest route a mode is."""
    if facts.times is None:
        return None
    found = facts.times.ratio(route_mode(widest.widths), mode)
    return None if found is None else found["median"]


def _against_uniform(facts: Facts, dynamic: DynamicMetrics) -> list[str]:
    """What one route for all images would give at that cost."""
    assert facts.numbers is not None
    routes = [(float(route.madds), route.top1) for route in facts.numbers.routes]
    uniform = at_cost(routes, dynamic.mean_madds)
    if uniform is None:
        return []
    return [
        f"One route for all images would be right on about {text.percent(uniform)} for as many "
        f"multiply-adds (on the line between measured routes): choosing by image is worth "
        f"{text.points(dynamic.top1 - uniform)} points."
    ]


def _one_route(dynamic: DynamicMetrics) -> list[str]:
    most = max(dynamic.route_shares, key=lambda one: one.share, default=None)
    if most is None or most.share < _SAME_ROUTE:
        return []
    return [
        f"{text.percent(most.share, 0)} of the images take the same route, "
        f"{text.widths_of(most.widths)}: the gate tells them little apart."
    ]


def _targets(gates: tuple[Gate, ...]) -> str:
    known = [f"{gate.trained.target:g}" for gate in gates if gate.trained.target is not None]
    return ", ".join(known) if known else "no target"


def _chosen(facts: Facts) -> str:
    target = facts.subject.chosen.target
    return "the one without" if target is None else f"the one for {target:g}"
