"""What compiles and runs variants: a base class, and the backends by name."""

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
    """A variant, compiled."""

    def __call__(self, x: Array, outs: Sequence[Array]) -> None:
        """Run rows x (n, *row), or images (n, C, H, W), and write what comes out into `outs`.

        May be called by several threads at once, on outputs of their own.
        """


@dataclass
class Counts:
    """How the programs of a backend came to be."""

    compiled: list[str] = field(default_factory=list)
    """Names of those made in this process."""
    cached: list[str] = field(default_factory=list)
    """Names of those read from disk."""


class Backend(ABC):
    """Compiles variants, each once; may be used by several threads at once."""

    name: str
    """As in `BACKENDS`."""
    arrays: Arrays
    """What its programs take and give."""
    workers: int
    """Calls that it does best at once, each with one core; 1 if one call uses all there is."""
    own_threads = False
    """Whether work must stay off the caller's thread, whose settings are the caller's."""
    sizes: tuple[int, ...] | None = None
    """Rising numbers of rows that programs are made for; None if any number will do."""
    own_core_rows = 0
    """Steps of so few rows stay on the core of their caller while every core has a caller."""
    piece_values = CACHE_VALUES
    """Values of the largest feature map of a piece that it runs fastest."""
    fixed_size = False
    """Whether a program is for one size of image."""
    fixed_threads = False
    """Whether a program is for one number of cores."""

    def __init__(self, source: VariantSource, resources: Resources) -> None:
        self._source = source
        self._resources = resources
        self.counts = Counts()
        self._programs: dict[tuple[Variant, tuple[int, ...] | None, bool], Program] = {}
        self._compiling = threading.Lock()

    def program(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        """The variant's program for rows of this shape; `wide` uses all cores for one call.

        Raises:
            UsageError: if the source has not what the backend needs.
        """
        key = (variant, shape.row_in if self.fixed_size else None, wide and self.fixed_threads)
        program = self._programs.get(key)
        if program is None:
            with self._compiling:  # one compilation at a time, and none twice
                program = self._programs.get(key)
                if program is None:
                    program = self._programs[key] = self.compile(variant, shape, wide=wide)
        return program

    @abstractmethod
    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Program:
        """As `program`; called once for each that differs."""

    def start_worker(self) -> None:  # noqa: B027
        """Called once in every thread that runs programs side by side."""


@dataclass(frozen=True)
class Resources:
    """What a backend may use."""

    threads: int
    """Cores."""
    cache: Cache | None
    """Folder for compiled programs of this source on this machine; None keeps none."""


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
"""Name -> module, class, and the libraries that it needs."""

FROM_PACKAGE: Final = ("onnxruntime", "openvino")
"""Backends that run an exported package."""

SUPPORTED: Final[dict[str, tuple[Precision, ...]]] = {
    "eager": ("fp32", "bf16"),
    "inductor": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "cudagraph": ("fp32", "bf16"),
}
"""Precisions of each backend: onnxruntime's CPU kernels have no bfloat16 convolution."""


def check_backend(name: str) -> None:
    """Raise `UsageError` if there is no backend of that name."""
    known = ("auto", *BACKENDS)
    check(name in known, f"backend {name!r}: choose from {', '.join(known)}")


def make_backend(name: str, source: VariantSource, resources: Resources) -> Backend:
    """A backend for a network's variants.

    Raises:
        UsageError: if there is no such backend, its library is not installed (the message is the
            line that installs it), or it does not have the source's precision.
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
    """Where a network that is read for a backend is put: that which needs a GPU gets one."""
    if backend != "cudagraph":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def available(precision: Precision) -> list[str]:
    """The backends whose libraries are installed and that have a precision."""
    return [
        name
        for name, (_, _, libraries) in BACKENDS.items()
        if precision in SUPPORTED[name] and all(map(installed, libraries))
    ]
