"""Evaluation of every uniform route and of the dynamic mode, in which gates choose the routes.

A mode is a route or the dynamic mode. The processes of a run share the batches and gather every
mode's answer for every image. All totals are computed from these answers, by integer and exact
sums, so they do not depend on which process ran which batch.

Suffixes: N images, B rows of a batch, M modes, G gates, K classes, R routes, C channels, S side in
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynaslim._files import write_atomic
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import madds
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import normalise
from dynaslim.distributed import gather, rank, world_size
from dynaslim.errors import DataError, DynaslimError, check
from dynaslim.graph import AnySpec
from dynaslim.nn.net import ElasticNet
from dynaslim.preprocessing import MAX_VIEWS, Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.program_net import for_evaluation
from dynaslim.spec import Route

T = TypeVar("T")
_SHIFTS: Final = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # the image, up, down, left, right
assert 2 * len(_SHIFTS) == MAX_VIEWS


@dataclass(frozen=True)
class RouteMetrics:
    """One route on the whole set; `top1` and `top5` are shares in 0..1, `loss` in nats.

    `madds` is the cost of one image, all its views together.
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

    `mean_madds` per image includes the slimming heads. `gate_accuracy` is how often a gate's choice
    is the target of sandwich gate sparsification (SGS), as a mean over gates: the first choice if
    the cheapest route is right, else the last.
    """

    top1: float
    top5: float
    loss: float
    mean_madds: float
    route_shares: tuple[RouteShare, ...]
    gate_accuracy: float


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class, in the dynamic mode; without it, along the widest route evaluated."""

    index: int
    name: str | None
    images: int
    top1: float | None
    """Share of the images classified correctly, in 0..1; None if there are no images."""
    mean_madds: float | None
    """Multiply-adds per image; None if there are no images."""
    route_shares: tuple[float, ...]
    """Shares of its images by route, in the order of `DynamicMetrics.route_shares`: zeros if there
    are no images, empty without the dynamic mode."""


@dataclass(frozen=True)
class Metrics:
    """The totals of an evaluation; training also stores them in a checkpoint."""

    images: int
    """Images evaluated."""
    routes: tuple[RouteMetrics, ...]
    dynamic: DynamicMetrics | None
    per_class: tuple[ClassMetrics, ...]


@dataclass(frozen=True)
class Evaluation(Metrics):
    """The result of `evaluate`. Tensors have one row per evaluated image, in the set's order, on
    the CPU.

    Values of a single mode are for the dynamic mode; without it, for the widest route evaluated.
    """

    skipped: int
    """Number of images that could not be read; no result includes them."""
    predictions: Tensor
    """(N,) int64 class."""
    choices: Tensor
    """(N, G) int64 width index behind each gate."""
    rows: Tensor
    """(N,) int64: the index of each image in the set; 0 to N - 1 if none was skipped."""
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
        """The totals as plain JSON values, without the per-image tensors."""
        return {
            "images": self.images,
            "skipped": self.skipped,
            "routes": [asdict(route) for route in self.routes],
            "dynamic": None if self.dynamic is None else asdict(self.dynamic),
            "per_class": [asdict(one) for one in self.per_class],
        }


