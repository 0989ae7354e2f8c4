"""A route extracted from the supernet against the same network written by hand.

    python benchmarks/extracted.py --json benchmarks/results/extracted.json

The network written by hand is that of `plain.py`, with torch.fx's fusion of convolutions and batch
norm, as one would deploy it. Both run in eager PyTorch and channels_last, interleaved. The ratio is
extracted / by hand; above 1, extraction costs time.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain import plain_network
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from dynaslim import extract
from dynaslim.bench.models import random_network
from dynaslim.bench.timing import hardware, interleave, ratio, summary
from dynaslim.runtime.backends.eager import to_channels_last


def fused(network: nn.Module) -> nn.Module:
    """The network with every batch norm folded into the convolution before it."""
    for child in network.modules():
        names = list(child._modules)
        for first, second in itertools.pairwise(names):
            conv, norm = child._modules[first], child._modules[second]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                child._modules[first] = fuse_conv_bn_eval(conv, norm)
                child._modules[second] = nn.Identity()
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    net = random_network("ds_mbnet", options.image_size)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    routes: dict[str, Any] = {}
    for route in (net.spec.cheapest_choice, net.spec.widest_choice):
        ours = to_channels_last(extract(net, route))
        by_hand: nn.Module = plain_network(net.spec, route).eval()
        with torch.no_grad():  # its own statistics, so that activations keep their scale
            for norm in by_hand.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.momentum = None
            by_hand.train()(x)
        by_hand = to_channels_last(fused(by_hand.eval()))
        with torch.inference_mode():
            times = interleave(
                {"extracted": partial(ours, x), "by_hand": partial(by_hand, x)},
                options.rounds,
            )
        routes[str(route)] = {
            "extracted_ms": summary(times["extracted"]),
            "by_hand_ms": summary(times["by_hand"]),
            "extracted_over_by_hand": ratio(times["extracted"], times["by_hand"]),
        }
        over = routes[str(route)]["extracted_over_by_hand"]
        print(f"{route}: {over['median']:.3f} ({over['q1']:.3f} to {over['q3']:.3f})")
    result = {
        "model": "ds_mbnet",
        "batch_size": options.batch_size,
        "image_size_px": options.image_size,
        "rounds": options.rounds,
        "hardware": hardware(),
        "routes": routes,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
