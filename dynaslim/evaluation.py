"""Evaluation: every uniform route, and the dynamic mode that the gates choose.

All totals are taken from the answers for each image (`dynaslim.evaluation_table`), in integers and
exact sums: they do not depend on who ran which batch.

Suffixes: N images, M modes, G gates, K classes, R routes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynaslim._files import write_atomic
from dynaslim.errors import check
from dynaslim.evaluation_table import Answers, Modes, answer_all
from dynaslim.evaluation_table import LabelledImages as LabelledImages
from dynaslim.evaluation_table import view as view
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import MAX_VIEWS, Preprocessing
from dynaslim.spec import NetSpec, Route


@dataclass(frozen=True)
class RouteMetrics:
    """One route on the whole set; `top1` and `top5` are shares in 0..1, `loss` in nats.

    `madds` is what one image costs, all its views together.
    """

    widths: tuple[int, ...]
    madds: int
    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class RouteShare:
    """Part of the images, 0..1, that the gates sent along a route."""

    widths: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class DynamicMetrics:
    """The dynamic mode on the whole set.

    `mean_madds` per image has the slimming heads in it. `gate_accuracy` is how often a gate's
    choice is the one that sandwich gate sparsification asks for: the first where the smallest
    route is right, else the last (mean over gates).
    """

    top1: float
    top5: float
    loss: float
    mean_madds: float
    route_shares: tuple[RouteShare, ...]
    gate_accuracy: float


@dataclass(frozen=True)
class ClassMetrics:
    """The images of one class, in the dynamic mode; without it, along the widest route."""

    index: int
    name: str | None
    images: int
    top1: float | None
    """Share of the images that are right, in 0..1; None if there are no images."""
    mean_madds: float | None
    """Per image; None if there are no images."""
    route_shares: tuple[float, ...]
    """In the order of `DynamicMetrics.route_shares`: zeros if there are no images, empty without
    that mode."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; tensors are per evaluated image, in the set's order, on the CPU.

    Those of one mode are of the dynamic mode; without it, along the widest route evaluated.
    """

    images: int
    """Images evaluated."""
    skipped: int
    """Images that could not be read; they are in no result."""
    routes: tuple[RouteMetrics, ...]
    dynamic: DynamicMetrics | None
    per_class: tuple[ClassMetrics, ...]
    predictions: Tensor
    """(N,) int64 class."""
    choices: Tensor
    """(N, G) int64 width index behind each gate."""
    rows: Tensor
    """(N,) int64: where each image stands in the set; 0 to N - 1 if none was skipped."""
    labels: Tensor
    """(N,) int64 class."""
    confidence: Tensor
    """(N,) float32: the largest probability."""
    madds: Tensor
    """(N,) float64 multiply-adds, all views together."""
    taken: tuple[Route, ...]
    """Routes that images took, in the order of `DynamicMetrics.route_shares`."""
    taken_number: Tensor
    """(N,) int64: which of `taken` each image took."""

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values, without the per-image part."""
        return {
            "images": self.images,
            "skipped": self.skipped,
            "routes": [asdict(route) for route in self.routes],
            "dynamic": None if self.dynamic is None else asdict(self.dynamic),
            "per_class": [asdict(one) for one in self.per_class],
        }


