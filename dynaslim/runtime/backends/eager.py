"""Plain modules run by PyTorch without compilation, on the CPU or a GPU, in channels_last."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynaslim.runtime.arrays import TorchArrays
from dynaslim.runtime.backends import Backend, Program, Resources
from dynaslim.runtime.variants import Variant, VariantShape, VariantSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STARTING = threading.Lock()
"""Held, for all engines of the process, while the thread count of new threads is changed."""


def device_of(source: VariantSource) -> torch.device:
    """The device of a source's weights; the CPU if the source does not say."""
    found: torch.device = getattr(source, "device", torch.device("cpu"))
    return found


class ModuleProgram:
    """A program that calls a module, or anything callable like one."""

    def __init__(self, module: nn.Module, *, images: bool) -> None:
        self._module = module
        self._images = images

    @torch.inference_mode()
    def __call__(self, x: Tensor, outs: Sequence[Tensor]) -> None:
        if self._images:
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            x = x.permute(0, 3, 1, 2)
        copy_out(self._module(x), outs)


def to_channels_last(module: nn.Module) -> nn.Module:
    """Convert the weights of a module's convolutions to channels_last; returns the module."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def copy_out(made: Tensor | Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Write features (B, C, H, W) and logits into buffers of rows."""
    results = (made,) if isinstance(made, Tensor) else made
    for result, out in zip(results, outs, strict=True):
        out.copy_(result.permute(0, 2, 3, 1) if result.ndim == 4 else result)


class EagerBackend(Backend):
    """PyTorch without a compiler; one module serves calls on any number of cores."""

    name = "eager"
    own_threads = True

    def __init__(self, source: VariantSource, resources: Resources) -> None:
        super().__init__(source, resources)
        self._device = device_of(source)
        self._dtype = DTYPES[source.precision]
        self.arrays = TorchArrays(self._device, self._dtype)
        self.workers = resources.threads if self._device.type == "cpu" else 1

    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        module = to_channels_last(self._source.module(variant, self._dtype))
        return ModuleProgram(module, images=variant.takes_images)

    def start_worker(self) -> None:
        """Limit the calling thread to one core."""
        with _STARTING:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            # this also sets the default for later threads: restore that from another thread
            other = threading.Thread(target=torch.set_num_threads, args=(before,))
            other.start()
            other.join()
