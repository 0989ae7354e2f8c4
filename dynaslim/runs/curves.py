"""The curves of a training run, from its metrics file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"  # told apart by the colour-blind too
_SKIPPED = {"kind", "step", "epoch", "lr", "images_per_s"}


def curves_figure(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Losses over the steps and, where there were evaluations, accuracy of the routes: a PNG.

    `lines` are those of a run's metrics file (`dynaslim.runs.folder.read_metrics`).
    """
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if val else 1, squeeze=False)[0]
    _losses(panels[0], train)
    if val:
        _accuracy(panels[1], val)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _losses(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    names = [n for n in (train[0] if train else {}) if n not in _SKIPPED]
    steps = [line["step"] for line in train]
    for name, colour in zip(names, (_BLUE, _GREEN, _ORANGE, "0.4", "0.7"), strict=False):
        values = np.array([np.mean(line[name]) for line in train])
        # the noise of single steps stays to be seen behind the trend
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=colour, label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    if names:
        axes.legend()


def _accuracy(axes: Axes, val: Sequence[Mapping[str, Any]]) -> None:
    steps = [line["step"] for line in val]
    top1 = np.array([line["top1"] for line in val]) * 100
    if len(top1[0]) > 1:
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
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    smooth: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return smooth
