import dataclasses
import itertools
import math

import pytest
import torch
from helpers import lively, micro_spec, noise
from torch.nn import functional as F

from dynaslim.cost import CostTable
from dynaslim.errors import TrainingError, UsageError
from dynaslim.nn import SlimNet
from dynaslim.nn.functional import argmax_one_hot
from dynaslim.recipes import ExpectedRecipe, SgsRecipe
from dynaslim.runtime.engine import Engine
from dynaslim.spec import GateSpec, NetSpec, StageSpec
from dynaslim.train import route_cache
from dynaslim.train.expected import (
    ExpectedObjective,
    apply_heads,
    argmax_paths,
    evaluate_fit,
    fit_gate,
    fit_to_target,
    path_probabilities,
)
from dynaslim.train.losses import sgs_loss
from dynaslim.train.route_cache import RouteCache, cache_routes, choose_paths

SPEC = micro_spec(reduction=0.25)
TABLE = CostTable.from_madds(SPEC, 32)
RECIPE = ExpectedRecipe()
ONE_GATE = NetSpec(
    "one",
    (StageSpec((4,), block="conv"), StageSpec((4, 8, 12), gate=GateSpec((0, 1, 2)))),
    num_classes=5,
)
ONE_TABLE = CostTable("ms", (((1.0,),), ((1.0, 2.0, 4.0),)))


def _net():
    """Routes of a fresh classifier hardly differ; those of this one do."""
    net = lively(SPEC)
    torch.nn.init.normal_(net.classifier.weight)
    return net


def _images(rows=21, seed=5):
    x = noise(SPEC, rows, seed=seed)
    return x, torch.arange(rows) % SPEC.num_classes


def _cached(net, x, labels, *, max_routes=64, batch=8):
    batches = list(zip(x.split(batch), labels.split(batch), strict=True))
    return cache_routes(net, batches, max_routes=max_routes, seed=0)


def _made_up(spec, rows=40, seed=0, max_routes=64):
    """A cache of two gates whose every number is random."""
    generator = torch.Generator().manual_seed(seed)
    paths = choose_paths(spec, max_routes, 0)
    hidden = [torch.rand(len({p[:g] for p in paths}), rows, 3 + g, generator=generator)
              for g in range(len(spec.gates))]  # fmt: skip
    return RouteCache(
        spec,
        paths,
        torch.rand(rows, len(paths), generator=generator) * 2,
        torch.rand(rows, len(paths), generator=generator) > 0.5,
        tuple(hidden),
        torch.zeros(rows, dtype=torch.int64),
    )


def _heads(cache, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(len(gate.choices), hidden.shape[2], generator=generator, dtype=dtype)
        for gate, hidden in zip(cache.spec.gates, cache.features, strict=True)
    ]


def _one_gate(features, losses, correct=None):
    """A cache of one gate: features (N, R), losses (N, 3)."""
    correct = torch.zeros_like(losses, dtype=torch.bool) if correct is None else correct
    labels = torch.zeros(len(losses), dtype=torch.int64)
    return RouteCache(ONE_GATE, ((0,), (1,), (2,)), losses, correct, (features[None],), labels)


# -- the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_routes", [64, 4])
def test_cached_losses_are_those_of_the_routes(max_routes):
    net = _net()
    x, labels = _images()
    cache = _cached(net, x, labels, max_routes=max_routes)
    paths = tuple(itertools.product(range(2), range(3)))
    assert cache.paths == paths or (len(cache.paths) == 4 and set(cache.paths) < set(paths))
    assert torch.equal(cache.labels, labels)
    for number, path in enumerate(cache.paths):
        route = SPEC.routing_space[paths.index(path)]
        assert cache.spec.route_along(path) == route
        with torch.no_grad():
            logits = net(x, route)
        expected = F.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(cache.losses_NP[:, number], expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(cache.correct_NP[:, number], logits.argmax(1) == labels)
    assert cache.losses_NP.std(1).min() > 1e-2  # the routes do differ


def test_cached_features_give_the_gates_logits():
    net = _net()
    x, labels = _images()
    cache = _cached(net, x, labels)
    heads = net.slimming_parameters()
    for path in cache.paths:
        forced = [
            F.one_hot(torch.full((len(x),), option), len(gate.choices)).float()
            for option, gate in zip(path, SPEC.gates, strict=True)
        ]
        with torch.no_grad():
            out = net.forward_gated(x, lambda _, number, forced=forced: forced[number])
            for number, expected in enumerate(out.gate_logits):
                place = cache.prefixes[number].index(path[:number])
                logits = cache.features[number][place] @ heads[number].T
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)


