"""What runs the variants: fixed sizes, precisions, programs on disk, and which backend is taken."""

import json
import os
import shutil
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import (
    assert_rows_close,
    at_once,
    for_backends,
    forced,
    lively,
    lively_net,
    micro_spec,
    noise,
    row_by_row,
    run_python,
)
from torch import nn

import dynaslim
from dynaslim import Engine
from dynaslim.checkpoint import Checkpoint
from dynaslim.errors import DynaslimError, UsageError
from dynaslim.runtime import auto
from dynaslim.runtime.backends import BACKENDS, SUPPORTED, Resources, available, make_backend
from dynaslim.runtime.backends.eager import EagerBackend
from dynaslim.runtime.cache import Cache, cache_folder
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.variants import SegmentVariant, segment_variants
from dynaslim.spec import GateSpec, NetSpec, StageSpec
from dynaslim.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_thread")


def _expected(net, x, out):
    routes = [net.spec.route_at(row) for row in np.asarray(out.routes).tolist()]
    return row_by_row(net, x, routes)


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# -- programs of fixed sizes ----------------------------------------------------------------------


class FixedBackend(EagerBackend):
    """Eager programs for 1, 4 or 8 rows; what they answer for padding would show anywhere."""

    name = "fixed"
    own_threads = False
    sizes = (1, 4, 8)
    seen: ClassVar[list[int]] = []

    def program(self, variant, shape, *, wide):
        run = super().program(variant, shape, wide=wide)

        def checked(x, outs):
            rows = len(x)
            assert rows in self.sizes
            assert all(len(out) == rows for out in outs)
            self.seen.append(rows)
            run(x, outs)
            padding = (x == 0).flatten(1).all(1)
            for out in outs:
                out[padding] = torch.nan

        return checked


@pytest.fixture
def fixed(monkeypatch):
    monkeypatch.setitem(BACKENDS, "fixed", (__name__, "FixedBackend", ()))
    monkeypatch.setitem(SUPPORTED, "fixed", ("fp32", "bf16"))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[FixedBackend.__module__])
    monkeypatch.setattr(FixedBackend, "seen", [])
    return FixedBackend.seen


@pytest.mark.parametrize("piece", [None, 3, 100])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_padded_to_the_sizes_there_are(fixed, workers, piece):
    net = lively_net("micro")
    engine = Engine(net, backend="fixed", workers=workers, rows_per_piece=piece)
    x = noise(net.spec, 33)
    with torch.inference_mode():
        engine(x[:11])  # buffers for padding that are made there serve outside of it
    for rows in (1, 2, 3, 4, 5, 8, 9, 12, 13, 33):
        out = engine(x[:rows])
        assert_rows_close(out.logits, _expected(net, x[:rows], out))
        route = net.spec.routes[1]
        static = engine.static(route)(x[:rows])
        assert_rows_close(static, row_by_row(net, x[:rows], [route] * rows))
    assert set(FixedBackend.seen) == ({1, 4} if piece == 3 else {1, 4, 8})


def test_padding_in_half_precision(fixed):
    net = lively_net("micro")
    x = noise(net.spec, 11)
    padded = Engine(net, backend="fixed", precision="bf16", workers=1)(x, shift=1e9)
    plain = Engine(net, backend="eager", precision="bf16", workers=1)(x, shift=1e9)
    assert_rows_close(padded.logits, plain.logits, 0.02)


# -- precisions -----------------------------------------------------------------------------------


@for_backends("eager", "openvino")
@pytest.mark.parametrize("workers", [1, 2])
def test_half_precision(backend, workers):
    """Near the answers in full precision, by how far apart those of different routes are."""
    net = lively_net("ds_mbnet_tiny")
    x = noise(net.spec, 9)
    engine = Engine(net, backend=backend, precision="bf16", workers=workers)
    for shift, route in ((1e9, net.spec.cheapest_choice), (-1e9, net.spec.widest_choice)):
        out = engine(x, shift=shift)
        exact = row_by_row(net, x, [route] * 9)
        other = row_by_row(net, x, [net.spec.routes[1]] * 9)
        assert out.logits.dtype == torch.float32
        off = (out.logits - exact).abs().mean()
        assert off < 0.1 * (exact - other).abs().mean()
        if backend == "eager":  # a runtime may compute in full where the processor has no other
            assert off > 1e-4 * exact.abs().mean()
        assert_rows_close(engine.static(route)(x), exact, 0.05)


