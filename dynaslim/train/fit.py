"""Fit gates to images in memory: from pixels to slimming heads in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dynaslim.cost import CostTable
from dynaslim.data.feed import Feed, ImageFeed
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import Augment
from dynaslim.nn.net import ElasticNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import GateRecipe
from dynaslim.seeds import step_seed
from dynaslim.train.expected import GateFit, apply_heads, fit_gate, fit_to_target
from dynaslim.train.loop import check_has_gates
from dynaslim.train.route_cache import RouteCache, cache_routes


def fit_gate_to_images(
    net: ElasticNet,
    images: ImageDataset,
    preprocessing: Preprocessing,
    recipe: GateRecipe,
    *,
    target: float | None = None,
    on_batch: Callable[[], None] | None = None,
) -> GateFit:
    """Stage II by the exact expected loss, with costs in MAdds; sets the slimming heads of `net`.

    `target` is the mean cost as a share of the widest route's. For saved runs, held-out images and
    costs in ms see `dynaslim.runs.run_gate`.

    Raises:
        UsageError: if the network has no gates, or the target is out of reach.
        TrainingError: if there are fewer images than a batch.
        DataError: if the images do not fit the network or the preprocessing.
    """
    check_has_gates(net)
    images.check_fits(preprocessing, net.spec.num_classes)
    feed = ImageFeed(images, recipe.batch_size, recipe.seed)
    cache = cache_routes(
        net.eval(),
        augmented_views(
            feed,
            Augment(recipe.augment, preprocessing),
            next(net.parameters()).device,
            recipe.expected.views,
            recipe.seed,
        ),
        max_routes=recipe.expected.max_routes,
        seed=recipe.seed,
        on_batch=on_batch,
    )
    table = CostTable.from_madds(net.spec, preprocessing.image_size_px)
    found = fit_to(cache, table, recipe, target)
    apply_heads(net, found.heads)
    return found


def fit_to(
    cache: RouteCache,
    table: CostTable,
    recipe: GateRecipe,
    target: float | None,
    holdout: RouteCache | None = None,
) -> GateFit:
    """Fit to a target (a share of the widest route's cost), or by the recipe's cost weight."""
    if target is None:
        return fit_gate(
            cache,
            table,
            cost_weight=recipe.expected.cost_weight,
            recipe=recipe.expected,
            sgs=recipe.sgs,
            holdout=holdout,
        )
    cost = target * table.widest_cost
    return fit_to_target(cache, table, cost, recipe.expected, sgs=recipe.sgs, holdout=holdout)


def augmented_views(
    feed: Feed, augment: Augment, device: torch.device, views: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Network inputs and labels of `views` epochs of training images, each augmented anew."""
    for step, (pixels, labels) in enumerate(feed.batches(0, feed.steps_per_epoch * views)):
        x = augment(pixels.to(device), step_seed(seed, step, "augment cache"))
        yield x, labels.to(device)