def test_argmax_over_the_cache_is_the_engines_routing():
    net = _net()
    x, labels = _images(64)
    cache = _cached(net, x, labels)
    for cost_weight in (0.0, 0.3):
        heads = fit_gate(cache, TABLE, cost_weight=cost_weight, recipe=RECIPE).heads
        apply_heads(net, heads)
        routes = Engine(net, backend="eager")(x).routes
        picked = argmax_paths(cache, heads)
        assert len(picked.unique()) > 1
        for row, number in zip(routes.tolist(), picked.tolist(), strict=True):
            path = cache.paths[number]
            assert row == [g.choices[p] for g, p in zip(SPEC.gates, path, strict=True)]
    assert len(picked.unique()) > 2
    result = evaluate_fit(cache, heads, TABLE)
    with torch.no_grad():
        logits = net.forward_gated(x, lambda z, _: argmax_one_hot(z)).logits
    assert result.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result.mean_cost == pytest.approx(Engine(net, backend="eager")(x).madds.mean().item())
    assert sum(result.shares) == pytest.approx(1)


def test_a_batch_size_changes_nothing_and_every_batch_is_reported():
    net = _net()
    x, labels = _images()
    calls = []
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    cut = cache_routes(net, batches, max_routes=64, seed=0, on_batch=lambda: calls.append(1))
    whole = _cached(net, x, labels, batch=len(x))
    assert len(calls) == 2
    torch.testing.assert_close(cut.losses_NP, whole.losses_NP)
    for a, b in zip(cut.features, whole.features, strict=True):
        torch.testing.assert_close(a, b)


def test_large_features_take_half_the_bytes(monkeypatch):
    net = _net()
    x, labels = _images()
    full = _cached(net, x, labels)
    # passed by the second batch: what was stored before is converted
    monkeypatch.setattr(route_cache, "FLOAT32_BYTES", sum(f.numel() for f in full.features) * 2)
    half = _cached(net, x, labels)
    for a, b in zip(half.features, full.features, strict=True):
        assert (a.dtype, b.dtype) == (torch.float16, torch.float32)
        torch.testing.assert_close(a.float(), b, atol=1e-3, rtol=1e-3)
    heads = net.slimming_parameters()
    close = expected_objective(half, heads, TABLE, 1.0), expected_objective(full, heads, TABLE, 1.0)
    torch.testing.assert_close(*close, atol=1e-3, rtol=1e-3)
    fit_gate(half, TABLE, cost_weight=1.0, recipe=RECIPE)


def test_a_cache_needs_gates_images_and_finite_losses():
    net = _net()
    x, labels = _images(4)
    plain = SlimNet(ONE_GATE.replace(stages=ONE_GATE.stages[:1])).eval()
    with pytest.raises(UsageError, match="one has no gates"):
        cache_routes(plain, [], max_routes=4, seed=0)
    with pytest.raises(UsageError, match=r"net\.eval"):
        cache_routes(lively(SPEC).train(), [], max_routes=4, seed=0)
    with pytest.raises(TrainingError, match="no images"):
        cache_routes(net, [], max_routes=4, seed=0)
    x[2] = math.nan
    with pytest.raises(TrainingError, match="route 4-4-6: the loss of 1 images is not finite"):
        _cached(net, x, labels)


