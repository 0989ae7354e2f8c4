"""Draw docs/img/concepts.svg: how a layer is sliced, and how a batch is routed.

    python scripts/draw_concepts.py

One file for light and dark: colours are classes, and a style sheet in the picture has both sets. It
brings its own background, so that its words are legible wherever it stands.
"""

from __future__ import annotations

from pathlib import Path

OUT = Path(__file__).parents[1] / "docs" / "img" / "concepts.svg"
WIDTH, HEIGHT = 520, 600

STYLE = """
  text { font-family: system-ui, sans-serif; font-size: 14px; fill: #263238; }
  .title { font-size: 17px; font-weight: 600; }
  .on { fill: #fff; font-size: 13px; }
  .panel { fill: #f5f8f8; }
  .plain { fill: #cfd8dc; }
  .line { stroke: #78909c; stroke-width: 1.5; fill: none; }
  .tip { fill: #78909c; }
  .r0 { fill: #2a9d8f; } .r1 { fill: #3b6fb6; } .r2 { fill: #a8507c; }
  @media (prefers-color-scheme: dark) {
    text { fill: #dfe6e9; }
    .on { fill: #fff; }
    .panel { fill: #24292f; }
    .plain { fill: #4a545c; }
    .line { stroke: #90a4ae; } .tip { fill: #90a4ae; }
    .r0 { fill: #23877b; } .r1 { fill: #4478c0; } .r2 { fill: #a9527e; }
  }
"""

NAMES = ("narrow", "medium", "wide")
CHANNELS = (3, 5, 8)
ROUTE_OF_IMAGE = (0, 1, 0, 0, 2, 1, 0, 1)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words with their baseline at (x, y)."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{style}>{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, radius: float = 3) -> str:
    """A filled rectangle."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{kind}"/>'


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """A line that leaves and arrives level, with a tip."""
    bend = (x0 + x1) / 2
    return (
        f'<path d="M{x0} {y0} C{bend} {y0} {bend} {y1} {x1 - 6} {y1}" class="line"/>'
        f'<path d="M{x1} {y1} l-8 -4 v8 z" class="tip"/>'
    )


def slices() -> list[str]:
    """A layer's weights as a grid, and the dense layer that each width is."""
    left, top, cell = 44, 78, 22
    parts = [
        text(24, 36, "One set of weights; a width is the first so many", "title"),
        text(left, top - 10, "input channels"),
        f'<text transform="translate({left - 10} {top + 8 * cell}) rotate(-90)">'
        f"output channels</text>",
    ]
    for row in range(8):
        for column in range(8):
            route = next(n for n, c in enumerate(CHANNELS) if max(row, column) < c)
            parts.append(
                box(left + column * cell, top + row * cell, cell - 2, cell - 2, f"r{route}")
            )
    x, base = 262, top + 8 * cell
    for route, channels in enumerate(CHANNELS):
        side = channels * 11
        parts += [
            box(x, base - side - 42, side, side, f"r{route}"),
            text(x, base - 22, NAMES[route]),
            text(x, base - 4, f"{channels * channels} of 64"),
        ]
        x += max(side, 64) + 14
    parts.append(text(262, 86, "each a dense layer of its own"))
    return parts


def routing() -> list[str]:
    """A batch on its way: trunk, gate, buckets, answers in the order of the images."""
    top, step, high = 352, 26, 22
    parts = [text(24, 308, "A batch, sorted at the gate", "title")]
    end = top + 8 * step - 4
    middle = (top + end) / 2
    parts += [text(24, 340, "images"), text(92, 340, "trunk")]
    parts += [text(274, 340, "buckets"), text(471, 340, "answers", anchor="middle")]
    for n in range(8):
        parts += [
            box(24, top + n * step, high, high, "plain"),
            text(35, top + n * step + 16, str(n + 1), anchor="middle"),
        ]
    parts += [
        arrow(50, middle, 88, middle),
        box(92, top, 44, end - top, "plain"),
        arrow(140, middle, 172, middle),
        f'<path d="M{196} {middle - 24} l24 24 l-24 24 l-24 -24 z" class="plain"/>',
        text(196, middle + 5, "gate", anchor="middle"),
    ]
    y = top
    for route, channels in enumerate(CHANNELS):
        members = [n for n, taken in enumerate(ROUTE_OF_IMAGE) if taken == route]
        height = len(members) * step
        parts.append(arrow(224, middle, 270, y + height / 2 - 2))
        for place, n in enumerate(members):
            row = y + place * step
            parts += [
                box(274, row, channels * 15, high, f"r{route}"),
                text(284, row + 16, str(n + 1), "on", anchor="middle"),
            ]
        parts.append(arrow(278 + channels * 15, y + height / 2 - 2, 454, middle))
        y += height + 10
    for n, route in enumerate(ROUTE_OF_IMAGE):
        parts += [
            box(460, top + n * step, high, high, f"r{route}"),
            text(471, top + n * step + 16, str(n + 1), "on", anchor="middle"),
        ]
    return parts


def picture() -> str:
    """The whole file."""
    body = "\n".join([box(0, 0, WIDTH, HEIGHT, "panel", 12), *slices(), *routing()])
    label = (
        "Above: a grid of weights; its first 3, 5 or 8 rows and columns are dense layers of three "
        "widths. Below: eight images pass the trunk together, a gate sorts them into three "
        "buckets, each bucket runs at its width, and answers come back in order."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{label}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(picture())
