"""Variants in 8-bit integers: post-training quantisation of a network in memory.

Each variant is calibrated on the features that reach it. ONNX Runtime's quantiser rounds it in the
QDQ format, which all int8 backends read. docs/performance.md has measurements of these choices and
of their alternatives:

- The inputs and weights of convolutions are rounded, weights per channel. Gates, slimming heads and
  the classifier stay in float, because they decide and cost almost nothing.
- Depthwise convolutions are not rounded: they do little work, and their 9 weights per channel
  suffer most.
- The convolution that takes images is not rounded: 3 channels do not fill an integer kernel.
- The outputs of rounded convolutions are rounded too, or else onnxruntime runs them in float; but
  not for openvino, which is then faster and closer to float. Both run either kind of graph.
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
"""Maximum number of calibration images."""
ROWS: Final = 16
"""Images that are run at once: 9 MB at 224 px, and features of a few times that size."""
KEPT_BYTES: Final = 256 * 2**20
"""Bytes of features that are kept for later variants; others are computed again."""
METHOD: Final = 1
"""Version of the quantisation method: files made by another version are not used."""


class QuantisedSource:
    """A network's variants as ONNX graphs with 8-bit convolutions; a `VariantSource`.

    The constructor reads the calibration images. A variant is calibrated and rounded at its first
    use (seconds at 224 px), and kept on disk for later processes. Thread-safe.
    """

    precision: Precision = "int8"
    has_modules = True
    """It has whole routes, although no torch modules."""

    def __init__(
        self,
        net: ElasticNet,
        calibration: Iterable[Tensor | np.ndarray],
        *,
        images: int = IMAGES,
        backend: str = "any",
        cache_dir: str | Path | None = "auto",
    ) -> None:
        """Calibrate a network's variants on batches (B, C, H, W) of normalised images.

        All images must have the same size; the first `images` rows are used.

        `backend` is the one that will run the graphs. It decides whether outputs are rounded (see
        the module's description): not for "openvino", for "auto" only if openvino is not installed,
        and always for any other name, which suits graphs for use elsewhere. `cache_dir` is the
        folder for graphs, as for `Engine`; None keeps none.

        Raises:
            UsageError: if onnx or onnxruntime, which does the rounding, is not installed; if the
                calibration has no images, or any that the network cannot take.
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
        """Whether the outputs of convolutions are rounded too."""
        self.reduced_range = saturates()
        """Whether weights have only 7 bits; see `saturates`."""
        self._cache = open_cache(self.key, cache_dir)
        self._kept: dict[Variant, bytes] = {}
        self._missing = set(segment_variants(self.spec))
        self._lock = threading.Lock()

    @cached_property
    def key(self) -> str:
        """Digest of spec, weights, calibration images and quantisation method."""
        digest = hashlib.sha256(
            f"{self._source.key} onnxruntime {self._version} method {METHOD} "
            f"outputs {self.rounds_outputs} reduced {self.reduced_range} "
            f"{tuple(self._images.shape)}".encode()
        )
        digest.update(self._images.numpy().data)
        return digest.hexdigest()

    def module(self, variant: Variant, dtype: torch.dtype) -> nn.Module:
        """Like `VariantSource.module`, but always raises `UsageError`."""
        raise UsageError(
            f"{variant.name}: precision int8 has no torch modules; it runs on onnxruntime and "
            f"openvino"
        )

    def onnx(self, variant: Variant) -> bytes:
        """Like `VariantSource.onnx`; calibrates and rounds the variant if it is not stored yet."""
        with self._lock:
            if variant in self._kept:
                return self._kept[variant]
            file = f"{variant.name}.int8.onnx"
            path = None if self._cache is None else self._cache.find(file)
            if path is not None:
                with suppress(OSError):  # a file that cannot be read is made again
                    return path.read_bytes()
            made = self._make(variant)
            if self._cache is None or not self._cache.write(file, made):
                self._kept[variant] = made
            self._missing.discard(variant)
            if not self._missing:  # whole routes may still follow, but they take images
                self._activations.forget()
            return made

    def sample(self, variant: Variant) -> np.ndarray:
        """A few calibration rows as they reach a variant, (B, C, H, W) float32. Compare programs on
        these, because other features are outside the calibrated ranges.
        """
        with self._lock:
            return next(self._activations.at(variant))

    def _make(self, variant: Variant) -> bytes:
        onnx = require("onnx")
        plain = self._source.onnx(variant)
        model = onnx.load_from_string(plain)
        nodes = rounded_convolutions(model, takes_images=variant.takes_images)
        if not nodes:  # for example a trunk of the first and a depthwise convolution
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
    """Convert the convolutions `nodes` of a float ONNX model to 8 bits, in the QDQ format.

    `batches` are inputs (B, C, H, W), float32, whose extremes set the ranges of the activations.
    Activations are uint8 with a zero point; weights are int8, per channel and symmetric. An
    activation function that only clips (ReLU, ReLU6) is absorbed by the rounding after it.
    """
    quantization = require("onnxruntime.quantization")
    # without this entry, it warns that the model should be pre-processed first
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
    """Batches in the form that the quantiser reads; it calls only `get_next`."""

    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def rounded_convolutions(model: onnx.ModelProto, *, takes_images: bool) -> list[str]:
    """Names of the convolutions worth rounding: neither depthwise (or grouped) nor of images."""
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv" or (takes_images and node.input[0] == INPUT):
            continue
        if all(attribute.i == 1 for attribute in node.attribute if attribute.name == "group"):
            found.append(node.name)
    return found


def saturates() -> bool:
    """Whether this processor's instruction for 8-bit products can saturate.

    x86 without VNNI adds two products of uint8 and int8 in 16 bits, for which weights must be
    limited to 7 bits.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(processor_flags().split())


def calibration_images(
    spec: AnySpec, batches: Iterable[Tensor | np.ndarray], images: int
) -> Tensor:
    """The first `images` rows of the batches as one tensor (N, C, H, W), float32, on the CPU.

    Raises:
        UsageError: if there are no batches, or a batch does not consist of normalised images of
            the network's channels and size, the same size in all batches.
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


# -- inputs of each variant -----------------------------------------------------------------------
#
# The statistics of a variant's input depend on the path that led to it. There may be too many paths
# to run all, so every image takes one path, drawn once such that at each gate, every choice gets an
# equal share of the images. A variant sees all images, each along its path up to the segment before
# the previous one, and through the previous segment at the variant's `before` width.


class Part(NamedTuple):
    """Images of a batch that leave a segment at the same width."""

    width: int
    """Index of the width."""
    rows: np.ndarray
    """Row numbers in the batch."""
    features: Tensor


class ActivationSampler:
    """Computes float features between segments for images (N, C, H, W), float32, on the CPU."""

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
        """Inputs of a variant in batches (B, C, H, W), with one row for every image."""
        for start in range(0, len(self._images), ROWS):
            if isinstance(variant, RouteVariant) or variant.takes_images:
                yield self._images[start : start + ROWS].numpy()
            else:
                (part,) = self._leaving(variant.segment - 1, variant.before, start)
                yield part.features.cpu().numpy()

    def forget(self) -> None:
        """Free the features that were kept."""
        self._kept.clear()
        self._bytes = 0

    def _leaving(self, segment: int, width: int, start: int) -> list[Part]:
        """Features of a batch after a segment at one width, which the images reach along their
        paths. A single part, whose rows are in the order of the previous widths.
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
        """Features after a segment, each image at the width that its path takes there."""
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
        """Return features from the cache or compute and keep them; the least recently used go."""
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
