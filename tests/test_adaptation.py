"""`dynaslim adapt`: from a trained network and images to a network that spends less."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from convertible import NETWORKS, trained
from helpers import bright_pngs, lively, run_ok, write_parquet

from dynaslim import cli
from dynaslim.adaptation import _Adaptation, _gains_or_widest, adapt
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cli.measure import trained_rows
from dynaslim.conversion import convert
from dynaslim.data import open_source
from dynaslim.data.images import open_images
from dynaslim.errors import CheckpointError, DataError, UsageError
from dynaslim.nn.sorting import sort_channels
from dynaslim.preprocessing import Preprocessing
from dynaslim.runs.context import Callbacks
from dynaslim.runs.folder import TRAINED_ON
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.package import open_package
from dynaslim.zoo import get_spec

MODEL = """
import torch
from torch import nn


def block(ins, outs, stride):
    return nn.Sequential(
        nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()
    )


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(block(3, 16, 2), block(16, 32, 1), block(32, 32, 2), block(32, 32, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """268 images of 4 classes by brightness, 108 of them held out, and 40 to test on."""
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder, bright_pngs(268), 4, "train")
    write_parquet(folder, bright_pngs(40), 4, "test")
    (folder / "model.py").write_text(MODEL)
    return folder


def _argv(data, out, *more):
    return [
        *(
            "adapt",
            f"module:{data / 'model.py'}:make_model",
            "--data",
            str(data),
            "--out",
            str(out),
        ),
        *("--image-size", "16", "--val-share", "0.4", "--batch-size", "16", "--epochs", "2"),
        *("--views", "2", "--save-every-s", "0", "--backend", "eager", *more),
    ]


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert cli.run(_argv(data, out)) == 0
    return out


def test_what_comes_of_it(adapted, data, capsys):
    """The result answers with the images' classes, has a curve, and the report shows the rest."""
    made, original = read(adapted), read(adapted / "original" / "best.safetensors")
    assert made.class_names == original.class_names
    assert made.budget is not None
    assert made.budget["images"] == 107
    images = open_images(made, data, "train")
    assert int(trained_rows(images, adapted / "gate.safetensors").sum()) == 161
    trunk = dict(read(adapted / "converted.safetensors").net.named_parameters())
    for checkpoint in (original, made):
        for name, value in checkpoint.net.named_parameters():
            if name.startswith("0."):  # before the gate
                assert torch.equal(value, trunk[name]), name
    page = (adapted / "report.html").read_text()
    assert "the original" in page
    assert "on this machine" in page
    lines = [json.loads(line) for line in (adapted / "supernet" / "metrics.jsonl").open()]
    assert lines[0]["kind"] == "teacher"
    assert cli.run(_argv(data, adapted, "--resume", "--json")) == 0  # all parts are there
    shown = json.loads(capsys.readouterr().out)
    kinds = [mode["kind"] for mode in shown["modes"]]
    assert (kinds.count("uniform"), kinds.count("baseline")) == (4, 1)
    assert shown["verdict"].startswith("It ")
    assert "on this machine" in shown["verdict"]


@pytest.mark.parametrize("part", ["original", "supernet"])
def test_a_run_that_is_killed_goes_on_where_it_was(adapted, data, tmp_path, monkeypatch, part):
    """Killed in the middle of an epoch, with the last snapshot an epoch old."""
    out, done = tmp_path / "run", Callbacks.after_step

    def killed(self, step, *args, **options):
        if step == 13 and self._context.folder.path.name == part:
            raise KeyboardInterrupt
        done(self, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Callbacks, "after_step", killed)
        assert cli.run(_argv(data, out, "--save-every-s", "1000")) == 130
    assert not (out / part / "results.json").exists()
    assert cli.run(_argv(data, out)) == 2  # is not begun anew by mistake
    if part == "supernet":  # whose recipe names files of the folder
        out = out.rename(tmp_path / "moved")
    assert cli.run(_argv(data, out, "--save-every-s", "1000", "--resume")) == 0
    ours, theirs = read(out).net.state_dict(), read(adapted).net.state_dict()
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def test_a_network_that_has_the_classes_is_the_original(adapted, data, tmp_path):
    out = tmp_path / "again"
    argv = _argv(data, out, "--epochs", "1")
    argv[1] = str(adapted)
    assert cli.run(argv) == 0
    assert not (out / "original").exists()
    assert not (out / "sorted.safetensors").exists()


@pytest.mark.parametrize("name", ["ds_mbnet_tiny", "ds_resnet8_cifar"])
def test_a_network_of_the_zoo_learns_other_classes(data, tmp_path, name):
    """With a trunk of its own for the largest, and without."""
    net = lively(get_spec(name), image_size=16)
    file = save(tmp_path / "zoo.safetensors", Checkpoint(net, preprocessing=Preprocessing(16)))
    (tmp_path / TRAINED_ON).write_text("of-its-own-training\n")
    done = adapt(
        file, data, tmp_path / "run", val_share=0.4, batch_size=16, epochs=1, backend="eager"
    )
    assert done.checkpoint.net.spec.num_classes == 4
    assert done.checkpoint.budget is not None
    record = (tmp_path / "run" / TRAINED_ON).read_text().splitlines()
    assert len(record) == 161 + 1
    assert "of-its-own-training" in record


def test_a_gate_that_gains_nothing_gives_way(adapted):
    """Below the line of the uniform routes it is replaced; on it or above, it stays."""
    checkpoint = read(adapted / "gate" / "gate_0.70.safetensors")
    routes = [{"madds": 100.0 * (n + 1), "top1": 0.5 + 0.1 * n} for n in range(4)]
    for top1, gains in ((0.65, True), (0.64, False)):
        dynamic = {"mean_madds": 250.0, "top1": top1}
        metrics = {"val": {"routes": routes, "dynamic": dynamic}}
        before = {"val": {"routes": routes, "dynamic": None}}
        made = _gains_or_widest(replace(copy.deepcopy(checkpoint), metrics=metrics), before)
        assert made.metrics == (metrics if gains else before)
        assert (made.recipe["target"] == 0.7) is gains
        engine = Engine(made, backend="eager")
        taken = engine(torch.randn(16, 3, 16, 16)).routes
        engine.close()
        assert gains or bool((taken == 3).all())


def test_several_sizes_become_a_cascade(data, tmp_path, capsys):
    out = tmp_path / "run"
    argv = _argv(data, out, "--sizes", "16,32", "--epochs", "1", "--backend", "onnxruntime")
    del argv[argv.index("--image-size") : argv.index("--image-size") + 2]
    shown = json.loads(run_ok(capsys, *argv, "--json"))
    made = open_package(out / "package")
    assert {rung.image_size_px for rung in made.source.spec.rungs} == {16, 32}
    assert made.preprocessing.image_size_px == 32
    assert made.budget is not None
    small, large = (read(out / name / "best.safetensors") for name in ("supernet_16", "supernet"))
    assert small.preprocessing.image_size_px == 16
    assert not torch.equal(small.net.tensor("2.0.weight"), large.net.tensor("2.0.weight"))
    assert torch.equal(small.net.tensor("0.0.weight"), large.net.tensor("0.0.weight"))
    assert [mode["kind"] for mode in shown["modes"]].count("baseline") == 1
    picture = tmp_path / "one.png"
    picture.write_bytes(bright_pngs(1)[0])
    assert cli.run(["predict", str(out / "package"), str(picture), "--json"]) == 0


def test_what_a_network_that_came_with_the_classes_was_measured_at_makes_no_rung(
    data, tmp_path, monkeypatch
):
    """Its accuracy is of other images, of another size perhaps."""
    names = open_source(data, "train").class_names
    net = lively(get_spec("ds_resnet8_cifar", num_classes=4), image_size=16)
    checkpoint = Checkpoint(net, names, Preprocessing(16))
    file, out = save(tmp_path / "zoo.safetensors", checkpoint), tmp_path / "run"
    given = {}
    with monkeypatch.context() as patch:
        patch.setattr(_Adaptation, "_trained", lambda *_: file)
        patch.setattr(_Adaptation, "_at_size", lambda *_: file.with_name("small"))
        patch.setattr(_Adaptation, "_cascade", lambda _, networks: given.update(networks=networks))
        patch.setattr(_Adaptation, "_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapt(file, data, out, sizes="16,32", val_share=0.4, batch_size=16, epochs=1)
    assert given["networks"] == [file.with_name("small"), file]


def test_minutes_are_planned(data, tmp_path, capsys):
    argv = _argv(data, tmp_path / "run", "--minutes", "0.05")
    del argv[argv.index("--epochs") : argv.index("--epochs") + 2]
    assert cli.run(argv) == 0
    assert "plan: " in capsys.readouterr().err
    planned = json.loads((tmp_path / "run" / "adapt.json").read_text())["epochs"]
    results = json.loads((tmp_path / "run" / "original" / "results.json").read_text())
    assert results["steps"] <= planned * 10


@pytest.mark.parametrize(("images", "epochs"), [(200, 30), (1_600, 8), (8_000, 4)])
def test_epochs_follow_from_the_number_of_images(data, tmp_path, monkeypatch, images, epochs):
    given = {}

    def stop(self, recipe, name):
        given[name] = recipe.epochs
        raise ZeroDivisionError

    counted = property(lambda _: images, lambda *_: None)
    monkeypatch.setattr(_Adaptation, "images", counted, raising=False)
    monkeypatch.setattr(_Adaptation, "_trained", stop)
    model = f"module:{data / 'model.py'}:make_model"
    with pytest.raises(ZeroDivisionError):
        adapt(model, data, tmp_path / "run", image_size=16, val_share=0.4)
    assert given == {"original": epochs}


@pytest.mark.parametrize("name", NETWORKS)
def test_sorting_a_converted_network_is_converting_it_with_images(name):
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    model = trained(name)
    net, expected = convert(model, x[:4]), convert(model, x[:4], images=[x])
    with torch.no_grad():
        before = net(x, net.spec.largest)
        sort_channels(net, [x])
        after = net(x, net.spec.largest)
        narrow, wanted = net(x, net.spec.smallest), expected(x, net.spec.smallest)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(narrow, wanted, rtol=1e-4, atol=1e-4)
    assert net.spec.sorted_by == expected.spec.sorted_by == "activation"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--minutes", "3"], "epochs and minutes"),
        (["--widths", "a,b"], "widths a,b"),
        (["--sizes", "16,32"], "sizes 16,32: give two or more, in place of an image_size"),
        (["--sizes", "16,x"], "sizes 16,x: expected numbers"),
        (["--val-share", "0.1"], "27 of 268 images held out, budgets need 100"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--gate-at", "9"], "gate at '9'"),
        (["--backend", "fast"], "backend 'fast': choose from auto, "),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, capsys, more, message):
    assert cli.run(_argv(data, tmp_path / "run", *more)) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]


def test_bad_data(data, tmp_path):
    write_parquet(tmp_path / "one", bright_pngs(300), 1, "train")
    with pytest.raises(DataError, match="has 1 class, needs at least two"):
        adapt(f"module:{data / 'model.py'}:make_model", tmp_path / "one", tmp_path / "run")
    write_parquet(tmp_path / "no test", bright_pngs(300), 4, "train")
    model, options = f"module:{data / 'model.py'}:make_model", {"sizes": "16,32", "val_share": 0.4}
    with pytest.raises(DataError, match="is reported on a test split, and there is none"):
        adapt(model, tmp_path / "no test", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_weights_may_be_for_another_number_of_classes(data, tmp_path, monkeypatch):
    given = {}

    def load(name, **options):
        given.update(options, name=name)
        raise UsageError("loaded")

    monkeypatch.setattr("dynaslim.adaptation.load_source", load)
    argv = ["adapt", "timm:resnet50", "--data", str(data), "--out", str(tmp_path / "run")]
    assert cli.run([*argv, "--weights", "mine.pth", "--num-classes", "37"]) == 2
    assert (given["name"], given["num_classes"]) == ("timm:resnet50", 37)


def test_a_checkpoint_needs_gates_and_preprocessing(data, tmp_path):
    model = trained("residual")
    net = convert(model, torch.randn(2, 3, 16, 16))
    save(tmp_path / "plain.safetensors", Checkpoint(net))
    with pytest.raises(CheckpointError, match="how images are prepared"):
        adapt(tmp_path / "plain.safetensors", data, tmp_path / "a", val_share=0.4)
    good = save(tmp_path / "good.safetensors", Checkpoint(net, preprocessing=Preprocessing(16)))
    with pytest.raises(UsageError, match="has weights of its own"):
        adapt(good, data, tmp_path / "b", val_share=0.4, weights=good)
    with pytest.raises(UsageError, match="has its own; leave it out"):
        adapt(good, data, tmp_path / "b", preprocessing=Preprocessing(16))
    own_trunk = lively(get_spec("ds_mbnet_tiny"), image_size=16)
    other = Checkpoint(own_trunk, preprocessing=Preprocessing(16))
    file = save(tmp_path / "own.safetensors", other)
    with pytest.raises(UsageError, match="views: the largest network of ds_mbnet_tiny has a wider"):
        adapt(file, data, tmp_path / "b", val_share=0.4, views=2, minutes=1)


def test_a_run_is_gone_on_with_as_it_was_started(adapted, data, capsys):
    assert cli.run(_argv(data, adapted, "--lr", "0.5", "--resume")) == 2
    assert "lr was 0.03, is 0.5" in capsys.readouterr().err
    assert cli.run(_argv(data, adapted, "--widths", "0.5,1", "--resume", "--force")) == 2
    assert "widths was 0.25,0.5,0.75,1, is 0.5,1" in capsys.readouterr().err


def test_in_python_a_module_brings_its_preprocessing(data, tmp_path):
    model = trained("residual")
    options = {"val_share": 0.4, "epochs": 1, "batch_size": 16, "views": 0, "backend": "eager"}
    with pytest.raises(UsageError, match="preprocessing"):
        adapt(model, data, tmp_path / "a", **options)
    with pytest.raises(UsageError, match="epoch"):
        adapt(model, data, tmp_path / "a", epoch=3)
    with pytest.raises(UsageError, match="weights: load them into the module"):
        adapt(model, data, tmp_path / "a", preprocessing=Preprocessing(16), weights="w.pth")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "converted.safetensors").write_bytes(b"of another model")
    options |= {"preprocessing": Preprocessing(32), "image_size": 16}
    done = adapt(model, data, tmp_path / "b", **options)
    assert done.checkpoint.preprocessing.image_size_px == 16
    assert done.checkpoint.budget is not None
    assert done.files["report"].exists()
