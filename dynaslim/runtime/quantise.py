"""Variants in 8-bit integers: post-training quantisation of a network in memory.

Each variant is calibrated on the features that arrive at it, and rounded by ONNX Runtime's
quantiser in the QDQ format, which every backend of precision int8 reads. What is rounded, and what
was tried instead, is measured in docs/performance.md:

- the inputs of convolutions and their weights, these per channel; gates, slimming heads and the
  classifier stay float, for they decide and cost nothing;
- no depthwise convolution: of little work, and their 9 weights a channel suffer most;
- not the convolution that takes images: 3 channels fill no integer kernel;
- the outputs of those convolutions too, without which onnxruntime runs them in float; but not for
  openvino, which is then faster and closer to float. Both run either kind of graph.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dynaslim.errors import UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.nn.net import ElasticNet
from dynaslim.runtime.cache import open_cache, processor_flags
from dynaslim.runtime.libraries import installed, require
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.onnx_graph import INPUT
from dynaslim.runtime.variants import (
    Precision,
    RouteVariant,
    SegmentVariant,
    Variant,
    segment_variants,
)

if TYPE_CHECKING:
    import onnx

IMAGES: Final = 256
"""Calibration images that are used, at most."""
ROWS: Final = 16
"""Images that are run at once: 9 MB at 224 px, and features of a few times that."""
KEPT_BYTES: Final = 256 * 2**20
"""Features that are kept for the next variant; others are computed again."""
METHOD: Final = 1
"""Counts the changes to what is rounded and how: files made by an older method are not used."""


class QuantisedSource:
    """A network's variants as ONNX graphs with 8-bit convolutions; a `VariantSource`.

    Making one reads the calibration images; a variant is calibrated and rounded at its first use
    (seconds at 224 px), and kept on disk, where the next process finds it. May be used by several
    threads at once.
    """

    precision: Precision = "int8"
    has_modules = True
    """It has programs of whole routes, though no torch modules."""

    def __init__(
        self,
        net: ElasticNet,
        calibration: Iterable[Tensor | np.ndarray],
        *,
        images: int = IMAGES,
        backend: str = "any",
        cache_dir: str | Path | None = "auto",
    ) -> None:
        """Variants of a network, calibrated on batches (B, C, H, W) of normalised images.

        All images have one size; the first `images` rows are used.

        `backend` is the one that the graphs are for, and decides whether outputs are rounded too,
        see above: by "openvino" they are not, by "auto" if openvino is not installed, by any other
        name they are, which suits graphs that go elsewhere. `cache_dir` is where graphs are kept,
        as for `Engine`; None keeps none.

        Raises:
            UsageError: if onnx or onnxruntime, which does the rounding, is not installed; if the
                calibration has no images, or any that the network does not take.
            RuntimeError: if the network is in training mode.
        """
        require("onnx")
        self._version = require("onnxruntime").__version__
        check(type(images) is int and images >= 1, f"images {images}: must be at least 1")
        self._source = NetworkSource(net, "int8")
        self.spec: AnySpec = net.spec
        self._images = calibration_images(self.spec, calibration, images)
        self._activations = ActivationSampler(self._source, self._images)
        self.rounds_outputs = not (
            backend == "openvino" or (backend == "auto" and installed("openvino"))
        )
        """Whether convolutions' outputs are rounded too."""
        self.reduced_range = saturates()
        """Whether weights have 7 bits, see `saturates`."""
        self._cache = open_cache(self.key, cache_dir)
        self._kept: dict[Variant, bytes] = {}
        self._missing = set(segment_variants(self.spec))
        self._lock = threading.Lock()

    @cached_property
    def key(self) -> str:
        """Digest of spec, weights, calibration images, and how they are made into programs."""
        digest = hashlib.sha256(
            f"{self._source.key} onnxruntime {self._version} method {METHOD} "
            f"outputs {self.rounds_outputs} reduced {self.reduced_range} "
            f"{tuple(self._images.shape)}".encode()
        )
        digest.update(self._images.numpy().data)
        return digest.hexdigest()

    def module(self, variant: Variant, dtype: torch.dtype) -> nn.Module:
        """As `VariantSource.module`: raises `UsageError`."""
        raise UsageError(
            f"{variant.name}: precision int8 has no torch modules; it runs on onnxruntime and "
            f"openvino"
        )

    def onnx(self, variant: Variant) -> bytes:
        """As `VariantSource.onnx`: calibrates the variant, unless it was made before."""
        with self._lock:
            if variant in self._kept:
                return self._kept[variant]
            file = f"{variant.name}.int8.onnx"
            path = None if self._cache is None else self._cache.find(file)
            if path is not None:
                with suppress(OSError):  # what cannot be read is made again
                    return path.read_bytes()
            made = self._make(variant)
            if self._cache is None or not self._cache.write(file, made):
                self._kept[variant] = made
            self._missing.discard(variant)
            if not self._missing:  # whole routes, if any are still to come, take images
                self._activations.forget()
            return made

    def sample(self, variant: Variant) -> np.ndarray:
        """A few calibration rows as they arrive at a variant, (B, C, H, W) float32: what to compare
        programs on, for features of any other kind lie outside the ranges that were calibrated.
        """
        with self._lock:
            return next(self._activations.at(variant))

    def _make(self, variant: Variant) -> bytes:
        onnx = require("onnx")
        plain = self._source.onnx(variant)
        model = onnx.load_from_string(plain)
        nodes = rounded_convolutions(model, takes_images=variant.takes_images)
        if not nodes:  # a trunk of the first and a depthwise convolution
            return plain
        return quantise(
            model,
            nodes,
            self._activations.at(variant),
            rounds_outputs=self.rounds_outputs,
            reduced_range=self.reduced_range,
        )


