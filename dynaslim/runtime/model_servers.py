"""Model repositories: networks laid out for OpenVINO Model Server."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from dynaslim._files import naming, parse_json, write_atomic
from dynaslim.checkpoint import Checkpoint
from dynaslim.errors import DynaslimError, UsageError, check
from dynaslim.runtime.export import checked_single_file, image_side, images_like, run_onnx
from dynaslim.runtime.libraries import require

VERSION: Final = "1"
"""The folder of a model's only version."""
_CONFIG: Final = "config.json"
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


def export_ovms(checkpoint: Checkpoint, out: str | Path, name: str | None = None) -> float:
    """Write a network for OpenVINO Model Server: OUT/NAME/1/model.onnx and OUT/config.json.

    The model is the single file, for images of the checkpoint's size; returns its parity error.
    Other models of the folder stay in its config.

    Raises:
        UsageError: if the model is there already, the name cannot be a folder's, `config.json` is
            not a model server's, or the network has no gates.
        DynaslimError: if what was written does not compute what the network does.
        OSError: if it cannot be written.
    """
    root, name = Path(out), _model_name(checkpoint, name)
    with _new_models(root, [name]) as folder:
        config = _with_model(root / _CONFIG, name)
        content, error = _server_file(checkpoint)
        write_atomic(folder / name / VERSION / "model.onnx", content)
    write_atomic(root / _CONFIG, json.dumps(config, indent=1).encode())
    return error


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
    """A temporary folder whose folders of these names go into the repository at the end.

    Raises:
        UsageError: if one of them is there already, or `root` is a file.
    """
    check(not root.is_file(), f"{root}: is a file; name a folder")
    for name in names:
        there = root / name
        check(not there.exists(), f"{there}: is there already; remove it, or give another --name")
    with naming(root):
        root.mkdir(parents=True, exist_ok=True)
        # not inside, where a server may look for models
        folder = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.absolute().parent))
        try:
            yield folder
            for name in names:
                os.replace(folder / name, root / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _with_model(path: Path, name: str) -> dict[str, Any]:
    """The config of a model server with one model more."""
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
    """The single file without optional inputs and of one image size, and its parity error.

    Servers show a model's inputs to clients, and compile a network of known shapes better.
    """
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
