"""Effect of a lower precision on accuracy and routes: two engines compared on labelled images.

Suffixes: B rows of a batch, C channels, S side in pixels, G gates, K classes.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import readable_batches
from dynaslim.errors import DataError, DynaslimError, check
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.escalation import probabilities

_MODES: Final = ("top1", "top1_cheapest", "top1_widest")


def accuracy_report(
    reference: Engine,
    quantised: Engine,
    images: ImageDataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 128,
    limit: int | None = None,
) -> dict[str, Any]:
    """Compare two engines of one network on the first `limit` images; returns plain JSON values.

    - `images`: the number of images, without those that cannot be read;
    - `routes`: the names of the `cheapest` and the `widest` route that the gates can take;
    - `reference`, `quantised`: each engine's `backend` and `precision`, the shares (0..1) of images
      it classifies correctly when routed (`top1`) and along those two routes (`top1_cheapest`,
      `top1_widest`), and its mean multiply-adds per routed image (`madds`);
    - `same_prediction`, `same_route`: the shares of images on which the routed engines agree;
    - `largest_probability_difference`: the largest over all classes and images, routed.

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
    totals = [dict.fromkeys((*_MODES, "madds"), 0.0) for _ in engines]
    count, same_prediction, same_route, largest = 0, 0, 0, 0.0
    if limit is not None:
        images = images.subset(torch.arange(min(limit, len(images))))
    for x, labels in readable_batches(images, preprocessing, batch_size):
        x_BCSS, labels_B = x.numpy(), labels.numpy()
        routed = [engine(x_BCSS) for engine in engines]
        for output, runs, total in zip(routed, static, totals, strict=True):
            answers = (output.logits, *(run(x_BCSS) for run in runs))
            for mode, logits_BK in zip(_MODES, answers, strict=True):
                if not np.isfinite(logits_BK).all():
                    raise DynaslimError(
                        f"{mode}: the network's output is not finite; its weights or BN statistics "
                        f"are damaged"
                    )
                total[mode] += int((logits_BK.argmax(1) == labels_B).sum())
            total["madds"] += float(output.madds.sum())
        one, other = routed
        count += len(labels_B)
        same_prediction += int((one.logits.argmax(1) == other.logits.argmax(1)).sum())
        same_route += int((one.routes == other.routes).all(1).sum())
        apart = np.abs(probabilities(one.logits) - probabilities(other.logits))
        largest = max(largest, float(apart.max()))
    if not count:
        raise DataError(
            f"{images.name or 'data'}: none of its first {len(images)} images can be read"
        )
    names = ("reference", "quantised")
    return {
        "images": count,
        "routes": {"cheapest": str(routes[0]), "widest": str(routes[1])},
        **{
            name: {
                "backend": engine.backend,
                "precision": engine.source.precision,
                **{mode: value / count for mode, value in total.items()},
            }
            for name, engine, total in zip(names, engines, totals, strict=True)
        },
        "same_prediction": same_prediction / count,
        "same_route": same_route / count,
        "largest_probability_difference": largest,
    }