def quantise(
    model: onnx.ModelProto,
    nodes: list[str],
    batches: Iterator[np.ndarray],
    *,
    rounds_outputs: bool,
    reduced_range: bool,
) -> bytes:
    """A float ONNX model -> the same with those convolutions in 8 bits, in the QDQ format.

    `batches` are inputs (B, C, H, W), float32, whose extremes set the ranges of the activations.
    Activations are uint8 with a zero point, weights int8 per channel and symmetric. An activation
    that only cuts off (ReLU, ReLU6) becomes part of the rounding behind it.
    """
    quantization = require("onnxruntime.quantization")
    # without this note it logs a warning that the model should be cleaned up first
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    cuts = [node.name for node in model.graph.node if node.op_type in ("Relu", "Clip")]
    with tempfile.TemporaryDirectory(prefix="dynaslim") as folder:
        path = Path(folder) / "quantised.onnx"
        quantization.quantize_static(
            model,
            path,
            _Reader(batches),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Clip"],
            nodes_to_quantize=nodes + cuts,
            per_channel=True,
            reduce_range=reduced_range,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={}
            if rounds_outputs
            else {"OpTypesToExcludeOutputQuantization": ["Conv"]},
        )
        return path.read_bytes()


class _Reader:
    """Batches as the quantiser reads them; it calls no other method."""

    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def rounded_convolutions(model: onnx.ModelProto, *, takes_images: bool) -> list[str]:
    """Names of the convolutions that are worth rounding: not depthwise, not of images."""
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv" or (takes_images and node.input[0] == INPUT):
            continue
        if all(attribute.i == 1 for attribute in node.attribute if attribute.name == "group"):
            found.append(node.name)
    return found