# -- sampled paths ---------------------------------------------------------------------------------


def _wide_spec(gates=4, choices=(0, 1, 2, 3)):
    stage = StageSpec((4, 6, 8, 10, 12), gate=GateSpec(choices))
    return NetSpec("wide", (StageSpec((4,), block="conv"), *(stage,) * gates), num_classes=5)


@pytest.mark.parametrize("max_routes", [1, 12, 64, 255])
def test_sampled_paths_cover_every_option(max_routes):
    stages = _wide_spec().stages
    uneven = dataclasses.replace(stages[2], gate=GateSpec((1, 2, 4)))
    for spec in (_wide_spec(), NetSpec("uneven", (*stages[:2], uneven, *stages[3:]), 5)):
        counts = [len(gate.choices) for gate in spec.gates]
        paths = choose_paths(spec, max_routes, seed=3)
        assert list(paths) == sorted(set(paths))
        if max_routes >= 12:
            assert len(paths) == min(max_routes, math.prod(counts))
        assert paths == choose_paths(spec, max_routes, seed=3)
        assert paths[0] == (0,) * len(counts)
        assert paths[-1] == tuple(n - 1 for n in counts)
        for gate, count in enumerate(counts):
            assert {path[gate] for path in paths} == set(range(count))
        for index in range(spec.num_widths):
            if all(index in gate.choices for gate in spec.gates):
                assert tuple(gate.choices.index(index) for gate in spec.gates) in paths
    if max_routes == 64:
        assert choose_paths(_wide_spec(), 64, 3) != choose_paths(_wide_spec(), 64, 4)
        assert len(choose_paths(_wide_spec(gates=20), 64, 0)) == 64


def _brute_force_probabilities(cache, heads):
    """Path by path and row by row, over the options that lead to a cached path."""
    table = torch.zeros(len(cache.labels), len(cache.paths), dtype=torch.float64)
    for n, (p, path) in itertools.product(range(len(table)), enumerate(cache.paths)):
        chance = 1.0
        for gate, option in enumerate(path):
            prefix = path[:gate]
            hidden = cache.features[gate][cache.prefixes[gate].index(prefix), n].double()
            weight = (heads[gate].double() @ hidden).exp()
            open_to = {q[gate] for q in cache.paths if q[:gate] == prefix}
            chance *= weight[option] / sum(weight[o] for o in open_to)
        table[n, p] = chance
    return table


@pytest.mark.parametrize("max_routes", [6, 4])
def test_probabilities_by_brute_force(max_routes):
    cache = _made_up(SPEC, rows=5, max_routes=max_routes)
    assert len(cache.paths) == max_routes
    heads = _heads(cache)
    expected = _brute_force_probabilities(cache, heads)
    torch.testing.assert_close(expected.sum(1), torch.ones(5).double())
    torch.testing.assert_close(path_probabilities(cache, heads).double(), expected)


def test_argmax_stays_on_cached_paths():
    spec = _wide_spec(gates=2)
    cache = _made_up(spec, max_routes=6)
    assert len(cache.paths) == 6
    heads = [5 * head for head in _heads(cache)]
    picked = argmax_paths(cache, heads)
    fallen_back = 0
    for n, number in enumerate(picked.tolist()):
        path: tuple[int, ...] = ()
        for gate, head in enumerate(heads):
            logits = head @ cache.features[gate][cache.prefixes[gate].index(path), n]
            open_to = [o for o in range(4) if any(q[: gate + 1] == (*path, o) for q in cache.paths)]
            fallen_back += int(logits.argmax()) not in open_to
            path = (*path, max(open_to, key=lambda option, logits=logits: float(logits[option])))
        assert cache.paths[number] == path
    assert fallen_back > 0


# -- the objective ---------------------------------------------------------------------------------


