"""Plain torch networks of one width each, as a user would build them instead of a supernet.

They consist of `torch.nn` layers of exactly the route's width; of this package they use only the
spec. Supports `conv` and `depthwise_separable` stages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaslim.blocks import gate_hidden
from dynaslim.spec import NetSpec, Route


class Attention(nn.Module):
    """The attention head of a gate."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


def conv_bn(
    channels_in: int, channels: int, kernel: int, stride: int, groups: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.SiLU(),
    )


def plain_network(spec: NetSpec, route: Route) -> nn.Sequential:
    """The sub-network along a route as one would write it by hand, with random weights."""
    layers: list[nn.Module] = []
    channels, max_in = spec.in_channels, spec.in_channels
    for stage, width in zip(spec.stages, route.widths, strict=True):
        for block in range(stage.blocks):
            stride = stage.stride if block == 0 else 1
            if stage.block == "conv":
                layers.append(conv_bn(channels, width, stage.kernel, stride))
            elif stage.block == "depthwise_separable":
                layers.append(conv_bn(channels, channels, stage.kernel, stride, groups=channels))
                layers.append(Attention(channels, gate_hidden(spec, max_in)))
                layers.append(conv_bn(channels, width, 1, 1))
            else:
                raise SystemExit(f"{spec.name}: no plain form of a {stage.block} block here")
            channels, max_in = width, stage.widths[-1]
    head = nn.Linear(channels, spec.num_classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
