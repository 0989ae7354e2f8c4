"""Pictures by matplotlib. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dynaslim.data.images import ImageDataset
from dynaslim.evaluation import Evaluation
from dynaslim.spec import NetSpec

BLUE: Final = "#0072B2"
ORANGE: Final = "#D55E00"
GREEN: Final = "#009E73"
_EXAMPLES = 12


def evaluation_figure(
    spec: NetSpec, result: Evaluation, images: ImageDataset, *, title: str
) -> bytes:
    """Accuracy against MAdds, and below it example images sorted by the route they took: a PNG.

    Only for networks with one gate, whose routes are its choices.
    """
    assert result.dynamic is not None
    assert len(spec.gates) == 1
    shares = result.dynamic.route_shares
    rows = len(shares)
    figure = Figure(figsize=(10, 4.4 + 1.15 * rows), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[4.4, 1.15 * rows])[:, 0]
    figure.suptitle(title, fontsize=13)
    _accuracy_axes(upper.subplots(), result)

    generator = torch.Generator().manual_seed(0)
    grid = lower.subplots(rows, 1, squeeze=False)[:, 0]
    lower.suptitle(
        "Test images by the route the gate chose, cheapest first (orange frame: wrong answer)",
        fontsize=11,
    )
    cost = {route.widths: route.madds for route in result.routes}
    for axes, share, index in zip(grid, shares, spec.gates[0].choices, strict=True):
        taken = torch.nonzero(result.choices[:, 0] == index).flatten()
        order = torch.randperm(len(taken), generator=generator)[:_EXAMPLES]
        _strip(axes, images, result, taken[order])
        axes.set_ylabel(
            f"{cost[share.widths] / 1e6:.2f} M\n{share.share:.0%} of images",
            rotation=0,
            ha="right",
            va="center",
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _accuracy_axes(axes: Axes, result: Evaluation) -> None:
    assert result.dynamic is not None
    x = [route.madds / 1e6 for route in result.routes]
    y = [route.top1 * 100 for route in result.routes]
    axes.plot(x, y, "o-", color=BLUE, label="one route for all images")
    for a, b in zip(x, y, strict=True):
        axes.annotate(f"{b:.1f}", (a, b), (0, 8), textcoords="offset points", ha="center")
    point = (result.dynamic.mean_madds / 1e6, result.dynamic.top1 * 100)
    axes.plot(*point, "*", color=ORANGE, markersize=16, label="dynamic: the gate chooses")
    # below, where the curve's own numbers are not
    axes.annotate(
        f"{point[1]:.1f}", point, (0, -11), textcoords="offset points", ha="center", va="top"
    )
    axes.set_xlabel("million multiply-adds per image (mean)")
    axes.set_ylabel("top-1 accuracy, %")
    axes.margins(y=0.18)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _strip(axes: Axes, images: ImageDataset, result: Evaluation, rows: torch.Tensor) -> None:
    """One row of pictures with the names of their classes."""
    size = images.images_NCSS.shape[-1]
    gap = max(2, size // 5)
    step = size + gap
    canvas = np.full((size + 4, step * _EXAMPLES, 3), 255, dtype=np.uint8)
    for column, row in enumerate(rows.tolist()):
        pixels = images.images_NCSS[row].permute(1, 2, 0).numpy()
        left = column * step + gap // 2
        canvas[2 : 2 + size, left : left + size] = pixels  # one channel spreads over three
        right = bool(result.predictions[row] == images.labels_N[row])
        name = images.class_names[int(images.labels_N[row])]
        colour = "0.35" if right else ORANGE
        axes.add_patch(_frame(left, 2, size, colour))
        axes.text(left + size / 2, size + 6, name, ha="center", va="top", fontsize=7, color=colour)
    if not len(rows):
        axes.text(step * _EXAMPLES / 2, size / 2, "no image took this route", ha="center")
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frame(left: float, top: float, size: int, colour: str) -> Rectangle:
    return Rectangle((left - 0.5, top - 0.5), size, size, fill=False, ec=colour, lw=1.5)
