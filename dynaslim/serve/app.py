"""A service as a FastAPI application."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim.runtime.libraries import require
from dynaslim.serve.bodies import BodyReader
from dynaslim.serve.facts import ServedEngine
from dynaslim.serve.openapi import document
from dynaslim.serve.options import ServeOptions
from dynaslim.serve.pages import Missing, describe, not_found, sample_file, web_files
from dynaslim.serve.prediction import Prediction
from dynaslim.serve.problems import (
    ClientGone,
    Problem,
    Receive,
    Send,
    unauthorised,
)
from dynaslim.serve.service import Service, failure
from dynaslim.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]
PREDICT: Final = "/v1/predict"
_PROTECTED: Final = ("/v1/", "/metrics")


def create_app(
    model: ServedEngine | str | Path,
    options: ServeOptions | None = None,
    *,
    backend: str = "auto",
    workers: int | None = None,
    cache_dir: str | Path | None = "auto",
) -> FastAPI:
    """An application that serves an engine, or the engine of a checkpoint or a package.

    `backend`, `workers` (cores) and `cache_dir` are for an engine that is made here.
    It can be run by any ASGI server, or mounted in another application. Compiling begins when it
    starts, or with the first request where the application around it starts no other. Its
    `Service` is `app.state.service`; call `service.close()` when the application around ends
    without a shutdown of this one.

    Raises:
        UsageError: for options that the model does not fit, or a missing library; as `Engine`.
        CheckpointError, PackageError: if the model cannot be read.
    """
    options = ServeOptions() if options is None else options
    fastapi = require("fastapi")
    for library in ("python_multipart", "prometheus_client"):
        require(library)
    from starlette.routing import Route

    path = Path(model) if isinstance(model, str | Path) else None
    if isinstance(model, str | Path):
        from dynaslim.predict import open_engine

        engine: ServedEngine = open_engine(
            model,
            backend,
            batch_size=options.max_batch,
            workers=workers,
            cache_dir=cache_dir,
        )
    else:
        engine = model
    service = Service(engine, options, path)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = fastapi.FastAPI(
        title="dynaslim",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    described = document(service)
    app.openapi = lambda: described  # of endpoints that the framework does not know
    _add_problems(app, fastapi)
    _add_state(app, fastapi, service)
    prediction = Prediction(service)
    for route, endpoint, methods in (
        (PREDICT, prediction, ["POST"]),
        ("/docs", describe(described), ["GET"]),
        *_pages(service),
    ):
        app.router.routes.append(Route(route, endpoint, methods=methods))
    app.add_middleware(_Front, service=service, prediction=prediction)
    made: FastAPI = app
    return made


def _pages(service: Service) -> list[tuple[str, App, list[str]]]:
    files = web_files()
    pages: list[tuple[str, App, list[str]]] = [("/", files.pop("index.html", Missing()), ["GET"])]
    pages += [(f"/static/{name}", file, ["GET"]) for name, file in files.items()]
    for number, sample in enumerate(service.samples):
        pages.append((f"/samples/{number}", sample_file(sample), ["GET"]))
    return pages


def _add_state(app: Any, fastapi: Any, service: Service) -> None:
    """The routes that tell how the server is."""
    answer = fastapi.responses.JSONResponse

    async def healthz() -> Any:
        return answer({"status": "alive"})

    async def readyz() -> Any:
        service.start()
        if service.accepting:
            return answer({"status": service.state})
        status = "stopping" if service.stopping else service.state
        return answer({"status": status}, 503, headers={"retry-after": "2"})

    async def metrics() -> Any:
        text, kind = service.metrics.text()
        return fastapi.Response(text, media_type=kind)

    async def models() -> Any:
        model = service.facts.describe(service.name, service.backend, service.options)
        model["samples"] = [
            {"name": sample.name, "url": f"/samples/{number}"}
            for number, sample in enumerate(service.samples)
        ]
        return answer({"models": [model]})

    for path, endpoint in (
        ("/healthz", healthz),
        ("/readyz", readyz),
        ("/metrics", metrics),
        ("/v1/models", models),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)


def _add_problems(app: Any, fastapi: Any) -> None:
    """All errors in one shape, those of the framework too."""
    from starlette.exceptions import HTTPException

    def answer(problem: Problem, headers: dict[str, str] | None = None) -> Any:
        own = {name.decode(): value.decode() for name, value in problem.headers()}
        return fastapi.responses.JSONResponse(
            problem.body(), problem.status, headers={**(headers or {}), **own}
        )

    async def http(request: Any, error: Any) -> Any:
        if error.status_code == 404:
            return answer(not_found(request.url.path))
        headers = dict(error.headers or {})
        if error.status_code == 405:
            allowed = headers.get("Allow", "another")
            problem = Problem(405, "method", f"method {request.method}: use {allowed}")
        else:
            problem = Problem(error.status_code, "http", str(error.detail))
        return answer(problem, headers)

    async def invalid(_: Any, error: Any) -> Any:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return answer(Problem(422, "bad_parameter", f"{where}: {first['msg']}"))

    async def unexpected(_: Any, error: Exception) -> Any:
        return answer(failure(error))

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(fastapi.exceptions.RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)


class _Front:
    """Asks for the token where it is needed; hands predictions on without further ado."""

    def __init__(self, app: App, service: Service, prediction: Prediction) -> None:
        token = service.options.token
        self._app = app
        self._prediction = prediction
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._limit = service.options.body_bytes
        self._buffers = service.buffers

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(_PROTECTED) and not self._allowed(scope):
            reader = BodyReader(scope["headers"], self._limit, self._buffers)
            with suppress(ClientGone):
                await reader.refuse(unauthorised(), receive, send)
        elif path == PREDICT and scope["method"] == "POST":
            await self._prediction(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allowed(self, scope: dict[str, Any]) -> bool:
        if self._expected is None:
            return True
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                kind, _, rest = value.partition(b" ")
                given = kind.capitalize() + b" " + rest.strip()
        return hmac.compare_digest(given, self._expected)
