"""One optimizer step of each stage, as functions that can be tested without a loop.

Suffixes: B rows, C channels, H W pixels, N classes, K choices of a gate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from dynaslim.cost import CostTable
from dynaslim.distributed import average_, rank, world_size
from dynaslim.errors import TrainingError
from dynaslim.graph import AnySpec
from dynaslim.nn.functional import gumbel_one_hot, straight_through_one_hot
from dynaslim.nn.net import ElasticNet, RunSegment, SlimNet
from dynaslim.recipes import SgsRecipe, Target
from dynaslim.spec import Route
from dynaslim.train.losses import (
    cost_loss,
    ensemble_target,
    labelled_first,
    sgs_loss,
    supernet_loss,
)


class Sandwich(NamedTuple):
    """The sub-networks of one stage-I step (sandwich rule, arXiv 1903.05134)."""

    largest: Route
    randoms: tuple[Route, ...]
    smallest: Route | None
    """None if the largest is trained alone."""

    @property
    def narrow(self) -> tuple[Route, ...]:
        return self.randoms if self.smallest is None else (*self.randoms, self.smallest)


def sandwich_routes(spec: AnySpec, rng: random.Random, randoms: int = 2) -> Sandwich:
    """The largest, `randoms` different random routes and the smallest.

    Random routes draw every gate's width index uniformly (arXiv 2103.13258 draws from the second
    width up). They are never the smallest, and never the largest if that is a route: it learns the
    labels, and would otherwise learn its own prediction. If there are fewer routes between the two,
    all are taken.
    """
    gates, widths = len(spec.gates), spec.num_widths
    # a combination is a number in base `widths`: 0 is the smallest route, the last the widest
    between = range(1, widths**gates - (0 if spec.has_separate_teacher else 1))
    routes = []
    for number in rng.sample(between, min(randoms, len(between))):
        digits = [number // widths**gate % widths for gate in range(gates)]
        routes.append(spec.route_at(digits))
    return Sandwich(spec.largest, tuple(routes), spec.smallest)


class SupernetLosses(NamedTuple):
    """Losses of the passes of one stage-I step."""

    largest: float
    randoms: tuple[float, ...]
    smallest: float
    """Equal to `largest` if that is trained alone."""


class GateLosses(NamedTuple):
    """Unweighted loss terms of one stage-II step, and the mean cost of its routes.

    `mean_cost` is in the unit of the cost table.
    """

    classification: float
    sgs: float
    cost: float
    mean_cost: float


def supernet_step(
    net: ElasticNet,
    teacher: AveragedModel,
    optimizer: torch.optim.Optimizer,
    x_BCHW: Tensor,
    labels: Tensor,
    routes: Sandwich,
    *,
    target: Target = "ensemble",
    outside_BN: Tensor | None = None,
    soft_weight: float = 1.0,
    label_weight: float = 0.0,
    label_smoothing: float,
    dropout: float,
    generator: torch.Generator | None,
    step: int,
    accumulate: int = 1,
    clip_norm: float | None = None,
    bf16: bool = False,
    run_segment: RunSegment | None = None,
    after_trunk: bool = False,
) -> SupernetLosses:
    """One step by the sandwich rule, with in-place ensemble bootstrapping by default.

    The largest learns the labels: classes (B,), or probabilities (B, N) for mixed images. The
    others learn the probabilities that `target` names (see `SupernetRecipe`). With "ensemble"
    (arXiv 2103.13258, section 3.2), random routes learn the EMA network's prediction along the
    largest route, and the smallest learns the mean of the EMA network's probabilities along the
    largest and the random routes. If `outside_BN` is given, all routes, including the largest,
    learn these probabilities. `soft_weight` multiplies the cross-entropy against probabilities and
    `label_weight` the added one against labels. Routes without probabilities learn the labels at
    weight 1.

    Gradients of all passes accumulate over `accumulate` consecutive parts of the batch. They are
    averaged once over all processes, together with the BN statistics. Then the optimizer steps once
    and the EMA is updated. `run_segment` replaces `net.segment` (e.g. compiled). With `after_trunk`
    x_BCHW holds the trunk's features, and the trunk is not trained.

    Raises:
        TrainingError: if a loss is not finite on any process; the optimizer has not stepped.
    """
    averaged = teacher.module
    assert isinstance(averaged, ElasticNet)
    narrow = routes.narrow
    # a part of the mask of all processes, so that their number does not change the dropout
    mask = dropout_mask(net, len(x_BCHW), dropout, generator, x_BCHW.device)
    autocast = torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=bf16)
    totals = torch.zeros(1 + len(narrow), device=x_BCHW.device)
    optimizer.zero_grad()
    for rows in torch.arange(len(x_BCHW)).tensor_split(accumulate):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        x, y, share = x_BCHW[part], labels[part], len(rows) / len(x_BCHW)
        learn = partial(
            supernet_loss,
            labels=y,
            soft_weight=soft_weight,
            label_weight=label_weight,
            label_smoothing=label_smoothing,
        )
        with torch.no_grad(), autocast:
            targets = _teacher_targets(
                partial(averaged.forward_many, x, after_trunk=after_trunk),
                routes,
                target,
                None if outside_BN is None else outside_BN[part],
                soft_weight,
            )
        kept = None if mask is None else mask[part]
        if target == "distillation" and kept is not None:
            # also without dropout, as the target of the other routes
            kept = torch.stack([kept, torch.ones_like(kept)])
        with autocast:
            (logits,) = net.forward_many(
                x,
                (routes.largest,),
                dropout_mask=kept,
                run_segment=run_segment,
                after_trunk=after_trunk,
            )
        logits, whole = logits if logits.ndim == 3 else (logits, logits)
        if target == "distillation" and outside_BN is None:
            targets[1:] = [whole.detach().float().softmax(1)] * len(narrow)
        loss = learn(logits, targets[0]) * share
        totals[0] += loss.detach()
        torch.autograd.backward(loss)
        if not narrow:
            continue
        # the other routes share their trunk, so they run together, with one backward pass
        with autocast:
            all_logits = net.forward_many(
                x, narrow, run_segment=run_segment, after_trunk=after_trunk
            )
        losses = [learn(z, soft) * share for z, soft in zip(all_logits, targets[1:], strict=True)]
        totals[1:] += torch.stack(losses).detach()
        torch.autograd.backward(losses)

    parameters = [p for p in net.parameters() if p.grad is not None]
    statistics = [b for b in net.buffers() if b.is_floating_point()]
    average_([totals, *(p.grad for p in parameters if p.grad is not None), *statistics])
    # read once, after all passes: on a GPU every read waits for the running kernels
    largest, *others = totals.tolist()
    names = ["the largest network", *(f"route {route}" for route in narrow)]
    for name, value in zip(names, (largest, *others), strict=True):
        _check_finite(value, name, step)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    teacher.update_parameters(net)
    return SupernetLosses(largest, tuple(others[:-1]), others[-1] if others else largest)


def _teacher_targets(
    answer: Callable[[Sequence[Route]], list[Tensor]],
    routes: Sandwich,
    target: Target,
    outside_BN: Tensor | None,
    soft_weight: float,
) -> list[Tensor | None]:
    """Probabilities that the largest and each other route learn; None for labels alone.

    `answer` returns the averaged network's logits along several routes.
    """
    learners = 1 + len(routes.narrow)
    if soft_weight == 0:
        return [None] * learners
    if outside_BN is not None:
        return [outside_BN] * learners
    if target not in ("bootstrap", "ensemble") or not routes.narrow:
        return [None] * learners
    chosen = (routes.largest, *routes.randoms) if target == "ensemble" else (routes.largest,)
    logits = [z.float() for z in answer(chosen)]
    return [None, *[logits[0].softmax(1)] * len(routes.randoms), ensemble_target(logits)]


def dropout_mask(
    net: ElasticNet,
    rows: int,
    dropout: float,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor | None:
    """Inverted dropout mask (rows, channels) for the largest network's pooled features, or None.

    `rows` is the number of rows of this process, which uses its part of a mask for all processes.
    """
    if dropout == 0:
        return None
    channels = net.spec.features
    everyone = torch.rand(rows * world_size(), channels, generator=generator)
    kept = everyone[rows * rank() : rows * (rank() + 1)].to(device) >= dropout
    return kept / (1 - dropout)


def _check_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: the loss of {what} is {value}; try a lower learning rate or a longer "
            f"warm-up, and look at the data if it persists"
        )


def gate_step(
    net: ElasticNet,
    optimizer: torch.optim.Optimizer,
    x_BCHW: Tensor,
    labels_B: Tensor,
    table: CostTable,
    recipe: SgsRecipe,
    *,
    cost_scale: float,
    generator: torch.Generator | None,
    step: int,
    clip_norm: float | None = None,
    bf16: bool = False,
) -> GateLosses:
    """Sandwich gate sparsification with Gumbel-softmax gates (arXiv 2103.13258, section 3.3).

    `net` is in evaluation mode and only its slimming heads require gradients. `cost_scale` is in
    the unit of `table`. Gradients are averaged over the processes of the run.

    Raises:
        TrainingError: if a loss is not finite on any process; the optimizer has not stepped.
    """

    def choose(logits_BK: Tensor, _: int) -> Tensor:
        if recipe.gumbel:
            return gumbel_one_hot(
                logits_BK.float(), recipe.tau, generator, part=rank(), parts=world_size()
            )
        return straight_through_one_hot(logits_BK.float(), recipe.tau)

    assert isinstance(net, SlimNet)
    spec, heads = net.spec, net.slimming_parameters()
    with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=bf16):
        hopeless_B = None
        with torch.no_grad():
            if recipe.hard == "give_up":
                cheapest, widest = net.forward_many(
                    x_BCHW, (spec.cheapest_choice, spec.widest_choice)
                )
                hopeless_B = widest.argmax(1) != labels_B
            else:
                cheapest = net(x_BCHW, spec.cheapest_choice)
            easy_B = cheapest.argmax(1) == labels_B
        out = net.forward_gated(x_BCHW, choose)
    gate_logits = [logits.float() for logits in out.gate_logits]
    classification = F.cross_entropy(
        out.logits.float(), labels_B, label_smoothing=recipe.label_smoothing
    )
    # terms that are not means over images need numbers from all processes before the gradient
    first_B = labelled_first(easy_B, hopeless_B)
    counts = torch.stack([first_B.sum(), (~first_B).sum()]).to(classification.dtype)
    mean_cost = table.expected(out.gates).mean()
    everywhere = mean_cost.detach().clone()
    average_([counts, everywhere])
    sgs = sgs_loss(
        gate_logits,
        easy_B,
        easy_share=recipe.easy_share,
        hopeless_B=hopeless_B,
        counts=counts,
        label_smoothing=recipe.label_smoothing,
    )
    cost = cost_loss(everywhere, cost_scale)
    optimizer.zero_grad()
    torch.autograd.backward(
        recipe.class_weight * classification
        + recipe.sgs_weight * sgs
        # the gradient of the square at the mean over all processes
        + recipe.cost_weight * (2 * everywhere / cost_scale**2) * mean_cost
    )
    totals = torch.stack([classification, sgs, cost, mean_cost]).detach()
    average_([totals, *(head.grad for head in heads if head.grad is not None)])
    losses = GateLosses(*totals.tolist())
    for name, value in losses._asdict().items():
        _check_finite(value, f"the gates ({name})", step)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(heads, clip_norm)
    optimizer.step()
    return losses


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    """Optimizer groups: weight decay on tensors of two or more dimensions, not on BN and biases."""
    every = list(parameters)
    return [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]
