"""Threads: of callers, of the engine, and what they leave alone."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    assert_rows_close,
    at_once,
    for_backends,
    lively,
    lively_net,
    micro_spec,
    noise,
    row_by_row,
)

from dynaslim import Engine
from dynaslim.runtime import auto
from dynaslim.runtime.arrays import NumpyArrays, TorchArrays
from dynaslim.runtime.backends.eager import EagerBackend
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.variants import SegmentVariant, segment_variants
from dynaslim.runtime.workers import Workers, Workspace, Workspaces

SPEC = micro_spec()
SIZES = (1, 2, 3, 7, 16, 33)


# -- callers side by side -------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [1, 2])
@for_backends("eager", "onnxruntime", "openvino")
def test_many_callers_get_their_own_answers(backend, workers):
    engine = Engine(lively_net("micro"), backend=backend, workers=workers)
    batches = [
        noise(SPEC, rows, seed=rows + n)[:, :, :, : 32 - 4 * n] for n in range(4) for rows in SIZES
    ]
    alone = [engine(x) for x in batches]
    for x, out in zip(batches[:6], alone, strict=False):
        routes = [engine.route_of(row) for row in out.routes]
        assert_rows_close(out.logits, row_by_row(lively_net("micro"), x, routes))

    def call(n):
        order = np.random.default_rng(n).permutation(len(batches))
        return [(at, engine(batches[at]), engine.static(SPEC.largest)(batches[at])) for at in order]

    static = [engine.static(SPEC.largest)(x) for x in batches]
    for answers in at_once(8, call):
        for at, out, whole in answers:
            assert out.routes.tolist() == alone[at].routes.tolist()
            assert out.madds.tolist() == alone[at].madds.tolist()
            assert_rows_close(out.logits, alone[at].logits)
            assert_rows_close(whole, static[at])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [1, 2])
@for_backends("eager", "onnxruntime", "openvino")
def test_first_use_by_many_compiles_once(backend, workers, monkeypatch):
    made = Counter()
    plain = NetworkSource.module

    def module(self, variant, *args):
        made[variant] += 1
        time.sleep(0.005)  # long enough for all to request it
        return plain(self, variant, *args)

    monkeypatch.setattr(NetworkSource, "module", module)
    net = lively_net("micro")
    engine = Engine(net, backend=backend, workers=workers, cache_dir=None)
    x = noise(SPEC, 33)
    outs = at_once(8, lambda n: engine(x[: 33 - n]))
    for n, out in enumerate(outs):
        routes = [engine.route_of(row) for row in out.routes]
        assert_rows_close(out.logits, row_by_row(net, x[: 33 - n], routes))
    compiled = engine.counts.compiled
    assert len(compiled) == len(set(compiled))
    assert max(made.values()) <= (1 if backend == "eager" else 2)  # for wide calls and for others
    assert set(made) <= set(segment_variants(SPEC))
    assert len(made) >= 6


def test_auto_chooses_once_for_many(monkeypatch):
    counts = Counter()

    def measure(backends, *_):
        counts["measured"] += 1
        time.sleep(0.05)
        return {backend.name: 1.0 for backend in backends}

    monkeypatch.setattr(auto, "measure", measure)
    engine = Engine(lively_net("micro"), cache_dir=None, workers=2)
    x = noise(SPEC, 3)
    first, *others = at_once(8, lambda _: engine(x).routes.tolist())
    assert all(routes == first for routes in others)
    assert counts["measured"] <= 1


@for_backends("eager", "onnxruntime", "openvino")
def test_a_bad_batch_is_its_callers_alone(backend):
    net = lively_net("micro")
    engine = Engine(net, backend=backend, workers=2)
    good, bad = noise(SPEC, 16), noise(SPEC, 16)
    bad[11, 0, 0, 0] = torch.nan
    expected = engine(good)

    def call(n):
        seen = []
        for turn in range(6):
            try:
                seen.append(engine(bad if (n + turn) % 2 else good))
            except ValueError as error:
                seen.append(str(error))
        return seen

    for n, seen in enumerate(at_once(8, call)):
        for turn, result in enumerate(seen):
            if (n + turn) % 2:
                assert "row 11 has values that are not finite" in result
            else:
                assert result.routes.tolist() == expected.routes.tolist()
                assert_rows_close(result.logits, expected.logits)


@pytest.mark.parametrize("own_threads", [True, False])
def test_a_program_that_fails(own_threads, monkeypatch):
    plain, failing = EagerBackend.program, threading.Event()

    def program(self, variant, shape, *, wide):
        run = plain(self, variant, shape, wide=wide)

        def checked(x, outs):
            if failing.is_set() and variant.segment == 1:
                raise MemoryError("no room")
            run(x, outs)

        return checked

    monkeypatch.setattr(EagerBackend, "program", program)
    monkeypatch.setattr(EagerBackend, "own_threads", own_threads)
    net = lively_net("micro")
    engine = Engine(net, backend="eager", workers=2)
    x = noise(SPEC, 33)
    before = engine(x)
    failing.set()
    for _ in range(3):
        with pytest.raises(MemoryError, match="no room"):
            engine(x)
    failing.clear()
    after = engine(x)
    assert after.routes.tolist() == before.routes.tolist()
    assert_rows_close(after.logits, before.logits)


# -- the engine's own threads ---------------------------------------------------------------------


def _threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_callers_keep_their_number_of_threads(count):
    before = torch.get_num_threads()
    try:
        engine = Engine(lively(micro_spec()), backend="eager", workers=2)
        torch.set_num_threads(count)  # after the engine was made, before its threads start
        engine(noise(SPEC, 33))
        inside = []
        engine.router.workers.run([lambda: inside.append(torch.get_num_threads())] * 4)
        assert inside == [1] * 4
        assert torch.get_num_threads() == count
        assert _threads_of_a_new_thread() == count
        engine.close()
        engine(noise(SPEC, 33))
        assert torch.get_num_threads() == count
        assert _threads_of_a_new_thread() == count
    finally:
        torch.set_num_threads(before)


def test_engines_that_start_together_keep_the_number_of_threads():
    before = torch.get_num_threads()
    engines = [Engine(lively_net("micro"), backend="eager", workers=3) for _ in range(8)]
    x = noise(SPEC, 33)
    at_once(8, lambda n: engines[n](x))
    assert torch.get_num_threads() == before
    assert _threads_of_a_new_thread() == before
    for engine in engines:
        engine.close()


def test_an_engine_that_was_closed_starts_again():
    engine = Engine(lively_net("micro"), backend="eager", workers=2)
    engine.close()
    x = noise(SPEC, 33)
    before = {thread.ident for thread in threading.enumerate()}
    expected = engine(x).logits
    mine = [t for t in threading.enumerate() if t.ident not in before]
    assert len(mine) == 2
    engine.close()
    assert not any(thread.is_alive() for thread in mine)
    assert_rows_close(engine(x).logits, expected)
    engine.close()


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals go to no single thread")
def test_an_interrupted_call_does_not_write_into_the_next(interruptible):
    """Pieces that run on when a call is left early keep their buffers to themselves."""
    engine = Engine(lively_net("micro"), backend="eager", workers=2)
    x = noise(SPEC, 9)
    images = engine.router.backend.arrays.images(x)
    plain = engine.router.backend.program
    go_on, finished = threading.Event(), threading.Semaphore(0)
    held = []

    def program(variant, shape, *, wide):
        run = plain(variant, shape, wide=wide)

        def slow(x, outs):
            if variant != SegmentVariant(0) or len(held) == 2:
                return run(x, outs)
            held.append(threading.get_ident())
            if len(held) == 2:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            go_on.wait(timeout=60)
            run(x, outs)
            finished.release()

        return slow

    engine.router.backend.program = program
    cheap = np.zeros(9, np.int64)
    with pytest.raises(KeyboardInterrupt):
        engine.router.routed(images, lambda gate, _, rows: cheap[rows], None)
    assert len(held) == 2
    assert not finished.acquire(blocking=False), "left while its pieces run"

    def decide(gate, _, rows):
        if gate == 0:  # the trunk is done: now the pieces of the first call end
            go_on.set()
            assert all(finished.acquire(timeout=60) for _ in held)
        return cheap[rows]

    # one row, which this thread runs by itself, other than those of the first call
    one = images[8:]
    logits, _, _ = engine.router.routed(one, decide, None)
    assert_rows_close(logits, row_by_row(lively_net("micro"), x[8:], [SPEC.cheapest_choice]))
    engine.close()


# -- the parts ------------------------------------------------------------------------------------


def _workers(count, own_threads, on_start=lambda: None):
    return Workers(SimpleNamespace(workers=count, own_threads=own_threads, start_worker=on_start))


@pytest.mark.parametrize("own_threads", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("tasks", [0, 1, 3, 40])
def test_every_task_is_run_once(tasks, count, own_threads):
    started, done = [], Counter()
    workers = _workers(count, own_threads, lambda: started.append(threading.get_ident()))

    def task(n):
        done[n] += 1
        who.add(threading.get_ident())
        time.sleep(0.001)

    who = set()
    workers.run([lambda n=n: task(n) for n in range(tasks)])
    assert done == Counter(range(tasks))
    if count == 1:
        assert list(done) == list(range(tasks)), "in order"
    if own_threads:
        assert threading.get_ident() not in who
    helpers = who - {threading.get_ident()}
    assert helpers <= set(started)
    if helpers:  # all are there before the first task: what starting them changes is over
        assert len(started) == (count if own_threads else count - 1)
    if tasks == 40:
        assert len(who) == count
        assert (threading.get_ident() in who) == (not own_threads)
    workers.close()


@pytest.mark.parametrize("own_threads", [True, False])
def test_the_error_of_a_task_reaches_the_caller(own_threads):
    workers, done = _workers(2, own_threads), []

    def fail():
        raise KeyError("this one")

    def ok():
        time.sleep(0.002)
        done.append(1)

    with pytest.raises(KeyError, match="this one"):
        workers.run([ok, fail, *[ok] * 200])
    assert len(done) < 100, "the others need not go on"
    for _ in range(3):
        done.clear()
        workers.run([ok] * 5)
        assert len(done) == 5
    workers.close()


def _ends(function, seconds=20):
    """Whether it comes to an end, in a thread that does not keep the tests from ending."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_closing_beside_calls():
    """Work is never left with helpers that are to stop."""
    workers, over = _workers(2, own_threads=True), threading.Event()

    def close():
        while not over.is_set():
            workers.close()
            time.sleep(0.0005)

    def call():
        for _ in range(3000):
            workers.run([lambda: None] * 4)

    closer, before = threading.Thread(target=close, daemon=True), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        closer.start()
        assert _ends(call)
    finally:
        over.set()
        sys.setswitchinterval(before)
    closer.join()
    workers.close()


