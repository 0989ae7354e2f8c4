"""Random networks of the table's operations: every way of running them gives the same answers."""

import random

import pytest
import torch
from convertible import assert_segments_agree
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dynaslim.conversion import Conversion
from dynaslim.cost import madds


class Random(nn.Module):
    """A stem and a dozen random operations on one to three branches, then pool and classifier."""

    def __init__(self, seed):
        super().__init__()
        rng = random.Random(seed)
        self.layers, self.plan = nn.ModuleList(), []
        widths = [16]
        self._conv(3, 16, 2)
        for _ in range(12):
            at = rng.randrange(len(widths))
            kind = rng.choice(
                ["conv", "depthwise", "grouped", "branch", "cat", "add", "split", "norm", "scale"]
            )
            if kind == "branch" and len(widths) < 3:
                self.plan.append(("branch", at, None))
                widths.append(widths[at])
            elif kind == "cat" and len(widths) > 1 and sum(widths) < 160:
                self.plan.append(("cat", at, None))
                widths = [sum(widths)]
            elif kind == "add" and len(widths) > 1:
                other = (at + 1) % len(widths)
                self.plan.append(("add", (at, other), self._conv(widths[other], widths[at])))
                widths.pop(other)
            elif kind == "split" and widths[at] % 16 == 0:
                half = widths[at] // 2
                self.plan.append(("split", at, self._conv(half, half)))
            elif kind in ("norm", "scale"):
                self.plan.append((kind, at, self._extra(kind, widths[at])))
            else:
                groups = {"depthwise": widths[at], "grouped": 4}.get(kind, 1)
                out = widths[at] if groups > 1 else rng.choice([16, 24, 40])
                self.plan.append(("conv", at, self._conv(widths[at], out, groups=groups)))
                widths[at] = out
        self.head = nn.Linear(sum(widths), 6)

    def _conv(self, ins, outs, stride=1, groups=1):
        self.layers.append(
            nn.Sequential(
                nn.Conv2d(ins, outs, 3, stride, 1, groups=groups), nn.BatchNorm2d(outs), nn.SiLU()
            )
        )
        return len(self.layers) - 1

    def _extra(self, kind, width):
        self.layers.append(nn.GroupNorm(1, width) if kind == "norm" else nn.Conv2d(width, width, 1))
        return len(self.layers) - 1

    def forward(self, x):
        branches = [self.layers[0](x)]
        for kind, at, number in self.plan:
            if kind == "branch":
                branches.append(F.relu(branches[at]))
            elif kind == "cat":
                branches = [torch.cat(branches, 1)]
            elif kind == "add":
                mine, other = at
                branches[mine] = branches[mine] + self.layers[number](branches[other])
                branches.pop(other)
            elif kind == "split":
                one, two = branches[at].chunk(2, 1)
                branches[at] = torch.cat([self.layers[number](two), one], 1)
            elif kind == "scale":
                scale = self.layers[number](branches[at].mean((2, 3), keepdim=True))
                branches[at] = branches[at] * torch.sigmoid(scale)
            else:
                branches[at] = self.layers[number](branches[at])
        return self.head(torch.cat(branches, 1).mean((2, 3)))


@pytest.mark.parametrize("seed", range(10))
def test_a_random_network_is_one_network(seed):
    torch.manual_seed(seed)
    model, x = Random(seed).train(), torch.randn(8, 3, 16, 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(x)
    widths = random.Random(seed).choice([(0.25, 0.5, 1.0), (0.5, 1.0), (0.3, 0.6, 0.8, 1.0)])
    conversion = Conversion(model.eval(), x[:2], widths)
    if seed % 2:  # several gates anywhere, also where several tensors cross
        places = list(conversion.crossing)[2:-2]
        count = 2 if seed % 4 == 1 else 4
        cuts = [node.name for node in random.Random(seed).sample(places, count)]
        conversion = Conversion(model, x[:2], widths, cuts=cuts)
    net = conversion.net([x])  # compares with the model at full width
    assert conversion.error <= 1e-5
    assert_segments_agree(net, x[:3])
    for route in net.spec.routes:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x[:1], route)
        assert madds(net.spec, route, 16) == counter.get_total_flops() // 2
