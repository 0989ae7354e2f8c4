"""Optional libraries: imported where they are used, with errors that say how to install them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynaslim.errors import UsageError


def installed(library: str) -> bool:
    """Whether a library is installed, without importing it."""
    try:
        return find_spec(library) is not None
    except (ImportError, ValueError):  # the installation is damaged
        return False


def require(module: str) -> Any:
    """Import a module of an optional library.

    Raises:
        UsageError: if it is not installed or does not load; the message says how to install it.
    """
    library = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        # not dynaslim's extra, which would install torch where a package runs without it
        raise UsageError(
            f"{library} is not installed or does not load ({error}): pip install {library}"
        ) from None


def onnx_session(model: bytes | Path, options: Any = None) -> Any:
    """Open a file or its content in ONNX Runtime on the CPU; by default on all cores."""
    ort = require("onnxruntime")
    options = options or ort.SessionOptions()
    options.log_severity_level = 3
    content = model if isinstance(model, bytes) else str(model)
    # no fallback to another provider, which would print on standard output
    return ort.InferenceSession(
        content, options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
