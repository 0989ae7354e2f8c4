"""An engine's options, and the input and output of its calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from dynaslim.errors import UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.runtime.latency import LatencyTable

MAX_BATCH: Final = 256


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine on this machine; the defaults suit most uses."""

    image_size: int | None = None
    """Side in pixels of the images that "auto" measures with; by default that of the first batch,
    or before a batch the size that the network is meant for."""
    batch_size: int = 32
    """Number of images in the batches that "auto" measures with."""
    max_batch: int = MAX_BATCH
    """Larger batches are split, which saves memory and is no slower."""
    workers: int | None = None
    """Cores to use; by default all that the process may use."""
    rows_per_piece: int | None = None
    """Maximum rows per call of a program; by default as many as fit in the cache."""
    cache_dir: str | Path | None = "auto"
    """Folder for compiled programs: "auto" is `DYNASLIM_CACHE` or `~/.cache/dynaslim`, None keeps
    none."""
    latency: LatencyTable | str | Path | None = None
    """A measured latency table, or its file (`dynaslim profile`)."""
    merge: bool = False
    """Let small buckets join wider ones where the table says it is faster; this changes results."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "max_batch", "workers", "rows_per_piece"):
            value = getattr(self, name)
            optional = value is None and name not in ("batch_size", "max_batch")
            whole = type(value) is int and value >= 1
            check(optional or whole, f"{name} {value!r}: must be a whole number of at least 1")
        check(
            not self.merge or self.latency is not None,
            "merge needs a latency table: dynaslim profile",
        )

    @classmethod
    def named(cls, options: Mapping[str, Any]) -> EngineOptions:
        """Make options from keyword arguments; raises `UsageError` for an unknown name."""
        known = [field.name for field in fields(cls)]
        for name in options:
            check(name in known, f"{name}: no option of an engine, which has {', '.join(known)}")
        return cls(**options)

    def table(self, spec: AnySpec) -> LatencyTable | None:
        """Read and check the latency table; raises `UsageError` if it is not for this network."""
        if self.latency is None or isinstance(self.latency, LatencyTable):
            table = self.latency
        else:
            table = LatencyTable.read(self.latency, spec)
        if table is not None:
            table.check_fits(spec)
        return table


@dataclass(frozen=True)
class RoutedOutput:
    """The engine's results for a batch, one row per image in the order of the input.

    The fields are numpy arrays for numpy images, and tensors on the images' device for tensors.
    Unpacks as `logits, routes, madds`.
    """

    logits: Any
    """(B, N) float32."""
    routes: Any
    """(B, G) int64: the width index behind each gate on the route that gave the answer;
    `Engine.route_of` converts a row to a route."""
    madds: Any
    """(B,) float64: multiply-adds of each row, including slimming heads and all routes of an
    escalated row."""
    escalated: Any
    """(B,) bool: rows that escalated because an answer was unsure."""
    mirrored: Any
    """(B,) bool: escalated rows whose answer averages those for the image and its mirror image;
    the softmax of their logits is the mean of both probabilities."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.logits, self.routes, self.madds))


def check_images(x: Any, spec: AnySpec) -> tuple[int, int]:
    """Check a batch of images; returns their height and width.

    Raises:
        UsageError: if x is not a batch of normalised images that the network takes.
    """
    numbers = isinstance(x, np.ndarray) or hasattr(x, "detach")
    check(numbers, f"input of type {type(x).__name__}: give a numpy array or a tensor")
    floating = x.dtype.kind == "f" if isinstance(x, np.ndarray) else x.is_floating_point()
    if not floating:
        # not `check`: numpy is slow to name a dtype, and this runs at every call
        raise UsageError(f"input of {x.dtype}: give normalised images in floating point")
    if len(x.shape) != 4 or x.shape[1] != spec.in_channels:
        raise UsageError(
            f"input of shape {tuple(x.shape)}: {spec.name} takes "
            f"(rows, {spec.in_channels}, height, width)"
        )
    size = (int(x.shape[2]), int(x.shape[3]))
    spec.check_image_size(*size)
    return size


def like(x: Any, result: np.ndarray) -> Any:
    """Convert a result to the kind of the images x: numpy, or a tensor on their device."""
    if isinstance(x, np.ndarray):
        return result
    import torch

    return torch.from_numpy(result).to(x.device)
