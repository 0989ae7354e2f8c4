"""Model repositories as their servers read them; the servers themselves are not here."""

import json

import numpy as np
import onnxruntime
import openvino
import pytest
from helpers import lively, micro_spec

from dynaslim.checkpoint import Checkpoint
from dynaslim.errors import UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.model_servers import export_ovms

CLASSES = tuple("abcde")


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(lively(micro_spec(), image_size=16), CLASSES, Preprocessing(16))


@pytest.fixture(scope="module")
def images():
    """Normalised images (B, C, S, S) that the gates tell apart."""
    rng = np.random.default_rng(0)
    rough = rng.standard_normal((12, 3, 16, 16)) * rng.uniform(0, 2, (12, 1, 1, 1))
    return (rough + rng.standard_normal((12, 3, 1, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def expected(checkpoint, images):
    """What the engine answers."""
    found = Engine(checkpoint.net, backend="onnxruntime", cache_dir=None)(images)
    assert len({tuple(row) for row in found.routes.tolist()}) > 2, "the test needs several routes"
    return found


def row_by_row(run, images):
    """Logits and choices of images that are run one by one."""
    logits, choices = zip(*(run(row[None]) for row in images), strict=True)
    return np.concatenate(logits), np.concatenate(choices)


def test_openvino_runs_what_its_server_reads(checkpoint, images, expected, tmp_path):
    assert export_ovms(checkpoint, tmp_path / "models") < 1e-4
    config = json.loads((tmp_path / "models" / "config.json").read_text())
    ((model,),) = [[one["config"] for one in config["model_config_list"]]]
    assert model == {"name": "micro", "base_path": "micro"}
    place = tmp_path / "models" / model["base_path"]
    assert [file.relative_to(place).as_posix() for file in place.rglob("*.*")] == ["1/model.onnx"]
    compiled = openvino.Core().compile_model(place / "1" / "model.onnx", "CPU")
    assert [(one.any_name, list(one.shape)) for one in compiled.inputs] == [("x", [1, 3, 16, 16])]

    def run(x):
        made = compiled({"x": x})
        return made["logits"], made["choices"]

    logits, choices = row_by_row(run, images)
    assert choices.tolist() == expected.routes.tolist()
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=2e-4)


def test_a_repository_of_several_models(checkpoint, tmp_path):
    export_ovms(checkpoint, tmp_path, "first")
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "monitoring": 1})
    )
    export_ovms(checkpoint, tmp_path, "second")
    config = json.loads((tmp_path / "config.json").read_text())
    assert [one["config"]["name"] for one in config["model_config_list"]] == ["first", "second"]
    assert config["monitoring"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "first", "second"]
    with pytest.raises(UsageError, match="first: is there already; remove it, or give another"):
        export_ovms(checkpoint, tmp_path, "first")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="not a config of OpenVINO Model Server"):
        export_ovms(checkpoint, tmp_path, "third")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: not JSON"):
        export_ovms(checkpoint, tmp_path, "third")
    assert not (tmp_path / "third").exists()
    with pytest.raises(UsageError, match="is a file; name a folder"):
        export_ovms(checkpoint, tmp_path / "config.json")
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*")), "nothing is left behind"


def test_onnx_runtime_runs_the_same_file(checkpoint, images, expected, tmp_path):
    export_ovms(checkpoint, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "micro" / "1" / "model.onnx")
    _, choices = row_by_row(lambda x: session.run(None, {"x": x}), images)
    assert choices.tolist() == expected.routes.tolist()