@torch.inference_mode()
def evaluate(
    net: ElasticNet | Checkpoint,
    images: ImageDataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    routes: Sequence[Route] | None = None,
    on_batch: Callable[[int], None] | None = None,
    dynamic: bool = True,
    bf16: bool = False,
    views: int = 1,
) -> Evaluation:
    """Measure a network in evaluation mode on labelled images; deterministic.

    In the dynamic mode, the gates choose the routes without a budget. For a cascade's checkpoint,
    the dynamic mode uses the point of its budget curve that loses at most 0.5 points against the
    last rung; without a curve all images stay on the first rung. `routes` default to the uniform
    routes. `on_batch` is called with the number of images in each batch of this process. On a CPU,
    batches of large images are smaller than `batch_size`, and if there are many, ONNX Runtime runs
    the network where it is installed. Without `dynamic` the gates do not run.
    Pixels are moved to the network's device; `bf16` runs the network under autocast, with losses in
    float32. With several `views` (see `view`), the probabilities of a mode are the mean over the
    views: every view takes its own route, the recorded route is that of the image itself (view 0),
    and MAdds are summed.

    If torch.distributed is initialised, process r of W takes batches r, r + W, r + 2 W, ... All
    processes return the same result: exactly that of one process with the same hardware and number
    of threads.

    Raises:
        DataError: if the images do not fit the network or the preprocessing, or none can be read.
        DynaslimError: on every process, if the network's output is not finite or any process fails.
        UsageError: if the network is in training mode, `views` is not 1 to 10, or
            `batch_size` is below 1.
    """
    checkpoint = net if isinstance(net, Checkpoint) else Checkpoint(net)
    net, spec = checkpoint.net, checkpoint.net.spec
    check(1 <= views <= MAX_VIEWS, f"views {views}: must be from 1 to {MAX_VIEWS}")
    check(batch_size >= 1, f"batch_size {batch_size}: must be at least 1")
    check(not net.training, "evaluate uses running statistics: call net.eval() first")
    images.check_fits(preprocessing, spec.num_classes)
    chosen = tuple(spec.routes if routes is None else routes)
    # the SGS targets of the gates depend on whether the gates' cheapest route is right
    cheapest = spec.cheapest_choice
    gated = dynamic and bool(spec.gates)
    run = (*chosen, cheapest) if not chosen or (gated and cheapest not in chosen) else chosen
    many = 0 if bf16 else len(images)
    net, batch_size = for_evaluation(
        net, preprocessing.image_size_px, many, batch_size, None if gated else run
    )
    checkpoint = replace(checkpoint, net=net)
    modes = _Modes(checkpoint, run, preprocessing, gated=gated, views=views, bf16=bf16)
    own = _gathered(lambda: list(_own_answers(modes, images, batch_size, on_batch)))
    parts = [part for process in own for part in process]
    if not parts:
        raise DataError(f"{images.name or 'data'}: none of its {len(images)} images can be read")
    return _summary(modes, chosen, images, _Answers.join(parts))


