"""Collectives between the processes of one run, if torch.distributed is initialised.

In a single process every function returns its own value, so callers need no special case. Starting
the processes (torchrun through Fabric) is not part of this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace floating-point tensors by their mean over all processes, in one message per dtype."""
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        parts = torch.split(flat, [tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view_as(t) for part, t in zip(parts, group, strict=True)])


def largest(value: int) -> int:
    """The maximum over all processes; cheap enough for every step."""
    if world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    box = torch.tensor(value, device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in order of rank; for small objects and CPU tensors."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The first process's value."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
