"""A network served over HTTP, its images batched with those of other requests.

    app = create_app("package", ServeOptions(token="..."))     # a FastAPI application
    with Batcher(engine) as batcher: ...                       # the same batches without HTTP

Names are imported on first use: a batcher needs no web framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynaslim.serve.app import create_app
    from dynaslim.serve.batcher import Batcher
    from dynaslim.serve.jobs import DeadlineError, QueueFullError, StoppingError
    from dynaslim.serve.options import ServeOptions

_HOME = {
    "Batcher": "dynaslim.serve.batcher",
    "DeadlineError": "dynaslim.serve.jobs",
    "QueueFullError": "dynaslim.serve.jobs",
    "ServeOptions": "dynaslim.serve.options",
    "StoppingError": "dynaslim.serve.jobs",
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
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
