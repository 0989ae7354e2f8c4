"""Serve networks over HTTP; the images of concurrent requests to a network share batches.

    app = create_app("package", ServeOptions(token="..."))     # a FastAPI application
    with Batcher(engine) as batcher: ...                       # the same batches without HTTP

Names are imported on first use, so that a batcher needs no web framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynaslim.runtime.libraries import require

if TYPE_CHECKING:
    from dynaslim.serve.app import create_app
    from dynaslim.serve.batcher import Batcher, DeadlineError, QueueFullError, StoppingError
    from dynaslim.serve.options import ServeOptions

_HOME = {
    "Batcher": "dynaslim.serve.batcher",
    "DeadlineError": "dynaslim.serve.batcher",
    "QueueFullError": "dynaslim.serve.batcher",
    "ServeOptions": "dynaslim.serve.options",
    "StoppingError": "dynaslim.serve.batcher",
    "create_app": "dynaslim.serve.app",
}

__all__ = [
    "Batcher",
    "DeadlineError",
    "QueueFullError",
    "ServeOptions",
    "StoppingError",
    "create_app",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynaslim.serve' has no attribute {name!r}")
    if name == "create_app":
        for library in ("fastapi", "python_multipart", "prometheus_client"):
            require(library)  # its error message shows how to install it
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
