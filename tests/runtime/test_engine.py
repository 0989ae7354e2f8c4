"""Routed inference: every row answered as if it had come alone, along the route that it took."""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from helpers import (
    MIRROR,
    ZOO_NAMES,
    assert_rows_close,
    curved,
    for_backends,
    forced,
    lively,
    lively_net,
    micro_spec,
    noise,
    row_by_row,
)

from dynaslim import Engine
from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import CostTable, madds
from dynaslim.errors import UsageError
from dynaslim.nn import argmax_one_hot
from dynaslim.runtime.budget import BudgetPoint
from dynaslim.runtime.escalation import margins
from dynaslim.spec import NetSpec, StageSpec

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_BACKEND = ("eager", "onnxruntime", "openvino")


@cache
def engine_of(name, backend, workers=2):
    """Shared, as engines are meant to be; programs go to the cache of this session."""
    return Engine(lively_net(name), backend=backend, workers=workers)


@cache
def gated(name, rows):
    """Rows with the routes that their gates choose and the answers of each alone, by the network.

    Rows that a gate is all but undecided about are left out: rounding may send them either way.
    """
    net, gaps = lively_net(name), []

    def choose(logits, _):
        best = logits.topk(2, dim=1).values
        gaps.append(best[:, 0] - best[:, 1])
        return argmax_one_hot(logits)

    x = noise(net.spec, 2 * rows + 10)
    with torch.inference_mode():
        gates = net.forward_gated(x, choose).gates
    picked = [
        torch.tensor(gate.choices)[one_hot.argmax(1)]
        for gate, one_hot in zip(net.spec.gates, gates, strict=True)
    ]
    indices = torch.stack(picked, 1)
    clear = (torch.stack(gaps).amin(0) > 0.3).nonzero().flatten()[:rows]
    assert len(clear) == rows
    x, indices = x[clear], indices[clear]
    routes = [net.spec.route_at(row) for row in indices.tolist()]
    assert len(set(routes)) >= 3, "the test needs rows that take different routes"
    logits = row_by_row(net, x, routes)
    with torch.inference_mode():
        elsewhere = net(x, net.spec.routes[1])
    others = torch.tensor([route != net.spec.routes[1] for route in routes])
    apart = (logits - elsewhere).abs().amax(1)[others] / logits.abs().max()
    assert apart.min() > 2e-3, "the test needs routes that give different answers"
    return x, indices, routes, logits


@cache
def every_path(rows=33, size=(32, 32)):
    """Rows for the micro network and what it answers for each along every path of its gates."""
    net = lively_net("micro")
    x = noise(net.spec, rows, image_size=max(size))[:, :, : size[0], : size[1]].contiguous()
    paths = list(itertools.product(*(range(len(gate.choices)) for gate in net.spec.gates)))
    answers = {path: row_by_row(net, x, [net.spec.route_along(path)] * rows) for path in paths}
    return x, answers


def _indices(spec, path):
    return [gate.choices[option] for gate, option in zip(spec.gates, path, strict=True)]


def _paths(spec, routes):
    """Options of every row, from width indices."""
    return [spec.path_at(row) for row in np.asarray(routes).tolist()]


def _margin(logits, share):
    """One that lies between those of two rows, so that rounding moves none across."""
    values = np.sort(margins(np.asarray(logits)))
    at = int(share * len(values))
    return float(values[at : at + 2].mean())


# -- routed equals static, row by row -------------------------------------------------------------


@for_backends(*EVERY_BACKEND)
@pytest.mark.parametrize("name", ZOO_NAMES)
def test_every_row_is_answered_as_if_alone(name, backend):
    engine = engine_of(name, backend)
    x, indices, routes, expected = gated(name, 7 if name == "ds_resnet50" else 15)
    out = engine(x)
    assert out.routes.tolist() == indices.tolist()
    assert_rows_close(out.logits, expected, 5e-5)
    assert [engine.route_of(row) for row in out.routes] == routes
    size = x.shape[-1]
    cost = [madds(engine.spec, route, size, slimming_heads=True) for route in routes]
    assert out.madds.tolist() == cost
    assert not out.escalated.any()


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("workers", [1, 2])
@for_backends(*EVERY_BACKEND)
def test_any_number_of_rows(backend, workers, rows):
    engine = engine_of("micro", backend, workers)
    x, indices, _, expected = gated("micro", 33)
    for start in (0, 33 - rows):
        some = slice(start, start + rows)
        out = engine(x[some])
        assert out.routes.tolist() == indices[some].tolist()
        assert_rows_close(out.logits, expected[some])