def write_table(path: str | Path, evaluation: Evaluation, images: ImageDataset) -> Path:
    """Write one row for each evaluated image to a parquet file, atomically.

    Columns: file (from `images.where`; "row n", counted from 0, if that is empty), label and
    prediction with their names (null if the set has none), right, route (such as 12-24-48),
    confidence (0..1) and madds (all views together). In a run of several processes, call it on one
    of them.

    Raises:
        UsageError: if `images` is not the evaluated set, or the path is a folder.
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
    modes: _Modes, chosen: Sequence[Route], images: ImageDataset, answers: _Answers
) -> Evaluation:
    """Compute all totals from the answers for each image."""
    spec = modes.net.spec
    # the dynamic mode is the last one; without it, use the widest of the caller's routes
    if modes.engine is not None:
        main, madds_N = -1, answers.madds_N
        taken, taken_number_N = _taken(spec, answers.choices_GN.T)
    else:
        main = max(range(len(chosen) or 1), key=lambda number: modes.madds(modes.routes[number]))
        madds_N = torch.full_like(answers.madds_N, modes.madds(modes.routes[main]))
        taken, taken_number_N = (modes.routes[main],), torch.zeros_like(answers.rows_N)
    pairs_N = answers.labels_N * len(taken) + taken_number_N
    counts_KR = torch.bincount(pairs_N, minlength=spec.num_classes * len(taken))
    counts_KR = counts_KR.view(spec.num_classes, len(taken))
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
    """The mean, from a correctly rounded sum that does not depend on order or threads."""
    return math.fsum(values_N.tolist()) / len(values_N)


def _means(answers: _Answers, mode: int) -> dict[str, float]:
    rank_N = answers.rank_MN[mode]
    return {
        "top1": int((rank_N == 0).sum()) / len(rank_N),
        "top5": int((rank_N < 5).sum()) / len(rank_N),
        "loss": _mean(answers.loss_MN[mode]),
    }


def _gate_accuracy(spec: AnySpec, answers: _Answers, easy_N: Tensor) -> float:
    hits = 0
    for gate, picked_N in zip(spec.gates, answers.choices_GN, strict=True):
        target_N = torch.where(easy_N, gate.choices[0], gate.choices[-1])
        hits += int((picked_N == target_N).sum())
    return hits / answers.choices_GN.numel()


def _taken(spec: AnySpec, choices_NG: Tensor) -> tuple[tuple[Route, ...], Tensor]:
    """The routes taken, sorted by widths, and for each image the index of its route.

    With one gate, routes that no image took are listed too.
    """
    distinct, number_N = torch.unique(choices_NG, dim=0, return_inverse=True)
    found = [spec.route_at(row) for row in distinct.tolist()]
    listed = spec.routing_space if len(spec.gates) == 1 else tuple(sorted(found))
    return listed, torch.tensor([listed.index(route) for route in found])[number_N]


def _per_class(
    images: ImageDataset,
    labels_N: Tensor,
    predictions_N: Tensor,
    madds_N: Tensor,
    counts_KR: Tensor,
) -> tuple[ClassMetrics, ...]:
    """Metrics of every class; counts_KR are its images by the route they took."""
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


# -- the answers for each image -------------------------------------------------------------------


class _Answers(NamedTuple):
    """The answers of all modes for some images; the images are the last axis of every tensor."""

    rows_N: Tensor
    labels_N: Tensor
    loss_MN: Tensor
    prediction_MN: Tensor
    rank_MN: Tensor
    """How many classes rank above the label: 0 counts for top-1, below 5 for top-5."""
    confidence_MN: Tensor
    choices_GN: Tensor
    madds_N: Tensor

    @staticmethod
    def join(parts: Sequence[_Answers]) -> _Answers:
        """Join the parts; images are sorted by row."""
        joined = _Answers(*(torch.cat(tensors, dim=-1) for tensors in zip(*parts, strict=True)))
        order = joined.rows_N.argsort()
        return _Answers(*(tensor[..., order] for tensor in joined))


class _Modes:
    """Runs batches through a network's modes: some routes, then the dynamic mode if `gated`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        routes: Sequence[Route],
        preprocessing: Preprocessing,
        *,
        gated: bool,
        views: int,
        bf16: bool,
    ) -> None:
        self.net = net = checkpoint.net
        self.routes = routes
        self.preprocessing = preprocessing
        self.views = views
        self.bf16 = bf16
        self.device = net.device
        # one worker and the plain backend, so that every process computes a batch identically
        self.engine = (
            Engine(
                checkpoint if isinstance(net.spec, CascadeSpec) else net,
                backend=net.plain_backend,
                precision="bf16" if bf16 else "fp32",
                workers=1,
                max_batch=1 << 30,
                cache_dir=None,
            )
            if gated
            else None
        )
        self.names = [f"route {route}" for route in routes]
        if self.engine is not None:
            self.names.append("dynamic mode")

    def madds(self, route: Route) -> int:
        """Multiply-adds of one image along a route, all its views together."""
        return madds(self.net.spec, route, self.preprocessing.image_size_px) * self.views

    def __call__(self, pixels_BCSS: Tensor, labels_B: Tensor, rows_B: Tensor) -> _Answers:
        """Answers for a batch; raises `DynaslimError` if the network's output is not finite."""
        x_BCSS = normalise(pixels_BCSS.to(self.device), self.preprocessing)
        logits: list[list[Tensor]] = [[] for _ in self.names]  # one list of views for each mode
        choices_GB = torch.empty(0, len(labels_B), dtype=torch.int64)
        madds_B = torch.zeros(len(labels_B), dtype=torch.float64)
        for number in range(self.views):
            seen_BCSS = view(x_BCSS, number)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.net.forward_many(seen_BCSS, self.routes)
                if self.engine is not None:
                    routed = self.engine(seen_BCSS)
                    outputs.append(routed.logits)
                    madds_B += routed.madds.cpu()
                    if number == 0:
                        choices_GB = routed.routes.cpu().T
            for name, mode, output in zip(self.names, logits, outputs, strict=True):
                mode.append(_finite(name, output.float().cpu()))
        scores_MBK = torch.stack([_mean_of_views(mode) for mode in logits])
        return _Answers(
            rows_B,
            labels_B,
            torch.stack([F.cross_entropy(s, labels_B, reduction="none") for s in scores_MBK]),
            scores_MBK.argmax(2),
            _ranks(scores_MBK, labels_B),
            scores_MBK.softmax(2).amax(2),
            choices_GB,
            madds_B,
        )


