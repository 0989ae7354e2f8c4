import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ZOO_NAMES, lively, micro_spec, noise

import dynaslim
from dynaslim.checkpoint import Checkpoint, create_model, load, read, save, stored
from dynaslim.checkpoint_content import description_digest
from dynaslim.errors import CheckpointError, UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.zoo import ZOO


@pytest.fixture
def saved(tmp_path):
    net = lively(micro_spec())
    path = save(
        tmp_path / "net.safetensors",
        Checkpoint(
            net,
            class_names=tuple("abcde"),
            preprocessing=Preprocessing(32, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0)),
            metrics={"top1": 0.5},
            recipe={"seed": 3},
        ),
    )
    return path, net


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_saved_equals_loaded(name, tmp_path):
    net = lively(ZOO[name].replace(num_classes=10))
    path = save(tmp_path / "net.safetensors", Checkpoint(net))
    again = load(path)  # without the name of its model
    assert again.spec == net.spec
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    state = net.state_dict()
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    x = noise(net.spec, 2)
    with torch.inference_mode():
        assert torch.equal(again(x, net.spec.largest), net(x, net.spec.largest))


def test_everything_beside_the_weights_comes_back(saved):
    path, _ = saved
    back = read(path)
    assert back.class_names == tuple("abcde")
    assert back.preprocessing == Preprocessing(32, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    assert back.metrics == {"top1": 0.5}
    assert back.recipe == {"seed": 3}


def test_dtype_survives(tmp_path):
    path = save(tmp_path / "net.safetensors", Checkpoint(lively(micro_spec()).bfloat16()))
    assert load(path).classifier.weight.dtype == torch.bfloat16


def test_create_model():
    assert create_model("ds_mbnet_tiny", num_classes=7).classifier.out_features == 7
    assert dynaslim.create_model("ds_mbnet_tiny").spec == ZOO["ds_mbnet_tiny"]
    with pytest.raises(UsageError, match="'resnet' is unknown"):
        create_model("resnet")
    with pytest.raises(UsageError, match="num_classes 0"):
        create_model("ds_mbnet_tiny", num_classes=0)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing.safetensors: no such file"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -1])
def test_truncated_file(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"net.safetensors: not a readable checkpoint"):
        load(path)


def test_one_changed_weight_is_noticed(saved):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256: altered or damaged"):
        load(path)


def _rewrite(path, change, *, sign=False):
    """Change the description inside a checkpoint, or its tensors too and the hash with them."""
    with safetensors.safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["dynaslim"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(meta, tensors)
    if sign:
        meta["sha256"] = description_digest(meta, stored(tensors))
    path.write_bytes(safetensors.torch.save(tensors, {"dynaslim": json.dumps(meta)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, this dynaslim reads version 1"),
        ({"metrics": {"top1": 0.99}}, "SHA-256"),
    ],
)
def test_a_changed_description_is_noticed(saved, change, message):
    path, _ = saved
    _rewrite(path, lambda meta, _: meta.update(change))
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_safetensors_of_somebody_else(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a dynaslim checkpoint"):
        load(path)


def test_pickled_file_gets_the_way_to_import_it(tmp_path):
    path = tmp_path / "model.pth.tar"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="dynaslim import-official"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, t: t.pop("classifier.bias"), r"no tensor classifier.bias of shape \(5,\)"),
        (
            lambda _, t: t.update({"classifier.bias": torch.zeros(9)}),
            r"classifier.bias has shape \(9,\), its spec needs \(5,\)",
        ),
        (lambda _, t: t.update(surplus=torch.zeros(9)), "has a tensor surplus"),
        (lambda m, _: m.update(spec={"name": "x"}), "not a network spec"),
        (lambda m, _: m.update(class_names=["one"]), "1 class names do not fit 5 classes"),
    ],
)
def test_signed_but_wrong_contents(saved, change, message):
    """Even a file with a right hash must fit its own spec."""
    path, _ = saved
    _rewrite(path, change, sign=True)
    with pytest.raises(CheckpointError, match=message):
        load(path)
    with pytest.raises(CheckpointError, match=message):
        Engine.from_checkpoint(path)


def test_class_count_that_does_not_fit(saved):
    path, net = saved
    assert load(path, num_classes=5).spec.num_classes == 5
    with pytest.raises(CheckpointError, match="has 5 classes, not the 10 asked for"):
        load(path, num_classes=10)
    with pytest.raises(UsageError, match="2 class names do not fit 5"):
        Checkpoint(net, class_names=("a", "b"))
    with pytest.raises(UsageError, match="1 channels does not fit a network of 3"):
        Checkpoint(net, preprocessing=Preprocessing(32, mean=(0.5,), std=(0.5,)))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = lively(micro_spec())
    path = save(tmp_path / "net.safetensors", Checkpoint(net))
    good = path.read_bytes()
    with torch.no_grad():
        net.stages[1][0].pointwise.bn.running_var[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="running_var has values that are not finite"):
        save(path, Checkpoint(net))
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_metrics_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="not saved, metrics or recipe"):
        save(tmp_path / "net.safetensors", Checkpoint(lively(micro_spec()), metrics={"x": np.nan}))
    assert not os.listdir(tmp_path)


def test_preprocessing_below_the_total_stride():
    with pytest.raises(UsageError, match="2x2 px: micro divides it by 4"):
        Checkpoint(lively(micro_spec()), preprocessing=Preprocessing(2))


def test_a_folder_in_the_way(tmp_path):
    with pytest.raises(UsageError, match="is a folder; name a file"):
        save(tmp_path, Checkpoint(lively(micro_spec())))


def test_a_failed_write_leaves_the_old_file_and_no_other(saved, monkeypatch):
    path, net = saved
    good = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, Checkpoint(net))
    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [path.name]
