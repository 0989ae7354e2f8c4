"""PyTorch's ahead-of-time compiler with frozen weights: one shared library per variant.

A library is compiled once (half a minute each, by the machine's C++ compiler) for one image size
and up to `MOST_ROWS` rows, and kept in the cache; loading one takes milliseconds.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynaslim.errors import DynaslimError, first_line
from dynaslim.runtime.backends import Program, Resources
from dynaslim.runtime.backends.eager import EagerBackend, ModuleProgram
from dynaslim.runtime.cache import why_not_writable
from dynaslim.runtime.variants import Variant, VariantShape, VariantSource

MOST_ROWS = 4096
_CONFIGS = {
    "freezing": True,
    # use the caller's thread count rather than that at compile time, with which parallel programs
    # would have more threads than there are cores (measured: half the speed)
    "cpp.dynamic_threads": True,
}


class InductorBackend(EagerBackend):
    """Like the eager backend, with compiled modules."""

    name = "inductor"
    fixed_size = True

    def __init__(self, source: VariantSource, resources: Resources) -> None:
        super().__init__(source, resources)
        self._cache = resources.cache
        # programs hold the GIL while they run, so no two run in parallel (measured: two threads
        # take twice as long as one); each uses all cores instead
        self.workers = 1

    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        # height and width are fixed, the batch is not
        return ModuleProgram(self._load(variant, shape), images=variant.takes_images)

    def _load(self, variant: Variant, shape: VariantShape) -> Any:
        channels, height, width = shape.row_in
        made_by = f"torch{torch.__version__}.{self._device.type}.any_threads"
        file = f"{variant.name}_{height}x{width}.{made_by}.pt2"
        path = None if self._cache is None else self._cache.find(file)
        if path is not None:
            try:
                loaded = _open(path)
            except (OSError, RuntimeError):  # a damaged file is compiled again
                loaded = None
            if loaded is not None:
                self.counts.cached.append(variant.name)
                return loaded
        self.counts.compiled.append(variant.name)
        module = self._source.module(variant, self._dtype)
        example = torch.randn(
            2, channels, height, width, device=self._device, dtype=self._dtype
        ).contiguous(memory_format=torch.channels_last)
        if self._cache is not None and self._cache.writable():
            try:
                with self._cache.room_for(file, ".tmp.pt2") as temporary:
                    _compile(module, example, temporary)
                return _open(self._cache.folder / file)
            except (OSError, RuntimeError, DynaslimError):
                why = why_not_writable(self._cache.folder)
                if why is None:  # the segment is at fault, not the folder
                    raise
                self._cache.give_up(why)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / file
            _compile(module, example, made)
            return _open(made)


def _open(path: Path) -> Any:
    return torch._inductor.aoti_load_package(str(path))


def _compile(module: nn.Module, example: torch.Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=MOST_ROWS)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within torch itself
            exported = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs=_CONFIGS
        )
    except Exception as error:  # of many types, for example if there is no C++ compiler
        raise DynaslimError(
            f"inductor: a segment does not compile ({first_line(error)}); it needs a C++ compiler "
            f"such as g++"
        ) from error
