"""Measured times of variants, kept as a cost table; small buckets that join wider ones."""

import dataclasses
import itertools
import json
from functools import cache

import numpy as np
import pytest
import torch
from helpers import (
    assert_rows_close,
    for_backends,
    lively,
    lively_net,
    micro_spec,
    noise,
    row_by_row,
)
from hypothesis import given
from hypothesis import strategies as st

from dynaslim import Engine
from dynaslim.cost import CostTable
from dynaslim.cost_file import read_cost_table, write_cost_table
from dynaslim.errors import UsageError
from dynaslim.runtime.latency import LatencyTable, profile
from dynaslim.runtime.variants import SegmentVariant, segment_variants, variant_table

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = micro_spec()
VARIANTS = list(segment_variants(SPEC))
TABLE = variant_table(SPEC)


@cache
def measured(backend="eager"):
    engine = Engine(lively_net("micro"), backend=backend, workers=2)
    heard = []
    table = profile(
        engine.router,
        32,
        6,
        rounds=3,
        note={"backend": backend},
        on_variant=lambda: heard.append(1),
    )
    assert len(heard) == len(VARIANTS)
    return table


def made_up(step_ms):
    """A table whose steps take `step_ms(variant, rows)`."""
    rows = (1, 4, 16, 64)
    ms = {variant.name: tuple(float(step_ms(variant, n)) for n in rows) for variant in VARIANTS}
    segments = []
    for number, before in enumerate([(0,), (0,), (0, 2)]):
        after = SPEC.gates[number - 1].choices if number else (0,)
        segments.append(
            tuple(
                tuple(ms[SegmentVariant(number, a, b).name][-1] / 64 for b in after) for a in before
            )
        )
    return LatencyTable(CostTable("ms", tuple(segments)), 32, rows, ms)


# -- measuring ------------------------------------------------------------------------------------


@for_backends("eager", "onnxruntime", "openvino")
def test_profile_measures_every_form(backend):
    table = measured(backend)
    table.check_fits(SPEC)
    assert table.rows == (1, 2, 4, 6)
    assert set(table.ms) == set(table.spread) == {variant.name for variant in VARIANTS}
    assert table.image_size_px == 32
    assert table.note == {"backend": backend}
    assert table.table.unit == "ms"
    assert [(len(s), len(s[0])) for s in table.table.segments] == [(1, 1), (1, 2), (2, 3)]
    for number, segment in enumerate(table.table.segments):
        for a, costs in enumerate(segment):
            for b, cost in enumerate(costs):
                before = (0, 2)[a] if number == 2 else 0
                after = SPEC.gates[number - 1].choices[b] if number else 0
                assert cost == table.ms[SegmentVariant(number, before, after).name][-1] / 6


def test_profile_times_what_it_reports(monkeypatch):
    """A variant that sleeps, by rows: its times, and no other's, show it."""
    import time

    from dynaslim.runtime.backends.eager import EagerBackend

    plain = EagerBackend.program

    def slow(self, variant, shape, *, wide):
        run = plain(self, variant, shape, wide=wide)
        if variant != SegmentVariant(2, 0, 1):
            return run
        return lambda x, outs: (time.sleep(0.02 * len(x)), run(x, outs))

    monkeypatch.setattr(EagerBackend, "program", slow)
    engine = Engine(lively_net("micro"), backend="eager", workers=1)
    table = profile(engine.router, 16, 4, rounds=2)
    times = table.ms["segment2_0_1"]
    for ms, rows in zip(times, (1, 2, 4), strict=True):
        assert ms == pytest.approx(20 * rows, rel=0.5)
    assert max(t for name, ts in table.ms.items() if name != "segment2_0_1" for t in ts) < times[0]
    assert table.table.segments[2][0][1] == times[-1] / 4


def test_written_and_read_again(tmp_path):
    table = measured()
    path = table.write(tmp_path / "table.json", SPEC)
    assert LatencyTable.read(path, SPEC) == table
    assert read_cost_table(path, SPEC, image_size=32) == table.table
    assert Engine(lively_net("micro"), backend="eager", latency=path).latency == table


