"""Models that ship, by name: a registry of the test's own stands in for the package's folder."""

import json
import shutil

import pytest
from helpers import fails, lively, micro_spec, png, run_ok

import dynaslim
from dynaslim import cli, shipped
from dynaslim.checkpoint import Checkpoint, save
from dynaslim.errors import CheckpointError, UsageError
from dynaslim.model_names import checkpoint_file
from dynaslim.predict import open_engine
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.export import export_package
from dynaslim.serve.options import ProcessOptions, ServeOptions

NAMES = ("bird", "ship", "cat", "frog", "deer")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("shipped") / "cifar10.safetensors"
    pre = Preprocessing(32, mean=(0.5,) * 3, std=(0.25,) * 3)
    return save(path, Checkpoint(lively(micro_spec()), NAMES, pre))


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A working folder with pictures; a model `cifar10` ships."""
    monkeypatch.setattr(shipped, "FOLDER", trained.parent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for n in range(3):
        (tmp_path / "photos" / f"{n}.png").write_bytes(png(n))
    return tmp_path


def _run(capsys, *argv):
    code = cli.run(["predict", *argv, "--backend", "eager"])
    return code, *capsys.readouterr()


def test_names_lead_to_files(here, trained):
    assert shipped.names() == ("cifar10",)
    assert shipped.path() == shipped.path("cifar10") == trained
    with pytest.raises(UsageError, match="'cifar11' does not ship with dynaslim: choose from cif"):
        shipped.path("cifar11")
    assert checkpoint_file("cifar10") == trained
    for name in ("./cifar10", "cifar11"):
        with pytest.raises(CheckpointError, match=r"cifar1[01]: no such file"):
            checkpoint_file(name)


def test_what_ships_is_listed_and_has_a_card():
    """Of the package's own folder: a name, a card of that name, and a default among them."""
    names = shipped.names()
    assert not names or shipped.DEFAULT in names
    for name in names:
        assert shipped.path(name).with_suffix(".md").read_text().startswith(f"# {name}")
        assert shipped.path(name).stat().st_size < 5e6
        checkpoint = dynaslim.read(name)
        assert checkpoint.budget
        assert checkpoint.class_names
        assert checkpoint.preprocessing
        assert {"val", "test"} <= set(checkpoint.metrics)


def test_a_file_of_that_name_comes_first_and_a_folder_does_not(here, trained):
    (here / "cifar10").mkdir()
    assert checkpoint_file("cifar10") == trained
    (here / "cifar10").rmdir()
    shutil.copy(trained, here / "cifar10")
    assert str(checkpoint_file("cifar10")) == "cifar10"


def test_a_name_is_a_checkpoint_everywhere(here, trained):
    assert dynaslim.load("cifar10").spec == dynaslim.load(trained).spec
    assert dynaslim.read("cifar10").class_names == NAMES
    assert dynaslim.Engine.from_checkpoint("cifar10", backend="eager").class_names == NAMES
    assert open_engine("cifar10", "eager").class_names == NAMES
    message = r"cifar11: no such file; .* or the name of a model that ships \(cifar10\)"
    with pytest.raises(CheckpointError, match=message):
        dynaslim.read("cifar11")


def test_verbs_that_take_more_than_checkpoints_know_the_name(here, trained, capsys, monkeypatch):
    from dynaslim.bench.models import open_engine as open_benched
    from dynaslim.cli import serving

    engine, side = open_benched("cifar10", "eager", None, "fp32", 4)
    assert (engine.class_names, side) == (NAMES, 32)
    with pytest.raises(UsageError, match="trained networks that ship: cifar10"):
        dynaslim.create_model("cifar-10")
    argv = ["report", "cifar10", "-o", "r.html", "--data", "photos"]
    assert cli.run(argv) != 0
    assert "photos" in capsys.readouterr().err, "not the name, the images are at fault"
    names = []
    monkeypatch.setattr("dynaslim.serve.server.serve", lambda m, *_, **__: names.extend(m) or 0)
    for model in ("cifar10", "./cifar10"):
        assert serving.serve((model,), process=ProcessOptions(), options=ServeOptions()) == 0
    assert names == ["cifar10=cifar10", "./cifar10"]


def test_a_package_of_that_name_comes_first(here):
    other = Checkpoint(lively(micro_spec(), seed=1), None, dynaslim.read("cifar10").preprocessing)
    export_package(other, here / "cifar10")
    assert open_engine("cifar10", "onnxruntime").class_names is None


@pytest.mark.parametrize(
    "argv",
    [
        ["photos"],
        ["photos/0.png", "photos/1.png", "photos/2.png"],
        ["photos/*.png"],
        ["cifar10", "photos"],
        ["--model", "cifar10", "photos"],
        ["--model", "{trained}", "photos"],
        ["{trained}", "photos"],
    ],
)
def test_predict_by_name_by_flag_by_file_or_by_none_of_them(here, trained, argv, capsys):
    code, out, err = _run(capsys, *(a.format(trained=trained) for a in argv), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["predicted"] == 3
    assert found["model"] == (str(trained) if "{trained}" in argv else "cifar10")
    assert {image["class_name"] for image in found["images"]} <= set(NAMES)


def test_pictures_to_try_come_with_it(capsys):
    """Drawings, of which it takes most for what they are; `models` prints where they are."""
    printed = run_ok(capsys, "models")
    assert str(shipped.PICTURES) in printed
    code, out, err = _run(capsys, str(shipped.PICTURES), "--json")
    assert (code, err) == (0, "")
    images = json.loads(out)["images"]
    assert len(images) == 10
    assert sum(image["file"].endswith(f"/{image['class_name']}.png") for image in images) >= 7


def test_predict_does_not_take_a_run_for_pictures(here, trained, capsys):
    run = here / "runs" / "demo"
    run.mkdir(parents=True)
    shutil.copy(trained, run / "checkpoint.safetensors")
    (run / "accuracy.png").write_bytes(png(1))
    code, out, err = _run(capsys, "runs/demo")
    assert (code, out) == (2, "")
    assert "runs/demo: is taken for the model; name image files" in err
    code, out, _ = _run(capsys, "runs/demo", "photos/0.png")
    assert code == 0
    assert out.rstrip().endswith("by runs/demo"), "a run's folder stands for its network"
    code, out, _ = _run(capsys, "--model", "cifar10", "runs/demo")
    assert code == 0
    assert out.rstrip().endswith("images/s, by cifar10")
    (here / "empty").mkdir()
    assert "empty: holds no images" in _run(capsys, "empty")[2]


def test_predict_refuses_what_is_not_clear(here, trained, capsys):
    (here / "cifar10").mkdir()
    (here / "cifar10" / "0.png").write_bytes(png())
    for argv, message in [
        (["cifar10"], "cifar10: is a folder here, and a model that ships; give --model cifar10"),
        (["cifar10", "photos"], "or ./cifar10 for the folder"),
        ([str(trained), "photos", "--model", "cifar10"], "and --model cifar10 names one too"),
        ([str(trained)], "is taken for the model; name image files, folders or patterns"),
        (["nowhere.png"], "nowhere.png: no such file or folder"),
    ]:
        fails(capsys, ["predict", *argv], 2, message)
    for argv in (["--model", "cifar10", "cifar10"], ["./cifar10"]):
        code, out, _ = _run(capsys, *argv, "--json")
        assert code == 0
        assert json.loads(out)["predicted"] == 1
