"""A cache that cannot be used costs a warning, and no answer."""

import json
import subprocess
import warnings
from pathlib import Path

import pytest
from helpers import lively, lively_net, micro_spec, noise, png
from torch import nn

from dynaslim import Checkpoint, Engine, Preprocessing, cli, doctor
from dynaslim.errors import DynaslimError, DynaslimWarning
from dynaslim.runtime import cache, quantise
from dynaslim.runtime.backends import Resources, inductor, make_backend
from dynaslim.runtime.cache import Cache
from dynaslim.runtime.export import export_package
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.variants import SegmentVariant

BACKENDS = ["onnxruntime", "openvino", "auto"]


@pytest.fixture(autouse=True)
def _no_warnings_yet(monkeypatch):
    monkeypatch.setattr(cache, "_reported", set())


@pytest.fixture
def no_folder(tmp_path):
    """A place under a file, where no folder can be made; by root neither."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "cache"


def _messages(caught):
    return [str(one.message) for one in caught if one.category is DynaslimWarning]


def _runs_as_without(backend, cache_dir):
    """Two engines with a cache answer as one without; returns what they warned of."""
    x = noise(micro_spec(), 33)
    expected = Engine(lively_net("micro"), backend="eager", cache_dir=None)(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            engine = Engine(lively_net("micro"), backend=backend, cache_dir=cache_dir, workers=2)
            out = engine(x)
            assert out.routes.tolist() == expected.routes.tolist()
            assert (out.logits - expected.logits).abs().max() < 1e-3 * expected.logits.abs().max()
    return _messages(caught), engine


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_folder_for_programs_is_reported_once(backend, no_folder):
    messages, engine = _runs_as_without(backend, no_folder)
    assert len(messages) == 1
    assert f"{no_folder}: compiled programs are not kept there: " in messages[0]
    assert f"{no_folder.parent} is a file, not a folder; each start compiles anew" in messages[0]
    assert engine.counts.cached == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_programs_that_cannot_be_written_though_the_folder_looked_fine(
    backend, no_folder, monkeypatch
):
    """As on a disk that has room for the first few only."""
    monkeypatch.setattr(cache, "why_not_writable", lambda folder: None)
    messages, _ = _runs_as_without(backend, no_folder)
    assert len(messages) == 1
    assert "a program could not be written" in messages[0] or "not kept there" in messages[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_programs_on_a_full_disk(backend, small_disk):
    (small_disk / "full").write_bytes(bytes(200 << 10))
    messages, _ = _runs_as_without(backend, small_disk / "cache")
    assert len(messages) == 1
    assert "the disk is full (No space left on device)" in messages[0]
    assert not [p for p in small_disk.rglob("*") if p.suffix == ".tmp"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_programs_that_do_not_fit_leave_nothing_half(backend, small_disk, monkeypatch):
    """A folder that has room when it is tried, and none for a program."""
    monkeypatch.setattr(cache, "ROOM", 1)
    (small_disk / "full").write_bytes(bytes(250 << 10))
    messages, _ = _runs_as_without(backend, small_disk / "cache")
    assert len(messages) == 1
    assert not [p for p in small_disk.rglob("*") if p.suffix == ".tmp"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_programs_are_read_from_a_folder_that_cannot_be_written(backend, small_disk):
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    x = noise(micro_spec(), 33)
    engine = Engine(lively_net("micro"), backend=backend, cache_dir=small_disk / "c", workers=2)
    engine(x)
    assert engine.counts.compiled
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing, so there is nothing to report
        again = Engine(lively_net("micro"), backend=backend, cache_dir=small_disk / "c", workers=2)
        again(x)
    assert again.counts.compiled == []
    other = Engine(lively(micro_spec(name="other")), backend=backend, cache_dir=small_disk / "c")
    with pytest.warns(DynaslimWarning, match="Read-only file system"):
        other(x)


def test_a_compiler_whose_folder_fails_compiles_elsewhere(no_folder, monkeypatch):
    made = []

    def compile_into(module, example, path):
        Path(path).write_bytes(b"library")
        made.append(path)

    spec, net = micro_spec(), lively_net("micro")
    monkeypatch.setattr(inductor, "_compile", compile_into)
    monkeypatch.setattr(inductor, "_open", lambda path: nn.Identity())
    whys = iter([None])  # fine when it is tried, full when the library is written
    why = "the disk is full"
    monkeypatch.setattr(cache, "why_not_writable", lambda folder: next(whys, why))
    monkeypatch.setattr(inductor, "why_not_writable", lambda folder: why)
    backend = make_backend("inductor", NetworkSource(net), Resources(1, Cache(no_folder / "x")))
    with pytest.warns(DynaslimWarning, match="not kept there: the disk is full"):
        backend.program(SegmentVariant(0), SegmentVariant(0).shape(spec, (32, 32)), wide=True)
    assert len(made) == 1
    assert no_folder not in made[0].parents

    def fail(*_):
        raise DynaslimError("does not compile")

    monkeypatch.setattr(inductor, "_compile", fail)
    monkeypatch.setattr(inductor, "why_not_writable", lambda folder: None)
    with pytest.raises(DynaslimError, match="does not compile"):  # which is no fault of a folder
        backend.program(SegmentVariant(1), SegmentVariant(1).shape(spec, (32, 32)), wide=True)


def test_calibrated_programs_without_a_folder(no_folder):
    net = lively_net("micro")
    source = quantise.QuantisedSource(net, [noise(net.spec, 8)], cache_dir=no_folder)
    with pytest.warns(DynaslimWarning, match="compiled programs are not kept there"):
        first = source.onnx(SegmentVariant(1, 0, 0))
    assert source.onnx(SegmentVariant(1, 0, 0)) is first, "kept in memory, not made twice"


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("DYNASLIM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(DynaslimWarning, match="are not kept: Could not determine home directory"):
        output = Engine(lively_net("micro"), backend="eager")(noise(micro_spec(), 2))
    assert len(output.logits) == 2
    found = doctor.describe_cache()
    assert (found["folder"], found["writable"]) == (None, False)
    monkeypatch.setenv("DYNASLIM_CACHE", "/somewhere")
    assert cache.cache_folder("key").parent == Path("/somewhere")


# -- what a person sees ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    checkpoint = Checkpoint(lively_net("micro"), preprocessing=Preprocessing(32))
    export_package(checkpoint, folder / "package")
    (folder / "a.png").write_bytes(png(0, (32, 32), "RGB"))
    return folder


def _verbs(folder, out):
    package = folder / "package"
    return {
        "predict": ["predict", package, folder / "a.png", "--json"],
        "profile": ["profile", package, out / "t.json", "--batch-size", "1", "--rounds", "1"],
        "bench": ["bench", "ds_mbnet_tiny", "--batch-size", "1", "--rounds", "2"],
    }


@pytest.mark.parametrize("verb", ["predict", "profile", "bench"])
def test_a_verb_warns_in_a_line_and_goes_on(
    verb, package, no_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DYNASLIM_CACHE", str(no_folder))
    argv = [str(a) for a in _verbs(package, tmp_path)[verb]]
    argv += ["--backend", "onnxruntime"]
    assert cli.run(argv) == 0
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "compiled programs" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"dynaslim: warning: {no_folder}: compiled programs are not kept")
    if verb == "predict":
        assert json.loads(out)["predicted"] == 1
    cache._reported.clear()
    assert cli.run([*argv, "--no-cache"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.fixture
def doctors_error(monkeypatch):
    """What the doctor finds wrong with a folder for programs."""

    def error(folder):
        monkeypatch.setenv("DYNASLIM_CACHE", str(folder))
        found = doctor.describe_cache()
        assert found["writable"] is (found["error"] is None)
        return found["error"]

    return error


def test_the_doctor_calls_the_state_what_it_is(no_folder, tmp_path, doctors_error):
    for folder in (no_folder, no_folder.parent):
        assert doctors_error(folder) == f"{no_folder.parent} is a file, not a folder"
    assert doctors_error(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


def test_the_doctor_names_what_is_wrong_with_a_disk(small_disk, doctors_error):
    (small_disk / "full").write_bytes(bytes(200 << 10))
    assert doctors_error(small_disk) == "the disk is full (No space left on device)"
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert doctors_error(small_disk / "cache") == "Read-only file system"


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", denied)
    assert cache.why_not_writable(tmp_path) == "no permission to write"
    monkeypatch.setattr(Path, "is_file", denied)
    assert Cache(tmp_path).find("auto.json") is None
    assert Cache(tmp_path / "nothing").names(".blob") == {}
