"""`dynaslim convert`, and what comes behind it: info, training, gates, budgets, a package."""

import json

import pytest
import torch
from convertible import routed_alone
from helpers import bright_pngs, fails, run_ok, write_parquet

import dynaslim
from dynaslim import cli
from dynaslim.preprocessing import Preprocessing

MODEL = """
import torch
from torch import nn


def make_prepared():
    from dynaslim.preprocessing import Preprocessing

    return make(), Preprocessing(16, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), crop_fraction=0.8)


def make():
    torch.manual_seed(0)
    block = lambda a, b, s=1: nn.Sequential(
        nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
    )
    return nn.Sequential(
        block(3, 16), block(16, 32, 2), block(32, 48), block(48, 48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4),
    )
"""


@pytest.fixture
def model(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return f"module:{file}:make"


def test_from_a_users_model_to_a_package(model, tmp_path, capsys):
    data = write_parquet(tmp_path / "data", bright_pngs(120), 4, split="train")
    converted = tmp_path / "converted.safetensors"
    argv = ["convert", f"{model}_prepared", converted, "--data", data, "--json"]
    result = json.loads(run_ok(capsys, *argv))
    assert result["sorted_by"] == "activation"
    assert result["relative_error"] < 1e-5
    (place,) = result["gates_behind"]  # as --gate-at takes it
    again = ["convert", model, tmp_path / "again.safetensors", "--image-size", 16, "--json"]
    assert json.loads(run_ok(capsys, *again, "--gate-at", place))["gates_behind"] == [place]
    assert [route["widths"] for route in result["routes"]] == [[100, p] for p in (25, 50, 75, 100)]

    shown = run_ok(capsys, "info", converted)
    assert "make_prepared, converted" in shown
    assert "100-25" in shown
    assert f"gate 0, behind {place}: " in shown

    stage_one = ["train", "supernet", "--init", converted, "--data.path", data, "--epochs", 2]
    stage_one += ["--batch_size", 20, "--out", tmp_path / "run"]
    run_ok(capsys, *stage_one, "--data.val_share", 0.2, "--calibration_batches", 2)
    trained = dynaslim.read(tmp_path / "run" / "last.safetensors")
    assert str(trained.net.spec.smallest) == "100-25"
    assert len(trained.class_names) == 4
    prepared = Preprocessing(16, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), crop_fraction=0.8)
    assert trained.preprocessing == prepared  # as the model's own function said

    stage_two = ["train", "gate", "--supernet", tmp_path / "run" / "last.safetensors"]
    stage_two += ["--data.path", data, "--data.val_share", 0.2, "--batch_size", 20]
    run_ok(capsys, *stage_two, "--epochs", 1, "--targets", 0.8, "--out", tmp_path / "gate")
    gated = next((tmp_path / "gate").glob("gate_*.safetensors"))
    run_ok(capsys, "evaluate", gated, "--data", data, "--split", "train", "--json")
    run_ok(capsys, "export", gated, tmp_path / "package")
    x = torch.randn(6, 3, 16, 16)
    _, expected = routed_alone(dynaslim.read(gated).net, x)
    engine = dynaslim.Engine.from_package(tmp_path / "package")
    found = torch.as_tensor(engine(x.numpy()).logits)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["resnet18"],
            "resnet18: expected efficientnet_lite0, ",
        ),
        (["module:nowhere.py:make"], "no such file nowhere.py"),
        (["MODEL", "--widths", "0.5,1,2"], "expected shares that rise to 1"),
        (["MODEL", "--widths", "half"], "widths half: expected numbers"),
        (["MODEL", "--weights", "nothing.pth"], "weights nothing.pth: no such file"),
        (["MODEL", "--gate-at", "9"], "gate at '9': there is no such module"),
        (["MODEL", "--protect", "head"], "protect 'head': the model has no such module"),
        (["MODEL", "--other-sizes", "16,big"], "--other-sizes 16,big: expected sides in pixels"),
        (
            ["MODEL", "--importance", "age"],
            "importance 'age': expected one of activation, bn, weight",
        ),
        (["MODEL", "--importance", "activation"], "importance activation: needs images"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, capsys, argv, message):
    named = [model if part == "MODEL" else part for part in argv]
    argv = ["convert", named[0], tmp_path / "out.safetensors", *named[1:]]
    fails(capsys, argv, 2, message)
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_that_do_not_fit_are_named(model, tmp_path, capsys):
    file, out = tmp_path / "weights.pth", tmp_path / "out.safetensors"
    torch.save({"0.0.weight": torch.zeros(16, 3, 3, 1), "other": torch.zeros(3)}, file)
    assert cli.run(["convert", model, str(out), "--weights", str(file), "--json"]) == 2
    result, err = capsys.readouterr()
    assert "missing 0.1.bias" in err
    assert "unexpected other" in err
    result = json.loads(result)
    assert result["error"] in err
    assert (result["unexpected"], result["other_shape"]) == (["other"], ["0.0.weight"])
    assert len(result["missing"]) == 25


def test_a_refusal_is_data(tmp_path, capsys):
    file = tmp_path / "model.py"
    file.write_text(MODEL + "\n\ndef sorts():\n    return nn.Sequential(make()[0], Sorts())\n")
    with file.open("a") as more:
        more.write("\n\nclass Sorts(nn.Module):\n    def forward(self, x):\n")
        more.write("        return x.mean((2, 3)).sort(1).values\n")
    out = tmp_path / "out.safetensors"
    argv = ["convert", f"module:{file}:sorts", str(out), "--image-size", "16", "--json"]
    assert cli.run(argv) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": "1: sort: not an operation that can be converted",
        "module": "1",
        "operation": "sort",
        "reason": "not an operation that can be converted",
    }


def test_a_network_of_several_sizes(model, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    argv = ["convert", model, out, "--image-size", 16, "--other-sizes", "24,32", "--json"]
    result = json.loads(run_ok(capsys, *argv, "--importance", "weight"))
    assert result["other_sizes_px"] == [24, 32]
    assert result["sorted_by"] == "weight"
    assert dynaslim.read(out).net.at_size(24, 24).spec.usual_image_size == 24


def test_weights_fit_by_order_where_all_shapes_agree(tmp_path, model):
    from dynaslim.conversion.source import load_source

    own = load_source(model).model
    state = {f"renamed.{n}": v + 1 for n, v in enumerate(own.state_dict().values()) if v.ndim}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    loaded = load_source(model, weights=tmp_path / "weights.pth").model
    for ours, theirs in zip(own.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours + 1, theirs)
