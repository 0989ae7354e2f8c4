"""Computes the sections of a report from `ReportData` for the templates."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from PIL import Image

from dynaslim.data.images import ImageDataset
from dynaslim.evaluation import ClassMetrics, Evaluation
from dynaslim.report import text
from dynaslim.report.charts import Bar, Chart, histogram, ramp, share_chart
from dynaslim.report.data import ReportData

_MAX_ROUTES: Final = 6
"""Most routes that are shown one by one; the rest are "other routes"."""
_MAX_CLASSES: Final = 30
"""Up to this number, all classes are listed; otherwise `_ENDS` at each end of the list."""
_ENDS: Final = 12
_MAX_GATES: Final = 4
_MAX_MATRIX: Final = 20
"""Most classes for which a confusion matrix is shown."""
_PAIRS: Final = 20
_PAIRS_BESIDE_MATRIX: Final = 10
_STRIP: Final = 6
"""Number of pictures in a row."""
_SIDE_PX: Final = 128
"""Larger pictures are reduced to this size; they are shown at about half of it."""


# -- routes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouteColumn:
    """A route that is shown separately, or all others together if `number` is None."""

    number: int | None
    """Its position in `DynamicMetrics.route_shares` and in `Evaluation.taken`."""
    colour: str
    widths: str
    madds: int | None
    share: float

    @property
    def name(self) -> str:
        if self.number is None:
            return self.widths
        return f"{self.widths} ({text.millions(self.madds)})"


def route_columns(data: ReportData) -> tuple[RouteColumn, ...]:
    """The most used routes by rising cost, followed by all others together."""
    if data.metrics is None or data.metrics.dynamic is None:
        return ()
    shares = data.metrics.dynamic.route_shares
    order = sorted(range(len(shares)), key=lambda n: (-shares[n].share, n))[:_MAX_ROUTES]
    cost = {n: data.route_madds(shares[n].widths) for n in order}
    order.sort(key=lambda n: (cost[n] or 0, shares[n].widths))
    columns = []
    for place, n in enumerate(order):
        colour, widths = ramp(place, len(order)), text.widths_of(shares[n].widths)
        columns.append(RouteColumn(n, colour, widths, cost[n], shares[n].share))
    if len(shares) > len(order):
        rest = sum(one.share for n, one in enumerate(shares) if n not in order)
        name = f"{len(shares) - len(order)} other routes"
        columns.append(RouteColumn(None, "other", name, None, rest))
    return tuple(columns)


class TakenRoute(NamedTuple):
    """The images that took a route, and the accuracies of that and the widest route on them."""

    column: RouteColumn
    images: int
    share: float
    top1: float | None
    widest_top1: float | None


def taken_routes(data: ReportData, columns: Sequence[RouteColumn]) -> tuple[TakenRoute, ...]:
    """One entry per column; empty without images or a dynamic mode."""
    evaluation, details = data.evaluation, data.details
    if evaluation is None or details is None:
        return ()
    right_N = (evaluation.predictions == evaluation.labels).numpy()
    widest_N = details.widest_correct_N.numpy()
    number_N = evaluation.taken_number.numpy()
    shown = [column.number for column in columns if column.number is not None]
    found = []
    for column in columns:
        own_N = (
            number_N == column.number if column.number is not None else ~np.isin(number_N, shown)
        )
        images = int(own_N.sum())
        top1s = [float(one[own_N].mean()) if images else None for one in (right_N, widest_N)]
        found.append(TakenRoute(column, images, images / evaluation.images, *top1s))
    return tuple(found)


# -- classes --------------------------------------------------------------------------------------


def class_names(data: ReportData) -> tuple[str, ...]:
    """The name of each class as shown on the page."""
    names: Sequence[str | None] = data.run.model.checkpoint.class_names or ()
    if not names and data.metrics is not None:
        names = [one.name for one in data.metrics.per_class]
    if not names:
        names = (None,) * data.spec.num_classes
    return tuple(text.name_of(name, index) for index, name in enumerate(names))


class Classes(NamedTuple):
    """Accuracy and cost of every class."""

    chart: Chart | None
    """Routes by class; None without a dynamic mode."""
    listed: Sequence[ClassMetrics]
    """Classes by falling cost; without a dynamic mode, by rising accuracy."""
    total: int
    """Number of classes that have images."""


def classes(
    data: ReportData, columns: Sequence[RouteColumn], names: Sequence[str]
) -> Classes | None:
    """Accuracy and cost of the classes; None without metrics or classes with images."""
    if data.metrics is None:
        return None
    found = [one for one in data.metrics.per_class if one.images]
    if not found:
        return None
    dynamic = data.metrics.dynamic
    if dynamic is not None:
        found.sort(key=lambda one: (-(one.mean_madds or 0.0), one.index))
    else:
        found.sort(key=lambda one: (one.top1 or 0.0, one.index))
    listed = found if len(found) <= _MAX_CLASSES else [*found[:_ENDS], *found[-_ENDS:]]
    chart = None
    if dynamic is not None and columns:
        shown = [column.number for column in columns if column.number is not None]

        def bar(one: ClassMetrics) -> Bar:
            shares = [one.route_shares[number] for number in shown]
            if len(shares) < len(columns):
                others = (s for n, s in enumerate(one.route_shares) if n not in shown)
                shares.append(sum(others))
            return Bar(names[one.index], tuple(shares), text.millions(one.mean_madds))

        shares = tuple(column.share for column in columns)
        every = Bar("all images", shares, text.millions(dynamic.mean_madds))
        parts = [(column.colour, column.name) for column in columns]
        chart = share_chart([every, *map(bar, listed)], parts, end="mean MAdds")
    return Classes(chart, listed, len(found))


# -- confidence -----------------------------------------------------------------------------------


class Confidence(NamedTuple):
    """Confidence of a gate in its choices, or of the network in its answers if `gate` is None."""

    gate: int | None
    gates: int
    chart: Chart
    surer_half_top1: float | None
    """Accuracy on the half of the images with the higher confidence; None for a single image."""
    other_half_top1: float | None


def confidences(data: ReportData) -> tuple[Confidence, ...]:
    """The confidences of the gates, then of the network; empty without images."""
    evaluation, details = data.evaluation, data.details
    if evaluation is None or details is None:
        return ()
    right_N = (evaluation.predictions == evaluation.labels).numpy()
    gates = details.gate_probability_GN.numpy()
    values = [(n, gate_N) for n, gate_N in enumerate(gates[:_MAX_GATES])]
    found = []
    for number, value_N in [*values, (None, details.margin_N.numpy())]:
        unit = "probability of the chosen width"
        if number is None:
            unit = "margin between the two likeliest classes"
        order = np.argsort(value_N, kind="stable")
        half = len(order) // 2
        halves = (order[half:], order[:half])
        tops = [float(right_N[own].mean()) if half else None for own in halves]
        chart = histogram(value_N, right_N, unit=unit)
        found.append(Confidence(number, len(gates), chart, *tops))
    return tuple(found)


# -- confusions -----------------------------------------------------------------------------------


class Confusions(NamedTuple):
    matrix: Sequence[Sequence[int]]
    """Number of images by true class (rows) and answer (columns); empty if too many classes."""
    pairs: Sequence[tuple[str, str, int, float]]
    """The most frequent mistakes: true class, answer, number of images, share of the class."""


def confusions(data: ReportData, names: Sequence[str]) -> Confusions | None:
    """Confusions of the dynamic mode, else of the widest route; None without images."""
    evaluation = data.evaluation
    if evaluation is None:
        return None
    classes = len(names)
    pairs_N = evaluation.labels * classes + evaluation.predictions
    counts = torch.bincount(pairs_N, minlength=classes**2).view(classes, -1).numpy()
    totals = counts.sum(1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    is_small = classes <= _MAX_MATRIX
    order = np.argsort(-wrong, axis=None, kind="stable")
    pairs = [
        (names[row], names[column], count, count / int(totals[row]))
        for row, column in zip(
            *np.unravel_index(order[: _PAIRS_BESIDE_MATRIX if is_small else _PAIRS], wrong.shape),
            strict=True,
        )
        if (count := int(wrong[row, column]))
    ]
    return Confusions(counts.tolist() if is_small else [], pairs)


# -- pictures -------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """An image as the network sees it, and the network's answer."""

    uri: str
    is_small: bool
    """Whether the image has few pixels, so that single pixels should stay visible."""
    label: str
    answer: str
    is_right: bool
    confidence: float


