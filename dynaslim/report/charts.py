"""Charts drawn by matplotlib: SVG for a report's page, PNG for the demo.

In the page's SVG, colours are CSS variables and text is not converted to paths, so that the style
sheet sets fonts and the colours of light and dark mode. An artist's gid of the form "class|title"
becomes the class of its SVG element and a `<title>`, which browsers show as a tooltip. The colours
are those of Okabe and Ito, which colour-blind people can distinguish.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from xml.etree import ElementTree as ET

import matplotlib.style
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dynaslim.data.images import ImageDataset
from dynaslim.evaluation import Evaluation
from dynaslim.report import text
from dynaslim.report.data import Mode
from dynaslim.runs.curves import read_accuracies, read_losses
from dynaslim.runtime.calibrate_budget import Outcome
from dynaslim.spec import NetSpec

COLOURS: Final = {
    "page": "#ffffff",
    "ink": "#1a2027",
    "quiet": "#57616b",
    "rule": "#d9dee3",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "orange-ink": "#b04d00",
    "green": "#009e73",
    "grey": "#6a737c",
    "violet": "#8e4a8a",
    "other": "#b9c0c7",
    "r0": "#d3e6f3",
    "r1": "#b0d2ea",
    "r2": "#86bade",
    "r3": "#579fcf",
    "r4": "#2277ab",
    "r5": "#0d659c",
    "r6": "#08476f",
}
"""CSS variables with their colours in light mode; r0 to r6 are for routes by rising cost."""
RAMP: Final = 7
_PALE: Final = 4
"""Number of light colours at the start of the ramp, on which text is dark."""
_WIDTH, _HEIGHT = 460, 310
"""Size in SVG units; a unit is about one pixel on a desktop and 0.75 pixels on a phone."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 46
_STYLE: Final = {
    "figure.dpi": 72,  # one point is one SVG unit
    "font.family": "DejaVu Sans",  # only to measure text; the style sheet sets the font
    "font.size": 12.5,
    "text.parse_math": False,  # names are not formulas
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["quiet"],
    "axes.edgecolor": COLOURS["quiet"],
    "axes.labelpad": 7,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["rule"],
    "xtick.color": COLOURS["quiet"],
    "ytick.color": COLOURS["quiet"],
    "ytick.major.size": 0,
    "ytick.major.pad": 7,
    "hatch.linewidth": 1.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "dynaslim",
}
_in_style = matplotlib.style.context(_STYLE, after_reset=True)
"""Decorator for drawing functions; the user's matplotlib settings have no effect in them."""
_BINS: Final = 20
_EXAMPLES: Final = 12
_MAX_STEPS: Final = 120


class Key(NamedTuple):
    """A legend entry: the CSS class of its symbol, and its text."""

    style: str
    name: str


