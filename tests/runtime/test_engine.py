from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ZOO_NAMES, lively, micro_spec, noise

from dynaslim import Engine
from dynaslim.cost import madds
from dynaslim.errors import UsageError
from dynaslim.nn import argmax_one_hot
from dynaslim.spec import NetSpec, StageSpec
from dynaslim.zoo import ZOO


def _close(a, b):
    scale = b.abs().max()
    torch.testing.assert_close(a / scale, b / scale, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_routed_equals_one_at_a_time_static_and_gated(name):
    spec = ZOO[name].replace(num_classes=10)
    engine = Engine(lively(spec))
    x = noise(spec, 15)
    out = engine(x)
    routes = [engine.route_of(row) for row in out.routes]
    assert len(set(routes)) >= 3, "the test needs rows that take different routes"
    one_by_one = [engine(x[b : b + 1]) for b in range(len(x))]
    assert torch.equal(out.routes, torch.cat([one.routes for one in one_by_one]))
    _close(out.logits, torch.cat([one.logits for one in one_by_one]))
    with torch.inference_mode():
        _close(
            out.logits,
            torch.cat([engine.net(x[b : b + 1], route) for b, route in enumerate(routes)]),
        )
        gated = engine.net.forward_gated(x, lambda logits, _: argmax_one_hot(logits))
    _close(out.logits, gated.logits)
    for number, gate in enumerate(spec.gates):
        picked = torch.tensor(gate.choices)[gated.gates[number].argmax(1)]
        assert torch.equal(out.routes[:, number], picked)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_madds_are_those_of_the_route_taken(name):
    spec = ZOO[name].replace(num_classes=10)
    engine = Engine(lively(spec))
    out = engine(noise(spec, 7))
    size = max(32, spec.total_stride)
    expected = [madds(spec, engine.route_of(row), size, slimming_heads=True) for row in out.routes]
    assert out.madds.tolist() == expected


def test_rows_do_not_depend_on_their_company():
    spec = micro_spec()
    engine = Engine(lively(spec))
    x = noise(spec, 32)
    out = engine(x)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    shuffled = engine(x[order])
    assert torch.equal(shuffled.routes, out.routes[order])
    _close(shuffled.logits, out.logits[order])


def test_all_rows_on_one_route():
    spec = micro_spec()
    engine = Engine(lively(spec))
    x = noise(spec, 1).repeat(5, 1, 1, 1)
    out = engine(x)
    assert len(out.routes.unique(dim=0)) == 1
    with torch.inference_mode():
        _close(out.logits, engine.net(x, engine.route_of(out.routes[0])))


def test_empty_batch():
    engine = Engine(lively(micro_spec()))
    out = engine(torch.empty(0, 3, 32, 32))
    assert out.logits.shape == (0, 5)
    assert out.routes.shape == (0, 2)
    assert out.madds.shape == (0,)


def test_concurrent_callers():
    spec = micro_spec()
    engine = Engine(lively(spec))
    batches = [noise(spec, 9, seed=seed) for seed in range(8)]
    alone = [engine(x).logits for x in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: engine(x).logits, batches))
    for a, b in zip(together, alone, strict=True):
        _close(a, b)


def test_wrong_input_leaves_a_working_engine():
    spec = micro_spec()
    engine = Engine(lively(spec))
    x = noise(spec, 3)
    before = engine(x).logits
    with pytest.raises(ValueError, match="micro takes"):
        engine(torch.zeros(3, 1, 32, 32))
    with pytest.raises(ValueError, match="1x1 px"):
        engine(torch.zeros(3, 3, 1, 1))
    assert torch.equal(engine(x).logits, before)


def test_refusals():
    net = lively(micro_spec())
    with pytest.raises(UsageError, match="backend 'tpu': choose from eager"):
        Engine(net, backend="tpu")
    with pytest.raises(RuntimeError, match=r"net\.eval"):
        Engine(net.train())(torch.zeros(1, 3, 32, 32))
    plain = NetSpec("plain", (StageSpec((4,), block="conv"), StageSpec((4,))), num_classes=2)
    with pytest.raises(UsageError, match="plain has no gates"):
        Engine(lively(plain))
