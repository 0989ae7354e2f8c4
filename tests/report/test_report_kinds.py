"""Every kind of run has a report, or one line with the reason why it has none."""

import dataclasses
import json
import re

import pytest
import torch
from helpers import fails, lively, lively_net, micro_spec, run_ok
from report_runs import (
    HOSTILE,
    PRE,
    TARGETS,
    Page,
    held_images,
    make_net,
    recipes,
    write_images,
)

import dynaslim
from dynaslim import cli
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.data import open_source
from dynaslim.data.images import ImageDataset
from dynaslim.data.layout import MINI
from dynaslim.errors import CheckpointError, DataError, UsageError
from dynaslim.evaluation import evaluate
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import GateRecipe, SupernetRecipe
from dynaslim.report import ReportOptions, build_report, make_report, text
from dynaslim.spec import NetSpec, StageSpec

ALL_PARTS = ["costs", "classes", "images", "confidence", "confusion", "making"]
STORED_PARTS = ["costs", "classes", "making"]


def _page(*args, **options):
    return Page(make_report(*args, rounds=0, **options))


def _modes(page):
    return {row[0]: row for row in page.rows(["", "MAdds", "of the widest"])}


# -- runs -----------------------------------------------------------------------------------------


def test_target_picks_the_gate_of_the_details(gate_run, data):
    built = build_report(gate_run, ReportOptions(target=0.8, rounds=0))
    assert built.summary["target"] == 0.8
    dynamic = evaluate(make_net(2), held_images(data), PRE, routes=()).dynamic
    assert built.summary["dynamic"]["top1"] == dynamic.top1
    assert f"is right on {dynamic.top1:.2%}" in built.summary["headline"]
    assert len([name for name in _modes(Page(built.html)) if name.startswith("dynamic")]) == 3
    with pytest.raises(UsageError, match=r"--target 0\.5: .* has gates for 0\.4, 0\.6, 0\.8"):
        make_report(gate_run, target=0.5)


