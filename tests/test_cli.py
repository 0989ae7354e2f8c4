import json
import os
import subprocess
import sys
import time

import pytest
from helpers import lively, micro_spec, png, write_parquet

from dynaslim import cli
from dynaslim.checkpoint import Checkpoint, save
from dynaslim.preprocessing import Preprocessing
from dynaslim.zoo import ZOO


@pytest.fixture
def micro(tmp_path):
    """A checkpoint of five classes and a parquet folder that fits it."""
    net = lively(micro_spec(), image_size=16)
    path = save(tmp_path / "micro.safetensors", Checkpoint(net, preprocessing=Preprocessing(16)))
    write_parquet(tmp_path / "data", [png(n) for n in range(20)], 5)
    return path, tmp_path / "data"


def _fails(capsys, argv, code, message):
    assert cli.run([str(a) for a in argv]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert out == ""


def test_help_is_fast_and_needs_no_torch():
    script = (
        "import sys, dynaslim.cli as cli; code = cli.run(['--help']); "
        "assert not {'torch', 'numpy', 'jsonargparse'} & set(sys.modules); sys.exit(code)"
    )
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 0.5
    for verb in cli.VERBS.values():
        assert verb.example in done.stdout


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help_and_needs_no_torch_for_it(verb):
    script = (
        f"import sys, dynaslim.cli as cli; code = cli.run({[*verb.split(), '--help']}); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cli.VERBS[verb].example in " ".join(done.stdout.split())


def test_info_json_of_ds_mbnet(capsys):
    assert cli.run(["info", "ds_mbnet", "--image-size", "224", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"model", "params", "image_size_px", "routes", "largest"}
    assert data["model"] == "ds_mbnet"
    assert data["image_size_px"] == 224
    assert len(data["routes"]) == 14
    assert set(data["routes"][0]) == set(data["largest"]) == {"widths", "madds", "params"}
    assert data["routes"][0]["widths"] == [16, 32, 48, 96, 224, 736]
    assert data["routes"][0]["madds"] / 1e6 == pytest.approx(132.89, abs=0.01)
    assert data["params"] == 7_676_204


@pytest.mark.parametrize("name", sorted(ZOO))
def test_info_and_models_for_a_person(name, capsys):
    assert cli.run(["info", name]) == 0
    out = capsys.readouterr().out
    for route in ZOO[name].routes:
        assert str(route) in out
    assert cli.run(["models"]) == 0
    assert name in capsys.readouterr().out
    assert cli.run(["models", "--json"]) == 0
    assert name in [row["model"] for row in json.loads(capsys.readouterr().out)["models"]]


def test_info_of_a_checkpoint(micro, capsys):
    path, _ = micro
    assert cli.run(["info", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"] == "micro"
    assert data["image_size_px"] == 16


def test_evaluate(micro, capsys):
    path, folder = micro
    assert cli.run(["evaluate", str(path), "--data", str(folder), "--json"]) == 0
    out, _ = capsys.readouterr()
    data = json.loads(out)  # one JSON object and nothing else
    assert (data["images"], data["split"]) == (20, "test")
    assert [r["widths"] for r in data["routes"]] == [list(r.widths) for r in micro_spec().routes]
    assert data["dynamic"]["mean_madds"] > 0
    assert cli.run(["evaluate", str(path), "--data", str(folder)]) == 0
    out, _ = capsys.readouterr()
    assert "dynamic (gate)" in out
    assert "4-4-6" in out


def test_bad_usage(capsys, micro):
    path, folder = micro
    _fails(capsys, ["evalute"], 2, "'evalute' is not a verb; did you mean evaluate?")
    _fails(capsys, ["info", "ds_mbnt"], 2, "did you mean ds_mbnet?")
    _fails(capsys, ["info", "ds_mbnet", "--image-size", "16"], 2, "16x16 px")
    _fails(capsys, ["info", "runs/none.safetensors"], 1, "runs/none.safetensors: no such file")
    _fails(capsys, ["evaluate", path, "--data", folder, "--batch-size", "0"], 2, "--batch-size 0")
    _fails(
        capsys,
        ["evaluate", path, "--data", folder, "--route", "4-5-6"],
        2,
        "route (4, 5, 6): stage 1 allows 4, 8, 12, not 5",
    )
    _fails(capsys, ["evaluate", path, "--data", folder, "--route", "x"], 2, "route 'x': expected")
    _fails(capsys, ["import-official", path, folder], 2, "is a folder; name a file to write")
    assert cli.run([]) == 2
    for argv in (["info"], ["info", "ds_mbnet", "--nonsense"], ["evaluate", str(path)]):
        capsys.readouterr()
        assert cli.run(argv) == 2
        assert "usage: dynaslim" in capsys.readouterr().err


def test_files_that_fail(capsys, micro, tmp_path):
    path, folder = micro
    missing = tmp_path / "no.safetensors"
    _fails(capsys, ["evaluate", missing, "--data", folder], 1, f"{missing}: no such file")
    _fails(capsys, ["evaluate", path, "--data", "no/where"], 1, "no/where: no such file")
    (tmp_path / "empty").mkdir()
    _fails(capsys, ["evaluate", path, "--data", tmp_path / "empty"], 1, "holds no images")
    write_parquet(tmp_path / "seven", [png()] * 7, 7)
    _fails(
        capsys,
        ["evaluate", path, "--data", tmp_path / "seven"],
        1,
        "seven: has 7 classes, the network has 5",
    )
    bare = save(tmp_path / "bare.safetensors", Checkpoint(lively(micro_spec())))
    _fails(capsys, ["evaluate", bare, "--data", folder], 1, "bare.safetensors: does not say how")
    evil = tmp_path / "evil.pth"
    evil.write_bytes(b"x")
    out = tmp_path / "out.safetensors"
    _fails(capsys, ["import-official", evil, out], 1, "evil.pth: not a readable torch checkpoint")
    assert not out.exists()


def test_broken_image_is_named(capsys, micro, tmp_path):
    path, _ = micro
    write_parquet(tmp_path / "broken", [png(), b"x", png(), png(), png()], 5)
    assert cli.run(["evaluate", str(path), "--data", str(tmp_path / "broken")]) == 1
    err = capsys.readouterr().err
    assert "[test] row 1: not an image that can be decoded" in err
    assert "Traceback" not in err


def test_unwritable_folder_is_found_out_before_training(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    _fails(capsys, ["demo", "--out", tmp_path / "file" / "x"], 1, "Not a directory")
    _fails(capsys, ["demo", "--out", tmp_path / "d", "--epochs", "0"], 2, "epochs 0")
    assert not (tmp_path / "d").exists()


def test_ctrl_c_is_clean(capsys, monkeypatch):
    def interrupted():
        """Wait."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "models", cli.Verb(interrupted, "look", "dynaslim models"))
    _fails(capsys, ["models"], 130, "interrupted")


@pytest.mark.parametrize("argv", [["info", "ds_mbnet", "--json"], ["models"], ["--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_has_gone(argv, unbuffered):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "dynaslim", *argv],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_evaluate_views_table_and_unreadable_images(micro, tmp_path, capsys):
    import pyarrow.parquet

    path, _ = micro
    data = tmp_path / "broken"
    write_parquet(data, [*(png(n) for n in range(19)), b"no image"], 5)
    table = tmp_path / "out" / "table.parquet"
    argv = ["evaluate", str(path), "--data", str(data), "--table", str(table), "--json"]
    _fails(capsys, argv, 1, "not an image that can be decoded")
    assert not table.exists()
    assert cli.run([*argv, "--corrupt-limit", "0.1", "--views", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 19
    assert len(result["unreadable"]) == 1
    assert "row 19" in result["unreadable"][0]
    rows = pyarrow.parquet.read_table(table).to_pylist()
    assert len(rows) == 19
    assert sum(row["right"] for row in rows) / 19 == pytest.approx(result["dynamic"]["top1"])
    assert sum(entry["images"] for entry in result["per_class"]) == 19
    _fails(capsys, [*argv, "--views", "11"], 2, "views 11")
    _fails(capsys, [*argv, "--table", str(tmp_path)], 2, "is a folder")


def test_calibrate_makes_damaged_statistics_good(micro, tmp_path, capsys):
    import torch

    from dynaslim.checkpoint import read
    from dynaslim.nn.layers import SlimBatchNorm2d

    path, data = micro
    loaded = read(path)
    for module in loaded.net.modules():
        if isinstance(module, SlimBatchNorm2d):
            module.reset_statistics()
    damaged = save(tmp_path / "damaged.safetensors", loaded)
    out = tmp_path / "good.safetensors"
    argv = ["calibrate", str(damaged), str(out), "--data", str(data), "--split", "test"]
    assert cli.run([*argv, "--batch-size", "10"]) == 0
    assert "2 batches of 10 images" in capsys.readouterr().out
    good = read(out)
    for name, buffer in good.net.named_buffers():
        if name.endswith("running_var"):
            assert not torch.equal(buffer, torch.ones_like(buffer)), name
    weights = dict(loaded.net.named_parameters())
    assert all(torch.equal(v, weights[k]) for k, v in good.net.named_parameters())
    _fails(capsys, [*argv, "--batches", "0"], 2, "--batches must be at least 1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "train: say what, as in dynaslim train supernet or dynaslim train gate"),
        (["train", "supernets"], "did you mean train supernet?"),
    ],
)
def test_verbs_of_two_words(capsys, argv, message):
    _fails(capsys, argv, 2, message)


def test_flags_of_a_recipe_are_spelled_either_way():
    argv = ["--batch-size", "3", "--optim.weight-decay=0.5", "--save-every-s", "1", "--out", "x"]
    spelled = cli._as_spelled("train supernet", argv)
    assert spelled[:3] == ["--batch_size", "3", "--optim.weight_decay=0.5"]
    assert spelled[3:] == ["--save-every-s", "1", "--out", "x"]
