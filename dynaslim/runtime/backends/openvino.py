"""OpenVINO on the CPU: one stream per core for parallel calls, one stream on all cores if wide."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from dynaslim.runtime.arrays import NumpyArrays
from dynaslim.runtime.backends import Backend, Program, Resources
from dynaslim.runtime.libraries import require
from dynaslim.runtime.variants import Variant, VariantShape, VariantSource

_BLOB: Final = ".blob"
"""Suffix of the files that the library caches."""


@lru_cache(maxsize=1)
def _core() -> Any:
    """The process's only `openvino.Core`, which is never freed.

    If a thread has an alternate signal stack (Python's faulthandler creates one), the first core
    replaces it by a larger one, and frees that when it is itself freed. If this happens in another
    thread, the next signal, such as Ctrl-C, ends the process.
    """
    return require("openvino").Core()


class _Compiled:
    """A compiled model with its idle requests. A request serves one thread at a time."""

    def __init__(self, openvino: Any, model: Any) -> None:
        self._tensor = openvino.Tensor
        self._model = model
        self._outputs = [output.get_any_name() for output in model.outputs]
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, x: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._model.create_infer_request()
        if not x.flags.writeable:  # a caller's read-only images: such memory cannot be shared
            x = x.copy()
        request.set_input_tensor(0, self._tensor(x, shared_memory=True))
        for number, out in enumerate(outs):
            request.set_output_tensor(number, self._tensor(out, shared_memory=True))
        request.infer()
        self._idle.put(request)


class OpenVinoBackend(Backend):
    """One compiled model per variant, image size and kind of call (parallel or wide)."""

    name = "openvino"
    fixed_size = fixed_threads = True

    def __init__(self, source: VariantSource, resources: Resources) -> None:
        super().__init__(source, resources)
        self._openvino = require("openvino")
        self._core = _core()
        self.arrays = NumpyArrays()
        self.workers = resources.threads

    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        """Like `Backend.compile`; height and width are fixed, the batch size is not."""
        model = self._model(variant)
        model.reshape({0: [-1, *shape.row_in]})
        threads = self._resources.threads
        precision = "bf16" if self._source.precision == "bf16" else "f32"
        config: dict[str, Any] = {
            "NUM_STREAMS": 1 if wide else threads,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            # if pinned, the first streams of two models would share a core and leave another idle
            "ENABLE_CPU_PINNING": False,
        }
        compiled, found = self._compile_or_find(model, config)
        size = "x".join(map(str, shape.row_in[1:]))
        name = f"{variant.name} {size}" + (" wide" if wide else "")
        (self.counts.cached if found else self.counts.compiled).append(name)
        return _Compiled(self._openvino, compiled)

    def _model(self, variant: Variant) -> Any:
        """The variant's model; its ONNX form, if made by torch, is kept beside the programs."""
        source, cache = self._source, self._resources.cache
        name = f"{variant.name}.onnx"
        if cache is not None and source.has_modules and (found := cache.find(name)):
            with suppress(OSError, RuntimeError):  # a damaged file is written again
                return self._core.read_model(found.read_bytes())
        onnx = source.onnx(variant)
        model = self._core.read_model(str(onnx) if isinstance(onnx, Path) else onnx)
        if cache is not None and isinstance(onnx, bytes) and source.has_modules:
            cache.write(name, onnx)
        return model

    def _compile_or_find(self, model: Any, config: dict[str, Any]) -> tuple[Any, bool]:
        """The compiled model, and whether it was in the cache."""
        cache = self._resources.cache
        before = {} if cache is None else cache.names(_BLOB)
        if cache is None or not (before or cache.writable()):
            return self._core.compile_model(model, "CPU", config), False
        try:
            compiled = self._core.compile_model(
                model, "CPU", {**config, "CACHE_DIR": str(cache.folder)}
            )
        except RuntimeError as error:  # if the model and not the folder is at fault, raised again
            compiled = self._core.compile_model(model, "CPU", config)
            cache.give_up(error)
            return compiled, False
        found = bool(compiled.get_property("LOADED_FROM_CACHE"))
        # if a program does not fit on the disk, the library continues silently
        if not found and cache.writable() and cache.names(_BLOB) == before:
            cache.give_up("OpenVINO wrote none")
        return compiled, found
