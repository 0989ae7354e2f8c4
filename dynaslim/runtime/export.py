"""Export of networks for use elsewhere: packages, single files, plain sub-networks.

Every exported model is run once and compared with the network before it is put in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from dynaslim._files import check_text, check_writable, naming, write_atomic
from dynaslim.checkpoint import Checkpoint
from dynaslim.errors import DynaslimError, UsageError, check
from dynaslim.model_names import MANIFEST, is_package
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.libraries import onnx_session, require
from dynaslim.runtime.onnx_graph import OPSET
from dynaslim.runtime.package import (
    FORMAT,
    VERSION,
    WEIGHTS,
    file_digest,
    manifest_digest,
)
from dynaslim.runtime.program_net import ProgramNet, program_net, source_of
from dynaslim.runtime.quantise import QuantisedSource
from dynaslim.runtime.single_file import single_file
from dynaslim.runtime.variants import RouteVariant, VariantSource, segment_variants
from dynaslim.spec import Route
from dynaslim.version import __version__

TOLERANCE: Final = 1e-4
"""Allowed difference of a float32 export from the network, relative to the largest value."""
SLACK: Final = 8
"""A larger difference is allowed up to this multiple of the error of torch's own float32."""
_APART: Final = 256
"""Smallest size in bytes of a weight that is stored in the common file."""
_ALIGNMENT: Final = 4096
"""Alignment in bytes of weights in the common file: whole pages, so that they can be mapped."""


