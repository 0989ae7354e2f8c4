"""Evaluation: every uniform route, and the dynamic mode that the gates choose.

Suffixes: N images, B rows of a batch, G gates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from dynaslim.cost import madds
from dynaslim.data.memory import MemoryImages
from dynaslim.data.transforms import normalise
from dynaslim.errors import DataError, DynaslimError, UsageError
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.spec import Route


@dataclass(frozen=True)
class RouteMetrics:
    """One route on the whole set; `top1` and `top5` are shares in 0..1, `loss` in nats."""

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
class Evaluation:
    """What `evaluate` measured; `predictions` and `choices` are per image, in the set's order."""

    images: int
    routes: tuple[RouteMetrics, ...]
    dynamic: DynamicMetrics | None
    predictions: Tensor
    """(N,) class of the dynamic mode, or along the widest route of a network without gates."""
    choices: Tensor
    """(N, G) width index behind each gate."""

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values, without the per-image part."""
        return {
            "images": self.images,
            "routes": [asdict(route) for route in self.routes],
            "dynamic": None if self.dynamic is None else asdict(self.dynamic),
        }


class _Tally:
    """Top-1, top-5 and loss of one mode over batches."""

    def __init__(self, name: str, num_classes: int) -> None:
        self.name = name
        self.top1 = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.top5 = MulticlassAccuracy(
            num_classes, top_k=min(5, num_classes), average="micro", validate_args=False
        )
        self.loss = MeanMetric(nan_strategy="error")

    def add(self, logits_BN: Tensor, labels_B: Tensor) -> None:
        """Count a batch; raises `DynaslimError` if the network's output is not finite."""
        if not torch.isfinite(logits_BN).all():
            raise DynaslimError(
                f"{self.name}: the network's output is not finite; its weights or BN statistics "
                f"are damaged, or the input is"
            )
        self.top1.update(logits_BN, labels_B)
        self.top5.update(logits_BN, labels_B)
        self.loss.update(F.cross_entropy(logits_BN.float(), labels_B), weight=len(labels_B))

    def means(self) -> dict[str, float]:
        """top1, top5 and loss per image."""
        metrics = {"top1": self.top1, "top5": self.top5, "loss": self.loss}
        return {name: float(metric.compute()) for name, metric in metrics.items()}


@torch.inference_mode()
def evaluate(
    net: SlimNet,
    images: MemoryImages,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    routes: Sequence[Route] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure a network in evaluation mode on labelled images; no noise, so repeatable.

    `routes` default to the uniform routes. `on_batch` is called with the images done by each batch.

    Raises:
        DataError: if the images do not fit the network or the preprocessing, or there are none.
        DynaslimError: if the network's output is not finite.
        UsageError: if the network is in training mode.
    """
    spec = net.spec
    images.check_fits(preprocessing, spec.num_classes)
    if net.training:
        raise UsageError("evaluate uses running statistics: call net.eval() first")
    chosen = tuple(spec.routes if routes is None else routes)
    # the gates' cheapest route labels images easy or hard for them, so it is always run
    cheapest = spec.cheapest_choice
    run = chosen if cheapest in chosen else (*chosen, cheapest)
    engine = Engine(net) if spec.gates else None
    tallies = [_Tally(f"route {route}", spec.num_classes) for route in run]
    dynamic = _Tally("dynamic mode", spec.num_classes)
    predictions, choices, mean_madds, agree = [], [], 0.0, 0.0
    for pixels, labels in images.batches(batch_size):
        x = normalise(pixels, preprocessing)
        all_logits = net.forward_many(x, run)
        for tally, logits in zip(tallies, all_logits, strict=True):
            tally.add(logits, labels)
        easy = all_logits[run.index(cheapest)].argmax(1) == labels
        if engine is None:
            predictions.append(all_logits[len(chosen) - 1].argmax(1))
            choices.append(torch.empty(len(labels), 0, dtype=torch.int64))
        else:
            logits, picked, row_madds = engine(x)
            dynamic.add(logits, labels)
            predictions.append(logits.argmax(1))
            choices.append(picked)
            mean_madds += float(row_madds.sum()) / len(images)
            for number, gate in enumerate(spec.gates):
                asked = torch.where(easy, gate.choices[0], gate.choices[-1])
                hits = int((picked[:, number] == asked).sum())
                agree += hits / (len(images) * len(spec.gates))
        if on_batch is not None:
            on_batch(len(labels))
    all_choices = torch.cat(choices)
    return Evaluation(
        images=len(images),
        routes=tuple(
            RouteMetrics(
                widths=route.widths,
                madds=madds(spec, route, preprocessing.image_size_px),
                **tally.means(),
            )
            for route, tally in zip(chosen, tallies, strict=False)
        ),
        dynamic=None
        if engine is None
        else DynamicMetrics(
            mean_madds=mean_madds,
            route_shares=_shares(net, all_choices),
            gate_accuracy=agree,
            **dynamic.means(),
        ),
        predictions=torch.cat(predictions),
        choices=all_choices,
    )


def match_classes(
    name: str,
    data_classes: Sequence[str],
    num_classes: int,
    net_classes: Sequence[str] | None = None,
) -> list[int] | None:
    """The network's class number of each class of a data set; None if they are in the same order.

    Where both have names, classes are matched by name; a network without names takes the set's
    order.

    Raises:
        DataError: if their number differs, or a name is not one of the network's.
    """
    if len(data_classes) != num_classes:
        raise DataError(f"{name}: has {len(data_classes)} classes, the network has {num_classes}")
    if net_classes is None or tuple(data_classes) == tuple(net_classes):
        return None
    foreign = [c for c in data_classes if c not in net_classes]
    if foreign:
        raise DataError(
            f"{name}: class {foreign[0]!r} is none of the network's: {', '.join(net_classes)}"
        )
    return [tuple(net_classes).index(c) for c in data_classes]


def _shares(net: SlimNet, choices_NG: Tensor) -> tuple[RouteShare, ...]:
    """Shares of the routes taken, in the order of their widths; of one gate the unused ones too."""
    spec = net.spec
    counts = Counter(spec.route_at(row) for row in choices_NG.tolist())
    listed = spec.routing_space if len(spec.gates) == 1 else tuple(sorted(counts))
    return tuple(RouteShare(r.widths, counts[r] / len(choices_NG)) for r in listed)