def expected_objective(
    cache, heads, table, cost_weight, *, entropy_weight=0.0, sgs_weight=0.0, sgs=None
):
    objective = ExpectedObjective(cache, table, cost_weight, sgs_weight, sgs or SgsRecipe())
    return sum(objective(heads, rows, entropy_weight) for rows in cache.chunks())


def test_expected_objective_by_brute_force(monkeypatch):
    cache = _made_up(SPEC, rows=7)
    heads = _heads(cache)
    chances = _brute_force_probabilities(cache, heads)
    expected = 0.0
    for p, path in enumerate(cache.paths):
        price = cache.losses_NP[:, p] + 0.7 * TABLE.route_cost(path) / TABLE.route_cost((1, 2))
        expected += float((chances[:, p] * price).sum()) / 7
    plain = expected_objective(cache, heads, TABLE, 0.7)
    assert plain.item() == pytest.approx(expected, rel=1e-6)
    entropy = -(chances * chances.log()).sum(1).mean().item()
    rewarded = expected_objective(cache, heads, TABLE, 0.7, entropy_weight=2.0)
    assert (plain - rewarded).item() == pytest.approx(2 * entropy, rel=1e-5)
    monkeypatch.setattr(route_cache, "CHUNK_FLOATS", 30)
    assert len(cache.chunks()) > 2
    assert expected_objective(cache, heads, TABLE, 0.7).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("hard", ["try_best", "give_up"])
@pytest.mark.parametrize("easy_share", [None, 0.5])
def test_sparsification_term_by_brute_force(hard, easy_share, monkeypatch):
    cache = _made_up(SPEC, rows=9)
    heads = _heads(cache)
    recipe = SgsRecipe(hard=hard, easy_share=easy_share)
    easy, hopeless = cache.correct_NP[:, 0], ~cache.correct_NP[:, 5]
    assert 0 < int((~easy & hopeless).sum()) < int((~easy).sum())
    give_up = {"hopeless_B": hopeless} if hard == "give_up" else {}
    first = cache.features[0][0] @ heads[0].T
    expected = sgs_loss([first], easy, easy_share=easy_share, **give_up).item()
    # behind the first gate: each image as much as the first gate sends it there
    chances = first.softmax(1)
    second = cache.features[1] @ heads[1].T
    for n in range(9):
        target = 0 if easy[n] or (hard == "give_up" and hopeless[n]) else 2
        labelled_first = easy | hopeless if hard == "give_up" else easy
        alike = (labelled_first == labelled_first[n]).sum()
        weight = 1 / 9 if easy_share is None else 0.5 / alike
        for option in (0, 1):
            wrong = -second[option, n].log_softmax(0)[target]
            expected += float(weight * chances[n, option] * wrong)
    monkeypatch.setattr(route_cache, "CHUNK_FLOATS", 30)
    plain = expected_objective(cache, heads, TABLE, 0.7)
    both = expected_objective(cache, heads, TABLE, 0.7, sgs_weight=3.0, sgs=recipe)
    assert (both - plain).item() == pytest.approx(3 * expected / 2, rel=1e-5)


@pytest.mark.parametrize("max_routes", [6, 4])
def test_gradient_of_the_expected_objective(max_routes):
    cache = _made_up(SPEC, rows=6, max_routes=max_routes)
    heads = [head.requires_grad_() for head in _heads(cache, dtype=torch.float64)]

    def run(*heads):
        return expected_objective(cache, heads, TABLE, 0.7, entropy_weight=0.5)

    assert torch.autograd.gradcheck(run, heads)


def test_gradient_with_sparsification():
    cache = _one_gate(torch.rand(6, 4), torch.rand(6, 3), torch.rand(6, 3) > 0.5)
    heads = [head.requires_grad_() for head in _heads(cache, dtype=torch.float64)]

    def run(head):
        return expected_objective(cache, [head], ONE_TABLE, 0.7, sgs_weight=1.0)

    assert torch.autograd.gradcheck(run, heads)