def _mixes(spec):
    """Options (33, G): one path for all, each in turn, two of them, at random."""
    rng = np.random.default_rng(0)
    paths = np.array(list(itertools.product(*(range(len(gate.choices)) for gate in spec.gates))))
    for path in paths:
        yield np.tile(path, (33, 1))
    yield paths[np.arange(33) % len(paths)]
    yield paths[-1 - np.arange(33) % len(paths)]
    for first, second in itertools.pairwise(range(len(paths))):  # most buckets empty
        yield paths[np.where(np.arange(33) == 17, first, second)]
    for _ in range(5):
        yield paths[rng.integers(0, len(paths), 33)]


@pytest.mark.parametrize("workers", [1, 2])
@for_backends(*EVERY_BACKEND)
def test_any_mix_of_routes(backend, workers):
    engine = engine_of("micro", backend, workers)
    x, answers = every_path()
    for options in _mixes(engine.spec):
        logits, taken, passes = forced(engine, x, options)
        assert taken.tolist() == options.tolist()
        assert passes == ()
        expected = [answers[tuple(path)][b] for b, path in enumerate(options.tolist())]
        assert_rows_close(logits, torch.stack(expected))


@for_backends(*EVERY_BACKEND)
def test_images_of_several_sizes_through_one_engine(backend):
    engine = engine_of("micro", backend)
    for size in ((32, 32), (20, 36), (40, 24), (4, 4), (32, 32)):
        x, answers = every_path(11, size)
        out = engine(x)
        paths = _paths(engine.spec, out.routes)
        expected = torch.stack([answers[path][b] for b, path in enumerate(paths)])
        assert_rows_close(out.logits, expected)
        assert out.madds.tolist() == [
            CostTable.from_madds(engine.spec, size).route_cost(path) for path in paths
        ]
        alone = torch.cat([engine(x[b : b + 1]).routes for b in range(11)])
        assert out.routes.tolist() == alone.tolist()


@pytest.mark.parametrize("name", ["ds_mbnet_tiny", "ds_resnet_cifar"])
def test_images_that_no_stride_divides(name):
    engine = engine_of(name, "eager")
    x = noise(engine.spec, 5, image_size=45)[:, :, :, :37]
    out = engine(x)
    routes = [engine.route_of(row) for row in out.routes]
    assert_rows_close(out.logits, row_by_row(lively_net(name), x, routes), 5e-5)
    assert_rows_close(engine.static(routes[0])(x[:1]), out.logits[:1], 5e-5)


# -- the arguments of a call ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["micro", "ds_mbnet_tiny", "ds_mobilenet_v2", "ds_resnet50"])
def test_a_large_shift_sends_all_rows_one_way(name):
    engine = engine_of(name, "eager")
    x = noise(engine.spec, 5)
    for shift, route in ((1e9, engine.spec.cheapest_choice), (-1e9, engine.spec.widest_choice)):
        out = engine(x, shift=shift)
        assert {engine.route_of(row) for row in out.routes} == {route}
        assert_rows_close(out.logits, row_by_row(lively_net(name), x, [route] * 5), 5e-5)
    assert engine(x, shift=0.0).routes.tolist() == engine(x).routes.tolist()


@pytest.mark.parametrize("name", ["ds_mbnet", "ds_mbnet_tiny"])
def test_cost_of_every_row_falls_with_the_shift(name):
    engine = engine_of(name, "eager")
    x, _, routes, _ = gated(name, 15)
    costs = [engine(x, shift=shift).madds for shift in (-50, -8, -2, 0, 1, 3, 8, 50)]
    for cheaper, wider in itertools.pairwise(reversed(costs)):
        assert (cheaper <= wider).all()
    assert len({cost.sum().item() for cost in costs}) > 4
    own = [madds(engine.spec, route, x.shape[-1], slimming_heads=True) for route in routes]
    assert costs[3].tolist() == own


@for_backends(*EVERY_BACKEND)
@pytest.mark.parametrize("name", ["micro", "ds_resnet_cifar"])
def test_static_is_one_route_for_all(name, backend):
    engine = engine_of(name, backend)
    spec, net = engine.spec, lively_net(name)
    x = noise(spec, 6)
    for route in {spec.smallest, spec.routes[1], spec.widest_choice, spec.largest}:
        run = engine.static(route)
        expected = row_by_row(net, x, [route] * 6)
        assert_rows_close(run(x), expected, 5e-5)
        assert_rows_close(engine.static(list(route.widths))(x[:1]), expected[:1], 5e-5)
    assert run(x[:0]).shape == (0, spec.num_classes)
    assert isinstance(run(x.numpy()), np.ndarray)
    with pytest.raises(UsageError, match="stages, a route has one width for each"):
        engine.static((1, 2))


