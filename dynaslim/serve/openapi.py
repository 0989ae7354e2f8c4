"""The interface as an OpenAPI document: what is answered, and every error that can come."""

from __future__ import annotations

from typing import Any, Final

from dynaslim.runtime.budget import FORMS
from dynaslim.serve.bodies import FIELD
from dynaslim.serve.queries import LEAST_DEADLINE_MS, TOP_K
from dynaslim.serve.service import Service
from dynaslim.version import __version__

_PROBLEMS: Final = {
    400: "The body, or an image in it, cannot be read.",
    401: "The token is missing or wrong.",
    404: "Nothing is there.",
    405: "Another method is needed.",
    408: "The body did not arrive in time.",
    413: "The body, a picture, or the number of images is too large.",
    415: "The body, or an image in it, is of a type that is not taken.",
    422: "A parameter or the body is not what is expected.",
    429: "The server is busy; Retry-After says when to come back.",
    500: "The network failed.",
    503: "The server is starting or stopping; Retry-After says when to come back.",
    504: "No answer within the deadline.",
}
_PREDICT_PROBLEMS: Final = (400, 408, 413, 415, 422, 429, 500, 503, 504)
_NUMBER: Final = {"type": "number"}
_WHOLE: Final = {"type": "integer", "minimum": 0}
_TEXT: Final = {"type": "string"}
_MAYBE_NUMBER: Final = {"type": ["number", "null"]}
_MAYBE_TEXT: Final = {"type": ["string", "null"]}