def test_precisions_that_a_backend_has_not():
    net = lively_net("micro")
    with pytest.raises(
        UsageError, match="onnxruntime has no bf16, only fp32, int8; bf16 runs on eager"
    ):
        Engine(net, backend="onnxruntime", precision="bf16")
    with pytest.raises(UsageError, match="precision 'fp16': choose from fp32, bf16, int8"):
        Engine(net, backend="eager", precision="fp16")
    assert set(available("bf16")) <= {name for name in SUPPORTED if "bf16" in SUPPORTED[name]}


# -- libraries that are not there -----------------------------------------------------------------


@pytest.mark.parametrize("library", ["openvino", "onnxruntime"])
def test_backend_that_is_not_installed(monkeypatch, library):
    net = lively_net("micro")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=f"pip install .*{library}"):
        Engine(net, backend=library)
    source = NetworkSource(net)
    assert library not in available("fp32")
    assert library not in auto.candidates(source, Resources(2, None))
    assert "eager" in auto.candidates(source, Resources(2, None))


@for_backends("onnxruntime")
def test_graphs_need_a_library_too(monkeypatch, backend):
    engine = Engine(lively_net("micro"), backend=backend, cache_dir=None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"onnx is not installed.*pip install .*onnx"):
        engine(noise(engine.spec, 2))
    monkeypatch.delitem(sys.modules, "onnx")
    assert engine(noise(engine.spec, 2)).logits.shape == (2, 5)


# -- programs on disk -----------------------------------------------------------------------------


@for_backends("onnxruntime", "openvino")
def test_programs_of_other_weights_lie_elsewhere(backend, tmp_path):
    net, other = lively_net("micro"), lively(micro_spec())
    x = noise(net.spec, 7)
    with torch.no_grad():
        other.stages[0][0].body.bn.running_mean[0, 0] += 1  # a buffer, and only one number of it
    Engine(net, backend=backend, cache_dir=tmp_path)(x)
    engine = Engine(other, backend=backend, cache_dir=tmp_path)
    out = engine(x)
    assert engine.counts.cached == []
    assert len(list(tmp_path.iterdir())) == 2
    assert_rows_close(out.logits, _expected(other, x, out))


def test_what_the_folder_depends_on(tmp_path):
    net, same = lively_net("micro"), lively(micro_spec())
    key = NetworkSource(net).key
    assert NetworkSource(same).key == key
    assert NetworkSource(same, "bf16").key != key
    renamed = lively(micro_spec(name="other"))
    assert NetworkSource(renamed).key != key
    assert cache_folder(key, tmp_path).parent == tmp_path
    assert cache_folder(key).parent.samefile(os.environ["DYNASLIM_CACHE"])
    assert cache_folder(key) != cache_folder(NetworkSource(renamed).key)


@for_backends("eager", "onnxruntime", "openvino")
def test_without_a_folder_nothing_is_written(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNASLIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    net = lively_net("micro")
    engine = Engine(net, backend=backend, cache_dir=None, workers=2)
    out = engine(noise(net.spec, 33))
    assert_rows_close(out.logits, _expected(net, noise(net.spec, 33), out))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "cut off", "something else"])