@for_backends("onnxruntime", "openvino")
def test_static_without_programs_of_whole_routes(backend, monkeypatch):
    """As an engine of a package runs it."""
    from dynaslim.runtime.network_source import NetworkSource

    monkeypatch.setattr(NetworkSource, "has_modules", False)
    spec = micro_spec()
    engine = Engine(lively_net("micro"), backend=backend, max_batch=5)
    x, answers = every_path()
    for path in ((0, 1), (1, 0)):
        run = engine.static(spec.route_along(path))
        assert_rows_close(run(x), answers[path])
    with pytest.raises(UsageError, match="is not in the package"):
        engine.static(spec.largest)


@for_backends(*EVERY_BACKEND)
def test_answers_come_as_the_images_did(backend):
    engine = engine_of("micro", backend)
    x, _, _, expected = gated("micro", 33)
    kinds = {"logits": "float32", "routes": "int64", "madds": "float64", "escalated": "bool"}
    kinds["mirrored"] = "bool"
    for images, kind in ((x, torch.Tensor), (x.numpy(), np.ndarray)):
        out = engine(images)
        for field, dtype in kinds.items():
            value = getattr(out, field)
            assert isinstance(value, kind)
            assert str(value.dtype).removeprefix("torch.") == dtype
        logits, routes, cost = out
        assert logits is out.logits
        assert routes is out.routes
        assert cost is out.madds
        assert_rows_close(logits, expected)
        nothing = engine(images[:0])
        assert [tuple(getattr(nothing, field).shape) for field in kinds] == [
            (0, 5),
            (0, 2),
            (0,),
            (0,),
            (0,),
        ]
        assert isinstance(nothing.logits, kind)
        assert engine(images, shift=1e9).routes.tolist() == [[0, 0]] * 33


@for_backends(*EVERY_BACKEND)
def test_images_may_lie_in_memory_as_they_like(backend):
    engine = engine_of("micro", backend)
    x, indices, _, expected = gated("micro", 33)
    plain, before = x.numpy(), x.clone()
    read_only = plain.copy()
    read_only.setflags(write=False)
    many = {
        "reversed": np.ascontiguousarray(plain[::-1, :, ::-1])[::-1, :, ::-1],
        "by columns": np.asfortranarray(plain),
        "read only": read_only,
        "double": plain.astype(np.float64),
        "big endian": plain.astype(">f4"),
        "every other": np.repeat(plain, 2, axis=0)[::2],
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "expanded": x[:, :, None].expand(-1, -1, 2, -1, -1)[:, :, 1],
        "with gradient": x.clone().requires_grad_(),
        "double tensor": x.double(),
    }
    for what, images in many.items():
        out = engine(images)
        assert out.routes.tolist() == indices.tolist(), what
        assert_rows_close(out.logits, expected)
    assert torch.equal(x, before), "the images must stay as they are"
    half = plain.astype(np.float16)
    assert_rows_close(
        engine(half, shift=1e9).logits, engine(half.astype(np.float32), shift=1e9).logits
    )


@for_backends(*EVERY_BACKEND)
def test_answers_outlive_the_next_call(backend):
    engine = engine_of("micro", backend)
    x, _, _, _ = gated("micro", 33)
    out, static = engine(x), engine.static(engine.spec.smallest)(x)
    kept = [value.clone() for value in (out.logits, out.routes, out.madds, static)]
    engine(-x)
    engine.static(engine.spec.smallest)(-x)
    for value, before in zip((out.logits, out.routes, out.madds, static), kept, strict=True):
        assert torch.equal(value, before)


@for_backends(*EVERY_BACKEND)
def test_batches_above_the_limit_are_split(backend):
    x, indices, _, expected = gated("micro", 33)
    engine = Engine(lively_net("micro"), backend=backend, max_batch=5)
    out = engine(x)
    assert out.routes.tolist() == indices.tolist()
    assert_rows_close(out.logits, expected)
    assert out.madds.tolist() == engine_of("micro", backend)(x).madds.tolist()
    assert isinstance(engine(x.numpy()).madds, np.ndarray)
    x, answers = every_path()
    assert_rows_close(engine.static(engine.spec.cheapest_choice)(x), answers[0, 0])


@pytest.mark.parametrize("piece", [1, 2, 5, 100])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_size_of_pieces_changes_no_answer(workers, piece):
    x, indices, _, expected = gated("micro", 33)
    engine = Engine(lively_net("micro"), backend="eager", workers=workers, rows_per_piece=piece)
    for _ in range(3):  # plans follow what was measured
        out = engine(x)
        assert out.routes.tolist() == indices.tolist()
        assert_rows_close(out.logits, expected)


