"""What budgets give, simulated from a table of answers: against plain loops and real networks."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import (
    assert_rows_close,
    fails,
    for_backends,
    lively,
    micro_spec,
    noise,
    png,
    run_ok,
    write_parquet,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaslim import Engine
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cost import CostTable, madds
from dynaslim.cost_file import write_cost_table
from dynaslim.data import open_source
from dynaslim.data.images import holdout
from dynaslim.errors import CheckpointError, DataError, DynaslimError, UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime import budget_search, calibrate_budget
from dynaslim.runtime.budget import BudgetCurve, option_costs
from dynaslim.runtime.budget_search import fit_curve, shift_grid
from dynaslim.runtime.calibrate_budget import (
    PathAnswers,
    answer_paths,
    simulate,
    uniform_outcomes,
    walk,
)
from dynaslim.runtime.escalation import Escalation, margins
from dynaslim.runtime.export import export_package
from dynaslim.runtime.opinion_pool import OpinionPool
from dynaslim.spec import NetSpec, StageSpec
from dynaslim.zoo import get_spec

SPEC = micro_spec()  # gates of 2 and 3 options
MS = CostTable("ms", (((1.0,),), ((1.5, 2.0),), ((1.0, 3.0, 3.5), (2.0, 2.5, 7.0))))


def _random(rows, seed=0, spec=SPEC, coarse=False, looks=0.0):
    """A table in which wider paths are right more often; if coarse, with many ties.

    With `looks` a second look is right for that share of the images that the widest gets wrong.
    """
    rng = np.random.default_rng(seed)
    options = [len(gate.choices) for gate in spec.gates]
    paths = math.prod(options)
    logits = [
        rng.normal(0, 3, (math.prod(options[:gate]), rows, count))
        for gate, count in enumerate(options)
    ]
    hard = rng.random((rows, 1))
    correct = hard + rng.normal(0, 0.2, (rows, paths)) < np.linspace(0.7, 0.9, paths)
    margins = np.clip(1 - hard + rng.normal(0, 0.3, (rows, paths)), 0, 1)
    if coarse:
        logits = [values.round() for values in logits]
        margins = (margins * 4).round() / 4
    second_look = np.where(correct[:, -1], rng.random(rows) < 0.98, rng.random(rows) < looks)
    return PathAnswers(
        spec,
        32,
        tuple(values.astype(np.float32) for values in logits),
        correct,
        margins.astype(np.float32),
        _expected(correct),
        second_look if looks else None,
        _expected(second_look) if looks else None,
    )


def _expected(right):
    """Without any doubt: settings are then selected by counting right answers."""
    return np.asarray(right, np.float64)


def _one_row(answers, row, shift, steps, latency=None):
    """Plain Python, in fractions: the path's number, whether it is right, its cost, escalated."""
    number, path = 0, []
    costs = option_costs(answers.table)
    for gate in range(len(costs)):
        scores = [
            Fraction(float(logit)) - Fraction(shift) * Fraction(float(cost))
            for logit, cost in zip(answers.gate_logits[gate][number, row], costs[gate], strict=True)
        ]
        path.append(scores.index(max(scores)))
        number = number * len(scores) + path[-1]
    own, right, passes, done = tuple(path), answers.correct_NP[row, number], 0, False
    tables = [answers.table] if latency is None else [answers.table, latency]
    cost = [table.route_cost(own) for table in tables]
    for tau, target, mirror in steps:
        as_wide = all(t <= o for t, o in zip(target, own, strict=True))
        cheaper = answers.table.route_cost(own) < answers.table.route_cost(target)
        if done or (own != target if mirror else as_wide or not cheaper):
            continue
        if answers.margins_NP[row, number] >= tau:
            done = True  # its margin is high enough
            continue
        own, number, passes = target, answers.paths.index(target), passes + 1
        right = answers.second_look_N[row] if mirror else answers.correct_NP[row, number]
        for n, table in enumerate(tables):
            # the mirror image has no trunk that was kept
            cost[n] += table.route_cost(target) - (0 if mirror else table.segments[0][0][0])
    return cost, bool(right), passes > 0


_TAUS = st.one_of(st.floats(0, 1.25, width=32), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
_TARGETS = st.sampled_from([(0, 1), (1, 1), (1, 2), (0, 0), (1, 0)])


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.booleans(),
    st.integers(-160, 160).map(lambda n: n / 4),
    st.lists(st.tuples(_TAUS, _TARGETS).map(lambda pair: Escalation(*pair)), max_size=3),
    st.one_of(st.none(), _TAUS),
)
def test_simulate_is_a_plain_loop(rows, seed, coarse, shift, steps, tau_mirror):
    if tau_mirror is not None:
        steps = [*steps, Escalation(tau_mirror, (1, 2), mirror=True)]
    answers = _random(rows, seed, coarse=coarse, looks=0.3)
    slow = [_one_row(answers, row, shift, steps, MS) for row in range(rows)]
    costs, rights, escalated = zip(*slow, strict=True)
    outcome = simulate(answers, shift, steps, latency=MS)
    assert outcome.madds == pytest.approx(np.mean([cost[0] for cost in costs]))
    assert outcome.ms == pytest.approx(np.mean([cost[1] for cost in costs]))
    assert outcome.top1 == pytest.approx(np.mean(rights))
    assert outcome.escalated == pytest.approx(np.mean(escalated))
    walked = walk(answers, shift, steps)
    assert walked.right_N.tolist() == list(rights)
    assert (walked.expected_N == _expected(np.array(rights))).all()
    some = np.arange(0, rows, 2)
    assert simulate(answers, shift, steps, rows=some).top1 == pytest.approx(np.mean(rights[::2]))
    assert simulate(answers, shift, steps).ms is None


