"""The verbs profile, bench and export, as a person and as a script meet them."""

import json

import numpy as np
import onnxruntime
import pytest
from helpers import encoded, fails, lively, micro_spec, png, run_ok, write_parquet

from dynaslim import Engine
from dynaslim.bench.models import calibration_batches
from dynaslim.bench.routed import bench_routed, mixed, observed
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cost_file import read_cost_table
from dynaslim.errors import UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.latency import LatencyTable
from dynaslim.runtime.package import open_package
from dynaslim.zoo import get_spec


def _pictures(count):
    """Pictures that differ in colour and roughness, so that gates may differ too."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        rough = rng.standard_normal((16, 16, 3)) * rng.uniform(0, 80)
        yield encoded((rng.uniform(0, 255, 3) + rough).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A checkpoint of five classes and a parquet folder that fits it."""
    folder = tmp_path_factory.mktemp("micro")
    net = lively(micro_spec(), image_size=16)
    path = save(folder / "micro.safetensors", Checkpoint(net, preprocessing=Preprocessing(16)))
    for split in ("train", "test"):
        write_parquet(folder / "data", list(_pictures(40)), 5, split)
    return path, folder / "data"


def test_profile_writes_a_table_that_training_and_merging_read(micro, tmp_path, capsys):
    path, _ = micro
    argv = ["profile", path, tmp_path / "t.json", "--backend", "onnxruntime", "--batch-size", "6"]
    out = run_ok(capsys, *argv, "--rounds", "3", "--json")
    printed = json.loads(out)
    spec = read(path).net.spec
    table = read_cost_table(tmp_path / "t.json", spec, image_size=16)
    latency = LatencyTable.read(tmp_path / "t.json", spec)
    assert table.unit == "ms"
    assert latency.rows == (1, 2, 4, 6) == tuple(printed["rows"])
    assert table.segments[0][0][0] == pytest.approx(printed["ms"]["segment0_0_0"][-1] / 6)
    assert printed["note"]["backend"] == "onnxruntime"
    assert printed["note"]["processor"]
    assert "segment2_2_1" in run_ok(capsys, *argv, "--rounds", "1")
    engine = Engine.from_checkpoint(
        path, backend="eager", latency=tmp_path / "t.json", merge=True, cache_dir=None
    )
    assert engine(np.zeros((3, 3, 16, 16), np.float32)).logits.shape == (3, 5)


def test_bench_of_a_mix(capsys):
    out = run_ok(
        capsys, "bench", "ds_mbnet_tiny", "--backend", "onnxruntime,eager", "--batch-size", "10",
        "--mix", "0.55,0.2,0.1,0.15", "--rounds", "3", "--json",
    )  # fmt: skip
    printed = json.loads(out)
    assert set(printed["backends"]) == {"onnxruntime", "eager"}
    for result in printed["backends"].values():
        assert result["rows"] == [6, 2, 1, 1]
        assert len(result["routes"]) == 4
        best = [result["best_static_ms"][route]["median"] for route in result["routes"]]
        static = [result["static_ms"][route]["median"] for route in result["routes"]]
        assert all(b <= s for b, s in zip(best, static, strict=True))
        shares = np.array(result["rows"]) / 10
        # medians of sums are near the sums of medians
        assert result["ideal_ms"]["median"] == pytest.approx(float(shares @ best), rel=0.5)
        assert 0 < result["ratio_to_ideal"]["q1"] <= result["ratio_to_ideal"]["q3"]
        mean = shares @ np.array(result["madds"])
        assert result["madds_ratio"] == pytest.approx(max(result["madds"]) / mean)


def test_bench_of_what_the_gates_choose(micro, capsys):
    path, data = micro
    printed = json.loads(
        run_ok(
            capsys, "bench", path, "--backend", "onnxruntime", "--batch-size", "16",
            "--mix", "real", "--data", data, "--rounds", "2", "--json",
        )
    )  # fmt: skip
    result = printed["backends"]["onnxruntime"]
    assert sum(result["rows"]) == 16
    assert sum(result["shares"]) == pytest.approx(1)
    assert len(result["routes"]) > 1, "the test needs images that differ"


