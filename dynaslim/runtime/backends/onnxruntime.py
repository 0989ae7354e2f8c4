"""ONNX Runtime on the CPU.

In parallel, each call runs only on its caller's thread. A session's own thread pool would spin
while waiting for work and take cores from other sessions, of which a network has one per variant
(measured: 0.58 of the ideal). The pools of wide programs stop spinning when their call ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from dynaslim.runtime.arrays import NumpyArrays
from dynaslim.runtime.backends import Backend, Program, Resources
from dynaslim.runtime.libraries import onnx_session, require
from dynaslim.runtime.variants import Variant, VariantShape, VariantSource

_BINDINGS: Final = 64
"""Bindings kept per session."""
_FOLDER_OF_WEIGHTS: Final = "session.model_external_initializers_file_folder_path"
"""Session option for models opened from memory; since ONNX Runtime 1.21."""


class _Session:
    """A session that writes its outputs directly into the caller's buffers."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        self._idle: dict[tuple[int, ...], Any] = {}
        """Bindings by input shape and buffer addresses: calls tend to reuse the same buffers."""

    def __call__(self, x: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        key = (*x.shape, x.ctypes.data, *(out.ctypes.data for out in outs))
        # removed while in use: a binding serves one thread at a time
        binding = self._idle.pop(key, None)
        if binding is None:
            binding = self._session.io_binding()
            binding.bind_input("x", "cpu", 0, np.float32, x.shape, key[4])
            for name, out, address in zip(self._outputs, outs, key[5:], strict=True):
                binding.bind_output(name, "cpu", 0, np.float32, out.shape, address)
        self._session.run_with_iobinding(binding)
        if len(self._idle) >= _BINDINGS:  # callers may pass new images each time
            self._idle.clear()
        self._idle[key] = binding


class OnnxRuntimeBackend(Backend):
    """Sessions on one core each, and wide sessions on all cores."""

    name = "onnxruntime"
    fixed_threads = True
    own_core_rows = 2  # measured: the threads of concurrent wide calls spin, waiting for each other
    piece_values = 500_000  # measured: 4 rows of ds_mbnet's trunk at 224 px, 4 to 8 of the rest

    def __init__(self, source: VariantSource, resources: Resources) -> None:
        super().__init__(source, resources)
        self._ort = require("onnxruntime")
        self.arrays = NumpyArrays()
        self.workers = resources.threads

    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        """Like `Backend.compile`; one session serves all image sizes."""
        return _Session(self._open(variant, wide))

    def _open(self, variant: Variant, wide: bool) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._resources.threads if wide else 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if wide:
            _share_memory()
            options.add_session_config_entry("session.use_env_allocators", "1")
            # weights stay outside, so that they are freed with their session
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        level = ort.GraphOptimizationLevel
        cache, found = self._resources.cache, None
        # the optimised model depends on the machine, not on the number of threads
        file = f"{variant.name}.ort{ort.__version__}.onnx"
        model = None if self._source.has_modules else self._source.onnx(variant)
        if isinstance(model, Path):  # from a package, with its weights in a file beside it
            # an optimised variant still names the weights file, without its folder; without this
            # option the runtime would look for that file in the working directory
            options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(model.parent))
            if _version(ort) < (1, 21):
                cache = None
        if cache is not None:
            found = cache.find(file)
        if found is not None:
            options.graph_optimization_level = level.ORT_DISABLE_ALL
            try:
                session = onnx_session(found.read_bytes(), options)
            except Exception:  # no common base class; a damaged file is written again
                session = None
            if session is not None:
                self._note(self.counts.cached, variant, wide)
                return session
        options.graph_optimization_level = level.ORT_ENABLE_ALL
        self._note(self.counts.compiled, variant, wide)
        model = self._source.onnx(variant) if model is None else model
        if cache is None or not cache.writable():
            return onnx_session(model, options)
        try:
            with cache.room_for(file) as temporary:
                options.optimized_model_filepath = str(temporary)
                return onnx_session(model, options)
        except Exception as error:  # no common base class; caused by the file or by the model
            options.optimized_model_filepath = ""
            session = onnx_session(model, options)  # raises again if the model is the cause
            cache.give_up(error)
            return session

    @staticmethod
    def _note(where: list[str], variant: Variant, wide: bool) -> None:
        where.append(variant.name + (" wide" if wide else ""))


@cache
def _share_memory() -> None:
    """Make the memory that wide programs of this process share for their features.

    Wide programs run one after another. What one has just used is in the processor's cache for the
    next, and memory of their own would keep the size of their largest run. In parallel, own memory
    is faster (measured: 0.87 of the ideal, and 0.82 with shared memory).
    """
    ort = require("onnxruntime")
    arena, default = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    memory = ort.OrtMemoryInfo("Cpu", arena, 0, default)
    ort.create_and_register_allocator(memory, None)


def _version(ort: Any) -> tuple[int, int]:
    """ONNX Runtime's major and minor version."""
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)
