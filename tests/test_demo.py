import json
import re

import pytest
import torch
from PIL import Image

from dynaslim import cli
from dynaslim.checkpoint import read
from dynaslim.cli.output import saving
from dynaslim.demo import run_demo


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return run_demo(out, epochs=5, target=0.5, seed=0, train_images=1280), out


def test_what_was_saved_in_a_sentence(done):
    evaluation = done[0].evaluation
    told = re.fullmatch(
        r"Against the widest route the gate saves (\d+)% of the multiply-adds, for ([\d.]+) points "
        r"of top-1 (less|more)\.",
        saving(evaluation),
    )
    widest = evaluation.routes[-1]
    assert int(told[1]) == round(100 * (1 - evaluation.dynamic.mean_madds / widest.madds))
    change = float(told[2]) * (1 if told[3] == "more" else -1)
    assert change == pytest.approx(100 * (evaluation.dynamic.top1 - widest.top1), abs=0.006)


def test_demo_learns_and_writes_what_it_says(done):
    demo, out = done
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png",
        "checkpoint.safetensors",
        "results.json",
    ]
    best = max(route.top1 for route in demo.evaluation.routes)
    assert best > 0.3, "ten classes: three times chance after 50 steps"
    results = json.loads((out / "results.json").read_text())
    assert results["routes"][0]["top1"] == demo.evaluation.routes[0].top1
    assert results["environment"]["torch"] == torch.__version__
    with Image.open(out / "accuracy.png") as picture:
        assert picture.width > 800
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert len(colours) > 100, "an empty figure has few colours"


def test_saved_checkpoint_gives_the_same_numbers(done, capsys):
    """What `evaluate` reads back from disk is what the demo printed."""
    demo, out = done
    from dynaslim.demo import DATA

    checkpoint = str(out / "checkpoint.safetensors")
    assert cli.run(["evaluate", checkpoint, "--data", str(DATA), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps(demo.evaluation.to_dict()))
    assert again["routes"] == expected["routes"]
    assert again["dynamic"] == expected["dynamic"]
    assert read(checkpoint).class_names[9] == "Ankle boot"
    assert read(checkpoint).metrics == expected


def test_same_seed_same_numbers(done, tmp_path):
    demo, out = done
    again = run_demo(tmp_path, epochs=5, target=0.5, seed=0, train_images=1280)
    assert again.evaluation.to_dict() == demo.evaluation.to_dict()
    assert (tmp_path / "accuracy.png").read_bytes() == (out / "accuracy.png").read_bytes()
    weights = read(out / "checkpoint.safetensors").net.state_dict()
    for name, value in read(tmp_path / "checkpoint.safetensors").net.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_other_seed_other_numbers(done, tmp_path):
    demo, _ = done
    other = run_demo(tmp_path, epochs=1, target=0.5, seed=1, train_images=1280)
    assert other.evaluation.to_dict() != demo.evaluation.to_dict()