def test_bench_of_one_image_and_for_a_person(capsys):
    argv = ["bench", "ds_mbnet_tiny", "--backend", "onnxruntime", "--batch-size", "1"]
    out = run_ok(capsys, *argv, "--rounds", "2")
    assert "ratio" in out
    assert "in pieces of" in out
    printed = json.loads(run_ok(capsys, *argv, "--rounds", "2", "--json"))
    result = printed["backends"]["onnxruntime"]
    assert set(result["routed_over_static"]) == set(result["routes"])
    assert result["shares"] == [0.55, 0.2, 0.1, 0.15]


def test_the_rows_of_a_mix():
    spec = get_spec("ds_mbnet")
    traffic = mixed(spec, [0.55, 0.2, 0.1, 0.15], 32)
    assert np.bincount(traffic.rows).tolist() == [18, 6, 3, 5]
    assert list(traffic.rows) != sorted(traffic.rows)
    assert np.bincount(mixed(spec, [0, 0, 0, 2], 5).rows, minlength=4).tolist() == [0, 0, 0, 5]
    with pytest.raises(UsageError, match="needs 4 shares"):
        mixed(spec, [0.5, 0.5], 8)
    with pytest.raises(UsageError, match="needs 4 shares"):
        mixed(spec, [1, 1, -1, 1], 8)
    with pytest.raises(UsageError, match="gates differ in options; give --mix real"):
        mixed(micro_spec(), [1, 1], 8)
    seen = observed(spec, np.array([[0], [13], [0], [4]]), 2)
    assert seen.paths == ((0,), (1,), (3,))
    assert seen.rows == (0, 2)
    assert seen.shares == (0.5, 0.25, 0.25)


def test_the_ideal_is_the_sum_of_static_times(monkeypatch, micro):
    """With a clock of our own: 1 ms per row and MAdd unit, so every number is known."""
    from dynaslim.bench import routed

    engine = Engine.from_checkpoint(micro[0], backend="eager", cache_dir=None)
    traffic = observed(engine.spec, np.array([[0, 0], [2, 2], [0, 0], [2, 1]]), 4)

    def fixed(arms, rounds, on_round=None):
        cost = {str(r): float(n) for n, r in enumerate(sorted(engine.spec.routing_space), 1)}
        return {
            name: [cost.get(name.split()[-1], 8.0) * (2 if name.startswith("static") else 1)] * 3
            for name in arms
        }

    monkeypatch.setattr(routed, "interleave", fixed)
    result = bench_routed(engine, np.zeros((4, 3, 16, 16), np.float32), traffic, rounds=3)
    best = [result["best_static_ms"][route]["median"] for route in result["routes"]]
    expected = float(np.dot([0.5, 0.25, 0.25], best))
    assert result["ideal_ms"]["median"] == pytest.approx(expected)
    assert result["ratio_to_ideal"]["median"] == pytest.approx(expected / 8)
    assert result["speedup_over_widest"]["median"] == pytest.approx(max(best) / 8)


def test_a_package_is_profiled_and_not_benched(micro, tmp_path, capsys):
    package = tmp_path / "p"
    printed = json.loads(run_ok(capsys, "export", micro[0], package, "--json"))
    assert printed["forms"] == 9
    assert printed["parity"] < 1e-4
    assert open_package(package).preprocessing == Preprocessing(16)
    assert "9 segment variants" in run_ok(capsys, "export", micro[0], package)
    argv = ["--backend", "onnxruntime", "--batch-size", "2", "--rounds", "2"]
    run_ok(capsys, "profile", package, tmp_path / "t.json", *argv)
    message = f"{package}: a package has no programs of whole routes to compare with; bench the"
    fails(capsys, ["bench", package, *argv], 2, message)
    capsys.readouterr()
    assert "package" not in run_ok(capsys, "help", "bench")


