"""Experimental gates: small heads on stored features, to compare possible inputs of a gate.

The network's own gate is one linear layer on hidden features that are shared with attention. These
heads take any features, have an optional hidden layer, and minimise the same loss: the mean of
Σ p(route) · (loss + weight · cost). They are not part of the runtime.

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
"""Weight of the entropy of the choices, as a share of the spread of loss + cost (as in recipes)."""
DECAY = 1e-3
BISECTIONS = 9


@dataclass(frozen=True)
class Head:
    """A fitted head: maps features, standardised first, to logits over routes."""

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
    """Fit a head that minimises the expected loss plus `cost_weight` times cost / largest cost.

    `hidden` is the number of units of its hidden layer; 0 for none. It is fitted by L-BFGS in two
    passes, the first with a larger weight of the entropy. Deterministic for a given seed and number
    of threads.
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
            total: Tensor = (logs.exp() * (prices + weight * logs)).sum(1).mean()
            total = total + DECAY / 2 * sum(p.square().sum() for p in parameters if p.ndim > 1)
            torch.autograd.backward(total)
            return total

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Head(module.eval(), mean, deviation, cost_weight)


def fit_to_cost(
    fit_weight: Callable[[float], Head],
    features_NF: Floats,
    costs_R: list[float],
    target: float,
) -> Head:
    """The head whose argmax on these images costs just below `target` times the largest cost.

    `fit_weight` fits a head for a cost weight; the weight is bisected on a log scale.
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