def _all_points(curve):
    return {*curve.points, *curve.gate_points, *curve.ms_points, *curve.ms_gate_points}


@pytest.mark.parametrize("looks", [0.0, 0.4])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 40, 501])
def test_points_are_those_of_simulate(rows, coarse, looks, monkeypatch):
    """The search counts with sorted margins and running sums; `simulate` row by row."""
    monkeypatch.setattr(budget_search, "SMALLEST_GROUP", 2)  # two steps are detours in this network
    answers = _random(rows, seed=4, coarse=coarse, looks=looks)
    rng = np.random.default_rng(0)
    unlike = answers.expected_NP * rng.uniform(0.99, 1, answers.expected_NP.shape)
    answers = dataclasses.replace(answers, expected_NP=unlike)
    curve = fit_curve(answers, latency=MS)
    for point in _all_points(curve):
        setting = (point.shift, point.escalations)
        whole = simulate(answers, *setting, latency=MS)
        assert point.madds == pytest.approx(whole.madds)
        assert point.ms == pytest.approx(whole.ms)
        assert point.share == pytest.approx(whole.madds / answers.table.widest_cost)
        assert point.escalated == pytest.approx(whole.escalated)
        assert point.top1 == whole.top1
        expected = walk(answers, *setting).expected_N.mean()
        assert point.top1_selecting == pytest.approx(expected, abs=1e-6 / rows)
    if rows > 3:
        assert any(point.tau is not None for point in curve.points)
        assert any(point.tau is not None for point in curve.ms_points)
    if rows > 100:
        assert any(len(point.escalations) == 2 for point in _all_points(curve))
        assert any(point.tau_mirror is not None for point in curve.points) == (looks > 0)
        assert any(point.tau_mirror is not None for point in curve.ms_points) == (looks > 0)


def test_margins_that_are_neighbours():
    """No number lies between two images' margins: a threshold is on one, and does not count it."""
    answers = _random(60, coarse=True)
    steps = (answers.margins_NP * 4).astype(np.int64)
    close = (0.5 + steps * 2.0**-24).astype(np.float32)
    assert len(np.unique(close)) == 5
    answers = dataclasses.replace(answers, margins_NP=close)
    tried = [point for point in fit_curve(answers).points if point.tau is not None]
    assert any(np.float32(point.tau) in close for point in tried)
    for point in tried:
        outcome = simulate(answers, point.shift, point.escalations)
        assert (point.escalated, point.madds) == pytest.approx((outcome.escalated, outcome.madds))


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_a_front(seed):
    answers = _random(300, seed)
    curve = fit_curve(answers, latency=MS)
    assert len(curve.points) <= 41
    for points, cost in (
        (curve.points, "madds"),
        (curve.gate_points, "madds"),
        (curve.ms_points, "ms"),
        (curve.ms_gate_points, "ms"),
    ):
        costs = [getattr(point, cost) for point in points]
        assert len(points) > 5
        assert costs == sorted(set(costs))
        merits = [point.top1_selecting for point in points[:-1]]
        assert merits == sorted(set(merits))
        widest, cheapest = points[-1], points[0]
        assert widest.share == pytest.approx(1)
        assert (widest.madds, widest.ms) == (curve.widest_madds, curve.widest_ms)
        assert widest.top1 == curve.widest_top1
        if cost == "madds":
            assert (cheapest.madds, cheapest.top1) == (curve.cheapest_madds, curve.cheapest_top1)
    assert curve.widest_madds == madds(SPEC, SPEC.widest_choice, 32, slimming_heads=True)
    assert curve.cheapest_madds == madds(SPEC, SPEC.cheapest_choice, 32, slimming_heads=True)
    assert all(point.tau is None for point in (*curve.gate_points, *curve.ms_gate_points))
    assert (curve.images, curve.measured_images) == (300, 300)
    curve.check_fits(SPEC)
    assert BudgetCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_escalation_is_at_no_cost_the_worse_of_the_two(seed):
    """But for what chance can do: gates have to be better than that."""
    answers = _random(200, seed)
    curve = fit_curve(answers, latency=MS)
    differ = answers.correct_NP[:, 0] != answers.correct_NP[:, -1]
    noise = math.sqrt(differ.sum()) / len(answers)
    assert noise < 0.08
    gains = []
    for share in np.linspace(0.01, 1, 200):
        joint, alone = curve.at(share), curve.at(share, escalate=False)
        assert joint.top1_selecting >= alone.top1_selecting - noise
        gains.append(joint.top1_selecting - alone.top1_selecting)
        budget = f"{share * curve.widest_ms}ms"
        assert curve.at(budget).merit >= curve.at(budget, escalate=False).merit - noise
    assert max(gains) > 0.02, "the test needs a table where escalation helps"


