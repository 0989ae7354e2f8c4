"""Compiled segments for training: every form compiled once, however many routes use it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor

from dynaslim.nn.net import ElasticNet


class CompiledSegments:
    """Runs a network's segments through torch.compile; a `RunSegment` of `forward_many`.

    Compiling whole routes would compile, and run, the trunk that they share once for each.
    """

    def __init__(self, net: ElasticNet, *, backend: str = "inductor") -> None:
        self._net = net
        self._backend = backend
        self._forms: dict[tuple[int, int], Callable[[Tensor, Tensor | None], Tensor]] = {}

    def __call__(self, number: int, x: Tensor, index: int, dropout_mask: Tensor | None) -> Tensor:
        form = (number, index)
        if form not in self._forms:
            self._forms[form] = torch.compile(
                _segment(self._net, number, index), backend=self._backend
            )
        return self._forms[form](x, dropout_mask)


def _segment(net: ElasticNet, number: int, index: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    net.prepare(number, index)

    def run(x: Tensor, dropout_mask: Tensor | None) -> Tensor:
        return net.segment(number, x, index, decide=False, dropout_mask=dropout_mask).features

    # a code object of its own: torch.compile gives up on one after 8 constants, silently
    name = f"segment_{number}_{index}".replace("-", "minus")
    code = run.__code__.replace(co_name=name)
    return FunctionType(code, run.__globals__, name, None, run.__closure__)
