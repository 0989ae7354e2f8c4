"""BN recalibration: fresh running statistics for every width after supernet training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dynaslim.distributed import average_, gather
from dynaslim.errors import TrainingError
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.nn.net import SlimNet
from dynaslim.spec import Route


@torch.no_grad()
def recalibrate(
    net: SlimNet,
    batches: Iterable[Tensor],
    routes: Sequence[Route] | None = None,
    *,
    on_batch: Callable[[], None] | None = None,
) -> None:
    """Replace the running statistics by cumulative averages over `batches` along `routes`.

    During training a width's statistics lag behind weights that other widths keep moving; the
    authors reset and average them anew before evaluation. `batches` are network inputs
    (B, C, H, W); `routes` default to the uniform routes and the largest. Widths that none of them
    runs keep their statistics. The network is left in evaluation mode. Where several processes
    run, each brings batches of its own and the averages go over all of them.

    Raises:
        TrainingError: if there are no batches; all statistics stay as they were.
    """
    norms = [module for module in net.modules() if isinstance(module, SlimBatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    chosen = (*net.spec.routes, net.spec.largest) if routes is None else tuple(routes)
    before = [{k: v.clone() for k, v in norm.named_buffers()} for norm in norms]
    count = 0
    net.train()
    try:
        for norm in norms:
            norm.reset_statistics()
            norm.momentum = None  # cumulative average
        for x in batches:
            count += 1
            net.forward_many(x, chosen)
            if on_batch is not None:
                on_batch()
        counts = gather(count)
        if sum(counts):
            # each process's average by its share of the batches, so that the mean is over batches
            share = count * len(counts) / sum(counts)
            statistics = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
            torch._foreach_mul_(statistics, share)
            average_(statistics)
    finally:
        net.eval()
        for norm, momentum, old in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            untouched = norm.num_batches_tracked == 0
            for name, buffer in norm.named_buffers():
                buffer[untouched] = old[name][untouched]
    if not count:
        raise TrainingError("recalibrate: no batches to take statistics from")
