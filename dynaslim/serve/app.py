"""The FastAPI application: routes, web pages, error bodies and the token check."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final

import prometheus_client
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from dynaslim.errors import check
from dynaslim.model_names import find_model
from dynaslim.runtime.cache import usable_cores
from dynaslim.runtime.engine import Engine
from dynaslim.serve import repository, tracing
from dynaslim.serve.endpoint import Endpoint, no_such_model
from dynaslim.serve.http import (
    BodyReader,
    HTTPError,
    Receive,
    Send,
    bearer_is,
    error_body,
    internal_error,
    path_of,
    unauthorised,
)
from dynaslim.serve.inference import EXTENSIONS, InferCall, check_version, describe
from dynaslim.serve.options import ServeOptions
from dynaslim.serve.pages import File, find_samples, interface_page, web_files
from dynaslim.serve.predict import PredictCall, model_named
from dynaslim.serve.schemas import (
    PREDICT_ERRORS,
    RETRY_AFTER,
    ChangeRequest,
    ErrorBody,
    IndexEntry,
    IndexRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    Models,
    Prediction,
    ProtocolError,
    Ready,
    SampleLink,
    ServerMetadata,
    Status,
    error_responses,
    infer_request,
    limited_bodies,
    query_parameters,
)
from dynaslim.serve.service import ServedModel, Service, Source
from dynaslim.version import __version__

Model = Engine | str | Path
ASGIApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]
PREDICT: Final = "/v1/predict"
_MODEL: Final = "/v2/models/{name}"
_PROTECTED: Final = ("/v1/", "/v2", "/metrics")
_HEALTH: Final = "/v2/health/"


def create_app(
    model: Model | Sequence[Model],
    options: ServeOptions | None = None,
    *,
    backend: str = "auto",
    workers: int | None = None,
    cache_dir: str | Path | None = "auto",
) -> FastAPI:
    """An application that serves models: engines, or paths of checkpoints and packages.

    The string NAME=PATH serves a model under another name than its network's. `backend`, `workers`
    (cores) and `cache_dir` apply to engines created here. The application can be run by any ASGI
    server, or mounted in another application. Compiling begins when it starts, or with the first
    request if the outer application does not start it. Its `Service` is `app.state.service`; call
    `service.close()` if the outer application ends without shutting this one down.

    Raises:
        UsageError: for options that do not suit a model, two models of the same name, or a missing
            library; as `Engine`.
        CheckpointError, PackageError: if a model cannot be read.
    """
    options = ServeOptions() if options is None else options

    def open_model(path: str | Path) -> Engine:
        from dynaslim.predict import open_engine

        return open_engine(
            path, backend, batch_size=options.max_batch, workers=workers, cache_dir=cache_dir
        )

    sources: list[Source] = []
    first: Path | None = None
    for one in model if isinstance(model, Sequence) and not isinstance(model, str) else [model]:
        if isinstance(one, str | Path):
            name, path = _named(one)
            first = first if sources else Path(path)
            found = find_model(path, ("checkpoint", "package")).path
            sources.append((name, open_model(found), found))
        else:
            sources.append((None, one, None))
    check(bool(sources), "no models: give at least one")
    samples = find_samples(options.samples, first, sources[0][1].class_names)
    cores = usable_cores()
    service = Service(sources, options, open_model, max(1, cores // (workers or cores)))

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
        description=f"Predictions by {', '.join(service.models)}, every image along the route that "
        f"its gates choose.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
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
    _add_repository(app, service)
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
        app.add_middleware(_TokenMiddleware, service=service)
    service.tracer = tracing.instrument(app)
    return app


def _named(text: str | Path) -> tuple[str | None, str | Path]:
    """Split NAME=PATH; an existing file or folder whose name contains "=" is taken as a path."""
    name, equals, path = str(text).partition("=")
    if not equals or "/" in name or Path(text).exists():
        return None, text
    check(
        repository.NAME.fullmatch(name) is not None,
        f"{text}: a model's name has up to 128 letters, digits, dots, dashes and underscores",
    )
    return name, path


def _protected(service: Service, body: type = ErrorBody) -> APIRouter:
    """A router that documents the token its routes need; `_TokenMiddleware` checks the token."""
    if service.options.token is None:
        return APIRouter()
    bearer = HTTPBearer(scheme_name="token", auto_error=False)
    return APIRouter(dependencies=[Depends(bearer)], responses=error_responses(401, body=body))


def _not_ready(body: type) -> dict[int | str, dict[str, Any]]:
    return {503: {"model": body, "description": "Not yet, or no more.", "headers": RETRY_AFTER}}


def _is_ready(response: Response, service: Service, served: Service | ServedModel) -> bool:
    """Whether predictions are accepted; if not, set the response's status to 503."""
    service.start()
    if not served.accepting:
        response.status_code, response.headers["retry-after"] = 503, "2"
    return served.accepting


