"""Stage I from a checkpoint: the same classes, other ones, and what does not fit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import (
    assert_rows_close,
    bright_pngs,
    lively,
    micro_spec,
    noise,
    write_levels,
    write_parquet,
)

from dynaslim import cli
from dynaslim.checkpoint import Checkpoint, read, save, with_classes
from dynaslim.errors import UsageError
from dynaslim.nn.sorting import widest_only
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import DataRecipe, OptimRecipe, SupernetRecipe
from dynaslim.runs import RunOptions, run_supernet, supernet
from dynaslim.runs.context import Callbacks, opened
from dynaslim.zoo import get_spec, write_spec

NAMES = tuple(f"class {n}" for n in range(4))  # those of the images
CHOICES = ((1, 2), (0, 1))


def _with_widths(spec, stage, widths):
    stages = list(spec.stages)
    stages[stage] = replace(stages[stage], widths=widths)
    return spec.replace(stages=tuple(stages))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of four classes, the spec of a small network, and checkpoints of it."""
    root = tmp_path_factory.mktemp("init")
    write_parquet(root / "images", bright_pngs(64), 4, "train")
    write_spec(root / "micro.yaml", micro_spec())
    spec = micro_spec(num_classes=4).with_choices(*CHOICES)
    wide = widest_only(spec.replace(name="plain"))
    made = [("same", NAMES, spec), ("others", tuple("abcd"), spec)]
    made += [("wide", NAMES, wide), ("wide_others", tuple("abcd"), wide)]
    made += [
        ("half", NAMES, _with_widths(wide, 2, (8,))),
        ("mixed", NAMES, _with_widths(wide, 0, (4, 6))),
    ]
    for seed, (name, classes, of) in enumerate(made):
        net = lively(of, seed=seed + 1)
        preprocessing = Preprocessing(16, mean=(0.4,) * 3, std=(0.3,) * 3)
        checkpoint = Checkpoint(net, class_names=classes, preprocessing=preprocessing)
        save(root / f"{name}.safetensors", checkpoint)
    return root


def _recipe(folder, name, *, lr=1e-9, **data):
    """Four steps at a rate that moves nothing much: what comes out is what went in."""
    return SupernetRecipe(
        model=str(folder / "micro.yaml"),
        init=None if name is None else str(folder / f"{name}.safetensors"),
        epochs=1,
        batch_size=16,
        calibration_batches=1,
        optim=OptimRecipe(lr=lr),
        data=DataRecipe(str(folder / "images"), image_size_px=16, val_share=0, **data),
    )


@pytest.fixture(scope="module")
def kept(folder, tmp_path_factory):
    """A run on the classes of its checkpoint."""
    out = tmp_path_factory.mktemp("kept") / "run"
    run_supernet(_recipe(folder, "same"), out)
    return out


