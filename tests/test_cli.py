import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import (
    METRICS,
    bright_pngs,
    fails,
    lively,
    micro_spec,
    png,
    run_ok,
    run_python,
    start_dynaslim,
    wait_for_steps,
    write_parquet,
)

from dynaslim import cli
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cli.parser import arguments, make_parser
from dynaslim.cost import madds, params, route_costs
from dynaslim.preprocessing import Preprocessing
from dynaslim.spec import GateSpec, NetSpec, StageSpec
from dynaslim.zoo import ZOO, write_spec


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint of five classes and images that fit it; not to be changed."""
    folder = tmp_path_factory.mktemp("micro")
    net = lively(micro_spec(), image_size=16)
    save(folder / "micro.safetensors", Checkpoint(net, preprocessing=Preprocessing(16)))
    write_parquet(folder / "data", [png(n) for n in range(20)], 5)
    return folder


@pytest.fixture
def micro(made, tmp_path):
    """The checkpoint and its images."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "micro.safetensors", tmp_path / "data"


def _unfolded(text):
    """Help with its examples on one line each."""
    return " ".join(re.sub(r" \\\n *", " ", text).split())


def test_help_is_fast_and_needs_no_torch():
    script = (
        "import sys, dynaslim.cli as cli; code = cli.run(['--help']); "
        "assert not {'torch', 'numpy', 'jsonargparse'} & set(sys.modules); sys.exit(code)"
    )
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = run_python(script)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    for verb in cli.VERBS.values():
        assert verb.example in _unfolded(done.stdout)


@pytest.mark.parametrize(("columns", "most"), [(80, 80), (100, 100), (200, 100)])
def test_help_fits_a_terminal(capsys, monkeypatch, columns, most):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= most
    groups = [line.removesuffix(":") for line in lines if re.fullmatch(r"\w[\w ]*:", line)]
    assert groups == list(dict.fromkeys(verb.group for verb in cli.VERBS.values()))
    for verb in ("train gate", "calibrate-budget"):
        out = run_ok(capsys, "help", *verb.split())
        assert max(map(len, out.splitlines())) <= most
        assert out.startswith(f"usage: dynaslim {verb} ")


def test_help_of_half_a_verb(capsys):
    assert cli.run([]) == 2
    capsys.readouterr()
    out = run_ok(capsys, "train", "--help")
    assert cli.VERBS["train gate"].example in _unfolded(out)
    assert cli.VERBS["train supernet"].example in _unfolded(out)
    assert "calibrate" not in out


def test_every_verb_has_help_and_needs_no_torch_for_it():
    script = (
        "import sys, dynaslim.cli as cli\n"
        "for verb in cli.VERBS:\n"
        "    assert cli.run([*verb.split(), '--help']) == 0\n"
        "    assert 'torch' not in sys.modules, verb\n"
        "    print('END')\n"
    )
    helps = run_python(script).stdout.split("END\n")[:-1]
    for verb, text in zip(cli.VERBS.values(), helps, strict=True):
        assert verb.example in _unfolded(text)


# -- looking --------------------------------------------------------------------------------------


