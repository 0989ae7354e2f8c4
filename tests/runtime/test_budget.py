"""Decisions under a budget and the curve that budgets are looked up on; all without torch."""

import dataclasses
import json
import math

import numpy as np
import pytest
from helpers import altered, micro_spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynaslim.cost import CostTable, madds
from dynaslim.errors import UsageError
from dynaslim.runtime.budget import (
    BudgetCurve,
    BudgetPoint,
    PathCosts,
    choose,
    option_costs,
)
from dynaslim.runtime.escalation import (
    Escalation,
    averaged,
    escalation_cost,
    margins,
)
from dynaslim.spec import Route
from dynaslim.zoo import ZOO

WIDEST = CostTable.from_madds(micro_spec(), 32).widest_cost


# -- decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ZOO))
def test_option_costs(name):
    spec = ZOO[name]
    size = max(32, spec.total_stride)
    costs = option_costs(CostTable.from_madds(spec, size))
    assert [len(costs_K) for costs_K in costs] == [len(gate.choices) for gate in spec.gates]
    widest = madds(spec, spec.widest_choice, size, slimming_heads=True)
    for number, costs_K in enumerate(costs):
        assert (np.diff(costs_K) > 0).all()
        indices = [gate.choices[0] for gate in spec.gates]
        for option, cost in enumerate(costs_K):
            indices[number] = spec.gates[number].choices[option]
            expected = madds(spec, spec.route_at(indices), size, slimming_heads=True) / widest
            assert cost == pytest.approx(expected)


_logits = st.lists(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), min_size=1, max_size=6
).map(lambda rows: np.array(rows, np.float32))
_costs = st.lists(st.floats(1e-3, 1), min_size=4, max_size=4, unique=True).map(sorted).map(np.array)
_shifts = st.floats(-1e6, 1e6)


@given(_logits, _costs, _shifts, _shifts, st.sampled_from([None, 0, 1, 2, 3]))
def test_options_never_grow_with_the_shift(logits, costs, one, other, limit):
    cheap = choose(logits, max(one, other), costs, limit)
    wide = choose(logits, min(one, other), costs, limit)
    assert (cheap <= wide).all()
    assert wide.max() <= (3 if limit is None else limit)
    assert wide.dtype == np.int64
    assert wide.shape == (len(logits),)


@pytest.mark.parametrize("shift", [-0.95, -1.02])
def test_rounding_does_not_turn_a_decision_back(shift):
    """Plain argmax goes back to the first option where the shift is for wider ones."""
    naive = (np.array([1e16, 1e16]) - shift * np.array([1.0, 1.1])).argmax()
    assert naive == (1 if shift == -0.95 else 0)
    assert choose(np.array([[1e16, 1e16]]), shift, np.array([1.0, 1.1])).tolist() == [1]


@given(_logits, _costs)
def test_no_shift_is_the_gates_own_decision(logits, costs):
    assert choose(logits, 0.0, costs).tolist() == logits.argmax(1).tolist()
    for limit in range(4):
        own = logits[:, : limit + 1].argmax(1)
        assert choose(logits, 0.0, costs, limit).tolist() == own.tolist()


def test_choose_by_hand():
    costs = np.array([0.2, 0.5, 1.0])
    logits = np.array([[0, 1, 1.5], [3, 0, 0], [1, 1, 1]], np.float32)
    assert choose(logits, 0.0, costs).tolist() == [2, 0, 0]
    assert choose(logits, 0.99, costs).tolist() == [2, 0, 0]
    assert choose(logits, 1.0, costs).tolist() == [1, 0, 0]  # a tie, which the cheaper one wins
    assert choose(logits, 4.0, costs).tolist() == [0, 0, 0]
    assert choose(logits, -4.0, costs).tolist() == [2, 2, 2]
    assert choose(logits, -4.0, costs, limit=1).tolist() == [1, 0, 1]
    assert choose(logits[:0], 1.0, costs).tolist() == []