@torch.inference_mode()
def evaluate(
    net: SlimNet,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    routes: Sequence[Route] | None = None,
    on_batch: Callable[[int], None] | None = None,
    dynamic: bool = True,
    bf16: bool = False,
    views: int = 1,
) -> Evaluation:
    """Measure a network in evaluation mode on labelled images; no noise, so repeatable.

    `routes` default to the uniform routes. `on_batch` is called with the images done by each batch
    of this process. Without `dynamic` the gates are left alone, as if there were none. Pixels go to
    the network's device; `bf16` runs it under autocast, with losses in float32. With several
    `views` (see `view`) a mode's probabilities are the mean over them: every view takes its own
    route, the one recorded is that of the image itself, MAdds add up.

    Where torch.distributed is started, process r of W takes batches r, r + W, r + 2 W, ... and all
    return the same: exactly what one process would on such hardware and threads.

    Raises:
        DataError: if the images do not fit the network or the preprocessing, or none can be read.
        DynaslimError: if the network's output is not finite, on every process; or another failed.
        UsageError: if the network is in training mode, `views` is not 1 to 10, or
            `batch_size` is below 1.
    """
    spec = net.spec
    check(1 <= views <= MAX_VIEWS, f"views {views}: must be from 1 to {MAX_VIEWS}")
    check(batch_size >= 1, f"batch_size {batch_size}: must be at least 1")
    check(not net.training, "evaluate uses running statistics: call net.eval() first")
    images.check_fits(preprocessing, spec.num_classes)
    chosen = tuple(spec.routes if routes is None else routes)
    # the gates' cheapest route labels images easy or hard for them, so they always need it
    cheapest = spec.cheapest_choice
    gated = dynamic and bool(spec.gates)
    run = (*chosen, cheapest) if not chosen or (gated and cheapest not in chosen) else chosen
    modes = Modes(net, run, preprocessing, gated=gated, views=views, bf16=bf16)
    answers = answer_all(modes, images, batch_size, on_batch)
    return _summary(modes, chosen, images, answers)


