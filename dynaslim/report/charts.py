"""The charts of a report: each a picture, the keys to it, and the same numbers as a table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from markupsafe import Markup

from dynaslim.report import text
from dynaslim.report.svg import HEIGHT, SHAPES, WIDTH, Axis, Canvas, Plot

Style = Literal["uniform", "dynamic", "budget", "baseline"]
_SIGNS: Final[dict[Style, str]] = {
    "uniform": "circle",
    "dynamic": "star",
    "budget": "square",
    "baseline": "diamond",
}
RAMP: Final = 7
"""Colours from the cheapest route to the widest: CSS classes r0 to r6."""
BINS: Final = 20
_MOST_LABELS: Final = 6
_MOST_STEPS: Final = 120


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Key:
    """What a sign or a colour of a chart stands for."""

    icon: Markup
    text: str


@dataclass(frozen=True)
class Chart:
    """A picture, its keys, and a table of what it shows."""

    svg: Markup
    keys: tuple[Key, ...]
    table: Table


def ramp(number: int, routes: int) -> str:
    """The CSS class of a route's colour, of so many from the cheapest to the widest."""
    last = RAMP - 1
    return f"r{last if routes <= 1 else round(number * last / (routes - 1))}"


def swatch(style: str) -> Markup:
    """A small field of a colour."""
    icon = Canvas(14, 14, "")
    icon.add("rect", style, x=1, y=1, width=12, height=12, rx=2)
    return _icon(icon)


def _icon(icon: Canvas) -> Markup:
    """A picture that says nothing that the words beside it do not."""
    for name in ("role", "aria-label"):
        del icon.root.attrib[name]
    icon.root.attrib.update({"aria-hidden": "true", "class": "icon", "width": f"{icon.width:g}"})
    return icon.markup()


# -- accuracy against cost ------------------------------------------------------------------------


_PLACES: Final[dict[Style, tuple[tuple[float, float, str], ...]]] = {
    "uniform": ((-8, -8, "end"), (8, 16, "start"), (8, -8, "start"), (-8, 16, "end")),
    "dynamic": ((0, 23, "middle"), (0, -13, "middle"), (12, 5, "start"), (-12, 5, "end")),
    "budget": (),
    "baseline": ((0, 20, "middle"), (0, -10, "middle"), (9, 4, "start"), (-9, 4, "end")),
}
"""Where a label may stand beside its sign, the best place first."""
_LETTER: Final = 7.2
_LINE: Final = 13


@dataclass(frozen=True)
class Point:
    """A cost and an accuracy in percent."""

    name: str
    cost: float
    top1: float
    interval: tuple[float, float] | None = None
    """The ends of the accuracy's 95% interval."""
    quartiles: tuple[float, float] | None = None
    """Of the cost, where it was measured several times."""
    label: str = ""
    """Written beside it."""


@dataclass(frozen=True)
class Series:
    """Points of one kind, joined by a line or not."""

    name: str
    style: Style
    points: tuple[Point, ...] = field(default=())
    line: bool = False


def cost_chart(series: Sequence[Series], *, unit: str, label: str, digits: int) -> Chart:
    """Top-1 against cost; costs start at 0, so that lengths compare as costs do."""
    shown = [one for one in series if one.points]
    everything = [point for one in shown for point in one.points]
    ends = [end for point in everything for end in (point.top1, *(point.interval or ()))]
    costs = [cost for point in everything for cost in (point.cost, *(point.quartiles or ()))]
    plot = Plot(
        label,
        Axis.around(costs, unit, start=0.0),
        Axis.around(ends, "top-1 accuracy, %"),
    )
    for one in shown:
        if one.line:
            plot.line([plot.at(p.cost, p.top1) for p in one.points], f"line {one.style}")
    for one in shown:
        for point in one.points:
            if point.interval is not None:
                plot.bar(point.cost, *point.interval, f"bar {one.style}")
            if point.quartiles is not None:
                spread = [plot.at(cost, point.top1) for cost in point.quartiles]
                plot.line(spread, f"bar {one.style}")
    for one in shown:
        for point in one.points:
            said = f"{point.name}: {point.top1:.2f}% at {point.cost:.{digits}f}"
            plot.marker(_SIGNS[one.style], point.cost, point.top1, f"sign {one.style}", said)
    _labels(plot, shown)
    rows = tuple(
        (
            point.name,
            one.name,
            f"{point.cost:.{digits}f}",
            f"{point.top1:.2f}",
            text.NONE if point.interval is None else "{:.2f} to {:.2f}".format(*point.interval),
        )
        for one in shown
        for point in one.points
    )
    keys = tuple(Key(_sign_key(one), one.name) for one in shown)
    return Chart(plot.markup(), keys, Table(("", "kind", unit, "top-1, %", "95% interval"), rows))


