"""What is known of a network: from its evaluation, or as its checkpoint has stored it.

Suffixes: N images, B rows of a batch, C channels, S side in pixels, G gates, K options of a gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import normalise
from dynaslim.evaluation import (
    ClassMetrics,
    DynamicMetrics,
    Evaluation,
    RouteMetrics,
    RouteShare,
)
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.escalation import margins
from dynaslim.spec import NetSpec


@dataclass(frozen=True)
class Numbers:
    """The totals of one network on a set of images."""

    images: int
    routes: tuple[RouteMetrics, ...]
    dynamic: DynamicMetrics | None
    per_class: tuple[ClassMetrics, ...]

    @classmethod
    def of(cls, evaluation: Evaluation) -> Numbers:
        """Those of an evaluation."""
        return cls(evaluation.images, evaluation.routes, evaluation.dynamic, evaluation.per_class)

    def widest(self, spec: NetSpec) -> RouteMetrics | None:
        """The widest route that gates can take; without them the costliest; None if unknown."""
        if self.dynamic is None:
            return max(self.routes, key=lambda route: route.madds, default=None)
        asked = spec.widest_choice.widths
        return next((route for route in self.routes if route.widths == asked), None)


def stored_numbers(metrics: Mapping[str, Any], spec: NetSpec) -> Numbers | None:
    """What a checkpoint's metrics (`Evaluation.to_dict`) say; None if they are of another form."""
    raw = metrics.get("val", metrics)
    try:
        images = int(raw["images"])
        routes = tuple(
            RouteMetrics(
                _widths(one["widths"], spec),
                int(one["madds"]),
                _share(one["top1"]),
                _share(one["top5"]),
                _number(one["loss"]),
            )
            for one in raw["routes"]
        )
        dynamic = None if raw["dynamic"] is None else _dynamic(raw["dynamic"], spec)
        per_class = tuple(_class(one) for one in raw["per_class"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    fits = len(per_class) == spec.num_classes and images > 0
    return Numbers(images, routes, dynamic, per_class) if fits else None


def _dynamic(raw: Mapping[str, Any], spec: NetSpec) -> DynamicMetrics:
    return DynamicMetrics(
        _share(raw["top1"]),
        _share(raw["top5"]),
        _number(raw["loss"]),
        _number(raw["mean_madds"]),
        tuple(
            RouteShare(_widths(one["widths"], spec), _share(one["share"]))
            for one in raw["route_shares"]
        ),
        _share(raw["gate_accuracy"]),
    )


def _class(raw: Mapping[str, Any]) -> ClassMetrics:
    return ClassMetrics(
        index=int(raw["index"]),
        name=None if raw["name"] is None else str(raw["name"]),
        images=int(raw["images"]),
        top1=None if raw["top1"] is None else _share(raw["top1"]),
        mean_madds=None if raw["mean_madds"] is None else _number(raw["mean_madds"]),
        route_shares=tuple(_share(share) for share in raw["route_shares"]),
    )


def _widths(raw: Sequence[Any], spec: NetSpec) -> tuple[int, ...]:
    return spec.coerce_route([int(width) for width in raw]).widths


def _number(raw: Any) -> float:
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError(raw)
    return value


def _share(raw: Any) -> float:
    value = _number(raw)
    if not 0 <= value <= 1:
        raise ValueError(raw)
    return value


# -- what an evaluation does not keep -------------------------------------------------------------


@dataclass(frozen=True)
class Details:
    """How sure network and gates are of each evaluated image, and what the widest route says.

    In the order of the evaluation's images.
    """

    margin_N: Tensor
    """(N,) float32, 0..1: the likeliest class's probability minus that of the next."""
    gate_probability_GN: Tensor
    """(G, N) float32, 0..1: what each gate gives to its choice; no row without gates."""
    widest_right_N: Tensor
    """(N,) bool: whether the widest route that the gates can take is right."""


@torch.inference_mode()
def look_closer(
    net: SlimNet,
    images: ImageDataset,
    preprocessing: Preprocessing,
    evaluation: Evaluation,
    *,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> Details:
    """Run the evaluated images once more, along the routes that they took and along the widest."""
    spec, device = net.spec, next(net.parameters()).device
    widest = spec.widest_choice if evaluation.dynamic is not None else evaluation.taken[0]
    margin: list[Tensor] = []
    gates: list[Tensor] = []
    right: list[Tensor] = []
    at = 0
    for pixels_BCSS, labels_B in images.batches(batch_size, evaluation.rows):
        x_BCSS = normalise(pixels_BCSS.to(device), preprocessing)
        rows = slice(at, at + len(labels_B))
        at = rows.stop
        choices_BG = evaluation.choices[rows]
        widest_BN = net(x_BCSS, widest).float().cpu()
        if evaluation.dynamic is None:
            logits_BN, chosen_GB = widest_BN, torch.empty(0, len(labels_B))
        else:
            logits_BN, chosen_GB = _along(net, x_BCSS, choices_BG)
        margin.append(torch.from_numpy(margins(logits_BN.numpy())))
        gates.append(chosen_GB)
        right.append(widest_BN.argmax(1) == evaluation.labels[rows])
        if on_batch is not None:
            on_batch(len(labels_B))
    return Details(torch.cat(margin), torch.cat(gates, 1), torch.cat(right))


def _along(net: SlimNet, x_BCSS: Tensor, choices_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of rows along their routes, and the probability (G, B) of each gate's choice."""
    spec = net.spec
    logits_BN = torch.empty(len(x_BCSS), spec.num_classes)
    chosen_GB = torch.empty(len(spec.gates), len(x_BCSS))
    paths, path_B = torch.unique(choices_BG, dim=0, return_inverse=True)
    for number, path in enumerate(paths.tolist()):
        rows = torch.nonzero(path_B == number).flatten()
        features = x_BCSS[rows.to(x_BCSS.device)]
        for segment, index in enumerate((0, *path)):
            features, gate_logits_BK = net.segment(segment, features, index)
            if gate_logits_BK is not None:
                option = spec.gates[segment].choices.index(path[segment])
                chosen_GB[segment, rows] = gate_logits_BK.float().softmax(1)[:, option].cpu()
        logits_BN[rows] = features.float().cpu()
    return logits_BN, chosen_GB


def confusion(evaluation: Evaluation, classes: int) -> np.ndarray:
    """How many images of each class (rows) got each answer (columns): (classes, classes) int64."""
    pairs_N = evaluation.labels * classes + evaluation.predictions
    counts: np.ndarray = torch.bincount(pairs_N, minlength=classes**2).view(classes, -1).numpy()
    return counts
