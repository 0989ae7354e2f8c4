"""Export of networks as model repositories for OpenVINO Model Server and Triton."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from dynaslim._files import naming, parse_json, write_atomic
from dynaslim.checkpoint import Checkpoint
from dynaslim.errors import DynaslimError, UsageError, check
from dynaslim.runtime.export import (
    checked_single_file,
    export_package,
    image_side,
    images_like,
    run_onnx,
)
from dynaslim.runtime.libraries import require
from dynaslim.runtime.triton import OUTPUTS
from dynaslim.runtime.variants import VariantSource

VERSION: Final = "1"
"""Folder name of a model's only version."""
_CONFIG: Final = "config.json"
_LABELS: Final = "labels.txt"
_MAX_BATCH: Final = 32
_MODEL_PY: Final = '''"""The network of the folder `package`, which routes every image by itself."""

from pathlib import Path

from dynaslim.runtime.triton import TritonModel


class TritonPythonModel(TritonModel):
    """Triton looks for this name."""

    package = Path(__file__).with_name("package")
'''
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


def export_ovms(checkpoint: Checkpoint, out: str | Path, name: str | None = None) -> float:
    """Write a network for OpenVINO Model Server: OUT/NAME/1/model.onnx and OUT/config.json.

    The model is the single file, for images of the checkpoint's size. Returns its parity error.
    Other models in the config are kept.

    Raises:
        UsageError: if the model exists already, the name is not valid for a folder, `config.json`
            is not a model server's, or the network has no gates.
        DynaslimError: if the model does not compute the same as the network.
        OSError: if it cannot be written.
    """
    root, name = Path(out), _model_name(checkpoint, name)
    with _new_models(root, [name]) as folder:
        config = _with_model(root / _CONFIG, name)
        content, error = _server_file(checkpoint)
        write_atomic(folder / name / VERSION / "model.onnx", content)
    write_atomic(root / _CONFIG, json.dumps(config, indent=1).encode())
    return error


def export_triton(
    checkpoint: Checkpoint,
    out: str | Path,
    name: str | None = None,
    *,
    source: VariantSource | None = None,
    notes: Mapping[str, Any] | None = None,
) -> float:
    """Write a network for Triton: the models OUT/NAME and OUT/NAME_single.

    NAME is a model for the Python backend that routes batches: a package and a `model.py`, which
    uses `dynaslim.runtime.triton`. NAME_single is the single file for the ONNX Runtime backend,
    which runs one image at a time. Returns the largest parity error. `source` and `notes` are as
    for `export_package`.

    Raises:
        UsageError: if a model exists already, the name is not valid for a folder, or the network
            has no gates.
        DynaslimError: if a model does not compute the same as the network.
        OSError: if it cannot be written.
    """
    root, name = Path(out), _model_name(checkpoint, name)
    single = f"{name}_single"
    with _new_models(root, [name, single]) as folder:
        version = folder / name / VERSION
        _, errors = export_package(checkpoint, version / "package", source=source, notes=notes)
        content, error = _server_file(checkpoint)
        files: dict[Path, str | bytes] = {
            version / "model.py": _MODEL_PY,
            folder / name / "config.pbtxt": _python_config(checkpoint, name),
            folder / single / "config.pbtxt": _onnx_config(checkpoint, single),
            folder / single / VERSION / "model.onnx": content,
        }
        if checkpoint.class_names is not None:
            # one line per class: names may contain line breaks
            lines = [" ".join(one.split()) + "\n" for one in checkpoint.class_names]
            files[folder / name / _LABELS] = "".join(lines)
        for path, text in files.items():
            write_atomic(path, text if isinstance(text, bytes) else text.encode())
    return max(error, *errors.values())


