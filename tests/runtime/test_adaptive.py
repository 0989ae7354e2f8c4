"""An adaptive budget's parts, with a clock by hand."""

import numpy as np
import pytest

from dynaslim.runtime.adaptive import (
    CALM_S,
    LEAST_BATCHES,
    LONGEST_CALM_S,
    SETTLE_S,
    BudgetControl,
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
    assert control.observe(0.0, 1002.0 + 3 * CALM_S) == 3, "calm while no request came"


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