def test_a_table_of_another_network_is_refused():
    cache = _made_up(SPEC, rows=3)
    with pytest.raises(UsageError, match="segments: micro has 3"):
        expected_objective(cache, _heads(cache), ONE_TABLE, 1.0)


# -- fitting ---------------------------------------------------------------------------------------


def _obvious(rows=60):
    """Feature n marks route n as the one that is right; all else is alike."""
    kind = torch.arange(rows) % 3
    features = F.one_hot(kind, 3).float() + 0.1
    losses = torch.full((rows, 3), 2.0)
    losses[torch.arange(rows), kind] = 0.1
    return kind, _one_gate(features, losses, losses < 1)


def test_an_obvious_policy_is_learnt():
    kind, cache = _obvious()
    fit = fit_gate(cache, ONE_TABLE, cost_weight=0.1, recipe=RECIPE)
    assert torch.equal(argmax_paths(cache, fit.heads), kind)
    assert (fit.accuracy, fit.loss) == (1.0, pytest.approx(0.1))
    assert fit.mean_cost == pytest.approx((2 + 3 + 5) / 3)
    assert fit.expected_loss == pytest.approx(0.1, abs=0.2)
    assert fit.expected_cost == pytest.approx(fit.mean_cost, abs=0.2)
    # a gate that has to pay for it goes nowhere
    dear = fit_gate(cache, ONE_TABLE, cost_weight=100.0, recipe=RECIPE)
    assert dear.mean_cost == 2.0


