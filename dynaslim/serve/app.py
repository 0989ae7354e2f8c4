"""The FastAPI application of a service: its routes, pages, errors and token."""

import asyncio
import functools
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final

import prometheus_client
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from dynaslim.serve.http import (
    BodyReader,
    Headers,
    HTTPError,
    Receive,
    Send,
    internal_error,
)
from dynaslim.serve.model_info import ServedEngine
from dynaslim.serve.options import ServeOptions
from dynaslim.serve.pages import File, find_samples, interface_page, web_files
from dynaslim.serve.predict import PredictEndpoint
from dynaslim.serve.schemas import (
    RETRY_AFTER,
    Models,
    Prediction,
    SampleLink,
    Status,
    error_responses,
    limited_bodies,
    predict_parameters,
)
from dynaslim.serve.service import Service
from dynaslim.version import __version__

ASGIApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]
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
    starts, or with the first request if the outer application does not start it. Its
    `Service` is `app.state.service`; call `service.close()` if the outer application ends
    without shutting this one down.

    Raises:
        UsageError: for options that the model does not fit, or a missing library; as `Engine`.
        CheckpointError, PackageError: if the model cannot be read.
    """
    options = ServeOptions() if options is None else options
    path: Path | None = None
    engine: ServedEngine
    if isinstance(model, str | Path):
        from dynaslim.predict import open_engine

        path = Path(model)
        engine = open_engine(
            model, backend, batch_size=options.max_batch, workers=workers, cache_dir=cache_dir
        )
    else:
        engine = model
    samples = find_samples(options.samples, path, engine.class_names)
    service = Service(engine, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="dynaslim",
        version=__version__,
        description=f"Predictions by {service.name}, every image along the route that its gates "
        f"choose.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    _add_errors(app)
    _add_predict(app, service)
    links: list[SampleLink] = [
        {"name": sample.name, "url": f"/samples/{number}"} for number, sample in enumerate(samples)
    ]
    _add_state(app, service, links)
    interface = functools.cache(lambda: interface_page(app.openapi()))

    async def docs(_: Request) -> Any:
        return interface()

    files = web_files()
    pages: dict[str, Any] = {"/": files.pop("index.html"), "/docs": docs}
    pages |= {f"/static/{name}": file for name, file in files.items()}
    pages |= {
        link["url"]: File(sample.content, sample.media_type, max_age_s=3600)
        for link, sample in zip(links, samples, strict=True)
    }
    for url, page in pages.items():
        app.router.routes.append(Route(url, page, methods=["GET"]))
    if options.token is not None:
        app.add_middleware(_TokenMiddleware, service=service, token=options.token)
    return app


def _protected(service: Service) -> dict[str, Any]:
    """Arguments of a protected route that document its token; `_TokenMiddleware` checks it."""
    if service.options.token is None:
        return {"responses": {}}
    bearer = HTTPBearer(scheme_name="token", auto_error=False)
    return {"dependencies": [Depends(bearer)], "responses": error_responses(401)}


def _add_predict(app: FastAPI, service: Service) -> None:
    limited = predict_parameters(service.options.deadline_ms)
    json_body, form = limited_bodies(service.options.max_images)
    documented = _protected(service)
    documented["responses"] |= error_responses(400, 408, 413, 415, 422, 429, 500, 503, 504)

    async def predict(
        parameters: Annotated[limited, Query()],  # type: ignore[valid-type]
        body: json_body,  # type: ignore[valid-type]
    ) -> None:
        """Results are in the order of the images. Formats are detected from the images' content."""

    # of two routes with the same path the first one gets the requests; FastAPI documents the other
    app.router.routes.append(Route(PREDICT, PredictEndpoint(service), methods=["POST"]))
    app.post(
        PREDICT,
        operation_id="predict",
        summary="Classify images.",
        response_model=Prediction,
        response_description="The network's answer.",
        openapi_extra={
            "requestBody": {
                "content": {"multipart/form-data": {"schema": form.model_json_schema()}}
            }
        },
        **documented,
    )(predict)


def _add_state(app: FastAPI, service: Service, samples: list[SampleLink]) -> None:
    """Add the routes for the state of the server, its model and its metrics."""

    @app.get(
        "/healthz",
        operation_id="healthz",
        summary="Whether the process is alive.",
        response_description="Yes.",
    )
    async def healthz() -> Status:
        return {"status": "alive"}

    @app.get(
        "/readyz",
        operation_id="readyz",
        summary="Whether predictions are accepted.",
        response_description="Yes.",
        responses={
            503: {"model": Status, "description": "Not yet, or no more.", "headers": RETRY_AFTER}
        },
    )
    async def readyz(response: Response) -> Status:
        service.start()
        if service.accepting:
            return {"status": service.state}
        response.status_code, response.headers["retry-after"] = 503, "2"
        return {"status": "stopping" if service.stopping else service.state}

    protected = _protected(service)
    protected["responses"][200] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get(
        "/metrics",
        operation_id="metrics",
        summary="Metrics for Prometheus.",
        response_class=Response,  # has no type, so that errors are documented as JSON
        response_description="In Prometheus' text format.",
        **protected,
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get(
        "/v1/models",
        operation_id="models",
        summary="The models with their routes, costs, budgets and limits.",
        response_description="The models.",
        **_protected(service),
    )
    async def models() -> Models:
        return {
            "models": [
                service.info.describe(service.name, service.backend, service.options, samples)
            ]
        }


def _add_errors(app: FastAPI) -> None:
    """Give all errors the same body, including those of the framework."""

    def answer(error: HTTPError, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        path, status = request.url.path, error.status_code
        if status == 404:
            return answer(HTTPError(404, "not_found", f"nothing at {path[:200]}; see /docs"))
        if status == 405:
            allowed = headers.get("Allow", "another")
            made = HTTPError(405, "method", f"method {request.method}: use {allowed}")
        else:
            made = HTTPError(status, "http", str(error.detail))
        return answer(made, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return answer(HTTPError(422, "bad_parameter", f"{where}: {first['msg']}"))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return answer(internal_error(error))


class _TokenMiddleware:
    """Refuses requests for protected paths without the token."""

    def __init__(self, app: ASGIApp, service: Service, token: str) -> None:
        self._app = app
        self._service = service
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path: str = scope["path"].removeprefix(scope.get("root_path", ""))
            if path.startswith(_PROTECTED) and not self._allowed(scope["headers"]):
                limit, buffers = self._service.options.body_bytes, self._service.buffers
                error = HTTPError(
                    401,
                    "unauthorised",
                    "this server asks for a token: send the header Authorization: Bearer TOKEN",
                    headers=[(b"www-authenticate", b"Bearer")],
                )
                with suppress(ClientDisconnect):
                    await BodyReader(scope["headers"], limit, buffers).refuse(error, receive, send)
                return
        await self._app(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        given = b""
        for name, value in headers:
            if name == b"authorization":
                scheme, _, rest = value.partition(b" ")
                given = scheme.capitalize() + b" " + rest.strip()
        return hmac.compare_digest(given, self._expected)
