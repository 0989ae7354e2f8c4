"""The two training stages as iterators over optimizer steps.

    training = SupernetTraining(net, feed, augment, recipe)
    for losses in training:
        ...                       # one optimizer step is done
    averaged = training.averaged_network()

Between two steps, `state()` holds everything that training has changed, and all randomness is a
function of (seed, step). A run restored from it continues as if it had never stopped.
"""

from __future__ import annotations

import copy
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dynaslim.cost import CostTable
from dynaslim.data.feed import Feed, ImageFeed
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import Augment, mix
from dynaslim.distributed import rank
from dynaslim.errors import UsageError, check
from dynaslim.nn.net import ElasticNet, RunSegment
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import GateRecipe, OptimRecipe, SupernetRecipe
from dynaslim.seeds import step_seed
from dynaslim.train.calibrate import recalibrate
from dynaslim.train.features import Batch, Predict, TrunkFeatures
from dynaslim.train.step import (
    GateLosses,
    Sandwich,
    SupernetLosses,
    gate_step,
    parameter_groups,
    sandwich_routes,
    supernet_step,
)
from dynaslim.train.teacher import make_teacher

PAPER_SCALE: Final = 1e9 / 565.45e6
"""The cost term's T in the paper over the MAdds of its widest route (arXiv 2103.13258, eq. 9)."""

Losses = TypeVar("Losses", SupernetLosses, GateLosses)