def _info(capsys, model, *flags):
    assert cli.run(["info", str(model), *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_json_of_ds_mbnet(capsys):
    data = _info(capsys, "ds_mbnet", "--image-size", "224")
    assert data["model"] == "ds_mbnet"
    assert data["image_size_px"] == 224
    assert len(data["routes"]) == 14
    assert set(data["routes"][0]) == set(data["largest"]) == {"widths", "madds", "params"}
    assert data["routes"][0]["widths"] == [16, 32, 48, 96, 224, 736]
    assert data["routes"][0]["madds"] / 1e6 == pytest.approx(132.89, abs=0.01)
    assert data["params"] == 7_676_204
    assert data["stages"][4] == {
        "block": "depthwise_separable",
        "blocks": 6,
        "kernel": 3,
        "stride": 2,
        "expansion": 1,
        "max_pool": False,
        "widths": list(range(224, 641, 32)),
        "largest_width": 640,
        "gate": 0,
        "governed_by": 0,
    }
    assert data["stages"][3]["widths"] == [96]
    assert data["stages"][3]["largest_width"] == 264
    assert data["stages"][3]["governed_by"] is None
    [gate] = data["gates"]
    assert (gate["stage"], gate["choices"]) == (4, [0, 4, 9, 13])
    assert gate["widths"] == [224, 352, 512, 640]
    assert data["routing_space"]["size"] == 4


@pytest.mark.parametrize("name", sorted(ZOO))
def test_segments_add_up_to_routes(name, capsys):
    """Variants on a path, less the heads of gates, cost and weigh what their route does."""
    spec = ZOO[name]
    data = _info(capsys, name)
    for option in (0, -1):
        path = [0, *[option] * len(spec.gates)]
        variants = [(0, 0), *itertools.pairwise(path)]
        size = data["image_size_px"]
        route = spec.cheapest_choice if option == 0 else spec.widest_choice
        costs = [s["madds"][a][b] for s, (a, b) in zip(data["segments"], variants, strict=True)]
        assert sum(costs) == madds(spec, route, size, slimming_heads=True)
        heads = sum(cost.head_params for cost in route_costs(spec, route, size))
        sizes = [s["params"][a][b] for s, (a, b) in zip(data["segments"], variants, strict=True)]
        assert sum(sizes) == params(spec, route) + heads


@pytest.mark.parametrize("name", sorted(ZOO))
def test_info_and_models_for_a_person(name, capsys):
    out = run_ok(capsys, "info", name)
    for route in ZOO[name].routes:
        assert str(route) in out
    for stage in ZOO[name].stages:
        assert stage.block.replace("_", " ") in out
    assert len(re.findall("^gate ", out, re.MULTILINE)) == len(ZOO[name].gates)
    assert max(map(len, out.splitlines())) <= 120
    assert name in run_ok(capsys, "models")
    printed = json.loads(run_ok(capsys, "models", "--json"))
    assert printed["shipped"] == ["cifar10"]
    rows = {row["model"]: row for row in printed["models"]}
    row = rows[name]
    for kind, route in (("cheapest", ZOO[name].smallest), ("widest", ZOO[name].routes[-1])):
        assert row[f"{kind}_madds"] == madds(ZOO[name], route, row["image_size_px"])
    assert row["gated_routes"] == len(ZOO[name].routing_space)


def test_info_of_many_routes_is_short(capsys, tmp_path):
    """256 routes are listed in the JSON; 1024 are only counted, and shown within a screen."""
    data = _info(capsys, "ds_resnet50")
    assert len(data["routing_space"]["routes"]) == 256
    gated = StageSpec((4, 8, 12, 16), gate=GateSpec((0, 1, 2, 3)))
    spec = NetSpec("five", (StageSpec((4,), block="conv"), *[gated] * 5), num_classes=3)
    path = write_spec(tmp_path / "five.yaml", spec)
    data = _info(capsys, path)
    assert data["routing_space"]["size"] == 1024
    assert data["routing_space"]["routes"] is None
    out = run_ok(capsys, "info", str(path))
    assert "the gates choose among 1024 routes" in out
    assert len(out.splitlines()) < 50


def test_info_of_a_checkpoint(micro, capsys):
    path, _ = micro
    data = _info(capsys, path)
    assert data["model"] == "micro"
    assert data["image_size_px"] == 16
    held = data["checkpoint"]
    assert held["bytes"] == path.stat().st_size
    assert held["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert held["class_names"] is None
    assert held["preprocessing"]["image_size_px"] == 16
    assert (held["metrics"], held["budget"]) == ({}, None)
    out = run_ok(capsys, "info", str(path))
    assert re.search("^classes +not named$", out, re.MULTILINE)
    assert re.search("^measured +nothing$", out, re.MULTILINE)


def test_info_of_a_checkpoint_with_more_metadata(micro, tmp_path, capsys):
    path, folder = micro
    write_parquet(folder, [png(n) for n in range(100)], 5)  # fewer are refused
    argv = ["calibrate-budget", str(path), "--data", str(folder), "--split", "test"]
    assert cli.run(argv) == 0
    known = replace(
        read(path),
        class_names=tuple(f"class {n}" for n in range(5)),
        metrics={"val": METRICS, "note": [1, 2], "broken": {"images": 3, "routes": [{}]}},
        recipe={"supernet": {"epochs": 3}},
    )
    save(path, known)
    capsys.readouterr()
    out = run_ok(capsys, "info", str(path))
    assert re.search("^classes +5: class 0, class 1,", out, re.MULTILINE)
    line = "top-1 on 40 held-out images: dynamic 60.00% at 0.01 M MAdds; routes 50.00% to 62.50%"
    assert out.count("measured") == 1
    assert line in out
    assert re.search("^recipe +supernet", out, re.MULTILINE)
    assert re.search(r"^budget +0\.70 to 1 of the widest route's cost, ", out, re.MULTILINE)
    held = _info(capsys, path)["checkpoint"]
    points = held["budget"]["points"]
    for point in (points[0], points[-1]):
        assert re.search(rf"^ +{point['share']:.3f} .*{point['top1']:.2%}", out, re.MULTILINE)
    assert held["budget"]["images"] == 100
    assert held["metrics"]["val"] == METRICS
    assert held["recipe"] == {"supernet": {"epochs": 3}}


def test_info_of_a_package_needs_no_torch(micro, tmp_path):
    pytest.importorskip("onnx")
    from dynaslim.runtime.export import export_package

    path, _ = micro
    export_package(replace(read(path), metrics=METRICS), tmp_path / "package")
    script = (
        f"import sys, dynaslim.cli as cli; code = cli.run({['info', str(tmp_path / 'package')]}); "
        f"code += cli.run({['info', str(tmp_path / 'package'), '--json']}); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = run_python(script)
    assert "package/manifest.json" not in done.stdout
    assert re.search("^package +.*/package: 10 files, .* MB, fp32$", done.stdout, re.MULTILINE)
    assert "dynamic 60.00%" in done.stdout
    held = json.loads(done.stdout[done.stdout.index("{") :])["package"]
    assert held["precision"] == "fp32"
    assert sum(held["files"].values()) == held["bytes"]


def test_info_of_a_network_without_gates(capsys, tmp_path):
    spec = NetSpec("plain", (StageSpec((4,), block="conv"), StageSpec((8,))), num_classes=3)
    path = write_spec(tmp_path / "plain.yaml", spec)
    data = _info(capsys, path)
    assert data["gates"] == []
    assert len(data["segments"]) == 1
    assert "4-8" in run_ok(capsys, "info", str(path))


# -- the rest -------------------------------------------------------------------------------------


def test_evaluate(micro, capsys):
    path, folder = micro
    out = run_ok(capsys, "evaluate", str(path), "--data", str(folder), "--json")
    data = json.loads(out)  # one JSON object and nothing else
    assert (data["images"], data["split"]) == (20, "test")
    assert [r["widths"] for r in data["routes"]] == [list(r.widths) for r in micro_spec().routes]
    assert data["dynamic"]["mean_madds"] > 0
    out = run_ok(capsys, "evaluate", str(path), "--data", str(folder))
    assert "dynamic (gate)" in out
    assert "4-4-6" in out


def test_mistakes_are_reported_before_torch_is_imported(micro, tmp_path):
    path, folder = map(str, micro)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(png())
    flat = str(tmp_path / "flat")
    mistakes = [
        (1, "evaluate", "nosuch", "--data", "nosuch"),
        (1, "evaluate", path, "--data", "no/such/data"),
        (1, "evaluate", path, "--data", "./nosuch"),
        (1, "evaluate", path, "--data", flat),
        (2, "evaluate", path, "--data", folder, "--views", "11"),
        (2, "evaluate", path, "--data", folder, "--device", "abacus"),
        (1, "calibrate", "nosuch", "out", "--data", folder),
        (1, "calibrate-budget", "nosuch", "--data", folder),
        (2, "predict", "nosuch.png"),
        (2, "predict", path, flat, "--budget", "7"),
        (2, "predict", path, flat, "--backend", "abacus"),
        (1, "predict", "nosuch", flat),
        (1, "export", "nosuch.safetensors", "out"),
        (1, "bench", "nosuch.safetensors"),
        (2, "profile", "nosuch", "out.json"),
        (1, "report", "nosuch"),
        (1, "evaluate", path, "--data", "nosuch"),
        (1, "info", "nosuch.safetensors"),
        (1, "train", "supernet", "--data.path", "no/such/data", "--out", "run"),
        (1, "train", "gate", "--supernet", "nosuch", "--out", "run"),
        (1, "import-official", "nosuch", "out.safetensors"),
    ]
    script = (
        "import sys; from dynaslim import cli\n"
        f"for code, *argv in {mistakes}:\n"
        "    assert cli.run(argv) == code, argv\n"
        "    assert 'torch' not in sys.modules, argv\n"
    )
    done = run_python(script, cwd=tmp_path)
    assert len(done.stderr.strip().splitlines()) == len(mistakes), done.stderr
    assert not (tmp_path / "run").exists()


def _predicting(path, backend):
    return (
        "import sys; from dynaslim import cli\n"
        f"assert cli.run(['predict', {str(path)!r}, 'a.png', '--backend', {backend!r}]) == 0\n"
    )


def test_a_prediction_leaves_torchs_compiler_alone(micro, tmp_path):
    """Its import takes as long as that of all the rest of torch."""
    path, _ = micro
    (tmp_path / "a.png").write_bytes(png())
    script = (
        _predicting(path, "eager")
        + "assert 'torch' in sys.modules and not {'torch._dynamo', 'sympy'} & set(sys.modules)\n"
    )
    run_python(script, cwd=tmp_path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
def test_a_second_prediction_needs_no_torch(micro, backend, tmp_path, monkeypatch):
    """Its programs are in the cache."""
    monkeypatch.setenv("DYNASLIM_CACHE", str(tmp_path / "cache"))
    path, _ = micro
    (tmp_path / "a.png").write_bytes(png())
    script = (
        _predicting(path, backend)
        + "sys.stderr.write('with torch' if 'torch' in sys.modules else 'without torch')\n"
    )
    first, second = (run_python(script, cwd=tmp_path) for _ in range(2))
    assert (first.stderr, second.stderr) == ("with torch", "without torch")
    without_speed = [re.sub(r"[0-9.]+ images/s", "", done.stdout) for done in (first, second)]
    assert without_speed[0] == without_speed[1]


def test_a_runs_folder_stands_for_its_network(micro, tmp_path, capsys):
    path, data = micro
    run = tmp_path / "run"
    run.mkdir()
    fails(capsys, ["evaluate", run, "--data", data], 1, "is a folder without a checkpoint")
    for name in ("checkpoint", "best", "last", "gate_0.80", "gate_0.60", "gate_0.40"):
        shutil.copy(path, run / f"{name}.safetensors")
        names = sorted(file.name for file in run.glob("gate*")) or [f"{name}.safetensors"]
        held = json.loads(run_ok(capsys, "info", str(run), "--json"))["checkpoint"]
        assert held["file"] == str(run / names[len(names) // 2])
    assert f"{run} on " in run_ok(capsys, "evaluate", str(run), "--data", str(data))


def test_unwritable_folder_is_found_out_before_training(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails(capsys, ["demo", "--out", tmp_path / "file" / "x"], 1, "Not a directory")
    fails(capsys, ["demo", "--out", tmp_path / "d", "--epochs", "0"], 2, "epochs 0")
    assert not (tmp_path / "d").exists()


def test_ctrl_c_is_clean(capsys, monkeypatch):
    def interrupted():
        """Wait."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "models", cli.Verb(interrupted, "look", "dynaslim models"))
    fails(capsys, ["models"], 130, "interrupted")


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
    fails(capsys, [*argv, "--corrupt-limit", "0"], 1, "[test] row 19: not an image that can be")
    assert not table.exists()
    printed = run_ok(capsys, *argv[:4], "--corrupt-limit", "0.1")
    assert ": 19 images, 1 skipped\nskipped: " in printed
    assert "[test] row 19: not an image that can be decoded" in printed
    result = json.loads(run_ok(capsys, *argv, "--corrupt-limit", "0.1", "--views", "2"))
    assert result["images"] == 19
    assert len(result["unreadable"]) == 1
    assert "row 19" in result["unreadable"][0]
    rows = pyarrow.parquet.read_table(table).to_pylist()
    assert len(rows) == 19
    assert sum(row["right"] for row in rows) / 19 == pytest.approx(result["dynamic"]["top1"])
    assert sum(entry["images"] for entry in result["per_class"]) == 19
    fails(capsys, [*argv, "--views", "11"], 2, "views 11")
    fails(capsys, [*argv, "--table", str(tmp_path)], 2, "is a folder")


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
    assert "2 batches of 10 images" in run_ok(capsys, *argv, "--batch-size", "10")
    printed = json.loads(run_ok(capsys, *argv, "--batch-size", "10", "--json"))
    assert printed == {"out": str(out), "batches": 2, "batch_size": 10, "left_out": []}
    good = read(out)
    for name, buffer in good.net.named_buffers():
        if name.endswith("running_var"):
            assert not torch.equal(buffer, torch.ones_like(buffer)), name
    weights = dict(loaded.net.named_parameters())
    assert all(torch.equal(v, weights[k]) for k, v in good.net.named_parameters())
    fails(capsys, [*argv, "--batches", "0"], 2, "--batches must be at least 1")


# -- parsers --------------------------------------------------------------------------------------


def _parse(verb, *argv):
    parser = make_parser(verb, cli.VERBS[verb].run, cli.VERBS[verb].example)
    return parser, arguments(cli.VERBS[verb].run, parser, parser.parse_args(list(argv)))


def test_flags_of_a_recipe_are_spelled_either_way(tmp_path):
    argv = ("--batch-size", "3", "--optim.weight_decay=0.5", "--optim.warmup-share=0.2")
    parser, given = _parse("train supernet", *argv, "--save-every-s", "1", "--out", "x")
    recipe = given["recipe"]
    assert (recipe.batch_size, recipe.optim.weight_decay) == (3, 0.5)
    assert recipe.optim.warmup_share == 0.2
    assert given["options"].save_every_s == 1
    assert given["out"] == Path("x")
    help_text = parser.format_help()
    assert "--batch-size N" in help_text
    assert "--batch_size" not in help_text
    config = tmp_path / "recipe.yaml"
    config.write_text("batch_size: 5\noptim: {lr: 0.5}\n")
    _, given = _parse("train gate", "--out", "x", "--config", str(config), "--optim.lr", "0.25")
    assert (given["recipe"].batch_size, given["recipe"].optim.lr) == (5, 0.25)


def test_a_recipe_is_printed_and_read_back(capsys, tmp_path):
    assert cli.run(["train", "gate", "--out", "x", "--optim.lr", "0.5", "--print_config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    _, given = _parse("train gate", "--config", str(printed))
    assert given["recipe"].optim.lr == 0.5


def test_help_shows_defaults_that_are_informative():
    parser, _ = _parse("train gate", "--out", "x")
    text = " ".join(parser.format_help().split())
    assert "--seed N Seed of all randomness in the stage. (default: 0)" in text
    assert "--bf16 {true,false} bfloat16 autocast of the forward passes. (default: false)" in text
    assert "--resume Continue the run in the folder; start a new one if there is none. " in text
    assert "None)" not in text
    assert "<class" not in text


EVALUATE = ["evaluate", "M", "--data"]
TRAIN = ["train", "gate", "--out", "x"]


@pytest.mark.parametrize(
    ("code", "message", "argv"),
    [
        (2, "info: give MODEL; see", ["info"]),
        (2, "info: there is no --nonsense; see", ["info", "ds_mbnet", "--nonsense"]),
        (2, "no --imagesize, did you mean --image-size?", ["info", "ds_mbnet", "--imagesize", "3"]),
        (2, "--image-size: needs a value", ["info", "ds_mbnet", "--image-size"]),
        (2, "--image-size x: must be a whole number", ["info", "ds_mbnet", "--image-size", "x"]),
        (
            2,
            "--image-size 3.5: must be a whole number",
            ["info", "ds_mbnet", "--image-size", "3.5"],
        ),
        (2, "'more' is one argument too many", ["info", "ds_mbnet", "more"]),
        (2, "--json: takes no value", ["models", "--json=3"]),
        (2, "flags follow the verb, as in dynaslim models --json", ["--json", "models"]),
        (2, "'modles' is not a verb; did you mean models?", ["help", "modles"]),
        (2, "SHELL tcsh: choose from bash, zsh, fish", ["completion", "tcsh"]),
        (2, "x: must be a number", ["evaluate", "m", "--data", "d", "--corrupt-limit", "x"]),
        (2, "train gate: give --out PATH; see dynaslim train gate --help", ["train", "gate"]),
        (2, "did you mean --data.path?", [*TRAIN, "--data.pth", "x"]),
        (2, "did you mean --batch-size?", [*TRAIN, "--batch_sise", "3"]),
        (2, "k: choose from try_best, give_up", [*TRAIN, "--sgs.hard", "k"]),
        (2, "maybe: choose from true, false", [*TRAIN, "--bf16", "maybe"]),
        (2, "must be numbers such as [0.5,", [*TRAIN, "--data.mean", "u"]),
        (2, "--config: file does not exist", [*TRAIN, "--config", "no.yaml"]),
        (2, "a recipe has no optim.lrr", [*TRAIN, "--config", "CONFIG"]),
        (2, "no keys and values of a recipe", [*TRAIN, "--config", "TEXT"]),
        (2, "--config: not YAML: ", [*TRAIN, "--config", "BROKEN"]),
        (2, "--optim.lr fast: must be a number", [*TRAIN, "--config", "VALUE"]),
        (2, "--config: not a text file; name", [*TRAIN, "--config", "BYTES"]),
        (2, "--config: refers to itself, or is", [*TRAIN, "--config", "LOOP"]),
        (2, "'evalute' is not a verb; did you mean evaluate?", ["evalute"]),
        (2, "train: name a stage, as in dynaslim train supernet or dynaslim train gate", ["train"]),
        (2, "did you mean train supernet?", ["train", "supernets"]),
        (2, "did you mean ds_mbnet?", ["info", "ds_mbnt"]),
        (2, "16x16 px", ["info", "ds_mbnet", "--image-size", "16"]),
        (1, "runs/none.safetensors: no such file", ["info", "runs/none.safetensors"]),
        (1, "user/model: the hub is not reached", ["info", "hf://user/model"]),
        (2, "evaluate: give --data DATA; see dynaslim evaluate --help", ["evaluate", "M"]),
        (2, "--batch-size 0", [*EVALUATE, "D", "--batch-size", "0"]),
        (
            2,
            "route (4, 5, 6): stage 1 allows 4, 8, 12, not 5",
            [*EVALUATE, "D", "--route", "4-5-6"],
        ),
        (2, "route 'x': expected", [*EVALUATE, "D", "--route", "x"]),
        (2, "choose cpu, cuda or mps", [*EVALUATE, "D", "--device", "tpu"]),
        (1, "no/where: no such file", [*EVALUATE, "no/where"]),
        (1, "holds no images", [*EVALUATE, "nothing"]),
        (1, "empty: cannot be read as parquet", [*EVALUATE, "empty"]),
        (1, "zero: split test is empty", [*EVALUATE, "zero"]),
        (1, "seven: has 7 classes, the network has 5", [*EVALUATE, "seven"]),
        (1, "expected a .parquet file or a folder", [*EVALUATE, "M"]),
        (1, "bare.safetensors: does not say how", ["evaluate", "bare.safetensors", "--data", "D"]),
        (2, "is a folder; name a file to write", ["import-official", "M", "D"]),
        (1, "evil.pth: not a readable torch checkpoint", ["import-official", "evil.pth", "out"]),
        (2, "--workers -1: must not", ["calibrate", "M", "out", "--data", "D", "--workers", "-1"]),
        (2, "with --out", ["calibrate-budget", "hf://user/model", "--data", "D"]),
        (2, "--rounds 0: must be at least 1", ["profile", "M", "out", "--rounds", "0"]),
        (2, "--seed -1: must not be negative", ["bench", "ds_mbnet_tiny", "--seed", "-1"]),
        (1, "M: is a file, not a folder", ["demo", "--out", "M"]),
    ],
)
def test_a_wrong_command_line_gets_one_line(capsys, careless, monkeypatch, code, message, argv):
    monkeypatch.chdir(careless)
    fails(capsys, argv, code, message)
    assert not Path("out").exists()


@pytest.fixture(scope="module")
def careless(made, tmp_path_factory):
    """A working folder with a model M, images D, and much that is none."""
    folder = tmp_path_factory.mktemp("careless")
    shutil.copy(made / "micro.safetensors", folder / "M")
    shutil.copytree(made / "data", folder / "D")
    for name, content in {
        "CONFIG": b"optim: {lrr: 3}",
        "TEXT": b"hello",
        "BROKEN": b"a: [1\nb",
        "VALUE": b"optim: {lr: fast}",
        "BYTES": b"\xa8\x8b\x00\x00{}",
        "LOOP": b"a: &a [*a]",
        "evil.pth": b"x",
        "empty/test.parquet": b"",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir()
    write_parquet(folder / "zero", [], 5)
    write_parquet(folder / "seven", [png()] * 7, 7)
    save(folder / "bare.safetensors", Checkpoint(lively(micro_spec())))
    return folder


# -- careless users, verb by verb -----------------------------------------------------------------

MODELS = {"model", "models", "checkpoint", "file", "run"}


def _required(verb, folder, model):
    """A command line with what a verb requires, its model being `model`."""
    own = {"out": folder / "out", "data": folder / "data", "shell": "bash"}
    argv = verb.split()
    for action in make_parser(verb, cli.VERBS[verb].run, "")._actions:
        given = str(own.get(action.dest, model))
        if not action.option_strings:
            argv.append(given)
        elif action.required:
            argv += [action.option_strings[-1], given]
    return argv


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_refuses_an_unknown_flag(verb, micro, tmp_path, capsys):
    path, _ = micro
    fails(capsys, [*_required(verb, tmp_path, path), "--no-such-flag"], 2, "there is no --no-such")


def _takes_model(verb):
    names = inspect.signature(cli.VERBS[verb].run).parameters
    return bool(MODELS & set(names)) and verb != "demo"


@pytest.mark.parametrize("verb", sorted(filter(_takes_model, cli.VERBS)))
@pytest.mark.parametrize("what", ["missing", "text", "empty", "folder", "dangling"])
def test_every_verb_refuses_what_is_no_model(verb, what, micro, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "wrong.safetensors"
    if what == "text":
        model.write_text("this is no checkpoint\n" * 20)
    elif what == "empty":
        model.touch()
    elif what == "folder":
        model.mkdir()
    elif what == "dangling":
        model.symlink_to(tmp_path / "gone")
    argv = _required(verb, tmp_path, model)
    if verb == "predict":
        (tmp_path / "a.png").write_bytes(png())
        argv.append(str(tmp_path / "a.png"))
    if verb == "serve":
        argv += ["--port", "0"]  # the usual one may be taken here
    code = cli.run(argv)
    out, err = capsys.readouterr()
    assert code in (1, 2), (out, err)
    assert "wrong.safetensors" in err
    assert len(err.strip().splitlines()) == 1, err
    assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to the superuser")
def test_an_unreadable_file(micro, capsys):
    path, _ = micro
    path.chmod(0)
    fails(capsys, ["info", path], 1, "Permission denied")


@pytest.mark.parametrize(
    "argv",
    [
        ["models"],
        ["info", "M"],
        ["evaluate", "M", "--data", "D"],
        ["calibrate-budget", "M", "--data", "D", "--split", "test"],
        ["profile", "M", "out.json", "--backend", "eager", "--batch-size", "2", "--rounds", "1"],
        ["predict", "M", "a.png", "--backend", "eager"],
        ["export", "M", "package"],
    ],
)
def test_json_is_one_object_and_nothing_else(argv, micro, tmp_path, monkeypatch, capfd):
    """At the level of the file descriptor: libraries in C write there too."""
    pytest.importorskip("onnx")
    path, folder = micro
    write_parquet(folder, [png(n) for n in range(100)], 5)  # fewer have no curve of budgets
    monkeypatch.chdir(tmp_path)
    path.rename(tmp_path / "M")
    folder.rename(tmp_path / "D")
    (tmp_path / "a.png").write_bytes(png())
    capfd.readouterr()
    assert cli.run([*argv, "--json"]) == 0
    assert isinstance(json.loads(capfd.readouterr().out), dict)


def test_ctrl_c_in_the_middle(tmp_path):
    """A process that is at work ends with one line and 130."""
    data = write_parquet(tmp_path / "data", bright_pngs(8), 4, split="train").parent
    argv = ["train", "supernet", "--data.path", str(data), "--data.val-share", "0"]
    argv += ["--batch-size", "4", "--epochs", "100000", "--workers", "0", "--out"]
    started = start_dynaslim([*argv, str(tmp_path / "run")])
    wait_for_steps(started, tmp_path / "run" / "metrics.jsonl", 1)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "Traceback" not in out + err
    assert err.strip().splitlines()[-1].startswith("dynaslim: ")


def test_names_cannot_move_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = lively(micro_spec())
    names = ("\x1b[2Jcat", "\u202egod", "naïve", "日本語", "e")
    path = save(tmp_path / "net.safetensors", Checkpoint(net, names, Preprocessing(32)))
    picture = tmp_path / "a\x1b]0;b.png"
    picture.write_bytes(png(0, (32, 32), "RGB"))
    assert cli.run(["info", str(path)]) == 0
    out = run_ok(capsys, "predict", str(path), picture.name, "--no-cache")
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert r"\x1b[2Jcat, \u202egod, naïve, 日本語, e" in out
    assert r"a\x1b]0;b.png" in out
