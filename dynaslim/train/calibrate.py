"""BN recalibration: fresh running statistics for every width after supernet training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dynaslim.distributed import average_, gather, rank, world_size
from dynaslim.errors import TrainingError
from dynaslim.graph import AnySpec
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.nn.net import ElasticNet
from dynaslim.seeds import step_seed
from dynaslim.spec import Route


@torch.no_grad()
def recalibrate(
    net: ElasticNet,
    batches: Iterable[Tensor],
    routes: Sequence[Route] | None = None,
    *,
    after_trunk: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> None:
    """Replace the running statistics by cumulative averages over `batches` along `routes`.

    During training, other widths keep changing the shared weights, so a width's statistics lag
    behind them; the authors recompute them before evaluation. `batches` are network inputs
    (B, C, H, W), or trunk features with `after_trunk`. `routes` defaults to `calibration_routes` of
    each batch. Widths on none of the routes keep their statistics, and so does the trunk with
    `after_trunk`. The network is left in evaluation mode. If several processes run, each passes its
    own batches and the averages are over all of them.

    Raises:
        TrainingError: if there are no batches; no statistics change.
    """
    norms = [module for module in net.modules() if isinstance(module, SlimBatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    before = [{k: v.clone() for k, v in norm.named_buffers()} for norm in norms]
    count = 0
    net.train()
    try:
        for norm in norms:
            norm.reset_statistics()
            norm.momentum = None  # cumulative average
        for x in batches:
            number = count * world_size() + rank()
            chosen = calibration_routes(net.spec, number) if routes is None else routes
            net.forward_many(x, chosen, after_trunk=after_trunk)
            count += 1
            if on_batch is not None:
                on_batch()
        counts = gather(count)
        if len(counts) > 1:
            _average_by_updates(norms)
    finally:
        net.eval()
        for norm, momentum, old in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            untouched = norm.num_batches_tracked == 0
            for name, buffer in norm.named_buffers():
                buffer[untouched] = old[name][untouched]
    if not sum(counts):
        raise TrainingError("recalibrate: no batches to take statistics from")


def _average_by_updates(norms: Sequence[SlimBatchNorm2d]) -> None:
    """Average the statistics over all processes, weighted by their numbers of updates."""
    updates = [norm.num_batches_tracked.to(norm.running_mean.dtype)[:, None] for norm in norms]
    statistics = [(norm.running_mean, norm.running_var) for norm in norms]
    for pair, weight in zip(statistics, updates, strict=True):
        for values in pair:
            values.mul_(weight)
    average_([*updates, *(values for pair in statistics for values in pair)])
    for norm, pair, weight in zip(norms, statistics, updates, strict=True):
        for values in pair:
            values.div_(torch.where(weight > 0, weight, 1.0))
        norm.num_batches_tracked.copy_((weight[:, 0] * world_size()).round())


def calibration_routes(spec: AnySpec, number: int) -> tuple[Route, ...]:
    """The uniform routes and the largest; with several gates also mixed routes.

    A segment at one width may follow any width of the previous segment. Its BN statistics do not
    distinguish them and must represent all. The mixed routes, one per width, are drawn for batch
    `number`: every gate's widths are shuffled, and each route takes one of each gate.
    """
    routes = (*spec.routes, spec.largest)
    if len(spec.gates) < 2:
        return routes
    rng = random.Random(step_seed(0, number, "calibrate"))
    shuffled = [rng.sample(range(spec.num_widths), spec.num_widths) for _ in spec.gates]
    return (*routes, *(spec.route_at(indices) for indices in zip(*shuffled, strict=True)))
