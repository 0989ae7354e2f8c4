"""The batcher without HTTP: who runs with whom, who is refused, who is dropped."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import output_of, until

from dynaslim.errors import DataError, UsageError
from dynaslim.predict import answers_of
from dynaslim.preprocessing import Preprocessing
from dynaslim.serve import Batcher, DeadlineError, QueueFullError, ServeOptions, StoppingError
from dynaslim.serve.batcher import MARGIN

PIXELS = np.zeros((3, 4, 4), np.uint8)
WAIT_S = 10


class Steps:
    """An engine that answers when it is released, a batch at a time; class: the first pixel."""

    preprocessing = Preprocessing(4, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    curve = None

    def __init__(self):
        self.batches, self.arguments = [], []
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.error = None

    def __call__(self, x, **arguments):
        self.batches.append(x[:, 0, 0, 0].astype(int).tolist())
        self.arguments.append(arguments)
        self.entered.release()
        assert self.go.acquire(timeout=WAIT_S)
        if self.error is not None:
            raise self.error
        return output_of(np.eye(8, dtype=np.float32)[self.batches[-1]])


@pytest.fixture
def steps():
    """The engine, its batcher maker; all are let go and closed at the end."""
    engine, made = Steps(), []

    def batcher(clock=time.monotonic, **options):
        made.append(Batcher(engine, ServeOptions(**{"max_images": 1, **options}), clock=clock))
        return made[-1]

    yield engine, batcher
    engine.error = None
    engine.go.release(1000)
    for one in made:
        one.close()


def pixels(value):
    return np.full((3, 4, 4), value, np.uint8)


def classes(future):
    return [answer.top[0][0] for answer in future.result(WAIT_S).answers]


def test_what_comes_while_the_engine_works_is_the_next_batch(steps):
    engine, make = steps
    batcher = make(max_batch=4)
    first = batcher.submit([pixels(1)])
    assert engine.entered.acquire(timeout=WAIT_S), "a lone image does not wait"
    rest = [batcher.submit([pixels(n), pixels(n + 1)]) for n in (2, 4, 6)]
    engine.go.release(3)
    assert [classes(f) for f in (first, *rest)] == [[1], [2, 3], [4, 5], [6, 7]]
    assert engine.batches == [[1], [2, 3, 4, 5], [6, 7]]
    assert first.result().batch_size == 1
    assert [f.result().batch_size for f in rest] == [4, 4, 2]


def test_a_request_larger_than_a_batch_is_put_together_again(steps):
    engine, make = steps
    engine.go.release(9)
    future = make(max_batch=3).submit([pixels(n) for n in range(8)])
    assert classes(future) == list(range(8))
    assert [n for batch in engine.batches for n in batch] == list(range(8))
    assert max(map(len, engine.batches)) == 3


def test_images_wait_for_others_that_are_being_decoded(steps):
    engine, make = steps
    batcher = make(max_wait_ms=60_000)
    setting = batcher.budgets.parse(None, "auto")
    jobs = [batcher.admit(1, setting, top_k=1, deadline=None) for _ in range(2)]
    batcher.put(jobs[0], 0, pixels(1))
    assert not engine.entered.acquire(timeout=0.05)
    batcher.put(jobs[1], 0, pixels(2))
    assert engine.entered.acquire(timeout=WAIT_S)
    assert engine.batches == [[1, 2]]
    engine.go.release()
    assert [job.future.result(WAIT_S) for job in jobs] == jobs


@pytest.mark.parametrize("how", ["time", "cancelled", "failed", "full"])
def test_they_wait_only_so_long(steps, how):
    engine, make = steps
    batcher = make(max_wait_ms=20 if how == "time" else 60_000, max_batch=2)
    setting = batcher.budgets.parse(None, "auto")
    slow = batcher.admit(1, setting, top_k=1, deadline=None)
    future = batcher.submit([pixels(3)])
    if how == "cancelled":
        batcher.cancel(slow)
    elif how == "failed":
        batcher.fail(slow, ValueError("no image"))
    elif how == "full":
        batcher.submit([pixels(4)])
    assert engine.entered.acquire(timeout=WAIT_S)
    engine.go.release(2)
    assert classes(future) == [3]
    assert slow.future.done() == (how == "failed")
    if how == "failed":
        assert str(slow.future.exception()) == "no image"
    batcher.cancel(slow)
    until(lambda: batcher.waiting == 0)


def busy(engine, batcher, clock, seconds):
    """Three images that took so long each; then one that runs."""
    for _ in range(3):
        future = batcher.submit([PIXELS])
        assert engine.entered.acquire(timeout=WAIT_S)
        clock.now += seconds
        engine.go.release()
        future.result(WAIT_S)
        until(lambda: batcher.expected_wait_s == 0)
    batcher.submit([PIXELS])
    assert engine.entered.acquire(timeout=WAIT_S)


def test_retry_after_follows_from_the_measured_rate(steps):
    engine, make = steps
    clock = Clock()
    batcher = make(queue=8, clock=clock)
    busy(engine, batcher, clock, 4)
    batcher.submit([PIXELS] * 8)
    assert batcher.expected_wait_s == pytest.approx(9 * 4)
    with pytest.raises(QueueFullError) as caught:
        batcher.submit([PIXELS] * 3)
    assert caught.value.retry_after_s == pytest.approx(3 * 4)


def test_who_would_be_late_is_refused_at_once(steps):
    engine, make = steps
    clock = Clock()
    batcher = make(clock=clock)
    busy(engine, batcher, clock, 2)
    batcher.submit([PIXELS] * 2)
    with pytest.raises(QueueFullError, match="3 images are before it") as caught:
        batcher.submit([PIXELS], deadline_s=8)  # a batch, four of them, takes eight
    assert caught.value.retry_after_s == pytest.approx(MARGIN * 8 - 8)
    batcher.submit([PIXELS], deadline_s=MARGIN * 8)


def test_slow_networks_get_small_batches(steps):
    engine, make = steps
    clock = Clock()
    batcher = make(clock=clock, max_batch_ms=100, max_batch=8)

    def batches(images, milliseconds):
        """Rows of the batches that images run in, each of which takes so long."""
        start = len(engine.batches)
        future = batcher.submit([PIXELS] * images)
        done = 0
        while done < images:
            assert engine.entered.acquire(timeout=WAIT_S)
            rows = len(engine.batches[-1])
            done += rows
            clock.now += rows * milliseconds / 1000
            engine.go.release()
        future.result(WAIT_S)
        until(lambda: batcher.expected_wait_s == 0)
        return [len(rows) for rows in engine.batches[start:]]

    assert batches(8, 1) == [8]
    for _ in range(9):
        batches(8, 17)
    assert batches(13, 17) == [5, 5, 3]
    for _ in range(9):
        batches(1, 4000)
    assert batches(6, 4000) == [4, 2], "but never fewer than four"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_what_is_late_is_not_run(steps):
    engine, make = steps
    clock = Clock()
    batcher = make(clock=clock)
    first = batcher.submit([pixels(1)])
    assert engine.entered.acquire(timeout=WAIT_S)
    late = batcher.submit([pixels(2), pixels(3)], deadline_s=1)
    fine = batcher.submit([pixels(4)], deadline_s=3)
    clock.now += 2
    engine.go.release(2)
    with pytest.raises(DeadlineError):
        late.result(WAIT_S)
    assert classes(first) + classes(fine) == [1, 4]
    assert engine.batches == [[1], [4]]


def test_what_is_cancelled_is_not_run_and_frees_its_room(steps):
    engine, make = steps
    batcher = make(queue=3)
    batcher.submit([pixels(1)])
    assert engine.entered.acquire(timeout=WAIT_S)
    setting = batcher.budgets.parse(None, "auto")
    job = batcher.admit(2, setting, top_k=1, deadline=None)
    batcher.put(job, 0, pixels(2))
    batcher.cancel(job)
    batcher.put(job, 1, pixels(3))  # its decoder could not know
    assert batcher.waiting == 0
    rest = batcher.submit([pixels(4), pixels(5), pixels(6)])
    engine.go.release(2)
    assert classes(rest) == [4, 5, 6]
    assert engine.batches == [[1], [4, 5, 6]]
    assert not job.future.done()


def test_a_future_that_its_holder_cancels_stops_no_other(steps):
    engine, make = steps
    batcher = make()
    first, other = batcher.submit([pixels(1)]), batcher.submit([pixels(2)])
    assert not first.cancel()
    engine.go.release(2)
    assert classes(first) + classes(other) == [1, 2]


def test_an_error_of_the_engine_is_its_batch_s_alone(steps):
    engine, make = steps
    batcher = make()
    engine.error = DataError("broken")
    failing = batcher.submit([pixels(1)])
    engine.go.release()
    with pytest.raises(DataError, match="broken"):
        failing.result(WAIT_S)
    engine.error = None
    engine.go.release()
    assert classes(batcher.submit([pixels(2)])) == [2]
    assert batcher.waiting == 0


def test_stopping_answers_what_was_taken(steps):
    engine, make = steps
    batcher = make(max_batch=1)
    futures = [batcher.submit([pixels(n)]) for n in range(3)]
    batcher.stop()
    with pytest.raises(StoppingError):
        batcher.submit([PIXELS])
    engine.go.release(3)
    batcher.close()
    assert [classes(future) for future in futures] == [[0], [1], [2]]


def test_requests_of_one_setting_run_together(steps):
    engine, make = steps
    batcher = make()
    first = batcher.submit([pixels(0)])
    assert engine.entered.acquire(timeout=WAIT_S)
    futures = [
        batcher.submit([pixels(n)], escalate=escalate)
        for n, escalate in enumerate(["auto", None, "auto", 0.5, None], start=1)
    ]
    engine.go.release(4)
    assert [classes(f) for f in (first, *futures)] == [[0], [1], [2], [3], [4], [5]]
    assert engine.batches == [[0], [1, 3], [2, 5], [4]]
    assert [a["escalate"] for a in engine.arguments] == ["auto", "auto", None, 0.5]


def test_requests_that_are_refused(steps, engine):
    _, make = steps
    batcher = make()
    for bad in (np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4, 4), np.float64)):
        with pytest.raises(UsageError, match=r"give uint8 \(3, 4, 4\)"):
            batcher.submit([bad])
    with pytest.raises(UsageError, match="must be finite"):
        batcher.submit([np.full((3, 4, 4), np.nan, np.float32)])
    with pytest.raises(UsageError, match="no images"):
        batcher.submit([])
    with pytest.raises(UsageError, match="no budget curve"):
        batcher.submit([PIXELS], budget="0.5")
    with pytest.raises(UsageError, match="escalate 2"):
        batcher.submit([PIXELS], escalate=2)
    with pytest.raises(UsageError, match="preprocessing"):
        Batcher(SimpleNamespace(preprocessing=None, curve=None))


def test_likeliest_classes():
    logits = np.array([[0, 3, 1, 3], [5, 0, 0, 0], [-800, 0, 800, 0]], np.float32)
    output = output_of(logits, mirrored=np.arange(3) == 1)
    for top_k in (1, 2, 4):
        answers = answers_of(output, top_k)
        assert [a.top[0][0] for a in answers] == [1, 0, 2], "of equals the first"
        assert {len(a.top) for a in answers} == {top_k}
        assert [a.mirrored for a in answers] == [False, True, False]
    softmax = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert [c for c, _ in answers[0].top] == [1, 3, 2, 0]
    np.testing.assert_allclose([p for _, p in answers[0].top], softmax[[1, 3, 2, 0]], rtol=1e-6)
    output.logits = np.array([[0, np.nan, 0, 0]] * 3)
    with pytest.raises(DataError, match="not finite"):
        answers_of(output, 1)


def test_no_request_waits_for_what_takes_long_to_decode(steps):
    engine, make = steps
    engine.go.release(100)
    now = [0.0]
    batcher = make(lambda: now[0], queue=4, max_wait_ms=60_000)
    setting = batcher.budgets.parse(None, "auto")
    large = batcher.admit(1, setting, top_k=1, deadline=None)
    batcher.postpone(large)
    assert batcher.waiting == 1, "it has its place in the queue"
    assert batcher.submit([PIXELS]).result(WAIT_S).batch_size == 1
    now[0] = 100.0
    batcher.put(large, 0, PIXELS, postponed=True)
    assert large.future.result(WAIT_S) is large
    assert batcher.waiting == 0
    for _ in range(2):
        batcher.submit([PIXELS]).result(WAIT_S)
    assert batcher.expected_wait_s == batcher.throughput.seconds_for(0)
    assert batcher.throughput.seconds_for(1) < 1, "the time of decoding is not the network's"


def test_what_takes_long_to_decode_has_half_of_the_queue(steps):
    engine, make = steps
    batcher = make(queue=4)
    setting, jobs = batcher.budgets.parse(None, "auto"), []
    for _ in range(3):
        jobs.append(batcher.admit(1, setting, top_k=1, deadline=None))
        if len(jobs) < 3:
            batcher.postpone(jobs[-1])
    with pytest.raises(QueueFullError, match="too many large images"):
        batcher.postpone(jobs[-1])
    batcher.cancel(jobs[0])
    batcher.postpone(jobs[-1])
    for job in jobs:
        batcher.cancel(job)
    assert batcher.waiting == 0
    engine.go.release(100)
    assert batcher.submit([PIXELS]).result(WAIT_S).batch_size == 1