def test_inside_and_outside_of_inference_mode():
    x, _, _, expected = gated("micro", 33)
    for workers in (1, 2):
        engine = Engine(lively_net("micro"), backend="eager", workers=workers)
        with torch.inference_mode():
            assert_rows_close(engine(x[:3]).logits.clone(), expected[:3])
        assert_rows_close(engine(x).logits, expected)
        with torch.inference_mode():
            assert_rows_close(engine(x.clone()).logits.clone(), expected)
        assert not engine(x).logits.requires_grad


def test_the_network_may_change_later():
    x, indices, _, expected = gated("micro", 33)
    net = lively(micro_spec())
    engine = Engine(net, backend="eager")
    engine(x[:1])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    net.train()
    out = engine(x)  # forms that are made only now
    assert out.routes.tolist() == indices.tolist()
    assert_rows_close(out.logits, expected)
    changed = Engine(net.eval(), backend="eager")(x)
    assert (changed.logits - out.logits).abs().max() > out.logits.abs().max()


def test_warm_up_leaves_nothing_to_compile():
    engine = Engine(lively_net("micro"), backend="onnxruntime", workers=2, cache_dir=None)
    engine.warm_up(32)
    compiled = list(engine.counts.compiled)
    assert len(compiled) == len(set(compiled)) == 2 * (1 + 2 + 2 * 3)
    x, _ = every_path()
    for options in _mixes(engine.spec):
        forced(engine, x, options)
    assert engine.counts.compiled == compiled
    with pytest.raises(UsageError, match="at least 4 px"):
        engine.warm_up(2)


# -- escalation and caps --------------------------------------------------------------------------


def _after_escalation(engine, x, first, who, target):
    """Routes, costs and answers when rows `who` escalate to `target`."""
    spec = engine.spec
    table = CostTable.from_madds(spec, tuple(x.shape[2:]))
    paths, routes, cost = _paths(spec, first.routes), first.routes.clone(), []
    for b, path in enumerate(paths):
        cost.append(table.route_cost(path))
        if who[b]:
            routes[b] = torch.tensor(_indices(spec, target))
            cost[b] += table.route_cost(target) - table.segments[0][0][0]
    taken = [engine.route_of(row) for row in routes]
    return routes, cost, row_by_row(lively_net(spec.name), x, taken)


@pytest.mark.parametrize(
    ("name", "backend", "share", "target"),
    [
        ("micro", "eager", 1.0, (1, 2)),
        ("micro", "onnxruntime", 1.0, (1, 2)),
        ("micro", "openvino", 1.0, (1, 2)),
        ("ds_resnet50", "eager", 1.0, (3, 3, 3, 3)),
        ("micro", "eager", 0.5, (1, 2)),
        ("micro", "eager", 1.0, (1, 1)),
    ],
)
def test_unsure_rows_escalate_to_the_widest_or_the_cap(name, backend, share, target):
    if backend != "eager":
        pytest.importorskip(backend)
    engine = engine_of(name, backend)
    x, _, _, _ = gated(name, 33 if name == "micro" else 7)
    cap = engine.spec.route_along(target)
    first = engine(x, max_route=cap)
    tau = _margin(first.logits, share) if share < 1 else 1.0
    who = [
        path != target and (tau == 1 or margin < tau)
        for path, margin in zip(
            _paths(engine.spec, first.routes), margins(np.asarray(first.logits)), strict=True
        )
    ]
    assert any(who)
    assert share == 1 or 3 < sum(who) < 30
    out = engine(x, escalate=tau, max_route=cap)
    routes, cost, expected = _after_escalation(engine, x, first, who, target)
    assert out.escalated.tolist() == who
    assert out.routes.tolist() == routes.tolist()
    assert out.madds.tolist() == pytest.approx(cost, rel=1e-12)
    assert_rows_close(out.logits, expected, 5e-5)


def test_no_margin_no_escalation():
    engine = engine_of("micro", "eager")
    x, _, _, _ = gated("micro", 33)
    first = engine(x)
    for none in (0, 0.0, None, "auto"):  # "auto" follows a budget, and there is none
        same = engine(x, escalate=none)
        assert not same.escalated.any()
        assert same.routes.tolist() == first.routes.tolist()
        assert same.madds.tolist() == first.madds.tolist()


@pytest.mark.parametrize("name", ["ds_mbnet_tiny", "ds_mobilenet_v2", "ds_resnet50"])
def test_no_row_is_wider_than_the_cap(name):
    engine = engine_of(name, "eager")
    spec, net = engine.spec, lively_net(name)
    gates = len(spec.gates)
    x, _, _, _ = gated(name, 7)
    own = engine(x).routes
    for limits in {(1,) * gates, (3,) * gates, (0,) * gates, (2, *(0,) * (gates - 1))}:
        cap = spec.route_at(limits)
        for arguments in ({}, {"shift": -1e9}, {"shift": 3.0}, {"escalate": 1.0}):
            out = engine(x, max_route=cap, **arguments)
            assert (out.routes <= torch.tensor(limits)).all()
            taken = [engine.route_of(row) for row in out.routes]
            assert_rows_close(out.logits, row_by_row(net, x, taken), 5e-5)
            if arguments.get("shift") == -1e9 or "escalate" in arguments:
                assert set(taken) == {cap}
            if gates == 1 and not arguments:
                under = own <= torch.tensor(limits)
                assert out.routes[under].tolist() == own[under].tolist()
    assert engine(x, max_route=spec.largest).routes.tolist() == own.tolist()