class _Training(ABC, Generic[Losses]):
    """Base class of the two stages: batches, learning-rate schedule, step count and state."""

    def __init__(
        self,
        net: ElasticNet,
        feed: Feed,
        augment: Augment,
        recipe: SupernetRecipe | GateRecipe,
        parameters: list[dict[str, object]],
    ) -> None:
        self.net = net
        self.feed = feed
        self.augment = augment
        self.device = next(net.parameters()).device
        self.step = 0
        self.total = feed.steps_per_epoch * recipe.epochs
        self.optimizer = make_optimizer(recipe.optim, parameters)
        warmup = round(recipe.optim.warmup_share * self.total)
        self.schedule = LambdaLR(self.optimizer, lambda step: _cosine(step, self.total, warmup))
        self._seed = recipe.seed

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self.step // self.feed.steps_per_epoch

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def __iter__(self) -> Iterator[Losses]:
        """Run the remaining steps, one at a time."""
        with self._only_trainable():
            for batch in self._batches():
                losses = self._make_step(batch)
                self.schedule.step()
                self.step += 1
                yield losses

    def _batches(self) -> Iterator[Batch]:
        """The batches of the remaining steps, on the network's device."""
        for pixels, labels in self.feed.batches(self.step, self.total):
            seed = step_seed(self._seed, self.step, _of_rank("augment"))
            x = self.augment(pixels.to(self.device, non_blocking=True), seed)
            yield Batch(x, labels.to(self.device, non_blocking=True), None)

    def state(self) -> dict[str, Any]:
        """Everything that training has changed, as nested dicts of tensors and plain values."""
        return {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self._modules().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned, in this or another process.

        Raises:
            UsageError: if the state is of another network or optimizer.
        """
        ours = [dict(group) for group in self.optimizer.param_groups]
        try:
            for name, module in self._modules().items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UsageError(
                f"the saved state is not one of this network and optimizer: "
                f"{str(error).splitlines()[0]}"
            ) from None
        self.step = state["step"]
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        factor = self.schedule.lr_lambdas[0](self.step)
        for group, own in zip(self.optimizer.param_groups, ours, strict=True):
            # the recipe may have been changed: keep its current settings
            group.update({key: value for key, value in own.items() if key != "params"})
            group["lr"] = group["initial_lr"] * factor
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        for parameter, kept in self.optimizer.state.items():
            for key, value in kept.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # in the weights' memory format: if formats differ, the optimizer is slow
                    kept[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(step_seed(self._seed, self.step, purpose))

    @abstractmethod
    def _make_step(self, batch: Batch) -> Losses: ...

    @abstractmethod
    def _trainable(self) -> list[nn.Parameter]: ...

    @contextmanager
    def _only_trainable(self) -> Iterator[None]:
        """A context in which only the parameters that this stage trains require gradients."""
        before = [p.requires_grad for p in self.net.parameters()]
        self.net.requires_grad_(False)
        for parameter in self._trainable():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, flag in zip(self.net.parameters(), before, strict=True):
                parameter.requires_grad_(flag)


class SupernetTraining(_Training[SupernetLosses]):
    """Stage I: trains `net` in place and maintains an averaged (EMA) network.

    `outside` predicts the probabilities that every route learns (`recipe.teacher`). With `features`
    the trunk is not trained: they replace the images and the predictions of `outside`.

    Raises:
        TrainingError: if there are fewer images than a batch, or (in a step) a loss is not finite.
        UsageError: if a batch is too small for the number of parts that the recipe sets.
    """

    def __init__(
        self,
        net: ElasticNet,
        feed: Feed,
        augment: Augment,
        recipe: SupernetRecipe,
        *,
        outside: Predict | None = None,
        features: TrunkFeatures | None = None,
    ) -> None:
        if recipe.channels_last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        heads = set(net.slimming_parameters())
        self._weights = [p for p in net.parameters() if p not in heads]
        super().__init__(
            net, feed, augment, recipe, parameter_groups(self._weights, recipe.optim.weight_decay)
        )
        self.recipe = recipe
        self.outside, self.features = outside, features
        self.teacher = make_teacher(net, recipe.ema_decay)
        self._run_segment = compiled_segments(net) if recipe.compile else None
        net.train()

    def averaged_network(self) -> ElasticNet:
        """A copy of the averaged network; recalibrate it before use."""
        copied = _plain_copy(self.net)
        copied.load_state_dict(self.teacher.module.state_dict())
        return copied

    def live_network(self) -> ElasticNet:
        """A copy of the network in training."""
        return _plain_copy(self.net)

    def recalibrate(
        self, net: ElasticNet, batches: int, *, on_batch: Callable[[], None] | None = None
    ) -> ElasticNet:
        """Recompute the BN statistics of `net` along the trained routes from augmented batches."""
        routes = (net.spec.largest,) if self.recipe.routes == "largest" else None
        if self.features is None:
            fresh = calibration_batches(self.feed, self.augment, self.device, batches, self._seed)
            recalibrate(net, fresh, routes, on_batch=on_batch)
        else:
            count = min(batches, self.feed.steps_per_epoch)
            kept = self.features.batches(0, count, self.feed.batch_size, "calibrate")
            on_device = (batch.x.to(self.device) for batch in kept)
            recalibrate(net, on_device, routes, after_trunk=True, on_batch=on_batch)
        return net

    def _batches(self) -> Iterator[Batch]:
        if self.features is None:
            yield from super()._batches()
            return
        for batch in self.features.batches(self.step, self.total, self.feed.batch_size):
            x, labels, outside = batch
            yield Batch(
                x.to(self.device),
                labels.to(self.device),
                None if outside is None else outside.to(self.device),
            )

    def _trainable(self) -> list[nn.Parameter]:
        return self._weights

    def _modules(self) -> dict[str, nn.Module]:
        return {"net": self.net, "averaged": self.teacher}

    def _make_step(self, batch: Batch) -> SupernetLosses:
        x, labels, outside_BN = batch
        recipe, spec = self.recipe, self.net.spec
        if recipe.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if len(x) < 2 * recipe.optim.accumulate:
            raise UsageError(
                f"{len(x)} images of a batch on each process do not make {recipe.optim.accumulate} "
                f"parts of at least 2"
            )
        labels_alone = 0.0  # share of the loss from the labels alone
        if recipe.label_warmup:
            labels_alone = max(0.0, 1 - self.step / (recipe.label_warmup * self.total))
        seed = step_seed(self._seed, self.step, _of_rank("mix"))
        x, targets = mix(x, labels, spec.num_classes, recipe.augment, seed)
        if self.outside is not None and labels_alone < 1:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
                outside_BN = self.outside(x)
        routes = Sandwich(spec.largest, (), None)
        if recipe.routes == "sandwich":
            rng = random.Random(step_seed(self._seed, self.step, "routes"))
            routes = sandwich_routes(spec, rng, recipe.random_routes)
        return supernet_step(
            self.net,
            self.teacher,
            self.optimizer,
            x,
            targets,
            routes,
            target=recipe.target,
            outside_BN=outside_BN,
            soft_weight=1 - labels_alone,
            label_weight=labels_alone + (1 - labels_alone) * recipe.label_weight,
            label_smoothing=recipe.label_smoothing,
            dropout=recipe.dropout,
            generator=self._generator("dropout"),
            step=self.step,
            accumulate=recipe.optim.accumulate,
            clip_norm=recipe.optim.clip_norm,
            bf16=recipe.bf16,
            run_segment=self._run_segment,
            after_trunk=self.features is not None,
        )


class GateTraining(_Training[GateLosses]):
    """Stage II by sandwich gate sparsification: trains the slimming heads of `net` in place.

    `table` gives the costs of the cost term. `target`, a share of its widest route's cost, is the
    scale of that term if the recipe sets none.

    Raises:
        UsageError: if the network has no gates.
        TrainingError: if there are fewer images than a batch, or (in a step) a loss is not finite.
    """

    def __init__(
        self,
        net: ElasticNet,
        feed: Feed,
        augment: Augment,
        recipe: GateRecipe,
        table: CostTable,
        *,
        target: float | None = None,
    ) -> None:
        check_has_gates(net)
        heads = net.slimming_parameters()
        groups: list[dict[str, object]] = [
            {"params": heads, "weight_decay": recipe.optim.weight_decay}
        ]
        super().__init__(net, feed, augment, recipe, groups)
        self.recipe = recipe
        self.table = table
        self.cost_scale = recipe.sgs.cost_scale or table.widest_cost * (target or PAPER_SCALE)
        net.eval()

    def _trainable(self) -> list[nn.Parameter]:
        return self.net.slimming_parameters()

    def _make_step(self, batch: Batch) -> GateLosses:
        return gate_step(
            self.net,
            self.optimizer,
            batch.x,
            batch.labels,
            self.table,
            self.recipe.sgs,
            cost_scale=self.cost_scale,
            generator=self._generator("gumbel"),
            step=self.step,
            clip_norm=self.recipe.optim.clip_norm,
            bf16=self.recipe.bf16,
        )


def compiled_segments(net: ElasticNet, backend: str = "inductor") -> RunSegment:
    """A `RunSegment` for `forward_many` that compiles every segment variant once.

    Compiling whole routes would compile and run their shared trunk once per route.
    """

    @cache
    def compiled(number: int, index: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        net.prepare(number, index)

        def run(x: Tensor, dropout_mask: Tensor | None) -> Tensor:
            return net.segment(number, x, index, decide=False, dropout_mask=dropout_mask).features

        # its own code object: torch.compile silently gives up on one after 8 constants
        name = f"segment_{number}_{index}".replace("-", "minus")
        code = run.__code__.replace(co_name=name)
        own = FunctionType(code, run.__globals__, name, None, run.__closure__)
        return torch.compile(own, backend=backend)

    return lambda number, x, index, dropout_mask: compiled(number, index)(x, dropout_mask)


def _plain_copy(net: ElasticNet) -> ElasticNet:
    """A copy in torch's default memory format, with the answers that a saved network will give."""
    copied: ElasticNet = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return copied.requires_grad_(True).eval()


def check_has_gates(net: ElasticNet) -> None:
    """Raise `UsageError` if the network has no gates."""
    if not net.spec.gates:
        raise UsageError(f"{net.spec.name} has no gates to train")


def make_optimizer(
    recipe: OptimRecipe, parameters: list[dict[str, object]]
) -> torch.optim.Optimizer:
    """Make the recipe's optimizer for parameter groups."""
    if recipe.name == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
    )


