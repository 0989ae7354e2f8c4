import copy
import dataclasses
import json
import os
import runpy
import shutil
import stat
import subprocess
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from docs_blocks import run_script
from helpers import ZOO_NAMES, lively_net, noise, run_python
from PIL import Image

import dynaslim
from dynaslim import Checkpoint, Engine, Preprocessing
from dynaslim.cost import CostTable
from dynaslim.data.decode import decode_image
from dynaslim.errors import DynaslimError, UsageError
from dynaslim.predict import predict
from dynaslim.preprocessing import normalise_pixels
from dynaslim.runtime import export
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.escalation import margins
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.package import MANIFEST, WEIGHTS, PackageError, manifest_digest, open_package
from dynaslim.runtime.variants import segment_variants

ROOT = Path(__file__).parents[2]
NAMES = ["micro", *ZOO_NAMES]


def _checkpoint(name):
    net = lively_net(name, most_blocks=2)
    side = max(32, net.spec.total_stride)
    names = tuple(f"class {n}" for n in range(net.spec.num_classes))
    return Checkpoint(net, class_names=names, preprocessing=Preprocessing(side))


def _close(ours, theirs):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of the micro network, with its checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("packages") / "micro"
    checkpoint = _checkpoint("micro")
    export.export_package(checkpoint, folder)
    return folder, checkpoint


@pytest.fixture
def copied(package, tmp_path):
    """A package that a test may damage."""
    return Path(shutil.copytree(package[0], tmp_path / "copy"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_second_start_compiles_nothing_wherever_it_works(backend, package, tmp_path, monkeypatch):
    folder, checkpoint = package
    x = noise(checkpoint.net.spec, 9).numpy()
    options = {"backend": backend, "cache_dir": tmp_path / "cache", "workers": 2}
    first = Engine.from_package(folder, **options)
    before = first(x)
    assert first.counts.compiled
    # the same network with other weights: its files have the names of ours
    other = copy.deepcopy(checkpoint)
    with torch.no_grad():
        for parameter in other.net.parameters():
            parameter.mul_(1.5)
    export.export_package(other, tmp_path / "other")
    shutil.move(folder, tmp_path / "moved")
    try:
        monkeypatch.chdir(tmp_path / "other")
        moved = Path(os.path.relpath(tmp_path / "moved"))
        second = Engine.from_package(moved, **options)
        after = second(x)
        assert second.counts.compiled == []
    finally:
        shutil.move(tmp_path / "moved", folder)
    _close(after.logits, before.logits)
    assert np.asarray(after.routes).tolist() == np.asarray(before.routes).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_package_answers_as_the_network(name, tmp_path):
    checkpoint = _checkpoint(name)
    manifest, _ = export.export_package(checkpoint, tmp_path / "out")
    spec = checkpoint.net.spec
    assert set(manifest["forms"]) == {variant.name for variant in segment_variants(spec)}
    if name == "ds_resnet50":  # four gates, 53 variants: hardly more than the widths' own weights
        assert len(manifest["forms"]) == 53
        own = sum(dynaslim.params(spec, route) for route in spec.routes) * 4
        assert manifest["files"][WEIGHTS]["bytes"] < 1.6 * own
    x, route = noise(spec, 9).numpy(), spec.widest_choice
    theirs = Engine(checkpoint, backend="eager", cache_dir=None)(x)
    assert len({tuple(row) for row in theirs.routes}) > 1, "the test needs several routes"
    with torch.inference_mode():
        static = checkpoint.net(torch.from_numpy(x), route).numpy()
    for backend in ("onnxruntime", "openvino"):
        engine = Engine.from_package(tmp_path / "out", backend=backend, cache_dir=None)
        assert engine.spec == spec
        assert engine.class_names == checkpoint.class_names
        assert engine.preprocessing == checkpoint.preprocessing
        ours = engine(x)
        assert isinstance(ours.logits, np.ndarray)
        np.testing.assert_array_equal(ours.routes, theirs.routes)
        np.testing.assert_array_equal(ours.madds, theirs.madds)
        _close(ours.logits, theirs.logits)
        _close(engine.static(route)(x), static)


def test_the_manifest_describes_the_package(tmp_path):
    checkpoint = _checkpoint("micro")
    manifest, errors = export.export_package(checkpoint, tmp_path / "out")
    folder, spec = tmp_path / "out", checkpoint.net.spec
    assert json.loads((folder / MANIFEST).read_text()) == manifest
    assert manifest["precision"] == "fp32"
    assert manifest["versions"]["dynaslim"] == dynaslim.__version__
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert set(errors) == {variant.name for variant in segment_variants(spec)}
    assert all(error < 1e-4 for error in errors.values())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


@pytest.mark.parametrize("how", ["missing", "altered"])
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "segment1_0_2.onnx"])
def test_a_missing_or_altered_file_is_named(copied, name, how):
    message = name
    content = bytearray((copied / name).read_bytes())
    (copied / name).unlink()
    if how == "altered":
        content[-1] ^= 1
        (copied / name).write_bytes(content)
        if name != MANIFEST:
            message = f"{name}: does not match its SHA-256"
    with pytest.raises(PackageError, match=message):
        Engine.from_package(copied)