def _mixed(curve):
    """The share of points on which not all images begin along the same route."""
    ends = curve.gate_points[0].shift, curve.gate_points[-1].shift
    return np.mean([point.shift not in ends for point in curve.points])


def test_gates_are_used_where_they_are_informative(monkeypatch):
    """Uninformative gates would now and then look better than they are; see `NOISE`."""
    mixed = {"blind": [], "blind, no bar": [], "knowing": []}
    for seed in range(6):
        blind = _random(1000, seed, spec=get_spec("ds_mbnet_tiny"))
        # a gate that wants the widest route for images that it alone gets right
        hard = blind.correct_NP[:, -1] & ~blind.correct_NP[:, 0]
        logits = np.zeros_like(blind.gate_logits[0])
        logits[0, hard, -1] = 10.0
        knowing = dataclasses.replace(blind, gate_logits=(logits,))
        without, curve = fit_curve(blind), fit_curve(knowing)
        assert curve.at(0.5).top1 > without.at(0.5).top1 + 0.02
        mixed["blind"].append(_mixed(without))
        mixed["knowing"].append(_mixed(curve))
        with monkeypatch.context() as patch:
            patch.setattr(budget_search, "NOISE", -100)
            mixed["blind, no bar"].append(_mixed(fit_curve(blind)))
    found = {name: np.mean(shares) for name, shares in mixed.items()}
    assert found["blind"] < 0.3 < 0.5 < found["blind, no bar"]
    assert found["knowing"] > 0.8


@pytest.fixture
def everything_is_tried(monkeypatch):
    for name, value in {
        "KEPT": 10_000,
        "NOISE": -100,
        "MOST_ESCALATED": 1,
        "SMALLEST_GROUP": 2,
        "TAUS_OF_LOOKS": 25,
    }.items():
        monkeypatch.setattr(budget_search, name, value)


def _as_good(curve, outcome):
    return [
        point
        for point in curve.points
        if point.madds <= outcome.madds * (1 + 1e-12) and point.top1 >= outcome.top1
    ]


@pytest.mark.usefixtures("everything_is_tried")
def test_nothing_that_is_tried_is_overlooked():
    """Of few images every threshold is tried: brute force finds nothing beyond the front."""
    answers = _random(17, 5, coarse=True)
    curve = fit_curve(answers)
    tried = 0
    for shift in shift_grid(answers):
        for target in answers.targets:
            for tau in (0.0, 0.1, 0.3, 0.6, 0.9, 1.1):  # between the coarse margins
                outcome = simulate(answers, shift, [Escalation(tau, target)])
                if outcome.madds <= curve.widest_madds:
                    tried += 1
                    assert _as_good(curve, outcome)
    assert tried > 100
    for point in _all_points(curve):
        assert point.top1_selecting == pytest.approx(point.top1)


@pytest.mark.usefixtures("everything_is_tried")
def test_nothing_in_two_steps_is_overlooked():
    answers = _random(17, 6, spec=get_spec("ds_mbnet_tiny"), coarse=True)
    curve = fit_curve(answers)
    taus, better = (0.1, 0.3, 0.6, 0.9, 1.1), 0
    for shift in shift_grid(answers):
        for pair in itertools.product(taus, taus):
            steps = list(map(Escalation, pair, answers.targets[1:]))
            outcome = simulate(answers, shift, steps)
            if outcome.madds > curve.widest_madds:
                continue
            as_good = _as_good(curve, outcome)
            assert as_good
            better += all(len(point.escalations) == 2 for point in as_good)
    assert better, "the test needs settings that one step does not reach"


@pytest.mark.usefixtures("everything_is_tried")
def test_no_second_look_is_overlooked():
    answers = _random(17, 5, spec=get_spec("ds_mbnet_tiny"), coarse=True, looks=0.6)
    curve = fit_curve(answers)
    taus, better, beyond = (0.1, 0.6, 1.1), 0, 0
    widest = answers.targets[-1]
    for shift in shift_grid(answers)[::4]:
        for first, then, last in itertools.product((0.0, *taus), (0.0, *taus), taus):
            steps = [Escalation(first, answers.targets[0]), Escalation(then, widest)]
            steps = [step for step in steps if step.tau] + [Escalation(last, widest, mirror=True)]
            outcome = simulate(answers, shift, steps)
            if outcome.madds > 2 * curve.widest_madds or (first and not then):
                continue
            as_good = _as_good(curve, outcome)
            assert as_good
            better += all(point.tau_mirror is not None for point in as_good)
            beyond += all(point.share > 1 for point in as_good)
    assert better, "the test needs settings that no step but a second look reaches"
    assert beyond, "and of these some beyond the widest route's cost"


def _looks(curve):
    return [point for point in curve.points if point.tau_mirror is not None]