def test_steps_between_and_beyond_those_measured():
    table = made_up(lambda variant, rows: 2.0 + rows)
    variant = VARIANTS[3]
    assert table.step_ms(variant, 0) == 0
    assert [table.step_ms(variant, n) for n in (1, 2, 4, 10, 64)] == [3, 4, 6, 12, 66]
    assert table.step_ms(variant, 128) == 132


def _edited(tmp_path, change):
    path = measured().write(tmp_path / "table.json", SPEC)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["note"].pop("rows"), "without times by rows.*dynaslim profile"),
        (lambda d: d["note"].pop("ms"), "without times by rows"),
        (lambda d: d["note"].update(ms=[1]), "without times by rows"),
        (lambda d: d["note"].update(rows=["many"]), "without times by rows"),
        (lambda d: d["note"].update(spread=3), "without times by rows"),
        (lambda d: d["note"].update(rows=[6, 4, 2, 1]), r"rows \(6, 4, 2, 1\) must be positive"),
        (lambda d: d["note"].update(rows=[0, 1, 2, 4]), "must be positive and rise"),
        (lambda d: d["note"].update(rows=[]), "must be positive and rise"),
        (lambda d: d["note"].update(rows=[1, 2]), "segment0_0_0 needs 2 positive times"),
        (lambda d: d["note"]["ms"].pop("segment2_2_1"), "segment2_2_1 needs 4 positive times"),
        (lambda d: d["note"]["ms"].update(segment1_0_2=[1, 2, 0, 3]), "segment1_0_2 needs"),
        (lambda d: d.update(unit="madds"), "unit 'madds', not ms"),
        (lambda d: d.update(model="ds_mbnet"), "is for model 'ds_mbnet'"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, change, message):
    path = _edited(tmp_path, change)
    with pytest.raises(UsageError, match=message) as raised:
        LatencyTable.read(path, SPEC)
    assert str(raised.value).startswith(str(path))
    with pytest.raises(UsageError, match=message):
        Engine(lively_net("micro"), backend="eager", latency=path)


def test_other_refusals(tmp_path):
    path = write_cost_table(tmp_path / "c.json", measured().table, SPEC, 32)
    with pytest.raises(UsageError, match="a cost table, but without times by rows"):
        LatencyTable.read(path, SPEC)
    with pytest.raises(UsageError, match="cannot be read"):
        LatencyTable.read(tmp_path / "none.json", SPEC)
    other = lively(micro_spec().with_choices((0, 1), (0, 2)))
    with pytest.raises(UsageError, match="segment1_0_1 needs"):
        Engine(other, backend="eager", latency=measured())
    router = Engine(lively_net("micro"), backend="eager").router
    with pytest.raises(UsageError, match="batch size 0"):
        profile(router, 32, 0)
    with pytest.raises(UsageError, match="at least 4 px"):
        profile(router, 3, 1)


# -- merging buckets ------------------------------------------------------------------------------

_times = st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4).map(tuple)


@st.composite
def _merges(draw):
    table = made_up(lambda variant, rows: 1)
    ms = {variant.name: draw(_times) for variant in VARIANTS}
    gate = draw(st.integers(0, 1))
    before = draw(st.integers(0, 1)) if gate else 0
    options = draw(st.integers(1, len(SPEC.gates[gate].choices)))
    counts = draw(st.lists(st.integers(0, 100), min_size=options, max_size=options))
    return dataclasses.replace(table, ms=ms), gate, before, np.array(counts)


def _predicted(table, gate, before, counts):
    variants = TABLE[gate + 1][before]
    return sum(
        table.step_ms(variant, n) for variant, n in zip(variants, counts.tolist(), strict=False)
    )


@given(_merges())
def test_merging_goes_upward_and_saves_time(case):
    table, gate, before, counts = case
    goes = table.merge(TABLE, gate, before, counts)
    options = np.arange(len(counts))
    assert goes.shape == counts.shape
    assert (goes >= options).all()
    assert goes.max() < len(counts)
    assert (goes[goes] == goes).all(), "nobody joins a bucket that has gone"
    after = np.bincount(goes, weights=counts, minlength=len(counts)).astype(int)
    assert after.sum() == counts.sum()
    old, new = (_predicted(table, gate, before, n) for n in (counts, after))
    assert new <= old * (1 + 1e-12)
    if (goes != options).any():
        assert new < old