@pytest.fixture(scope="module")
def supernet_run(tmp_path_factory, data):
    """A run of stage I that has been stopped: there is a best checkpoint only."""
    run = tmp_path_factory.mktemp("supernet")
    checkpoint = Checkpoint(make_net(), HOSTILE, PRE, {}, recipes(data, gated=False))
    save(run / "best.safetensors", checkpoint)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "largest": 2.0}\n{"kind"')
    return run


def test_supernet_has_no_dynamic_mode(supernet_run, data):
    page = _page(supernet_run)
    result = evaluate(make_net(), held_images(data), PRE, dynamic=False)
    widest = result.routes[-1]
    assert f"is right on {widest.top1:.2%} of 20 images along its widest route" in page.text
    assert "whose gates are not trained yet" in page.text
    assert list(_modes(page)) == [str(route) for route in make_net().spec.routes]
    # one step makes no curve, and half a line none at all; the rest is of the widest route
    assert [part for part in page.parts if part != "training"] == ALL_PARTS
    assert "probability of the chosen width" not in page.text
    assert "The widest route's answers" in page.text
    assert page.rows(["class", "images", "top-1"])[0][2] == f"{0:.2%}"
    assert "dynaslim train gate --supernet" in page.text
    better = save(supernet_run / "last.safetensors", read(supernet_run / "best.safetensors"))
    assert build_report(supernet_run, ReportOptions(rounds=0)).summary["checkpoint"] == str(better)


def test_real_runs_of_both_stages(tmp_path, capsys):
    """What the verbs of training leave, unchanged."""
    names = tuple("abcd")
    write_images(tmp_path / "images", "train", 64, names)
    common = ["--data.path", str(tmp_path / "images"), "--data.image-size-px", "16"]
    common += ["--batch-size", "16", "--data.val-share", "0.25", "--log-every", "1"]
    first = tmp_path / "first"
    argv = ["train", "supernet", *common, "--epochs", "2", "--out", str(first)]
    assert cli.run([*argv, "--calibration-batches", "1"]) == 0
    second = tmp_path / "second"
    argv = ["train", "gate", *common, "--supernet", str(first / "last.safetensors")]
    argv += ["--objective", "sgs", "--epochs", "1", "--targets", "0.9,0.5"]
    assert cli.run([*argv, "--out", str(second)]) == 0
    capsys.readouterr()
    page = _page(first)
    assert page.parts == [*ALL_PARTS[:4], "training", *ALL_PARTS[4:]]
    page = _page(second, target=0.9)
    assert page.parts == [*ALL_PARTS[:4], "training", *ALL_PARTS[4:]]
    assert "Stage I: the supernet" in page.text
    (losses,) = (t for t in page.tables if t[0][:2] == ["step", "classification"])
    assert [int(row[0]) for row in losses[1:]] == [1, 2, 3], "0.9 was trained first"
    assert losses[0] == ["step", "classification", "sgs", "cost"]
    (losses,) = (
        t for t in _page(second, target=0.5).tables if t[0][:2] == ["step", "classification"]
    )
    assert [int(row[0]) for row in losses[1:]] == [4, 5, 6]
    results = json.loads((second / "results.json").read_text())
    for gate in results["gates"]:
        row = _modes(page)[f"dynamic, target {gate['target']:g}"]
        assert row[3] == f"{gate['val']['dynamic']['top1']:.2%}", "as the run measured it"


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """What the demo leaves, but for the training."""
    folder = tmp_path_factory.mktemp("demo")
    names = open_source(MINI, "test").class_names
    recipe = {"supernet": SupernetRecipe().to_dict(), "gate": GateRecipe(targets=0.5).to_dict()}
    checkpoint = Checkpoint(lively_net("ds_mbnet_tiny"), names, Preprocessing(32), {}, recipe)
    save(folder / "checkpoint.safetensors", checkpoint)
    results = {"environment": {"torch": "2.6.1", "threads": 3}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_a_folder_of_save_pretrained_stands_for_its_checkpoint(demo_folder, tmp_path):
    dynaslim.read(demo_folder / "checkpoint.safetensors").save_pretrained(tmp_path / "saved")
    built = build_report(tmp_path / "saved", ReportOptions(images=24, rounds=0))
    assert built.summary["images"] == 24
    assert "Sandal" in Page(built.html).text


@pytest.mark.parametrize("name", ["", "checkpoint.safetensors"])
def test_demo_is_evaluated_on_the_images_that_ship(demo_folder, name):
    built = build_report(demo_folder / name, ReportOptions(images=24, rounds=0))
    page = Page(built.html)
    assert built.summary["data"] == str(MINI)
    assert (built.summary["images"], built.summary["split"]) == (24, "test")
    assert page.parts == ALL_PARTS
    assert "24 images at random of 2,000" in page.text
    assert "Sandal" in page.text
    if not name:
        assert "dynaslim demo --epochs 10 --target 0.5 --seed 0" in page.text
        assert ["torch", "2.6.1"] in [row for table in page.tables for row in table]
        assert ["threads", "3"] in [row for table in page.tables for row in table]


def test_one_channel(tmp_path):
    write_images(tmp_path / "grey", "test", 20, "abcde", channels=1)
    pre = Preprocessing(16, mean=(0.5,), std=(0.125,))
    file = save(
        tmp_path / "grey.safetensors", Checkpoint(make_net(in_channels=1), tuple("abcde"), pre)
    )
    page = _page(file, data=str(tmp_path / "grey"))
    assert page.parts == ALL_PARTS
    assert "1 channel" in page.text
    images = [given["src"] for tag, given in page.elements if tag == "img"]
    assert len(images) >= 20
    assert all(source.startswith("data:image/png") for source in images)


def test_large_pictures_are_made_smaller():
    from dynaslim.report.sections import data_uri

    pixels = torch.randint(0, 256, (3, 500, 500), dtype=torch.uint8).numpy()
    assert data_uri(pixels).startswith("data:image/jpeg")
    assert len(data_uri(pixels)) < 30_000
    assert data_uri(pixels[:1, :40, :40]).startswith("data:image/png")


def test_a_thousand_classes_stay_bounded(tmp_path):
    names = [f"class {n}" for n in range(1000)]
    write_images(tmp_path / "many", "test", 200, names)
    net = lively(micro_spec(num_classes=1000), image_size=16)
    file = save(tmp_path / "many.safetensors", Checkpoint(net, tuple(names), PRE))
    built = build_report(file, ReportOptions(data=str(tmp_path / "many"), rounds=0))
    assert len(built.html) < 700_000
    page = Page(built.html)
    assert len(page.rows(["class", "images", "top-1"])) == 24
    assert "of 200 classes the first and the last 12" in page.text
    assert len(page.rows(["class", "taken for"])) == 20
    assert not [t for t in page.tables if t[0][0].startswith("class ↓")]


def test_of_many_routes_the_most_used_are_shown(tmp_path):
    """Two gates with three choices each."""
    names = tuple("abcde")
    write_images(tmp_path / "data", "test", 60, names)
    net, pre = lively(micro_spec().with_choices((0, 1, 2)), image_size=16), PRE
    file = save(tmp_path / "net.safetensors", Checkpoint(net, names, pre))
    page = _page(file, data=str(tmp_path / "data"))
    taken = page.rows(["route", "MAdds", "images"])
    result = evaluate(net, ImageDataset.of(open_source(tmp_path / "data"), pre), pre, routes=())
    shares = sorted((one.share for one in result.dynamic.route_shares), reverse=True)
    assert len(shares) > 6, "the network is such that many routes are taken"
    assert taken[-1][0] == f"{len(shares) - 6} other routes"
    shown = sorted((int(row[2]) for row in taken[:-1]), reverse=True)
    assert shown == [round(60 * share) for share in shares[:6]]
    costs = [float(row[1].removesuffix(" M")) for row in taken[:-1]]
    assert costs == sorted(costs)
    bars = next(t[1:] for t in page.tables if t[0][-1:] == ["mean MAdds"] and t[0][0] == "")
    for row in bars:
        assert sum(float(cell.rstrip("%")) for cell in row[1:-1]) == pytest.approx(100, abs=0.5)


# -- images ---------------------------------------------------------------------------------------


def _stored(tmp_path, data, **changes):
    """A checkpoint whose images are gone, and what it has stored."""
    loaded = read(data)
    recipe = recipes("/no/where", target=0.6)
    loaded = dataclasses.replace(loaded, recipe=recipe, **changes)
    return save(tmp_path / "gone.safetensors", loaded)


def test_without_images_what_was_stored_is_reported(gate_run, tmp_path):
    file = _stored(tmp_path, gate_run / "gate_0.60.safetensors")
    built = build_report(file, ReportOptions(backend="eager", rounds=2))
    page = Page(built.html)
    assert page.parts == STORED_PARTS
    (note,) = (note for note in built.summary["notes"] if "images to evaluate on" in note)
    assert "the run's images are not at /no/where here" in note
    assert "--data PATH" in note
    assert note in page.text
    stored = read(file).metrics["val"]
    rows = _modes(page)
    assert rows["dynamic, target 0.6"][3] == f"{stored['dynamic']['top1']:.2%}"
    for route in stored["routes"]:
        row = rows[text.widths_of(route["widths"])]
        assert (row[1], row[3]) == (text.millions(route["madds"]), f"{route['top1']:.2%}")
    # times need no images: the routes are taken in the shares that were stored
    assert built.summary["dynamic"]["ms"] > 0
    assert "in the shares that were stored" in page.text
    assert built.summary["dynamic"]["against_widest"] is None


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"val": 3},
        {"val": {"images": 20, "routes": [{"widths": [1]}], "dynamic": None, "per_class": []}},
        {"images": float(0), "routes": [], "dynamic": None, "per_class": []},
    ],
)
def test_nothing_stored_either(gate_run, tmp_path, metrics):
    file = _stored(tmp_path, gate_run / "gate_0.60.safetensors", metrics=metrics)
    built = build_report(file, ReportOptions(rounds=0))
    page = Page(built.html)
    assert page.parts == ["making"]
    assert "has not been measured yet" in page.text
    assert "gone.safetensors has no accuracies stored." in page.text
    assert built.summary["dynamic"] is None
    assert built.summary["routes"] == []


