import copy
import itertools

import pytest
import torch
from helpers import (
    ZOO_NAMES,
    assert_rows_close,
    ddp_worker,
    free_port,
    lively,
    lively_net,
    micro_spec,
    noise,
    row_by_row,
    spawn_two,
)
from torch import nn

from dynaslim.errors import UsageError
from dynaslim.nn import SlimNet, argmax_one_hot
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.spec import GateSpec, NetSpec, StageSpec
from dynaslim.zoo import ZOO, get_spec


def forced(spec, indices):
    """A `choose` that sends row b along width indices `indices[b]`."""

    def choose(logits, gate):
        picks = [spec.gates[gate].choices.index(row[gate]) for row in indices]
        return nn.functional.one_hot(torch.tensor(picks), logits.shape[1]).to(logits.dtype)

    return choose


def assert_gated_equals_static(net, combinations):
    """One row per combination of the gates' choices in one gated batch, against each alone."""
    x = noise(net.spec, len(combinations))
    routes = [net.spec.route_at(c) for c in combinations]
    with torch.inference_mode():
        gated = net.forward_gated(x, forced(net.spec, combinations)).logits
    static = row_by_row(net, x, routes)
    assert_rows_close(gated, static)
    # the comparison means something: routes give different answers to the same image
    with torch.inference_mode():
        answers = torch.cat([net(x[:1], route) for route in net.spec.routes])
    assert (answers[0] - answers[1:]).abs().amax(1).min() > 1e-3 * static.abs().max()


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_gated_equals_static(name):
    """Along every route of the routing space, and at widths that it leaves out."""
    net = lively_net(name)
    combinations = list(itertools.product(*(gate.choices for gate in net.spec.gates)))
    assert_gated_equals_static(net, combinations)
    spec = net.spec.with_choices(range(net.spec.num_widths))
    assert_gated_equals_static(
        lively(spec), [(k,) * len(spec.gates) for k in range(spec.num_widths)]
    )


def test_gated_equals_static_with_a_single_width_behind_the_gate():
    spec = NetSpec(
        "fixed-head",
        (
            StageSpec((8,), block="conv"),
            StageSpec((4, 8, 16), gate=GateSpec((0, 1, 2))),
            StageSpec((12,), block="conv", kernel=1),
        ),
        num_classes=4,
    )
    net = lively(spec)
    assert_gated_equals_static(net, [(0,), (1,), (2,)])
    assert net.stages[2][0].body.bn.running_mean.shape == (3, 12)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_no_state_between_calls(name):
    net = lively_net(name)
    spec = net.spec
    x = noise(spec, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.inference_mode():
        first = net(x, spec.routes[0])
        other = net(x, spec.largest)
        net.forward_gated(x, lambda logits, _: argmax_one_hot(logits))
        again = net(x, spec.routes[0])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_forward_many_equals_one_by_one(name):
    net = lively_net(name)
    spec = net.spec
    x = noise(spec, 2)
    routes = (spec.largest, *spec.routes[::3], spec.smallest)
    with torch.inference_mode():
        for many, route in zip(net.forward_many(x, routes), routes, strict=True):
            assert torch.equal(many, net(x, route))


def test_forward_many_has_the_gradients_of_separate_passes():
    spec = micro_spec()
    net = lively(spec).train().double()
    x = noise(spec, 8).double()
    routes = (spec.routes[0], spec.routes[2], spec.largest)
    sum(out.square().sum() for out in net.forward_many(x, routes)).backward()
    shared = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    for route in routes:
        net(x, route).square().sum().backward()
    separate = [p.grad for p in net.parameters() if p.grad is not None]
    torch.testing.assert_close(shared, separate)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_gated_forward_is_differentiable_through_its_gates(name):
    net = copy.deepcopy(lively_net(name))
    spec = net.spec
    net.requires_grad_(False)
    for head in net.slimming_parameters():
        head.requires_grad_(True)
    out = net.forward_gated(noise(spec, 3), lambda logits, _: logits.softmax(1))
    assert len(out.gates) == len(out.gate_logits) == len(spec.gates)
    assert len(net.slimming_parameters()) == len(spec.gates)
    out.logits.square().sum().backward()
    for head in net.slimming_parameters():
        assert torch.isfinite(head.grad).all()
        assert head.grad.abs().max() > 0


def test_gradient_of_a_soft_gate_is_right():
    """Against finite differences, through both gates of a small network."""
    spec = micro_spec()
    net = lively(spec).double()
    x = noise(spec, 2, image_size=8).double()
    start = [torch.rand(2, len(g.choices), dtype=torch.float64) for g in spec.gates]

    def run(*gates):
        return net.forward_gated(x, lambda _, number: gates[number]).logits

    assert torch.autograd.gradcheck(run, [gate.requires_grad_() for gate in start])


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_builds_and_runs_on_meta(name):
    spec = ZOO[name]
    with torch.device("meta"):
        net = SlimNet(spec)
        assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
        out = net(torch.empty(2, 3, 64, 64), spec.routes[1])
    assert out.shape == (2, spec.num_classes)
    assert out.is_meta
    assert SlimNet(spec, device="meta", dtype=torch.bfloat16).classifier.weight.dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_bfloat16_is_close_to_float32(name):
    net = copy.deepcopy(lively_net(name))
    spec = net.spec
    x = noise(spec, 4)
    with torch.inference_mode():
        exact = net(x, spec.routes[1])
        half = net.bfloat16()(x.bfloat16(), spec.routes[1])
        gated = net.forward_gated(
            x.bfloat16(), forced(spec, [(spec.gates[0].choices[-1],) * len(spec.gates)] * 4)
        ).logits
    assert half.dtype == gated.dtype == torch.bfloat16
    # bfloat16 has 8 bits; over 50 layers the error grows but stays far below the signal
    assert (half.float() - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_channels_last(name):
    net = copy.deepcopy(lively_net(name))
    spec = net.spec
    x = noise(spec, 2)
    with torch.inference_mode():
        expected = net(x, spec.routes[1])
        net = net.to(memory_format=torch.channels_last)
        out = net(x.to(memory_format=torch.channels_last), spec.routes[1])
    assert_rows_close(out, expected)


def _count_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiles_every_route_without_falling_back(fullgraph):
    """Dynamo gives up on a code object after 8 recompilations; each route has one of its own."""
    torch.compiler.reset()
    widths = tuple(range(4, 15))
    spec = NetSpec(
        "many-widths",
        (StageSpec((4, 6), block="conv"), StageSpec(widths, gate=GateSpec((0, 10)))),
        num_classes=3,
    )
    net = lively(spec)
    x = noise(spec, 2)
    routes = (*spec.routes, spec.largest)
    assert len(routes) > torch._dynamo.config.recompile_limit
    graphs, backend = _count_graphs()
    compiled = torch.compile(net, backend=backend, fullgraph=fullgraph)
    with torch.no_grad():
        for route in routes:
            torch.testing.assert_close(compiled(x, route), net(x, route))
        assert len(graphs) == len(routes)
        for route in routes:
            compiled(x, route)
    assert len(graphs) == len(routes)  # the second round compiled nothing


def test_many_networks_compile_in_one_process():
    torch.compiler.reset()
    graphs, backend = _count_graphs()
    count = torch._dynamo.config.recompile_limit + 3
    nets = [lively(micro_spec(num_classes=2 + n)) for n in range(count)]
    with torch.no_grad():
        for net in nets:
            torch.compile(net, backend=backend)(noise(net.spec, 2), net.spec.smallest)
    assert len(graphs) == count


def test_compiles_with_inductor():
    torch.compiler.reset()
    spec = micro_spec()
    net = lively(spec)
    x = noise(spec, 3)
    compiled = torch.compile(net, fullgraph=True)
    route = spec.routes[1]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, route), net(x, route), atol=1e-5, rtol=1e-4)