def test_export_in_int8(micro, tmp_path, capsys):
    path, data = micro
    out = run_ok(
        capsys, "export", path, tmp_path / "p8", "--precision", "int8", "--calibration", data,
        "--calibration-images", "40", "--json",
    )  # fmt: skip
    printed = json.loads(out)
    assert printed["precision"] == "int8"
    assert printed["accuracy"]["images"] == 40
    package = open_package(tmp_path / "p8")
    assert package.source.precision == "int8"
    assert package.manifest["notes"]["accuracy"] == printed["accuracy"]
    engine = Engine.from_package(tmp_path / "p8", backend="openvino", cache_dir=None)
    assert engine(np.zeros((2, 3, 16, 16), np.float32)).logits.shape == (2, 5)


def test_int8_is_not_calibrated_on_what_cannot_be_read(micro, tmp_path):
    damaged = png(0, (16, 16), "RGB")[:60]
    pictures = [png(n, (16, 16), "RGB") for n in range(149)]
    data = write_parquet(tmp_path / "set", [*pictures, damaged], 5)
    batches = list(calibration_batches(read(micro[0]), str(data.parent), "test", 150))
    assert sum(map(len, batches)) == 149
    assert all(float(picture.std()) > 0.1 for x in batches for picture in x), "one is black"


def test_export_of_single_graphs(micro, tmp_path, capsys):
    assert "one image at a time" in run_ok(
        capsys, "export", micro[0], tmp_path / "net.onnx", "--single-file"
    )
    route = str(read(micro[0]).net.spec.smallest)
    assert route in run_ok(
        capsys, "export", micro[0], tmp_path / "route.onnx", "--static-route", route
    )
    x = np.zeros((1, 3, 16, 16), np.float32)
    for name in ("net.onnx", "route.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name)
        assert session.run(["logits"], {"x": x})[0].shape == (1, 5)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["bench", "ds_mbnet_tiny", "--mix", "a,b"], 2, "--mix 'a,b': give shares such as"),
        (["bench", "ds_mbnet_tiny", "--mix", "real"], 2, "--mix real and --data go together"),
        (["bench", "ds_mbnet_tiny", "--batch-size", "0"], 2, "--batch-size 0"),
        (["bench", "ds_mbnet_tiny", "--backend", "tpu"], 2, "backend 'tpu': choose from auto"),
        (["bench", "ds_mbnet_tinny"], 2, "did you mean ds_mbnet_tiny"),
        (["profile", "ds_mbnet_tiny", "OUT", "--batch-size", "0"], 2, "must be a whole number"),
        (["export", "MICRO", "OUT", "--precision", "int8"], 2, "--calibration go together"),
        (["export", "MICRO", "OUT", "--precision", "fp16"], 2, "choose fp32 or int8"),
        (["export", "MICRO", "OUT", "--static-route", "1-2-3"], 2, "route (1, 2, 3)"),
        (
            ["export", "MICRO", "OUT", "--static-route", "4-4-6", "--single-file"],
            2,
            "choose one",
        ),
        (["export", "MICRO", "OUT", "--ovms", "--single-file"], 2, "choose one"),
        (["export", "MICRO", "OUT", "--ovms", "--triton"], 2, "--triton and --ovms: choose one"),
        (["export", "MICRO", "OUT", "--ovms", "--name", "../up"], 2, "--name '../up': must begin"),
        (["export", "MICRO", "OUT", "--name", "up"], 2, "--name is for --triton and --ovms"),
    ],
)
def test_mistakes_are_one_line(micro, tmp_path, capsys, argv, code, message):
    places = {"MICRO": micro[0], "OUT": tmp_path / "out"}
    fails(capsys, [places.get(a, a) for a in argv], code, message)
    assert not (tmp_path / "out").exists()
