"""A network run as programs: an exported package, a cascade, or a compiled copy of a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from dynaslim.checkpoint import Checkpoint, read
from dynaslim.errors import UsageError, check
from dynaslim.model_names import find_model
from dynaslim.nn.net import ElasticNet, SegmentOutput
from dynaslim.runtime.backends.eager import device_of
from dynaslim.runtime.cascade_source import CascadeSource
from dynaslim.runtime.libraries import installed, onnx_session, require
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.package import open_package
from dynaslim.runtime.variants import (
    Precision,
    SegmentVariant,
    Variant,
    VariantSource,
    segment_variants,
)
from dynaslim.spec import Route

_CHOICE: Final = "_dynaslim_choice"
_COMPILER: Final = ("onnx", "onnxruntime")


class ProgramNet(ElasticNet):
    """A network whose segments are the programs of a `VariantSource`: a package's, a cascade's, or
    those of a network in memory, compiled.

    It can be evaluated, calibrated and reported on like any other network, but has no weights to
    train or to write to a checkpoint.
    """

    has_weights = False

    def __init__(self, source: VariantSource, *, compiled: bool = False) -> None:
        """With `compiled`, ONNX Runtime also runs what the source has as modules."""
        super().__init__()
        self.spec = source.spec
        self.source = source
        self._compiled = compiled
        self._programs: dict[tuple[Variant, torch.dtype], nn.Module] = {}
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device on which its programs run."""
        return device_of(self.source)

    @property
    def plain_backend(self) -> str:
        plain = self.source.has_modules and self.source.precision != "int8"
        return "eager" if plain and not self._compiled else "onnxruntime"

    def program(self, variant: Variant, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A variant as a module; if it exists only as ONNX, it runs in ONNX Runtime, in float32."""
        if (variant, dtype) not in self._programs:
            made = None
            if not self._compiled:
                with suppress(UsageError):
                    made = self.source.module(variant, dtype)
            if made is None:
                made = OnnxModule(self.source.onnx(variant))
            self._programs[variant, dtype] = made
        return self._programs[variant, dtype]

    def segment(
        self,
        number: int,
        x: Tensor,
        choice: int,
        *,
        decide: bool = True,
        dropout_mask: Tensor | None = None,
    ) -> SegmentOutput:
        """Run segment `number` on the previous segment's result, like `SlimNet.segment`."""
        # the program depends on the previous choice, which is stored only on the tensor
        before = getattr(x, _CHOICE, 0) if number > 1 else 0
        made = self.program(SegmentVariant(number, before, choice))(x.float())
        if number == len(self.spec.gates):
            return SegmentOutput(made, None)
        features, gate_logits = made
        setattr(features, _CHOICE, choice)
        return SegmentOutput(features, gate_logits if decide else None)


class OnnxModule(nn.Module):
    """An ONNX model with one input, run by ONNX Runtime on the CPU."""

    def __init__(self, model: Path | bytes) -> None:
        super().__init__()
        options = require("onnxruntime").SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnx_session(model, options)

    def forward(self, x: Tensor) -> Any:
        """Images or features (B, C, H, W) -> the outputs of the model."""
        name = self._session.get_inputs()[0].name
        made = self._session.run(None, {name: x.detach().float().cpu().contiguous().numpy()})
        outs = tuple(map(torch.from_numpy, made))
        return outs[0] if len(outs) == 1 else outs


@dataclass(frozen=True)
class ProgramCheckpoint(Checkpoint):
    """A checkpoint whose network is a `ProgramNet`; it has no recipe."""

    mirror: bool = False
    """Whether mirroring an image keeps its class, according to its parts or its manifest."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Notes from a package's manifest."""


def read_model(name: str | Path) -> tuple[Checkpoint, Path]:
    """Read a checkpoint or package by any name (`model_names`); also returns its file or folder.

    Raises:
        CheckpointError, HubError, PackageError: if it cannot be read.
    """
    found = find_model(name, ("checkpoint", "package"))
    if found.kind == "checkpoint":
        return read(found.path), found.path
    package = open_package(found.path)
    made = ProgramCheckpoint(
        ProgramNet(package.source),
        class_names=package.class_names,
        preprocessing=package.preprocessing,
        metrics=package.manifest["metrics"],
        budget=package.budget,
        mirror=package.mirror,
        notes=package.manifest["notes"],
    )
    return made, found.path


def program_net(net: ElasticNet) -> ProgramNet:
    """Wrap a network in a `ProgramNet`, unless it is one."""
    return net if isinstance(net, ProgramNet) else ProgramNet(NetworkSource(net))


def frozen(net: ElasticNet, variant: Variant) -> nn.Module:
    """A copy of a network's segment or route for passes without gradients.

    On a CPU it is run by ONNX Runtime if possible, which takes a fifth of the network's own time at
    224 px.

    Raises:
        RuntimeError: if the network is in training mode.
    """
    source = NetworkSource(net)
    if _can_compile(net):
        with suppress(Exception):  # no ONNX form, or ONNX Runtime fails in its own ways
            return OnnxModule(source.onnx(variant))
    return source.module(variant)


def for_evaluation(
    net: ElasticNet,
    image_size_px: int,
    images: int,
    batch_size: int,
    routes: Sequence[Route] | None = None,
) -> tuple[ElasticNet, int]:
    """A network to run on `images` images without gradients, and the rows for each pass.

    If images are large and many, it is a copy run by ONNX Runtime, as for `frozen`. Compiling takes
    up to a second for each variant of a segment: those of `routes`, or by default all.

    Raises:
        RuntimeError: if the network is in training mode.
    """
    rows = net.rows_at_once(image_size_px, batch_size)
    if rows < batch_size < images and _can_compile(net) and not net.spec.has_separate_teacher:
        with suppress(Exception):
            compiled = ProgramNet(NetworkSource(net), compiled=True)
            for variant in segment_variants(net.spec) if routes is None else _along(net, routes):
                compiled.program(variant)
            return compiled, rows
    return net, rows


def _along(net: ElasticNet, routes: Sequence[Route]) -> Iterator[SegmentVariant]:
    """The variants of the segments on routes."""
    for route in routes:
        indices = net.spec.segment_indices(route)
        for number, pair in enumerate(itertools.pairwise((0, *indices))):
            yield SegmentVariant(number, *pair)


def _can_compile(net: ElasticNet) -> bool:
    return net.has_weights and net.device.type == "cpu" and all(map(installed, _COMPILER))


def source_of(net: ElasticNet, precision: Precision = "fp32") -> VariantSource:
    """The source of a network's variants in a precision.

    Raises:
        UsageError: for a precision in which the package was not exported, or int8 for a cascade.
        RuntimeError: if the network is in training mode.
    """
    if not isinstance(net, ProgramNet):
        return NetworkSource(net, precision)
    if isinstance(net.source, CascadeSource):
        return net.source.in_precision(precision)
    own = net.source.precision
    check(precision in ("fp32", own), f"precision {precision}: the package is {own}")
    return net.source