def export_package(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    source: VariantSource | None = None,
    image_size: int | None = None,
    notes: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Write a network as a package, whole or not at all.

    Returns its manifest, and each variant's difference from the network (by name, relative to the
    largest value). The default `source` is that of `checkpoint` in float32. Parity is checked on
    images of `image_size` pixels, by default the checkpoint's. An existing package at `out` is
    replaced. `notes` (plain JSON values) go into the manifest.

    Raises:
        UsageError: if `out` is a file or a folder with other content, the network has no gates, or
            `onnx` or `onnxruntime` is not installed.
        DynaslimError: if the package does not compute the same as the network.
        OSError: if it cannot be written.
    """
    target = free_folder(out)
    net, pre = checkpoint.net, checkpoint.preprocessing
    spec = net.spec
    check(bool(spec.gates), f"{spec.name} has no gates: export a route of it (--static-route)")
    check_text([spec.name, checkpoint.class_names, dict(checkpoint.metrics), dict(notes or {})])
    source = source_of(net) if source is None else source
    side = image_side(checkpoint, image_size)
    spec.check_image_size(side, side)
    for library in ("onnx", "onnxruntime"):
        require(library)
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            names = _write_variants(source, folder)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "spec": spec.to_dict(),
                "precision": source.precision,
                "class_names": checkpoint.class_names,
                "preprocessing": None if pre is None else pre.to_dict(),
                "budget": checkpoint.budget,
                "mirror": checkpoint.mirror,
                "metrics": dict(checkpoint.metrics),
                "versions": {
                    "dynaslim": __version__,
                    "onnx_opset": OPSET,
                    "onnx": require("onnx").__version__,
                    "torch": torch.__version__,
                },
                "forms": names,
                "notes": dict(notes or {}),
            }
            errors = _parity(source, program_net(net), folder, names, side)
            manifest["files"] = {
                path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                for path in sorted(folder.iterdir())
            }
            # through JSON once, so that the hash matches a reader's (tuples become lists)
            manifest = json.loads(json.dumps(manifest, allow_nan=False))
            manifest["sha256"] = manifest_digest(manifest)
            write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
            _whole_parity(checkpoint, folder, source.precision, side)
            _put_in_place(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return manifest, errors


def export_route(
    checkpoint: Checkpoint, out: str | Path, route: Route, *, image_size: int | None = None
) -> float:
    """Write one sub-network as a plain ONNX file; returns the parity error.

    The input is `x` (batch, channels, height, width), the output `logits`.

    Raises:
        The errors of `export_package`, and UsageError for a route that is not the network's.
    """
    target = check_writable(out)
    source, spec = source_of(checkpoint.net), checkpoint.net.spec
    content = source.onnx(RouteVariant(spec.coerce_route(route)))
    assert isinstance(content, bytes)
    x = images_like(checkpoint, image_size)
    exact = _exact(checkpoint, route, x)
    error = _difference(run_onnx(content, {"x": x})[0], exact.logits)
    _check_parity(f"route {route}", error, exact.tolerance)
    write_atomic(target, content)
    return error


def export_single_file(
    checkpoint: Checkpoint, out: str | Path, *, image_size: int | None = None
) -> float:
    """Write the whole network as one ONNX file that routes one image at a time with `If` nodes.

    Returns the largest parity error over several images; raises like `export_package`.
    """
    target = check_writable(out)
    content, worst = checked_single_file(checkpoint, image_size)
    write_atomic(target, content)
    return worst


def checked_single_file(checkpoint: Checkpoint, image_size: int | None) -> tuple[bytes, float]:
    """The content of the file that `export_single_file` writes, and its parity error."""
    spec = checkpoint.net.spec
    check(bool(spec.gates), f"{spec.name} has no gates: export a route of it (--static-route)")
    content: bytes = single_file(source_of(checkpoint.net)).SerializeToString()
    x, session, worst = images_like(checkpoint, image_size, rows=2), onnx_session(content), 0.0
    allowed = 0.0
    # with forced decisions: close ones may differ by rounding
    for option in range(max(len(gate.choices) for gate in spec.gates)):
        path = [gate.choices[min(option, len(gate.choices) - 1)] for gate in spec.gates]
        biases = {
            f"bias_{g}": np.where(np.array(gate.choices) == choice, 1e9, 0).astype(np.float32)
            for g, (gate, choice) in enumerate(zip(spec.gates, path, strict=True))
        }
        exact = _exact(checkpoint, spec.route_at(path), x)
        allowed = max(allowed, exact.tolerance)
        for row in range(len(x)):
            logits, choices = session.run(["logits", "choices"], {"x": x[row : row + 1], **biases})
            if choices[0].tolist() != path:
                raise DynaslimError(f"single file: took choices {choices[0].tolist()}, not {path}")
            worst = max(worst, _difference(logits, exact.logits[row : row + 1]))
    _check_parity("single file", worst, allowed)
    return content, worst


# -- files ----------------------------------------------------------------------------------------


def free_folder(out: str | Path) -> Path:
    """Check that a package may be written to `out`; raises `UsageError` like `export_package`."""
    target = Path(out)
    check(bool(target.name), f"{str(out)!r}: name a folder to write")
    if (
        target.exists()
        and not is_package(target)
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise UsageError(f"{target}: is there and no package; name another folder")
    return target


def _write_variants(source: VariantSource, folder: Path) -> dict[str, str]:
    """Write the ONNX files and their common weights; returns the file names by variant."""
    onnx = require("onnx")
    set_external_data = require("onnx.external_data_helper").set_external_data
    names: dict[str, str] = {}
    places: dict[bytes, tuple[int, int]] = {}
    with open(folder / WEIGHTS, "wb") as weights:
        for variant in segment_variants(source.spec):
            content = source.onnx(variant)
            assert isinstance(content, bytes)
            model = onnx.load_from_string(content)
            for tensor in model.graph.initializer:
                raw = tensor.raw_data
                if len(raw) < _APART:
                    continue
                digest = hashlib.sha256(raw).digest()
                if digest not in places:
                    start = -(-weights.tell() // _ALIGNMENT) * _ALIGNMENT
                    weights.seek(start)
                    weights.write(raw)
                    places[digest] = (start, len(raw))
                set_external_data(tensor, WEIGHTS, *places[digest])
                tensor.ClearField("raw_data")
            names[variant.name] = f"{variant.name}.onnx"
            (folder / names[variant.name]).write_bytes(model.SerializeToString())
        weights.flush()
        os.fsync(weights.fileno())
    return names


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename a folder; an existing package is moved aside first, and restored if that fails."""
    os.chmod(folder, 0o755)
    if not target.exists():
        os.replace(folder, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)) / "old"
    os.replace(target, aside)
    try:
        os.replace(folder, target)
    except OSError:
        os.replace(aside, target)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def image_side(checkpoint: Checkpoint, image_size: int | None = None) -> int:
    """Side of the images in pixels: as given, or else the checkpoint's, or else the usual one."""
    pre = checkpoint.preprocessing
    usual: int = checkpoint.net.spec.usual_image_size
    return image_size or (pre.image_size_px if pre else usual)