@for_backends("onnxruntime", "openvino")
def test_damaged_programs_are_made_again(backend, damage, tmp_path):
    net, x = lively_net("micro"), noise(micro_spec(), 7)
    before = Engine(net, backend=backend, cache_dir=tmp_path)(x)
    for path in _files(tmp_path):
        content = path.read_bytes()
        content = {"empty": b"", "cut off": content[: len(content) // 2]}.get(damage, b"else" * 99)
        path.write_bytes(content)
    engine = Engine(net, backend=backend, cache_dir=tmp_path)
    after = engine(x)
    assert engine.counts.cached == []
    assert after.routes.tolist() == before.routes.tolist()
    assert_rows_close(after.logits, before.logits)
    third = Engine(net, backend=backend, cache_dir=tmp_path)
    third(x)
    assert third.counts.compiled == []


# -- ahead-of-time compilation --------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))),
    reason="there is no C++ compiler",
)
SMALL = NetSpec(
    "small",
    (
        StageSpec((4,), block="conv", stride=2),
        StageSpec((4, 8), gate=GateSpec((0, 1))),
    ),
    num_classes=3,
    reduction=1.0,
)
SCRIPT = """
import json, sys
import numpy as np
from dynaslim import Engine
checkpoint, cache, images, *backends = sys.argv[1:]
x, result = np.load(images), {}
for backend in backends:
    engine = Engine.from_checkpoint(checkpoint, backend=backend, cache_dir=cache, workers=2)
    out = engine(x)
    result[backend] = [engine.counts.compiled, out.routes.tolist(), out.logits.tolist()]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """An engine that compiled all it can need; for all tests, as that takes half a minute."""
    folder = tmp_path_factory.mktemp("compiled")
    engine = Engine(lively(SMALL), backend="inductor", cache_dir=folder, workers=2)
    engine.warm_up(32)
    return engine, folder


def _in_another_process(tmp_path, net, x, folder, *backends):
    dynaslim.save(tmp_path / "net.safetensors", Checkpoint(net))
    np.save(tmp_path / "x.npy", x.numpy())
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = ("net.safetensors", folder, "x.npy", *backends)
    return json.loads(run_python(SCRIPT, *argv, cwd=tmp_path, env=env).stdout)


@needs_compiler
def test_compiled_by_torch(compiled, tmp_path):
    net, x = lively(SMALL), noise(SMALL, 7)
    first, folder = compiled
    assert sorted(first.counts.compiled) == sorted(
        variant.name for variant in segment_variants(SMALL)
    )
    out = first(x)
    assert len({tuple(row) for row in out.routes.tolist()}) > 1, "the test needs several routes"
    assert_rows_close(out.logits, _expected(net, x, out))
    for workers in (1, 2):
        again = Engine(net, backend="inductor", cache_dir=folder, workers=workers)
        for rows in (1, 2, 3, 7):
            some = again(x[:rows])
            assert some.routes.tolist() == out.routes[:rows].tolist()
            assert_rows_close(some.logits, out.logits[:rows])
        assert again.counts.compiled == []
    found = _in_another_process(tmp_path, net, x, folder, "inductor")
    compiled_again, routes, logits = found["inductor"]
    assert compiled_again == []
    assert routes == out.routes.tolist()
    assert_rows_close(torch.tensor(logits), out.logits)
    # where its programs lie on disk, it takes part in the choice of a backend
    programs = cache_folder(NetworkSource(net).key, folder)
    assert "inductor" in auto.candidates(NetworkSource(net), Resources(2, Cache(programs)))
    assert "inductor" not in auto.candidates(NetworkSource(net), Resources(2, Cache(tmp_path)))


@needs_compiler
def test_any_mix_of_routes_compiled_by_torch(compiled):
    """One path for all rows, each its own, buckets that nobody is in, two callers at once."""
    engine, _ = compiled
    net, x = lively(SMALL), noise(SMALL, 7)
    paths = np.arange(2)[:, None]
    answers = {tuple(path): row_by_row(net, x, [SMALL.route_at(path)] * 7) for path in paths}
    mixes = [np.tile(path, (7, 1)) for path in paths]
    mixes += [paths, paths[::-1], paths[[0, 1, 0, 0, 1]], paths[[0, 0, 1, 0, 0, 0, 0]]]
    mixes += [paths[np.random.default_rng(0).integers(0, 2, rows)] for rows in (1, 3, 5, 7)]

    def call(order):
        for options in mixes[::order]:
            logits, taken, _ = forced(engine, x[: len(options)], options)
            assert taken.tolist() == options.tolist()
            expected = [answers[tuple(path)][b] for b, path in enumerate(options.tolist())]
            assert_rows_close(logits, torch.stack(expected))

    call(1)
    at_once(2, lambda n: call((1, -1)[n]))


def test_damaged_libraries_are_made_again(tmp_path, monkeypatch):
    """The compiler is replaced: here it matters only that it is called."""
    from dynaslim.runtime.backends import inductor

    made = []

    def compile_again(module, example, path):
        made.append(tuple(example.shape))
        path.write_bytes(b"library")
        return path

    net = lively(SMALL)
    monkeypatch.setattr(inductor, "_compile", compile_again)
    load = inductor._open
    monkeypatch.setattr(
        inductor,
        "_open",
        lambda path: nn.Identity() if path.read_bytes() == b"library" else load(path),
    )
    for content in (None, None, b"", b"cut"):
        for path in _files(tmp_path) if content is not None else []:
            path.write_bytes(content)
        backend = make_backend("inductor", NetworkSource(net), Resources(1, Cache(tmp_path)))
        backend.program(SegmentVariant(0), SegmentVariant(0).shape(SMALL, (32, 32)), wide=True)
    assert made == [(2, 3, 32, 32)] * 3
    assert backend.counts.compiled == ["segment0_0_0"]
    assert len(_files(tmp_path)) == 1


def test_compilation_that_fails_names_what_it_needs(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nand a long story")

    net = lively(SMALL)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(DynaslimError, match=r"does not compile \(no compiler\); it needs a C\+\+"):
        Engine(net, backend="inductor", cache_dir=None)(noise(SMALL, 2))


def test_programs_are_found_by_another_process(tmp_path):
    backends = [name for name in ("onnxruntime", "openvino") if name in available("fp32")]
    if not backends:
        pytest.skip("neither onnxruntime nor openvino is installed")
    net, x = lively_net("micro"), noise(micro_spec(), 9)
    mine = {}
    for backend in backends:
        engine = Engine(net, backend=backend, cache_dir=tmp_path / "cache", workers=2)
        mine[backend] = engine(x)
        assert len(engine.counts.compiled) >= 6
    files = _files(tmp_path / "cache")
    assert not [path for path in files if path.suffix == ".tmp"]
    theirs = _in_another_process(tmp_path, net, x, tmp_path / "cache", *backends)
    for backend, (compiled, routes, logits) in theirs.items():
        assert compiled == [], backend
        assert _files(tmp_path / "cache") == files
        assert routes == mine[backend].routes.tolist()
        assert_rows_close(torch.tensor(logits), mine[backend].logits)


ENDS_ELSEWHERE = """
import faulthandler, gc, os, signal, sys, threading
import numpy as np
from dynaslim import Engine
faulthandler.enable()  # gives the thread a stack for signals
signal.signal(signal.SIGINT, lambda *_: print("handled"))
held = [Engine.from_checkpoint(sys.argv[1], backend="openvino", cache_dir=None, workers=1)]
held[0](np.load(sys.argv[2]))
other = threading.Thread(target=lambda: (held.clear(), gc.collect()))
other.start()
other.join()
os.kill(os.getpid(), signal.SIGINT)
"""


@for_backends("openvino")
def test_signals_reach_a_process_whose_engine_ended_in_another_thread(backend, tmp_path):
    net = lively_net("micro")
    dynaslim.save(tmp_path / "net.safetensors", Checkpoint(net))
    np.save(tmp_path / "x.npy", noise(net.spec, 2).numpy())
    ran = run_python(ENDS_ELSEWHERE, "net.safetensors", "x.npy", cwd=tmp_path)
    assert ran.stdout.strip() == "handled"


# -- the fastest of those installed ---------------------------------------------------------------


def _notes(folder):
    return json.loads(next(folder.rglob("auto.json")).read_text())


def test_auto_measures_once(tmp_path, monkeypatch):
    net, x = lively_net("micro"), noise(micro_spec(), 5)
    engine = Engine(net, cache_dir=tmp_path, batch_size=4, workers=2)
    out = engine(x)
    assert engine.backend in available("fp32")
    assert engine.backend == min(engine.measured, key=engine.measured.get)
    assert set(engine.measured) == set(auto.candidates(engine.source, Resources(2, None)))
    assert all(ms > 0 for ms in engine.measured.values())
    assert_rows_close(out.logits, _expected(net, x, out))
    assert list(_notes(tmp_path).values()) == [engine.measured]

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(auto, "measure", fail)
    again = Engine(net, cache_dir=tmp_path, batch_size=4, workers=2)
    assert again(x).routes.tolist() == out.routes.tolist()
    assert again.backend == engine.backend
    assert again.measured == engine.measured


@pytest.fixture
def measured(monkeypatch):
    """Measurements by hand: the sizes requested, and the answers to them."""
    requests, answers = [], {"eager": 2.0, "onnxruntime": 3.0, "openvino": 4.0}

    def measure(backends, source, size, rows):
        requests.append((size, rows))
        return {backend.name: answers[backend.name] for backend in backends}

    monkeypatch.setattr(auto, "measure", measure)
    return requests, answers


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"a": 1}'])
def test_damaged_notes_are_measured_again(tmp_path, measured, content):
    requests, _ = measured
    net, x = lively_net("micro"), noise(micro_spec(), 5)
    Engine(net, cache_dir=tmp_path)(x)
    assert requests == [((32, 32), 32)]
    path = next(tmp_path.rglob("auto.json"))
    path.write_text(content)
    engine = Engine(net, cache_dir=tmp_path)
    assert engine(x).logits.shape == (5, 5)
    assert engine.backend == "eager"
    assert len(requests) == 2
    name, ms = next(iter(_notes(tmp_path).items()))
    for bad in ([], {}, {"eager": "fast", "openvino": 1}, {"tpu": 1.0}, 5):
        path.write_text(json.dumps({name: bad}))
        assert Engine(net, cache_dir=tmp_path).backend == "eager"
    path.write_text(json.dumps({name: {**ms, "eager": 99.0}}))
    count = len(requests)
    if "openvino" in ms or "onnxruntime" in ms:
        assert Engine(net, cache_dir=tmp_path, image_size=32).backend != "eager"
    assert len(requests) == count


def test_auto_measures_for_the_images_that_come(tmp_path, measured):
    requests, _ = measured
    net = lively_net("micro")
    Engine(net, cache_dir=tmp_path, batch_size=3)(noise(net.spec, 2)[:, :, :20])
    Engine(net, cache_dir=tmp_path, batch_size=3, image_size=48)(noise(net.spec, 2))
    Engine(net, cache_dir=tmp_path, batch_size=3).warm_up(24)
    assert Engine(net, cache_dir=None).backend == "eager"
    assert requests == [((20, 32), 3), ((48, 48), 3), ((24, 24), 3), ((32, 32), 32)]
    assert len(_notes(tmp_path)) == 3


def test_auto_looks_at_small_batches_too(monkeypatch):
    """What is fastest for the whole batch alone is not chosen."""
    seen, clock = [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Timed:
        def __init__(self, spec, backend):
            self._seconds = backend.seconds

        def routed(self, images, decide, escalate):
            options = decide(0, None, np.arange(len(images)))
            seen.append((len(images), options.tolist()))
            clock.now += self._seconds[len(images)]

    arrays = SimpleNamespace(images=lambda x: x)
    large = SimpleNamespace(name="large", arrays=arrays, seconds={8: 0.004, 2: 0.006})
    small = SimpleNamespace(name="small", arrays=arrays, seconds={8: 0.008, 2: 0.002})
    one = SimpleNamespace(name="one", arrays=arrays, seconds={1: 0.001})
    monkeypatch.setattr(auto, "Router", Timed)
    source = SimpleNamespace(spec=micro_spec())
    measured = auto.measure([large, small], source, (16, 16), 8)
    assert measured["small"] == pytest.approx((8 + 4 * 2) / 2)
    assert measured["large"] == pytest.approx((4 + 4 * 6) / 2)
    count = len(micro_spec().gates[0].choices)
    quarters = [options for rows, options in seen if rows == 2][:4]
    assert quarters == [[n % count, (n + 1) % count] for n in range(0, 8, 2)]
    assert set(auto.measure([one], source, (16, 16), 1)) == {"one"}


def test_auto_leaves_out_what_does_not_run(monkeypatch):
    if "onnxruntime" not in available("fp32"):
        pytest.skip("onnxruntime is not installed")
    from dynaslim.runtime.backends.onnxruntime import OnnxRuntimeBackend

    def fail(*_, **__):
        raise UsageError("cannot run this")

    monkeypatch.setattr(OnnxRuntimeBackend, "program", fail)
    engine = Engine(lively_net("micro"), cache_dir=None, batch_size=2)
    assert engine.backend != "onnxruntime"
    assert "onnxruntime" not in engine.measured
    assert "eager" in engine.measured
    monkeypatch.setattr(auto, "measure", lambda *_: {})
    with pytest.raises(DynaslimError, match=r"none of the backends .* runs this network"):
        Engine(lively_net("micro"), cache_dir=None)(noise(micro_spec(), 1))


def test_auto_without_a_choice_measures_nothing(monkeypatch):
    monkeypatch.setattr(auto, "available", lambda _: ["eager"])
    monkeypatch.setattr(auto, "measure", None)
    engine = Engine(lively_net("micro"), cache_dir=None)
    assert engine.backend == "eager"
    assert engine.measured == {}


# -- memory ---------------------------------------------------------------------------------------


def _storages(module, dimensions=1):
    tensors = (p for p in module.parameters() if p.ndim >= dimensions)
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


@pytest.mark.parametrize("name", ["micro", "ds_resnet_cifar", "ds_mobilenet_v2"])
def test_forms_of_one_width_share_their_memory(name):
    net = lively_net(name)
    source = NetworkSource(net)
    backend = make_backend("eager", source, Resources(1, None))
    modules = {}
    for variant in segment_variants(net.spec):
        program = backend.program(variant, variant.shape(net.spec, (32, 32)), wide=True)
        modules[variant] = program._module
    first, last = (net.spec.gates[0].choices[n] for n in (0, -1))
    choice = net.spec.gates[1].choices[1]
    one, other = (_storages(modules[SegmentVariant(2, before, choice)]) for before in (first, last))
    shared = set(one) & set(other)
    own = max(len(one), len(other)) - len(shared)
    assert len(shared) >= len(one) / 2
    assert own > 0, "what takes the features must fit the width before"
    elsewhere = modules[SegmentVariant(2, first, net.spec.gates[1].choices[0])]
    # biases that no width cuts may be one; a filter has a width
    assert not set(one) & set(_storages(elsewhere, dimensions=2))
    assert not set(one) & set(_storages(net)), "the network's own memory is left alone"


def test_forms_are_filed_apart_by_type():
    source = NetworkSource(lively_net("micro"))
    whole, half = (
        source.module(SegmentVariant(2, 0, 1), t) for t in (torch.float32, torch.bfloat16)
    )
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    again = source.module(SegmentVariant(2, 2, 1), torch.float32)
    assert set(_storages(again)) & set(_storages(whole))


def test_every_backend_of_the_zoo_has_a_name():
    assert set(BACKENDS) == set(SUPPORTED)
    assert {"eager", "inductor", "onnxruntime", "openvino"} <= set(BACKENDS)
    for spec in ZOO.values():
        variants = list(segment_variants(spec))
        assert len({variant.name for variant in variants}) == len(set(variants)) == len(variants)
