"""ONNX Runtime on the CPU.

Side by side, each call runs on its caller's thread alone: one pool of threads per session, and a
network has a session for every variant, spins for work and takes the cores from the others
(measured: 0.58 of the ideal). The wide programs' pools stop spinning when their call ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dynaslim.runtime.arrays import NumpyArrays
from dynaslim.runtime.backends import Backend, Program, Resources
from dynaslim.runtime.libraries import onnx_session, require
from dynaslim.runtime.variants import Variant, VariantShape, VariantSource

_BINDINGS: Final = 64
"""Kept per session."""
_FOLDER_OF_WEIGHTS: Final = "session.model_external_initializers_file_folder_path"
"""Option of a session that is opened from memory; since ONNX Runtime 1.21."""


class _Session:
    """A session whose outputs are written where they are wanted."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        self._idle: dict[tuple[int, ...], Any] = {}
        """Bindings by number of rows and addresses: calls come back to the same buffers."""

    def __call__(self, x: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        key = (*x.shape, x.ctypes.data, *(out.ctypes.data for out in outs))
        # taken out while it is in use: a binding serves one thread
        binding = self._idle.pop(key, None)
        if binding is None:
            binding = self._session.io_binding()
            binding.bind_input("x", "cpu", 0, np.float32, x.shape, key[4])
            for name, out, address in zip(self._outputs, outs, key[5:], strict=True):
                binding.bind_output(name, "cpu", 0, np.float32, out.shape, address)
        self._session.run_with_iobinding(binding)
        if len(self._idle) >= _BINDINGS:  # of callers who give new images each time
            self._idle.clear()
        self._idle[key] = binding


class OnnxRuntimeBackend(Backend):
    """Sessions on one core each, or one with all."""

    name = "onnxruntime"
    fixed_threads = True
    own_core_rows = 2  # measured: threads of several calls that wait for each other by spinning
    piece_values = 500_000  # measured: 4 rows of the trunk of ds_mbnet at 224 px, 4 to 8 behind

    def __init__(self, source: VariantSource, resources: Resources) -> None:
        super().__init__(source, resources)
        self._ort = require("onnxruntime")
        self.arrays = NumpyArrays()
        self.workers = resources.threads

    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        """As `Backend.compile`; a session takes images of any size."""
        return _Session(self._open(variant, wide))

    def _open(self, variant: Variant, wide: bool) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._resources.threads if wide else 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        level = ort.GraphOptimizationLevel
        cache, found = self._resources.cache, None
        # what the optimiser makes depends on the machine, not on the number of threads
        file = f"{variant.name}.ort{ort.__version__}.onnx"
        model = None if self._source.has_modules else self._source.onnx(variant)
        if isinstance(model, Path):  # a package's, whose weights are in a file beside it
            # an optimised variant still names the file of weights, without its folder; without this
            # option the runtime would take a file of that name where the process works
            options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(model.parent))
            if _version(ort) < (1, 21):
                cache = None
        if cache is not None:
            found = cache.find(file)
        if found is not None:
            options.graph_optimization_level = level.ORT_DISABLE_ALL
            try:
                session = onnx_session(found.read_bytes(), options)
            except Exception:  # of no common kind; a damaged file is made again
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
        except Exception as error:  # of no common kind: of the file, or of the model
            options.optimized_model_filepath = ""
            session = onnx_session(model, options)  # the model's own fault is raised again
            cache.give_up(error)
            return session

    @staticmethod
    def _note(where: list[str], variant: Variant, wide: bool) -> None:
        where.append(variant.name + (" wide" if wide else ""))


def _version(ort: Any) -> tuple[int, int]:
    """Its first two numbers."""
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)
