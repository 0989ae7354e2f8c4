"""Describe and check your own network, and use its spec file like the name of a zoo model.

    python examples/add_zoo_entry.py my_net.yaml

Prints the cost of every route, compares the three ways of running a network on noise, and writes
the spec to the file. The file's name can then be used as the name of a model:

    dynaslim info my_net.yaml
    dynaslim train supernet --model my_net.yaml --data.path DATA --out runs/mine

To share a spec with others, add it as a function in dynaslim/zoo.py; the tests for all networks
then include it.
"""

import sys

import torch

import dynaslim
from dynaslim.nn import argmax_one_hot
from dynaslim.spec import GateSpec, NetSpec, StageSpec
from dynaslim.train import recalibrate
from dynaslim.zoo import write_spec

SPEC = NetSpec(
    name="my_net",
    stages=(
        # the trunk: narrow on every route; only the teacher of stage I uses its second width
        StageSpec((12, 16), block="conv", stride=2),
        StageSpec((24, 32), stride=2),
        # a gate chooses among widths 0, 1 and 2, for this stage and the next
        StageSpec((32, 64, 96), blocks=2, stride=2, gate=GateSpec((0, 1, 2))),
        StageSpec((64, 96, 128)),
        # a second gate, which omits the middle width
        StageSpec((96, 160, 256), block="inverted_residual", expansion=2, gate=GateSpec((0, 2))),
    ),
    num_classes=10,
)
IMAGE_SIZE_PX = 48


def costs(spec: NetSpec) -> None:
    """Print the cost of every route that the gates can take, from the spec alone."""
    print(f"{spec.name}: {dynaslim.params(spec) / 1e6:.2f} M parameters, at {IMAGE_SIZE_PX} px")
    for route in spec.routing_space:
        print(f"  {route!s:<20} {dynaslim.madds(spec, route, IMAGE_SIZE_PX) / 1e6:6.2f} M")


def check(spec: NetSpec) -> None:
    """Check that masked, routed and static forward passes give the same logits on every route."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * torch.rand(64, 1, 1, 1) * 4
    net = dynaslim.SlimNet(spec)
    recalibrate(net, [x])  # computes BN statistics that fit the random weights
    for head in net.slimming_parameters():
        torch.nn.init.normal_(head)  # so that gates choose different routes for noise
    with torch.inference_mode():
        gated = net.forward_gated(x, lambda logits, _gate: argmax_one_hot(logits)).logits
        engine = dynaslim.Engine(net, backend="eager")
        routed = engine(x)
        routes = [engine.route_of(indices) for indices in routed.routes]
        static = torch.cat([net(x[n : n + 1], route) for n, route in enumerate(routes)])
    for name, logits in (("masked", gated), ("routed", routed.logits)):
        error = ((logits - static).abs().max() / static.abs().max()).item()
        print(f"{name} against static, {len(set(routes))} routes: {error:.1e} of the largest logit")
        assert error < 1e-4


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: add_zoo_entry.py FILE.yaml")
    costs(SPEC)
    check(SPEC)
    print(f"{write_spec(sys.argv[1], SPEC)}: use it as a model's name")
