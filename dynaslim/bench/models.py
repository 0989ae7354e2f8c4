"""Models and images for benchmarks; a model is given by name, file or folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynaslim.checkpoint import Checkpoint, create_model
from dynaslim.data import load_images, open_source
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import normalise, sample_batches
from dynaslim.errors import UsageError, check
from dynaslim.model_names import find_model
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.backends import default_device
from dynaslim.runtime.engine import Engine
from dynaslim.train import recalibrate
from dynaslim.zoo import get_spec


def random_network(name: str, image_size: int) -> SlimNet:
    """A zoo entry with random weights and BN statistics computed for them.

    Without these statistics, activations would shrink from layer to layer and become denormal
    numbers, which processors handle many times more slowly than a trained network's activations.
    """
    torch.manual_seed(0)
    net = create_model(name)
    generator = torch.Generator().manual_seed(0)
    spec = net.spec
    x = torch.randn(8, spec.in_channels, image_size, image_size, generator=generator)
    recalibrate(net, [x])
    return net.eval()


def open_engine(
    model: str,
    backend: str,
    image_size: int | None,
    precision: str,
    batch_size: int,
    *,
    cache: bool = True,
) -> tuple[Engine, int]:
    """An engine for a zoo entry, spec file, package or checkpoint, and its image side in px.

    Raises:
        UsageError: as `Engine`, or for a precision that is neither fp32 nor the package's own.
        CheckpointError, PackageError: if the file cannot be read.
    """
    options: dict[str, Any] = {"backend": backend, "batch_size": batch_size}
    if not cache:
        options["cache_dir"] = None
    found = find_model(model)
    if found.kind == "architecture":
        spec = get_spec(model)
        side = image_size or spec.usual_image_size
        spec.check_image_size(side, side)
        net = random_network(model, side).to(default_device(backend))
        return Engine(net, precision=precision, image_size=side, **options), side
    if found.kind == "package":
        engine = Engine.from_package(found.path, image_size=image_size, **options)
        own = engine.source.precision
        check(precision in ("fp32", own), f"precision {precision}: the package is {own}")
    else:
        engine = Engine.from_checkpoint(
            found.path, precision=precision, image_size=image_size, **options
        )
    side = image_size or engine.usual_image_size
    engine.spec.check_image_size(side, side)
    return engine, side


def some_images(
    engine: Engine, side: int, rows: int, data: str | None, split: str, seed: int
) -> np.ndarray:
    """Noise, or the normalised images of a data set: (at least `rows`, C, side, side).

    Raises:
        UsageError: if the network has no preprocessing or one for another size, or if the data
            set has fewer than `rows` images.
        DataError: if the images cannot be read.
    """
    if data is None:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((rows, engine.spec.in_channels, side, side), np.float32)
    pre = engine.preprocessing
    if pre is None or pre.image_size_px != side:
        raise UsageError(f"--data: the model does not have how images of {side} px are prepared")
    source = open_source(data, split)
    check(len(source) >= rows, f"{data}: has {len(source)} images, a batch takes {rows}")
    images = load_images(source, pre)
    # shuffled, since data sets are often sorted by class
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    found: np.ndarray = normalise(images.images_NCSS[order[: max(rows, 4096)]], pre).numpy()
    return found


def calibration_batches(
    checkpoint: Checkpoint, data: str, split: str, images: int
) -> Iterator[Tensor]:
    """Normalised batches of randomly chosen images of a data set.

    Raises:
        UsageError: if the checkpoint has no preprocessing, or if `images` is below 1.
        DataError: if the images cannot be read.
    """
    check(images >= 1, f"--calibration-images {images}: must be at least 1")
    pre = _prepared(checkpoint)
    return sample_batches(ImageDataset.of(open_source(data, split), pre), pre, 64, images)


def compare_precisions(
    checkpoint: Checkpoint, source: Any, data: str, split: str, images: int
) -> dict[str, Any]:
    """Compare int8 segment variants with the float32 network on images; returns JSON values."""
    from dynaslim.runtime.accuracy import accuracy_report

    pre = _prepared(checkpoint)
    loaded = ImageDataset.of(open_source(data, split), pre)
    reference = Engine(checkpoint, backend="onnxruntime", cache_dir=None)
    quantised = Engine.from_source(source, checkpoint, backend="onnxruntime", cache_dir=None)
    report: dict[str, Any] = accuracy_report(reference, quantised, loaded, pre, limit=images)
    return report


def _prepared(checkpoint: Checkpoint) -> Preprocessing:
    if checkpoint.preprocessing is None:
        raise UsageError("the checkpoint does not say how images are prepared (preprocessing)")
    return checkpoint.preprocessing