def test_named_images_and_their_split(gate_run, data):
    built = build_report(gate_run, ReportOptions(data=str(data), rounds=0))
    assert (built.summary["images"], built.summary["split"]) == (40, "test")
    assert "evaluate it" in Page(built.html).text
    other = build_report(gate_run, ReportOptions(split="test", rounds=0))
    assert other.summary["images"] == 40
    assert built.summary["notes"] == other.summary["notes"]
    assert [note for note in built.summary["notes"] if "--rounds 0" not in note] == []
    trained = build_report(gate_run, ReportOptions(split="train", rounds=0)).summary
    assert trained["images"] == 80
    assert any("was trained on these images" in note for note in trained["notes"])


def test_images_that_do_not_fit(gate_run, tmp_path, data):
    write_images(tmp_path / "four", "test", 8, "abcd")
    with pytest.raises(DataError, match="has 4 classes, the network has 5"):
        make_report(gate_run, data=str(tmp_path / "four"))
    with pytest.raises(DataError, match="no such file or folder"):
        make_report(gate_run, data=str(tmp_path / "nowhere"))
    bare = save(tmp_path / "bare.safetensors", Checkpoint(make_net(), HOSTILE))
    with pytest.raises(CheckpointError, match="does not say how images are prepared"):
        make_report(bare, data=str(data))
    page = Page(make_report(bare))
    assert page.parts == ["making"]
    assert "its image size is unknown" in page.text


