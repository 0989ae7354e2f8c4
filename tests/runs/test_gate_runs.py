"""Runs that train gates: targets met, killed and resumed, on MAdds and on milliseconds."""

import json
import re
import signal
from functools import partial

import pytest
import torch
from helpers import (
    bright_pngs,
    fails,
    lively,
    run_ok,
    start_dynaslim,
    until,
    wait_for_steps,
    write_parquet,
)
from safetensors.torch import load_file

from dynaslim import cli
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cost import CostTable, madds
from dynaslim.cost_file import write_cost_table
from dynaslim.preprocessing import Preprocessing
from dynaslim.spec import NetSpec, StageSpec
from dynaslim.zoo import get_spec

CLASSES = tuple(f"class {n}" for n in range(4))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """144 images, of which a ninth is held out, and a supernet whose gates can distinguish them."""
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder / "images", bright_pngs(144), 4, "train")
    net = lively(get_spec("ds_mbnet_tiny", num_classes=4), image_size=16)
    preprocessing = Preprocessing(16, mean=(0.4,) * 3, std=(0.3,) * 3)
    save(
        folder / "supernet.safetensors",
        Checkpoint(net, class_names=CLASSES, preprocessing=preprocessing),
    )
    return folder


def _argv(data, out, *more):
    return [
        *("train", "gate", "--out", str(out), "--data.path", str(data / "images")),
        *("--supernet", str(data / "supernet.safetensors"), "--batch-size", "16"),
        *("--data.val-share", "0.1111", "--save-every-s", "0", "--log-every", "1", *more),
    ]


def _results(out):
    return json.loads((out / "results.json").read_text())


def test_a_sweep_writes_one_gate_per_target(data, tmp_path, capsys):
    out = tmp_path / "run"
    results = json.loads(run_ok(capsys, *_argv(data, out, "--targets", "0.4,0.8", "--json")))
    assert results == _results(out)
    supernet = load_file(data / "supernet.safetensors")
    shares = []
    for gate, name in zip(results["gates"], ("gate_0.40", "gate_0.80"), strict=True):
        tensors = load_file(out / f"{name}.safetensors")
        changed = {k for k, v in tensors.items() if not torch.equal(v, supernet[k])}
        assert all("slimming_weight" in key for key in changed)
        assert gate["cost_share"] <= gate["target"] + 1e-6
        dynamic = gate["val"]["dynamic"]
        widest = madds(
            get_spec("ds_mbnet_tiny", num_classes=4), results["routes"][-1]["widths"], 16
        )
        # the table has the slimming heads in it, the static count has not
        assert dynamic["mean_madds"] / widest == pytest.approx(gate["cost_share"], rel=0.01)
        assert read(out / f"{name}.safetensors").recipe["target"] == gate["target"]
        shares.append(gate["cost_share"])
    assert shares[0] <= shares[1]
    assert len(results["routes"]) == 4
    # a person's table has them too
    printed = run_ok(capsys, *_argv(data, out, "--targets", "0.4,0.8", "--resume"))
    assert re.search(r"dynamic, target 0.4 .*M .*%", printed)


def test_cost_in_milliseconds_changes_what_is_chosen(data, tmp_path):
    """A table where all widths cost the same but the cheapest, which costs more."""
    spec = get_spec("ds_mbnet_tiny", num_classes=4)
    table = CostTable("ms", (((1.0,),), ((2.0, 1.0, 1.0, 1.0),)))
    file = write_cost_table(tmp_path / "ms.json", table, spec, 16)
    out = tmp_path / "run"
    argv = _argv(data, out, "--cost-table", str(file), "--expected.cost-weight", "1000")
    assert cli.run(argv) == 0
    (gate,) = _results(out)["gates"]
    assert _results(out)["unit"] == "ms"
    assert gate["val"]["dynamic"]["route_shares"][0]["share"] == 0
    assert gate["cost_share"] == 1.0, "all at what the widest costs"


