"""What another precision changes on labelled images: one engine beside another.

Suffixes: B rows of a batch, C channels, S side in pixels, G gates, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from dynaslim.data.transforms import normalise
from dynaslim.errors import DataError, DynaslimError, check
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.engine import Engine

DYNAMIC: Final = "top1"
CHEAPEST: Final = "top1_cheapest"
WIDEST: Final = "top1_widest"
_MODES: Final = (DYNAMIC, CHEAPEST, WIDEST)


class Labelled(Protocol):
    """What images have to have; those of `dynaslim.data` do."""

    @property
    def name(self) -> str:
        """For messages."""

    def __len__(self) -> int:
        """How many images."""

    def check_fits(self, preprocessing: Preprocessing, num_classes: int) -> None:
        """Raise `DataError` unless pixels and classes fit the two."""

    def batches(
        self, batch_size: int, order: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 pixels (B, C, S, S), int64 labels (B,), below zero for an unreadable image)."""


@dataclass
class _Totals:
    """Sums over the images of one engine."""

    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_MODES, 0))
    madds: float = 0.0


def accuracy_report(
    reference: Engine,
    quantised: Engine,
    images: Labelled,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 128,
    limit: int | None = None,
) -> dict[str, Any]:
    """Two engines of one network on the same images, the first `limit` of them: plain JSON values.

    - `images`: how many there were; those that cannot be read are left out;
    - `routes`: the names of the `cheapest` and the `widest` route that the gates can take;
    - `reference`, `quantised`: for each engine `backend`, `precision`, the shares 0..1 of images
      that are answered right when routed (`top1`) and along those two routes (`top1_cheapest`,
      `top1_widest`), and the mean multiply-adds of an image that is routed (`madds`);
    - `same_prediction`, `same_route`: the shares of images for which the two, routed, agree;
    - `largest_probability_difference`: of any class of any image, routed.

    Raises:
        UsageError: if the engines run different networks, or for a limit or batch size below 1.
        DataError: if the images do not fit, or none can be read.
        DynaslimError: if an engine's output is not finite.
    """
    spec = reference.spec
    check(
        spec == quantised.spec,
        f"engines of {spec.name} and {quantised.spec.name}: give two of one network",
    )
    check(batch_size >= 1, f"batch_size {batch_size}: must be at least 1")
    check(limit is None or limit >= 1, f"limit {limit}: must be at least 1")
    images.check_fits(preprocessing, spec.num_classes)
    engines = (reference, quantised)
    routes = (spec.cheapest_choice, spec.widest_choice)
    static = [[engine.static(route) for route in routes] for engine in engines]
    totals = (_Totals(), _Totals())
    count, same_prediction, same_route, largest = 0, 0, 0, 0.0
    count_all = len(images) if limit is None else min(limit, len(images))
    for pixels_BCSS, labels_B in images.batches(batch_size, torch.arange(count_all)):
        readable = labels_B >= 0
        if not readable.any():
            continue
        labels = labels_B[readable].numpy()
        x_BCSS = normalise(pixels_BCSS[readable], preprocessing).numpy()
        routed = [engine(x_BCSS) for engine in engines]
        for output, runs, total in zip(routed, static, totals, strict=True):
            answers = (output.logits, *(run(x_BCSS) for run in runs))
            for mode, logits_BK in zip(_MODES, answers, strict=True):
                _check_finite(logits_BK, mode)
                total.right[mode] += int((logits_BK.argmax(1) == labels).sum())
            total.madds += float(output.madds.sum())
        one, other = routed
        count += len(labels)
        same_prediction += int((one.logits.argmax(1) == other.logits.argmax(1)).sum())
        same_route += int((one.routes == other.routes).all(1).sum())
        apart = np.abs(_probabilities(one.logits) - _probabilities(other.logits))
        largest = max(largest, float(apart.max()))
    if not count:
        raise DataError(
            f"{images.name or 'data'}: none of its first {count_all} images can be read"
        )
    names = ("reference", "quantised")
    return {
        "images": count,
        "routes": {"cheapest": str(routes[0]), "widest": str(routes[1])},
        **{
            name: {
                "backend": engine.backend,
                "precision": engine.source.precision,
                **{mode: right / count for mode, right in total.right.items()},
                "madds": total.madds / count,
            }
            for name, engine, total in zip(names, engines, totals, strict=True)
        },
        "same_prediction": same_prediction / count,
        "same_route": same_route / count,
        "largest_probability_difference": largest,
    }


def _check_finite(logits_BK: np.ndarray, mode: str) -> None:
    if not np.isfinite(logits_BK).all():
        raise DynaslimError(
            f"{mode}: the network's output is not finite; its weights or BN statistics are damaged"
        )


def _probabilities(logits_BK: np.ndarray) -> np.ndarray:
    powers = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    result: np.ndarray = powers / powers.sum(1, keepdims=True)
    return result