class Gallery(NamedTuple):
    """Titled rows of pictures for each route, and the most confident mistakes."""

    routes: Sequence[tuple[RouteColumn | None, Sequence[tuple[str, Sequence[Picture]]]]]
    mistakes: Sequence[Picture]


def gallery(
    data: ReportData, columns: Sequence[RouteColumn], names: Sequence[str]
) -> Gallery | None:
    """The hardest and easiest images of each route, by their margin; None without images.

    The easiest are chosen from those left after the hardest, so no image is in both rows.
    """
    evaluation, details, source = data.evaluation, data.details, data.images
    if evaluation is None or details is None or source is None:
        return None
    shown: list[tuple[RouteColumn | None, int]] = [
        (column, column.number)
        for column in columns
        if column.number is not None and column.share > 0
    ]
    routes = []
    for column, number in shown or [(None, 0)]:
        own = torch.nonzero(evaluation.taken_number == number).flatten()
        order = own[details.margin_N[own].argsort(stable=True)].tolist()
        hard, rest = order[:_STRIP], order[_STRIP:]
        routes.append((column, (("hardest", hard), ("easiest", rest[-_STRIP:][::-1]))))
    wrong = torch.nonzero(evaluation.predictions != evaluation.labels).flatten()
    by_confidence = evaluation.confidence[wrong].argsort(descending=True, stable=True)
    mistakes = wrong[by_confidence][: 2 * _STRIP].tolist()
    needed = {place for _, strips in routes for _, places in strips for place in places}
    pictures = _pictures(evaluation, source.images, names, sorted(needed | {*mistakes}))
    return Gallery(
        [
            (column, [(title, [pictures[n] for n in places]) for title, places in strips if places])
            for column, strips in routes
        ],
        [pictures[n] for n in mistakes],
    )


