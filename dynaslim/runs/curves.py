"""Plot the curves of a training run from its metrics file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"  # distinguishable if colour-blind
_NO_LOSSES: Final = frozenset({"kind", "step", "epoch", "lr", "images_per_s", "gate", "mean_cost"})
_MAX_LOSSES: Final = 5

Line = Mapping[str, Any]
"""A line of a metrics file (`dynaslim.runs.folder.read_metrics`)."""


def read_losses(lines: Sequence[Line]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each loss, at most five; several values of a step are averaged.

    The names are those of the first line; values that are not finite numbers are left out.
    """
    train = [line for line in lines if line["kind"] == "train"]
    names = [name for name in (train[0] if train else {}) if name not in _NO_LOSSES]
    losses = {}
    for name in names[:_MAX_LOSSES]:
        pairs = [
            (line["step"], float(np.mean(line[name])))
            for line in train
            if _is_finite(line.get(name))
        ]
        if pairs:
            steps, values = map(list, zip(*pairs, strict=True))
            losses[name] = steps, values
    return losses


def read_accuracies(lines: Sequence[Line]) -> tuple[list[int], list[list[float]]]:
    """Steps of the evaluations, and top-1 in 0..1 of every route at each."""
    val = [line for line in lines if line["kind"] == "val" and isinstance(line.get("top1"), list)]
    val = [line for line in val if _is_finite(line["top1"])]
    return [line["step"] for line in val], [line["top1"] for line in val]


def _is_finite(value: Any) -> bool:
    """Whether this is a finite number, or a list of such numbers that is not empty."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(v) in (int, float) and np.isfinite(v) for v in values)


def curves_figure(lines: Sequence[Line]) -> bytes:
    """A PNG of the losses over the steps and, if there were evaluations, the route accuracies."""
    steps, top1 = read_accuracies(lines)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if steps else 1, squeeze=False)[0]
    _draw_losses(panels[0], read_losses(lines))
    if steps:
        _draw_accuracies(panels[1], steps, 100 * np.array(top1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_losses(axes: Axes, losses: Mapping[str, tuple[list[int], list[float]]]) -> None:
    colours = (_BLUE, _GREEN, _ORANGE, "0.4", "0.7")
    for (name, (steps, values)), colour in zip(losses.items(), colours, strict=False):
        # the noise of single steps stays visible behind the trend
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(np.array(values)), color=colour, label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    if losses:
        axes.legend()


def _draw_accuracies(axes: Axes, steps: Sequence[int], top1: np.ndarray) -> None:
    """`top1` is of shape (steps, routes), in percent."""
    if top1.shape[1] > 1:
        axes.fill_between(steps, top1.min(1), top1.max(1), color=_BLUE, alpha=0.15)
    marker = "o" if len(steps) < 30 else ""
    axes.plot(steps, top1[:, -1], marker=marker, color=_BLUE, label="last route (widest)")
    axes.plot(steps, top1[:, 0], marker=marker, color=_ORANGE, label="first route (cheapest)")
    axes.set_xlabel("step")
    axes.set_ylabel("held-out top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of the steps, with shorter windows at the ends."""
    window = np.ones(2 * (len(values) // 20) + 1)
    counts = np.convolve(np.ones(len(values)), window, "same")
    smooth: np.ndarray = np.convolve(values, window, "same") / counts
    return smooth