def view(x_BCSS: Tensor, number: int) -> Tensor:
    """View `number` (0 to `MAX_VIEWS` - 1) of normalised images, for test-time augmentation.

    View 0 is the image, view 1 its mirror image. Then follow the image shifted up, down, left and
    right by a sixteenth of its side (at least 1 px), each with its mirror image next. Shifted-in
    pixels are zero, the mean colour.
    """
    step = max(1, x_BCSS.shape[-1] // 16)
    down, right = (step * sign for sign in _SHIFTS[number // 2])
    # a negative pad crops: rows taken off one side are added as zeros on the other
    moved = F.pad(x_BCSS, (right, -right, down, -down)) if down or right else x_BCSS
    return moved.flip(3) if number % 2 else moved


def _own_answers(
    modes: _Modes,
    images: ImageDataset,
    batch_size: int,
    on_batch: Callable[[int], None] | None,
) -> Iterator[_Answers]:
    """Answers for this process's batches, which are the same batches as in a single process."""
    own = torch.split(torch.arange(len(images)), batch_size)[rank() :: world_size()]
    if not own:
        return
    loaded = images.batches(batch_size, torch.cat(own))
    for rows_B, (pixels_BCSS, labels_B) in zip(own, loaded, strict=True):
        if len(labels_B) != len(rows_B):
            raise DataError(
                f"{images.name}: gave {len(labels_B)} images for a batch of {len(rows_B)}"
            )
        readable = labels_B >= 0
        if readable.all():
            yield modes(pixels_BCSS, labels_B, rows_B)
        elif readable.any():
            yield modes(pixels_BCSS[readable], labels_B[readable], rows_B[readable])
        if on_batch is not None:
            on_batch(len(labels_B))


def _gathered(work: Callable[[], T]) -> list[T]:
    """Gather every process's result. If one process fails, all raise instead of waiting for it."""
    if world_size() == 1:
        return [work()]
    try:
        own = work()
    except Exception as error:
        # exceptions of other libraries may not survive pickling
        ours = isinstance(error, DynaslimError)
        message = f"process {rank()}: {type(error).__name__}: {error}"
        gather(error if ours else DynaslimError(message))
        raise
    results = gather(own)
    for result in results:
        if isinstance(result, DynaslimError):
            raise result
    return results


def _finite(name: str, logits_BK: Tensor) -> Tensor:
    if not torch.isfinite(logits_BK).all():
        raise DynaslimError(
            f"{name}: the network's output is not finite; its weights or BN statistics "
            f"are damaged, or the input is"
        )
    return logits_BK


def _mean_of_views(logits: Sequence[Tensor]) -> Tensor:
    """Scores whose softmax is the mean of the views' probabilities; for one view, its logits.

    The released code averages logits instead, whose top-1 was never higher (docs/log.md).
    `runtime.escalation.averaged` does the same as this function.
    """
    if len(logits) == 1:
        return logits[0]
    log_probs = torch.stack([logits_BK.log_softmax(1) for logits_BK in logits])
    return log_probs.logsumexp(0) - math.log(len(logits))


def _ranks(scores_MBK: Tensor, labels_B: Tensor) -> Tensor:
    """How many classes rank above the label; ties go to the lower class number, as in argmax."""
    own_MB1 = scores_MBK.gather(2, labels_B.expand(len(scores_MBK), -1)[..., None])
    lower_BK = torch.arange(scores_MBK.shape[2]) < labels_B[:, None]
    return ((scores_MBK > own_MB1) | ((scores_MBK == own_MB1) & lower_BK)).sum(2)