def test_an_interrupt_between_taking_a_task_and_counting_it(monkeypatch):
    """Nobody would report it: the call ends by the interrupt instead of waiting."""
    workers, me, done = _workers(2, own_threads=False), [], []

    class Interrupted(deque):
        def popleft(self):
            taken = super().popleft()
            if me == [threading.get_ident()]:
                me.clear()
                raise KeyboardInterrupt
            return taken

    monkeypatch.setattr("dynaslim.runtime.workers.deque", Interrupted)

    def call():
        me.append(threading.get_ident())
        with pytest.raises(KeyboardInterrupt):
            workers.run([lambda: time.sleep(0.01)] * 6)
        workers.run([lambda: done.append(1)] * 3)

    assert _ends(call)
    assert len(done) == 3
    workers.close()


def test_closing_may_be_interrupted(interruptible):
    workers, done = _workers(2, own_threads=True), []
    slow = threading.Thread(target=workers.run, args=([lambda: time.sleep(0.6)] * 2,))
    slow.start()
    time.sleep(0.1)
    main = threading.main_thread().ident
    threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        workers.close()
    slow.join()
    assert _ends(lambda: workers.run([lambda: done.append(1)] * 3))
    assert len(done) == 3
    workers.close()


_FORK = """
import os, sys, threading
from types import SimpleNamespace
from dynaslim.runtime.workers import Workers

workers = Workers(SimpleNamespace(workers=2, own_threads=True, start_worker=lambda: None))
done = []
workers.run([lambda: done.append(1)] * 3)
child = os.fork()
if child == 0:
    threading.Timer(20, os._exit, (3,)).start()
    workers.run([lambda: done.append(1)] * 4)
    os._exit(0 if len(done) == 7 else 4)
_, status = os.waitpid(child, 0)
workers.run([lambda: done.append(1)] * 2)
sys.exit(os.waitstatus_to_exitcode(status) or (0 if len(done) == 5 else 5))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_helpers_of_its_own():
    assert subprocess.run([sys.executable, "-c", _FORK], timeout=60).returncode == 0


def test_nobody_waits_for_a_helper_that_is_held_up_elsewhere():
    workers, go_on, held = _workers(2, False), threading.Event(), threading.Barrier(3)

    def hold():
        held.wait(timeout=60)
        go_on.wait(timeout=60)

    other = threading.Thread(target=workers.run, args=([hold, hold],))
    other.start()
    held.wait(timeout=60)  # its caller and the only helper are at it
    done = []
    workers.run([partial(done.append, 1)] * 5)
    assert len(done) == 5
    assert other.is_alive()
    go_on.set()
    other.join(timeout=60)
    workers.close()


def test_helpers_end_with_their_workers():
    workers = _workers(3, True)
    before = set(threading.enumerate())
    workers.run([lambda: None] * 9)
    mine = set(threading.enumerate()) - before
    assert len(mine) == 3
    del workers
    gc.collect()
    for thread in mine:
        thread.join(timeout=60)
        assert not thread.is_alive()


EXIT = """
import atexit, threading, time
from functools import partial
from types import SimpleNamespace