def _pictures(
    evaluation: Evaluation, images: ImageDataset, names: Sequence[str], places: Sequence[int]
) -> dict[int, Picture]:
    """Pictures of evaluated images, by position in the evaluation."""
    batches = images.batches(64, evaluation.rows[torch.tensor(places, dtype=torch.int64)])
    pixels = itertools.chain.from_iterable(batch.numpy() for batch, _ in batches)
    return {
        place: Picture(
            data_uri(pixels_CSS),
            pixels_CSS.shape[-1] <= _SIDE_PX // 2,
            names[int(evaluation.labels[place])],
            names[int(evaluation.predictions[place])],
            bool(evaluation.predictions[place] == evaluation.labels[place]),
            float(evaluation.confidence[place]),
        )
        for place, pixels_CSS in zip(places, pixels, strict=True)
    }


def data_uri(pixels_CSS: np.ndarray) -> str:
    """uint8 pixels (1 or 3, S, S) as a data URI: a PNG if small, else a JPEG of at most 128 px."""
    is_grey = pixels_CSS.shape[0] == 1
    picture = Image.fromarray(pixels_CSS[0] if is_grey else pixels_CSS.transpose(1, 2, 0))
    buffer = io.BytesIO()
    if max(picture.size) <= _SIDE_PX // 2:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