# -- parity ---------------------------------------------------------------------------------------


def _parity(
    source: VariantSource, exact: ProgramNet, folder: Path, names: Mapping[str, str], side: int
) -> dict[str, float]:
    """Largest difference of each variant from the exact result, relative to its largest value."""
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for variant in segment_variants(source.spec):
        shape = variant.shape(source.spec, (side, side))
        x = torch.randn(2, *shape.row_in, generator=generator)
        if isinstance(source, QuantisedSource):  # accurate only in the range of real features
            x = torch.from_numpy(source.sample(variant)[:2])
        ours = run_onnx(folder / names[variant.name], {"x": x.numpy()})
        with torch.inference_mode():
            double = _outputs(exact.program(variant, torch.float64)(x.double()))
            single = _outputs(exact.program(variant)(x))
        errors[variant.name] = max(map(_difference, ours, double))
        if source.precision == "fp32":
            # gates that depend on small differences of large features are inexact in torch too
            inexact = max(map(_difference, single, double))
            _check_parity(variant.name, errors[variant.name], SLACK * inexact)
    return errors


def _outputs(made: Any) -> list[np.ndarray]:
    return [part.numpy() for part in ([made] if isinstance(made, torch.Tensor) else made)]


class _Exact(NamedTuple):
    """Reference result of a route."""

    logits: np.ndarray
    """Logits computed in float64."""
    tolerance: float
    """Allowed difference in float32, relative to the largest logit. torch's own float32 is not
    exact either, especially in deep untrained networks."""


def _exact(checkpoint: Checkpoint, route: Route, x: np.ndarray) -> _Exact:
    source, variant, images = program_net(checkpoint.net), RouteVariant(route), torch.from_numpy(x)
    with torch.inference_mode():
        double = _outputs(source.program(variant, torch.float64)(images.double()))[0]
        single = _outputs(source.program(variant)(images))[0]
    return _Exact(double, SLACK * _difference(single, double))


def _whole_parity(checkpoint: Checkpoint, folder: Path, precision: str, side: int) -> None:
    """Check that the package, opened as users will open it, computes the same as the network."""
    x, spec = images_like(checkpoint, side), checkpoint.net.spec
    engine = Engine.from_package(folder, backend="onnxruntime", workers=1, cache_dir=None)
    if not np.isfinite(engine(x).logits).all():
        raise DynaslimError("package: its logits are not finite")
    if precision == "fp32":
        for route in (spec.cheapest_choice, spec.widest_choice):
            exact = _exact(checkpoint, route, x)
            error = _difference(engine.static(route)(x), exact.logits)
            _check_parity(f"package, route {route}", error, exact.tolerance)


def images_like(checkpoint: Checkpoint, image_size: int | None, *, rows: int = 8) -> np.ndarray:
    """Noise images that differ in level and amplitude, so that gates may decide differently."""
    spec, side = checkpoint.net.spec, image_side(checkpoint, image_size)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, spec.in_channels, side, side), np.float32)
    level = rng.standard_normal((rows, spec.in_channels, 1, 1), np.float32)
    return x * rng.random((rows, 1, 1, 1), np.float32) * 2 + level


def run_onnx(model: bytes | Path, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a model, given as a file or its content, in ONNX Runtime; returns all outputs."""
    results: list[np.ndarray] = onnx_session(model).run(None, dict(inputs))
    return results


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    scale = float(np.abs(theirs).max()) or 1.0
    return float(np.abs(ours - theirs).max()) / scale


def _check_parity(what: str, error: float, tolerance: float = 0.0) -> None:
    tolerance = max(TOLERANCE, tolerance)
    if not error <= tolerance:
        raise DynaslimError(
            f"{what}: not written, differs from the network by {error:.2g} of its largest value "
            f"(at most {tolerance:.2g})"
        )
