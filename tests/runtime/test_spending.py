"""Budgets that hold whatever comes, and saying where costs are not what the curve promises."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import assert_rows_close, at_once, curved, lively_net, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaslim import Engine
from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import CostTable
from dynaslim.errors import UsageError
from dynaslim.runtime.budget import BudgetPoint
from dynaslim.runtime.latency import profile
from dynaslim.runtime.spending import Ledger, Spending

pytestmark = pytest.mark.usefixtures("one_thread")


def _ends(engine):
    table = CostTable.from_madds(engine.spec, 32)
    return table.route_cost([0] * len(engine.spec.gates)) / table.widest_cost, table.widest_cost


def _greedy(engine, share, shift, taus=(0.99, 0.99), mirror=False):
    """A point whose promise, `share`, is far from what it costs: as if the images were others."""
    options = [len(gate.choices) for gate in engine.spec.gates]
    middle, widest = tuple(min(1, n - 1) for n in options), tuple(n - 1 for n in options)
    return BudgetPoint(
        shift=shift, tau=taus[0], escalate_to=middle, madds=share * _ends(engine)[1], share=share,
        ms=None, top1=0.5, escalated=0.5, tau_then=taus[1], escalate_then=widest,
        tau_mirror=taus[1] if mirror else None, mirror_along=widest if mirror else None,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["micro", "ds_mbnet_tiny"]),
    st.floats(0, 1),
    st.sampled_from([-1e6, -3.0, 0.0, 2.0, 1e6]),
    st.lists(st.sampled_from([1, 1, 2, 5, 40]), min_size=1, max_size=8),
    st.integers(0, 5),
    st.booleans(),
)
def test_the_running_mean_never_exceeds_the_budget(name, at, shift, sizes, seed, mirror):
    engine, _ = curved(name)
    cheapest, widest_madds = _ends(engine)
    share = cheapest + at * ((2 if mirror else 1) - cheapest)
    point, ledger = _greedy(engine, share, shift, mirror=mirror), Ledger()
    rows, spent = 0, 0.0
    for number, size in enumerate(sizes):
        out = engine(noise(engine.spec, size, seed=10 * seed + number), budget=point, hold=ledger)
        rows, spent = rows + size, spent + float(out.madds.sum())
        assert spent / rows <= share * widest_madds * (1 + 1e-9)


def test_all_of_a_budget_that_binds_is_used():
    """Thresholds that are too tight would hold as well."""
    engine, _ = curved("ds_mbnet_tiny")
    cheapest, widest_madds = _ends(engine)
    for shift in (-1e6, 0.0, 1e6):
        for size in (1, 40):
            share, ledger, costs = (cheapest + 1) / 2, Ledger(), []
            point = _greedy(engine, share, shift)
            for number in range(200 // size):
                x = noise(engine.spec, size, seed=number)
                costs += engine(x, budget=point, hold=ledger).madds.tolist()
            free = float(engine(noise(engine.spec, 200), budget=point).madds.mean())
            assert free > 1.2 * share * widest_madds, "the test needs a budget that binds"
            assert np.mean(costs) > 0.93 * share * widest_madds, (shift, size)


def test_held_rows_are_those_of_the_smallest_margins():
    engine, _ = curved("micro")
    x = noise(engine.spec, 60)
    point = _greedy(engine, 0.0, 1e6, taus=(0.0, 0.99))  # all begin alike, one step
    plain = engine(x, shift=1e6)
    probabilities = plain.logits.softmax(1).sort(descending=True).values
    margin = probabilities[:, 0] - probabilities[:, 1]
    share = (_ends(engine)[0] + 1) / 2
    point = dataclasses.replace(point, share=share)
    out = engine(x, budget=point, hold=Ledger())
    assert 5 < int(out.escalated.sum()) < 50
    assert margin[out.escalated].max() <= margin[~out.escalated].min()


def test_a_budget_that_does_not_bind_changes_nothing():
    engine, x = curved("micro")
    assert len(engine.curve.points) > 5
    for point in engine.curve.points:
        free = engine(x, budget=point)
        roomy = dataclasses.replace(point, share=1.2)
        held = engine(x, budget=roomy, hold=Ledger())
        assert held.madds.tolist() == free.madds.tolist()
        assert torch.equal(held.routes, free.routes)
        assert_rows_close(held.logits, free.logits)


def test_calls_of_one_engine_share_a_budget():
    """Also those of several threads, and one that fails costs nothing."""
    engine, _ = curved("micro")
    point = _greedy(engine, 0.85, 0.0)
    engine = Engine(lively_net("micro"), backend="eager")

    def work(seed):
        batches = [noise(engine.spec, 3, seed=6 * seed + number) for number in range(6)]
        return torch.cat([engine(x, budget=point, hold=True).madds for x in batches])

    costs = torch.cat(at_once(4, work)).tolist()
    limit = 0.85 * _ends(engine)[1]
    assert len(costs) == 72
    assert 0.9 * limit < np.mean(costs) <= limit * (1 + 1e-9)
    with pytest.raises(ValueError, match="not finite"):
        engine(torch.full((50, 3, 32, 32), math.nan), budget=point, hold=True)
    costs += engine(noise(engine.spec, 40, seed=99), budget=point, hold=True).madds.tolist()
    assert np.mean(costs) <= limit * (1 + 1e-9)


def test_what_cannot_hold(tmp_path):
    engine, x = curved("micro")
    cheapest, widest_madds = _ends(engine)
    with pytest.raises(UsageError, match="give the budget that is to hold"):
        engine(x, hold=True)
    with pytest.raises(UsageError, match=f"budget 0.1: cannot hold, .* at least {cheapest:.3g} of"):
        engine(x, budget=0.1, hold=True)
    with pytest.raises(UsageError, match=r"budget 0\.01M: cannot hold"):
        engine(x, budget="0.01M", hold=True)
    madds = 0.8 * widest_madds
    out = engine(x, budget=f"{madds / 1e6}M", hold=True)
    assert float(out.madds.mean()) <= madds * (1 + 1e-9)
    out = engine(x, budget="drop=5", hold=True)
    assert float(out.madds.mean()) <= engine.curve.at("drop=5").madds * (1 + 1e-9)
    table = profile(engine.router, 32, 1, rounds=1)
    merging = Engine(
        Checkpoint(lively_net("micro"), budget=engine.curve.to_dict()),
        backend="eager", latency=table, merge=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="hold: not with merge"):
        merging(x, budget=0.8, hold=True)


# -- what it cost ---------------------------------------------------------------------------------


def _counted(ratios, last=None):
    spending = Spending(last)
    for ratio in ratios:
        spending.add([ratio * 50.0], 50.0)
    return spending


def test_images_unlike_those_of_the_curve_are_reported():
    rng = np.random.default_rng(0)
    alike = np.where(rng.random(400) < 0.2, 3.0, 0.5)  # a fifth escalates: 1 on average
    assert not _counted(alike).differs
    assert not _counted(alike[:20]).differs
    assert _counted(alike).ratio == pytest.approx(alike.mean())
    dear = np.where(rng.random(48) < 0.6, 3.0, 0.5)
    assert _counted(dear).differs
    assert _counted(np.full(40, 0.5)).differs, "much cheaper is no less of a difference"
    assert not _counted([3.9]).differs, "one image is no evidence"
    assert not _counted(np.full(100_000, 1.05)).differs, "small ones are no news"
    nothing = Spending()
    assert math.isnan(nothing.ratio)
    assert not nothing.differs


def test_of_the_last_images():
    rng = np.random.default_rng(1)
    ratios = rng.random(500) * 4
    recent = _counted(ratios, last=100)
    assert recent.images == 100
    assert recent.ratio == pytest.approx(ratios[-100:].mean())
    before = _counted([*np.full(300, 3.0), *np.full(100, 1.0)], last=100)
    assert not before.differs


def test_chance_is_rarely_taken_for_a_difference():
    rng = np.random.default_rng(2)
    wrong = sum(_counted(np.where(rng.random(30) < 0.2, 3.0, 0.5)).differs for _ in range(1000))
    assert wrong < 20