def _looking(answers, right):
    """The same answers with a second look that is right for these images."""
    return dataclasses.replace(answers, second_look_N=right, expected_look_N=_expected(right))


def test_a_second_look_must_be_worth_it(monkeypatch):
    """One that wins as many images as it loses looks like a gain at some settings; see `NOISE`."""
    kept = {"worthless": 0, "worthless, no bar": 0, "worth it": 0}
    for seed in range(3):
        answers = _random(1000, seed)
        widest = answers.correct_NP[:, -1]
        rng = np.random.default_rng(seed)
        # right for another image of about the same margin
        pairs = np.argsort(answers.margins_NP[:, -1]).reshape(-1, 2)
        pairs = pairs[rng.random(len(pairs)) < 0.5]
        luck = widest.copy()
        luck[pairs] = widest[pairs[:, ::-1]]
        worthless = _looking(answers, luck)
        kept["worthless"] += len(_looks(fit_curve(worthless)))
        with monkeypatch.context() as patch:
            patch.setattr(budget_search, "NOISE", 0)
            kept["worthless, no bar"] += len(_looks(fit_curve(worthless)))
        gain = widest | (rng.random(1000) < 0.2)
        curve = fit_curve(_looking(answers, gain))
        kept["worth it"] += len(_looks(curve))
        dearest = curve.points[-1]
        assert dearest.tau_mirror is not None
        assert dearest.share > 1
        assert dearest.top1 > curve.widest_top1
        assert curve.at(1.0).share <= 1 + 1e-9
        assert curve.at(2) == dearest
        assert any(point.share == pytest.approx(1) for point in curve.points)
    assert 2 * kept["worthless"] < kept["worthless, no bar"]
    assert kept["worth it"] > 2 * kept["worthless"]


def _of_logits(logits_NPC, labels_N, spec):
    """A table from logits, as `answer_paths` makes it, and one that counts right answers."""
    classes_NP = logits_NPC.argmax(2)
    right = classes_NP == labels_N[:, None]
    pool = OpinionPool()
    pool.add(classes_NP, logits_NPC.swapaxes(0, 1), labels_N)
    mute = np.zeros((1, len(labels_N), logits_NPC.shape[1]), np.float32)
    margin = np.stack([margins(logits) for logits in logits_NPC.swapaxes(0, 1)], 1)
    table = PathAnswers(spec, 32, (mute,), right, margin, pool.probabilities())
    return table, dataclasses.replace(table, expected_NP=right.astype(float))


