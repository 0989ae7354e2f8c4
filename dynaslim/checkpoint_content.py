"""The content of a checkpoint file, read without torch; its format is in `dynaslim.checkpoint`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import safetensors

from dynaslim.errors import CheckpointError, UsageError
from dynaslim.graph import AnySpec, spec_from_dict
from dynaslim.model_names import checkpoint_file
from dynaslim.preprocessing import Preprocessing

FORMAT: Final = "dynaslim-checkpoint"
VERSION: Final = 1
_DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of types in the file, and in torch."""


class StoredTensor(NamedTuple):
    """A tensor's values as bytes."""

    dtype: str
    """As torch prints it, such as torch.float32."""
    shape: tuple[int, ...]
    values: Any
    """A buffer."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint file contains; the tensors may still not fit the spec."""

    spec: AnySpec
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    metrics: Mapping[str, Any]
    recipe: Mapping[str, Any]
    budget: Mapping[str, Any] | None
    tensors: Mapping[str, StoredTensor]


def read_content(path: str | Path) -> Content:
    """Read and check a checkpoint file; names are as for `dynaslim.read`.

    Raises:
        CheckpointError: if the file is missing, truncated or altered, has another format or
            version, or its description is not valid.
        HubError: if the hub cannot be reached or has no checkpoint at the address.
    """
    meta, tensors = _read_verified(checkpoint_file(path))
    try:
        spec = spec_from_dict(meta["spec"])
        names, pre, budget = meta["class_names"], meta["preprocessing"], meta.get("budget")
        if not isinstance(budget, dict | None):
            raise UsageError(f"budget {budget!r:.60}: expected an object")
        found = Content(
            spec,
            None if names is None else tuple(names),
            None if pre is None else Preprocessing.from_dict(pre),
            dict(meta["metrics"]),
            dict(meta["recipe"]),
            budget,
            tensors,
        )
        check_description(spec, found.class_names, found.preprocessing)
    except (UsageError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its description is not valid: {error}") from None
    return found


def check_description(
    spec: AnySpec, class_names: tuple[str, ...] | None, preprocessing: Preprocessing | None
) -> None:
    """Raise `UsageError` unless class names and preprocessing fit the network."""
    if class_names is not None and len(class_names) != spec.num_classes:
        raise UsageError(f"{len(class_names)} class names do not fit {spec.num_classes} classes")
    if preprocessing is not None:
        spec.check_image_size(*(preprocessing.image_size_px,) * 2)
    if preprocessing is not None and preprocessing.channels != spec.in_channels:
        raise UsageError(
            f"preprocessing for {preprocessing.channels} channels does not fit a network "
            f"of {spec.in_channels} input channels"
        )


def may_mirror(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe treats a mirror image as being of the same class.

    True if `augment.mirror` is true in every stage of the recipe; False without any stage.
    """
    stages = [recipe.get(stage) for stage in ("supernet", "gate")]
    found = [
        stage["augment"]
        for stage in stages
        if isinstance(stage, Mapping) and isinstance(stage.get("augment"), Mapping)
    ]
    return bool(found) and all(augment.get("mirror") is True for augment in found)


def description_digest(meta: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of a file's description, without its `sha256`, and of the tensors."""
    described = {key: value for key, value in meta.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    add_tensors(digest, tensors)
    return digest.hexdigest()


def add_tensors(digest: Any, tensors: Mapping[str, StoredTensor]) -> None:
    """Add names, types, shapes and values of tensors to a hash."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.values)


def _read_verified(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    try:
        content = path.read_bytes()
        deserialize: Any = safetensors.deserialize  # has no types
        entries = deserialize(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        if "dynaslim" not in header:
            raise CheckpointError(f"{path}: a safetensors file, but not a dynaslim checkpoint")
        meta = json.loads(header["dynaslim"])
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint, truncated or of another format ({error}); a "
            f"released DS-Net file is read with: dynaslim import-official {path} OUT"
        ) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a dynaslim checkpoint")
    version = meta.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {version}, this dynaslim reads version {VERSION}; "
            f"install the dynaslim that wrote it or a newer one"
        )
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has type {entry['dtype']}")
        dtype = f"torch.{_DTYPES[entry['dtype']]}"
        tensors[name] = StoredTensor(dtype, tuple(entry["shape"]), entry["data"])
    if meta.get("sha256") != description_digest(meta, tensors):
        raise CheckpointError(f"{path}: its content does not match its SHA-256: altered or damaged")
    return meta, tensors
