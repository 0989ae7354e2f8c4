"""Snapshots: the whole state of a training in one safetensors file, without pickle.

A state is nested dicts, lists, plain values and tensors. The tensors go into the file under
numbered names, the rest into its metadata as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dynaslim._files import write_atomic
from dynaslim.errors import CheckpointError

FORMAT: Final = "dynaslim-snapshot"
VERSION: Final = 1


def save_snapshot(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state, whole or not at all.

    Raises:
        CheckpointError: if a tensor has values that are not finite: nobody could go on from there.
        OSError: if the file cannot be written; an older one of that name is left as it was.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: not saved, tensor {name} has values that are not finite"
            )
    meta = {"format": FORMAT, "version": VERSION, "state": packed}
    write_atomic(path, safetensors.torch.save(tensors, {"dynaslim": json.dumps(meta)}))


def read_snapshot(path: str | Path) -> dict[str, Any]:
    """The state that `save_snapshot` wrote, on the CPU.

    Raises:
        CheckpointError: if the file is no snapshot, is truncated, or is of another version.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads((file.metadata() or {}).get("dynaslim", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable snapshot ({error})") from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a snapshot of a training run")
    if meta.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: snapshot version {meta.get('version')}, this dynaslim reads {VERSION}"
        )
    state: dict[str, Any] = _unpack(meta["state"], tensors)
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # as pairs: an optimizer's keys are numbers, which JSON would make strings
        return {"items": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, tensors) for item in value]}
    return {"value": value}


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = packed.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "items":
            return {key: _unpack(item, tensors) for key, item in content}
        case "list":
            return [_unpack(item, tensors) for item in content]
    return content
