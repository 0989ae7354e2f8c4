"""Fit gates to the exact expected loss, from cached losses along every route.

In stage II the supernet is frozen, so each image's loss along every route and the features that
every gate reads there are computed once (`dynaslim.train.route_cache`). The gates then minimise the
mean over images of

    sum over paths of  probability(path) * (loss(path) + cost_weight * cost(path) / widest cost)

This has no sampling noise and does not run the network. It is a smooth function of the slimming
heads alone, which L-BFGS minimises over the whole cache. By itself it tends to saturate, with one
or two paths for all images. Therefore the entropy of the paths is rewarded, strongly at first and
weakly at the end. The paper trains on samples instead (arXiv 2103.13258, section 3.3;
`dynaslim.train.step.gate_step`).

If not all paths are cached, a gate's probabilities are renormalised over the options that lead to
a cached path, and its argmax is taken among these. An image that the network would send along
another path then counts as taking the cached option with the highest logit.

Suffixes: N images, P paths, Q prefixes, K options of a gate, R hidden features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dynaslim.cost import CostTable
from dynaslim.errors import TrainingError, check
from dynaslim.nn.net import ElasticNet
from dynaslim.recipes import ExpectedRecipe, SgsRecipe
from dynaslim.train.losses import sgs_target, sgs_weights
from dynaslim.train.route_cache import RouteCache

TARGET_TOLERANCE: Final = 0.002
"""The search ends if the mean cost is below the target by at most this share of the target."""
LARGEST_WEIGHT: Final = 8.0**5
SMALLEST_WEIGHT: Final = 8.0**-5


class FitResult(NamedTuple):
    """The results of argmax gates on a cache: means over its rows."""

    loss: float
    accuracy: float
    mean_cost: float
    shares: tuple[float, ...]
    """Share of the rows on each of the cache's paths."""


@dataclass(frozen=True)
class GateFit:
    """Fitted slimming heads, one (K, R) for each gate, and their results.

    `loss` (nats), `accuracy` (0..1) and `mean_cost` (the table's unit) are for argmax gates, on
    the held-out cache if there was one. `expected_loss` and `expected_cost` are expectations under
    the gates' probabilities, on the cache that was fitted.
    """

    heads: tuple[Tensor, ...]
    cost_weight: float
    loss: float
    accuracy: float
    mean_cost: float
    expected_loss: float
    expected_cost: float


# -- the objective ---------------------------------------------------------------------------------


class _Decisions(NamedTuple):
    logits: list[Tensor]
    """Slimming logits (Q, K, N) of every gate."""
    reach: list[Tensor]
    """Log-probabilities (Q, N) of the prefixes of each length; the last ones are those of paths."""


def _decide(cache: RouteCache, heads: Sequence[Tensor], rows: slice) -> _Decisions:
    first = heads[0]
    logits: list[Tensor] = []
    reach = [first.new_zeros(1, len(cache.labels[rows]))]
    for head_KR, features, child_QK in zip(heads, cache.features, cache.children, strict=True):
        logits_QKN = head_KR @ features[:, rows].to(head_KR.dtype).mT
        logits.append(logits_QKN)
        masked = logits_QKN.masked_fill(child_QK[:, :, None] < 0, -math.inf)
        reach_QKN = reach[-1][:, None] + masked.log_softmax(1)
        # row-major, the cached children are in the order of the next prefixes
        kept = (child_QK.flatten() >= 0).nonzero()[:, 0]
        reach.append(reach_QKN.flatten(0, 1).index_select(0, kept))
    return _Decisions(logits, reach)


def path_probabilities(
    cache: RouteCache, heads: Sequence[Tensor], rows: slice = slice(None)
) -> Tensor:
    """Probability (N, P) that softmax gates send a row along each cached path; differentiable."""
    return _decide(cache, heads, rows).reach[-1].exp().T


