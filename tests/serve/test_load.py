"""What the load leaves of a budget, with a clock by hand; and the options."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import output_of

from dynaslim.errors import UsageError
from dynaslim.serve import Batcher, ServeOptions
from dynaslim.serve.budgets import Budgets

# -- budgets of a network -------------------------------------------------------------------------


def _budgets(engine, **options):
    return Budgets(engine.curve, ServeOptions(**options), 0.0)


def test_adaptive_budget(engine):
    lowest, middle, highest = engine.curve.points
    budgets = _budgets(engine, adaptive_budget="0.01")
    own = budgets.parse(None, "auto")
    capped = budgets.parse(f"{middle.share}", "auto")
    assert budgets.current.point == highest == own.point
    assert budgets.current.used == "1"
    budgets.observe(0.2, 1.0)
    assert budgets.current.point == middle
    assert budgets.limited_by_load(own).requested == "1"
    assert budgets.limited_by_load(own).used == f"{math.ceil(middle.share * 1e4) / 1e4:g}"
    assert budgets.limited_by_load(capped) == capped, "never more than a request sets"
    budgets.observe(9.0, 2.0)
    assert budgets.current.point == budgets.limited_by_load(capped).point == lowest
    assert budgets.limited_by_load(budgets.parse(None, 0.5)).escalate == 0.5

    narrow = _budgets(engine, adaptive_budget=f"0.01:{middle.share}")
    assert narrow.current.point == middle
    narrow = _budgets(engine, adaptive_budget=f"{middle.share}")
    narrow.observe(9.0, 2.0)
    assert narrow.current.point == middle

    with pytest.raises(UsageError, match="no two points in that range; its cheapest is"):
        _budgets(engine, adaptive_budget=f"0.01:{lowest.share + 1e-4:.4f}")


def test_a_batcher_lowers_the_budget_when_its_queue_grows(engine):
    """The wait is what the engine's own speed and the queue make it."""
    clock = SimpleNamespace(now=0.0)

    class Slow:
        """A second for each row."""

        preprocessing, curve = engine.preprocessing, engine.curve

        def __call__(self, x, *, budget, escalate):
            used.append(budget)
            clock.now += len(x)
            return output_of(np.zeros((len(x), 5)))

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
