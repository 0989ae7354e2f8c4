"""CUDA graphs: a variant is recorded once per bucket size, then replayed as a single launch.

A graph has fixed shapes and fixed memory, so buckets are padded to a few sizes and copied in and
out. All graphs share one memory pool, because only one runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynaslim.errors import UsageError
from dynaslim.runtime.arrays import TorchArrays
from dynaslim.runtime.backends import Backend, Program, Resources
from dynaslim.runtime.backends.eager import DTYPES, copy_out, device_of, to_channels_last
from dynaslim.runtime.variants import Variant, VariantShape, VariantSource

SIZES = (1, 2, 4, 8, 16, 32, 64)
_WARM_UP = 3
"""Runs before recording, in which libraries choose kernels and allocate memory."""


class _Recording:
    """A variant recorded for one number of rows: fixed input, graph, fixed outputs."""

    def __init__(self, module: nn.Module, x: Tensor, pool: Any) -> None:
        self.x = x
        stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                module(self.x)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may allocate memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            made = module(self.x)
        self.outs: tuple[Tensor, ...] = (made,) if isinstance(made, Tensor) else tuple(made)


class _Replayed:
    """A variant's recordings, each made when its number of rows is first used."""

    def __init__(
        self, backend: CudaGraphBackend, variant: Variant, module: nn.Module, shape: VariantShape
    ) -> None:
        self._backend = backend
        self._variant = variant
        self._module = module
        self._shape = shape
        self._recordings: dict[int, _Recording] = {}

    @torch.inference_mode()
    def __call__(self, x: Tensor, outs: Sequence[Tensor]) -> None:
        features = x if self._variant.takes_images else x.permute(0, 3, 1, 2)
        with self._backend.lock:  # graphs share memory
            if len(x) not in self._recordings:
                self._recordings[len(x)] = self._record(len(x))
            recording = self._recordings[len(x)]
            recording.x.copy_(features)
            recording.graph.replay()
            copy_out(recording.outs, outs)

    def _record(self, rows: int) -> _Recording:
        backend = self._backend
        x = torch.zeros(
            (rows, *self._shape.row_in), device=backend.arrays.device, dtype=backend.arrays.dtype
        ).contiguous(memory_format=torch.channels_last)
        recording = _Recording(self._module, x, backend.pool)
        backend.counts.compiled.append(f"{self._variant.name} rows {rows}")
        return recording


class CudaGraphBackend(Backend):
    """Modules recorded as CUDA graphs.

    Raises:
        UsageError: if there is no CUDA GPU or the network is not on one.
    """

    name = "cudagraph"
    arrays: TorchArrays
    workers = 1
    sizes = SIZES
    fixed_size = True

    def __init__(self, source: VariantSource, resources: Resources) -> None:
        super().__init__(source, resources)
        device = device_of(source)
        if not torch.cuda.is_available():
            raise UsageError(
                "backend cudagraph needs a CUDA GPU, and torch sees none here; "
                "choose another backend"
            )
        if device.type != "cuda":
            raise UsageError(
                f"backend cudagraph needs a network on a CUDA device, this one is on {device}: "
                f"net.to('cuda'), or choose another backend"
            )
        self.arrays = TorchArrays(device, DTYPES[source.precision])
        self.lock = threading.Lock()
        self.pool = torch.cuda.graph_pool_handle()

    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        module = to_channels_last(self._source.module(variant, self.arrays.dtype))
        return _Replayed(self, variant, module, shape)