def _add_predict(app: FastAPI, service: Service) -> None:
    limited = query_parameters(service.options.deadline_ms)
    json_body, form = limited_bodies(service.options.max_images)
    documented = _protected(service)

    async def predict(
        parameters: Annotated[limited, Query()],  # type: ignore[valid-type]
        body: json_body,  # type: ignore[valid-type]
    ) -> None:
        """Results are in the order of the images. Formats are detected from the images' content."""

    endpoint = Endpoint(service, PredictCall, lambda scope: model_named(scope["query_string"]))
    # the first of two routes with this path handles requests; FastAPI documents the second
    app.router.routes.append(Route(PREDICT, endpoint, methods=["POST"]))
    documented.post(
        PREDICT,
        summary="Classify images.",
        response_model=Prediction,
        response_description="The network's answer.",
        responses=error_responses(404, *PREDICT_ERRORS),
        openapi_extra={
            "requestBody": {
                "content": {"multipart/form-data": {"schema": form.model_json_schema()}}
            }
        },
    )(predict)
    app.include_router(documented)


def _add_state(app: FastAPI, service: Service, samples: list[SampleLink]) -> None:
    """Add the routes for the server's health, its metrics and its list of models."""

    @app.get("/healthz", summary="Whether the process is alive.")
    async def healthz() -> Status:
        return {"status": "alive"}

    @app.get("/readyz", summary="Whether predictions are accepted.", responses=_not_ready(Status))
    async def readyz(response: Response) -> Status:
        _is_ready(response, service, service)
        return {"status": "stopping" if service.stopping else service.state}

    protected = _protected(service)

    @protected.get(
        "/metrics",
        summary="Metrics for Prometheus.",
        response_class=Response,  # without a media type, so that errors are documented as JSON
        response_description="In Prometheus' text format.",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @protected.get("/v1/models", summary="The models with their routes, costs, budgets and limits.")
    async def models() -> Models:
        found = [
            (one, samples if one.name == service.first else []) for one in service.models.values()
        ]
        options = service.options
        return {"models": [m.info.describe(m.name, m.backend, options, s) for m, s in found]}

    app.include_router(protected)


def _add_protocol(app: FastAPI, service: Service) -> None:
    """Add the routes of the Open Inference Protocol."""
    names = [] if service.options.model_folder is not None else list(service.models)
    name_ = Annotated[str, PathParameter(json_schema_extra={"enum": names} if names else None)]

    @app.get("/v2/health/live", summary="Whether the process is alive.")
    async def live() -> Live:
        return {"live": True}

    @app.get(
        "/v2/health/ready",
        summary="Whether predictions by all models are accepted.",
        responses=_not_ready(Ready),
    )
    async def ready(response: Response) -> Ready:
        return {"ready": _is_ready(response, service, service)}

    protected = _protected(service, ProtocolError)

    @protected.get(
        "/v2",
        summary="The server.",
        response_description="Its name, its version and the protocol's extensions that it has.",
    )
    async def server_metadata() -> ServerMetadata:
        return {"name": "dynaslim", "version": __version__, "extensions": EXTENSIONS}

    def find(name: name_, request: Request) -> ServedModel:
        check_version(request.path_params)
        if name not in service.models:
            raise no_such_model(service, name)
        return service.models[name]

    found = Annotated[ServedModel, Depends(find)]
    model = APIRouter(responses=error_responses(404, body=ProtocolError))

    @model.get("", summary="The model's inputs and outputs.")
    async def model_metadata(served: found) -> ModelMetadata:
        return describe(served)

    @model.get(
        "/ready",
        summary="Whether predictions by the model are accepted.",
        responses=_not_ready(ModelReady),
    )
    async def model_ready(response: Response, served: found) -> ModelReady:
        return {"name": served.name, "ready": _is_ready(response, service, served)}

    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    @model.post(
        "/infer",
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
        name: name_,
        body: infer_request(service.options.deadline_ms),  # type: ignore[valid-type]
        inference_header_content_length: Annotated[int | SkipJsonSchema[None], Header(ge=0)] = None,
    ) -> None:
        """Binary tensors follow the JSON; the header Inference-Header-Content-Length is the length
        of the JSON. If it is 0, the body is one image. Formats are detected from images' content.
        """

    endpoint = Endpoint(service, InferCall, lambda scope: scope["path_params"]["name"])
    for prefix, shown in ((_MODEL, True), (f"{_MODEL}/versions/{{version}}", False)):
        # before the documented route, as for PREDICT
        app.router.routes.append(Route(f"{prefix}/infer", endpoint, methods=["POST"]))
        protected.include_router(model, prefix=prefix, include_in_schema=shown)
    app.include_router(protected)


def _add_repository(app: FastAPI, service: Service) -> None:
    """Add the routes of the protocol's model repository extension.

    They read bodies themselves: FastAPI would read them without a limit and before the token check.
    """

    def documented(body: type[BaseModel], *statuses: int) -> dict[str, Any]:
        content = {"application/json": {"schema": body.model_json_schema()}}
        return {
            "openapi_extra": {"requestBody": {"content": content}},
            "responses": error_responses(400, 408, 413, 422, *statuses, body=ProtocolError),
        }

    protected = _protected(service, ProtocolError)

    @protected.post(
        "/v2/repository/index",
        summary="The models that are served; with the admin token also those that can be loaded.",
        **documented(IndexRequest),
    )
    async def repository_index(request: Request) -> list[IndexEntry]:
        return await repository.index(service, request)

    app.include_router(protected)
    change = {
        "response_class": Response,
        "response_description": "Done.",
        "dependencies": [Depends(HTTPBearer(scheme_name="admin token", auto_error=False))],
        **documented(ChangeRequest, 401, 403, 404, 503),
    }

    @app.post("/v2/repository/models/{name}/load", summary="Load a model of the folder.", **change)
    async def load(name: str, request: Request) -> None:  # noqa: ARG001
        """A model of that name serves until the new one is ready. Needs the admin token."""
        await repository.change(service, request, repository.load)

    @app.post("/v2/repository/models/{name}/unload", summary="Unload a model.", **change)
    async def unload(name: str, request: Request) -> None:  # noqa: ARG001
        """Returns when all requests that the model accepted are answered. Needs the admin token."""
        await repository.change(service, request, Service.unload)


def _add_errors(app: FastAPI) -> None:
    """Give all errors the same body, including those of the framework."""

    def answer(
        request: Request, error: HTTPError, headers: dict[str, str] | None = None
    ) -> JSONResponse:
        body = error_body(error, path_of(request.scope))
        return JSONResponse(body, error.status, headers=headers)

    @app.exception_handler(HTTPError)
    async def own(request: Request, error: HTTPError) -> JSONResponse:
        headers = {name.decode(): value.decode() for name, value in error.headers}
        return answer(request, error, headers)

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
    """Refuses requests for protected paths that do not have a valid token."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path, options = path_of(scope), self._service.options
            protected = path.startswith(_PROTECTED) and not path.startswith(_HEALTH)
            if protected and not bearer_is(scope["headers"], options.token, options.admin_token):
                error = unauthorised(
                    "this server asks for a token: send the header Authorization: Bearer TOKEN"
                )
                reader = BodyReader(scope, options.body_bytes, self._service.buffers)
                with suppress(ClientDisconnect):
                    await reader.refuse(error, receive, send)
                return
        await self._app(scope, receive, send)