class ExpectedObjective:
    """The objective of `fit_gate` without weight decay; differentiable in the heads.

    The mean over rows of the expected loss, plus `cost_weight` times the expected cost as a share
    of the widest route's, minus `entropy_weight` times the entropy (nats) of path probabilities,
    plus `sgs_weight` times the SGS loss, for which only `hard` and `easy_share` of `sgs` are used.
    A call returns the contribution of some rows; those of all rows sum to the objective.
    """

    def __init__(
        self,
        cache: RouteCache,
        table: CostTable,
        cost_weight: float,
        sgs_weight: float,
        sgs: SgsRecipe,
    ) -> None:
        self.cache, self.sgs_weight = cache, sgs_weight
        shares_P = (cache.path_costs(table) / table.widest_cost).float()
        self.prices_PN = (cache.losses_NP + cost_weight * shares_P).T.contiguous()
        spread_PN = self.prices_PN - self.prices_PN.mean(0)
        self.spread = float(spread_PN.double().square().mean().sqrt())
        if sgs_weight > 0:
            self.easy_N = cache.correct_NP[:, 0]
            self.hopeless_N = ~cache.correct_NP[:, -1] if sgs.hard == "give_up" else None
            self.weights_N = sgs_weights(self.easy_N, sgs.easy_share, self.hopeless_N)

    def __call__(self, heads: Sequence[Tensor], rows: slice, entropy_weight: float) -> Tensor:
        decided = _decide(self.cache, heads, rows)
        log_PN = decided.reach[-1]
        prices_PN = self.prices_PN[:, rows] + entropy_weight * log_PN
        total = (log_PN.exp() * prices_PN).sum() / len(self.cache.labels)
        if self.sgs_weight > 0:
            total = total + self.sgs_weight * self._sgs(decided, rows)
        return total

    def _sgs(self, decided: _Decisions, rows: slice) -> Tensor:
        easy_N, weights_N = self.easy_N[rows], self.weights_N[rows]
        hopeless_N = None if self.hopeless_N is None else self.hopeless_N[rows]
        total = decided.logits[0].new_zeros(())
        for logits_QKN, reach_QN in zip(decided.logits, decided.reach, strict=False):
            prefixes, options, images = logits_QKN.shape
            target_QN = sgs_target(easy_N, options, hopeless_N).expand(prefixes, images)
            wrong_QN = F.cross_entropy(logits_QKN, target_QN, reduction="none")
            # detached, because images must not be routed to where a gate is right anyway
            arriving_QN = reach_QN.detach().exp() * weights_N.to(reach_QN.dtype)
            total = total + (arriving_QN * wrong_QN).sum()
        return total / len(decided.logits)


# -- fitting ---------------------------------------------------------------------------------------