def _four_routes(images, seed):
    """Logits (N, 4, 10) that wider routes are more often right with, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, images)
    shared = 4 * np.eye(10)[labels] * rng.exponential(1, (images, 1))
    shared += rng.normal(0, 1, (images, 10))
    own = rng.normal(0, 1, (images, 4, 10)) * np.array([1.0, 0.8, 0.7, 0.6])[None, :, None]
    return (3 * (shared[:, None] + own)).astype(np.float32), labels


def _accuracy(curve, budget, table):
    point = curve.at(budget)
    return simulate(table, point.shift, point.escalations).top1


def test_budgets_of_few_images_are_better_than_by_counting():
    """Selected by expected accuracy, they are more accurate on other images, and vary less."""
    spec = get_spec("ds_mbnet_tiny")
    others, _ = _of_logits(*_four_routes(20_000, 0), spec)
    found = {"expected": [], "counted": []}
    for seed in range(1, 13):
        for name, table in zip(found, _of_logits(*_four_routes(200, seed), spec), strict=True):
            found[name].append(_accuracy(fit_curve(table), 0.6, others))
    best = _accuracy(fit_curve(others), 0.6, others)
    expected, counted = found.values()
    assert best - np.mean(expected) < 0.5 * (best - np.mean(counted))
    assert np.std(expected) < 0.7 * np.std(counted)


def test_reported_accuracy_is_hardly_flattered():
    """Where all is luck, the best of many settings looks better than it is by counting."""
    spec, flattery = get_spec("ds_mbnet_tiny"), {"expected": [], "counted": []}
    for seed in range(12):
        logits, _ = _four_routes(400, seed)
        luck = np.random.default_rng(seed + 100).integers(0, 2, 400)
        for name, table in zip(flattery, _of_logits(logits[..., :2], luck, spec), strict=True):
            best = max(fit_curve(table).points, key=lambda point: point.merit)
            flattery[name].append(best.top1 - table.correct_NP.mean())
    assert np.mean(flattery["counted"]) > 0.02
    assert np.mean(flattery["expected"]) < 0.5 * np.mean(flattery["counted"])


def _groups(answers, point):
    """For rows that are known before it runs: what the rest of a setting costs, and the widest."""
    steps = [step for step in point.escalations if not step.mirror]
    paths = answers.taken(point.shift)
    costs = [walk(answers, point.shift, steps[:n]).madds_N for n in range(len(steps) + 1)]
    for path in np.unique(paths):
        yield paths == path, costs[-1], answers.table.widest_cost
    for before, after in itertools.pairwise(costs):
        more = answers.table.widest_cost - answers.table.segments[0][0][0]
        yield after > before, costs[-1] - before, more


def _detours(answers, curve):
    least = budget_search.SMALLEST_GROUP * len(answers)
    return sum(
        who.sum() >= least and cost[who].mean() > most * (1 + 1e-9)
        for point in curve.points
        for who, cost, most in _groups(answers, point)
    )


def test_no_detours_where_the_widest_first_is_cheaper(monkeypatch):
    """Routes that cost about the same: two of them are dearer than the widest at once."""
    answers = _random(501)
    assert _detours(answers, fit_curve(answers)) == 0
    assert any(point.escalations for point in fit_curve(answers).points)
    monkeypatch.setattr(budget_search, "SMALLEST_GROUP", 2)  # no group is so large
    with_detours = fit_curve(answers)
    monkeypatch.undo()
    assert _detours(answers, with_detours) > 0, "the test needs settings with detours"


def test_the_widest_route_is_the_best_of_few_images():
    """Until images show that a cheaper setting is better, which of few may be chance."""
    taken = 0
    for seed in range(20):
        answers = _random(30, seed, spec=get_spec("ds_mbnet_tiny"))
        curve = fit_curve(answers)
        best = max(curve.points, key=lambda point: point.merit)
        taken += best.share < 1
        assert curve.at(1) is curve.points[-1]
        assert curve.at(0.9) in curve.points[:-1]
    assert taken > 10, "the test needs luck"
    better = _random(2000, spec=get_spec("ds_mbnet_tiny"))
    correct = better.correct_NP.copy()
    correct[:, 0] = True
    curve = fit_curve(
        dataclasses.replace(better, correct_NP=correct, expected_NP=_expected(correct))
    )
    assert curve.at(1) is curve.points[0]


def test_intervals_are_those_of_all_images():
    answers = _random(400)
    curve = fit_curve(answers)
    for point in _all_points(curve):
        low, high = point.top1_interval
        assert low < point.top1 < high
        error = math.sqrt(point.top1 * (1 - point.top1) / 400)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_shifts_reach_from_end_to_end(seed):
    answers = _random(100, seed)
    grid = shift_grid(answers)
    assert len(grid) == budget_search.SHIFTS + 3
    assert 0 in grid
    assert (np.diff(grid) > 0).all()
    taken = np.array([answers.taken(shift) for shift in grid])
    assert (taken[0] == len(answers.paths) - 1).all()
    assert (taken[-1] == 0).all()
    costs = answers.costs(answers.table)[taken].mean(1)
    steps = -np.diff(costs) / (costs[0] - costs[-1])
    assert steps.max() < 0.12, "shifts are to be about evenly spaced by what they cost"


@pytest.mark.parametrize(
    "spec",
    [
        SPEC.with_choices((2,), (0, 1, 2)),
        SPEC.with_choices((0,), (1,)),
        get_spec("ds_mbnet_tiny"),
        get_spec("ds_resnet50", num_classes=3),
    ],
    ids=["single-choice", "no-choice", "one-gate", "four-gates"],
)
def test_gates_of_any_number(spec):
    answers = _random(30, spec=spec)
    curve = fit_curve(answers)
    curve.check_fits(spec)
    assert curve.points[-1].madds == curve.widest_madds
    assert curve.points[0].madds == curve.cheapest_madds
    assert curve.at(0.001) == curve.points[0]


def test_gates_without_an_opinion():
    answers = _random(30)
    mute = tuple(np.zeros_like(logits) for logits in answers.gate_logits)
    curve = fit_curve(dataclasses.replace(answers, gate_logits=mute))
    assert {point.share for point in curve.gate_points} <= {1.0, curve.points[0].share}
    assert any(point.tau is not None for point in curve.points), "escalation needs no gate"


def test_thousands_of_images_take_seconds():
    answers = _random(5000, spec=get_spec("ds_mbnet_tiny"))
    start = time.perf_counter()
    fit_curve(answers)
    assert time.perf_counter() - start < 15


def test_uniform_outcomes():
    answers = _random(40)
    outcomes = uniform_outcomes(answers, latency=MS)
    assert [route for route, _ in outcomes] == [SPEC.route_at(p) for p in ((0, 0), (2, 1), (2, 2))]
    for (route, outcome), path in zip(outcomes, ((0, 0), (1, 1), (1, 2)), strict=True):
        assert outcome.madds == madds(SPEC, route, 32, slimming_heads=True)
        assert outcome.ms == MS.route_cost(path)
        assert outcome.top1 == answers.correct_NP[:, answers.paths.index(path)].mean()


# -- a real network -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    net = lively(SPEC)
    with torch.no_grad():
        net.classifier.weight *= 100  # so that margins differ by more than rounding
    x = noise(SPEC, 61, seed=7)
    with torch.inference_mode():
        # the network's answers for half of the images, on one route or another
        labels = torch.stack([net(x, route) for route in SPEC.routes]).argmax(2)
    picked = torch.arange(61) % 3
    labels = labels.gather(0, picked[None])[0]
    labels[::5] = (labels[::5] + 1) % SPEC.num_classes
    return net, x, labels, answer_paths(net, zip(x.split(16), labels.split(16), strict=True))


def test_the_engine_keeps_what_the_curve_promises(real):
    net, x, labels, answers = real
    curve = fit_curve(answers)
    engine = Engine(Checkpoint(net, budget=curve.to_dict()), backend="eager")
    assert len(curve.points) > 5
    assert {len(point.escalations) for point in curve.points} == {0, 1, 2}
    for point in (*curve.points, *curve.gate_points):
        out = engine(x, budget=point)
        assert float(out.madds.mean()) == pytest.approx(point.madds)
        assert float((out.logits.argmax(1) == labels).float().mean()) == pytest.approx(point.top1)
    for budget in (0.75, "drop=5"):
        out = engine(x, budget=budget)
        assert float(out.madds.mean()) == pytest.approx(curve.at(budget).madds)


@for_backends("onnxruntime", "openvino")
def test_a_package_keeps_the_curve(real, backend, tmp_path):
    """Calibrated, saved with the checkpoint, exported: a budget means the same in the package."""
    net, x, _, _ = real
    plain = Engine(net, backend="eager")
    routed, widest = (plain(x, shift=shift).logits.argmax(1) for shift in (0.0, -1e6))
    # some images the gates are right about, some the widest route: a point of every kind
    labels = torch.where(torch.arange(61) % 3 == 0, widest, routed)
    curve = fit_curve(answer_paths(net, [(x, labels)]))
    checkpoint = Checkpoint(net, preprocessing=Preprocessing(32), budget=curve.to_dict())
    path = save(tmp_path / "net.safetensors", checkpoint)
    export_package(read(path), tmp_path / "package")
    ours = Engine.from_package(tmp_path / "package", backend=backend, cache_dir=None)
    theirs = Engine.from_checkpoint(path, backend="eager")
    assert ours.curve == theirs.curve == curve
    escalated, routes = set(), set()
    for budget in (0.72, 0.77, "drop=5", f"{curve.at(0.8).madds / 1e6:.12f}M", 0.825, 0.84, 1.0):
        for escalate in ("auto", None):
            out = ours(x, budget=budget, escalate=escalate)
            expected = theirs(x, budget=budget, escalate=escalate)
            assert out.routes.tolist() == expected.routes.tolist()
            assert out.madds.tolist() == expected.madds.tolist()
            assert out.escalated.tolist() == expected.escalated.tolist()
            assert_rows_close(out.logits, expected.logits, 5e-5)
            escalated.add(int(out.escalated.sum()))
            routes.add(tuple(map(tuple, out.routes.tolist())))
    assert len(escalated) >= 3, "the test needs budgets at which rows escalate"
    assert len(routes) >= 6, "the test needs budgets that differ"
    assert max(map(len, map(set, routes))) >= 3, "the test needs rows that take different routes"


def test_a_second_look_is_what_the_curve_promises(real):
    """Answers by the network, a curve of them, the engine at its points: the same to the image."""
    net, x, labels, _ = real
    answers = answer_paths(net, [(x, labels)], mirror=True)
    with torch.inference_mode():
        widest = [net(images, SPEC.widest_choice).softmax(1) for images in (x, x.flip(3))]
    mean = (widest[0] + widest[1]) / 2
    assert (answers.second_look_N == (mean.argmax(1) == labels).numpy()).all()
    assert answer_paths(net, [(x, labels)]).second_look_N is None
    # labels by which the second look is always right
    best = _looking(answers, np.ones(61, bool))
    curve = fit_curve(best)
    recipe = {"supernet": {"augment": {"mirror": True}}}
    engine = Engine(Checkpoint(net, recipe=recipe, budget=curve.to_dict()), backend="eager")
    looks = [point for point in curve.points if point.tau_mirror is not None]
    assert len(looks) > 3
    assert curve.points[-1].share > 1
    for point in looks:
        out, found = engine(x, budget=point), simulate(answers, point.shift, point.escalations)
        assert float(out.madds.mean()) == pytest.approx(point.madds)
        assert float((out.logits.argmax(1) == labels).float().mean()) == pytest.approx(found.top1)
        assert float(out.escalated.float().mean()) == pytest.approx(point.escalated)
        assert 0 < out.mirrored.sum() <= out.escalated.sum()
    with pytest.raises(UsageError, match=r"mirror image along .* has not been run"):
        simulate(_random(5), 0.0, [Escalation(0.5, (1, 2), mirror=True)])


def test_every_path_is_answered(real):
    net, x, labels, answers = real
    assert [len(level) for level in answers.gate_logits] == [1, 2]
    assert len(answers.paths) == 6
    with torch.inference_mode():
        for number, path in enumerate(answers.paths):
            logits = net(x, answers.spec.route_along(path))
            right = (logits.argmax(1) == labels).numpy()
            assert (answers.correct_NP[:, number] == right).all()
            top = logits.softmax(1).topk(2).values
            np.testing.assert_allclose(
                answers.margins_NP[:, number], top[:, 0] - top[:, 1], atol=1e-4
            )
    assert 0.2 < answers.correct_NP.mean() < 0.9
    assert answers.margins_NP.dtype == np.float32
    assert answers.image_size_px == 32


def test_batches_do_not_matter(real):
    net, x, labels, answers = real
    done = []
    again = answer_paths(net, [(x, labels)], on_batch=done.append)
    assert done == [61]
    assert (again.correct_NP == answers.correct_NP).all()
    for one, other in zip(again.gate_logits, answers.gate_logits, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


# -- what cannot be measured ----------------------------------------------------------------------


def test_wrong_inputs(real, monkeypatch):
    net, x, labels, answers = real
    plain = lively(NetSpec("plain", (StageSpec((4,), block="conv"),), num_classes=2))
    sizes = "square images of one size"
    for error, message, network, batches in (
        (DataError, "no images", net, []),
        (DataError, "no images", net, [(x[:0], labels[:0])]),
        (UsageError, sizes, net, [(x, labels), (x[:, :, :16, :16], labels)]),
        (UsageError, sizes, net, [(x[:, :, :16], labels)]),
        (UsageError, "plain has no gates", plain, []),
        (UsageError, r"call net\.eval", lively(SPEC).train(), []),
        (DynaslimError, "logits are not finite", net, [(x * math.nan, labels)]),
    ):
        with pytest.raises(error, match=message):
            answer_paths(network, batches)
    with pytest.raises(UsageError, match=r"target \(2, 2\): micro has no such path"):
        simulate(answers, 0.0, [Escalation(0.5, (2, 2))])
    for message, latency in (
        ("expected ms", answers.table),
        ("micro has 3", CostTable("ms", MS.segments[:2])),
    ):
        with pytest.raises(UsageError, match=message):
            fit_curve(answers, latency=latency)
    assert fit_curve(_random(1)).images == 1
    monkeypatch.setattr(calibrate_budget, "MAX_PATHS", 5)
    with pytest.raises(UsageError, match="its gates have 6 paths, a budget curve is made for 5"):
        answer_paths(net, [])


# -- the checkpoint and the command ---------------------------------------------------------------


@pytest.fixture
def micro(tmp_path):
    """A checkpoint of five classes and a parquet folder that fits it."""
    data = tmp_path / "data"
    write_parquet(data, [png(n) for n in range(120)], 5)
    write_parquet(data, [png(n) for n in range(200, 620)], 5, "train")
    stage = {"data": {"path": "somewhere", "split": "train", "val_split": None, "val_share": 0.25}}
    checkpoint = Checkpoint(
        lively(micro_spec(), image_size=16),
        preprocessing=Preprocessing(16),
        metrics={"kept": 1},
        recipe={"supernet": stage, "gate": stage},
    )
    return save(tmp_path / "micro.safetensors", checkpoint), data


def test_checkpoint_round_trip(tmp_path):
    net = lively(SPEC)
    without = save(tmp_path / "without.safetensors", Checkpoint(net))
    assert read(without).budget is None
    assert b'"budget"' not in without.read_bytes().replace(b"\\", b"")
    curve = fit_curve(_random(50), latency=MS)
    path = save(tmp_path / "with.safetensors", Checkpoint(net, budget=curve.to_dict()))
    assert BudgetCurve.from_dict(read(path).budget) == curve
    with pytest.raises(CheckpointError, match="not saved"):
        save(path, Checkpoint(net, budget={"points": math.nan}))
    assert BudgetCurve.from_dict(read(path).budget) == curve


def test_command(micro, capsys, tmp_path):
    path, data = micro
    before = read(path)
    other = tmp_path / "sub" / "with.safetensors"
    out = run_ok(
        capsys, "calibrate-budget", path, "--data", data, "--split", "test", "--out", other,
        "--budget", "0.6",
    )  # fmt: skip
    assert "120 images" in out
    assert "of less than 1,000 the points are hard to tell apart" in out
    assert re.search(r"\d\.\d\d% ±\d", out)
    assert "held out" not in out
    assert "budget 0.6" in out
    assert "4-4-6" in out, "the uniform routes to compare with"
    assert read(path).budget is None
    after = read(other)
    curve = BudgetCurve.from_dict(after.budget)
    curve.check_fits(SPEC)
    assert (curve.images, curve.image_size_px, curve.widest_ms) == (120, 16, None)
    assert after.metrics == {"kept": 1}
    assert after.recipe == before.recipe
    weights = before.net.state_dict()
    assert all(torch.equal(value, weights[k]) for k, value in after.net.state_dict().items())


def test_command_takes_what_training_held_back(micro, capsys):
    path, data = micro
    table = write_cost_table(path.with_name("ms.json"), MS, SPEC, 16)
    out = run_ok(
        capsys, "calibrate-budget", path, "--data", data, "--table", table, "--budget", "5ms",
        "--json",
    )  # fmt: skip
    printed = json.loads(out)
    held = holdout(open_source(data, "train").labels(), 0.25)[1]
    assert (printed["images"], printed["split"], printed["held_back"]) == (len(held), "train", 0.25)
    curve = BudgetCurve.from_dict(read(path).budget)
    assert BudgetCurve.from_dict(printed["curve"]) == curve
    budget = {**printed["budget"]}
    assert budget.pop("asked") == "5ms"
    assert budget == json.loads(json.dumps(dataclasses.asdict(curve.at("5ms"))))
    assert curve.widest_ms == pytest.approx(MS.widest_cost)
    assert [route["widths"] for route in printed["routes"]] == [[4, 4, 6], [4, 12, 8], [4, 12, 10]]
    assert [route["ms"] for route in printed["routes"]] == [3.5, 5.5, 10.0]
    # routes are compared on the images that the points' accuracy is of
    assert printed["routes"][0]["top1"] == curve.cheapest_top1
    assert printed["routes"][-1]["top1"] == curve.widest_top1
    human = run_ok(capsys, "calibrate-budget", path, "--data", data, "--table", table)
    assert f"{len(held)} images, those that training held out" in human
    assert "10.000" in human
    warned = run_ok(capsys, "calibrate-budget", path, "--data", data, "--split", "train")
    assert "trained on this split" in warned


def test_recalibrated_statistics_drop_the_curve(micro, capsys):
    path, data = micro
    run_ok(capsys, "calibrate-budget", path, "--data", data)
    assert read(path).budget is not None
    run_ok(capsys, "calibrate", path, path, "--data", data, "--workers", "0", "--batch-size", "20")
    assert read(path).budget is None


def test_command_refuses(micro, capsys, tmp_path):
    path, data = micro
    verb = ("calibrate-budget", path, "--data", data)
    content = path.read_bytes()
    fails(capsys, [*verb, "--batch-size", "0"], 2, "--batch-size 0")
    fails(capsys, [*verb, "--corrupt-limit", "2"], 2, "--corrupt-limit 2.0")
    fails(capsys, [*verb, "--budget", "60%"], 2, "budget '60%': give a share")
    fails(capsys, [*verb, "--budget", "4ms"], 2, "give a cost table in ms with --table")
    fails(capsys, [*verb, "--out", tmp_path], 2, "is a folder")
    counted = write_cost_table(tmp_path / "m.json", CostTable.from_madds(SPEC, 16), SPEC, 16)
    fails(capsys, [*verb, "--table", counted], 2, "is in madds, give one in ms")
    other = write_cost_table(tmp_path / "o.json", MS, SPEC, 32)
    fails(capsys, [*verb, "--table", other], 2, "for images of 32x32 px, not 16x16")
    fails(capsys, [*verb, "--split", "val"], 1, "no split 'val'")
    assert path.read_bytes() == content, "nothing was written"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, "does not record which images training held out"),
        ({"supernet": {"data": {"path": ""}}}, "does not record which images"),
        ({"supernet": ("train", None, 0.1), "gate": ("train", None, 0.2)}, "different images"),
        ({"supernet": ("train", None, 0.0)}, "held out no images"),
        ({"gate": ("train", "test", 0.1)}, None),
    ],
)
def test_which_images_are_held_out(micro, capsys, stages, message):
    path, data = micro
    for stage, kept in stages.items():
        if isinstance(kept, tuple):
            names = ("split", "val_split", "val_share")
            stages[stage] = {"data": {"path": "p", **dict(zip(names, kept, strict=True))}}
    save(path, dataclasses.replace(read(path), recipe=stages))
    if message is not None:
        fails(capsys, ["calibrate-budget", path, "--data", data], 2, message)
        return
    printed = json.loads(run_ok(capsys, "calibrate-budget", path, "--data", data, "--json"))
    assert (printed["split"], printed["held_back"], printed["images"]) == ("test", None, 120)


def test_images_that_do_not_decode(micro, capsys, tmp_path):
    path, _ = micro
    data = tmp_path / "broken"
    write_parquet(data, [*(png(n) for n in range(110)), b"no picture"], 5)
    verb = ("calibrate-budget", path, "--data", data, "--split", "test")
    fails(capsys, [*verb, "--corrupt-limit", "0"], 1, "broken")
    out = run_ok(capsys, *verb)
    assert "110 images, 1 skipped\nskipped: " in out
    assert read(path).budget["images"] == 110
    shutil.rmtree(data)
    write_parquet(data, [b"no picture"] * 120, 5)
    fails(capsys, [*verb, "--corrupt-limit", "1"], 1, "no images")


def test_too_few_images_are_refused(micro, capsys, tmp_path):
    """Also where they are too few because some do not decode; nothing is written."""
    path, _ = micro
    data, content = tmp_path / "few", path.read_bytes()
    write_parquet(data, [png(n) for n in range(99)], 5)
    verb = ("calibrate-budget", path, "--data", data, "--split", "test")
    fails(capsys, [*verb], 1, "has 99 images to measure budgets on")
    write_parquet(data, [*(png(n) for n in range(99)), b"no picture"], 5)
    fails(capsys, [*verb, "--corrupt-limit", "0.1"], 1, "give at least 100, better 1,000")
    assert path.read_bytes() == content
