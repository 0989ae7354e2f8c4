import pytest
import torch
from safetensors.torch import save_file

from dynaslim.errors import CheckpointError
from dynaslim.runs.folder import read_snapshot, save_snapshot


def test_nested_state_comes_back_bit_for_bit(tmp_path):
    layout = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = {
        "step": 3,
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(3), "step": torch.tensor(4.0)}}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None}],
        "half": torch.randn(3).bfloat16(),
        "counts": torch.arange(3),
        "layout": layout,
        "best": None,
        "empty": {},
    }
    path = tmp_path / "snapshot.safetensors"
    save_snapshot(path, state)
    back = read_snapshot(path)
    assert back["optimizer"]["state"][0]["momentum_buffer"].equal(
        state["optimizer"]["state"][0]["momentum_buffer"]
    )
    assert back["optimizer"]["state"][0]["step"].item() == 4
    assert back["groups"][0]["lr"] == 0.1 + 0.2
    assert back["groups"][0]["betas"] == [0.9, 0.999]
    assert back["half"].dtype == torch.bfloat16
    assert back["half"].equal(state["half"])
    assert back["layout"].equal(layout)
    assert (back["step"], back["best"], back["empty"]) == (3, None, {})


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    path = tmp_path / "snapshot.safetensors"
    save_snapshot(path, {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="not finite"):
        save_snapshot(path, {"a": torch.tensor([1.0, float("nan")])})
    assert read_snapshot(path)["a"].equal(torch.zeros(2))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "snapshot.safetensors"
    with pytest.raises(CheckpointError, match="not a readable snapshot"):
        read_snapshot(path)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="not a readable snapshot"):
        read_snapshot(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a snapshot of a training run"):
        read_snapshot(path)