def _labels(plot: Plot, series: Sequence[Series]) -> None:
    """Words beside points, each where no sign or other word is; left out if there is no place."""
    taken = [
        (x - 6, y - 6, x + 6, y + 6)
        for one in series
        for x, y in (plot.at(p.cost, p.top1) for p in one.points)
    ]
    # the few stars go first, for they matter most
    for one in sorted(series, key=lambda one: one.style != "dynamic"):
        labelled = [point for point in one.points if point.label]
        if len(labelled) > _MOST_LABELS:
            labelled = [labelled[0], labelled[-1]]
        for point in labelled:
            x, y = plot.at(point.cost, point.top1)
            for right, down, anchor in _PLACES[one.style]:
                width = _LETTER * len(point.label)
                left = x + right - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
                box = (left, y + down - _LINE + 2, left + width, y + down + 2)
                inside = plot.left - 20 <= box[0] and box[2] <= plot.width
                if inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    plot.text(x + right, y + down, point.label, f"value {one.style}", anchor=anchor)
                    break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _sign_key(one: Series) -> Markup:
    icon = Canvas(26, 14, "")
    if one.line:
        icon.line([(1, 7), (25, 7)], f"line {one.style}")
    shape = _SIGNS[one.style]
    if shape == "circle":
        icon.add("circle", f"sign {one.style}", cx=13, cy=7, r=4.5)
    else:
        scale = 0.72 if shape == "star" else 1
        corners = " ".join(
            f"{13 + scale * dx:.1f},{7 + scale * dy:.1f}" for dx, dy in SHAPES[shape]
        )
        icon.add("polygon", f"sign {one.style}", points=corners)
    return _icon(icon)


# -- shares of routes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A row of shares that add up to 1, with what is written at its end."""

    name: str
    shares: tuple[float, ...]
    end: str


_NAMES: Final = 118
_ENDS: Final = 70
_ROW: Final = 24


def share_bars(
    bars: Sequence[Bar], parts: Sequence[tuple[str, str]], *, label: str, end: str
) -> Chart:
    """Stacked bars; `parts` are (CSS class, name) of the shares, `end` heads the last column."""
    plot = Canvas(WIDTH, 26 + _ROW * len(bars), label)
    span = WIDTH - _NAMES - _ENDS
    plot.text(WIDTH - 2, 14, end, "tick", anchor="end")
    for number, bar in enumerate(bars):
        top = 24 + number * _ROW
        plot.text(_NAMES - 8, top + 14, text.shorten(bar.name, 17), "name", anchor="end")
        plot.text(WIDTH - 2, top + 14, bar.end, "value", anchor="end")
        x = float(_NAMES)
        for (style, name), share in zip(parts, bar.shares, strict=True):
            width = span * share
            if width <= 0:
                continue
            said = f"{bar.name}: {share:.1%} {name}"
            plot.add("rect", f"part {style}", x=x, y=top, width=width, height=18, title=said)
            if share >= 0.14:
                inside = f"in {style}"
                plot.text(x + width / 2, top + 13, f"{share:.0%}", inside, anchor="middle")
            x += width
    keys = tuple(Key(swatch(f"part {style}"), name) for style, name in parts)
    rows = tuple((bar.name, *(f"{share:.1%}" for share in bar.shares), bar.end) for bar in bars)
    return Chart(plot.markup(), keys, Table(("", *(name for _, name in parts), end), rows))


# -- distributions --------------------------------------------------------------------------------