def test_merging_without_a_gain():
    """Times that only grow in proportion: what rounding makes of it is no gain."""
    table = dataclasses.replace(made_up(lambda variant, rows: 0.1), rows=(1,))
    table = dataclasses.replace(table, ms={variant.name: (0.1,) for variant in VARIANTS})
    for counts in itertools.product(range(1, 60, 7), repeat=3):
        assert table.merge(TABLE, 1, 0, np.array(counts)).tolist() == [0, 1, 2]


def test_merging_by_hand():
    table = made_up(lambda variant, rows: 10 + rows)  # a step more costs as much as ten rows
    assert table.merge(TABLE, 1, 0, np.array([3, 0, 5])).tolist() == [2, 1, 2]
    assert table.merge(TABLE, 1, 1, np.array([3, 2, 5])).tolist() == [2, 2, 2]
    assert table.merge(TABLE, 1, 0, np.array([3, 2])).tolist() == [1, 1]
    assert table.merge(TABLE, 1, 0, np.array([0, 0, 5])).tolist() == [0, 1, 2]
    dear = made_up(lambda variant, rows: 1 + rows * (1 + variant.choice))
    assert dear.merge(TABLE, 1, 0, np.array([1, 0, 5])).tolist() == [0, 1, 2]
    assert dear.merge(TABLE, 1, 0, np.array([1, 0, 0])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_merged_rows_are_those_of_the_route_they_took(workers):
    net = lively_net("micro")
    x = noise(SPEC, 33)
    own = Engine(net, backend="eager")(x)
    assert len({tuple(row) for row in own.routes.tolist()}) >= 3
    flat = made_up(lambda variant, rows: 1.0)
    engine = Engine(net, backend="eager", workers=workers, latency=flat, merge=True)
    for arguments in ({}, {"shift": 2.0}, {"escalate": 1.0}):
        out = engine(x, **arguments)
        # behind the first gate a merged row has other features, and so other choices
        assert (out.routes[:, 0] >= own.routes[:, 0]).all() or "shift" in arguments
        assert out.routes.tolist() != own.routes.tolist()
        routes = [engine.route_of(row) for row in out.routes]
        assert_rows_close(out.logits, row_by_row(net, x, routes))
    cost = CostTable.from_madds(SPEC, 32)
    merged = engine(x)
    costs = [cost.route_cost(SPEC.path_at(row)) for row in merged.routes.tolist()]
    assert merged.madds.tolist() == costs
    never = made_up(lambda variant, rows: rows * (1 + variant.choice))
    apart = Engine(net, backend="eager", workers=workers, latency=never, merge=True)
    assert apart(x).routes.tolist() == own.routes.tolist()


def test_merging_stays_below_the_cap():
    net = lively_net("micro")
    x = noise(SPEC, 33)
    engine = Engine(
        net, backend="eager", latency=made_up(lambda variant, rows: 1.0), merge=True, max_batch=16
    )
    for limits in ((2, 1), (0, 2), (0, 0), (2, 2)):
        out = engine(x, max_route=SPEC.route_at(limits))
        assert (out.routes <= torch.tensor(limits)).all()
        routes = [engine.route_of(row) for row in out.routes]
        assert_rows_close(out.logits, row_by_row(net, x, routes))
    assert out.routes.amax(0).tolist() == [2, 2]


@for_backends("onnxruntime")
def test_one_route_for_all_is_never_merged(backend, monkeypatch):
    from dynaslim.runtime.network_source import NetworkSource

    net = lively_net("micro")
    x = noise(SPEC, 9)
    # dear for few rows, cheap for many: whoever may would move
    table = made_up(lambda variant, rows: 100 if variant.choice == 0 else 1)
    for has_modules in (True, False):
        monkeypatch.setattr(NetworkSource, "has_modules", has_modules)
        engine = Engine(net, backend=backend, latency=table, merge=True)
        route = SPEC.cheapest_choice
        assert_rows_close(engine.static(route)(x), row_by_row(net, x, [route] * 9))
    moved = engine(x, shift=1e9)
    assert engine.route_of(moved.routes[0]) != route