def test_cap_below_all_that_the_gate_can_choose():
    spec = micro_spec().with_choices((1, 2), (1, 2))
    engine = Engine(lively(spec), backend="eager")
    x = noise(spec, 3)
    with pytest.raises(UsageError, match=r"below the cheapest route of the gates, 4-8-8"):
        engine(x, max_route=spec.smallest)
    assert {tuple(row) for row in engine(x, max_route=spec.routes[1]).routes.tolist()} == {(1, 1)}
    with pytest.raises(UsageError, match="stages, a route has one width for each"):
        engine(x, max_route=(4, 4))


@pytest.mark.parametrize("name", ["micro", "ds_resnet_cifar"])
def test_arguments_of_calls_do_not_mix(name):
    """The arguments of calls are kept between them."""
    x, engine = noise(lively_net(name).spec, 9), engine_of(name, "eager")
    spec = engine.spec
    settings: list[dict] = [{}, {"shift": -5.0}, {"shift": 2.0}, {"escalate": 0.5}, {"escalate": 1}]
    settings += [{"max_route": spec.routes[1]}, {"max_route": list(spec.routes[1].widths)}]
    settings += [{"shift": n / 50} for n in range(70)]
    alone = [Engine(lively_net(name), backend="eager")(x, **setting) for setting in settings[:7]]
    for _ in range(2):
        for setting, one in zip(settings, [*alone, *[None] * 70], strict=False):
            out = engine(x, **setting)
            if one is not None:
                assert out.routes.tolist() == one.routes.tolist()
                assert out.madds.tolist() == one.madds.tolist()
    assert len({tuple(map(tuple, one.routes.tolist())) for one in alone}) > 2


@pytest.mark.parametrize(
    ("rows", "workers", "own_core"), [(1, 2, True), (3, 2, False), (1, 1, False)]
)
def test_small_calls_keep_to_their_core_while_every_core_has_a_caller(
    rows, workers, own_core, monkeypatch
):
    """By ONNX Runtime, whose threads wait for each other by spinning."""
    net = lively_net("micro")
    engine = Engine(net, backend="onnxruntime", workers=workers)
    x = noise(net.spec, rows)
    alone, seen = engine(x), []
    backend, first = engine._router.backend, threading.Event()
    made, meeting = backend.program, threading.Barrier(2, timeout=30)

    def program(variant, shape, *, wide):
        run = made(variant, shape, wide=wide)
        if not variant.takes_images or first.is_set():
            return run
        seen.append(wide)

        def meet(images, outs):
            if not first.is_set() and meeting.wait() == 0:  # two calls are inside their trunks
                first.set()
            run(images, outs)

        return meet

    monkeypatch.setattr(backend, "program", program)
    with ThreadPoolExecutor(2) as callers:
        answers = list(callers.map(lambda _: engine(x), range(2)))
    for out in answers:
        assert_rows_close(out.logits, alone.logits)
        assert out.routes.tolist() == alone.routes.tolist()
    assert sorted(seen) == [not own_core, True]  # who came first was still alone


# -- budgets --------------------------------------------------------------------------------------


def test_mean_cost_follows_the_budget():
    engine, x = curved("micro")
    curve, widest = engine.curve, engine.curve.widest_madds
    for escalate in ("auto", None):
        means = []
        for budget in np.linspace(0.65, 1, 18):
            mean = engine(x, budget=float(budget), escalate=escalate).madds.mean().item()
            cheapest = min(point.madds for point in curve.gate_points)
            assert mean <= max(budget * widest, cheapest) * (1 + 1e-9)
            means.append(mean)
        assert means == sorted(means)
        assert len(set(means)) >= 3
    millions = f"{curve.gate_points[2].madds / 1e6:.12f}M"
    assert engine(x, budget=millions, escalate=None).madds.mean().item() == pytest.approx(
        curve.gate_points[2].madds
    )


