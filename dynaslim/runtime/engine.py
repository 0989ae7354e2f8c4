"""Routed inference: rows of a batch bucketed by route, every bucket through dense slices.

Suffixes: B rows, G gates, N classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynaslim.cost import CostTable
from dynaslim.errors import UsageError
from dynaslim.nn.net import SlimNet
from dynaslim.spec import Route

BACKENDS = ("eager",)


class RoutedOutput(NamedTuple):
    """What the engine answers for a batch, row by row in the order of the input."""

    logits: Tensor
    """(B, N)"""
    routes: Tensor
    """(B, G) int64: the width index that each gate chose; `Engine.route_of` names the route."""
    madds: Tensor
    """(B,) float64: multiply-adds that each row cost, slimming heads included."""


class Engine:
    """Runs a network on batches, every image along the route that its gates choose.

        engine = dynaslim.Engine(net, backend="eager")
        logits, routes, madds = engine(x)

    The trunk runs on the whole batch; at each gate rows are sorted into buckets by choice, and each
    bucket runs the next segment as a dense slice of the weights. A row's answer does not depend
    on the rows it came with, to float tolerance. Holds no state between calls.

    Raises:
        UsageError: for an unknown backend, or a network without gates.
    """

    def __init__(self, net: SlimNet, *, backend: str = "eager") -> None:
        if backend not in BACKENDS:
            raise UsageError(f"backend {backend!r}: choose from {', '.join(BACKENDS)}")
        if not net.spec.gates:
            raise UsageError(f"{net.spec.name} has no gates: call net(x, route) instead")
        self.net = net
        self.spec = net.spec

    def route_of(self, indices: Tensor) -> Route:
        """The route for one row of `RoutedOutput.routes`."""
        return self.spec.route_at([int(index) for index in indices])

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> RoutedOutput:
        """Images (B, in_channels, H, W), normalised -> logits, routes and MAdds of every row.

        Raises:
            ValueError: if x is not a batch of images that the network takes.
            RuntimeError: if the network is in training mode.
        """
        if self.net.training:
            raise RuntimeError("the engine needs running statistics: call net.eval() first")
        self.net.check_input(x)
        spec = self.spec
        rows, gates = x.shape[0], len(spec.gates)
        routes_BG = torch.zeros(rows, gates, dtype=torch.int64, device=x.device)
        picks_BG = torch.zeros_like(routes_BG)
        logits_BN = x.new_empty(rows, spec.num_classes)
        if rows:
            everyone = torch.arange(rows, device=x.device)
            start = self.net.segment(0, x, 0)
            # a bucket: the rows that share a choice, their features and their next gate's logits
            buckets = [(everyone, start.features, start.gate_logits)]
            for number, gate in enumerate(spec.gates, start=1):
                arrived: list[list[tuple[Tensor, Tensor, Tensor | None]]] = [
                    [] for _ in gate.choices
                ]
                for members, features, gate_logits in buckets:
                    assert gate_logits is not None
                    pick = gate_logits.argmax(1)
                    picks_BG[members, number - 1] = pick
                    order = pick.argsort(stable=True)
                    counts = torch.bincount(pick, minlength=len(gate.choices)).tolist()
                    for option, part in enumerate(torch.split(order, counts)):
                        if len(part):
                            out = self.net.segment(number, features[part], gate.choices[option])
                            arrived[option].append((members[part], *out))
                buckets = [_join(parts) for parts in arrived if parts]
            for members, logits, _ in buckets:
                logits_BN[members] = logits.to(logits_BN.dtype)
        for number, gate in enumerate(spec.gates):
            choices = torch.tensor(gate.choices, device=x.device)
            routes_BG[:, number] = choices[picks_BG[:, number]]
        return RoutedOutput(logits_BN, routes_BG, self._madds(picks_BG, x))

    def _madds(self, picks_BG: Tensor, x: Tensor) -> Tensor:
        table = CostTable.from_madds(self.spec, (x.shape[2], x.shape[3]))
        one_hot = [
            torch.nn.functional.one_hot(picks_BG[:, g], len(gate.choices)).double()
            for g, gate in enumerate(self.spec.gates)
        ]
        return table.expected(one_hot)


def _join(
    parts: list[tuple[Tensor, Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One bucket of those that made the same choice after different ones before."""
    if len(parts) == 1:
        return parts[0]
    members, features, gate_logits = zip(*parts, strict=True)
    logits = (
        None if gate_logits[0] is None else torch.cat([g for g in gate_logits if g is not None])
    )
    return torch.cat(members), torch.cat(features), logits