def saturates() -> bool:
    """Whether this processor multiplies 8-bit pairs by an instruction whose sums overflow.

    x86 without VNNI adds two products of uint8 and int8 in 16 bits; weights of 7 bits fit.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(processor_flags().split())


def calibration_images(
    spec: AnySpec, batches: Iterable[Tensor | np.ndarray], images: int
) -> Tensor:
    """The first images of the batches as one tensor (N, C, H, W), float32, on the CPU.

    Raises:
        UsageError: if there are none, or a batch is not one of normalised images, all of one size,
            that the network takes.
    """
    wanted = f"give batches (rows, {spec.in_channels}, height, width) of normalised images"
    check(isinstance(batches, Iterable), f"calibration of type {type(batches).__name__}: {wanted}")
    found: list[Tensor] = []
    rows = 0
    for number, batch in enumerate(batches):
        x = _batch(spec, batch, f"calibration batch {number}", wanted)
        if found and x.shape[2:] != found[0].shape[2:]:
            raise UsageError(
                f"calibration batch {number} of shape {tuple(x.shape)}: the first has images of "
                f"{found[0].shape[2]} x {found[0].shape[3]}; give all one size"
            )
        if len(x):
            found.append(x[: images - rows])
            rows += len(found[-1])
        if rows == images:
            break
    check(rows > 0, f"calibration has no images: {wanted}")
    return torch.cat(found)


def _batch(spec: AnySpec, batch: Any, what: str, wanted: str) -> Tensor:
    if not isinstance(batch, Tensor | np.ndarray):
        raise UsageError(f"{what} of type {type(batch).__name__}: {wanted}")
    x = torch.from_numpy(np.ascontiguousarray(batch)) if isinstance(batch, np.ndarray) else batch
    if x.ndim != 4 or x.shape[1] != spec.in_channels:
        raise UsageError(f"{what} of shape {tuple(x.shape)}: {wanted}")
    check(x.is_floating_point(), f"{what} of {x.dtype}: {wanted}")
    spec.check_image_size(x.shape[2], x.shape[3])
    x = x.detach().to("cpu", torch.float32).contiguous()
    bad = (~x.isfinite().all(3).all(2).all(1)).nonzero()
    if len(bad):
        raise UsageError(
            f"{what}: row {int(bad[0])} has values that are not finite (NaN, infinity)"
        )
    return x


# -- what arrives at each variant -----------------------------------------------------------------
#
# A variant's input has the statistics of the path that led to it. All paths would be too many, so
# every image takes one path, drawn once and for all gates such that each choice gets its share of
# images: the variants behind a width see all images, those of each width before it on parts of
# their own.


class Part(NamedTuple):
    """Images of a batch that leave a segment at the same width."""

    width: int
    """Its index."""
    rows: np.ndarray
    """Which of the batch."""
    features: Tensor


class ActivationSampler:
    """Float features of the segments of a network, for images (N, C, H, W), float32, on the CPU."""

    def __init__(self, variants: NetworkSource, images: Tensor) -> None:
        self._source = variants
        self._images = images
        self._paths = [
            np.array(gate.choices)[
                np.random.default_rng(number).permutation(len(images)) % len(gate.choices)
            ]
            for number, gate in enumerate(variants.spec.gates)
        ]
        self._kept: OrderedDict[tuple[int, ...], list[Part]] = OrderedDict()
        self._bytes = 0

    def at(self, variant: Variant) -> Iterator[np.ndarray]:
        """What a variant takes, in batches (B, C, H, W): one row for every image."""
        for start in range(0, len(self._images), ROWS):
            if isinstance(variant, RouteVariant) or variant.takes_images:
                yield self._images[start : start + ROWS].numpy()
            else:
                (part,) = self._leaving(variant.segment - 1, variant.before, start)
                yield part.features.cpu().numpy()

    def forget(self) -> None:
        """Let go of the features that were kept."""
        self._kept.clear()
        self._bytes = 0

    def _leaving(self, segment: int, width: int, start: int) -> list[Part]:
        """Features behind a segment at one width, of a batch that comes to it along its paths: one
        part, its rows in the order of those paths' widths.
        """

        def compute() -> list[Part]:
            rows = np.arange(len(self._images[start : start + ROWS]))
            if segment == 0:
                return [
                    Part(0, rows, self._run(SegmentVariant(0), self._images[start : start + ROWS]))
                ]
            run = [
                self._run(SegmentVariant(segment, part.width, width), part.features)
                for part in self._along_paths(segment - 1, start)
            ]
            return [Part(width, rows, torch.cat(run))]

        return self._once((segment, start, width), compute)

    def _along_paths(self, segment: int, start: int) -> list[Part]:
        """Features behind a segment, each image at the width that its path takes there."""
        if segment == 0:
            return self._leaving(0, 0, start)

        def compute() -> list[Part]:
            path = self._paths[segment - 1][start : start + ROWS]
            found: dict[int, list[Part]] = {}
            for before in self._along_paths(segment - 1, start):
                for width in np.unique(path[before.rows]).tolist():
                    mine = np.flatnonzero(path[before.rows] == width)
                    x = before.features[torch.from_numpy(mine).to(before.features.device)]
                    made = self._run(SegmentVariant(segment, before.width, width), x)
                    found.setdefault(width, []).append(Part(width, before.rows[mine], made))
            return [
                Part(
                    width,
                    np.concatenate([part.rows for part in parts]),
                    torch.cat([part.features for part in parts]),
                )
                for width, parts in sorted(found.items())
            ]

        return self._once((segment, start), compute)

    @torch.inference_mode()
    def _run(self, variant: SegmentVariant, x: Tensor) -> Tensor:
        made = self._source.module(variant)(x.to(self._source.device))
        features: Tensor = made[0] if isinstance(made, tuple) else made
        return features

    def _once(self, key: tuple[int, ...], compute: Callable[[], list[Part]]) -> list[Part]:
        """Features that are kept, or are from now on; those used least recently make room."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = compute()
        self._kept[key] = made
        self._bytes += _bytes(made)
        while self._bytes > KEPT_BYTES:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return made


def _bytes(parts: list[Part]) -> int:
    return sum(part.features.nbytes for part in parts)