def document(service: Service) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a service."""
    secured = service.options.token is not None
    paths = {
        "/v1/predict": {"post": _predict(service)},
        "/v1/models": {
            "get": {
                "operationId": "models",
                "summary": "What is served: routes, costs, budgets, limits.",
                "responses": {"200": _json("The models.", "Models")},
            }
        },
        "/healthz": {"get": _state("healthz", "Whether the process lives.", (200,))},
        "/readyz": {"get": _state("readyz", "Whether predictions are taken.", (200, 503))},
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Counters for Prometheus.",
                "responses": {
                    "200": {
                        "description": "In Prometheus' text format.",
                        "content": {"text/plain": {"schema": _TEXT}},
                    }
                },
            }
        },
    }
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "dynaslim",
            "version": __version__,
            "description": f"Predictions by {service.name}, every image along the route that its "
            f"gates choose.",
        },
        "paths": paths,
        "components": {"schemas": _schemas(service)},
    }
    if secured:
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path in ("/v1/predict", "/v1/models", "/metrics"):
            for operation in paths[path].values():
                operation["security"] = [{"token": []}]
                operation["responses"]["401"] = _problem(401)
    return made


def _predict(service: Service) -> dict[str, Any]:
    options = service.options
    return {
        "operationId": "predict",
        "summary": "Classify images.",
        "description": "Results stand in the order of the images. An image is decoded by what it "
        "holds; its name and type do not matter.",
        "parameters": [
            _parameter("budget", _TEXT, f"What an image may cost on average: {FORMS}."),
            _parameter(
                "top_k",
                {"type": "integer", "minimum": 1, "default": TOP_K},
                "Likeliest classes to name; of more than there are all are named.",
            ),
            _parameter(
                "escalate",
                {
                    "anyOf": [
                        {"type": "string", "enum": ["auto", "never"]},
                        {"type": "number", "minimum": 0, "maximum": 1},
                    ],
                    "default": "auto",
                },
                "Whether unsure images escalate to a wider route: auto as the budget "
                "says, which may show the mirror image too, never, or below this margin between "
                "the two likeliest classes.",
            ),
            _parameter(
                "deadline_ms",
                {
                    "type": "number",
                    "minimum": LEAST_DEADLINE_MS,
                    "maximum": options.deadline_ms,
                    "default": options.deadline_ms,
                },
                "Milliseconds from the request's head within which an answer is of use.",
            ),
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _ref("Form")},
                "application/json": {"schema": _ref("Images")},
            },
        },
        "responses": {
            "200": _json("What the network says.", "Prediction"),
            **{str(status): _problem(status) for status in _PREDICT_PROBLEMS},
        },
    }


def _parameter(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _state(name: str, summary: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    texts = {200: "Yes.", 503: "Not yet, or not any more."}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {str(status): _json(texts[status], "State") for status in statuses},
    }


def _problem(status: int) -> dict[str, Any]:
    made = _json(_PROBLEMS[status], "Problem")
    if status in (429, 503):
        made["headers"] = {
            "Retry-After": {
                "required": True,
                "schema": {"type": "integer", "minimum": 1},
                "description": "Seconds.",
            }
        }
    return made


def _json(text: str, schema: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ref(schema)}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _schemas(service: Service) -> dict[str, Any]:
    most = service.options.max_images
    count = {"minItems": 1, "maxItems": most}
    route = {"route": _TEXT, "widths": _list(_WHOLE), "choices": _list(_WHOLE), "madds": _NUMBER}
    return {
        "Form": _object({FIELD: {**_list({"type": "string", "format": "binary"}), **count}}),
        "Images": _object({FIELD: {**_list(_ref("Image")), **count}}),
        "Image": _object(
            {
                "name": _MAYBE_TEXT,
                "data": {"type": "string", "format": "byte", "contentEncoding": "base64"},
            },
            optional=("name",),
        ),
        "Prediction": _object(
            {
                "model": _TEXT,
                "budget": _MAYBE_TEXT,
                "budget_used": _MAYBE_TEXT,
                "results": _list(_ref("Result")),
                "timing_ms": _object(
                    dict.fromkeys(("decode", "queue", "engine", "total"), _NUMBER)
                ),
                "batch_size": _WHOLE,
                "cost_ratio": _MAYBE_NUMBER,
                "unlike_curve": {"type": "boolean"},
            }
        ),
        "Result": _object(
            {
                "name": _MAYBE_TEXT,
                "top": _list(
                    _object(
                        {
                            "index": _WHOLE,
                            "class": _MAYBE_TEXT,
                            "probability": {"type": "number", "minimum": 0, "maximum": 1},
                        }
                    )
                ),
                **route,
                "escalated": {"type": "boolean"},
                "mirrored": {"type": "boolean"},
                "madds_share": _NUMBER,
                "ms": _MAYBE_NUMBER,
                "ms_share": _MAYBE_NUMBER,
            }
        ),
        "Models": _object({"models": _list(_ref("Model"))}),
        "Model": _model(route),
        "State": _object({"status": _TEXT}),
        "Problem": _object(
            {"error": _object({"code": _TEXT, "message": _TEXT, "image": _WHOLE}, ("image",))}
        ),
    }


def _model(route: dict[str, Any]) -> dict[str, Any]:
    points = _object(
        {"budget": _NUMBER, "madds_share": _NUMBER, "ms": _MAYBE_NUMBER, "top1": _MAYBE_NUMBER}
    )
    budget = _object({"low": _NUMBER, "high": _NUMBER, "unit": _TEXT, "points": _list(points)})
    return _object(
        {
            "name": _TEXT,
            "backend": _MAYBE_TEXT,
            "classes": {"anyOf": [_list(_TEXT), {"type": "null"}]},
            "num_classes": _WHOLE,
            "image_size_px": _WHOLE,
            "in_channels": _WHOLE,
            "stages": _list(
                _object(
                    {
                        "name": _TEXT,
                        "widths": _list(_WHOLE),
                        "gated": {"type": "boolean"},
                        "blocks": _WHOLE,
                        "largest": _WHOLE,
                    }
                )
            ),
            "routes": _list(_object({**route, "ms": _MAYBE_NUMBER})),
            "widest": _object({"madds": _NUMBER, "ms": _MAYBE_NUMBER}),
            "steady": {"type": "boolean"},
            "budget": {"anyOf": [budget, {"type": "null"}]},
            "limits": _object(
                {"images": _WHOLE, "body_bytes": _WHOLE, "pixels": _WHOLE, "deadline_ms": _NUMBER}
            ),
            "samples": _list(_object({"name": _TEXT, "url": _TEXT})),
        }
    )
