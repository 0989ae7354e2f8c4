"""What runs a compiled form: one small protocol, and the backends by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final, Protocol

from dynaslim.errors import UsageError
from dynaslim.runtime.arrays import Array, Arrays
from dynaslim.runtime.cache import Cache
from dynaslim.runtime.forms import Form, FormShape, FormSource, Precision
from dynaslim.runtime.libraries import installed, require


class Program(Protocol):
    """A form, compiled."""

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


class Backend(Protocol):
    """Compiles forms."""

    @property
    def name(self) -> str:
        """As in `BACKENDS`."""

    @property
    def arrays(self) -> Arrays:
        """What its programs take and give."""

    @property
    def workers(self) -> int:
        """Calls that it does best at once, each with one core; 1 if one call uses all there is."""

    @property
    def own_threads(self) -> bool:
        """Whether work must stay off the caller's thread, whose settings are the caller's."""

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """Rising numbers of rows that programs are made for; None if any number will do."""

    @property
    def piece_values(self) -> int:
        """Values of the largest feature map of a piece that it runs fastest."""

    @property
    def counts(self) -> Counts:
        """What was compiled and what was found."""

    def program(self, form: Form, shape: FormShape, *, wide: bool) -> Program:
        """The form's program for rows of this shape; `wide` uses all cores for one call.

        Raises:
            UsageError: if the source has not what the backend needs.
        """

    def start_worker(self) -> None:
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


def make_backend(name: str, source: FormSource, resources: Resources) -> Backend:
    """A backend for a network's forms.

    Raises:
        UsageError: if there is no such backend, its library is not installed (the message is the
            line that installs it), or it does not have the source's precision.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r}: choose from auto, {', '.join(BACKENDS)}")
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