def test_unreadable_images_are_named(tmp_path, data):
    import datasets

    source = open_source(data, "test")
    rows = {"image": [], "label": []}
    for number, entry in enumerate(source):
        broken = b"no image" if number == 3 else entry.read()
        rows["image"].append({"bytes": broken, "path": None})
        rows["label"].append(entry.label)
    table = datasets.Dataset.from_dict(rows, features=source.dataset.features)
    (tmp_path / "broken").mkdir()
    table.to_parquet(tmp_path / "broken" / "test.parquet")
    file = save(tmp_path / "net.safetensors", Checkpoint(make_net(), HOSTILE, PRE))
    built = build_report(file, ReportOptions(data=str(tmp_path / "broken"), rounds=0))
    assert built.summary["images"] == 39
    assert any(re.match(r"1 image could .*row 3", note) for note in built.summary["notes"])


def test_network_without_gates_and_images_by_no_name(tmp_path):
    spec = NetSpec("plain", (StageSpec((4,), block="conv", stride=2), StageSpec((6,))), 4)
    write_images(tmp_path / "data", "test", 12, "abcd")
    file = save(tmp_path / "plain.safetensors", Checkpoint(lively(spec), None, PRE))
    page = Page(make_report(file, data=str(tmp_path / "data"), rounds=2))
    assert page.parts == ALL_PARTS
    assert "Milliseconds are left out: the engine does not run plain, it has no gates" in page.text
    assert "is right on" in page.text
    assert "along its cheapest" not in page.text


# -- budgets and baselines ------------------------------------------------------------------------


def test_budgets_are_measured_on_the_images_and_timed(gate_run, tmp_path, data):
    from dynaslim.data.transforms import readable_batches
    from dynaslim.runtime.budget_search import fit_curve
    from dynaslim.runtime.calibrate_budget import answer_paths

    loaded = read(gate_run / "gate_0.60.safetensors")
    answers = answer_paths(loaded.net, readable_batches(held_images(data), PRE, 8))
    curve = fit_curve(answers)
    file = save(tmp_path / "curve.safetensors", dataclasses.replace(loaded, budget=curve.to_dict()))
    rows = _modes(Page(make_report(file, backend="eager", rounds=2)))
    budgets = [row for name, row in rows.items() if name.startswith("budget")]
    assert len(budgets) == min(8, len(curve.points)) > 1
    assert budgets[-1][3] == rows[str(loaded.net.spec.widest_choice)][3], "the widest route itself"
    assert all(row[5].endswith(" ms") for row in budgets)
    images = len(answers)
    assert all(float(row[3].rstrip("%")) * images % 100 == pytest.approx(0) for row in budgets)
    stored = _stored(tmp_path, file)
    rows = _modes(_page(stored))
    assert rows[f"budget {curve.points[0].share:.3f}"][3] == f"{curve.points[0].top1:.2%}"
    broken = {**curve.to_dict(), "points": []}
    stored = save(tmp_path / "b.safetensors", dataclasses.replace(loaded, budget=broken))
    assert "The budget curve is left out: budget curve: points has no point" in _page(stored).text


def test_baselines(gate_run, tmp_path):
    file = tmp_path / "others.json"
    entries = [
        {"name": "<b>small</b>", "top1": 0.25, "madds": 9000, "ms": 0.5},
        {"name": "timed", "top1": 0.5, "ms": 2},
    ]
    file.write_text(json.dumps(entries))
    page = Page(make_report(gate_run, baselines=file, backend="eager", rounds=2))
    rows = _modes(page)
    assert rows["<b>small</b>"][1:4:2] == ["0.01 M", "25.00%"]
    assert rows["timed"][1:6] == [text.NONE, text.NONE, "50.00%", text.NONE, "2.00 ms"]
    assert page.text.count("static networks to compare with") >= 2
    # found where it lies beside the run, without being named
    run = tmp_path / "run"
    run.mkdir()
    save(run / "gate.safetensors", read(gate_run / "gate_0.60.safetensors"))
    (run / "baselines.json").write_text(json.dumps(entries))
    assert "timed" in _modes(_page(run))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[3]", "entry 0: 3: expected object"),
        ("{}", "not a list of at most 50 baselines"),
        ('[{"top1": 0.5, "ms": 1}]', "entry 0: has no 'name'"),
        ('[{"name": "a", "top1": 70, "ms": 1}]', "entry 0: top1 70: expected float <= 1"),
        ('[{"name": "a", "top1": 0.7}]', "give madds or ms"),
        ('[{"name": "a", "top1": 0.7, "ms": -1}]', "ms -1: expected float >= 0"),
        ('[{"name": "a", "top1": 0.7, "ms": NaN}]', "NaN: must be a finite number"),
        (
            '[{"name": "a", "top1": 0.7, "ms": 1, "flops": 1}]',
            "entry 0: has an unknown key 'flops'",
        ),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_baselines_that_are_none(gate_run, tmp_path, content, message):
    file = tmp_path / "others.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        make_report(gate_run, baselines=file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


