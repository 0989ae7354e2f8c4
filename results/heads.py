"""Gates beside the network: small heads on stored features, to compare what a gate could see.

The network's own gate is one linear layer on hidden features that attention shaped. These heads
read any features, with or without a hidden layer of their own, and minimise the same loss: the
mean of Σ p(route) · (loss + weight · cost). No part of the runtime; nothing here is exported.

Suffixes: N images, F features, R routes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Floats = npt.NDArray[np.floating]
ENTROPY = 0.3
"""Weight of the entropy of the choices, as a share of the spread of the prices, as in recipes."""
DECAY = 1e-3
BISECTIONS = 9


@dataclass(frozen=True)
class Head:
    """A fitted head: features, made to mean 0 and deviation 1, to logits over routes."""

    module: nn.Module
    mean_F: Tensor
    deviation_F: Tensor
    cost_weight: float

    @torch.no_grad()
    def __call__(self, features_NF: Floats) -> npt.NDArray[np.float32]:
        """Logits (N, R)."""
        x = (torch.as_tensor(features_NF, dtype=torch.float32) - self.mean_F) / self.deviation_F
        logits: npt.NDArray[np.float32] = self.module(x).numpy()
        return logits


def fit(
    features_NF: Floats,
    losses_NR: Floats,
    costs_R: list[float],
    *,
    cost_weight: float,
    hidden: int = 0,
    seed: int = 0,
    iterations: int = 60,
) -> Head:
    """A head that minimises the expected loss plus `cost_weight` times cost / dearest cost.

    With `hidden` it has a hidden layer of so many units. L-BFGS, the entropy's weight falling in
    steps; deterministic for a seed and a number of threads.
    """
    torch.manual_seed(seed)
    x = torch.as_tensor(features_NF, dtype=torch.float32)
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / deviation
    shares = torch.tensor(costs_R, dtype=torch.float32) / max(costs_R)
    prices = torch.as_tensor(losses_NR, dtype=torch.float32) + cost_weight * shares
    spread = float((prices - prices.mean(1, keepdim=True)).square().mean().sqrt())
    routes = prices.shape[1]
    module: nn.Module
    if hidden:
        module = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, routes))
    else:
        module = nn.Linear(x.shape[1], routes)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    parameters = list(module.parameters())
    for entropy in (1.0, ENTROPY):
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=iterations, line_search_fn="strong_wolfe"
        )

        def closure(
            weight: float = entropy * spread, optimizer: torch.optim.LBFGS = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            logs = module(x).log_softmax(1)
            total = (logs.exp() * (prices + weight * logs)).sum(1).mean()
            total = total + DECAY / 2 * sum(p.square().sum() for p in parameters if p.ndim > 1)
            total.backward()
            return total

        optimizer.step(closure)
    return Head(module.eval(), mean, deviation, cost_weight)


def fit_to_cost(
    fit_weight: Callable[[float], Head],
    features_NF: Floats,
    costs_R: list[float],
    target: float,
) -> Head:
    """The head whose argmax costs at most `target` of the dearest on these images, and near it.

    `fit_weight` fits one for a cost weight; the weight is bisected on a log scale.
    """
    costs, limit = np.asarray(costs_R), target * max(costs_R)
    low, high = 1e-3, 64.0
    best = fit_weight(high)
    for _ in range(BISECTIONS):
        weight = float(np.sqrt(low * high))
        head = fit_weight(weight)
        if costs[head(features_NF).argmax(1)].mean() <= limit:
            best, high = head, weight
        else:
            low = weight
    return best