def test_what_a_second_gate_sees_depends_on_the_first():
    """The right second option is visible only behind the first gate's second option."""
    rows = 40
    kind = torch.arange(rows) % 2 * 2  # of three options, the ends
    cache = _made_up(SPEC, rows=rows)
    visible = torch.stack([torch.ones(rows, 2), F.one_hot(kind // 2, 2).float()])
    losses = torch.full((rows, 6), 2.0)
    for p, path in enumerate(cache.paths):
        losses[kind == path[1], p] = 0.1
    features = (torch.ones(1, rows, 1), visible)
    cache = dataclasses.replace(cache, losses_NP=losses, features=features)
    fit = fit_gate(cache, TABLE, cost_weight=0.01, recipe=RECIPE)
    picked = [cache.paths[n] for n in argmax_paths(cache, fit.heads)]
    assert picked == [(1, k) for k in kind.tolist()]


@pytest.mark.parametrize("hard", ["try_best", "give_up"])
def test_sparsification_sends_images_to_the_ends(hard):
    """All three routes equally good: the labels alone decide."""
    kind = torch.arange(30) % 3  # easy, hard, hopeless
    correct = torch.stack([kind == 0, kind < 2, kind < 2], 1)
    cache = _one_gate(F.one_hot(kind, 3).float(), torch.ones(30, 3), correct)
    fit = fit_gate(
        cache,
        ONE_TABLE,
        cost_weight=0.0,
        recipe=ExpectedRecipe(sgs_weight=1.0),
        sgs=SgsRecipe(hard=hard),
    )
    target = torch.tensor([0, 2, 2 if hard == "try_best" else 0])
    assert torch.equal(argmax_paths(cache, fit.heads), target[kind])


@pytest.mark.parametrize("entropy", [0.0, 0.3, 2.0])
def test_a_fit_is_a_minimum_and_repeats(entropy):
    cache = _made_up(SPEC, rows=200)
    recipe = ExpectedRecipe(entropy=entropy)
    fit = fit_gate(cache, TABLE, cost_weight=0.2, recipe=recipe)
    again = fit_gate(cache, TABLE, cost_weight=0.2, recipe=recipe)
    assert all(torch.equal(a, b) for a, b in zip(fit.heads, again.heads, strict=True))
    prices = cache.losses_NP + 0.2 * cache.path_costs(TABLE) / TABLE.widest_cost
    weight = entropy * (prices - prices.mean(1, keepdim=True)).square().mean().sqrt().item()

    def whole(heads):
        decay = sum((h * s).square().sum() for h, s in zip(heads, cache.deviations, strict=True))
        objective = expected_objective(cache, heads, TABLE, 0.2, entropy_weight=weight)
        return objective + recipe.weight_decay / 2 * decay

    heads = [head.clone().requires_grad_() for head in fit.heads]
    whole(heads).backward()
    zeros = [torch.zeros_like(head).requires_grad_() for head in heads]
    whole(zeros).backward()
    for head, zero in zip(heads, zeros, strict=True):
        assert head.grad.abs().max() < 0.02 * zero.grad.abs().max()


def test_middle_routes_are_not_given_up_too_early():
    """Images from easy to hard behind features with a large mean: all three routes are worth it.

    Without entropy at first, the expected loss ends with one path for every image.
    """
    generator = torch.Generator().manual_seed(0)
    hardness = torch.rand(2000, generator=generator)
    seen = torch.stack([hardness, torch.ones(2000)], 1) + 3
    losses = (hardness[:, None] - torch.tensor([0.2, 0.5, 0.8])).square()
    cache = _one_gate(seen, losses)
    fit = fit_gate(cache, ONE_TABLE, cost_weight=0.0, recipe=RECIPE)
    shares = evaluate_fit(cache, fit.heads, ONE_TABLE).shares
    assert min(shares) > 0.15
    best = losses.min(1).values.mean().item()
    one_path = losses.mean(0).min().item()
    assert fit.loss < best + 0.1 * (one_path - best)
    alone = fit_gate(cache, ONE_TABLE, cost_weight=0.0, recipe=ExpectedRecipe(entropy=0.0))
    assert alone.loss < best + 0.3 * (one_path - best)


def test_the_scale_of_a_feature_folds_into_the_heads():
    _, cache = _obvious()
    noisy = cache.features[0] + torch.rand(cache.features[0].shape)
    factors = torch.tensor([0.01, 1.0, 100.0])
    fits = [
        fit_gate(
            dataclasses.replace(cache, features=(f,)), ONE_TABLE, cost_weight=0.1, recipe=RECIPE
        )
        for f in (noisy, noisy * factors)
    ]
    torch.testing.assert_close(fits[1].heads[0] * factors, fits[0].heads[0], atol=0.05, rtol=0.05)


def test_features_that_do_not_vary_do_no_harm():
    kind, cache = _obvious()
    constant = torch.cat([cache.features[0], torch.zeros(1, 60, 1), torch.ones(1, 60, 1)], 2)
    cache = dataclasses.replace(cache, features=(constant,))
    fit = fit_gate(cache, ONE_TABLE, cost_weight=0.1, recipe=RECIPE)
    assert torch.equal(argmax_paths(cache, fit.heads), kind)
    assert all(head.isfinite().all() for head in fit.heads)


def test_an_objective_that_is_not_finite_is_an_error():
    _, cache = _obvious()
    with pytest.raises(TrainingError, match="cost weight inf"):
        fit_gate(cache, ONE_TABLE, cost_weight=math.inf, recipe=RECIPE)


# -- targets ---------------------------------------------------------------------------------------


def _graded(rows=400, seed=0):
    """Images from easy to hard, with noisy features of it; the wider the route, the better."""
    generator = torch.Generator().manual_seed(seed)
    hardness = torch.rand(rows, generator=generator)
    seen = torch.stack([hardness, 1 - hardness], 1)
    seen = (seen + 0.2 * torch.randn(rows, 2, generator=generator)).clamp_min(0)
    losses = hardness[:, None] * torch.tensor([2.0, 1.3, 0.9]) + 0.05
    return _one_gate(seen, losses, losses < 0.7)


def test_targets_are_met_and_rise():
    cache = _graded()
    fits = {t: fit_to_target(cache, ONE_TABLE, t, RECIPE) for t in (2.0, 2.2, 2.5, 3.5, 4.5, 4.9)}
    for target, fit in fits.items():
        assert target * 0.98 <= fit.mean_cost <= target
        assert evaluate_fit(cache, fit.heads, ONE_TABLE).mean_cost == fit.mean_cost
    costs = [fit.mean_cost for fit in fits.values()]
    assert costs == sorted(costs)
    losses = [fit.loss for fit in fits.values()]
    assert losses == sorted(losses, reverse=True)
    # better than tossing a coin between the two ends at the same cost
    ends, share = cache.losses_NP.mean(0), (3.5 - 2) / 3
    assert fits[3.5].loss < (1 - share) * ends[0] + share * ends[2] - 0.02


def test_a_cost_that_jumps_is_still_met():
    """Two kinds, hardly distinguished: by cost weight alone all images move together."""
    generator = torch.Generator().manual_seed(0)
    features = 1 + 0.3 * torch.rand(500, 2, generator=generator)
    losses = torch.tensor([1.0, 0.9, 0.5]).expand(500, 3).contiguous()
    cache = _one_gate(features, losses)
    jumps = {
        fit_gate(cache, ONE_TABLE, cost_weight=w, recipe=RECIPE).mean_cost for w in (0.1, 0.5, 2.0)
    }
    assert jumps == {2.0, 5.0}
    for target in (2.5, 3.7, 4.5):
        assert target * 0.98 <= fit_to_target(cache, ONE_TABLE, target, RECIPE).mean_cost <= target


def test_images_that_are_alike_stay_under_the_target():
    cache = _one_gate(torch.ones(10, 2), torch.tensor([[1.0, 0.9, 0.5]]).repeat(10, 1))
    assert fit_to_target(cache, ONE_TABLE, 4.0, RECIPE).mean_cost in (2.0, 3.0)


def test_a_target_is_met_on_the_held_out():
    train, held_out = _graded(), _graded(300, seed=1)
    fit = fit_to_target(train, ONE_TABLE, 3.5, RECIPE, holdout=held_out)
    result = evaluate_fit(held_out, fit.heads, ONE_TABLE)
    assert fit.mean_cost == result.mean_cost
    assert (fit.loss, fit.accuracy) == (result.loss, result.accuracy)
    assert 3.5 * 0.98 <= fit.mean_cost <= 3.5


def test_no_more_is_spent_than_is_of_use():
    cache = _one_gate(torch.ones(10, 2), torch.tensor([[0.5, 0.6, 0.7]]).repeat(10, 1))
    fit = fit_to_target(cache, ONE_TABLE, 4.5, RECIPE)
    assert (fit.mean_cost, fit.cost_weight) == (2.0, 0.0)


@pytest.mark.parametrize("target", [1.9, 5.1, math.nan])
def test_a_target_out_of_reach_names_the_range(target):
    with pytest.raises(UsageError, match="routes that the gates of one can take cost 2 to 5 ms"):
        fit_to_target(_graded(20), ONE_TABLE, target, RECIPE)


def test_targets_on_two_gates():
    net = _net()
    x, labels = _images(64)
    cache = _cached(net, x, labels)
    low, high = TABLE.route_cost((0, 0)), TABLE.widest_cost
    for share in (0.0, 0.3):
        target = low + share * (high - low)
        fit = fit_to_target(cache, TABLE, target, RECIPE)
        assert fit.mean_cost <= target
        apply_heads(net, fit.heads)
        assert Engine(net, backend="eager")(x).madds.mean().item() == pytest.approx(fit.mean_cost)


def test_heads_that_do_not_fit():
    net = lively(SPEC)
    with pytest.raises(UsageError, match="micro needs"):
        apply_heads(net, net.slimming_parameters()[:1])
