"""Runs to report on, as training leaves them; made by hand, which is faster."""

import json

import pytest
from report_runs import HOSTILE, PRE, TARGETS, held_images, make_net, recipes, write_images

from dynaslim.checkpoint import Checkpoint, save
from dynaslim.evaluation import evaluate


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """80 images to train on, of which 20 are held out, and 40 others; names that mean harm."""
    folder = tmp_path_factory.mktemp("data <b>&")
    write_images(folder, "train", 80, HOSTILE)
    write_images(folder, "test", 40, HOSTILE)
    return folder


@pytest.fixture(scope="session")
def gate_run(tmp_path_factory, data):
    """A run of three gates whose supernet's curves lie beside it, as training leaves them."""
    folder = tmp_path_factory.mktemp("runs <i>")
    first, run = folder / "supernet", folder / "gates"
    first.mkdir()
    run.mkdir()
    val = [{"kind": "val", "step": s, "top1": [0.2, 0.3, 0.4]} for s in (100, 200, 300)]
    train = [
        {
            "kind": "train",
            "step": s,
            "lr": 0.1,
            "largest": 300 / s,
            "randoms": [1, 2],
            "smallest": 2,
        }
        for s in range(1, 300)
    ]
    (first / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in train + val))
    for number, target in enumerate(TARGETS):
        net = make_net(number)
        metrics = {"val": evaluate(net, held_images(data), PRE).to_dict()}
        recipe = recipes(data, target=target, supernet=str(first / "last.safetensors"))
        save(run / f"gate_{target:.2f}.safetensors", Checkpoint(net, HOSTILE, PRE, metrics, recipe))
    start = {
        "started": "2026-01-01T00:00:00+0000",
        "command": ["/usr/bin/dynaslim", "train", "gate", "--out", "<script>2"],
        "processor": "<script>3",
        "cores": 2,
        "torch": "2.6",
    }
    (run / "environment.json").write_text(json.dumps([start]))
    (run / "results.json").write_text(json.dumps({"stage": "gate"}))
    return run


@pytest.fixture(scope="session")
def gate_page(gate_run):
    """The report of that run, timed; what most tests look at."""
    from dynaslim.report import ReportOptions, build_report

    return build_report(gate_run, ReportOptions(backend="eager", rounds=2))