def test_training_updates_only_the_statistics_of_its_width():
    spec = micro_spec()
    net = SlimNet(spec).train()
    net(noise(spec, 8), spec.routes[1])
    last = [m for m in net.modules() if isinstance(m, SlimBatchNorm2d)][-1]
    assert last.num_batches_tracked.tolist() == [0, 1, 0, 0]
    assert (last.running_mean[1, :8] != 0).all()
    assert (last.running_mean[1, 8:] == 0).all()
    for untouched in (0, 2, 3):
        assert (last.running_mean[untouched] == 0).all()


def test_one_plus_tanh_attention_starts_as_the_identity():
    net = SlimNet(get_spec("ds_resnet_cifar"))
    gate = net.stages[2][0].gate
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(gate(x)[0], x)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 32, 32), r"shape \(2, 1, 32, 32\): ds_mbnet_tiny takes \(rows, 3"),
        ((3, 32, 32), r"shape \(3, 32, 32\)"),
        ((2, 3, 4, 32), "4x32 px: ds_mbnet_tiny divides it by 8"),
    ],
)
def test_input_that_does_not_fit(shape, message):
    net = SlimNet(get_spec("ds_mbnet_tiny")).eval()
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(shape), net.spec.smallest)
    with pytest.raises(ValueError, match=message):
        net.forward_gated(torch.zeros(shape), lambda logits, _: argmax_one_hot(logits))


def test_a_route_is_named_in_three_ways():
    net = lively(micro_spec())
    x, route = torch.randn(2, 3, 32, 32), net.spec.smallest
    expected = net(x, route)
    assert torch.equal(net(x, str(route)), expected)
    assert torch.equal(net(x, list(route.widths)), expected)
    (same,) = net.forward_many(x, [str(route)])
    assert torch.equal(same, expected)
    with pytest.raises(UsageError, match="'wide': expected channel counts joined by '-'"):
        net(x, "wide")


def test_gated_forward_needs_running_statistics():
    net = SlimNet(micro_spec())
    with pytest.raises(RuntimeError, match=r"net\.eval"):
        net.forward_gated(torch.zeros(1, 3, 16, 16), lambda logits, _: argmax_one_hot(logits))


def test_distributed_data_parallel_averages_gradients(tmp_path):
    spawn_two(ddp_worker, free_port(), str(tmp_path))
    spec = micro_spec()
    net = lively(spec)
    for parameter in net.slimming_parameters():
        parameter.requires_grad_(False)
    for route in (spec.largest, spec.routes[0]):
        net(noise(spec, 8), route).square().mean().backward()
    distributed = torch.load(tmp_path / "grads.pt", weights_only=True)
    for ours, theirs in zip((p.grad for p in net.parameters()), distributed, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-5)