def fit_gate(
    cache: RouteCache,
    table: CostTable,
    *,
    cost_weight: float,
    recipe: ExpectedRecipe,
    sgs: SgsRecipe | None = None,
    holdout: RouteCache | None = None,
) -> GateFit:
    """Slimming heads that minimise `ExpectedObjective` at a cost weight, by L-BFGS.

    The entropy weight decreases in steps to `recipe.entropy` times the spread of the prices (loss
    plus weighted cost) between the paths. Heads are fitted to features divided by their deviation,
    which is folded into the heads at the end. Deterministic for a given number of threads.

    Raises:
        UsageError: if the table is for another network.
        TrainingError: if the objective becomes infinite or not a number.
    """
    objective = ExpectedObjective(cache, table, cost_weight, recipe.sgs_weight, sgs or SgsRecipe())
    scales, chunks = cache.deviations, cache.chunks()
    scaled = [
        torch.zeros(len(gate.choices), len(scale_R), requires_grad=True)
        for gate, scale_R in zip(cache.spec.gates, scales, strict=True)
    ]
    entropy_weight = 0.0

    def evaluate() -> float:
        for head in scaled:
            head.grad = None
        total = 0.0
        for rows in chunks:
            heads = [v / s for v, s in zip(scaled, scales, strict=True)]
            part = objective(heads, rows, entropy_weight)
            torch.autograd.backward(part)
            total += part.item()
        decay = recipe.weight_decay / 2 * torch.stack([v.square().sum() for v in scaled]).sum()
        torch.autograd.backward(decay)
        total += decay.item()
        if not math.isfinite(total):
            raise TrainingError(f"cost weight {cost_weight:g}: the gates' objective is {total}")
        return total

    # falls to recipe.entropy by factors of about 3; if that is 0, from 0.03, which hardly counts
    falling = [entropy for entropy in (1.0, 0.3, 0.1, 0.03) if entropy > recipe.entropy]
    for entropy in (*falling, recipe.entropy):
        entropy_weight = entropy * objective.spread
        optimizer = torch.optim.LBFGS(
            scaled,
            max_iter=recipe.iterations,
            tolerance_grad=1e-6,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(evaluate)  # type: ignore[no-untyped-call]
    heads = [v.detach() / s for v, s in zip(scaled, scales, strict=True)]
    return _gate_fit(cache, holdout, heads, table, cost_weight)


def _gate_fit(
    cache: RouteCache,
    holdout: RouteCache | None,
    heads: Sequence[Tensor],
    table: CostTable,
    cost_weight: float,
) -> GateFit:
    costs_P, losses_NP = cache.path_costs(table), cache.losses_NP
    loss = cost = 0.0
    for rows in cache.chunks():
        chances_NP = path_probabilities(cache, heads, rows).double()
        loss += float((chances_NP * losses_NP[rows]).sum())
        cost += float((chances_NP @ costs_P).sum())
    result = evaluate_fit(holdout or cache, heads, table)
    return GateFit(
        tuple(heads),
        cost_weight,
        result.loss,
        result.accuracy,
        result.mean_cost,
        loss / len(losses_NP),
        cost / len(losses_NP),
    )


def fit_to_target(
    cache: RouteCache,
    table: CostTable,
    target_cost: float,
    recipe: ExpectedRecipe,
    *,
    sgs: SgsRecipe | None = None,
    holdout: RouteCache | None = None,
) -> GateFit:
    """Fit gates whose argmax has a mean cost of `target_cost` (the table's unit) or just below.

    The cost is measured on `holdout`, or on the cache if there is none. Cost weights are bisected
    on a log scale. Every fit has the same start, so that it depends on its weight alone. The mean
    cost can jump between two weights, however close. Finally, therefore, the heads of the nearest
    fits above and below the target are interpolated, also by bisection: the logits move along a
    straight line, and images change their paths one by one.

    The result costs less than the target if a cost weight of 0 does (a higher cost would not lower
    the loss), or if images that no gate can distinguish would have to be separated.

    Raises:
        UsageError: if the target is outside the range of the cached routes' costs.
        TrainingError: as `fit_gate`.
    """
    costs_P = (holdout or cache).path_costs(table)
    low, high = float(costs_P.min()), float(costs_P.max())
    check(
        low * (1 - 1e-9) <= target_cost <= high * (1 + 1e-9),
        f"target {target_cost:g} {table.unit}: out of reach, the routes that the gates of "
        f"{cache.spec.name} can take cost {low:g} to {high:g} {table.unit}",
    )

    def fit(weight: float) -> GateFit:
        return fit_gate(cache, table, cost_weight=weight, recipe=recipe, sgs=sgs, holdout=holdout)

    # bracket the target: `wide` costs more, `narrow` at most as much
    wide = fit(0.0)
    if wide.mean_cost <= target_cost:
        return wide
    narrow = _gate_fit(cache, holdout, _all_first(cache), table, math.inf)
    weight, halvings = 1.0, 0
    while halvings < recipe.bisections and SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:
        found = fit(weight)
        if found.mean_cost > target_cost:
            wide = found
        else:
            narrow = found
        if target_cost * (1 - TARGET_TOLERANCE) <= found.mean_cost <= target_cost:
            return found
        # from 1 outwards until two weights bracket the target
        if wide.cost_weight == 0:
            weight /= 8
        elif narrow.cost_weight == math.inf:
            weight *= 8
        else:
            weight = math.sqrt(wide.cost_weight * narrow.cost_weight)
            halvings += 1
    return _mix(cache, holdout, wide, narrow, table, target_cost)


def _mix(
    cache: RouteCache,
    holdout: RouteCache | None,
    wide: GateFit,
    narrow: GateFit,
    table: CostTable,
    target_cost: float,
) -> GateFit:
    """Interpolate from the heads of `narrow` to those of `wide` as far as the target allows."""
    share, step, heads = 0.0, 0.5, narrow.heads
    for _ in range(24):
        pairs = zip(narrow.heads, wide.heads, strict=True)
        tried = tuple(torch.lerp(a, b, share + step) for a, b in pairs)
        if evaluate_fit(holdout or cache, tried, table).mean_cost <= target_cost:
            share, heads = share + step, tried
        step /= 2
    ends = wide.cost_weight, narrow.cost_weight
    weight = ends[0] if ends[1] == math.inf else share * ends[0] + (1 - share) * ends[1]
    return _gate_fit(cache, holdout, heads, table, weight)


def _all_first(cache: RouteCache) -> list[Tensor]:
    """Heads that always take the first option, since hidden features are never negative."""
    heads = [
        torch.zeros(len(gate.choices), features.shape[2])
        for gate, features in zip(cache.spec.gates, cache.features, strict=True)
    ]
    for head in heads:
        head[0] = 1.0
    return heads


# -- results of fitted gates -----------------------------------------------------------------------


def argmax_paths(cache: RouteCache, heads: Sequence[Tensor]) -> Tensor:
    """Index (N,) in `cache.paths` of the path that the highest logits select, as in `Engine`.

    Options that lead to no cached path are ignored.
    """
    at_N = torch.zeros(len(cache.labels), dtype=torch.int64)
    for head_KR, features, child_QK in zip(heads, cache.features, cache.children, strict=True):
        parts = []
        for rows in cache.chunks():
            here = at_N[rows]
            features_NR = features[:, rows][here, torch.arange(len(here))]
            logits_NK = features_NR.to(head_KR.dtype) @ head_KR.T
            child_NK = child_QK[here]
            picks_N = logits_NK.masked_fill(child_NK < 0, -math.inf).argmax(1)
            parts.append(child_NK.gather(1, picks_N[:, None])[:, 0])
        at_N = torch.cat(parts)
    return at_N


def evaluate_fit(cache: RouteCache, heads: Sequence[Tensor], table: CostTable) -> FitResult:
    """Mean loss, accuracy, mean cost and route shares of argmax gates on a cache's rows.

    Raises:
        UsageError: if the table is for another network.
    """
    path_N = argmax_paths(cache, heads)
    chosen_N1 = path_N[:, None]
    counts_P = torch.bincount(path_N, minlength=len(cache.paths)).double()
    shares_P = counts_P / len(path_N)
    return FitResult(
        float(cache.losses_NP.gather(1, chosen_N1).mean(dtype=torch.float64)),
        float(cache.correct_NP.gather(1, chosen_N1).double().mean()),
        float(counts_P @ cache.path_costs(table)) / len(path_N),
        tuple(shares_P.tolist()),
    )


@torch.no_grad()
def apply_heads(net: ElasticNet, heads: Sequence[Tensor]) -> None:
    """Copy slimming heads (K, R), one for each gate, into a network.

    Raises:
        UsageError: if their number or shapes do not fit the network.
    """
    own = net.slimming_parameters()
    shapes, needed = [tuple(h.shape) for h in heads], [tuple(h.shape) for h in own]
    check(shapes == needed, f"heads of shapes {shapes}: {net.spec.name} needs {needed}")
    for parameter, head in zip(own, heads, strict=True):
        parameter.copy_(head)