def _python_config(checkpoint: Checkpoint, name: str) -> str:
    spec, side = checkpoint.net.spec, image_side(checkpoint)
    sizes = {"logits": spec.num_classes, "choices": len(spec.gates)}
    labels = "" if checkpoint.class_names is None else f' label_filename: "{_LABELS}"'
    written = ",\n".join(
        f'  {{ name: "{output}" data_type: TYPE_{kind.replace("BYTES", "STRING")} '
        f"dims: [ {sizes.get(output, 1)} ]{labels if output == 'logits' else ''} }}"
        for output, kind in OUTPUTS.items()
    )
    x = f"data_type: TYPE_FP32 dims: [ {spec.in_channels}, {side}, {side} ]"
    inputs = f'  {{ name: "x" {x} optional: true }}'
    if checkpoint.preprocessing is not None:
        inputs += ',\n  { name: "image" data_type: TYPE_STRING dims: [ 1 ] optional: true }'
    return f"""name: "{name}"
backend: "python"
max_batch_size: {_MAX_BATCH}
# a request has one of them: normalised images, or encoded files
input [
{inputs}
]
output [
{written}
]
dynamic_batching {{ max_queue_delay_microseconds: 1000 }}
# one engine uses all cores; with more instances, set workers to the cores of each
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters {{ key: "backend" value {{ string_value: "onnxruntime" }} }}
parameters {{ key: "workers" value {{ string_value: "" }} }}
"""


def _onnx_config(checkpoint: Checkpoint, name: str) -> str:
    spec, side = checkpoint.net.spec, image_side(checkpoint)
    return f"""name: "{name}"
platform: "onnxruntime_onnx"
# its gates are branches of the graph, which one image takes
max_batch_size: 0
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ 1, {spec.in_channels}, {side}, {side} ] }} ]
output [
  {{ name: "logits" data_type: TYPE_FP32 dims: [ 1, {spec.num_classes} ] }},
  {{ name: "choices" data_type: TYPE_INT64 dims: [ 1, {len(spec.gates)} ] }}
]
instance_group [ {{ kind: KIND_CPU count: 2 }} ]
parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}
"""


def _model_name(checkpoint: Checkpoint, name: str | None) -> str:
    name = checkpoint.net.spec.name if name is None else name
    check(
        re.fullmatch(_NAME, name) is not None,
        f"--name {name!r}: must begin with a letter or digit, and have only these, '_', '-' and "
        f"'.' (it is a folder's)",
    )
    return name


@contextmanager
def _new_models(root: Path, names: list[str]) -> Iterator[Path]:
    """A temporary folder; at the end, its folders of these names move into the repository."""
    check(not root.is_file(), f"{root}: is a file; name a folder")
    for name in names:
        there = root / name
        check(not there.exists(), f"{there}: is there already; remove it, or give another --name")
    with naming(root):
        root.mkdir(parents=True, exist_ok=True)
        # not inside the repository, where a server may look for models
        folder = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.absolute().parent))
        try:
            yield folder
            for name in names:
                os.replace(folder / name, root / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _with_model(path: Path, name: str) -> dict[str, Any]:
    """The config of a model server with one more model."""
    config: Any = {"model_config_list": []}
    if path.exists():
        try:
            config = parse_json(path.read_bytes())
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    models = config.get("model_config_list") if isinstance(config, dict) else None
    if not isinstance(models, list):
        raise UsageError(f"{path}: not a config of OpenVINO Model Server (model_config_list)")
    # paths are relative to the config
    added = {"config": {"name": name, "base_path": name}}
    return {**config, "model_config_list": [*(one for one in models if one != added), added]}


def _server_file(checkpoint: Checkpoint) -> tuple[bytes, float]:
    """The single file with one image size and without optional inputs, and its parity error."""
    # servers show a model's inputs to clients, and compile networks with fixed shapes better
    onnx = require("onnx")
    content, error = checked_single_file(checkpoint, None)
    model = onnx.load_from_string(content)
    del model.graph.input[1:]  # biases of the gates, whose defaults are zero
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = image_side(checkpoint)
    made: bytes = model.SerializeToString()
    for row in images_like(checkpoint, None):
        x = {"x": row[None]}
        for ours, theirs in zip(run_onnx(made, x), run_onnx(content, x), strict=True):
            if not np.array_equal(ours, theirs):
                raise DynaslimError("single file: of one image size it computes something else")
    return made, error
