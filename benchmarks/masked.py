"""Routed inference against masked inference at full width, as the method was published.

    python benchmarks/masked.py --json benchmarks/results/masked.json

`masked` is dynamic inference as in research code, in eager PyTorch: every layer runs at full width
for every image, channels beyond an image's width are multiplied by zero, and every image is
normalised with the statistics of its width, selected by its gate. `masked_plain_trunk` is faster
than the research code: the trunk, which all images share, is plain and as narrow as on the routes.
`gated` is this package's own differentiable mode, which puts the mask into the normalisation.
`routed` is the engine. All take the same decisions. `wide_eager` is the widest route alone as a
static network in eager PyTorch, which dynamic inference should beat.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynaslim.bench.models import random_network
from dynaslim.bench.routed import mixed
from dynaslim.bench.timing import hardware, interleave, ratio, summary
from dynaslim.blocks import gate_hidden
from dynaslim.runtime.engine import Engine
from dynaslim.spec import NetSpec


class MaskedConv(nn.Module):
    """Convolution at full width, a mask, and normalisation by statistics of each row's width."""

    mean: Tensor
    var: Tensor
    mask: Tensor

    def __init__(
        self, ins: int, widths: list[int], kernel: int, stride: int, *, depthwise: bool = False
    ) -> None:
        super().__init__()
        full = max(widths)
        self.plain = nn.BatchNorm2d(full) if len(set(widths)) == 1 else None
        self.conv = nn.Conv2d(
            ins, full, kernel, stride, kernel // 2, groups=full if depthwise else 1, bias=False
        )
        self.weight = nn.Parameter(torch.ones(full))
        self.bias = nn.Parameter(torch.zeros(full))
        rows = len(widths)
        self.register_buffer("mean", torch.zeros(rows, full))
        self.register_buffer("var", torch.ones(rows, full))
        mask = torch.arange(full)[None] < torch.tensor(widths)[:, None]
        self.register_buffer("mask", mask.float())
        self.act = nn.SiLU()

    def forward(self, x: Tensor, gate_BK: Tensor) -> Tensor:
        x = self.conv(x)
        if self.plain is not None:
            plain: Tensor = self.act(self.plain(x))
            return plain
        x = x * (gate_BK @ self.mask)[:, :, None, None]
        mean = (gate_BK @ self.mean)[:, :, None, None].expand_as(x)
        var = (gate_BK @ self.var)[:, :, None, None].expand_as(x)
        weight, bias = (
            ((gate_BK @ self.mask) * value)[:, :, None, None] for value in (self.weight, self.bias)
        )
        out: Tensor = self.act(weight * (x - mean) / torch.sqrt(var + 1e-5) + bias)
        return out


class MaskedAttention(nn.Module):
    """The attention head at full width, and the slimming head if there is one."""

    def __init__(self, channels: int, hidden: int, options: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        self.slimming = nn.Linear(hidden, options, bias=False) if options else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.reduce(x.mean((2, 3))))
        if self.slimming is not None:
            self.slimming(hidden)  # computed for its cost only: decisions are given
        return x * torch.sigmoid(self.expand(hidden))[:, :, None, None]


class Masked(nn.Module):
    """A masked network with one gate and `conv` and `depthwise_separable` stages."""

    def __init__(self, spec: NetSpec, *, plain_trunk: bool) -> None:
        super().__init__()
        choices, self.full = spec.gates[0].choices, not plain_trunk
        layers: list[nn.Module] = []
        ways = len(choices) + (0 if plain_trunk else 1)
        ins, max_in = [spec.in_channels] * ways, spec.in_channels
        for number, stage in enumerate(spec.stages):
            widths = [spec.width(number, choice).channels for choice in choices]
            full = stage.widths[-1]
            if not plain_trunk:  # channels that no route uses are computed and masked too
                widths = [*widths, full]
            for block in range(stage.blocks):
                stride = stage.stride if block == 0 else 1
                if stage.block == "conv":
                    layers.append(MaskedConv(max(ins), widths, stage.kernel, stride))
                else:
                    gated = block == 0 and stage.gate is not None
                    layers += [
                        MaskedConv(max(ins), ins, stage.kernel, stride, depthwise=True),
                        MaskedAttention(
                            max(ins), gate_hidden(spec, max_in), len(choices) if gated else 0
                        ),
                        MaskedConv(max(ins), widths, 1, 1),
                    ]
                ins, max_in = widths, stage.widths[-1]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(max(ins), spec.num_classes)

    def forward(self, x: Tensor, gate_BK: Tensor) -> Tensor:
        if self.full:
            gate_BK = torch.cat([gate_BK, torch.zeros_like(gate_BK[:, :1])], 1)
        for layer in self.layers:
            x = layer(x, gate_BK) if isinstance(layer, MaskedConv) else layer(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time all arms, interleaved, on one batch."""
    net = random_network("ds_mbnet", options.image_size)
    spec = net.spec
    traffic = mixed(spec, [float(share) for share in options.mix.split(",")], options.batch_size)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(
        (options.batch_size, spec.in_channels, options.image_size, options.image_size), np.float32
    )
    engine = Engine(net, backend=options.backend, image_size=options.image_size)
    images = engine.router.backend.arrays.images(x)
    picked = np.array(traffic.rows)
    tensor = torch.from_numpy(x)
    gate_BK = torch.nn.functional.one_hot(torch.from_numpy(picked), len(traffic.paths)).float()
    masked = Masked(spec, plain_trunk=False).eval()
    kinder = Masked(spec, plain_trunk=True).eval()
    widest = spec.widest_choice

    def static_eager() -> None:
        with torch.inference_mode():
            net(tensor, widest)

    def gated() -> None:
        with torch.inference_mode():
            net.forward_gated(tensor, lambda logits, number: gate_BK)

    def run_masked(network: Masked) -> None:
        with torch.inference_mode():
            network(tensor, gate_BK)

    arms = {
        "routed": lambda: engine.router.routed(images, lambda gate, _, rows: picked[rows], None),
        "masked": lambda: run_masked(masked),
        "masked_plain_trunk": lambda: run_masked(kinder),
        "gated": gated,
        "wide_eager": static_eager,
    }
    times = interleave(arms, options.rounds)
    faster = {name: ratio(times[name], times["routed"]) for name in arms if name != "routed"}
    return {
        "model": "ds_mbnet",
        "image_size_px": options.image_size,
        "batch_size": options.batch_size,
        "mix": options.mix,
        "backend": engine.backend,
        "rounds": options.rounds,
        "hardware": hardware(),
        "ms": {name: summary(values) for name, values in times.items()},
        "routed_is_faster_by": faster,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--mix", default="0.55,0.2,0.1,0.15")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    result = measure(options)
    for name, values in result["ms"].items():
        print(f"{name:<12} {values['median']:9.1f} ms ({values['q1']:.1f} to {values['q3']:.1f})")
    for name, values in result["routed_is_faster_by"].items():
        print(f"routed is {values['median']:.2f}x faster than {name}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
