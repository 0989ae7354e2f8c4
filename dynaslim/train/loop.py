"""The two stages over a data set in memory; the loops know no loss, only steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from dynaslim.cost import CostTable, madds
from dynaslim.data.memory import MemoryImages
from dynaslim.data.transforms import Augment, normalise
from dynaslim.errors import TrainingError, UsageError
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.train.calibrate import recalibrate
from dynaslim.train.recipe import GateRecipe, SupernetRecipe
from dynaslim.train.sampling import sandwich_routes, step_seed
from dynaslim.train.step import (
    GateLosses,
    SupernetLosses,
    gate_step,
    make_teacher,
    parameter_groups,
    supernet_step,
)

OnStep = Callable[[int, int, SupernetLosses | GateLosses], None]
"""Called after each step with (steps done, steps in all, its losses)."""


def train_supernet(
    net: SlimNet,
    images: MemoryImages,
    preprocessing: Preprocessing,
    recipe: SupernetRecipe,
    *,
    on_step: OnStep | None = None,
) -> SlimNet:
    """Stage I: train `net` in place; returns the EMA network with recalibrated BN.

    Raises:
        TrainingError: if there are fewer images than a batch, or a loss is not finite.
        DataError: if the images do not fit the network or the preprocessing.
    """
    images.check_fits(preprocessing, net.spec.num_classes)
    per_epoch, total = _steps(images, recipe.batch_size, recipe.epochs)
    teacher = make_teacher(net, recipe.ema_decay)
    augment = Augment(preprocessing.image_size_px, shift_px=recipe.shift_px, mirror=recipe.mirror)
    heads = set(net.slimming_parameters())
    net.train()
    with _only_trainable(net, [p for p in net.parameters() if p not in heads]):
        optimizer = torch.optim.SGD(
            parameter_groups(net, recipe.weight_decay),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
        )
        schedule = _cosine(optimizer, total, round(recipe.warmup_share * total))
        for step, (x, labels) in enumerate(
            _batches(
                images, preprocessing, augment, recipe.batch_size, per_epoch, total, recipe.seed
            )
        ):
            routes = sandwich_routes(
                net.spec,
                random.Random(step_seed(recipe.seed, step, "routes")),
                recipe.random_routes,
            )
            losses = supernet_step(
                net,
                teacher,
                optimizer,
                x,
                labels,
                routes,
                label_smoothing=recipe.label_smoothing,
                dropout=recipe.dropout,
                generator=_generator(recipe.seed, step, "dropout"),
                step=step,
            )
            schedule.step()
            if on_step is not None:
                on_step(step + 1, total, losses)
    averaged = teacher.module
    assert isinstance(averaged, SlimNet)
    averaged.requires_grad_(True)
    count = min(recipe.calibration_batches, per_epoch)
    fresh = _batches(
        images, preprocessing, augment, recipe.batch_size, per_epoch, count, recipe.seed + 1
    )
    recalibrate(averaged, (x for x, _ in fresh))
    return averaged


def train_gate(
    net: SlimNet,
    images: MemoryImages,
    preprocessing: Preprocessing,
    recipe: GateRecipe,
    *,
    on_step: OnStep | None = None,
) -> None:
    """Stage II: train the slimming heads of `net` in place; everything else stays as it is.

    Raises:
        UsageError: if the network has no gates.
        TrainingError: if there are fewer images than a batch, or a loss is not finite.
        DataError: if the images do not fit the network or the preprocessing.
    """
    if not net.spec.gates:
        raise UsageError(f"{net.spec.name} has no gates to train")
    images.check_fits(preprocessing, net.spec.num_classes)
    per_epoch, total = _steps(images, recipe.batch_size, recipe.epochs)
    heads = net.slimming_parameters()
    optimizer = torch.optim.SGD(
        heads, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    schedule = _cosine(optimizer, total, 0)
    augment = Augment(preprocessing.image_size_px, shift_px=recipe.shift_px, mirror=recipe.mirror)
    size = preprocessing.image_size_px
    table = CostTable.from_madds(net.spec, size)
    scale = recipe.cost_scale_madds or float(madds(net.spec, net.spec.widest_choice, size))
    net.eval()
    with _only_trainable(net, heads):
        for step, (x, labels) in enumerate(
            _batches(
                images, preprocessing, augment, recipe.batch_size, per_epoch, total, recipe.seed
            )
        ):
            losses = gate_step(
                net,
                optimizer,
                x,
                labels,
                table,
                easy_share=recipe.easy_share,
                sgs_weight=recipe.sgs_weight,
                cost_weight=recipe.cost_weight,
                cost_scale=scale,
                tau=recipe.tau,
                generator=_generator(recipe.seed, step, "gumbel"),
                step=step,
            )
            schedule.step()
            if on_step is not None:
                on_step(step + 1, total, losses)


def _steps(images: MemoryImages, batch_size: int, epochs: int) -> tuple[int, int]:
    per_epoch = len(images) // batch_size
    if per_epoch < 1:
        raise TrainingError(
            f"{images.name or 'data'}: {len(images)} images do not fill one batch of {batch_size}"
        )
    return per_epoch, per_epoch * epochs


def _generator(seed: int, step: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(step_seed(seed, step, purpose))


def _batches(
    images: MemoryImages,
    preprocessing: Preprocessing,
    augment: Augment,
    batch_size: int,
    per_epoch: int,
    total: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`total` augmented batches of network input with labels, reshuffled every epoch."""
    for epoch in range(-(-total // per_epoch)):
        generator = _generator(seed, epoch, "order")
        order = torch.randperm(len(images), generator=generator)
        batches = images.batches(batch_size, order, drop_last=True)
        for step, (pixels, labels) in enumerate(batches, start=epoch * per_epoch):
            if step == total:
                return
            x = augment(normalise(pixels, preprocessing), step_seed(seed, step, "augment"))
            yield x, labels


def _cosine(optimizer: torch.optim.Optimizer, total: int, warmup: int) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return LambdaLR(optimizer, factor)


@contextmanager
def _only_trainable(net: SlimNet, trainable: list[torch.nn.Parameter]) -> Iterator[None]:
    """Require gradients of `trainable` alone while inside."""
    before = [p.requires_grad for p in net.parameters()]
    net.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(net.parameters(), before, strict=True):
            parameter.requires_grad_(flag)