def test_a_margin_of_ones_own_comes_before_that_of_the_budget():
    engine, x = curved("micro")
    assert not engine(x, budget=1.0, escalate=None).escalated.any()
    unsure = next(point for point in engine.curve.points if point.escalated > 0)
    assert engine(x, budget=unsure).escalated.double().mean().item() == unsure.escalated
    for one in (engine, engine_of("micro", "eager")):  # with a curve and without
        assert not one(x, budget=unsure, escalate=None).escalated.any()
        assert one(x, budget=unsure, escalate=np.float32(1)).escalated.all()
    # a margin of one's own goes on top of the gate's budget
    on_top = engine(x, budget=0.75, escalate=1.0)
    assert {engine.route_of(row) for row in on_top.routes} == {engine.spec.widest_choice}


@for_backends(*EVERY_BACKEND)
@pytest.mark.parametrize("name", ["micro", "ds_mbnet_tiny"])
def test_escalation_in_two_steps(name, backend):
    """Row by row: the cheapest answer, where it is unsure the middle one, then the widest."""
    engine, (x, _, _, _) = engine_of(name, backend), gated(name, 33)
    spec = engine.spec
    table = CostTable.from_madds(engine.spec, tuple(x.shape[2:]))
    options = [len(gate.choices) for gate in engine.spec.gates]
    cheapest, middle = (tuple(min(n, k - 1) for k in options) for n in (0, 1))
    widest = tuple(k - 1 for k in options)
    paths = {"cheapest": cheapest, "middle": middle, "widest": widest}
    answers = {n: engine.static(spec.route_along(p))(x) for n, p in paths.items()}
    tau = _margin(answers["cheapest"], 0.6)
    unsure = margins(np.asarray(answers["cheapest"])) < tau
    then = _margin(np.asarray(answers["middle"])[unsure], 0.5)
    point = BudgetPoint(1e6, tau, middle, 1.0, 1.0, None, 0.5, 0.6, None, then, widest)
    out = engine(x, budget=point)
    kept = table.segments[0][0][0]
    seen = set()
    for row in range(33):
        walk = ["cheapest"]
        if unsure[row]:
            walk.append("middle")
            if margins(np.asarray(answers["middle"])[row : row + 1])[0] < then:
                walk.append("widest")
        assert out.routes[row].tolist() == _indices(spec, paths[walk[-1]])
        assert_rows_close(out.logits[row : row + 1], answers[walk[-1]][row : row + 1])
        costs = [table.route_cost(paths[name]) for name in walk]
        assert float(out.madds[row]) == pytest.approx(sum(costs) - kept * (len(walk) - 1))
        assert bool(out.escalated[row]) == (len(walk) > 1)
        seen.add(walk[-1])
    assert seen == set(paths), "the test needs rows that stop at every step"
    one = engine(x[:1], budget=point)
    assert_rows_close(one.logits, out.logits[:1])
    assert one.routes.tolist() == out.routes[:1].tolist()
    # where the widest is not allowed, the second step has nowhere to go
    capped = engine(x, budget=point, max_route=spec.route_along(middle))
    assert {tuple(row) for row in capped.routes.tolist()} == {
        tuple(_indices(spec, paths[name])) for name in ("cheapest", "middle")
    }
    assert not engine(x, budget=point, escalate=None).escalated.any()


@for_backends(*EVERY_BACKEND)
@pytest.mark.parametrize("name", ["micro", "ds_mbnet_tiny"])
def test_a_second_look(name, backend):
    """Row by row: the widest answer, and where that is unsure the mean with the mirror image's."""
    rows = 33
    engine = Engine(Checkpoint(lively_net(name), recipe=MIRROR), backend=backend, workers=2)
    x, spec = gated(name, rows)[0], engine.spec
    table = CostTable.from_madds(spec, tuple(x.shape[2:]))
    cheapest, widest = ([k * end for k in _last(spec)] for end in (0, 1))
    narrow, wide, mirrored = (
        engine.static(spec.route_along(path))(images)
        for path, images in ((cheapest, x), (widest, x), (widest, x.flip(3)))
    )
    mean = ((wide.softmax(1) + mirrored.softmax(1)) / 2).log()
    tau = _margin(narrow, 0.7)
    unsure = margins(narrow.numpy()) < tau
    then = _margin(wide[unsure], 0.5)
    point = BudgetPoint(1e6, tau, tuple(widest), 1.0, 1.0, None, 0.5, 0.6)
    point = dataclasses.replace(point, tau_mirror=then, mirror_along=tuple(widest))
    out = engine(x, budget=point)
    whole, seen = table.route_cost(widest), set()
    for row in range(rows):
        again = bool(unsure[row])
        look = again and bool(margins(wide.numpy())[row] < then)
        seen.add((again, look))
        assert (bool(out.escalated[row]), bool(out.mirrored[row])) == (again, look)
        assert out.routes[row].tolist() == _indices(spec, widest if again else cheapest)
        expected = mean if look else wide if again else narrow
        at = slice(row, row + 1)
        assert_rows_close(out.logits[at].softmax(1), expected[at].softmax(1), 1e-4)
        cost = table.route_cost(cheapest) + again * (whole - table.segments[0][0][0]) + look * whole
        assert float(out.madds[row]) == pytest.approx(cost)
    assert seen == {(False, False), (True, False), (True, True)}, "the test needs rows of all kinds"
    one = engine(x[:1].numpy(), budget=point)
    assert isinstance(one.mirrored, np.ndarray)
    assert_rows_close(torch.from_numpy(one.logits), out.logits[:1], 1e-4)
    # no step before: where the gates send all along the widest route
    alone = dataclasses.replace(point, shift=-1e6, tau=None, escalate_to=None)
    all_wide = engine(x, budget=alone)
    assert all_wide.mirrored.tolist() == (margins(wide.numpy()) < then).tolist()
    assert all_wide.escalated.tolist() == all_wide.mirrored.tolist()
    assert all_wide.madds.tolist() == pytest.approx(
        [whole * (1 + bool(look)) for look in all_wide.mirrored]
    )
    assert not engine(x, budget=point, escalate=None).mirrored.any()
    assert not engine(x, budget=point, escalate=1.0).mirrored.any()
    split = Engine(
        Checkpoint(lively_net(name), recipe=MIRROR), backend=backend, workers=2, max_batch=4
    )
    assert_rows_close(split(x, budget=point).logits, out.logits, 1e-4)


