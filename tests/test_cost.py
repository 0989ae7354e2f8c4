import itertools
import random

import pytest
import torch
from helpers import SHARED, ZOO_NAMES, micro_spec, needs_shared
from torch.utils.flop_counter import FlopCounterMode

from dynaslim.cost import CostTable, madds, params
from dynaslim.errors import UsageError
from dynaslim.nn import SlimNet
from dynaslim.zoo import ZOO, get_spec

# counted by the released code at 224 px, in millions
RELEASED_MADDS = [
    132.89, 152.92, 175.15, 199.59, 226.24, 255.10, 286.17,
    319.44, 354.92, 392.61, 432.51, 474.61, 518.93, 565.45,
]  # fmt: skip


def test_ds_mbnet_costs_what_the_release_counts():
    spec = get_spec("ds_mbnet")
    ours = [madds(spec, route, 224) / 1e6 for route in spec.routes]
    assert ours == pytest.approx(RELEASED_MADDS, abs=0.01)
    assert madds(spec, spec.largest, 224) / 1e6 == pytest.approx(819.88, abs=0.01)
    assert params(spec) / 1e6 == pytest.approx(7.68, abs=0.005)


@needs_shared
def test_reference_file_agrees_with_the_numbers_above():
    import numpy as np

    with np.load(SHARED / "reference" / "official_outputs.npz") as outputs:
        assert list(outputs["madds_224"]) == pytest.approx(RELEASED_MADDS, abs=0.006)


def _routes(spec):
    combinations = random.Random(0).sample(spec.routing_space, min(3, len(spec.routing_space)))
    return dict.fromkeys((*spec.routes, *combinations, spec.largest))


@pytest.mark.parametrize("image_size", [32, 33, 224, (48, 65)])
@pytest.mark.parametrize("name", ZOO_NAMES)
def test_madds_equal_torchs_own_count(name, image_size):
    spec = ZOO[name]
    # on meta tensors nothing is computed, but every operation is counted
    net = SlimNet(spec, device="meta").eval()
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    x = torch.empty(1, 3, height, width, device="meta")
    for route in _routes(spec):
        with FlopCounterMode(display=False) as counter:
            net(x, route)
        assert madds(spec, route, image_size, pooling=False) * 2 == counter.get_total_flops()


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_gated_forward_costs_the_slimming_heads_too(name):
    """At one choice per gate the gated forward computes that route and the heads, no more."""
    spec = ZOO[name].with_choices((1,))
    net = SlimNet(spec, device="meta").eval()
    x = torch.empty(1, 3, 64, 64, device="meta")
    with FlopCounterMode(display=False) as counter:
        net.forward_gated(x, lambda logits, _: torch.ones_like(logits))
    expected = madds(spec, spec.routes[1], 64, pooling=False, slimming_heads=True)
    assert expected * 2 == counter.get_total_flops()
    assert expected > madds(spec, spec.routes[1], 64, pooling=False)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_params_equal_the_modules(name):
    spec = ZOO[name]
    net = SlimNet(spec, device="meta")
    assert params(spec) == sum(p.numel() for p in net.parameters())
    costs = [params(spec, route) for route in spec.routes]
    assert costs == sorted(set(costs))
    assert costs[-1] <= params(spec, spec.largest) < params(spec)


def test_params_of_a_route_are_those_its_forward_reads():
    """Independent of the walk: count the weight elements that receive a gradient."""
    spec = micro_spec()
    net = SlimNet(spec)
    for p in net.parameters():
        torch.nn.init.uniform_(p, 0.1, 1.0)
    for route in (*spec.routes, spec.largest):
        net.zero_grad()
        net(torch.rand(8, 3, 16, 16), route).square().sum().backward()
        touched = sum(int((p.grad != 0).sum()) for p in net.parameters() if p.grad is not None)
        assert touched == params(spec, route)


@pytest.mark.parametrize("spec", [micro_spec(), get_spec("ds_mobilenet_v2")], ids=lambda s: s.name)
def test_table_holds_every_combination(spec):
    table = CostTable.from_madds(spec, 64)
    options = [range(len(gate.choices)) for gate in spec.gates]
    for picks in itertools.product(*options):
        indices = [g.choices[p] for g, p in zip(spec.gates, picks, strict=True)]
        exact = madds(spec, spec.route_at(indices), 64, slimming_heads=True)
        assert table.route_cost(picks) == exact
        one_hot = [
            torch.nn.functional.one_hot(torch.tensor([p]), len(o)).double()
            for p, o in zip(picks, options, strict=True)
        ]
        assert table.expected(one_hot).item() == exact


def test_expected_cost_has_the_gradient_of_switching():
    spec = micro_spec()
    table = CostTable.from_madds(spec, 16)
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    table.expected([first, second]).sum().backward()
    by_first = [table.route_cost((p, 1)) for p in (0, 1)]
    assert (first.grad[0, 1] - first.grad[0, 0]).item() == by_first[1] - by_first[0]
    by_second = [table.route_cost((0, p)) for p in (0, 1, 2)]
    assert (second.grad[0, 2] - second.grad[0, 0]).item() == by_second[2] - by_second[0]


def test_too_small_an_image():
    spec = get_spec("ds_mbnet")
    with pytest.raises(UsageError, match="16x16 px"):
        madds(spec, spec.smallest, 16)
