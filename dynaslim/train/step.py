"""One optimizer step of each stage, testable without a loop.

Suffixes: B rows, C channels, H W pixels, N classes, K choices of a gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from dynaslim.cost import CostTable
from dynaslim.errors import TrainingError
from dynaslim.nn.functional import gumbel_one_hot
from dynaslim.nn.net import SlimNet
from dynaslim.train.losses import cost_loss, ensemble_target, sgs_loss, soft_cross_entropy
from dynaslim.train.sampling import Sandwich


class SupernetLosses(NamedTuple):
    """Losses of the passes of one stage-I step."""

    largest: float
    randoms: tuple[float, ...]
    smallest: float


class GateLosses(NamedTuple):
    """Terms of one stage-II step, before their weights, and the mean MAdds of its routes."""

    classification: float
    sgs: float
    cost: float
    mean_madds: float


def make_teacher(net: SlimNet, decay: float) -> AveragedModel:
    """The EMA network: parameters and BN statistics averaged, always in evaluation mode.

    The decay warms up, (1 + t) / (10 + t), so that a short run's average is not its beginning.
    """

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        if not averaged[0].is_floating_point():  # BN's batch counters
            for ours, theirs in zip(averaged, current, strict=True):
                ours.copy_(theirs)
            return
        steps = int(count)
        weight = 1.0 - min(decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(averaged), list(current), weight)

    teacher = AveragedModel(net, multi_avg_fn=update, use_buffers=True)
    teacher.requires_grad_(False)
    return teacher.eval()


def supernet_step(
    net: SlimNet,
    teacher: AveragedModel,
    optimizer: torch.optim.Optimizer,
    x_BCHW: Tensor,
    labels_B: Tensor,
    routes: Sandwich,
    *,
    label_smoothing: float,
    dropout: float,
    generator: torch.Generator | None,
    step: int,
) -> SupernetLosses:
    """Sandwich step with in-place ensemble bootstrapping (arXiv 2103.13258, section 3.2).

    The largest learns the labels; random routes learn the EMA network's largest; the smallest
    learns the mean of the EMA network's probabilities along the largest and the random routes.
    Gradients of all passes add up, then the optimizer steps once and the EMA follows.

    Raises:
        TrainingError: if a loss is not finite; the optimizer has not stepped.
    """
    averaged = teacher.module
    assert isinstance(averaged, SlimNet)
    with torch.no_grad():
        teacher_logits = averaged.forward_many(x_BCHW, (routes.largest, *routes.randoms))
        target_largest = teacher_logits[0].softmax(1)
        target_ensemble = ensemble_target(teacher_logits)
    optimizer.zero_grad()

    mask = dropout_mask(net, len(x_BCHW), dropout, generator, x_BCHW.device)
    logits = net(x_BCHW, routes.largest, dropout_mask=mask)
    loss = F.cross_entropy(logits, labels_B, label_smoothing=label_smoothing)
    largest = _finite(loss, "the largest network", step)
    torch.autograd.backward(loss)

    # the other routes share their trunk, so they run together and go backward as one sum
    *random_logits, smallest_logits = net.forward_many(x_BCHW, (*routes.randoms, routes.smallest))
    losses = [soft_cross_entropy(logits, target_largest) for logits in random_logits]
    losses.append(soft_cross_entropy(smallest_logits, target_ensemble))
    names = [f"route {route}" for route in (*routes.randoms, routes.smallest)]
    values = [_finite(loss, name, step) for loss, name in zip(losses, names, strict=True)]
    torch.autograd.backward(losses)

    optimizer.step()
    teacher.update_parameters(net)
    return SupernetLosses(largest, tuple(values[:-1]), values[-1])


def dropout_mask(
    net: SlimNet,
    rows: int,
    dropout: float,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor | None:
    """Inverted dropout for the pooled features of the largest network (rows, channels), or None."""
    if dropout == 0:
        return None
    channels = net.spec.stages[-1].widths[-1]
    kept = torch.rand(rows, channels, generator=generator).to(device) >= dropout
    return kept / (1 - dropout)


def _finite(loss: Tensor, what: str, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: the loss of {what} is {value}; try a lower learning rate or a longer "
            f"warm-up, and look at the data if it persists"
        )
    return value


def gate_step(
    net: SlimNet,
    optimizer: torch.optim.Optimizer,
    x_BCHW: Tensor,
    labels_B: Tensor,
    table: CostTable,
    *,
    easy_share: float | None,
    sgs_weight: float,
    cost_weight: float,
    cost_scale: float,
    tau: float,
    generator: torch.Generator | None,
    step: int,
) -> GateLosses:
    """Sandwich gate sparsification with Gumbel-softmax gates (arXiv 2103.13258, section 3.3).

    `net` is in evaluation mode and only its slimming heads require gradients. `cost_scale` is in
    the unit of `table`.

    Raises:
        TrainingError: if a loss is not finite; the optimizer has not stepped.
    """
    with torch.no_grad():
        easy_B = net(x_BCHW, net.spec.cheapest_choice).argmax(1) == labels_B
    out = net.forward_gated(x_BCHW, lambda logits_BK, _: gumbel_one_hot(logits_BK, tau, generator))
    classification = F.cross_entropy(out.logits, labels_B)
    sgs = sgs_loss(out.gate_logits, easy_B, easy_share=easy_share)
    madds_B = table.expected(out.gates)
    cost = cost_loss(madds_B, cost_scale)
    optimizer.zero_grad()
    loss = classification + sgs_weight * sgs + cost_weight * cost
    _finite(loss, "the gates", step)
    torch.autograd.backward(loss)
    optimizer.step()
    return GateLosses(
        float(classification.detach()),
        float(sgs.detach()),
        float(cost.detach()),
        float(madds_B.detach().mean()),
    )


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups: decay on weights of two or more dimensions, none on BN and biases."""
    decayed = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in net.parameters() if p.requires_grad and p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