@given(_logits.filter(lambda logits: np.abs(logits).max() < 50))
def test_margins_are_those_of_a_plain_softmax(logits):
    values = margins(logits)
    assert values.dtype == np.float32
    probabilities = np.exp(logits.astype(np.float64))
    probabilities = np.sort(probabilities / probabilities.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(values, probabilities[:, -1] - probabilities[:, -2], atol=1e-6)


def test_margins_of_extreme_logits():
    logits = np.array([[3e38, 0, 0], [-3e38, -3e38, -3e38], [1e4, 1e4, -1e4], [0, -90, 0]])
    with np.errstate(all="raise", under="ignore", over="ignore"):
        assert margins(logits.astype(np.float32)).tolist() == [1, 0, 0, 0]
    assert margins(np.zeros((3, 1), np.float32)).tolist() == [1, 1, 1]
    assert margins(logits).dtype == np.float64


def test_who_may_escalate():
    def may_escalate(table, own, target):
        (may,) = PathCosts(table).may_escalate(np.array([own]), target)
        return may

    table = CostTable.from_madds(micro_spec(), 32)
    assert may_escalate(table, (0, 0), (1, 2))
    assert may_escalate(table, (0, 2), (1, 1)) == (
        table.route_cost((0, 2)) < table.route_cost((1, 1))
    )
    assert not may_escalate(table, (1, 2), (1, 2))
    assert not may_escalate(table, (1, 2), (1, 1))
    # a row that is as wide everywhere stays, even where this is cheaper by a table
    falling = CostTable("ms", (((1.0,),), ((5.0, 2.0),), ((5.0, 4.0, 3.0), (3.0, 2.0, 1.0))))
    assert falling.route_cost((1, 2)) < falling.route_cost((0, 0))
    assert not may_escalate(falling, (1, 2), (0, 0))
    kept = madds(micro_spec(), Route((4, 12, 10)), 32, slimming_heads=True)
    assert escalation_cost(table, (1, 2)) == kept - table.segments[0][0][0]


# -- the curve ------------------------------------------------------------------------------------


def _point(share, top1, ms=None, tau=None, **changes):
    point = BudgetPoint(
        shift=1 - share,
        tau=tau,
        escalate_to=None if tau is None else (1, 2),
        madds=share * WIDEST,
        share=share,
        ms=ms,
        top1=top1,
        escalated=0.0 if tau is None else 0.25,
    )
    return dataclasses.replace(point, **changes)


def _curve(**changes):
    curve = BudgetCurve(
        image_size_px=32,
        images=1000,
        widest_madds=WIDEST,
        widest_ms=9.0,
        widest_top1=0.9,
        cheapest_madds=0.3 * WIDEST,
        cheapest_ms=4.0,
        cheapest_top1=0.7,
        points=(
            _point(0.3, 0.7, 4.0),
            _point(0.5, 0.84, 6.0, tau=0.5),
            _point(0.7, 0.897, 7.0, tau=0.75),
            _point(1.0, 0.9, 9.0),
        ),
        gate_points=(_point(0.3, 0.7, 4.0), _point(0.6, 0.85, 5.0), _point(1.0, 0.9, 9.0)),
        reporting_images=500,
    )
    return dataclasses.replace(curve, **changes)


@pytest.mark.parametrize(
    ("budget", "joint", "alone"),
    [
        (0.5, 0.5, 0.3),
        (1, 1.0, 1.0),
        (np.float32(0.75), 0.7, 0.6),
        ("0.6", 0.5, 0.6),
        (" .99 ", 0.7, 0.6),
        (0.01, 0.3, 0.3),  # nobody is that cheap
        ("7ms", 0.7, 0.6),
        ("8.9 ms", 0.7, 0.6),
        ("5.5ms", 0.3, 0.6),
        ("1e-3ms", 0.3, 0.3),
        (f"{0.65 * WIDEST / 1e6}M", 0.5, 0.6),
        (f"{0.7 * WIDEST / 1e6} M", 0.7, 0.6),
        ("1000M", 1.0, 1.0),
        ("drop=0.3", 0.7, 1.0),
        ("drop = 5", 0.7, 0.6),
        ("drop=6", 0.5, 0.6),
        ("drop=0", 1.0, 1.0),
        ("drop=100", 0.3, 0.3),
    ],
)
def test_at(budget, joint, alone):
    curve = _curve()
    assert curve.at(budget).share == joint
    assert curve.at(budget, escalate=False).share == alone
    assert curve.at(budget, escalate=False).tau is None
    assert curve.at(budget) in curve.points


def test_at_a_point_of_ones_own():
    curve, point = _curve(), _point(0.42, 0.8)
    assert curve.at(point) is point
    assert curve.at(point, escalate=False) is point
    escalating = _point(0.42, 0.8, tau=0.5)
    assert curve.at(escalating) is escalating
    with pytest.raises(UsageError, match="escalates"):
        curve.at(escalating, escalate=False)


def test_ms_points_come_before_the_others():
    curve = _curve(ms_points=(_point(0.9, 0.7, 3.0), _point(0.95, 0.89, 5.0, tau=0.5)))
    assert curve.at("5ms").share == 0.95
    assert curve.at("4ms").share == 0.9
    assert curve.at("5ms", escalate=False).share == 0.6  # no ms_gate_points


def test_the_selecting_half_decides_which_point_is_better():
    noisy = (_point(0.3, 0.7), _point(0.5, 0.86, top1_selecting=0.8), _point(0.7, 0.84))
    curve = _curve(points=noisy)
    assert curve.at(1.0) is noisy[2]
    flattered = dataclasses.replace(noisy[1], top1_selecting=0.99)
    assert _curve(points=(noisy[0], flattered, noisy[2])).at(1.0) is flattered


def test_a_budget_of_1_is_the_best_there_is():
    lucky = _point(0.7, 0.91, 7.0)
    assert _curve(points=(_point(0.3, 0.7, 4.0), lucky, _point(1.0, 0.9, 9.0))).at(1).share == 1
    clear = _point(0.7, 0.95, 7.0)
    curve = _curve(points=(_point(0.3, 0.7, 4.0), clear, _point(1.0, 0.9, 9.0)))
    assert curve.at(1) is clear
    assert curve.at("1000M") is clear
    assert dataclasses.replace(curve, images=60, reporting_images=30).at(1).share == 1
    assert dataclasses.replace(curve, images=60, reporting_images=30).at(0.99) is clear
    # a second look had to show its worth when it was measured
    looks = dataclasses.replace(lucky, tau_mirror=0.2, mirror_along=(1, 2))
    assert _curve(points=(_point(0.3, 0.7, 4.0), looks, _point(1.0, 0.9, 9.0))).at(1) is looks


def test_what_is_out_of_reach():
    curve = _curve()
    assert [point.share for point in curve.reachable] == [0.3, 0.5, 0.7, 1.0]
    for fine in (0.3, 0.5, 0.55, 0.7, 0.75, 1, "1", "4.5ms", "drop=5", curve.points[0]):
        assert curve.out_of_reach(fine) is None, fine
    for low in (0.1, "0.29", f"{0.2 * WIDEST / 1e6}M"):
        assert "reaches from 0.300 to 1 of the widest" in curve.out_of_reach(low)
        assert curve.at(low) is curve.points[0]
    assert "between 0.700 and 1 " in curve.out_of_reach("0.9")
    assert "between 0.300 and 0.5 " in curve.out_of_reach(0.45)
    assert curve.share_of("0.6") == 0.6
    assert curve.share_of(f"{0.5 * WIDEST / 1e6}M") == pytest.approx(0.5)
    assert curve.share_of("7ms") == 0.7
    # a point behind which nothing is better is not to be had
    worse = _curve(points=(_point(0.3, 0.7, 4.0), _point(0.5, 0.6, 5.0), _point(1.0, 0.9, 9.0)))
    assert [point.share for point in worse.reachable] == [0.3, 1.0]


@pytest.mark.parametrize(
    "budget",
    [
        0, 0.0, -0.5, 1.01, 2.1, math.nan, math.inf, True, None, (1,), "", "x", "60%", "1.5", "0",
        "-1", "nan", "4.5s", "ms", "0ms", "-4ms", "4.5MS", "0M", "250m", "250", "drop", "drop=",
        "drop=-1", "drop=0.3%", "drop=nan", "0.5 0.6", "1e999M",
    ],
)  # fmt: skip
def test_not_a_budget(budget):
    with pytest.raises(UsageError, match="a share of the widest") as caught:
        _curve().at(budget)
    message = str(caught.value)
    assert repr(budget) in message
    assert "\n" not in message
    for form in ("0.6", "250M", "4.5ms", "drop=0.3"):
        assert form in message


def test_budgets_that_this_curve_cannot_meet():
    untimed = _curve(widest_ms=None, cheapest_ms=None)
    with pytest.raises(UsageError, match="no milliseconds"):
        untimed.at("4.5ms")
    low = _curve(points=(_point(0.3, 0.7, 4.0), _point(0.8, 0.8925, 8.0)))
    with pytest.raises(UsageError, match=r"the nearest is drop=0\.75$"):
        low.at("drop=0.5")
    assert low.at("drop=0.75").share == 0.8


_curves = st.lists(
    st.tuples(st.floats(0.05, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=12
).map(
    lambda raw: _curve(
        points=tuple(_point(s, a, tau=0.5 if e else None) for s, a, e in sorted(raw)),
        gate_points=tuple(_point(s, a) for s, a, _ in sorted(raw)),
    )
)


@given(_curves, st.floats(0.001, 1), st.floats(0.001, 1), st.booleans())
def test_a_larger_budget_is_never_spent_on_less(curve, one, other, escalate):
    small, large = sorted((one, other))
    lower = curve.at(small, escalate=escalate)
    upper = curve.at(large, escalate=escalate)
    assert lower.share <= upper.share
    cheapest = (curve.points if escalate else curve.gate_points)[0]
    assert lower.share <= small * (1 + 1e-6) or lower.share == cheapest.share
    assume(cheapest.share <= small)
    assert lower.top1 <= upper.top1


# -- as JSON --------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(_curves)
def test_json_round_trip(curve):
    curve = dataclasses.replace(curve, widest_ms=None, cheapest_ms=None)
    assert BudgetCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


def test_json_round_trip_with_ms():
    curve = _curve(ms_points=(_point(0.9, 0.7, 3.0), _point(0.5, 0.8, 5.0, tau=0.5)))
    data = curve.to_dict()
    assert data["points"][1]["escalate_to"] == [1, 2]
    assert BudgetCurve.from_dict(json.loads(json.dumps(data))) == curve
    curve.check_fits(micro_spec())


def test_a_point_of_two_steps():
    point = _point(0.5, 0.8, 5.0, tau=0.5, escalate_to=(0, 1), tau_then=0.25, escalate_then=(1, 2))
    assert point.escalations == (Escalation(0.5, (0, 1)), Escalation(0.25, (1, 2)))
    curve = _curve(points=(point,))
    data = json.loads(json.dumps(curve.to_dict()))
    assert BudgetCurve.from_dict(data) == curve
    assert curve.at(0.6) == point
    # curves of earlier versions know one step
    for old in (p for points in data.values() if isinstance(points, list) for p in points):
        del old["tau_then"], old["escalate_then"]
    (read,) = BudgetCurve.from_dict(data).points
    assert read.escalations == point.escalations[:1]


def _looks(share, top1, tau_mirror=0.5, **changes):
    return _point(share, top1, 9.0, tau_mirror=tau_mirror, mirror_along=(1, 2), **changes)


def test_a_point_with_a_second_look():
    step = Escalation(0.5, (1, 2), mirror=True)
    assert _looks(1.2, 0.92).escalations == (step,)
    both = _looks(0.8, 0.91, tau=0.25)
    assert both.escalations == (Escalation(0.25, (1, 2)), step)
    curve = _curve(points=(*_curve().points, _looks(1.2, 0.92), _looks(1.6, 0.93)))
    data = json.loads(json.dumps(curve.to_dict()))
    assert BudgetCurve.from_dict(data) == curve
    # budgets above 1 are there where something costs more than 1
    for budget, share in ((1, 1.0), (1.1, 1.0), (1.3, 1.2), ("1.6", 1.6), (2, 1.6)):
        assert curve.at(budget).share == share
    assert curve.at(1.3, escalate=False).share == 1.0
    for budget in (1.01, "2.0"):
        with pytest.raises(UsageError, match="this curve has none; give a share of the widest"):
            _curve().at(budget)
    for budget in (2.01, "3", 60):
        with pytest.raises(UsageError, match="up to 2"):
            curve.at(budget)
    # curves of earlier versions know no second look
    old = _curve().to_dict()
    for raw in (point for points in old.values() if isinstance(points, list) for point in points):
        del raw["tau_mirror"], raw["mirror_along"]
    assert BudgetCurve.from_dict(old) == _curve()


def test_a_second_look_where_mirror_images_are_of_other_classes():
    curve = _curve(points=(*_curve().points, _looks(1.2, 0.92, tau_mirror=0.375)))
    curve.check_fits(micro_spec(), mirror=True)
    with pytest.raises(UsageError, match=r"tau_mirror 0.375: micro .*augment\.mirror: true") as no:
        curve.check_fits(micro_spec())
    assert "\n" not in str(no.value)
    _curve().check_fits(micro_spec())
    narrower = dataclasses.replace(_looks(1.2, 0.92), mirror_along=(1, 1))
    with pytest.raises(UsageError, match=r"mirror_along \(1, 1\): .* the widest path, \(1, 2\)"):
        narrower.check_fits(micro_spec(), mirror=True)


def test_probabilities_are_averaged():
    rng = np.random.default_rng(0)
    one, other = (rng.normal(0, 30, (50, 7)).astype(np.float32) for _ in range(2))
    one[0, 0], other[1, 1] = 1e4, -1e4

    def softmax(logits):
        exp = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        return exp / exp.sum(1, keepdims=True)

    found = averaged(one, other)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    np.testing.assert_allclose(softmax(found), (softmax(one) + softmax(other)) / 2, atol=1e-6)
    assert (averaged(one, one).argmax(1) == one.argmax(1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (altered("widest_ms", left_out=True), "has no 'widest_ms'"),
        (altered("more", value=1), "unknown key 'more'"),
        (altered("points", 1, "tau", left_out=True), r"points\[1\]: has no 'tau'"),
        (altered("points", 1, "more", value=1), "unknown key 'more'"),
        (altered("points", value=[]), "points has no point"),
        (
            altered("points", 0, "shift", value="1"),
            r"points\[0\].shift '1': expected float, got str",
        ),
        (altered("points", 0, "shift", value=math.inf), "points 0: shift inf must be a finite"),
        (altered("points", 0, "top1", value=1.1), r"points\[0\].top1 1.1: expected float <= 1"),
        (altered("points", 0, "top1_selecting", value=2), "top1_selecting 2"),
        (altered("points", 0, "madds", value=-1), "madds -1: expected float >= 0"),
        (altered("points", 0, "madds", value=math.nan), "madds nan"),
        (
            altered("points", 0, "share", value=0.5),
            r"share 0.5 must be its part of widest_madds, 0\.3",
        ),
        (altered("points", 0, "ms", value=None), "points 0: ms None, unlike the ends"),
        (altered("points", 1, "tau", value=None), "points 1: tau and escalate_to"),
        (altered("points", 1, "escalate_to", value=None), "points 1: tau and escalate_to"),
        (altered("points", 1, "tau_then", value=0.5), "points 1: tau_then and escalate_then"),
        (altered("points", 1, "escalate_then", value=[1]), "points 1: tau_then and escalate_then"),
        (
            lambda data: data["points"][0].update(tau_then=0.5, escalate_then=[1, 2]),
            "points 0: escalate_then without escalate_to",
        ),
        (
            altered("points", 1, "escalate_to", value=[1, -1]),
            r"escalate_to\[1\] -1: expected int >= 0",
        ),
        (
            altered("gate_points", 1, value=_curve().to_dict()["points"][1]),
            "gate_points 1: escalates",
        ),
        (
            lambda data: data["gate_points"][2].update(tau_mirror=0.5, mirror_along=[1, 2]),
            "gate_points 2: escalates",
        ),
        (altered("points", 1, "tau_mirror", value=0.5), "points 1: tau_mirror and mirror_along"),
        (
            altered("points", 1, "mirror_along", value=[1, 2]),
            "points 1: tau_mirror and mirror_along",
        ),
        (altered("images", value=0), "images 0: expected int >= 1"),
        (altered("reporting_images", value=0), "reporting_images 0"),
        (altered("image_size_px", value=None), "image_size_px None"),
        (altered("widest_madds", value=0), "widest_madds must be above 0"),
        (altered("cheapest_ms", value=None), "ms for one end only"),
        (lambda data: data["points"].reverse(), "points must stand in order of their cost"),
        (
            lambda data: data["ms_points"].extend(reversed(data["gate_points"])),
            "ms_points must stand in order",
        ),
    ],
)
def test_damaged_json(change, message):
    data = _curve().to_dict()
    change(data)
    with pytest.raises(UsageError, match=message) as caught:
        BudgetCurve.from_dict(data)
    assert "\n" not in str(caught.value)


def test_not_even_an_object():
    for data in (None, [], "x"):
        with pytest.raises(UsageError, match=r"budget curve.*: expected object"):
            BudgetCurve.from_dict(data)


def test_check_fits():
    curve = _curve()
    curve.check_fits(micro_spec())
    with pytest.raises(UsageError, match="its widest route costs"):
        curve.check_fits(micro_spec(num_classes=6))
    with pytest.raises(UsageError, match="image size 1x1"):
        dataclasses.replace(curve, image_size_px=1).check_fits(micro_spec())
    for target in ((2, 2), (1,), (1, 2, 0)):
        for point in (
            _point(0.5, 0.8, 6.0, tau=0.5, escalate_to=target),
            _point(0.5, 0.8, 6.0, tau=0.5, tau_then=0.5, escalate_then=target),
        ):
            with pytest.raises(UsageError, match=r"does not fit the gates of micro"):
                _curve(points=(point,)).check_fits(micro_spec())
