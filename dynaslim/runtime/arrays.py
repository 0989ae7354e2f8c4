"""The few array operations of routing, in numpy and in torch.

Rows are opaque: a buffer is (rows, *row), and is only sliced or gathered along its first axis.
numpy stores features as (C, H, W), the layout of the runtimes; torch as (H, W, C), because its
convolutions are faster in channels_last and a gathered row is then contiguous.
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
        """Memory layout of a row of features, given as (C, H, W), or of logits."""
        return tuple(shape)

    def empty(self, rows: int, row: tuple[int, ...], *, floats: bool = False) -> Array:
        """Allocate an uninitialised buffer; with `floats`, in float32 whatever the precision."""
        return np.empty((rows, *row), np.float32)

    def take(self, source: Array, index: np.ndarray, out: Array) -> None:
        """Copy the rows at `index` into `out`."""
        # in the default mode, which checks the indices, `take` fills a temporary buffer first
        np.take(source, index, axis=0, out=out, mode="clip")

    def mirrored(self, images: Array, index: np.ndarray) -> Array:
        """The images (B, C, H, W) at `index`, flipped left to right, as a new array."""
        return np.ascontiguousarray(images[index][..., ::-1])

    def host(self, rows: np.ndarray) -> np.ndarray:
        """Logits as a float32 numpy array; waits for a device to finish."""
        return rows

    def images(self, x: Array) -> Array:
        """Convert a caller's images (B, C, H, W), numpy or torch, to the programs' library."""
        values = x if isinstance(x, np.ndarray) else x.detach().cpu().float().numpy()
        return np.ascontiguousarray(values, np.float32)


class TorchArrays:
    """Like `NumpyArrays`, but in torch, with a given device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        self._torch = torch
        self.device = device
        self.dtype = dtype

    def row(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[1:], shape[0]) if len(shape) == 3 else tuple(shape)

    def empty(self, rows: int, row: tuple[int, ...], *, floats: bool = False) -> Array:
        dtype = self._torch.float32 if floats else self.dtype
        with self._torch.inference_mode(False):  # the next call may run outside inference mode
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
            # torch does not accept other strides, other byte orders or read-only memory
            tensor = self._torch.from_numpy(np.require(x, np.float32, ["C", "W"]))
        else:
            tensor = x.detach()
        return tensor.to(self.device, self.dtype)


Arrays = NumpyArrays | TorchArrays


def check_finite(x: Array, start: int = 0) -> None:
    """Raise `ValueError` if images contain NaN or infinity; `start` is their first row's number.

    The check also brings rows that are needed next into the cache.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        # a sum is not finite if any value is not; on a device, only one number has to be fetched
        total = float(x.sum())
    if math.isfinite(total):
        return
    values = x if isinstance(x, np.ndarray) else x.float().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3)))
    if len(bad):
        raise ValueError(
            f"input: row {start + bad[0]} has values that are not finite (NaN or infinity)"
        )
