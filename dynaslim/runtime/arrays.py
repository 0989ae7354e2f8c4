"""The few array operations of routing, in numpy and in torch.

Rows are opaque: a buffer is (rows, *row) and only ever cut or gathered along its first axis. numpy
keeps features as (C, H, W), the layout of the runtimes; torch as (H, W, C), since its convolutions
are faster in channels_last and a gathered row is then one piece of memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Array = Any
"""A numpy array or a torch tensor."""


class NumpyArrays:
    """Buffers of rows in numpy, float32."""

    def row(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How a row of features (C, H, W), or of logits, lies in memory."""
        return tuple(shape)

    def empty(self, rows: int, row: tuple[int, ...], *, floats: bool = False) -> Array:
        """A new buffer, uninitialised; with `floats` of float32 whatever the precision."""
        return np.empty((rows, *row), np.float32)

    def take(self, source: Array, index: np.ndarray, out: Array) -> None:
        """Copy the rows at `index` into `out`."""
        # without a mode that needs no check of the indices, `take` fills a second buffer first
        np.take(source, index, axis=0, out=out, mode="clip")

    def mirrored(self, images: Array, index: np.ndarray) -> Array:
        """The images (B, C, H, W) at `index`, left and right exchanged, in new memory."""
        return np.ascontiguousarray(images[index][..., ::-1])

    def host(self, rows: np.ndarray) -> np.ndarray:
        """Logits as numpy, float32; waits for a device."""
        return rows

    def images(self, x: Array) -> Array:
        """A caller's images (B, C, H, W), numpy or torch, in the library of the programs."""
        values = x if isinstance(x, np.ndarray) else x.detach().cpu().float().numpy()
        return np.ascontiguousarray(values, np.float32)


class TorchArrays:
    """As `NumpyArrays`, in torch, on a device and in a type."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        self._torch = torch
        self.device = device
        self.dtype = dtype

    def row(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[1:], shape[0]) if len(shape) == 3 else tuple(shape)

    def empty(self, rows: int, row: tuple[int, ...], *, floats: bool = False) -> Array:
        dtype = self._torch.float32 if floats else self.dtype
        with self._torch.inference_mode(False):  # the next call may come from outside of it
            return self._torch.empty((rows, *row), device=self.device, dtype=dtype)

    def take(self, source: Array, index: np.ndarray, out: Array) -> None:
        rows = self._torch.from_numpy(index).to(self.device)
        self._torch.index_select(source, 0, rows, out=out)

    def mirrored(self, images: Array, index: np.ndarray) -> Array:
        rows = self._torch.from_numpy(index).to(self.device)
        return images.index_select(0, rows).flip(3)

    def host(self, rows: Array) -> np.ndarray:
        values: np.ndarray = rows.detach().float().cpu().numpy()
        return values

    def images(self, x: Array) -> Array:
        if isinstance(x, np.ndarray):
            # torch takes no other strides, byte orders and read-only memory
            tensor = self._torch.from_numpy(np.require(x, np.float32, ["C", "W"]))
        else:
            tensor = x.detach()
        return tensor.to(self.device, self.dtype)


Arrays = NumpyArrays | TorchArrays


def check_finite(x: Array, start: int = 0) -> None:
    """Raise `ValueError` if images, rows of a batch from `start`, hold NaN or infinity.

    Looking at them brings the rows into the cache that are needed next.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        # one number, on a device to wait for; a sum is not finite where a value is not
        total = float(x.sum())
    if math.isfinite(total):
        return
    values = x if isinstance(x, np.ndarray) else x.float().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3)))
    if len(bad):
        raise ValueError(
            f"input: row {start + bad[0]} has values that are not finite (NaN or infinity)"
        )
