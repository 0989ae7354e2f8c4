"""Teachers of a supernet: its own moving average, or another trained network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from dynaslim.checkpoint import read
from dynaslim.distributed import average_
from dynaslim.errors import check
from dynaslim.graph import AnySpec
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.nn.net import ElasticNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.program_net import frozen
from dynaslim.runtime.variants import RouteVariant
from dynaslim.spec import Route


def make_teacher(net: ElasticNet, decay: float) -> AveragedModel:
    """The EMA network, which normalises with the statistics of each batch and stores none.

    The released code also averages the running statistics and uses the teacher in evaluation mode.
    Averaged statistics do not match averaged weights: in the first thousands of steps such a
    teacher is no better than chance. `recalibrate` computes statistics for the averaged network.

    The decay warms up as (1 + t) / (10 + t), so that the start does not dominate a short run.
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
    _use_batch_statistics(teacher)
    return teacher


def _use_batch_statistics(module: torch.nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, SlimBatchNorm2d):
            norm.momentum = 0.0
    module.train()


class OutsideTeacher:
    """A trained network that predicts for a supernet's images, along the route that `choose` sets.

    `teacher(x)` -> probabilities (B, N), with classes in the order of `class_names`; x (B, C, H, W)
    is normalised by `preprocessing`. Before `choose`, the route is the largest.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
        UsageError: if its classes, image size or channels are different.
    """

    def __init__(
        self, path: str, class_names: Sequence[str], preprocessing: Preprocessing, spec: AnySpec
    ) -> None:
        self.path = path
        checkpoint = read(path)
        own = checkpoint.needed_preprocessing(path)
        self.net = checkpoint.net.requires_grad_(False)
        theirs = self.net.spec
        size, side = own.image_size_px, preprocessing.image_size_px
        check(size == side, f"teacher {path}: takes images of {size} px, here they have {side}")
        check(
            theirs.in_channels == spec.in_channels,
            f"teacher {path}: takes {theirs.in_channels} channels, the model {spec.in_channels}",
        )
        names = checkpoint.class_names
        check(
            set(names or class_names) == set(class_names)
            and theirs.num_classes == len(class_names),
            f"teacher {path}: its {theirs.num_classes} classes are not the images' "
            f"{len(class_names)}: {', '.join(names or ('unnamed',)):.200}",
        )
        order = [(names or tuple(class_names)).index(name) for name in class_names]
        self._order = None if order == list(range(len(order))) else torch.tensor(order)
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (preprocessing.mean, preprocessing.std, own.mean, own.std)
        )
        self._scale = (std / own_std).float()
        self._shift = ((mean - own_mean) / own_std).float()
        self.route = theirs.largest
        self._frozen: dict[Route, torch.nn.Module] = {}
        """Routes with the network's own statistics, made at first use."""

    def to(self, device: torch.device) -> OutsideTeacher:
        self.net.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        self._order = None if self._order is None else self._order.to(device)
        return self

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, N) of normalised images, with classes in the order of `class_names`."""
        if self.net.training:  # with batch statistics the rows must stay together
            logits: Tensor = self.net(x * self._scale + self._shift, self.route).float()
        else:
            if self.route not in self._frozen:
                self._frozen[self.route] = frozen(self.net, RouteVariant(self.route))
            run, rows = self._frozen[self.route], self.net.rows_at_once(x.shape[-1], len(x))
            parts = (run(part * self._scale + self._shift) for part in torch.split(x, rows))
            logits = torch.cat(list(parts)).float()
        return logits if self._order is None else logits[:, self._order]

    def __call__(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(1)

    def choose(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """Select the route and the kind of BN statistics with the lowest cross-entropy.

        `batches` are normalised images and their classes; means are over the batches of all
        processes. The candidates are the largest route and the widest that the gates can choose,
        with running or batch statistics. Returns the selection and its cross-entropy.
        """
        spec = self.net.spec
        routes = tuple(dict.fromkeys((spec.largest, spec.widest_choice)))
        modes = [(route, own) for own in (True, False) for route in routes]
        # the last counts batches; on the device, where processes exchange tensors
        losses = torch.zeros(len(modes) + 1, device=self.net.device)
        for x, labels in batches:
            losses[-1] += 1
            for number, mode in enumerate(modes):
                self._run_in(*mode)
                losses[number] += F.cross_entropy(self.logits(x), labels)
        average_([losses])
        best = int(losses[:-1].argmin())
        route, own = modes[best]
        self._run_in(route, own)
        return {
            "route": str(route),
            "statistics": "own" if own else "batch",
            "loss": float(losses[best] / losses[-1]),
        }

    def _run_in(self, route: Route, own_statistics: bool) -> None:
        self.route = route
        if own_statistics:
            self.net.eval()
        else:
            _use_batch_statistics(self.net)
