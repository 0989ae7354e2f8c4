import io
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import run_ok
from PIL import Image
from rich.console import Console

from dynaslim import Engine
from dynaslim.checkpoint import read
from dynaslim.cli.output import evaluation_table, saving
from dynaslim.data import load_images, open_source
from dynaslim.data.layout import MINI
from dynaslim.data.transforms import normalise
from dynaslim.demo import README_TOP1, run_demo
from dynaslim.recipes import DemoOptions
from dynaslim.runs.context import busy


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return run_demo(out, DemoOptions(epochs=5), train_images=1280), out


def test_what_was_saved_in_a_sentence(done):
    evaluation = done[0].evaluation
    sentence = re.fullmatch(
        r"Against the widest route the gate saves (\d+)% of the multiply-adds, for ([\d.]+) points "
        r"of top-1 (less|more)\.",
        saving(evaluation),
    )
    widest = evaluation.routes[-1]
    assert int(sentence[1]) == round(100 * (1 - evaluation.dynamic.mean_madds / widest.madds))
    change = float(sentence[2]) * (1 if sentence[3] == "more" else -1)
    assert change == pytest.approx(100 * (evaluation.dynamic.top1 - widest.top1), abs=0.006)


def test_demo_learns_and_writes_what_it_reports(done):
    demo, out = done
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png",
        "checkpoint.safetensors",
        "metrics.jsonl",
        "results.json",
    ]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 10 * len(lines) + 1, 10))
    assert lines[-1]["largest"] < lines[0]["largest"]
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
    checkpoint = str(out / "checkpoint.safetensors")
    again = json.loads(run_ok(capsys, "evaluate", checkpoint, "--data", str(MINI), "--json"))
    expected = json.loads(json.dumps(demo.evaluation.to_dict()))
    assert again["routes"] == expected["routes"]
    assert again["dynamic"] == expected["dynamic"]
    assert read(checkpoint).class_names[9] == "Ankle boot"
    assert read(checkpoint).metrics == expected


def test_the_budget_gives_what_the_demo_reports(done):
    """The checkpoint brings its curve, and the engine does with it what was printed."""
    demo, out = done
    checkpoint = read(out / "checkpoint.safetensors")
    test = load_images(open_source(MINI, "test"), checkpoint.preprocessing)
    engine = Engine(checkpoint, backend="eager", cache_dir=None)
    x = normalise(test.images_NCSS, checkpoint.preprocessing)
    given = engine(x, budget=0.5)
    reported = json.loads((out / "results.json").read_text())["budget"]
    assert reported["asked"] == 0.5
    assert float(given.madds.mean()) == pytest.approx(reported["mean_madds"], rel=1e-3)
    top1 = float((given.logits.argmax(1) == test.labels_N).float().mean())
    assert top1 == pytest.approx(reported["top1"], abs=0.001), "a rounding may move an image or two"
    table, words = io.StringIO(), saving(demo.evaluation, demo.budgeted)
    Console(file=table, width=120).print(evaluation_table(demo.evaluation, demo.budgeted))
    assert f"{reported['top1']:.2%}" in table.getvalue().split("dynamic (budget 0.5)")[1]
    assert re.search(
        r"\nA budget of 0\.5 saves \d+%, for [\d.]+ points (less|more): \d+% of the images "
        r"escalated",
        words,
    )


def test_it_reports_how_far_it_is_from_the_readme(done):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = [float(top1) for top1 in re.findall(r"M +([\d.]+)%", readme)]
    assert [round(100 * top1, 2) for top1 in README_TOP1.values()] == shown[3:6]
    sentence = done[0].beside_readme()
    apart = [float(points) for points in re.findall(r"[+-]\d+\.\d\d", sentence)]
    evaluation = done[0].evaluation
    own = (evaluation.routes[-1].top1, evaluation.dynamic.top1, done[0].budgeted[1].top1)
    assert apart == pytest.approx(
        [100 * top1 - of for top1, of in zip(own, shown[3:6], strict=True)], abs=0.006
    )


def test_a_busy_machine_is_reported():
    assert busy(0.3, 2, 2) is None
    assert busy(9.0, 2, 1) is None, "one thread waits for no other"
    assert busy(3.0, 64, 64) is None
    message = busy(7.94, 2, 2)
    assert "load 7.9 on 2 cores" in message
    assert message.endswith("OMP_NUM_THREADS=1")
    assert busy(40.0, 64, 64).endswith("OMP_NUM_THREADS=24")


def test_same_seed_same_numbers(done, tmp_path):
    demo, out = done
    again = run_demo(tmp_path, DemoOptions(epochs=5), train_images=1280)
    assert again.evaluation.to_dict() == demo.evaluation.to_dict()
    assert (tmp_path / "accuracy.png").read_bytes() == (out / "accuracy.png").read_bytes()
    weights = read(out / "checkpoint.safetensors").net.state_dict()
    for name, value in read(tmp_path / "checkpoint.safetensors").net.state_dict().items():
        assert torch.equal(value, weights[name]), name
