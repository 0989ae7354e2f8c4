import argparse
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, needs_shared

from dynaslim import Engine, cli, from_official, load
from dynaslim.errors import CheckpointError
from dynaslim.nn import argmax_one_hot

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official.npz"


def _rebuild(arrays):
    """A released state dict of full size, zero (variance 1) where the fixture has nothing."""
    state = {}
    for name, shape in json.loads(arrays["shapes"].tobytes()).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.ones(shape, dtype=torch.int64)
            continue
        full = torch.ones(shape) if name.endswith("running_var") else torch.zeros(shape)
        if f"weight/{name}" in arrays:
            kept = torch.from_numpy(arrays[f"weight/{name}"]).view(torch.bfloat16).float()
            full[tuple(slice(size) for size in kept.shape)] = kept
        state[name] = full
    return state


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """(path of a file in the released format, reference outputs)."""
    with np.load(FIXTURE) as file:
        arrays = dict(file)
    state = {f"module.{name}": value for name, value in _rebuild(arrays).items()}
    ema = dict(state)
    ema["module.classifier.bias"] = ema["module.classifier.bias"] + 0.25
    path = tmp_path_factory.mktemp("official") / "model_best.pth.tar"
    content = {
        "epoch": 1,
        "arch": "slimmable_mbnet_v1_bn_uniform",
        "state_dict": state,
        "state_dict_ema": ema,
        "args": argparse.Namespace(num_choice=14),
        "metric": 0.5,
    }
    torch.save(content, path)
    return path, arrays


def test_matches_the_released_network(official):
    path, reference = official
    net = from_official(path)
    assert net.spec.num_classes == 10
    assert net.spec.gates[0].choices == (0, 1, 2, 3)
    x = torch.from_numpy(reference["x"])
    with torch.inference_mode():
        for k, expected in enumerate(reference["uniform"]):
            assert np.abs(net(x, net.spec.routes[k]).numpy() - expected).max() < 1e-5
        gated = net.forward_gated(x, lambda logits, _: argmax_one_hot(logits))
    routed = Engine(net)(x)
    assert routed.routes[:, 0].tolist() == reference["route"].tolist()
    assert len(set(reference["route"].tolist())) > 1
    for logits in (gated.logits, routed.logits):
        assert np.abs(logits.numpy() - reference["dynamic"]).max() < 1e-5


def test_averaged_weights_are_the_other_ones(official):
    path, reference = official
    live, ema = from_official(path), from_official(path, ema=True)
    x = torch.from_numpy(reference["x"][:2])
    with torch.inference_mode():
        difference = ema(x, ema.spec.smallest) - live(x, live.spec.smallest)
    torch.testing.assert_close(difference, torch.full_like(difference, 0.25))


def test_import_from_the_command_line(official, tmp_path, capsys):
    path, reference = official
    out = tmp_path / "ds_mbnet.safetensors"
    assert cli.run(["import-official", str(path), str(out), "--ema"]) == 0
    assert "ds_mbnet, 10 classes, gate choices (0, 1, 2, 3)" in capsys.readouterr().out
    net = load(out)
    x = torch.from_numpy(reference["x"][:4])
    with torch.inference_mode():
        logits = net(x, net.spec.routes[2])
    assert np.abs(logits.numpy() - (reference["uniform"][2, :4] + 0.25)).max() < 1e-5


@needs_shared
def test_matches_all_of_the_reference():
    """All 14 widths and the largest, from the whole file, which is too large to ship."""
    net = from_official(SHARED / "reference" / "official_dsnet.pth.tar")
    with np.load(SHARED / "reference" / "official_outputs.npz") as file:
        reference = dict(file)
    x = torch.from_numpy(reference["x"])
    with torch.inference_mode():
        outputs = net.forward_many(x, (*net.spec.routes, net.spec.largest))
    for output, expected in zip(
        outputs, (*reference["uniform"], reference["largest"]), strict=True
    ):
        assert np.abs(output.numpy() - expected).max() < 1e-5
    routed = Engine(net)(x)
    assert routed.routes[:, 0].tolist() == reference["route"].tolist()
    assert np.abs(routed.logits.numpy() - reference["dynamic"]).max() < 1e-5


class _Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


@pytest.mark.parametrize("kind", ["zip", "old", "protocol 0", "protocol 2", "protocol 4"])
def test_crafted_pickle_is_refused_by_name_and_not_run(tmp_path, kind):
    path = tmp_path / "evil.pth.tar"
    content = {"state_dict": {"module.x": _Evil(tmp_path)}}
    if kind.startswith("protocol"):
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        CheckpointError, match=r"evil.pth.tar: refused: its pickle asks for posix.mkdir"
    ):
        from_official(path)
    assert not (tmp_path / "executed").exists()
    # the crafted file does what it says it does, so the test above can fail
    if kind.startswith("protocol"):
        pickle.loads(path.read_bytes())
        assert (tmp_path / "executed").exists()


def _saved(path, state, **more):
    torch.save({"state_dict": state, **more}, path)
    return path


def test_files_that_are_no_released_checkpoint(official, tmp_path):
    path, arrays = official
    state = _rebuild(arrays)
    bad = tmp_path / "bad.pth.tar"
    with pytest.raises(CheckpointError, match=r"none.pth: no such file"):
        from_official(tmp_path / "none.pth")
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable torch checkpoint"):
        from_official(bad)
    bad.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="truncated, damaged or of another format"):
        from_official(bad)
    with pytest.raises(CheckpointError, match=r"has no state_dict_ema \(it has: state_dict\)"):
        from_official(_saved(bad, state), ema=True)
    with pytest.raises(CheckpointError, match="values that are not tensors"):
        from_official(_saved(bad, {"x": 1}))
    with pytest.raises(CheckpointError, match="not a released DS-MBNet: it lacks"):
        from_official(_saved(bad, {"x": torch.zeros(1)}))
    missing = {k: v for k, v in state.items() if k != "blocks.1.first_block.conv_pw.weight"}
    with pytest.raises(CheckpointError, match=r"it has no blocks.1.first_block.conv_pw.weight"):
        from_official(_saved(bad, missing))
    with pytest.raises(CheckpointError, match="unknown tensor extra"):
        from_official(_saved(bad, {**state, "extra": torch.zeros(1)}))
    key = "blocks.3.first_block.bn2.aux_bn.2.running_mean"
    with pytest.raises(CheckpointError, match=rf"{key} has shape \(5,\), DS-MBNet needs \(288,\)"):
        from_official(_saved(bad, {**state, key: torch.zeros(5)}))
