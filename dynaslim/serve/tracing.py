"""OpenTelemetry spans for requests and for their time in the queue and in the engine.

Tracing is on if the process has set up OpenTelemetry's SDK, as `opentelemetry-instrument` does.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final

from dynaslim.runtime.libraries import installed

if TYPE_CHECKING:
    from dynaslim.serve.batcher import WorkItem

_EXCLUDED: Final = "healthz,readyz,metrics,v2/health/"


def instrument(app: Any) -> Any:
    """Add spans to an application's requests and return the tracer; None if tracing is off."""
    api: Any = sys.modules.get("opentelemetry.trace")  # it is imported if the SDK is set up
    if api is None or not hasattr(api.get_tracer_provider(), "add_span_processor"):
        return None
    done = getattr(app, "_is_instrumented_by_opentelemetry", False)
    if not done and installed("opentelemetry.instrumentation.fastapi"):
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor as Instrumentor

        Instrumentor.instrument_app(app, excluded_urls=_EXCLUDED, exclude_spans=["receive", "send"])
    return api.get_tracer("dynaslim")


def record(tracer: Any, model: str, item: WorkItem) -> None:
    """Record the queue and engine spans of an answered item as children of its request's span."""
    offset = time.time() - time.monotonic()
    attributes = {
        "dynaslim.model": model,
        "dynaslim.images": len(item.answers),
        "dynaslim.batch_size": item.batch_size,
    }
    times = [round((t + offset) * 1e9) for t in (item.decoded, item.started, item.finished)]
    for name, start, end in zip(("queue", "engine"), times[:-1], times[1:], strict=True):
        tracer.start_span(name, start_time=start, attributes=attributes).end(max(start, end))