def histogram(values: np.ndarray, right: np.ndarray, *, unit: str, label: str) -> Chart:
    """How many images have which value of 0..1, those with a right answer below the wrong ones."""
    edges = np.linspace(0, 1, BINS + 1)
    good = np.histogram(values[right], edges)[0]
    bad = np.histogram(values[~right], edges)[0]
    plot = Plot(
        label,
        Axis(0.0, 1.0, unit),
        Axis(0.0, 1.06 * max(1, int((good + bad).max())), "images", _short_count),
        height=HEIGHT - 40,
    )
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        stack = 0.0
        for style, name, number in (
            ("right", "right", int(good[place])),
            ("wrong", "wrong", int(bad[place])),
        ):
            if not number:
                continue
            left, top = plot.at(float(low), stack + number)
            end, bottom = plot.at(float(high), stack)
            plot.add(
                "rect",
                f"part {style}",
                x=left + 0.7,
                y=top,
                width=end - left - 1.4,
                height=max(bottom - top, 0.6),
                title=f"{low:.2f} to {high:.2f}: {number} {name}",
            )
            stack += number
    keys = (
        Key(swatch("part right"), "answer right"),
        Key(swatch("part wrong"), "answer wrong"),
    )
    rows = tuple(
        (
            f"{low:.2f} to {high:.2f}",
            text.count(int(g)),
            text.count(int(b)),
            text.percent(g / (g + b), 1) if g + b else text.NONE,
        )
        for low, high, g, b in zip(edges, edges[1:], good, bad, strict=False)
    )
    return Chart(plot.markup(), keys, Table((unit, "right", "wrong", "share right"), rows))


def _short_count(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


# -- curves of a training -------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A quantity over the steps of a training."""

    name: str
    style: str
    """CSS classes l0 to l4."""
    steps: tuple[float, ...]
    values: tuple[float, ...]


def curves_chart(lines: Sequence[Line], *, unit: str, label: str, signs: bool) -> Chart | None:
    """Lines over steps; of many steps means over neighbours. None if there is nothing to draw."""
    binned = [_binned(line) for line in lines]
    values = [value for line in binned for value in line.values]
    if not values:
        return None
    steps = [step for line in binned for step in line.steps]
    plot = Plot(
        label,
        Axis.around(steps, "step", start=0.0, form=_short_count),
        Axis.around(values, unit),
        height=HEIGHT - 30,
    )
    for line in binned:
        plot.line([plot.at(x, y) for x, y in zip(line.steps, line.values, strict=True)], line.style)
        if signs and len(line.steps) <= 40:
            for x, y in zip(line.steps, line.values, strict=True):
                place = plot.at(x, y)
                said = f"{line.name}, step {x:g}: {y:.4g}"
                plot.add("circle", f"dot {line.style}", cx=place[0], cy=place[1], r=3, title=said)
    keys = tuple(Key(_line_key(line.style), line.name) for line in binned)
    return Chart(plot.markup(), keys, _curves_table(binned))


def _binned(line: Line) -> Line:
    """At most `_MOST_STEPS` steps: means over as many as it takes, one after the other."""
    size = -(-len(line.steps) // _MOST_STEPS)
    if size <= 1:
        return line

    def means(values: Sequence[float]) -> tuple[float, ...]:
        parts = [values[at : at + size] for at in range(0, len(values), size)]
        return tuple(sum(part) / len(part) for part in parts)

    return Line(line.name, line.style, means(line.steps), means(line.values))


def _curves_table(lines: Sequence[Line], most: int = 12) -> Table:
    """A few steps of every line, the last among them."""
    steps = sorted({step for line in lines for step in line.steps})
    places = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    rows = []
    for step in (steps[place] for place in places):
        cells = []
        for line in lines:
            found = dict(zip(line.steps, line.values, strict=True)).get(step)
            cells.append(text.NONE if found is None else f"{found:.4g}")
        rows.append((f"{step:.0f}", *cells))
    return Table(("step", *(line.name for line in lines)), tuple(rows))


def _line_key(style: str) -> Markup:
    icon = Canvas(26, 14, "")
    icon.line([(1, 7), (25, 7)], style)
    return _icon(icon)