def _moved(a, b, part=""):
    """Largest difference of the weights, BN statistics apart, whose name begins with `part`."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    return max((ours[k] - theirs[k]).abs().max().item() for k in ours if k.startswith(part))


def test_the_same_classes_keep_everything(folder, kept):
    before = read(folder / "same.safetensors")
    for name in ("last", "last_live"):
        made = read(kept / f"{name}.safetensors")
        assert made.net.spec == before.net.spec
        assert [gate.choices for gate in made.net.spec.gates] == list(CHOICES)
        assert _moved(made.net, before.net) < 1e-6
        assert made.preprocessing == before.preprocessing
        assert made.recipe["supernet"]["init"] == str(folder / "same.safetensors")
    assert json.loads((kept / "results.json").read_text())["model"] == "micro"


def test_other_classes_train_a_fresh_classifier(folder, tmp_path):
    own = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    recipe = _recipe(folder, "others", lr=0.01, **own)
    made = read(run_supernet(recipe, tmp_path / "run")["files"]["last_live"])
    before = read(folder / "others.safetensors").net
    assert made.class_names == NAMES
    assert made.preprocessing == Preprocessing(16, **own), "the recipe's own come first"
    assert 1e-5 < _moved(made.net, before, "stages") < 0.1, "trained, from where it was"
    fresh = lively(micro_spec(num_classes=4).with_choices(*CHOICES), seed=9)
    assert _moved(fresh, before, "stages") > 0.5


@pytest.mark.parametrize(
    ("known", "requested", "same"),
    [
        (NAMES, NAMES, True),
        (None, NAMES, True),  # imported ones name none: as many are taken for the same
        (NAMES, tuple("abcd"), False),
        (NAMES, NAMES[::-1], False),
        (NAMES, NAMES[:3], False),
        (None, NAMES[:3], False),
    ],
)
def test_the_classifier_is_kept_for_the_same_classes_alone(known, requested, same):
    net = lively(micro_spec(num_classes=4))
    made = with_classes(Checkpoint(net, class_names=known), requested)
    assert made is not net
    assert not made.training
    assert made.spec == net.spec.replace(num_classes=len(requested))
    theirs = net.state_dict()
    for name, value in made.state_dict().items():
        expected = theirs[name][: len(requested)] if name.startswith("classifier") else theirs[name]
        if name == "classifier.weight":
            assert torch.equal(value, expected) == same
        else:  # a bias is zero in the one and in the other
            assert torch.equal(value, expected), name
        assert value.data_ptr() != theirs[name].data_ptr()


def test_what_a_run_reports_of_its_images_and_classifier(folder, tmp_path, capsys):
    run_supernet(_recipe(folder, "others", lr=0.01), tmp_path / "others")
    printed = capsys.readouterr().err
    assert "images: 64 images to train on, 0 held out, 0 skipped" in printed
    assert "others.safetensors: started anew for 4 classes: class 0, class 1" in printed
    results = json.loads((tmp_path / "others" / "results.json").read_text())
    assert (results["classifier"], results["train_images"]) == ("started anew", 64)
    argv = ["train", "supernet", "--out", str(tmp_path / "same"), "--batch-size", "16"]
    argv += ["--model", str(folder / "micro.yaml"), "--init", str(folder / "same.safetensors")]
    argv += ["--data.path", str(folder / "images"), "--data.image-size-px", "16", "--epochs", "1"]
    assert cli.run([*argv, "--calibration-batches", "1", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "same.safetensors: taken over for 4 classes" in err
    assert out.startswith("58 images trained on, 6 held out, 0 skipped\n")


def test_images_trained_on_are_distinguished_from_others(folder, tmp_path, capsys):
    """A set without splits: what training held out is measured, by the content of the files."""
    images = tmp_path / "images"
    write_levels(images, 64, "class")
    (images / "class 0" / "064.png").write_bytes(b"no picture")
    recipe = _recipe(folder, "same")
    data = DataRecipe(str(images), image_size_px=16, val_share=0.25)
    run_supernet(replace(recipe, data=data), tmp_path / "run")
    # the held-out quarter of 65 files, of which one does not decode
    assert "49 images to train on, 15 held out, 1 skipped" in (printed := capsys.readouterr().err)
    assert "skipped: " in printed
    assert "class 0/064.png: not an image" in printed
    digests = (tmp_path / "run" / "trained_on.txt").read_text().split()
    assert len(digests) == 49
    moved = shutil.copytree(images, tmp_path / "elsewhere")

    def measured(*argv):
        argv = ["evaluate", str(tmp_path / "run"), "--data", str(moved), *argv]
        assert cli.run(argv) == 0
        return capsys.readouterr().out

    alone = measured()
    assert "[whole]: 15 images, 1 skipped" in alone
    assert "16 of 65 images, which training held out; it was trained on the others" in alone
    everything = measured("--split", "whole")
    assert "[whole]: 64 images, 1 skipped" in everything
    assert "trained on 49 of these 65 images: expect less elsewhere" in everything
    (tmp_path / "run" / "trained_on.txt").unlink()
    assert "trained on" not in measured()


def test_another_model_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))  # else a busy machine adds a line
    argv = ["train", "supernet", "--data.path", str(folder / "images"), "--out"]
    init = str(folder / "same.safetensors")
    assert cli.run([*argv, str(tmp_path / "run"), "--init", init]) == 2
    err = capsys.readouterr().err
    assert "holds micro, which is not the recipe's model ds_mbnet_tiny" in err
    assert len(err.strip().splitlines()) == 1
    assert cli.run([*argv, str(tmp_path / "other"), "--init", str(tmp_path / "none")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_resumed_run_keeps_to_its_start(folder, kept):
    """Another checkpoint, or none, makes another run, --force or not."""
    again = RunOptions(resume=True, force=True)
    for other in (None, "others"):
        with pytest.raises(ValueError, match=r"init was .* that makes another run"):
            run_supernet(_recipe(folder, other), kept, again)
    results = json.loads((kept / "results.json").read_text())
    assert run_supernet(_recipe(folder, "same"), kept, again) == results


def _batch_answers(net, x):
    """By the batch's own statistics, which no calibration moves."""
    with torch.no_grad():
        return net.train()(x, net.spec.largest)


