"""The FastAPI application of a service: its routes, pages, errors and token."""

import asyncio
import functools
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final

import prometheus_client
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic.json_schema import SkipJsonSchema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from dynaslim.serve.http import (
    BodyReader,
    Headers,
    HTTPError,
    Receive,
    Send,
    error_body,
    internal_error,
    path_of,
)
from dynaslim.serve.inference import EXTENSIONS, InferEndpoint, check_model, describe
from dynaslim.serve.model_info import ServedEngine
from dynaslim.serve.options import ServeOptions
from dynaslim.serve.pages import File, find_samples, interface_page, web_files
from dynaslim.serve.predict import PredictEndpoint
from dynaslim.serve.schemas import (
    PREDICT_ERRORS,
    RETRY_AFTER,
    ErrorBody,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    Models,
    Prediction,
    PredictParameters,
    ProtocolError,
    Ready,
    SampleLink,
    ServerMetadata,
    Status,
    error_responses,
    infer_request,
    limited_bodies,
    limited_parameters,
)
from dynaslim.serve.service import Service
from dynaslim.version import __version__

ASGIApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]
PREDICT: Final = "/v1/predict"
_MODEL: Final = "/v2/models/{name}"
_PROTECTED: Final = ("/v1/", "/v2", "/metrics")
_HEALTH: Final = "/v2/health/"


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
    _add_protocol(app, service)
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


def _protected(service: Service, body: type = ErrorBody) -> dict[str, Any]:
    """Arguments of a protected route that document its token; `_TokenMiddleware` checks it."""
    if service.options.token is None:
        return {"responses": {}}
    bearer = HTTPBearer(scheme_name="token", auto_error=False)
    return {"dependencies": [Depends(bearer)], "responses": error_responses(401, body=body)}


def _add_predict(app: FastAPI, service: Service) -> None:
    limited = limited_parameters(PredictParameters, service.options.deadline_ms)
    json_body, form = limited_bodies(service.options.max_images)
    documented = _protected(service)
    documented["responses"] |= error_responses(*PREDICT_ERRORS)

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


def _add_protocol(app: FastAPI, service: Service) -> None:
    """Add the routes of the Open Inference Protocol."""
    name_ = Annotated[str, PathParameter(json_schema_extra={"enum": [service.name]})]

    def is_ready(response: Response) -> bool:
        service.start()
        if not service.accepting:
            response.status_code, response.headers["retry-after"] = 503, "2"
        return service.accepting

    def not_ready(body: type) -> dict[int | str, dict[str, Any]]:
        return {503: {"model": body, "description": "Not yet, or no more.", "headers": RETRY_AFTER}}

    @app.get(
        "/v2/health/live",
        operation_id="live",
        summary="Whether the process is alive.",
        response_description="Yes.",
    )
    async def live() -> Live:
        return {"live": True}

    @app.get(
        "/v2/health/ready",
        operation_id="ready",
        summary="Whether predictions are accepted.",
        response_description="Yes.",
        responses=not_ready(Ready),
    )
    async def ready(response: Response) -> Ready:
        return {"ready": is_ready(response)}

    @app.get(
        "/v2",
        operation_id="server_metadata",
        summary="The server.",
        response_description="Its name, its version and the protocol's extensions that it has.",
        **_protected(service, ProtocolError),
    )
    async def server_metadata() -> ServerMetadata:
        return {"name": "dynaslim", "version": __version__, "extensions": EXTENSIONS}

    def check(name: name_, request: Request) -> None:  # noqa: ARG001
        check_model(service, request.path_params)

    model = APIRouter(
        dependencies=[Depends(check)], responses=error_responses(404, body=ProtocolError)
    )

    @model.get(
        "",
        operation_id="model_metadata",
        summary="The model's inputs and outputs.",
        response_description="The model.",
    )
    async def model_metadata() -> ModelMetadata:
        return describe(service)

    @model.get(
        "/ready",
        operation_id="model_ready",
        summary="Whether predictions by the model are accepted.",
        response_description="Yes.",
        responses=not_ready(ModelReady),
    )
    async def model_ready(response: Response) -> ModelReady:
        return {"name": service.name, "ready": is_ready(response)}

    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    @model.post(
        "/infer",
        operation_id="infer",
        summary="Classify images, as encoded files or as tensors.",
        response_model=InferResponse,
        response_description="The network's answer, with binary tensors behind the JSON.",
        responses={
            200: {"content": binary},
            **error_responses(*PREDICT_ERRORS, body=ProtocolError),
        },
        openapi_extra={"requestBody": {"content": binary}},
    )
    async def infer(
        body: infer_request(service.options.deadline_ms),  # type: ignore[valid-type]
        inference_header_content_length: Annotated[int | SkipJsonSchema[None], Header(ge=0)] = None,
    ) -> None:
        """Binary tensors follow the JSON, whose length Inference-Header-Content-Length is; where
        that is 0, the body is one image. Images' formats are detected from their content.
        """

    endpoint = InferEndpoint(service)
    for prefix, shown in ((_MODEL, True), (f"{_MODEL}/versions/{{version}}", False)):
        # before the documented one, as for PREDICT
        app.router.routes.append(Route(f"{prefix}/infer", endpoint, methods=["POST"]))
        app.include_router(
            model, prefix=prefix, include_in_schema=shown, **_protected(service, ProtocolError)
        )


def _add_errors(app: FastAPI) -> None:
    """Give all errors the same body, including those of the framework."""

    def answer(
        request: Request, error: HTTPError, headers: dict[str, str] | None = None
    ) -> JSONResponse:
        body = error_body(error, path_of(request.scope))
        return JSONResponse(body, error.status, headers=headers)

    @app.exception_handler(HTTPError)
    async def own(request: Request, error: HTTPError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        path, status = request.url.path, error.status_code
        if status == 404:
            return answer(
                request, HTTPError(404, "not_found", f"nothing at {path[:200]}; see /docs")
            )
        if status == 405:
            allowed = headers.get("Allow", "another")
            made = HTTPError(405, "method", f"method {request.method}: use {allowed}")
        else:
            made = HTTPError(status, "http", str(error.detail))
        return answer(request, made, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return answer(request, HTTPError(422, "bad_parameter", f"{where}: {first['msg']}"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return answer(request, internal_error(error))


class _TokenMiddleware:
    """Refuses requests for protected paths without the token."""

    def __init__(self, app: ASGIApp, service: Service, token: str) -> None:
        self._app = app
        self._service = service
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = path_of(scope)
            protected = path.startswith(_PROTECTED) and not path.startswith(_HEALTH)
            if protected and not self._allowed(scope["headers"]):
                limit, buffers = self._service.options.body_bytes, self._service.buffers
                error = HTTPError(
                    401,
                    "unauthorised",
                    "this server asks for a token: send the header Authorization: Bearer TOKEN",
                    headers=[(b"www-authenticate", b"Bearer")],
                )
                with suppress(ClientDisconnect):
                    await BodyReader(scope, limit, buffers).refuse(error, receive, send)
                return
        await self._app(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        given = b""
        for name, value in headers:
            if name == b"authorization":
                scheme, _, rest = value.partition(b" ")
                given = scheme.capitalize() + b" " + rest.strip()
        return hmac.compare_digest(given, self._expected)
