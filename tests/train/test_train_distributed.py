"""Two gloo processes do what one does: spawned for real."""

import json

import pytest
import torch
import train_workers
from helpers import (
    free_port,
    lively,
    micro_spec,
    noise,
    png,
    spawn_two,
    start_dynaslim,
    wait_for_steps,
    write_parquet,
)

from dynaslim.checkpoint import read
from dynaslim.runs.folder import read_snapshot
from dynaslim.train import recalibrate


def _spawn(run, folder):
    spawn_two(train_workers.worker, free_port(), str(folder), run)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


def test_half_batches_give_the_gradients_of_the_whole(tmp_path):
    losses, grads, state = train_workers.one_step(slice(None))
    for their_losses, their_grads, their_state, sizes in _spawn(train_workers.step, tmp_path):
        assert their_losses.largest == pytest.approx(losses.largest, abs=1e-6)
        assert their_losses.randoms == pytest.approx(losses.randoms, abs=1e-6)
        assert their_losses.smallest == pytest.approx(losses.smallest, abs=1e-6)
        assert their_grads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(their_grads[name], grad, atol=1e-6, rtol=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(their_state[name], value, atol=1e-6, rtol=1e-5)
        # all gradients of the four passes in one message, not one per pass or per tensor
        assert len(sizes) == 1
        assert sizes[0] >= sum(grad.numel() for grad in grads.values())


def test_half_batches_give_the_gates_the_gradients_of_the_whole(tmp_path):
    """The cost term is a square of a mean, the labels' weights depend on all of them."""
    whole = [train_workers.gate_step_of(slice(None), gumbel) for gumbel in (False, True)]
    for both in _spawn(train_workers.gate_steps, tmp_path):
        for (losses, grads), (their_losses, their_grads) in zip(whole, both, strict=True):
            assert their_losses == pytest.approx(losses, rel=1e-5)
            for ours, theirs in zip(grads, their_grads, strict=True):
                torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-5)


def test_recalibration_averages_over_all_batches(tmp_path):
    net = lively(micro_spec(), image_size=16)
    recalibrate(net, [noise(net.spec, 8, image_size=16, seed=s) for s in range(5)])
    for state in _spawn(train_workers.calibration, tmp_path):
        for name, value in net.state_dict().items():
            if "running" in name:
                torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_all(tmp_path):
    for message in _spawn(train_workers.not_finite, tmp_path):
        assert message.startswith("step 4: the loss of the largest network is nan")


TORCHRUN = (
    *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "dynaslim"),
)


def test_a_run_of_two_processes(tmp_path):
    """Under torchrun: trains, stops by SIGTERM, goes on, evaluates; one of the two writes.

    The signal reaches a process group as a whole, decoding workers too, and stops all after the
    same step.
    """
    data, out = tmp_path / "data", tmp_path / "run"
    write_parquet(data, [png(n, mode="RGB") for n in range(75)], 4, "train")
    argv = ["train", "supernet", "--data.path", str(data), "--out", str(out), "--json"]
    argv += ["--batch-size", "16", "--data.image-size-px", "16", "--calibration-batches", "2"]
    argv += ["--data.val-share", "0.14", "--optim.lr", "0.05", "--data.load", "disk"]
    argv += ["--workers", "1", "--log-every", "1", "--save-every-s", "1000"]
    process = start_dynaslim([*argv, "--epochs", "500"], run=TORCHRUN)
    metrics = out / "metrics.jsonl"
    wait_for_steps(process, metrics, 6)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped by SIGTERM" in err
    assert "DataLoader worker" not in err
    step = read_snapshot(out / "snapshot.safetensors")["state"]["step"]
    assert step == json.loads(metrics.read_text().splitlines()[-1])["step"]

    epochs = step // 4 + 1
    again = [*argv, "--epochs", str(epochs), "--resume", "--force"]
    process = start_dynaslim(again, run=TORCHRUN)
    stdout, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    results = json.loads(stdout)  # of the first process alone
    assert results["steps"] == epochs * (64 // 16)
    assert results["val"]["last"]["images"] == 11, "an uneven last batch"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluated = [line["step"] for line in lines if line["kind"] == "val"]
    assert evaluated == list(range(4, 4 * epochs + 1, 4))
    assert json.loads((out / "environment.json").read_text())[0]["processes"] == 2
    assert read(out / "last.safetensors").net.spec.name == "ds_mbnet_tiny"