@pytest.mark.parametrize("name", [WEIGHTS, "segment1_0_2.onnx"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
def test_a_file_that_goes_while_the_package_is_open_is_named(name, backend, copied, package):
    engine = Engine.from_package(copied, backend=backend, cache_dir=None)
    (copied / name).unlink()
    with pytest.raises(PackageError, match=f"{name}: missing; its package is not complete"):
        engine(noise(package[1].net.spec, 9).numpy())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_second_look_goes_along(backend, tmp_path):
    net, x = lively_net("micro"), noise(lively_net("micro").spec, 33)
    widest = CostTable.from_madds(net.spec, 32).widest_cost
    with torch.inference_mode():
        ranked = np.sort(margins(net(x, net.spec.widest_choice).numpy()))
    tau = float(ranked[15] + ranked[16]) / 2  # half of the rows are less sure
    point = BudgetPoint(-1e6, None, None, widest, 1.0, None, 0.5, 0.0)
    look = dataclasses.replace(
        point, madds=1.5 * widest, share=1.5, top1=0.6, tau_mirror=tau, mirror_along=(1, 2)
    )
    curve = BudgetCurve(32, 9, widest, None, 0.5, widest, None, 0.5, (point, look), (point,))
    recipe = {"supernet": {"augment": {"mirror": True}}}
    checkpoint = Checkpoint(net, recipe=recipe, budget=curve.to_dict())
    folder = tmp_path / "out"
    assert export.export_package(checkpoint, folder)[0]["mirror"] is True
    ours = Engine.from_package(folder, backend=backend, cache_dir=None)(x.numpy(), budget=1.6)
    theirs = Engine(checkpoint, backend="eager")(x, budget=1.6)
    assert ours.mirrored.sum() == 16
    assert ours.mirrored.tolist() == theirs.mirrored.tolist()
    assert ours.madds.tolist() == theirs.madds.tolist()
    _close(ours.logits, theirs.logits.numpy())
    # a package that forbids it has no such curve
    manifest = json.loads((folder / MANIFEST).read_text())
    _write_manifest(folder, {**manifest, "mirror": False})
    with pytest.raises(PackageError, match=r"manifest.json: .*tau_mirror .*: micro must not"):
        Engine.from_package(folder)
    _write_manifest(folder, {**manifest, "mirror": False, "budget": None})
    assert open_package(folder).mirror is False


def _write_manifest(folder, manifest):
    """A manifest with a hash that fits."""
    manifest = {**manifest, "sha256": manifest_digest(manifest)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_no_package(tmp_path):
    with pytest.raises(PackageError, match="no such folder; make a package with"):
        Engine.from_package(tmp_path / "nothing")
    with pytest.raises(PackageError, match=r"holds no manifest\.json"):
        Engine.from_package(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(PackageError, match="not JSON"):
        Engine.from_package(tmp_path)


def test_backends_that_run_no_packages(package):
    with pytest.raises(UsageError, match="backend eager runs no packages: choose from auto, onnx"):
        Engine.from_package(package[0], backend="eager")
    engine = Engine.from_package(package[0], backend="onnxruntime", cache_dir=None)
    spec = engine.spec
    with pytest.raises(UsageError, match="is not in the package"):
        engine.static(spec.largest)


@pytest.mark.parametrize("option", [{"precision": "bf16"}, {"calibration": []}])
def test_precision_was_settled_at_export(package, option):
    with pytest.raises(UsageError, match="runs in the precision that it was exported in; leave"):
        Engine.from_package(package[0], **option)
    with pytest.raises(UsageError, match="calibration: the variants are fp32 already"):
        Engine(open_package(package[0]), **option)


def test_an_engine_of_an_opened_package(package):
    opened = Engine(open_package(package[0]), backend="onnxruntime", cache_dir=None)
    read = Engine.from_package(package[0], backend="onnxruntime", cache_dir=None)
    x = noise(read.spec, 9).numpy()
    np.testing.assert_array_equal(opened(x).logits, read(x).logits)


def test_routes_of_calls_by_their_text(package):
    engine = Engine.from_package(package[0], backend="onnxruntime", cache_dir=None)
    x = noise(engine.spec, 9).numpy()
    route = engine.spec.cheapest_choice
    np.testing.assert_array_equal(
        engine(x, max_route=str(route)).routes, engine(x, max_route=route).routes
    )
    np.testing.assert_array_equal(engine.static(str(route))(x), engine.static(route)(x))
    with pytest.raises(UsageError, match="route 3: expected channel counts"):
        engine(x, max_route=3)
    with pytest.raises(UsageError, match="route 5: expected channel counts"):
        engine.static(5)


def test_an_older_package_is_replaced_and_nothing_else(package, tmp_path, monkeypatch):
    checkpoint = package[1]
    out = tmp_path / "out"
    export.export_package(checkpoint, out)
    before = (out / MANIFEST).read_bytes()
    monkeypatch.setattr(export, "_whole_parity", _fail)
    with pytest.raises(DynaslimError, match="made to fail"):
        export.export_package(checkpoint, out, notes={"x": 1})
    assert (out / MANIFEST).read_bytes() == before
    monkeypatch.undo()
    export.export_package(checkpoint, out, notes={"x": 1})
    assert json.loads((out / MANIFEST).read_text())["notes"] == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="is there and no package; name another folder"):
        export.export_package(checkpoint, tmp_path / "mine")
    assert (tmp_path / "mine" / "photo.jpg").exists()


def _fail(*arguments):
    raise DynaslimError("made to fail")


def test_a_graph_that_computes_something_else_is_not_handed_over(tmp_path, monkeypatch):
    checkpoint = _checkpoint("micro")
    real = NetworkSource.onnx
    other = Checkpoint(lively_net("micro").__class__(checkpoint.net.spec).eval())

    class Wrong(NetworkSource):
        def onnx(self, variant):
            return real(NetworkSource(other.net), variant)

    with pytest.raises(DynaslimError, match="segment0_0_0: not written, differs"):
        export.export_package(checkpoint, tmp_path / "out", source=Wrong(checkpoint.net))
    assert list(tmp_path.iterdir()) == []


# -- one file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_routes_in_plain_onnxruntime(name, tmp_path):
    checkpoint = _checkpoint(name)
    spec = checkpoint.net.spec
    assert export.export_single_file(checkpoint, tmp_path / "net.onnx") < 1e-4
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options)
    engine = Engine(checkpoint, backend="eager", cache_dir=None)
    x = noise(spec, 12, seed=3).numpy()
    expected = engine(x)
    assert len({tuple(row) for row in expected.routes}) > 1, "the test needs several routes"
    for row in range(len(x)):
        logits, choices = session.run(["logits", "choices"], {"x": x[row : row + 1]})
        np.testing.assert_array_equal(choices[0], expected.routes[row])
        _close(logits[0], expected.logits[row])
    # a bias from outside moves the decisions
    cheap = {
        f"bias_{g}": np.linspace(1e6, 0, len(gate.choices), dtype=np.float32)
        for g, gate in enumerate(spec.gates)
    }
    logits, choices = session.run(["logits", "choices"], {"x": x[:1], **cheap})
    assert choices[0].tolist() == [gate.choices[0] for gate in spec.gates]
    _close(logits, engine(x[:1], max_route=spec.cheapest_choice).logits)


def test_only_the_branch_that_is_taken_runs(tmp_path):
    """By the runtime's own profile: convolutions run are those of one route."""
    checkpoint = _checkpoint("micro")
    export.export_single_file(checkpoint, tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options)
    session.run(None, {"x": noise(checkpoint.net.spec, 1).numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e for e in events if e["name"].endswith("_kernel_time") and "Conv" in e["name"]]
    assert len(ran) == 1 + 2 * 2  # the stem, and a depthwise and a pointwise in each block


def test_weights_of_a_single_file_are_shared(tmp_path):
    checkpoint = _checkpoint("ds_resnet_cifar")
    export.export_single_file(checkpoint, tmp_path / "net.onnx")
    spec = checkpoint.net.spec
    own = sum(dynaslim.params(spec, route) for route in spec.routes) * 4
    assert (tmp_path / "net.onnx").stat().st_size < 1.6 * own


# -- without torch --------------------------------------------------------------------------------


def test_a_package_runs_without_torch_in_a_clean_environment(package, tmp_path):
    """A virtual environment that has numpy and the runtimes, and no torch."""
    folder, checkpoint = package
    site = tmp_path / "venv"
    venv.create(site, with_pip=False)
    python = site / "bin" / "python"
    # what is installed here, by links: a download would need a network
    lib = next((site / "lib").glob("python*")) / "site-packages"
    for library in ("numpy", "msgspec", "onnxruntime", "openvino", "openvino_telemetry"):
        home = Path(__import__("importlib.util").util.find_spec(library).origin).parent
        (lib / library).symlink_to(home)
        if (home.parent / f"{library}.libs").is_dir():
            (lib / f"{library}.libs").symlink_to(home.parent / f"{library}.libs")
    (lib / "dynaslim").symlink_to(Path(dynaslim.__file__).parent)
    x = noise(checkpoint.net.spec, 11).numpy()
    np.save(tmp_path / "x.npy", x)
    script = (
        "import sys, importlib.util, numpy as np, dynaslim\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "x = np.load(sys.argv[2])\n"
        "for backend in ('onnxruntime', 'openvino', 'auto'):\n"
        "    engine = dynaslim.Engine.from_package(sys.argv[1], backend=backend)\n"
        "    out = engine(x, shift=0.1)\n"
        "    np.savez(f'{sys.argv[3]}/{backend}.npz', logits=out.logits, routes=out.routes)\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n"
        "    dynaslim.Engine.from_package(sys.argv[1], backend='inductor')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [python, "-c", script, folder, tmp_path / "x.npy", tmp_path],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "DYNASLIM_CACHE": str(tmp_path / "cache")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "runs no packages" in done.stdout
    expected = Engine(checkpoint, backend="eager", cache_dir=None)(x, shift=0.1)
    for backend in ("onnxruntime", "openvino", "auto"):
        found = np.load(tmp_path / f"{backend}.npz")
        np.testing.assert_array_equal(found["routes"], expected.routes)
        _close(found["logits"], expected.logits)


def test_the_example_runs_a_package_by_onnxruntime_and_numpy_alone(package, tmp_path):
    folder, checkpoint = package
    example = ROOT / "examples" / "run_package.py"
    lines = example.read_text().splitlines()
    assert len(lines) <= 60
    x = noise(checkpoint.net.spec, 11).numpy()
    np.save(tmp_path / "x.npy", x)
    block = (
        "import sys, runpy\n"
        "for name in ('torch', 'dynaslim', 'openvino', 'PIL'): sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = run_python(block, example, folder, tmp_path / "x.npy", timeout=60)
    expected = Engine(checkpoint, backend="eager", cache_dir=None)(x)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[1] for row in rows] == [
        "-".join(map(str, choices)) for choices in expected.routes.tolist()
    ]
    top = expected.logits.argmax(1)
    assert [" ".join(row[2:]) for row in rows] == [f"class {n}" for n in top]


def test_the_example_prepares_a_picture_by_the_manifest(package, tmp_path, capsys):
    """A large one, turned by its EXIF tag."""
    folder, checkpoint = package
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = tmp_path / "turned.jpg"
    Image.fromarray(rng.integers(0, 256, (70, 111, 3), np.uint8)).save(picture, exif=exif)
    example = runpy.run_path(str(ROOT / "examples" / "run_package.py"))
    for fraction in (1.0, 0.875):
        pre = dataclasses.replace(checkpoint.preprocessing, crop_fraction=fraction)
        pixels = decode_image(picture.read_bytes(), pre, "x")
        ours = example["read"](str(picture), json.loads(json.dumps(pre.to_dict())))
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, normalise_pixels(pixels[None], pre), atol=1e-5)
    run_script("examples/run_package.py", [str(folder), str(picture)])
    engine = Engine.from_package(folder, backend="onnxruntime", cache_dir=None)
    (row,) = predict(engine, [picture])
    pixels = decode_image(picture.read_bytes(), engine.preprocessing, "x")
    out = engine(normalise_pixels(pixels[None], engine.preprocessing))
    choices = "-".join(map(str, out.routes[0].tolist()))
    assert capsys.readouterr().out == f"0 {choices} {row.class_name}\n"
    shots = tmp_path / "shots"
    shots.mkdir()
    for n in range(2):
        (shots / f"{n}.jpg").write_bytes(picture.read_bytes())
    run_script("examples/run_package.py", [str(folder), str(shots)])
    assert capsys.readouterr().out == "".join(f"{n} {choices} {row.class_name}\n" for n in (0, 1))
