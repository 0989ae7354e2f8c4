"""Runs that are started, killed, stopped, broken and resumed as a person would: by the command."""

import json
import re
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    bright_pngs,
    encoded,
    fails,
    run_ok,
    start_dynaslim,
    wait_for_steps,
    write_parquet,
)
from safetensors.torch import load_file

from dynaslim import cli
from dynaslim.checkpoint import read
from dynaslim.errors import CheckpointError
from dynaslim.runs.folder import read_snapshot, save_snapshot

STEPS = 24  # 3 epochs of 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """144 images of 4 classes by brightness; 128 to train on where a ninth is held out."""
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder, bright_pngs(144), 4, "train")
    return folder


def _argv(data, out, *more):
    return [
        *("train", "supernet", "--out", str(out), "--data.path", str(data), "--epochs", "3"),
        *("--batch-size", "16", "--data.image-size-px", "16", "--data.val-share", "0.1111"),
        *("--optim.lr", "0.05", "--calibration-batches", "4", "--save-every-s", "0"),
        *("--val-calibration-batches", "2", "--log-every", "1", *more),
    ]


def _run(argv, **options):
    process = start_dynaslim(argv, **options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def _stopped(argv, out, steps, number=signal.SIGKILL):
    """A process that is sent a signal when it has made so many steps; it has ended."""
    process = start_dynaslim(argv)
    wait_for_steps(process, out / "metrics.jsonl", steps)
    process.send_signal(number)
    process.wait(60)
    return process


def _logged_steps(out):
    file = out / "metrics.jsonl"
    return file.read_text().count('"train"') if file.exists() else 0


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("straight") / "run"
    code, stdout, err = _run(_argv(data, out, "--json"))
    assert code == 0, err
    return out, json.loads(stdout), err


def _same_weights(a, b):
    for name in ("last", "last_live", "best"):
        ours = load_file(a / f"{name}.safetensors")
        theirs = load_file(b / f"{name}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_a_run_leaves_the_files_it_reports(straight, data):
    out, results, err = straight
    assert {path.name for path in out.iterdir()} == {
        *("recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "curves.png"),
        *("snapshot.safetensors", "last.safetensors", "last_live.safetensors"),
        *("best.safetensors", "results.json", "trained_on.txt", ".lock"),
    }
    assert results == json.loads((out / "results.json").read_text())
    assert results["steps"] == STEPS
    assert results["images_per_epoch"] == 128
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert len(train[0]["randoms"]) == 2
    rates = [line["lr"] for line in train]  # of the step after: two of warm-up, then a cosine
    assert rates[0] < rates[1] == max(rates) == 0.05
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(0)
    assert train[-1]["largest"] < train[0]["largest"]
    val = [line for line in lines if line["kind"] == "val"]
    assert [line["step"] for line in val] == [8, 16, 24]
    best = max(val, key=lambda line: line["mean_top1"])
    assert results["best"] == {"step": best["step"], "mean_top1": best["mean_top1"]}
    assert results["val"]["last"]["images"] == 16
    assert len(results["val"]["last_live"]["routes"]) == 4
    assert list((out / "tensorboard").glob("events*"))
    environment = json.loads((out / "environment.json").read_text())
    assert environment[0]["torch"] == torch.__version__
    assert environment[0]["processor"]
    checkpoint = read(out / "last.safetensors")
    assert checkpoint.recipe["supernet"]["epochs"] == 3
    assert checkpoint.class_names == tuple(f"class {n}" for n in range(4))
    assert re.search(r"stage I: supernet: 24/24 in .* img/s  loss .* \| .* \| ", err)


def test_the_resolved_recipe_repeats_the_run(straight, tmp_path, one_thread):
    """The folder's recipe alone, with no flag but the folder."""
    out, again = straight[0], tmp_path / "again"
    argv = ["train", "supernet", "--config", str(out / "recipe.yaml"), "--out", str(again)]
    assert cli.run(argv) == 0
    _same_weights(out, again)
    assert (again / "recipe.yaml").read_text() == (out / "recipe.yaml").read_text()


def test_killed_at_any_moment_it_ends_bit_equal(straight, data, tmp_path, one_thread):
    out = tmp_path / "run"
    for steps in (1, 8, 19):  # at the start, at an evaluation, late
        assert _stopped(_argv(data, out, "--resume"), out, steps).returncode == -signal.SIGKILL
    assert cli.run(_argv(data, out, "--resume")) == 0
    _same_weights(straight[0], out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1)), "steps made twice are logged once"
    assert [line["step"] for line in lines if line["kind"] == "val"] == [8, 16, 24]
    assert len(json.loads((out / "environment.json").read_text())) >= 2


def test_sigterm_saves_and_a_full_disk_leaves_what_was_saved(straight, data, tmp_path, one_thread):
    out = tmp_path / "run"
    # a snapshot is not due: it is the signal that makes it
    argv = _argv(data, out, "--resume")
    argv[argv.index("--save-every-s") + 1] = "1000"
    process = _stopped(argv, out, 3, signal.SIGTERM)
    err = process.stderr.read()
    assert process.returncode == 143
    assert err.strip().splitlines()[-1] == (
        "dynaslim: stopped by SIGTERM; go on with the same command and --resume"
    )
    assert read_snapshot(out / "snapshot.safetensors")["state"]["step"] == _logged_steps(out) >= 3

    before = (out / "snapshot.safetensors").read_bytes()
    limit = len(before) // 2

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, stdout, err = _run(_argv(data, out, "--resume"), preexec_fn=small_disk)
    assert code == 1
    assert stdout == ""
    assert re.search(r"dynaslim: .*File too large", err.strip().splitlines()[-1])
    assert "Traceback" not in err
    assert (out / "snapshot.safetensors").read_bytes() == before
    assert cli.run(argv) == 0
    _same_weights(straight[0], out)


def test_two_processes_do_not_train_in_one_folder(data, tmp_path, capsys, one_thread):
    out = tmp_path / "run"
    process = start_dynaslim(_argv(data, out, "--epochs", "500"))
    try:
        wait_for_steps(process, out / "metrics.jsonl", 3)
        logged = _logged_steps(out)
        resumed = _argv(data, out, "--epochs", "500", "--resume")
        _fails(capsys, resumed, 2, "another process trains in this folder")
        assert process.poll() is None, "it was refused while the first one ran"
        assert _logged_steps(out) >= logged
        process.kill()  # a process that is killed leaves no lock behind
    finally:
        process.kill()
        process.communicate()
    epochs = str(_logged_steps(out) // 8 + 1)
    assert cli.run(_argv(data, out, "--epochs", epochs, "--resume", "--force")) == 0


def test_a_loss_that_is_not_finite_leaves_the_last_snapshot(data, tmp_path, capsys, one_thread):
    out = tmp_path / "run"
    argv = _argv(data, out, "--optim.lr", "1e18", "--optim.warmup-share", "0.2")
    message = r"(?m)^dynaslim: step \d+: the loss of .* is (nan|inf); try a lower learning.*\n\Z"
    _fails(capsys, argv, 1, message)
    state = read_snapshot(out / "snapshot.safetensors")["state"]
    assert state["step"] == _logged_steps(out)
    assert all(torch.isfinite(v).all() for v in state["modules"]["net"].values())


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    path = tmp_path / "snapshot.safetensors"
    save_snapshot(path, {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="not finite"):
        save_snapshot(path, {"a": torch.tensor([1.0, float("nan")])})
    assert read_snapshot(path)["a"].equal(torch.zeros(2))


_fails = partial(fails, notes=True)


def test_folders_are_not_mixed_up(straight, data, tmp_path, capsys):
    out = straight[0]
    before = (out / "metrics.jsonl").read_bytes()
    _fails(capsys, _argv(data, out), 2, "holds a run already; go on with it by --resume")
    changed = _argv(data, out, "--resume", "--optim.lr", "0.1", "--target", "labels")
    message = "target was 'ensemble', is 'labels'; optim.lr was 0.05, is 0.1. Go on nevertheless"
    _fails(capsys, changed, 2, message)
    gate = ["train", "gate", "--out", str(out), "--resume", "--data.path", str(data)]
    gate += ["--supernet", str(out / "last.safetensors")]
    _fails(capsys, gate, 2, "holds a run of stage supernet, this is gate")
    assert (out / "metrics.jsonl").read_bytes() == before
    # a run that is done reports its results again
    assert cli.run(_argv(data, out, "--resume", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == STEPS


def test_mistakes_get_one_line(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    start = ["train", "supernet", "--out", out]
    for code, message, argv in (
        (2, "name the images: --data.path PATH", start),
        (1, "/no/such: no such file or folder", [*start, "--data.path", "/no/such"]),
        (2, "ds_nothing", _argv(data, out, "--model", "ds_nothing")),
        (1, "128 images do not fill one batch", _argv(data, out, "--batch-size", "512")),
        (2, "epochs 0: must be at least 1", _argv(data, out, "--epochs", "0")),
        (2, "no --epoch-count, did you mean --epochs", _argv(data, out, "--epoch-count", "3")),
        (2, "--device abacus: choose", _argv(data, out, "--device", "abacus")),
    ):
        _fails(capsys, argv, code, message)
    file = tmp_path / "file"
    file.write_text("")
    _fails(capsys, _argv(data, file), 1, "file")
    bad = tmp_path / "bad.yaml"
    bad.write_text("epochs: 3\nlearning_rate: 1\n")
    _fails(capsys, [*start, "--config", str(bad)], 2, "learning_rate")


def test_snapshots_of_other_kinds_are_refused(straight, data, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "snapshot.safetensors").write_bytes(b"not one")
    _fails(capsys, _argv(data, out, "--resume"), 1, "not a readable snapshot")
    source = straight[0] / "last.safetensors"
    (out / "snapshot.safetensors").write_bytes(source.read_bytes())
    _fails(capsys, _argv(data, out, "--resume"), 1, "not a snapshot of a training run")


def test_halves_and_channels_first_train(data, tmp_path):
    out = tmp_path / "run"
    flags = ["--bf16", "true", "--channels-last", "false"]
    assert cli.run(_argv(data, out, "--epochs", "1", *flags)) == 0
    assert json.loads((out / "results.json").read_text())["steps"] == 8


@pytest.mark.parametrize("read_before", [True, False])
def test_a_disk_that_is_full_from_the_start_is_one_line(read_before, data, tmp_path, monkeypatch):
    """So full that TensorBoard's own thread fails too, or the copy that datasets makes."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    if read_before:
        code = (
            "from dynaslim.data import open_source as read; import sys; read(sys.argv[1], 'train')"
        )
        subprocess.run([sys.executable, "-c", code, data], check=True)

    def no_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    code, _, err = _run(_argv(data, tmp_path / "run"), preexec_fn=no_disk)
    assert code == 1
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert "File too large" in last
    assert (str(cache) in last) != read_before


def test_what_makes_another_run_cannot_be_forced(straight, data, capsys):
    resume = _argv(data, straight[0], "--resume", "--force")
    for flags, message in (
        (["--model", "ds_resnet_cifar"], "model was 'ds_mbnet_tiny', is 'ds_resnet_cifar'"),
        (["--optim.name", "adamw"], "optim.name was 'sgd', is 'adamw'"),
    ):
        _fails(capsys, [*resume, *flags], 2, f"{message}; that makes another run")


def test_forced_changes_of_the_optimizer_take_effect(data, tmp_path):
    out = tmp_path / "run"
    assert cli.run(_argv(data, out, "--epochs", "1")) == 0
    flags = ["--optim.weight-decay", "0.03", "--optim.momentum", "0.5", "--optim.lr", "0.2"]
    assert cli.run(_argv(data, out, "--epochs", "2", *flags, "--resume", "--force")) == 0
    assert json.loads((out / "results.json").read_text())["steps"] == 16
    groups = read_snapshot(out / "snapshot.safetensors")["state"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0]
    assert {group["momentum"] for group in groups} == {0.5}
    assert {group["initial_lr"] for group in groups} == {0.2}


def test_a_set_that_is_not_divided_cannot_be_its_own_judge(data, tmp_path, capsys):
    whole = tmp_path / "all.parquet"
    whole.write_bytes((data / "train.parquet").read_bytes())
    argv = _argv(whole, tmp_path / "run", "--data.val-split", "validation")
    _fails(capsys, argv, 2, "'train' and 'validation' are the same images here")


def test_every_variant_resumes_bit_equal(data, tmp_path, one_thread):
    """Parts of batches, mixtures, another optimizer, all at once."""
    flags = ["--optim.name", "adamw", "--optim.lr", "0.002", "--optim.accumulate", "2"]
    flags += ["--optim.clip-norm", "1.0"]
    flags += ["--augment.mixup", "0.2", "--augment.cutmix", "1", "--augment.erasing", "0.5"]
    flags += ["--augment.randaugment-ops", "1", "--augment.jitter", "0.1", "--epochs", "2"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert cli.run(_argv(data, straight, *flags)) == 0
    _stopped(_argv(data, out, *flags), out, 5)
    assert cli.run(_argv(data, out, *flags, "--resume")) == 0
    _same_weights(straight, out)


@pytest.mark.parametrize("load", ["disk", "stream"])
def test_sets_that_are_not_in_memory(data, tmp_path, load, one_thread):
    """Killed and resumed they end bit-equal too: what a stream has given is skipped."""
    held = ["--data.val-share", "0"] if load == "stream" else []
    flags = ["--data.load", load, *held, "--epochs", "2", "--workers", "1", "--resume"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert cli.run(_argv(data, straight, *flags)) == 0
    _stopped(_argv(data, out, *flags), out, 11)  # in the second epoch
    assert cli.run(_argv(data, out, *flags)) == 0
    ours, theirs = (load_file(path / "last.safetensors") for path in (out, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    results = json.loads((out / "results.json").read_text())
    assert (results["best"] is None) == (load == "stream"), "nothing was held out of a stream"


def test_imagenet_recipes_run_on_a_folder_of_its_layout(tmp_path, capsys):
    """train/CLASS/*.JPEG and val/CLASS/*.JPEG, one of them broken; smaller, shorter, else as is."""
    rng = np.random.default_rng(0)
    data = tmp_path / "imagenet"
    for split, count in (("train", 12), ("val", 3)):
        for name in ("n01440764", "n01443537"):
            folder = data / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 256, (50 + n, 70, 3), dtype=np.uint8)
                (folder / f"{name}_{n}.JPEG").write_bytes(encoded(pixels, "JPEG"))
    broken = data / "train" / "n01440764" / "n01440764_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    recipes = Path(__file__).parents[2] / "recipes"
    small = ["--data.path", str(data), "--epochs", "1", "--batch-size", "8", "--workers", "0"]
    small += ["--data.corrupt-limit", "0.05"]
    out = tmp_path / "supernet"
    argv = ["train", "supernet", "--config", str(recipes / "imagenet_ds_mbnet_supernet.yaml")]
    argv += [*small, "--out", str(out), "--data.image-size-px", "64", "--json"]
    results = json.loads(run_ok(capsys, *argv))
    assert results["steps"] == 3
    assert results["val_images"] == 6
    assert len(results["skipped"]) == 1
    assert "n01440764_3.JPEG" in results["skipped"][0]
    assert len(results["val"]["last"]["routes"]) == 14
    argv = ["train", "gate", "--config", str(recipes / "imagenet_ds_mbnet_gate.yaml"), *small]
    argv += ["--supernet", str(out / "last.safetensors"), "--out", str(tmp_path / "gate")]
    assert cli.run([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gates"][0]["val"]["images"] == 6
