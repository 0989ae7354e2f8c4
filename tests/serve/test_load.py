"""What the load leaves of a budget, with a clock by hand; and the options."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from dynaslim.errors import UsageError
from dynaslim.serve import Batcher, ServeOptions
from dynaslim.serve.budgets import (
    CALM_S,
    LEAST_BATCHES,
    LONGEST_CALM_S,
    SETTLE_S,
    BudgetControl,
    Budgets,
    Throughput,
    spread,
)


def test_throughput_is_the_median_of_late():
    rate = Throughput()
    for _ in range(LEAST_BATCHES):
        assert rate.seconds_for(100) == 0
        assert rate.rows_in(1.0, 4, 32) == 32
        rate.add(10, 0.1)
    assert [rate.rows_in(seconds, 4, 32) for seconds in (0.01, 0.1, 1)] == [4, 10, 32]
    for _ in range(2):
        rate.add(10, 0.1)
    assert rate.seconds_for(100) == pytest.approx(1)
    rate.add(1, 60)  # the machine slept
    assert rate.seconds_for(100) == pytest.approx(1)
    for _ in range(9):
        rate.add(10, 1)
    assert rate.seconds_for(100) == pytest.approx(10)


def test_budget_falls_under_load_and_rises_when_it_is_calm():
    control = BudgetControl(4, target_s=0.1, now=0.0)
    assert control.observe(0.05, 0.0) == 3
    assert control.observe(0.2, 1.0) == 2, "one level at once"
    assert control.observe(0.2, 1.0 + SETTLE_S / 2) == 2, "which has time to show what it does"
    assert control.observe(0.2, 1.0 + SETTLE_S) == 1
    assert control.observe(0.05, 3.0) == 1, "neither too long nor calm"
    assert control.observe(0.0, 3.0 + CALM_S / 2) == 1
    assert control.observe(0.0, 3.0 + CALM_S) == 2
    assert control.observe(0.0, 3.0 + 2.5 * CALM_S) == 3
    assert control.observe(0.0, 1000.0) == 3
    assert control.observe(0.31, 1001.0) == 0, "far too long: the lowest at once"
    assert control.observe(0.5, 1002.0) == 0
    assert control.observe(0.0, 1002.0 + 3 * CALM_S) == 3, "calm while nobody asked"


def test_it_does_not_swing_under_a_load_that_a_level_cannot_carry():
    """The wait is long at level 1 and none at level 0: attempts become rarer."""
    control, now, attempts = BudgetControl(2, target_s=0.1, now=0.0), 0.0, []
    while now < 600:
        before = control.level
        if control.observe(0.2 if before else 0.0, now) > before:
            attempts.append(now)
        now += 0.05
    gaps = np.diff(attempts)
    assert gaps[0] < 3 * CALM_S
    assert gaps[-1] == pytest.approx(LONGEST_CALM_S, abs=1)
    assert len(attempts) < 20
    # and when the load has gone, it comes back for good
    while now < 1000:
        level = control.observe(0.0, now)
        now += 0.05
    assert level == 1
    assert control.observe(0.2, now) == 0
    assert control.observe(0.0, now + 0.1) == 0
    assert control.observe(0.0, now + 0.1 + CALM_S) == 1, "patience is back to what it was"


def test_spread():
    assert spread([1, 2, 3], 8) == [0, 1, 2]
    assert spread([1, 1.1, 2, 3.9, 4], 3) == [0, 2, 4]
    kept = spread(list(range(1, 100)), 8)
    assert kept[0] == 0
    assert kept[-1] == 98
    assert len(kept) == 8


# -- budgets of a network -------------------------------------------------------------------------


def _budgets(engine, **options):
    return Budgets(engine.curve, ServeOptions(**options), 0.0)


def test_fixed_budgets(engine):
    budgets = _budgets(engine)
    own = budgets.setting(None, "auto")
    assert (own.point, own.asked, own.used) == (None, None, None)
    assert budgets.setting("1", "auto").point == engine.curve.points[-1]
    budgets.observe(1e9, 1.0)
    assert budgets.in_use(own) == own

    budgets = _budgets(engine, budget="0.01")
    assert budgets.setting(None, "auto").point == engine.curve.points[0]
    assert budgets.setting(None, "auto").asked == "0.01"
    assert budgets.setting("1", None).point == engine.curve.points[-1]
    with pytest.raises(UsageError, match="give a share"):
        budgets.setting("much", "auto")


def test_adaptive_budget(engine):
    lowest, middle, highest = engine.curve.points
    budgets = _budgets(engine, adaptive_budget="0.01")
    own = budgets.setting(None, "auto")
    capped = budgets.setting(f"{middle.share}", "auto")
    assert budgets.current.point == highest == own.point
    assert budgets.current.used == "1"
    budgets.observe(0.2, 1.0)
    assert budgets.current.point == middle
    assert budgets.in_use(own).asked == "1"
    assert budgets.in_use(own).used == f"{math.ceil(middle.share * 1e4) / 1e4:g}"
    assert budgets.in_use(capped) == capped, "never more than a request asks for"
    budgets.observe(9.0, 2.0)
    assert budgets.current.point == budgets.in_use(capped).point == lowest
    assert budgets.in_use(budgets.setting(None, 0.5)).escalate == 0.5

    narrow = _budgets(engine, adaptive_budget=f"0.01:{middle.share}")
    assert narrow.current.point == middle
    narrow = _budgets(engine, adaptive_budget=f"{middle.share}")
    narrow.observe(9.0, 2.0)
    assert narrow.current.point == middle

    with pytest.raises(UsageError, match="no two points in that range; its cheapest is"):
        _budgets(engine, adaptive_budget=f"0.01:{lowest.share + 1e-4:.4f}")


@pytest.mark.parametrize("options", [{"budget": "0.5"}, {"adaptive_budget": "0.5"}])
def test_budgets_need_a_curve(options):
    with pytest.raises(UsageError, match="no budget curve; measure one with"):
        Budgets(None, ServeOptions(**options), 0.0)


def test_a_batcher_lowers_the_budget_when_its_queue_grows(engine):
    """The wait is what the engine's own speed and the queue make it."""
    clock = SimpleNamespace(now=0.0)

    class Slow:
        """A second for each row."""

        preprocessing, curve = engine.preprocessing, engine.curve

        def __call__(self, x, *, budget, escalate):
            used.append(budget)
            clock.now += len(x)
            rows = len(x)
            return SimpleNamespace(
                logits=np.zeros((rows, 5)), routes=np.zeros((rows, 2), int),
                madds=np.ones(rows), escalated=np.zeros(rows, bool),
                mirrored=np.zeros(rows, bool),
            )  # fmt: skip

    used = []
    options = ServeOptions(adaptive_budget="0.01", adaptive_wait_ms=2500, max_batch=1)
    pixels = np.zeros((3, 16, 16), np.uint8)
    with Batcher(Slow(), options, clock=lambda: clock.now) as batcher:
        batcher.submit([pixels]).result(10)
        batcher.submit([pixels] * 5).result(10)
        shares = [point.share for point in used]
        assert shares[0] == 1.0
        assert min(shares) < 1.0, "five seconds of queue are more than two and a half"
        clock.now += 100
        assert batcher.budget.point.share == 1.0, "time alone gives it back"


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "--max-batch 0: must be a whole number"),
        ({"max_pixels": 10**9}, "at most 178956970"),
        ({"queue": 8}, "--queue 8: must hold a whole request"),
        ({"deadline_ms": 0}, "--deadline-ms 0: must be above 0"),
        ({"deadline_ms": math.inf}, "--deadline-ms inf"),
        ({"max_wait_ms": -1}, "--max-wait-ms -1: must be at least 0"),
        ({"max_body_mb": 300}, "--max-buffer-mb 256: must hold a whole body"),
        ({"token": ""}, "--token: is empty"),
        ({"token": "gehéim"}, "--token: may have ASCII"),
        ({"decoders": 0}, "--decoders 0"),
        ({"budget": "much"}, "budget 'much': give a share"),
        ({"adaptive_budget": "0.5:0.4"}, "give LOW or LOW:HIGH"),
        ({"adaptive_budget": "4ms"}, "give LOW or LOW:HIGH"),
        ({"adaptive_budget": "0.8", "budget": "0.5"}, "below --budget 0.5"),
        ({"adaptive_budget": "0.3:0.5", "budget": "0.5"}, "leave --budget out"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        ServeOptions(**options)


def test_options():
    assert ServeOptions(adaptive_budget="0.3").adaptive_range() == (0.3, 1.0)
    assert ServeOptions(adaptive_budget="0.3", budget="0.6").adaptive_range() == (0.3, 0.6)
    assert ServeOptions(max_body_mb=0.5).body_bytes == 500_000
    assert "secret" not in repr(ServeOptions(token="secret"))