def test_no_second_look_where_it_changes_the_class():
    x = gated("micro", 33)[0]
    point = BudgetPoint(-1e6, None, None, 1.0, 1.0, None, 0.5, 0.6)
    point = dataclasses.replace(point, tau_mirror=0.25, mirror_along=(1, 2))
    flips = {"augment": {"mirror": False}}
    for recipe in ({}, {"supernet": flips}, {**MIRROR, "gate": flips}, {"supernet": {"x": 1}}):
        checkpoint = Checkpoint(lively_net("micro"), recipe=recipe)
        assert not checkpoint.mirror
        engine = Engine(checkpoint, backend="eager")
        with pytest.raises(UsageError, match=r"tau_mirror 0.25: micro must not be shown mirror"):
            engine(x, budget=point)
        assert len(engine(x).logits) == 33, "it works on"
    assert Checkpoint(lively_net("micro"), recipe={**MIRROR, "gate": MIRROR["supernet"]}).mirror
    # a curve is refused before any image is
    curve = curved("micro")[0].curve
    dear = dataclasses.replace(
        point, madds=1.5 * curve.widest_madds, share=1.5, escalated=0.5, ms=None
    )
    looks = dataclasses.replace(curve, points=(*curve.points, dear)).to_dict()
    Engine(Checkpoint(lively_net("micro"), recipe=MIRROR, budget=looks), backend="eager")
    with pytest.raises(UsageError, match=r"tau_mirror 0.25"):
        Engine(Checkpoint(lively_net("micro"), budget=looks), backend="eager")


def _last(spec):
    """The widest path."""
    return [len(gate.choices) - 1 for gate in spec.gates]


def test_refused_budgets():
    engine, x = curved("micro")
    expected = engine(x).logits
    engine(x, budget=1.0)  # the arguments of a call are remembered; True equals 1.0
    for budget, message in (
        ("4.5ms", "has no milliseconds"),
        ("drop=-1", "give a share"),
        (1.5, "give a share"),
        (0, "give a share"),
        ("cheap", "give a share"),
        (True, "give a share"),
    ):
        with pytest.raises(UsageError, match=message):
            engine(x, budget=budget)
    with pytest.raises(UsageError, match="a budget or a shift, not both"):
        engine(x, budget=0.5, shift=0.0)
    for escalate in (1.5, -0.1, float("nan"), "always", True, torch.tensor(0.5)):
        with pytest.raises(UsageError, match="a margin from 0 to 1"):
            engine(x, escalate=escalate)
    for shift in (float("nan"), float("inf"), torch.tensor(1.0)):
        with pytest.raises(UsageError, match="give a finite number"):
            engine(x, shift=shift)
    curve = engine.curve
    for target in ((5, 5, 5), (1,), (0, -1)):
        foreign = dataclasses.replace(curve.points[0], tau=0.5, escalate_to=target)
        with pytest.raises(UsageError, match="does not fit the gates of micro"):
            engine(x, budget=foreign)
        foreign = dataclasses.replace(curve.points[0], tau_then=0.5, escalate_then=target)
        with pytest.raises(UsageError, match=r"escalate_then .* does not fit the gates of micro"):
            engine(x, budget=foreign)
    with pytest.raises(UsageError, match="dynaslim calibrate-budget"):
        engine_of("micro", "eager")(x, budget=0.5)
    assert_rows_close(engine(x).logits, expected)