@pytest.mark.parametrize("objective", ["sgs", "expected"])
def test_killed_at_any_moment_it_ends_bit_equal(data, tmp_path, objective, one_thread):
    flags = ("--objective", objective, "--targets", "0.5,0.9", "--epochs", "2", "--resume")
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert cli.run(_argv(data, straight, *flags)) == 0
    total = len(straight.joinpath("metrics.jsonl").read_text().splitlines())
    assert total == (32 if objective == "sgs" else 0)
    for steps in (3, 20) if objective == "sgs" else (0,):  # in the first gate, in the second
        process = start_dynaslim(_argv(data, out, *flags))
        if steps:
            wait_for_steps(process, out / "metrics.jsonl", steps)
        else:
            until((out / "gate_0.50.safetensors").exists, 120)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert cli.run(_argv(data, out, *flags)) == 0
    for name in ("gate_0.50", "gate_0.90"):
        ours = load_file(out / f"{name}.safetensors")
        theirs = load_file(straight / f"{name}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert _results(out)["gates"][0]["val"] == _results(straight)["gates"][0]["val"]


def test_any_routing_space(data, tmp_path):
    """The same supernet with gates that choose between two widths, one of them not the first."""
    out = tmp_path / "run"
    assert cli.run(_argv(data, out, "--choices", "1,3", "--targets", "0.7")) == 0
    (gate,) = _results(out)["gates"]
    assert len(gate["val"]["dynamic"]["route_shares"]) == 2
    net = read(out / "gate_0.70.safetensors").net
    assert net.spec.gates[0].choices == (1, 3)
    assert net.slimming_parameters()[0].shape[0] == 2
    supernet = load_file(data / "supernet.safetensors")
    tensors = load_file(out / "gate_0.70.safetensors")
    same = {k for k in supernet if "slimming" not in k}
    assert all(torch.equal(tensors[k], supernet[k]) for k in same)


def test_close_targets_have_files_of_their_own(data, tmp_path):
    out = tmp_path / "run"
    assert cli.run(_argv(data, out, "--targets", "0.901,0.904")) == 0
    assert set(_results(out)["files"]) == {"gate_0.901", "gate_0.904"}


@pytest.mark.parametrize("objective", ["sgs", "expected"])
def test_nothing_held_out(data, tmp_path, capsys, objective):
    argv = _argv(data, tmp_path / "run", "--objective", objective, "--epochs", "1")
    assert "not measured: no image held out" in run_ok(capsys, *argv, "--data.val-share", "0")


_fails = partial(fails, notes=True)


def test_mistakes_get_one_line(data, tmp_path, capsys):
    out = tmp_path / "run"
    no_supernet = [a for a in _argv(data, out) if "supernet" not in a]
    _fails(capsys, no_supernet, 2, "name the trained supernet: --supernet CHECKPOINT")
    _fails(capsys, _argv(data, out, "--supernet", "nowhere"), 1, "nowhere: no such file")
    spec = get_spec("ds_mbnet_tiny", num_classes=4)
    other_size = write_cost_table(tmp_path / "32.json", CostTable.from_madds(spec, 32), spec, 32)
    both = ["--objective", "sgs", "--targets", "0.5", "--sgs.cost-scale", "1e6"]
    for number, (message, *flags) in enumerate(
        (
            ("target .* out of reach", "--targets", "0.01"),
            ("each above 0, at most 1", "--targets", "1.5"),
            ("nowhere: cannot be read", "--cost-table", "nowhere"),
            ("both are the scale of the cost term", *both),
            ("9", "--choices", "0,9"),
            ("1 gates, but 3 sets", "--choices", "0;1;2"),
            ("trained on whole batches", "--optim.accumulate", "2"),
            ("32x32 px, not 16x16", "--cost-table", str(other_size)),
            ("no route of its own", "--augment.mixup", "0.2"),
        )
    ):
        _fails(capsys, _argv(data, tmp_path / f"run{number}", *flags), 2, message)

    plain = NetSpec("plain", (StageSpec((4,), block="conv"), StageSpec((4,))), num_classes=4)
    save(tmp_path / "plain.safetensors", Checkpoint(lively(plain), preprocessing=Preprocessing(16)))
    argv = _argv(data, tmp_path / "plain", "--supernet", str(tmp_path / "plain.safetensors"))
    _fails(capsys, argv, 2, "plain has no gates to train")
    other = lively(get_spec("ds_mbnet_tiny", num_classes=4), image_size=16)
    names = ("a", "b", "c", "d")
    checkpoint = Checkpoint(other, class_names=names, preprocessing=Preprocessing(16))
    save(tmp_path / "other.safetensors", checkpoint)
    argv = _argv(data, tmp_path / "other", "--supernet", str(tmp_path / "other.safetensors"))
    _fails(capsys, argv, 1, "its classes are not those of")
