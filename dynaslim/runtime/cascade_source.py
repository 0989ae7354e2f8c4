"""Variants of a cascade: its trunk, and a network for every rung.

A rung's variant takes the cascade's images, or the trunk's output. It resizes images to the rung's
size, normalises them as the rung expects, runs the network, and puts its classes in the cascade's
order. All of that is part of its torch module and its ONNX graph, so all backends compute the same.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaslim.cascade_spec import CascadeSpec
from dynaslim.cost import SegmentCost
from dynaslim.errors import UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.budget import cascade_logits
from dynaslim.runtime.libraries import require
from dynaslim.runtime.onnx_graph import (
    FEATURES,
    GATE_LOGITS,
    LOGITS,
    OPSET,
    to_onnx,
)
from dynaslim.runtime.variants import Precision, RouteVariant, Variant

BANDS: Final = 8
"""Number of bands into which a resizing matrix is divided. Its rows have few non-zero values, so
eight small products take a quarter of the time of the full product."""


@dataclass(frozen=True)
class Resize:
    """Resizing of an image side by a matrix that is zero outside its bands."""

    bands: tuple[tuple[int, int, Tensor], ...]
    """For each band: first and last + 1 input position, and weights (outputs, inputs)."""

    @classmethod
    def of(cls, before: int, after: int) -> Resize:
        """Antialiased bilinear resizing, as in `torch.nn.functional.interpolate` and Pillow."""
        eye = torch.eye(before)[None, None]
        whole = F.interpolate(eye, (after, before), mode="bilinear", antialias=True)[0, 0]
        bands = []
        count = min(BANDS, after)
        edges = [after * n // count for n in range(count + 1)]
        for start, stop in itertools.pairwise(edges):
            used = whole[start:stop].abs().sum(0).nonzero()
            low, high = int(used[0]), int(used[-1]) + 1
            bands.append((low, high, whole[start:stop, low:high].contiguous()))
        return cls(tuple(bands))

    def madds(self, channels: int, before: int, after: int) -> int:
        """Multiply-adds of resizing both sides of an image."""
        return sum(weight.numel() for *_, weight in self.bands) * channels * (before + after)


def resize_madds(channels: int, before: int, after: int) -> int:
    """Multiply-adds of resizing an image from one side in pixels to another."""
    if before == after:
        return 0
    return Resize.of(before, after).madds(channels, before, after)


@dataclass(frozen=True)
class RungProgram:
    """The network of a rung, ready to run: as an ONNX model, and usually also as a module.

    The module maps normalised images (B, C, S, S) to class logits (B, N). The ONNX model has one
    input and one output of these shapes.
    """

    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    num_classes: int
    madds: int
    params: int
    peak: int
    """Number of values in the largest feature map of an image."""
    module: nn.Module | None
    """None if it exists only as ONNX."""
    model: Callable[[], Any]
    """Returns the `onnx.ModelProto`."""
    digest: str
    """Digest of everything that its answers depend on."""
    probabilities: bool = False
    """Whether it returns probabilities, whose logarithms are used as logits."""
    mirror: bool = False
    """Whether mirroring an image keeps its class."""
    order: tuple[int, ...] | None = None
    """For each class of the cascade, the rung's class index; None if the order is the same."""
    parts: Parts | None = None
    """The network divided at its trunk, if other routes of it have the same trunk."""


@dataclass(frozen=True)
class Parts:
    """A route of a network, divided into a trunk that other routes share, and the rest."""

    key: str
    """Digest of the network."""
    trunk: Callable[[], nn.Module]
    """Creates a module from normalised images to features."""
    tail: Callable[[], nn.Module]
    """Creates a module from features to logits."""
    cost: SegmentCost
    """Cost of the trunk."""


class _Trunk(nn.Module):
    """Passes images through, with the same gate logits for every row."""

    logits: Tensor

    def __init__(self, logits_K: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("logits", torch.from_numpy(logits_K))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), self.logits.expand(x.shape[0], -1)


class _SharedTrunk(_Trunk):
    """Returns features, and the images if other rungs need them, as channels of a single pixel."""

    def __init__(
        self, logits_K: np.ndarray, network: nn.Module, prepare: nn.Module, with_images: bool
    ) -> None:
        super().__init__(logits_K)
        self.network, self.prepare, self.with_images = network, prepare, with_images

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.network(self.prepare(x)).flatten(1)]
        if self.with_images:
            parts.append(x.flatten(1))
        return torch.cat(parts, 1)[:, :, None, None], self.logits.expand(x.shape[0], -1)