def write_table(path: str | Path, evaluation: Evaluation, images: LabelledImages) -> Path:
    """Write one row for each evaluated image as a parquet file, whole or not at all.

    Columns: file (`images.where`, or "row n" from 0 where that is empty), label and prediction with
    their names (null where the set has none), right, route (such as 12-24-48), confidence (0..1)
    and madds (all views together). In a run of several processes call it on one of them.

    Raises:
        UsageError: if `images` is not what was evaluated, or the path is a folder.
        OSError: if the file cannot be written.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    evaluated = evaluation.images + evaluation.skipped
    check(
        len(images) == evaluated,
        f"{images.name or 'data'}: has {len(images)} images, the evaluation is of {evaluated}",
    )
    rows = evaluation.rows.tolist()
    labels, predictions = evaluation.labels.tolist(), evaluation.predictions.tolist()
    names = [one.name for one in evaluation.per_class]
    routes = [str(route) for route in evaluation.taken]
    where = images.where
    columns = {
        "file": pa.array([where[n] if where else f"row {n}" for n in rows], pa.string()),
        "label": pa.array(labels, pa.int64()),
        "label_name": pa.array([names[label] for label in labels], pa.string()),
        "prediction": pa.array(predictions, pa.int64()),
        "prediction_name": pa.array([names[label] for label in predictions], pa.string()),
        "right": pa.array((evaluation.predictions == evaluation.labels).tolist(), pa.bool_()),
        "route": pa.array([routes[n] for n in evaluation.taken_number.tolist()], pa.string()),
        "confidence": pa.array(evaluation.confidence.tolist(), pa.float32()),
        "madds": pa.array(evaluation.madds.tolist(), pa.float64()),
    }
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return write_atomic(path, sink.getvalue().to_pybytes())


def _summary(
    modes: Modes, chosen: Sequence[Route], images: LabelledImages, answers: Answers
) -> Evaluation:
    """All totals, from the answers for each image."""
    spec = modes.net.spec
    # the dynamic mode stands last; without it the widest route that the caller named counts
    if modes.engine is not None:
        main, madds_N = -1, answers.madds_N
        taken, taken_number_N = _taken(spec, answers.choices_GN.T)
    else:
        main = max(range(len(chosen) or 1), key=lambda number: modes.madds(modes.routes[number]))
        madds_N = torch.full_like(answers.madds_N, modes.madds(modes.routes[main]))
        taken, taken_number_N = (modes.routes[main],), torch.zeros_like(answers.rows_N)
    counts_KR = _count_pairs(answers.labels_N, taken_number_N, spec.num_classes, len(taken))
    total = len(answers.rows_N)
    return Evaluation(
        images=total,
        skipped=len(images) - total,
        routes=tuple(
            RouteMetrics(widths=route.widths, madds=modes.madds(route), **_means(answers, mode))
            for mode, route in enumerate(chosen)
        ),
        dynamic=None
        if modes.engine is None
        else DynamicMetrics(
            mean_madds=_mean(madds_N),
            route_shares=tuple(
                RouteShare(route.widths, count / total)
                for route, count in zip(taken, counts_KR.sum(0).tolist(), strict=True)
            ),
            gate_accuracy=_gate_accuracy(
                spec, answers, easy_N=answers.rank_MN[modes.routes.index(spec.cheapest_choice)] == 0
            ),
            **_means(answers, main),
        ),
        per_class=_per_class(
            images,
            answers.labels_N,
            answers.prediction_MN[main],
            madds_N,
            counts_KR if modes.engine is not None else counts_KR[:, :0],
        ),
        predictions=answers.prediction_MN[main],
        choices=answers.choices_GN.T.contiguous(),
        rows=answers.rows_N,
        labels=answers.labels_N,
        confidence=answers.confidence_MN[main],
        madds=madds_N,
        taken=taken,
        taken_number=taken_number_N,
    )


def _mean(values_N: Tensor) -> float:
    """The mean, of a correctly rounded sum: no order or number of threads can change it."""
    return math.fsum(values_N.tolist()) / len(values_N)


def _means(answers: Answers, mode: int) -> dict[str, float]:
    """top1, top5 and loss per image of one mode."""
    rank_N = answers.rank_MN[mode]
    return {
        "top1": int((rank_N == 0).sum()) / len(rank_N),
        "top5": int((rank_N < 5).sum()) / len(rank_N),
        "loss": _mean(answers.loss_MN[mode]),
    }


def _gate_accuracy(spec: NetSpec, answers: Answers, easy_N: Tensor) -> float:
    hits = 0
    for gate, picked_N in zip(spec.gates, answers.choices_GN, strict=True):
        asked_N = torch.where(easy_N, gate.choices[0], gate.choices[-1])
        hits += int((picked_N == asked_N).sum())
    return hits / answers.choices_GN.numel()


def _taken(spec: NetSpec, choices_NG: Tensor) -> tuple[tuple[Route, ...], Tensor]:
    """The routes by their widths (of one gate the unused ones too), and which of them each took."""
    distinct, number_N = torch.unique(choices_NG, dim=0, return_inverse=True)
    found = [spec.route_at(row) for row in distinct.tolist()]
    listed = spec.routing_space if len(spec.gates) == 1 else tuple(sorted(found))
    return listed, torch.tensor([listed.index(route) for route in found])[number_N]


def _count_pairs(first_N: Tensor, second_N: Tensor, firsts: int, seconds: int) -> Tensor:
    """How often each pair of values occurs: (firsts, seconds) int64."""
    pairs_N = first_N * seconds + second_N
    return torch.bincount(pairs_N, minlength=firsts * seconds).view(firsts, seconds)


def _per_class(
    images: LabelledImages,
    labels_N: Tensor,
    predictions_N: Tensor,
    madds_N: Tensor,
    counts_KR: Tensor,
) -> tuple[ClassMetrics, ...]:
    """Every class; counts_KR says how many of its images took each route."""
    classes = len(counts_KR)
    images_K = torch.bincount(labels_N, minlength=classes).tolist()
    right_K = torch.bincount(labels_N[predictions_N == labels_N], minlength=classes).tolist()
    # whole numbers, so a float64 sum of them is exact
    madds_K = torch.bincount(labels_N, madds_N, minlength=classes).tolist()
    names = images.class_names or (None,) * classes
    return tuple(
        ClassMetrics(
            index=index,
            name=names[index],
            images=count,
            top1=right / count if count else None,
            mean_madds=madds_K[index] / count if count else None,
            route_shares=tuple(n / max(1, count) for n in counts_KR[index].tolist()),
        )
        for index, (right, count) in enumerate(zip(right_K, images_K, strict=True))
    )
