"""Models to convert, by name: EfficientNet-Lite, timm, torchvision, or a function in a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynaslim.conversion import efficientnet_lite
from dynaslim.conversion.build import Conversion
from dynaslim.conversion.efficientnet_lite import CLASSES, VARIANTS, EfficientNetLite, pretrained
from dynaslim.errors import UsageError, check, first_line
from dynaslim.preprocessing import Preprocessing

KINDS = (*VARIANTS, "timm:NAME", "torchvision:NAME", "module:FILE.py:FUNCTION")


@dataclass(frozen=True)
class Source:
    """A model in evaluation mode, and its preprocessing of images."""

    model: nn.Module
    preprocessing: Preprocessing
    name: str

    def conversion(
        self, widths: Sequence[float], gate_at: Sequence[str], protect: Sequence[str]
    ) -> Conversion:
        """Convert the model for images of its preprocessing size; arguments as in `convert`."""
        pre = self.preprocessing
        shape = (2, pre.channels, pre.image_size_px, pre.image_size_px)
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return Conversion(self.model, example, widths, gate_at, protect, self.name)


def load_source(
    text: str,
    *,
    weights: Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> Source:
    """Load the model that `text` names, with `weights` (.safetensors, or .pth read by torch's
    restricted loader) if they are given. Otherwise an EfficientNet-Lite has the weights of the
    extra, timm and torchvision models have random ones, and a user's function decides; it returns a
    module, or a pair of a module and its `Preprocessing` (by default ImageNet's, at 224 px).

    Raises:
        UsageError: for another kind of name, a library that is not installed, a model that it does
            not have, or weights that do not fit; the message names them.
    """
    kind, _, name = text.partition(":")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    usual = Preprocessing(224)
    model: nn.Module
    if text in VARIANTS:
        check(num_classes in (None, CLASSES), f"{text}: has {CLASSES} classes")
        model = pretrained(text) if weights is None else EfficientNetLite(text)
        usual, name = efficientnet_lite.preprocessing(text), text
    elif kind == "timm" and name:
        timm = _library("timm", text)
        if not timm.is_model(name):
            raise UsageError(f"{text}: timm has no such model")
        model = timm.create_model(name, **classes)
        config = getattr(model, "pretrained_cfg", {}) or {}
        usual = Preprocessing(
            int(config.get("input_size", (3, 224, 224))[-1]),
            tuple(config.get("mean", usual.mean)),
            tuple(config.get("std", usual.std)),
            float(config.get("crop_pct", 1.0)),
        )
    elif kind == "torchvision" and name:
        models = _library("torchvision.models", text)
        if name not in models.list_models():
            raise UsageError(f"{text}: torchvision has no such model")
        model = models.get_model(name, weights=None, **classes)
    elif kind == "module" and name.count(":") >= 1:
        file, _, function = name.rpartition(":")
        model, usual = _from_file(Path(file), function, text, usual)
        name = function
    else:
        raise UsageError(f"{text}: expected {', '.join(KINDS)}")
    if weights is not None:
        load_weights(model, weights)
    preprocessing = replace(usual, image_size_px=image_size or usual.image_size_px)
    return Source(model.eval(), preprocessing, name)


def _library(name: str, text: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UsageError(
            f"{text}: {package} cannot be imported ({error}); install it: pip install {package}"
        ) from None


def _from_file(
    file: Path, function: str, text: str, usual: Preprocessing
) -> tuple[nn.Module, Preprocessing]:
    check(file.is_file(), f"{text}: no such file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    factory = getattr(module, function, None)
    check(callable(factory), f"{text}: {file} has no function {function!r}")
    made = factory()  # type: ignore[misc]
    model, preprocessing = made if isinstance(made, tuple) and len(made) == 2 else (made, usual)
    check(
        isinstance(model, nn.Module) and isinstance(preprocessing, Preprocessing),
        f"{text}: {function} returns no torch.nn.Module, nor one with a Preprocessing",
    )
    return model, preprocessing


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors or `torch.save` file, without running code from it.

    Raises:
        UsageError: if the file is missing, or holds something else.
    """
    check(file.is_file(), f"weights {file}: no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the libraries raise many kinds
        raise UsageError(
            f"weights {file}: not readable as weights alone: {first_line(error)}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    check(
        isinstance(found, dict) and all(isinstance(v, Tensor) for v in found.values()),
        f"weights {file}: not a state dict",
    )
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def load_weights(model: nn.Module, file: Path) -> None:
    """Load weights into a model by name, or by position if names differ and all shapes match.

    Raises:
        UsageError: if they do not fit; the message names what is missing, unexpected or of another
            shape.
    """
    found, own = read_weights(file), model.state_dict()
    if set(found) != set(own):
        # perhaps the same architecture under the names of another library
        ours = [(k, v.shape) for k, v in own.items() if not k.endswith("num_batches_tracked")]
        theirs = [(k, v) for k, v in found.items() if not k.endswith("num_batches_tracked")]
        if [shape for _, shape in ours] == [v.shape for _, v in theirs]:
            found = {k: v for (k, _), (_, v) in zip(ours, theirs, strict=True)}
            own.update(found)
            found = own
    missing, unexpected = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    other = sorted(k for k in set(own) & set(found) if own[k].shape != found[k].shape)
    wrong = {"missing": missing, "unexpected": unexpected, "other_shape": other}
    problems = [
        f"{what.replace('_', ' ')} {', '.join(names[:5])}"
        f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in wrong.items()
        if names
    ]
    if problems:
        raise UsageError(f"weights {file} do not fit the model: {'; '.join(problems)}", **wrong)
    model.load_state_dict(found)