def test_a_wide_network_is_sorted_and_narrow_routes_calibrated(folder, tmp_path):
    wide, x = read(folder / "wide.safetensors").net, noise(micro_spec(), 8, image_size=16)
    recipe = _recipe(folder, "wide")
    with opened("supernet", recipe, tmp_path / "run", None) as context:
        net = supernet._SupernetRun(recipe, context).training.net.eval()
    assert [gate.choices for gate in net.spec.gates] == [(0, 2), (0, 1, 2)], "the recipe's"
    with torch.inference_mode():
        assert_rows_close(net(x, net.spec.largest), wide(x, wide.spec.largest), 1e-5)
    assert not torch.equal(
        net.stages[1][0].pointwise.conv.weight, wide.stages[1][0].pointwise.conv.weight
    )
    norm, own = net.stages[2][0].pointwise.bn, wide.stages[2][0].pointwise.bn.running_var
    *narrow, largest = (sorted(row.tolist()) for row in norm.running_var)
    assert largest == sorted(own[0].tolist())
    for row, width in zip(narrow, norm.slot_channels, strict=False):
        assert not set(row[:width]) & set(largest), "taken anew"


@pytest.mark.parametrize(("name", "kept"), [("wide", True), ("wide_others", False)])
def test_training_goes_on_from_a_wide_network(folder, tmp_path, monkeypatch, name, kept):
    recipe = _recipe(folder, name)
    results = run_supernet(recipe, tmp_path / "run")
    made, wide = read(results["files"]["last_live"]), read(folder / f"{name}.safetensors")
    assert made.class_names == NAMES
    assert made.preprocessing == wide.preprocessing
    x = noise(micro_spec(), 8, image_size=16)
    ours, theirs = _batch_answers(made.net, x), _batch_answers(wide.net, x)
    assert ((ours - theirs).abs().max() < 1e-4 * theirs.abs().max()) == kept
    # what a snapshot holds is not made again
    monkeypatch.setattr(supernet, "slimmable", None)
    assert run_supernet(recipe, tmp_path / "run", RunOptions(resume=True)) == results


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half", "stage 2 has widths (8,), in {} they are (6, 8, 10); .* alone, (10,)"),
        ("mixed", "stage 1 has widths (12,), in {} they are (4, 8, 12); .* alone, (12,)"),
    ],
)
def test_widths_that_do_not_fit_are_named(folder, tmp_path, name, message):
    message = message.replace("(", r"\(").replace(")", r"\)").format(".*micro.yaml")
    with pytest.raises(UsageError, match=message) as error:
        run_supernet(_recipe(folder, name), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_features_of_a_resumed_run_are_those_of_its_trunk(folder, tmp_path, monkeypatch):
    """The trunk comes from the widest network alone, and on resuming from the snapshot."""
    spec = get_spec("ds_resnet8_cifar", num_classes=4)
    wide = Checkpoint(lively(widest_only(spec), image_size=16), NAMES, Preprocessing(16))
    init = save(tmp_path / "wide.safetensors", wide)
    recipe = replace(
        _recipe(folder, None, lr=0.01), model=spec.name, init=str(init), trunk_views=1, epochs=2
    )
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_supernet(recipe, straight)
    done = Callbacks.after_step

    def killed(self, step, *args, **options):
        done(self, step, *args, **options)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Callbacks, "after_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_supernet(recipe, stopped, RunOptions(save_every_s=0))
    run_supernet(recipe, stopped, RunOptions(resume=True))
    ours, theirs = (read(one / "last.safetensors").net.state_dict() for one in (stopped, straight))
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]
