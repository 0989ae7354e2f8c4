import json
import os
import pickle

import numpy as np
import pytest
import torch
from helpers import SHARED, needs_shared, run_ok
from released_file import released_state, write_released
from torch.nn import functional as F

from dynaslim import Engine, from_official, load
from dynaslim.errors import CheckpointError
from dynaslim.nn import argmax_one_hot


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """(path of a file in the released format, reference outputs)."""
    path = tmp_path_factory.mktemp("official") / "model_best.pth.tar"
    return path, write_released(path)


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
    routed = Engine(net, backend="eager")(x)
    assert routed.routes[:, 0].tolist() == reference["route"].tolist()
    assert len(set(reference["route"].tolist())) > 1
    for logits in (gated.logits, routed.logits):
        assert np.abs(logits.numpy() - reference["dynamic"]).max() < 1e-5


def _plain_forward(state, x, k, largest=False):
    """The released network along a uniform route, transcribed from its description alone.

    No class of ours: plain torch on slices, statistics by their released names.
    """

    def conv_bn(x, conv, bn, out, slot, **options):
        weight = state[f"{conv}.weight"]
        groups = options.get("groups", 1)
        weight = weight[:out] if groups > 1 else weight[:out, : x.shape[1]]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2, **options)
        slots = [n for n in state if n.startswith(f"{bn}.aux_bn.") and n.endswith("running_mean")]
        affine = f"{bn}.aux_bn.{len(slots) - 1}"
        x = F.batch_norm(
            x,
            state[f"{bn}.aux_bn.{slot}.running_mean"],
            state[f"{bn}.aux_bn.{slot}.running_var"],
            state[f"{affine}.weight"][:out],
            state[f"{affine}.bias"][:out],
            eps=1e-5,
        )
        return F.silu(x)

    def attention(x, gate):
        channels = x.shape[1]
        pooled = x.mean((2, 3), keepdim=True)
        hidden = F.conv2d(
            pooled,
            state[f"{gate}.conv_reduce.weight"][:, :channels],
            state[f"{gate}.conv_reduce.bias"],
        ).relu()
        scale = F.conv2d(
            hidden,
            state[f"{gate}.conv_expand.weight"][:channels],
            state[f"{gate}.conv_expand.bias"][:channels],
        )
        return x * scale.sigmoid()

    trunk = 1 if largest else 0
    slot_of = [trunk, trunk, trunk, trunk, k, k]
    widths = [(16, 24), (32, 88), (48, 168), (96, 264), range(224, 641, 32), range(736, 1153, 32)]
    x = conv_bn(x, "conv_stem", "bn1", widths[0][trunk], trunk, stride=2)
    before = slot_of[0]
    for stage, (blocks, stride) in enumerate([(1, 1), (2, 2), (2, 2), (6, 2), (2, 2)]):
        slot = slot_of[stage + 1]
        for block in range(blocks):
            name = f"blocks.{stage}." + (f"residual_blocks.{block - 1}" if block else "first_block")
            channels = x.shape[1]
            x = conv_bn(
                x,
                f"{name}.conv_dw",
                f"{name}.bn1",
                channels,
                before,
                stride=1 if block else stride,
                groups=channels,
            )
            x = attention(x, f"{name}.gate")
            x = conv_bn(x, f"{name}.conv_pw", f"{name}.bn2", widths[stage + 1][slot], slot)
            before = slot
    pooled = x.mean((2, 3))
    return F.linear(pooled, state["classifier.weight"][:, : x.shape[1]], state["classifier.bias"])


def test_all_widths_and_the_largest_against_a_plain_transcription(official):
    """The fixture pins the transcription on the first four widths, that one pins us on all."""
    path, reference = official
    state = released_state(reference)
    x = torch.from_numpy(reference["x"][:4])
    for k, expected in enumerate(reference["uniform"]):
        assert np.abs(_plain_forward(state, x, k).numpy() - expected[:4]).max() < 1e-5
    net = from_official(path)
    with torch.inference_mode():
        *uniform, largest = net.forward_many(x, (*net.spec.routes, net.spec.largest))
    for k, ours in enumerate(uniform):
        torch.testing.assert_close(ours, _plain_forward(state, x, k), atol=1e-5, rtol=1e-4)
    expected = _plain_forward(state, x, 13, largest=True)
    torch.testing.assert_close(largest, expected, atol=1e-5, rtol=1e-4)


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
    argv = ["import-official", path, out, "--ema"]
    assert "ds_mbnet, 10 classes, gate choices (0, 1, 2, 3)" in run_ok(capsys, *argv)
    printed = json.loads(run_ok(capsys, *argv, "--json"))
    assert printed == {
        "out": str(out),
        "model": "ds_mbnet",
        "num_classes": 10,
        "choices": [0, 1, 2, 3],
    }
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
    routed = Engine(net, backend="eager")(x)
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
        CheckpointError, match=r"evil.pth.tar: refused: its pickle needs posix.mkdir"
    ):
        from_official(path)
    assert not (tmp_path / "executed").exists()
    # the crafted file does run its code, so the test above can fail
    if kind.startswith("protocol"):
        pickle.loads(path.read_bytes())
        assert (tmp_path / "executed").exists()


def test_torchs_own_functions_are_refused_by_name_too(tmp_path):
    class Hub:
        def __reduce__(self):
            return torch.hub.load, (str(tmp_path), "model")

    path = tmp_path / "hub.pth.tar"
    torch.save({"state_dict": Hub()}, path)
    with pytest.raises(CheckpointError, match=r"its pickle needs torch.hub.load"):
        from_official(path)


def test_names_hidden_in_the_memo_are_found(tmp_path):
    """Protocol 4 by hand: the module's name is put in the memo, dropped and fetched again."""
    path = tmp_path / "memo.pth.tar"
    path.write_bytes(
        b"\x80\x04\x8c\x05posix\x94\x8c\x05mkdir\x94" + b"0" * 2 + b"h\x00h\x01\x93\x8c\x01x\x85R."
    )
    with pytest.raises(CheckpointError, match=r"its pickle needs posix.mkdir"):
        from_official(path)
    with pytest.raises(CheckpointError, match="is a folder"):
        from_official(tmp_path)


def _saved(path, state, **more):
    torch.save({"state_dict": state, **more}, path)
    return path


def test_files_that_are_no_released_checkpoint(official, tmp_path):
    path, arrays = official
    state = released_state(arrays)
    bad = tmp_path / "bad.pth.tar"
    with pytest.raises(CheckpointError, match=r"none.pth: no such file"):
        from_official(tmp_path / "none.pth")
    for content, message in (
        (b"not a checkpoint", "not a readable torch checkpoint"),
        (path.read_bytes()[:100_000], "truncated, damaged or of another format"),
    ):
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            from_official(bad)
    with pytest.raises(CheckpointError, match=r"has no state_dict_ema \(it has: state_dict\)"):
        from_official(_saved(bad, state), ema=True)
    lacking = "blocks.1.first_block.conv_pw.weight"
    key = "blocks.3.first_block.bn2.aux_bn.2.running_mean"
    for tensors, message in (
        ({"x": 1}, "values that are not tensors"),
        ({"x": torch.zeros(1)}, "not a released DS-MBNet: it lacks"),
        ({k: v for k, v in state.items() if k != lacking}, f"it has no {lacking}"),
        ({**state, "extra": torch.zeros(1)}, "unknown tensor extra"),
        ({**state, key: torch.zeros(5)}, rf"{key} has shape \(5,\), DS-MBNet needs \(288,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            from_official(_saved(bad, tensors))