def training_batches(
    feed: Feed, augment: Augment, device: torch.device, count: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """At most one epoch of augmented training batches and labels, in a separate order."""
    stop = min(count, feed.steps_per_epoch)
    for step, (pixels, labels) in enumerate(feed.batches(0, stop, purpose="calibrate")):
        x = augment(pixels.to(device), step_seed(seed, step, _of_rank("augment calibrate")))
        yield x, labels.to(device)


def calibration_batches(
    feed: Feed, augment: Augment, device: torch.device, count: int, seed: int
) -> Iterator[Tensor]:
    """The images of `training_batches`."""
    return (x for x, _ in training_batches(feed, augment, device, count, seed))


def _of_rank(purpose: str) -> str:
    """The purpose with the rank, so that processes draw different random numbers."""
    return f"{purpose} {rank()}" if rank() else purpose


def _cosine(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train_supernet(
    net: ElasticNet,
    images: ImageDataset,
    preprocessing: Preprocessing,
    recipe: SupernetRecipe,
    *,
    on_step: Callable[[SupernetLosses], None] | None = None,
) -> ElasticNet:
    """Stage I on images in memory: train `net` in place, return the recalibrated average.

    For runs that are saved and can be resumed, and for the recipe's `teacher`, `init` and
    `trunk_views`, see `dynaslim.runs.run_supernet`.

    Raises:
        UsageError: if the recipe has one of these.
        TrainingError: if there are fewer images than a batch, or a loss is not finite.
        DataError: if the images do not fit the network or the preprocessing.
    """
    for name in ("teacher", "init", "trunk_views"):
        check(not getattr(recipe, name), f"{name}: train_supernet has none; see run_supernet")
    images.check_fits(preprocessing, net.spec.num_classes)
    feed = ImageFeed(images, recipe.batch_size, recipe.seed)
    training = SupernetTraining(net, feed, Augment(recipe.augment, preprocessing), recipe)
    for losses in training:
        if on_step is not None:
            on_step(losses)
    return training.recalibrate(training.averaged_network(), recipe.calibration_batches)


def train_gate(
    net: ElasticNet,
    images: ImageDataset,
    preprocessing: Preprocessing,
    recipe: GateRecipe,
    *,
    on_step: Callable[[GateLosses], None] | None = None,
) -> None:
    """Stage II by sandwich gate sparsification on images in memory, with costs in MAdds.

    Trains only the slimming heads of `net`, in place. For the other objective see
    `fit_gate_to_images`; for runs that are saved and can be resumed see `dynaslim.runs.run_gate`.

    Raises:
        UsageError: if the network has no gates, or the recipe has the other objective.
        TrainingError: if there are fewer images than a batch, or a loss is not finite.
        DataError: if the images do not fit the network or the preprocessing.
    """
    check_has_gates(net)
    check(recipe.objective == "sgs", "train_gate: for objective expected see fit_gate_to_images")
    images.check_fits(preprocessing, net.spec.num_classes)
    feed = ImageFeed(images, recipe.batch_size, recipe.seed)
    table = CostTable.from_madds(net.spec, preprocessing.image_size_px)
    for losses in GateTraining(net, feed, Augment(recipe.augment, preprocessing), recipe, table):
        if on_step is not None:
            on_step(losses)