class _Part(nn.Module):
    """Extracts features or images from the output of a `_SharedTrunk`."""

    def __init__(self, first: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.first, self.shape = first, shape

    def forward(self, x: Tensor) -> Tensor:
        taken = x[:, self.first : self.first + math.prod(self.shape)]
        return taken.reshape(-1, *self.shape)


class _Answer(nn.Module):
    """Converts the output of a rung's network to logits in the cascade's order of classes."""

    order: Tensor

    def __init__(self, rung: RungProgram) -> None:
        super().__init__()
        self.probabilities, self.sorts = rung.probabilities, rung.order is not None
        if rung.order is not None:
            self.register_buffer("order", torch.tensor(rung.order))

    def forward(self, y: Tensor) -> Tensor:
        logits = y.clamp_min(_LEAST).log() if self.probabilities else y
        return logits.index_select(1, self.order) if self.sorts else logits


class _Preparation(nn.Module):
    """Converts the cascade's images to those that a rung expects."""

    scale: Tensor
    shift: Tensor

    def __init__(self, own: Preprocessing, given: Preprocessing) -> None:
        super().__init__()
        before, after = given.image_size_px, own.image_size_px
        bands = () if before == after else Resize.of(before, after).bands
        self.bands = [(low, high) for low, high, _ in bands]
        for number, (*_, weight) in enumerate(bands):
            self.register_buffer(f"band{number}", weight)
        self.normalises = (own.mean, own.std) != (given.mean, given.std)
        if self.normalises:  # a buffer that is None cannot be exported
            mean, std, own_mean, own_std = (
                torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
                for values in (given.mean, given.std, own.mean, own.std)
            )
            self.register_buffer("scale", (std / own_std).float())
            self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    def forward(self, x: Tensor) -> Tensor:
        if self.bands:
            weights = [getattr(self, f"band{number}") for number in range(len(self.bands))]
            bands = [(a, b, w) for (a, b), w in zip(self.bands, weights, strict=True)]
            x = torch.cat([w @ x[:, :, a:b] for a, b, w in bands], 2)
            x = torch.cat([x[..., a:b] @ w.T for a, b, w in bands], 3)
        return x * self.scale + self.shift if self.normalises else x


_LEAST: Final = 1e-30
"""Smallest probability whose logarithm is taken."""


class CascadeSource:
    """The variants of a cascade; a `VariantSource`."""

    def __init__(
        self,
        spec: CascadeSpec,
        preprocessing: Preprocessing,
        rungs: Sequence[RungProgram],
        precision: Precision = "fp32",
    ) -> None:
        """`rungs` are in the order of the spec; `preprocessing` is that of the cascade's images."""
        self.spec = spec
        self.precision: Precision = precision
        self._preprocessing = preprocessing
        self._rungs = tuple(rungs)
        self._modules: dict[tuple[int | None, bool], nn.Module] = {}

    @property
    def has_modules(self) -> bool:
        """Whether all rungs are torch modules."""
        return all(rung.module is not None for rung in self._rungs)

    @cached_property
    def device(self) -> torch.device:
        """The device of the weights."""
        modules = (rung.module for rung in self._rungs if rung.module is not None)
        weights = (weight for module in modules for weight in module.parameters())
        return next((weight.device for weight in weights), torch.device("cpu"))

    def in_precision(self, precision: Precision) -> CascadeSource:
        """The same cascade in fp32 or bf16.

        Raises:
            UsageError: for int8.
        """
        if precision == "int8":
            raise UsageError("precision int8: a cascade has fp32 and bf16 only")
        return CascadeSource(self.spec, self._preprocessing, self._rungs, precision)

    @cached_property
    def key(self) -> str:
        """Digest of the networks, their class order and preparation, and the precision."""
        digest = hashlib.sha256(f"{self.spec} {self.precision} {self._preprocessing}".encode())
        for rung in self._rungs:
            parts = (rung.preprocessing, rung.order, rung.probabilities, rung.digest)
            digest.update(str(parts).encode())
        return digest.hexdigest()

    def module(self, variant: Variant, dtype: torch.dtype = torch.float32) -> nn.Module:
        key = (_rung_of(self.spec, variant), self._behind_trunk(variant))
        if key not in self._modules:
            self._modules[key] = self._made(*key).eval().to(self.device)
        module = self._modules[key]
        return module if dtype == torch.float32 else copy.deepcopy(module).to(dtype)

    def _behind_trunk(self, variant: Variant) -> bool:
        """Whether a variant takes the output of a shared trunk."""
        return self.spec.trunk is not None and not variant.takes_images

    def _made(self, number: int | None, behind_trunk: bool) -> nn.Module:
        trunk = self.spec.trunk
        if trunk is None and number is None:
            return _Trunk(cascade_logits(self.spec))
        rung = self._rungs[number or 0]
        if trunk is not None and number is None:
            assert rung.parts is not None
            others, prepare = len(trunk.rungs) < len(self._rungs), self._prepare(rung, False)
            return _SharedTrunk(cascade_logits(self.spec), rung.parts.trunk(), prepare, others)
        if behind_trunk and trunk is not None and number in trunk.rungs:
            assert rung.parts is not None
            features = _Part(0, rung.parts.cost.out)
            return nn.Sequential(features, rung.parts.tail(), _Answer(rung))
        if rung.module is None:
            raise UsageError(
                f"{rung.name}: is an ONNX model, which runs on onnxruntime and openvino"
            )
        return nn.Sequential(self._prepare(rung, behind_trunk), rung.module, _Answer(rung))

    def _prepare(self, rung: RungProgram, behind_trunk: bool) -> nn.Module:
        """A module from the input of a rung's variant to the images that the rung expects."""
        prepare = _Preparation(rung.preprocessing, self._preprocessing)
        if not behind_trunk:
            return prepare
        return nn.Sequential(_Part(self._first_pixel, self._image), prepare)

    @property
    def _image(self) -> tuple[int, int, int]:
        return self.spec.in_channels, self.spec.image_size_px, self.spec.image_size_px

    @property
    def _first_pixel(self) -> int:
        """Position of the image's first value in the output of a shared trunk."""
        assert self.spec.trunk is not None
        return self.spec.trunk.values - math.prod(self._image)

    def onnx(self, variant: Variant) -> bytes:
        number, trunk = _rung_of(self.spec, variant), self.spec.trunk
        behind_trunk = self._behind_trunk(variant)
        if number is None or (trunk is not None and behind_trunk and number in trunk.rungs):
            row = self._image if number is None or trunk is None else (trunk.values, 1, 1)
            outputs = (FEATURES, GATE_LOGITS) if number is None else (LOGITS,)
            module = copy.deepcopy(self.module(variant)).cpu()
            return to_onnx(module, torch.zeros(2, *row), outputs, variant.name, any_size=False)
        model = self._rung_model(number, behind_trunk)
        require("onnx").checker.check_model(model)
        content: bytes = model.SerializeToString()
        return content

    def _rung_model(self, number: int, behind_trunk: bool) -> Any:
        """The rung's model, between the preparation of its input and the sorting of its classes.

        The added operations are of the model's ONNX version, or of an older one in which they have
        the same form.
        """
        onnx, compose, rung = require("onnx"), require("onnx.compose"), self._rungs[number]
        model = compose.add_prefix(rung.model(), "net_", inplace=False)
        used = [one.version for one in model.opset_import if one.domain in ("", "ai.onnx")]
        opset = min([OPSET, *used])

        def exported(module: nn.Module, row: tuple[int, ...], output: str) -> Any:
            example = torch.zeros(2, *row)
            made = to_onnx(module, example, (output,), rung.name, any_size=False, opset=opset)
            return onnx.load_from_string(made)

        trunk = self.spec.trunk
        row = (trunk.values, 1, 1) if behind_trunk and trunk is not None else self._image
        front = exported(self._prepare(rung, behind_trunk), row, "prepared")
        back = exported(_Answer(rung), (rung.num_classes,), LOGITS)
        back = compose.add_prefix(back, "answer_", rename_outputs=False)
        (image,), y = inputs_of(model), model.graph.output[0].name
        graph = compose.merge_graphs(front.graph, model.graph, io_map=[("prepared", image.name)])
        graph = compose.merge_graphs(graph, back.graph, io_map=[(y, back.graph.input[0].name)])
        graph.name = self.spec.rungs[number].name
        model.graph.CopyFrom(graph)
        return model


def inputs_of(model: Any) -> list[Any]:
    """The inputs of an ONNX model that are not weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _rung_of(spec: CascadeSpec, variant: Variant) -> int | None:
    """The index of a variant's rung; None for the trunk."""
    if isinstance(variant, RouteVariant):
        return spec.segment_indices(variant.route)[1]
    return variant.choice if variant.segment else None
