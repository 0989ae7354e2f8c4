"""BN recalibration: fresh running statistics for every width after supernet training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

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
    (B, C, H, W); `routes` default to the uniform routes and the largest. The network is left in
    evaluation mode.
    """
    norms = [module for module in net.modules() if isinstance(module, SlimBatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    chosen = (*net.spec.routes, net.spec.largest) if routes is None else tuple(routes)
    for norm in norms:
        norm.reset_statistics()
        norm.momentum = None  # cumulative average
    net.train()
    try:
        for x in batches:
            net.forward_many(x, chosen)
            if on_batch is not None:
                on_batch()
    finally:
        net.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