def test_a_curve_of_another_network():
    curve = curved("micro")[0].curve
    budget = dataclasses.replace(curve, widest_madds=curve.widest_madds * 2).to_dict()
    for point in (p for name in ("points", "gate_points") for p in budget[name]):
        point["share"] /= 2
    with pytest.raises(UsageError, match="widest route costs"):
        Engine(Checkpoint(lively_net("micro"), budget=budget), backend="eager")


# -- what is refused ------------------------------------------------------------------------------


def _with(x, row, value):
    x = x.clone()
    x[row, 1, 2, 3] = value
    return x


BAD = {
    "one image": (lambda x: x[0], "shape"),
    "channels": (lambda x: x[:, :1], "micro takes"),
    "no channels": (lambda x: x[:, 0], "micro takes"),
    "bytes": (lambda x: x.byte(), "floating point"),
    "integers in numpy": (lambda x: x.numpy().astype(np.int64), "floating point"),
    "complex": (lambda x: x.numpy().astype(np.complex64), "floating point"),
    "a list": (lambda x: x.tolist(), "give a numpy array or a tensor"),
    "nothing": (lambda x: None, "give a numpy array or a tensor"),
    "a number": (lambda x: np.float32(1), "give a numpy array or a tensor"),
    "no dimensions": (lambda x: np.zeros(()), "shape"),
    "not a number": (lambda x: _with(x, 5, torch.nan), "row 5 has values that are not finite"),
    "infinity": (lambda x: _with(x, 0, torch.inf), "row 0 has"),
    "minus infinity in numpy": (lambda x: _with(x, 32, -torch.inf).numpy(), "row 32 has"),
    "both infinities": (lambda x: _with(_with(x, 7, torch.inf), 7, -torch.inf), "row 7 has"),
    "too narrow": (lambda x: x[:, :, :, :3], "32x3 px"),
    "too low": (lambda x: x[:, :, :1], "1x32 px"),
}


@pytest.mark.parametrize("what", BAD)
@for_backends(*EVERY_BACKEND)
def test_bad_images_leave_a_working_engine(backend, what):
    change, message = BAD[what]
    engine = engine_of("micro", backend)
    x, indices, _, expected = gated("micro", 33)
    with pytest.raises(ValueError, match=message):
        engine(change(x))
    with pytest.raises(ValueError, match=message):
        engine.static(engine.spec.smallest)(change(x))
    out = engine(x)
    assert out.routes.tolist() == indices.tolist()
    assert_rows_close(out.logits, expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_row_that_is_not_finite_is_counted_from_the_first(workers):
    engine = Engine(lively_net("micro"), backend="eager", max_batch=8, workers=workers)
    x, _, _, _ = gated("micro", 33)
    for run in (engine, engine.static(engine.spec.smallest)):
        with pytest.raises(ValueError, match="row 29 has"):
            run(_with(x, 29, torch.nan))


@for_backends("eager", "onnxruntime")
def test_large_values_are_finite(backend):
    engine = engine_of("micro", backend)
    x = torch.full((2, 3, 32, 32), 3e38)
    with pytest.raises(ValueError, match="not finite") as raised:
        engine(x)
    assert "gate" in str(raised.value), "the images are not to blame"


def test_refused_networks_and_options():
    net = lively(micro_spec())
    plain = NetSpec("plain", (StageSpec((4,), block="conv"), StageSpec((4,))), num_classes=2)
    zeros = ("max_batch", "batch_size", "workers", "rows_per_piece")
    for message, options in (
        ("backend 'tpu': choose from auto, eager", {"backend": "tpu"}),
        (r"plain has no gates: call net\(x, route\) instead", {"net": lively(plain)}),
        *((f"{option} 0: must be .*at least 1", {option: 0}) for option in zeros),
        (r"max_batches: no option of an engine, .* max_batch", {"max_batches": 3}),
        ("merge needs a latency table", {"merge": True}),
        ("calibration is for precision int8", {"calibration": []}),
        ("precision int8 needs calibration", {"backend": "openvino", "precision": "int8"}),
    ):
        with pytest.raises(UsageError, match=message):
            Engine(**{"net": net, "backend": "eager", **options})
    with pytest.raises(RuntimeError, match=r"net\.eval"):
        Engine(net.train(), backend="eager")
    assert Engine(net.eval(), backend="eager")(noise(net.spec, 2)).logits.shape == (2, 5)


def test_damaged_weights_are_noticed_at_the_gates():
    net = lively(micro_spec())
    with torch.no_grad():
        net.stages[0][0].body.bn.bias[0] = torch.nan
    with pytest.raises(ValueError, match="a gate's logits are not finite"):
        Engine(net, backend="eager")(noise(net.spec, 2))
