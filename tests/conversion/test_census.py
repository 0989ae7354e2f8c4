"""Networks of timm and torchvision, from conversion to the package: two by the day.

DYNASLIM_CENSUS is another day's number, or names such as timm:resnet18,timm:convnext_atto.
"""

import datetime
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from convertible import routed_alone

from dynaslim.checkpoint import Checkpoint
from dynaslim.conversion import Conversion
from dynaslim.cost import madds
from dynaslim.data import ImageDataset
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import OptimRecipe, SupernetRecipe
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.export import export_package
from dynaslim.train import train_supernet

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks.conversion import PAGE, let_torchvision_load, model_of, with_coverage  # noqa: E402

SMALL_S = 3.0
"""What a conversion of the sample may take on one core."""
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "conversion.json").read_text())["models"]


def names():
    chosen = os.environ.get("DYNASLIM_CENSUS") or str(datetime.date.today().toordinal())
    if not chosen.isdigit():
        return chosen.split(",")
    small = [n for n, row in RESULTS.items() if row["converts"] and row["seconds"] < SMALL_S]
    return [small[(2 * int(chosen) + k) % len(small)] for k in range(2)]


def test_the_table_in_the_docs_is_what_was_measured():
    page = PAGE.read_text()
    assert "| timm:resnet18 | cnn | yes |" in page
    assert page == with_coverage(page, RESULTS)


@pytest.mark.parametrize("name", names())
def test_a_network_of_the_census(name, tmp_path, one_thread):
    library = name.partition(":")[0]
    try:
        let_torchvision_load()
        importlib.import_module(library)
    except ImportError as error:
        pytest.skip(f"{name} is not tried: {library} is not installed ({error})")
    model, x = model_of(name, side=96)
    conversion = Conversion(model, x)
    net = conversion.net()
    assert conversion.error <= 1e-5
    side = x.shape[2]
    assert madds(net.spec, net.spec.smallest, side) < madds(net.spec, net.spec.largest, side)

    pre = Preprocessing(image_size_px=side, mean=(0.5,) * 3, std=(0.25,) * 3)
    pixels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    data = ImageDataset(pixels, torch.arange(4), tuple(map(str, range(net.spec.num_classes))))
    recipe = SupernetRecipe(
        epochs=1, batch_size=2, calibration_batches=1, optim=OptimRecipe(lr=1e-3)
    )
    losses = []
    before = {key: value.clone() for key, value in net.named_parameters()}
    train_supernet(net, data, pre, recipe, on_step=losses.append)
    assert len(losses) == 2
    changed = sum(not torch.equal(before[k], v) for k, v in net.named_parameters())
    assert changed > len(before) / 4  # small steps are lost in float32

    net.eval()
    with torch.no_grad():  # gates that send images different ways
        images = torch.randn(6, 3, side, side) * torch.linspace(0.2, 2, 6)[:, None, None, None]
        hidden = net.segment_hidden(0, images, 0)[1]
        rows = (hidden - hidden.mean(0)) / hidden.std().clamp_min(1e-6)
        net.gates[0].slimming_weight.copy_(rows[: len(net.spec.routes)])
    _, expected = routed_alone(net, images)
    export_package(Checkpoint(net=net, preprocessing=pre), tmp_path / "package")
    engines = [Engine(net, backend=backend) for backend in ("eager", "onnxruntime")]
    for engine in (*engines, Engine.from_package(tmp_path / "package", backend="onnxruntime")):
        got = torch.as_tensor(engine(images.numpy()).logits)
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-3