@dataclass(frozen=True)
class Chart:
    """A chart for the page, with its legend and a table of the values shown."""

    view_box: str
    content: Markup
    """The elements inside `<svg>`."""
    keys: tuple[Key, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _axes(height: float, unit: str, label: str) -> tuple[Figure, Axes]:
    width = _WIDTH - _LEFT - _RIGHT
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    place = (_LEFT / _WIDTH, _BOTTOM / height, width / _WIDTH, 1 - (_TOP + _BOTTOM) / height)
    axes = figure.add_axes(place)
    axes.set(xlabel=unit, ylabel=label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_label_coords(-44 / width, 0.5)
    return figure, axes


def _short(value: float) -> str:
    value = round(value, 9) + 0.0
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with some margin around it."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _chart(
    figure: Figure, keys: Sequence[Key], head: Sequence[str], rows: Sequence[Sequence[str]]
) -> Chart:
    """Convert a figure to a chart whose SVG ids are unique on the page."""
    raw = io.BytesIO()
    with warnings.catch_warnings():
        # names may have characters that only the reader's fonts have
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(raw.getvalue())
    used = set(re.findall(r"(?:url\(|:href=.)#(\w+)", raw.getvalue().decode()))
    prefix = f"c{zlib.crc32(raw.getvalue()):08x}"
    variables = {colour[1:]: f"var(--{name})" for name, colour in COLOURS.items()}

    def replaced(match: re.Match[str]) -> str:
        word = match[1]
        return variables.get(word) or (f"#{prefix}{word}" if word in used else match[0])

    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # styles apply page-wide
                parent.remove(child)
    for element in root.iter():
        attributes = dict(element.attrib)
        element.tag = element.tag.rpartition("}")[2]
        element.attrib.clear()
        for key, value in attributes.items():
            if key != "id":
                name = key.rpartition("}")[2]
                element.set(name, re.sub(r"#(\w+)", replaced, value))
            elif value in used:
                element.set("id", prefix + value)
            elif "|" in value:
                style, _, title = value.partition("|")
                element.set("class", style)
                if title:
                    element.insert(0, ET.Element("title"))
                    element[0].text = title
    content = "".join(ET.tostring(child, encoding="unicode") for child in root)
    return Chart(
        root.attrib["viewBox"], Markup(content), tuple(keys), tuple(head), tuple(map(tuple, rows))
    )


# -- accuracy against cost ------------------------------------------------------------------------


class _Series(NamedTuple):
    colour: str
    marker: str
    size: float
    line: str
    name: str


_SERIES: Final = {
    "uniform": _Series("blue", "o", 9, "-", "one route for all images"),
    "budget": _Series("green", "s", 8, "--", "budgets of the gate"),
    "baseline": _Series("grey", "D", 8, "", "static networks to compare with"),
    "dynamic": _Series("orange", "*", 19, "", "dynamic: the gate chooses for every image"),
}
_PLACES: Final = {
    "dynamic": ((0, -23, "center"), (0, 13, "center"), (12, -5, "left"), (-12, -5, "right")),
    "uniform": ((-8, 8, "right"), (8, -16, "left"), (8, 8, "left"), (-8, -16, "right")),
    "baseline": ((0, -20, "center"), (0, 10, "center"), (9, -4, "left"), (-9, -4, "right")),
}
"""Offsets and alignments of a label relative to its point, the preferred one first."""
_LETTER: Final = 7.2
_MAX_LABELS: Final = 6


class _Point(NamedTuple):
    mode: Mode
    cost: float
    top1: float
    """Top-1 in percent, like all accuracies in a chart."""
    interval: tuple[float, float] | None = None
    quartiles: tuple[float, float] | None = None


def _points(modes: Sequence[Mode], *, by_ms: bool) -> dict[str, list[_Point]]:
    """The modes with a known cost, by kind; kinds drawn without a line are sorted by cost."""
    found: dict[str, list[_Point]] = {kind: [] for kind in _SERIES}
    for mode in modes:
        cost = mode.ms if by_ms else mode.madds
        if cost is not None:
            # the intervals of many budgets would hide the others
            ends = None if mode.kind == "budget" else mode.interval
            interval = ends and (100 * ends[0], 100 * ends[1])
            quartiles = mode.quartiles if by_ms else None
            scale = 1 if by_ms else 1e6
            point = _Point(mode, cost / scale, 100 * mode.top1, interval, quartiles)
            found[mode.kind].append(point)
    for kind, points in found.items():
        if not _SERIES[kind].line:
            points.sort(key=lambda point: point.cost)
    return {kind: points for kind, points in found.items() if points}


@_in_style
def cost_chart(modes: Sequence[Mode], suffixes: Mapping[str, str], *, by_ms: bool) -> Chart | None:
    """Top-1 against MAdds or milliseconds per image; None if no cost is known.

    The cost axis starts at 0, so that distances from the origin are proportional to costs.
    `suffixes` are appended to the names of the kinds of modes.
    """
    unit, digits = "million multiply-adds per image (mean)", 2
    if by_ms:
        unit, digits = "milliseconds per image (median)", 4
    series = _points(modes, by_ms=by_ms)
    if not series:
        return None
    figure, axes = _axes(_HEIGHT, unit, "top-1 accuracy, %")
    _draw_points(axes, series, digits)
    _draw_labels(axes, series)
    names = {kind: _SERIES[kind].name + suffixes.get(kind, "") for kind in series}
    rows = [
        (
            point.mode.name,
            names[kind],
            f"{point.cost:.{digits}f}",
            f"{point.top1:.2f}",
            text.NONE if point.interval is None else "{:.2f} to {:.2f}".format(*point.interval),
        )
        for kind, points in series.items()
        for point in points
    ]
    keys = [Key(f"sign {kind}", name) for kind, name in names.items()]
    return _chart(figure, keys, ("", "kind", unit, "top-1, %", "95% interval"), rows)


def _draw_points(axes: Axes, series: Mapping[str, Sequence[_Point]], digits: int) -> None:
    every = [point for points in series.values() for point in points]
    costs = [cost for point in every for cost in (point.cost, *(point.quartiles or ()))]
    ends = [end for point in every for end in (point.top1, *(point.interval or ()))]
    axes.set_xlim(0, _limits(costs)[1])
    axes.set_ylim(*_limits(ends))
    for kind, points in series.items():
        look = _SERIES[kind]
        colour = COLOURS[look.colour]
        if look.line:
            x, y = [point.cost for point in points], [point.top1 for point in points]
            axes.plot(x, y, look.line, color=colour, lw=2)
        for point in points:
            bars: Any = {"color": colour, "alpha": 0.55, "lw": 1.3, "zorder": 3}
            if point.interval is not None:
                axes.plot([point.cost] * 2, point.interval, marker="_", ms=8, **bars)
            if point.quartiles is not None:
                axes.plot(point.quartiles, [point.top1] * 2, **bars)
            axes.plot(
                point.cost,
                point.top1,
                look.marker,
                color=colour,
                ms=look.size,
                mec=COLOURS["page"],
                mew=1.2,
                zorder=4,
                clip_on=False,
                gid=f"|{point.mode.name}: {point.top1:.2f}% at {point.cost:.{digits}f}",
            )


def _draw_labels(axes: Axes, series: Mapping[str, Sequence[_Point]]) -> None:
    """Place labels so that they overlap no point and no other label; omit those without room."""
    at = axes.transData.transform
    centres = [at((point.cost, point.top1)) for points in series.values() for point in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    first, last = axes.get_window_extent().intervalx
    for kind in ("dynamic", "uniform", "baseline"):  # the most important first
        labelled = [point for point in series.get(kind, ()) if point.mode.label]
        if len(labelled) > _MAX_LABELS:
            labelled = [labelled[0], labelled[-1]]
        for point in labelled:
            x, y = at((point.cost, point.top1))
            width = _LETTER * len(point.mode.label)
            for right, up, side in _PLACES[kind]:
                left = x + right - {"left": 0.0, "center": width / 2, "right": width}[side]
                box = (left, y + up - 2, left + width, y + up + 11)
                inside = first - 20 <= box[0] and box[2] <= last + _RIGHT
                if inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    axes.annotate(
                        point.mode.label,
                        (point.cost, point.top1),
                        (right, up),
                        textcoords="offset points",
                        ha=side,
                        weight="normal" if kind == "baseline" else "bold",
                        color=COLOURS[
                            {"uniform": "blue", "dynamic": "orange-ink"}.get(kind, "quiet")
                        ],
                        zorder=5,
                        gid="value|",
                    )
                    break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# -- shares of routes -----------------------------------------------------------------------------


class Bar(NamedTuple):
    """A stacked bar: its name, shares with the sum 1, and the text at its end."""

    name: str
    shares: tuple[float, ...]
    end: str


def ramp(number: int, routes: int) -> str:
    """The colour of route `number` out of `routes`, which are sorted by rising cost."""
    last = RAMP - 1
    return f"r{last if routes <= 1 else round(number * last / (routes - 1))}"


@_in_style
def share_chart(bars: Sequence[Bar], parts: Sequence[tuple[str, str]], *, end: str) -> Chart:
    """Stacked bars; `parts` are (colour, name) of the shares, `end` is the heading of end texts."""
    top, names, ends = 22, 118, 70
    height = top + 24 * len(bars)
    width = (_WIDTH - names - ends) / _WIDTH
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    axes = figure.add_axes((names / _WIDTH, 0, width, 1 - top / height))
    axes.set(xlim=(0, 1), ylim=(len(bars) - 0.5, -0.5), xticks=[])
    axes.spines.bottom.set_visible(False)
    axes.grid(visible=False)
    axes.set_yticks(range(len(bars)), [text.shorten(bar.name, 17) for bar in bars])
    axes.tick_params(labelcolor=COLOURS["ink"], pad=8)
    right = (_WIDTH - names - 2) / (_WIDTH - names - ends)
    axes.text(right, -0.75, end, ha="right", color=COLOURS["quiet"])
    for row, bar in enumerate(bars):
        axes.text(right, row, bar.end, ha="right", va="center_baseline", weight="bold")
        left = 0.0
        for (colour, name), share in zip(parts, bar.shares, strict=True):
            if share <= 0:
                continue
            is_other = colour == "other"
            axes.barh(
                row,
                share,
                height=0.75,
                left=left,
                fc="none" if is_other else COLOURS[colour],
                ec=COLOURS["other" if is_other else "page"],
                hatch="\\\\\\" if is_other else None,
                lw=0.6,
                gid=f"part {colour}|{bar.name}: {share:.1%} {name}",
            )
            if share >= 0.14:
                pale = is_other or int(colour[1:]) < _PALE
                axes.text(
                    left + share / 2,
                    row,
                    f"{share:.0%}",
                    ha="center",
                    va="center_baseline",
                    size=11.5,
                    weight="bold" if is_other else "normal",
                    color=COLOURS["ink" if pale else "page"],
                    gid=f"in {colour}|",
                )
            left += share
    rows = [(bar.name, *(f"{share:.1%}" for share in bar.shares), bar.end) for bar in bars]
    keys = [Key(f"part {colour}", name) for colour, name in parts]
    return _chart(figure, keys, ("", *(name for _, name in parts), end), rows)


# -- distributions --------------------------------------------------------------------------------


@_in_style
def histogram(value_N: np.ndarray, right_N: np.ndarray, *, unit: str) -> Chart:
    """Histogram of images by a value in 0..1, with wrong answers stacked on right ones."""
    edges = np.linspace(0, 1, _BINS + 1)
    right = np.histogram(value_N[right_N], edges)[0]
    wrong = np.histogram(value_N[~right_N], edges)[0]
    figure, axes = _axes(_HEIGHT - 40, unit, "images")
    axes.set(xlim=(0, 1), ylim=(0, 1.06 * max(1, int((right + wrong).max()))))
    rows = []
    for (low, high), good, bad in zip(itertools.pairwise(edges), right, wrong, strict=True):
        span = f"{low:.2f} to {high:.2f}"
        looks: Any = (
            (good, 0, "right", {"fc": COLOURS["blue"], "ec": COLOURS["blue"]}),
            (bad, good, "wrong", {"fc": "none", "ec": COLOURS["orange"], "hatch": "////"}),
        )
        for number, base, name, look in looks:
            if number:
                corner, width = (low + 0.05 * (high - low), base), 0.9 * (high - low)
                gid = f"part {name}|{span}: {number} {name}"
                axes.add_patch(Rectangle(corner, width, number, lw=0.8, gid=gid, **look))
        share = text.percent(good / (good + bad), 1) if good + bad else text.NONE
        rows.append((span, text.count(good), text.count(bad), share))
    keys = (Key("part right", "answer right"), Key("part wrong", "answer wrong"))
    return _chart(figure, keys, (unit, "right", "wrong", "share right"), rows)


# -- curves of a training -------------------------------------------------------------------------

_LINES: Final = (
    ("blue", "-"),
    ("green", (0, (2, 2))),
    ("orange", (0, (4, 2))),
    ("violet", (0, (1, 2))),
    ("grey", "-"),
)
"""Colours and dashes of the curves; the index of a style gives its CSS class, l0 to l4."""


class Curve(NamedTuple):
    """Values of a quantity over training steps."""

    name: str
    style: int
    steps: Sequence[float]
    values: Sequence[float]


def loss_chart(lines: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The losses in a metrics file; None if there are none."""
    curves = []
    for style, (name, (steps, values)) in enumerate(read_losses(lines).items()):
        shown = text.shorten(text.clean(name.replace("_", " ")), 40)
        curves.append(Curve(shown, style, steps, values))
    return _curves_chart(curves, "training loss")


def accuracy_chart(lines: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Top-1 of the last and the first route at each evaluation of a metrics file, or None."""
    steps, top1 = read_accuracies(lines)
    if not steps:
        return None
    curves = (
        Curve("last route (widest)", 0, steps, [100 * row[-1] for row in top1]),
        Curve("first route (cheapest)", 2, steps, [100 * row[0] for row in top1]),
    )
    return _curves_chart(curves, "held-out top-1, %", points=True)


@_in_style
def _curves_chart(curves: Sequence[Curve], unit: str, *, points: bool = False) -> Chart | None:
    """A chart of curves over steps; with `points`, values are marked if they are few."""
    curves = [_averaged(curve) for curve in curves]
    if not curves:
        return None
    figure, axes = _axes(_HEIGHT - 30, "step", unit)
    axes.set_xlim(0, _limits([step for curve in curves for step in curve.steps])[1])
    axes.set_ylim(*_limits([value for curve in curves for value in curve.values]))
    for name, style, steps, values in curves:
        colour, dashes = _LINES[style]
        axes.plot(steps, values, linestyle=dashes, color=COLOURS[colour], lw=2)
        for step, value in zip(steps, values, strict=True) if points and len(steps) <= 40 else ():
            gid = f"|{name}, step {step:g}: {value:.4g}"
            axes.plot(step, value, "o", ms=6, mew=0, color=COLOURS[colour], gid=gid)
    keys = [Key(f"line l{curve.style}", curve.name) for curve in curves]
    head = ("step", *(curve.name for curve in curves))
    return _chart(figure, keys, head, _curves_table(curves))


def _averaged(curve: Curve) -> Curve:
    """Reduce a curve to at most `_MAX_STEPS` steps by averaging neighbouring values."""
    size = -(-len(curve.steps) // _MAX_STEPS)

    def means(values: Sequence[float]) -> list[float]:
        parts = [values[at : at + size] for at in range(0, len(values), size)]
        return [sum(part) / len(part) for part in parts]

    return curve._replace(steps=means(curve.steps), values=means(curve.values))


def _curves_table(curves: Sequence[Curve], most: int = 12) -> list[tuple[str, ...]]:
    """The values at a few evenly spaced steps, including the last."""
    steps = sorted({step for curve in curves for step in curve.steps})
    places = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    found = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    return [
        (f"{step:.0f}", *(f"{one[step]:.4g}" if step in one else text.NONE for one in found))
        for step in (steps[place] for place in places)
    ]


# -- the picture of the demo ----------------------------------------------------------------------


@_in_style
def evaluation_figure(
    spec: NetSpec,
    result: Evaluation,
    budgets: Sequence[Outcome],
    images: ImageDataset,
    *,
    title: str,
) -> bytes:
    """A PNG with accuracy against MAdds, and below it example images by the route they took.

    `budgets` are those of a curve, on the same images. Works only for networks with a single gate,
    whose choices are the routes.
    """
    assert result.dynamic is not None
    assert len(spec.gates) == 1
    shares = result.dynamic.route_shares
    rows = len(shares)
    figure = Figure(figsize=(10, 4.4 + 1.15 * rows), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[4.4, 1.15 * rows])[:, 0]
    figure.suptitle(title, fontsize=15)
    generator = torch.Generator().manual_seed(0)
    grid = lower.subplots(rows, 1, squeeze=False)[:, 0]
    lower.suptitle(
        "Test images by the route the gate chose, cheapest first (orange frame: wrong answer)"
    )
    cost = {route.widths: route.madds for route in result.routes}
    for axes, share, index in zip(grid, shares, spec.gates[0].choices, strict=True):
        taken = torch.nonzero(result.choices[:, 0] == index).flatten()
        order = torch.randperm(len(taken), generator=generator)[:_EXAMPLES]
        _draw_strip(axes, images, result, taken[order])
        label = f"{text.millions(cost[share.widths])}\n{share.share:.0%} of images"
        axes.set_ylabel(label, rotation=0, ha="right", va="center", color=COLOURS["ink"])
    dynamic = result.dynamic
    modes = [
        Mode("uniform", "", r.top1, r.madds, None, f"{100 * r.top1:.1f}") for r in result.routes
    ]
    label = f"{100 * dynamic.top1:.1f}"
    modes += [Mode("budget", "", each.top1, each.madds, None, "") for each in budgets]
    modes.append(Mode("dynamic", "", dynamic.top1, dynamic.mean_madds, None, label))
    axes = upper.subplots()
    axes.set(xlabel="million multiply-adds per image (mean)", ylabel="top-1 accuracy, %")
    series = _points(modes, by_ms=False)
    _draw_points(axes, series, 2)
    drawn = [len(points) + bool(_SERIES[kind].line) for kind, points in series.items()]
    first = [0, *itertools.accumulate(drawn[:-1])]
    names = [_SERIES[kind].name for kind in series]
    axes.legend([axes.lines[n] for n in first], names, loc="lower right")
    figure.draw_without_rendering()  # to place the axes
    _draw_labels(axes, series)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_strip(axes: Axes, images: ImageDataset, result: Evaluation, rows: torch.Tensor) -> None:
    """Draw one row of images with the names of their classes."""
    size = images.images_NCSS.shape[-1]
    gap = max(2, size // 5)
    step = size + gap
    canvas = np.full((size + 4, step * _EXAMPLES, 3), 255, dtype=np.uint8)
    for column, row in enumerate(rows.tolist()):
        pixels = images.images_NCSS[row].permute(1, 2, 0).numpy()
        left = column * step + gap // 2
        canvas[2 : 2 + size, left : left + size] = pixels  # a single channel is broadcast to three
        is_right = bool(result.predictions[row] == images.labels_N[row])
        name = images.class_names[int(images.labels_N[row])]
        colour = COLOURS["quiet" if is_right else "orange"]
        frame = Rectangle((left - 0.5, 1.5), size, size, fill=False, ec=colour, lw=1.5)
        axes.add_patch(frame)
        axes.text(left + size / 2, size + 6, name, ha="center", va="top", size=9, color=colour)
    if not len(rows):
        axes.text(step * _EXAMPLES / 2, size / 2, "no image took this route", ha="center")
    axes.imshow(canvas, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
