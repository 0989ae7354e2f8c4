"""How the rows of a step are divided among cores."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaslim.runtime.schedule import (
    CACHE_VALUES,
    LEAST_ROWS,
    MOST_ROWS,
    START_RATE,
    TOGETHER,
    RowTime,
    plan_step,
    rows_in_cache,
)

_steps = st.lists(
    st.tuples(st.integers(0, 90), st.floats(1e-5, 1e-1), st.integers(1, 64)), max_size=8
)
_workers = st.integers(1, 6)


def _cost(piece, seconds):
    return (piece.stop - piece.start) * seconds[piece.bucket]


def _makespan(plan, seconds, workers):
    """When the last is done, if whoever is idle takes the next piece."""
    free = [0.0] * workers
    for piece in plan.pieces:
        heapq.heappush(free, heapq.heappop(free) + _cost(piece, seconds))
    return max(free)


@given(_steps, _workers)
def test_every_row_is_in_one_piece(step, workers):
    rows, seconds, caps = ([part[n] for part in step] for n in range(3))
    plan = plan_step(rows, seconds, caps, workers)
    covered = []
    for piece in plan.pieces:
        assert 1 <= piece.stop - piece.start <= caps[piece.bucket]
        covered += [(piece.bucket, row) for row in range(piece.start, piece.stop)]
    assert len(covered) == len(set(covered))
    assert set(covered) == {(b, row) for b, count in enumerate(rows) for row in range(count)}


@given(_steps, st.integers(2, 6))
def test_side_by_side_nobody_waits_long(step, workers):
    rows, seconds, caps = ([part[n] for part in step] for n in range(3))
    plan = plan_step(rows, seconds, caps, workers)
    total = sum(n * s for n, s in zip(rows, seconds, strict=True))
    if plan.wide:
        # whole pieces, of which there are no more than the caps require
        for bucket, (count, cap) in enumerate(zip(rows, caps, strict=True)):
            assert sum(piece.bucket == bucket for piece in plan.pieces) == -(-count // cap)
        return
    costs = [_cost(piece, seconds) for piece in plan.pieces]
    assert costs == sorted(costs, reverse=True), "the longest go first"
    longest = _makespan(plan, seconds, workers)
    assert longest <= total / workers * TOGETHER + 1e-12
    if costs:  # what greedy sharing guarantees
        assert longest <= total / workers + max(costs) * (1 - 1 / workers) + 1e-12


@given(_steps)
def test_one_worker_takes_all_together(step):
    rows, seconds, caps = ([part[n] for part in step] for n in range(3))
    assert plan_step(rows, seconds, caps, 1).wide


@given(st.integers(2, 6), st.integers(0, 4), st.floats(1e-5, 1e-1), st.integers(1, 64))
def test_one_row_is_run_by_all(workers, at, seconds, cap):
    rows = [0] * 5
    rows[at] = 1
    assert plan_step(rows, [seconds] * 5, [cap] * 5, workers).wide


@given(st.integers(2, 4), st.integers(8, 60), st.floats(1e-5, 1e-1), st.integers(1, 64))
def test_many_rows_are_shared_out(workers, each, seconds, cap):
    plan = plan_step([each * workers], [seconds], [cap], workers)
    assert not plan.wide
    assert len(plan.pieces) >= workers


def test_by_hand():
    # two equal buckets for two: nothing to divide
    plan = plan_step([8, 8], [1.0, 1.0], [8, 8], 2)
    assert sorted(plan.pieces) == [(0, 0, 8), (1, 0, 8)]
    # one bucket for two: halves, though all would fit into one piece
    assert sorted(plan_step([8], [1.0], [8], 2).pieces) == [(0, 0, 4), (0, 4, 8)]
    # caps make even pieces rather than full ones and a rest
    assert sorted(plan_step([9], [1.0], [4], 1).pieces) == [(0, 0, 3), (0, 3, 6), (0, 6, 9)]
    # three rows cannot be shared by two without one waiting for half the time
    assert plan_step([3], [1.0], [8], 2).wide
    # a dear bucket is divided, the cheap one is not
    plan = plan_step([4, 4], [1.0, 0.01], [8, 8], 2)
    assert not plan.wide
    assert (1, 0, 4) in plan.pieces
    assert plan_step([], [], [], 2).pieces == ()


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_rows_that_stay_in_the_cache(one, other):
    fewer, more = rows_in_cache(max(one, other)), rows_in_cache(min(one, other))
    assert LEAST_ROWS <= fewer <= more <= MOST_ROWS
    assert more & (more - 1) == 0
    if more > LEAST_ROWS:
        assert more * min(one, other) <= 1.2 * CACHE_VALUES
    if more < MOST_ROWS:
        assert 2 * more * min(one, other) > 1.2 * CACHE_VALUES


def test_row_times_follow_what_is_measured():
    time = RowTime(5e10)
    assert time.seconds == pytest.approx(5e10 / START_RATE)
    time.add(4, 8.0)
    assert time.seconds == 2.0
    time.add(1, 1.0)
    down = 2.0 - time.seconds
    assert 0 < down < 1
    before = time.seconds
    time.add(1, before + 1)
    up = time.seconds - before
    assert 0 < up < down, "a piece that was held up counts little"
    for _ in range(100):
        time.add(2, 6.0)
    assert time.seconds == pytest.approx(3.0, rel=1e-3)
