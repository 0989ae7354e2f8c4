"""Backends, which compile and run variants: their base class and a registry by name."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final, Protocol

from dynaslim.errors import UsageError, check
from dynaslim.runtime.arrays import Array, Arrays
from dynaslim.runtime.cache import Cache
from dynaslim.runtime.libraries import installed, require
from dynaslim.runtime.schedule import CACHE_VALUES
from dynaslim.runtime.variants import Precision, Variant, VariantShape, VariantSource


class Program(Protocol):
    """A compiled variant."""

    def __call__(self, x: Array, outs: Sequence[Array]) -> None:
        """Run rows x (n, *row), or images (n, C, H, W), and write the results into `outs`.

        Several threads may call it at once, each with its own outputs.
        """


@dataclass
class Counts:
    """Names of a backend's programs, by where they came from."""

    compiled: list[str] = field(default_factory=list)
    """Programs compiled in this process."""
    cached: list[str] = field(default_factory=list)
    """Programs read from disk."""


class Backend(ABC):
    """Compiles each variant once; thread-safe."""

    name: str
    """Its key in `BACKENDS`."""
    arrays: Arrays
    """Array library of its programs' inputs and outputs."""
    workers: int
    """Best number of concurrent calls, each on one core; 1 if a call uses all cores or the GPU."""
    own_threads = False
    """Whether programs must not run on the caller's thread, whose settings belong to the caller."""
    sizes: tuple[int, ...] | None = None
    """Numbers of rows that programs are made for, ascending; None if any number works."""
    own_core_rows = 0
    """While every core has a caller, steps of up to this many rows run on the caller's core."""
    piece_values = CACHE_VALUES
    """Number of values in the largest feature map of a piece at which it runs fastest."""
    fixed_size = False
    """Whether a program supports only one image size."""
    fixed_threads = False
    """Whether a program supports only one number of cores."""

    def __init__(self, source: VariantSource, resources: Resources) -> None:
        self._source = source
        self._resources = resources
        self.counts = Counts()
        self._programs: dict[tuple[Variant, tuple[int, ...] | None, bool], Program] = {}
        self._compiling = threading.Lock()

    def program(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        """Return the variant's program for rows of this shape; `wide` uses all cores for one call.

        Raises:
            UsageError: if the source cannot provide what the backend needs.
        """
        key = (variant, shape.row_in if self.fixed_size else None, wide and self.fixed_threads)
        program = self._programs.get(key)
        if program is None:
            with self._compiling:  # one compilation at a time, and never the same one twice
                program = self._programs.get(key)
                if program is None:
                    program = self._programs[key] = self.compile(variant, shape, wide=wide)
        return program

    @abstractmethod
    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        """Compile what `program` returns; called once for each distinct program."""

    def start_worker(self) -> None:  # noqa: B027
        """Called once in every thread that runs programs in parallel with others."""


@dataclass(frozen=True)
class Resources:
    """Resources that a backend may use."""

    threads: int
    """Number of cores."""
    cache: Cache | None
    """Cache for compiled programs of this source on this machine; None to keep none."""


BACKENDS: Final = {
    "eager": ("dynaslim.runtime.backends.eager", "EagerBackend", ("torch",)),
    "inductor": ("dynaslim.runtime.backends.inductor", "InductorBackend", ("torch",)),
    "onnxruntime": (
        "dynaslim.runtime.backends.onnxruntime",
        "OnnxRuntimeBackend",
        ("onnxruntime",),
    ),
    "openvino": ("dynaslim.runtime.backends.openvino", "OpenVinoBackend", ("openvino",)),
    "cudagraph": ("dynaslim.runtime.backends.cudagraph", "CudaGraphBackend", ("torch",)),
}
"""Name -> module, class, and the libraries it needs."""

FROM_PACKAGE: Final = ("onnxruntime", "openvino")
"""Backends that run an exported package."""

SUPPORTED: Final[dict[str, tuple[Precision, ...]]] = {
    "eager": ("fp32", "bf16"),
    "inductor": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "cudagraph": ("fp32", "bf16"),
}
"""Precisions of each backend. ONNX Runtime's CPU kernels have no bfloat16 convolution."""


def check_backend(name: str) -> None:
    """Raise `UsageError` if there is no backend with this name."""
    known = ("auto", *BACKENDS)
    check(name in known, f"backend {name!r}: choose from {', '.join(known)}")


def make_backend(name: str, source: VariantSource, resources: Resources) -> Backend:
    """Create a backend for a network's variants.

    Raises:
        UsageError: if there is no such backend, its library is not installed (the message says
            how to install it), or it does not support the source or its precision.
    """
    check_backend(name)
    if name not in FROM_PACKAGE and not source.has_modules:
        raise UsageError(
            f"backend {name} runs no packages: choose from auto, {', '.join(FROM_PACKAGE)}"
        )
    if source.precision not in SUPPORTED[name]:
        able = [b for b, precisions in SUPPORTED.items() if source.precision in precisions]
        raise UsageError(
            f"backend {name} has no {source.precision}, only {', '.join(SUPPORTED[name])}; "
            f"{source.precision} runs on {', '.join(able)}"
        )
    module, kind, libraries = BACKENDS[name]
    for library in libraries:
        require(library)
    made: Any = getattr(import_module(module), kind)(source, resources)
    return made  # type: ignore[no-any-return]


def default_device(backend: str) -> str:
    """The device on which to load a network for a backend: a GPU only for `cudagraph`."""
    if backend != "cudagraph":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def available(precision: Precision) -> list[str]:
    """Backends that support a precision and whose libraries are installed."""
    return [
        name
        for name, (_, _, libraries) in BACKENDS.items()
        if precision in SUPPORTED[name] and all(map(installed, libraries))
    ]