def look():
    print([t.name for t in threading.enumerate() if t.name.startswith("dynaslim")])

atexit.register(look)  # before the workers' own: runs after it
from dynaslim.runtime.workers import Workers

backend = SimpleNamespace(workers=2, own_threads=True, start_worker=lambda: None)
kept, dropped = Workers(backend), Workers(backend)
for workers in (kept, dropped):
    workers._hand_over(partial(time.sleep, 0.3), 1)
del dropped, workers
"""


def test_no_helper_is_about_when_the_process_ends():
    """A thread on its way out of a C++ library would bring the process down."""
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("own_threads", [True, False])
def test_a_helper_that_does_not_start(own_threads):
    """As where a process may have no more threads."""
    calls = []

    def start():
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no room")

    workers, done = _workers(3, own_threads, start), []
    with pytest.raises(OSError, match="no room"):
        workers.run([lambda: None] * 3)
    workers.run([partial(done.append, 1)] * 9)
    assert len(done) == 9
    workers.close()


def test_errors_do_not_cross_between_callers():
    workers = _workers(2, True)

    def fail():
        raise KeyError("mine")

    def call(n):
        for _ in range(20):
            done = []
            if n % 2:
                workers.run([partial(done.append, 1)] * 5)
                assert len(done) == 5
            else:
                with pytest.raises(KeyError, match="mine"):
                    workers.run([fail])

    at_once(6, call)
    workers.close()


def test_buffers_are_kept_and_grow():
    for arrays in (NumpyArrays(), TorchArrays(torch.device("cpu"), torch.bfloat16)):
        workspace = Workspace(arrays)
        first = workspace.rows("key", 4, (3, 2))
        first[:] = 7
        assert tuple(first.shape) == (4, 3, 2)
        assert (workspace.rows("key", 2, (3, 2)) == 7).all()
        larger = workspace.rows("key", 6, (3, 2))
        assert tuple(larger.shape) == (6, 3, 2)
        larger[:] = 5
        assert (first == 7).all()
        assert (workspace.rows("key", 4, (3, 2)) == 5).all()
        other, another = workspace.rows("other", 4, (3, 2)), workspace.rows("key", 4, (2, 3))
        other[:], another[:] = 1, 2
        assert (workspace.rows("key", 6, (3, 2)) == 5).all()
    assert workspace.rows("key", 1, (1,)).dtype == torch.bfloat16
    assert workspace.rows("floats", 1, (1,), floats=True).dtype == torch.float32


def test_workspaces_are_lent_to_one_at_a_time():
    workspaces = Workspaces(NumpyArrays())
    one, other = workspaces.borrow(), workspaces.borrow()
    assert one is not other
    workspaces.give_back(one)
    assert workspaces.borrow() is one
    mine = workspaces.of_thread()
    assert workspaces.of_thread() is mine
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(workspaces.of_thread).result() is not mine