# -- folders that are none ------------------------------------------------------------------------


def test_damaged_files_beside_the_checkpoint_are_reported(tmp_path, data):
    run = tmp_path / "run"
    run.mkdir()
    save(run / "gate.safetensors", Checkpoint(make_net(), HOSTILE, PRE, {}, recipes(data)))
    (run / "results.json").write_text("{")
    (run / "environment.json").write_text('{"a": 1}')
    (run / "metrics.jsonl").write_bytes(
        b'\xff\n[]\n{"kind": "train"}\n{"kind": "train", "step": "x"}\n'
    )
    page = _page(run)
    assert "results.json cannot be read" in page.text
    assert "environment.json cannot be read" in page.text
    assert page.parts == ALL_PARTS


def test_strange_metrics_draw_what_they_can(tmp_path, data):
    run = tmp_path / "run"
    run.mkdir()
    save(
        run / "last.safetensors",
        Checkpoint(make_net(), HOSTILE, PRE, {}, recipes(data, gated=False)),
    )
    lines = [
        {"kind": "train", "step": 1, "<b>": 1.0, "text": "x", "list": [1, "y"], "none": None},
        {"kind": "train", "step": 2, "<b>": 2.0},
        {"kind": "val", "step": 2, "top1": "high"},
        {"kind": "val", "step": 3, "top1": []},
    ]
    body = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(body + '{"kind": "train", "step": 3, "<b>": NaN}\n')
    page = _page(run)
    (losses,) = (t for t in page.tables if t[0][0] == "step")
    assert losses == [["step", "<b>"], ["1", "1"], ["2", "2"]]


def test_folders_that_hold_no_run(tmp_path, capsys, gate_run):
    out = tmp_path / "report.html"
    out.write_text("older")

    def argv(run, *more):
        return ["report", run, "-o", out, "--rounds", "0", *more]

    fails(capsys, argv(tmp_path / "nowhere"), 1, "nowhere: no such file; expected a checkpoint")
    (tmp_path / "empty").mkdir()
    fails(capsys, argv(tmp_path / "empty"), 2, "empty: holds no run; expected a checkpoint file")
    (tmp_path / "empty" / "photo.jpg").write_bytes(b"x")
    fails(capsys, argv(tmp_path / "empty"), 2, "empty: holds no run")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    fails(capsys, argv(tmp_path / "empty"), 2, "empty: the run has written no checkpoint yet")
    fails(capsys, argv(tmp_path / "empty" / "photo.jpg"), 1, "photo.jpg: not a readable checkpoint")
    fails(capsys, argv(gate_run, "--target", "0.5"), 2, "has gates for 0.4, 0.6, 0.8")
    fails(capsys, argv(gate_run, "--images", "0"), 2, "--images 0: must be at least 1")
    fails(capsys, argv(gate_run, "--baselines", "none.json"), 2, "none.json: cannot be read")
    fails(capsys, ["report", gate_run, "-o", tmp_path], 2, "is a folder; name a file to write")
    no_target = gate_run / "gate_0.60.safetensors"
    fails(capsys, argv(no_target, "--target", "0.4"), 2, "has gates for 0.6")
    fails(capsys, ["report", no_target, "--backend", "none"], 2, "backend 'none'")
    assert out.read_text() == "older", "an older page stays when there is no new one"
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_verb(tmp_path, capsys, gate_run, monkeypatch):
    argv = ["report", str(gate_run), "--rounds", "0"]
    made = json.loads(run_ok(capsys, *argv, "-o", str(tmp_path / "new" / "a.html"), "--json"))
    page = (tmp_path / "new" / "a.html").read_text(encoding="utf-8")
    assert made["out"] == str(tmp_path / "new" / "a.html")
    assert made["headline"] in Page(page).text
    monkeypatch.chdir(tmp_path)
    out = run_ok(capsys, *argv, "--title", "Parts & <line> 4")
    assert out.endswith(f"report.html: {made['headline']}\n")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Parts & <line> 4" in page.text
    for target in TARGETS:
        assert f"dynamic, target {target:g}" in page.text
