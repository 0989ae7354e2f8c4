"""Charts as SVG that a page can restyle: elements have classes, not colours.

Elements are built as a tree, so that whatever text they are given is escaped. Lengths are in units
of the view box, about a pixel on a desktop and three quarters of one on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from dynaslim.report.text import clean

WIDTH: Final = 460
HEIGHT: Final = 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 46


class Canvas:
    """An SVG picture with a text that stands for it."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height = width, height
        self.root = ET.Element(
            "svg",
            {
                "viewBox": f"0 0 {_n(width)} {_n(height)}",
                "role": "img",
                "aria-label": clean(label),
            },
        )

    def add(
        self,
        tag: str,
        style: str,
        *,
        text: str | None = None,
        title: str | None = None,
        **attributes: float | str,
    ) -> ET.Element:
        """An element of a CSS class; `title` is what a pointer over it shows."""
        element = ET.SubElement(self.root, tag, {"class": style})
        for name, value in attributes.items():
            shown = clean(value) if isinstance(value, str) else _n(value)
            element.set(name.replace("_", "-"), shown)
        if text is not None:
            element.text = clean(text)
        if title is not None:
            ET.SubElement(element, "title").text = clean(title)
        return element

    def text(self, x: float, y: float, text: str, style: str = "", *, anchor: str = "") -> None:
        """A line of text; its base line starts at (x, y) unless `anchor` says otherwise."""
        more = {"text-anchor": anchor} if anchor else {}
        element = self.add("text", style, text=text, x=x, y=y)
        element.attrib.update(more)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A line through points."""
        if len(points) > 1:
            self.add("polyline", style, points=" ".join(f"{_n(x)},{_n(y)}" for x, y in points))

    def markup(self) -> Markup:
        """The picture, to be put in a page as it is."""
        return Markup(ET.tostring(self.root, encoding="unicode"))


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` with round ticks, and what it counts."""

    low: float
    high: float
    label: str
    form: Callable[[float], str] = "{:g}".format

    @property
    def ticks(self) -> list[float]:
        """About five round values within the scale."""
        found = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        return [float(t) for t in found if self.low - slack <= t <= self.high + slack]

    @classmethod
    def around(
        cls,
        values: Sequence[float],
        label: str,
        *,
        start: float | None = None,
        form: Callable[[float], str] = "{:g}".format,
    ) -> Axis:
        """A scale with some room around values; from `start` where it is given."""
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room if start is None else start, high + room, label, form)


class Plot(Canvas):
    """A chart with two axes and a grid; `at` takes values to places."""

    def __init__(self, label: str, x: Axis, y: Axis, height: float = HEIGHT) -> None:
        super().__init__(WIDTH, height, label)
        self.x, self.y = x, y
        self.left, self.right = _LEFT, WIDTH - _RIGHT
        self.top, self.bottom = _TOP, height - _BOTTOM
        for tick in y.ticks:
            place = self.at(x.low, tick)[1]
            self.add("line", "grid", x1=self.left, x2=self.right, y1=place, y2=place)
            self.text(self.left - 7, place + 4.5, y.form(tick), "tick", anchor="end")
        for tick in x.ticks:
            place = self.at(tick, y.low)[0]
            self.add("line", "axis", x1=place, x2=place, y1=self.bottom, y2=self.bottom + 4)
            self.text(place, self.bottom + 18, x.form(tick), "tick", anchor="middle")
        self.add("line", "axis", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom)
        middle = (self.left + self.right) / 2
        self.text(middle, height - 8, x.label, "label", anchor="middle")
        upright = (self.top + self.bottom) / 2
        label_y = self.add("text", "label", text=y.label, transform=f"rotate(-90 13 {_n(upright)})")
        label_y.attrib.update({"x": "13", "y": _n(upright + 4), "text-anchor": "middle"})

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a value."""
        across = (x - self.x.low) / (self.x.high - self.x.low)
        up = (y - self.y.low) / (self.y.high - self.y.low)
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )

    def marker(self, shape: str, x: float, y: float, style: str, title: str) -> None:
        """A sign at a value: circle, square, diamond or star."""
        place = self.at(x, y)
        if shape == "circle":
            self.add("circle", style, cx=place[0], cy=place[1], r=4.5, title=title)
            return
        corners = " ".join(f"{_n(place[0] + dx)},{_n(place[1] + dy)}" for dx, dy in SHAPES[shape])
        self.add("polygon", style, points=corners, title=title)

    def bar(self, x: float, low: float, high: float, style: str) -> None:
        """An upright error bar from `low` to `high` with caps."""
        (place, bottom), (_, top) = self.at(x, low), self.at(x, high)
        path = (
            f"M{_n(place)} {_n(bottom)}V{_n(top)}M{_n(place - 4)} {_n(bottom)}h8"
            f"M{_n(place - 4)} {_n(top)}h8"
        )
        self.add("path", style, d=path)


def _star(outer: float, inner: float) -> tuple[tuple[float, float], ...]:
    """The corners of a star of five points."""
    angles = [(math.pi / 5 * k, outer if k % 2 == 0 else inner) for k in range(10)]
    return tuple((r * math.sin(a), -r * math.cos(a)) for a, r in angles)


SHAPES: Final = {
    "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    "star": _star(9.5, 4),
}


def _n(value: float) -> str:
    """A number with one digit behind the point, as a picture needs no more."""
    return f"{value:.1f}".removesuffix(".0")
