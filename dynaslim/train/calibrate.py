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

    During training a width's statistics lag behind weights that other widths keep moving; the
    authors reset and average them anew before evaluation. `batches` are network inputs
    (B, C, H, W); `routes` default to `calibration_routes` of each batch. Widths that none of them
    runs keep their statistics; so does the trunk where, with `after_trunk`, the batches are its
    features. The network is left in evaluation mode. Where several processes
    run, each brings batches of its own and the averages go over all of them.

    Raises:
        TrainingError: if there are no batches; all statistics stay as they were.
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
    """Cumulative averages over the updates of all processes, whose numbers may differ."""
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
    """The uniform routes and the largest; where there are several gates, mixed routes too.

    A width behind one gate may be fed by any behind the gate before, which its BN statistics do not
    distinguish: they are to be those of all. The mixed routes, as many as there are widths, are
    drawn for batch `number`: every gate's widths are shuffled, and each route takes one of each.
    """
    routes = (*spec.routes, spec.largest)
    if len(spec.gates) < 2:
        return routes
    rng = random.Random(step_seed(0, number, "calibrate"))
    shuffled = [rng.sample(range(spec.num_widths), spec.num_widths) for _ in spec.gates]
    return (*routes, *(spec.route_at(indices) for indices in zip(*shuffled, strict=True)))
