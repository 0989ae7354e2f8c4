"""The fields of the HTTP interface: parameters, bodies, answers and errors, each declared once.

FastAPI builds the OpenAPI document from these types. Parameters and bodies are pydantic models, so
that they are validated. Answers are typed dicts: mypy checks the code that builds them, and they
cost nothing at run time.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Final, Literal, NotRequired, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    with_config,
)
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

from dynaslim.runtime.budget import FORMS

_CLOSED: Final = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_NUMBER: Final = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"

# -- parameters -----------------------------------------------------------------------------------


def _text(pattern: str, expected: str) -> WrapValidator:
    """A validator that accepts only text matching `pattern`; all errors have the same message."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            if re.fullmatch(pattern, str(value)):  # JSON may have a number instead of text
                return handler(value)
        except ValidationError:
            pass
        raise ValueError(f"{info.field_name} {value!r:.60}: {expected}")

    return WrapValidator(validate)


_Milliseconds = Annotated[
    float,
    Field(ge=1, allow_inf_nan=False),
    _text(_NUMBER, "must be a number of at least 1"),
]


class PredictParameters(BaseModel):
    """The query parameters of a prediction."""

    model_config = _CLOSED

    budget: str | SkipJsonSchema[None] = Field(
        None, description=f"What an image may cost on average: {FORMS}."
    )
    top_k: Annotated[
        int,
        Field(ge=1),
        _text(r"[0-9]{1,1000}", "must be a whole number of at least 1"),
    ] = 5
    """Number of likeliest classes to return; all classes if there are fewer."""
    escalate: Annotated[
        Literal["auto", "never"] | Annotated[float, Field(ge=0, le=1)],
        _text(f"auto|never|{_NUMBER}", "give auto, never, or a margin from 0 to 1"),
    ] = "auto"
    """Whether unsure images escalate to a wider route: `auto` as the budget prescribes, which may
    also run the mirror image; `never`; or a number: if the margin between the two likeliest classes
    is below it."""
    deadline_ms: _Milliseconds
    """Milliseconds after the arrival of the request's head when an answer is no longer useful."""


class QueryParameters(PredictParameters):
    """The query parameters of `/v1/predict`."""

    model: str | SkipJsonSchema[None] = None
    """Name of the model. Default: the server's first model."""


P = TypeVar("P", bound=PredictParameters)


def limited_parameters(parameters: type[P], max_deadline_ms: float) -> type[P]:
    """`parameters` with the server's deadline as the default and maximum of `deadline_ms`."""

    def check(value: float) -> float:
        if value > max_deadline_ms:
            raise ValueError(f"deadline_ms {value:g}: at most {max_deadline_ms:g} here")
        return value

    class Limited(parameters):  # type: ignore[misc, valid-type]
        deadline_ms: Annotated[_Milliseconds, AfterValidator(check)] = Field(
            max_deadline_ms,
            json_schema_extra={"maximum": max_deadline_ms},
            description=PredictParameters.model_fields["deadline_ms"].description,
        )

    return Limited


@cache
def query_parameters(max_deadline_ms: float) -> type[QueryParameters]:
    """`QueryParameters` for a server with this longest deadline."""
    return limited_parameters(QueryParameters, max_deadline_ms)


# -- bodies ---------------------------------------------------------------------------------------

FIELD: Final = "images"
"""Name of the only field of a body."""


class Upload(BaseModel):
    """An image of a request."""

    model_config = _CLOSED

    name: InstanceOf[str] | None = None
    """Any string, even invalid Unicode; it is returned with the result."""
    data: Annotated[
        bytes, WithJsonSchema({"type": "string", "format": "byte", "contentEncoding": "base64"})
    ]
    """The file, base64-encoded."""


class JSONBody(BaseModel):
    """A body of type application/json, before a server's limits are applied."""

    model_config = _CLOSED

    images: list[Any]


def limited_bodies(max_images: int) -> tuple[type[BaseModel], type[BaseModel]]:
    """The types of a server's JSON and form bodies, for the OpenAPI document."""
    count = Field(min_length=1, max_length=max_images)

    class Images(JSONBody):
        images: Annotated[list[Upload], count]

    class Form(BaseModel):
        model_config = _CLOSED

        images: Annotated[list[bytes], count]

    return Images, Form


# -- the Open Inference Protocol (KServe v2), with Triton's extensions ----------------------------

InputName = Literal["image", "pixels", "x"]
Datatype = Literal["BYTES", "UINT8", "FP32"]
OutputName = Literal["logits", "label", "confidence", "route", "choices", "madds", "escalated"]
_STRICT: Final = ConfigDict(extra="forbid", use_attribute_docstrings=True, strict=True)


class InferParameters(PredictParameters):
    """The parameters of a request: those of a prediction, and two that Triton defines."""

    model_config = _STRICT

    budget: (
        Annotated[
            str,
            BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value),
            WithJsonSchema({"type": ["string", "number"]}),
        ]
        | SkipJsonSchema[None]
    ) = Field(None, description=PredictParameters.model_fields["budget"].description)
    timeout: Annotated[int, Field(ge=0)] = 0
    """The deadline in microseconds, as Triton names it; 0 uses the server's."""
    binary_data_output: bool = False
    """Whether outputs without `binary_data` are binary."""


class InputParameters(BaseModel):
    model_config = _STRICT

    binary_data_size: Annotated[int, Field(ge=0)] | SkipJsonSchema[None] = None
    """Number of bytes of the tensor, which follows the JSON."""
    content_type: Literal["base64"] = "base64"
    """Encoding of images in JSON."""


class InferInput(BaseModel):
    """An input: `image` BYTES [n], encoded image files; `pixels` UINT8 [n, c, s, s], cropped and
    resized; or `x` FP32 [n, c, s, s], normalised as well.
    """

    model_config = _STRICT

    name: InputName
    datatype: Datatype
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=4)]
    parameters: InputParameters = InputParameters()
    data: list[Any] | SkipJsonSchema[None] = None
    """Numbers in row-major order, nested or flat; or images in base64."""


class OutputParameters(BaseModel):
    model_config = _STRICT

    binary_data: bool | SkipJsonSchema[None] = None
    """Whether the tensor follows the JSON in binary form."""
    classification: Annotated[int, Field(ge=1)] | SkipJsonSchema[None] = None
    """For `logits` only: return this many of the largest, as text LOGIT:INDEX:CLASS."""


class InferOutput(BaseModel):
    model_config = _STRICT

    name: OutputName
    parameters: OutputParameters = OutputParameters()


class InferRequest(BaseModel):
    """A request; without `outputs`, all outputs are returned."""

    model_config = _STRICT

    id: str | SkipJsonSchema[None] = None
    model_name: str | SkipJsonSchema[None] = None
    """Ignored, since the path names the model; not in the protocol, but sent by KServe's client."""
    parameters: InferParameters = Field(default_factory=dict, validate_default=True)
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[InferOutput], Field(max_length=16)] = []


@cache
def infer_request(max_deadline_ms: float) -> type[InferRequest]:
    """`InferRequest` with the server's deadline as the default and maximum of `deadline_ms`."""
    limited = limited_parameters(InferParameters, max_deadline_ms)

    class Limited(InferRequest):
        parameters: limited = Field(default_factory=dict, validate_default=True)  # type: ignore[valid-type]

    return Limited


# -- the model repository extension of the protocol -----------------------------------------------


class IndexRequest(BaseModel):
    model_config = _STRICT

    ready: bool = False
    """Whether to list only models that are ready."""


class ChangeRequest(BaseModel):
    """A load or unload; a model's configuration and files always come from the model folder."""

    model_config = _STRICT

    parameters: dict[Literal["unload_dependents"], bool] = {}
    """Has no effect, as no model depends on another."""


# -- answers --------------------------------------------------------------------------------------

_Count = Annotated[int, Field(ge=0)]


@with_config(_CLOSED)
class _Answer(TypedDict):
    """Base class of answers; forbids fields that are not declared."""


LikelyClass = TypedDict(  # created by a call, since "class" is a keyword
    "LikelyClass",
    {"index": _Count, "class": str | None, "probability": Annotated[float, Field(ge=0, le=1)]},
)
with_config(_CLOSED)(LikelyClass)


class _Route(_Answer):
    route: str
    widths: list[_Count]
    choices: list[_Count]
    madds: float


class Result(_Route):
    """The answer for one image; `madds` and `ms` count all runs of an escalated image."""

    name: str | None
    top: list[LikelyClass]
    escalated: bool
    mirrored: bool
    madds_share: float
    ms: float | None
    ms_share: float | None


class Timing(_Answer):
    """Milliseconds that the stages of a request took."""

    decode: float
    queue: float
    engine: float
    total: float


class Prediction(_Answer):
    """The answer to a request; results are in the order of its images."""

    model: str
    budget: str | None
    budget_used: str | None
    results: list[Result]
    timing_ms: Timing
    batch_size: _Count
    cost_ratio: float | None
    unlike_curve: bool


class Stage(_Answer):
    name: str
    widths: list[_Count]
    gated: bool
    blocks: _Count
    largest: _Count


class TimedRoute(_Route):
    """A route and the time of one image along it; null if times were not steady."""

    ms: float | None


class Cost(_Answer):
    madds: float
    ms: float | None


class Point(_Answer):
    """A point of the budget curve, and the smallest budget that affords it."""

    budget: float
    madds_share: float
    ms: float | None
    top1: float | None


class BudgetRange(_Answer):
    low: float
    high: float
    unit: str
    points: list[Point]


class Limits(_Answer):
    images: _Count
    body_bytes: _Count
    pixels: _Count
    deadline_ms: float


class SampleLink(_Answer):
    name: str
    url: str


class Model(_Answer):
    name: str
    backend: str | None
    classes: list[str] | None
    num_classes: _Count
    image_size_px: _Count
    in_channels: _Count
    stages: list[Stage]
    routes: list[TimedRoute]
    widest: Cost
    steady: bool
    budget: BudgetRange | None
    limits: Limits
    samples: list[SampleLink]


class Models(_Answer):
    models: list[Model]


class Status(_Answer):
    status: str


class TensorMetadata(_Answer):
    name: str
    datatype: str
    shape: list[int]


class ServerMetadata(_Answer):
    name: str
    version: str
    extensions: list[str]


class ModelMetadata(_Answer):
    """A model; a request must have one of the inputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Live(_Answer):
    live: bool


class Ready(_Answer):
    ready: bool


class ModelReady(_Answer):
    name: str
    ready: bool


class IndexEntry(_Answer):
    """A model that is served, or that can be loaded; `reason` says why it is not ready."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str


class OutputTensor(TensorMetadata):
    """An output; a binary one has the parameter `binary_data_size` instead of data."""

    parameters: NotRequired[dict[str, int]]
    data: NotRequired[list[Any]]


class InferResponse(_Answer):
    """The answer; `parameters` has the requested budget and the one used, if any."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    parameters: NotRequired[dict[str, str | None]]
    outputs: list[OutputTensor]


# -- errors ---------------------------------------------------------------------------------------


class ErrorDetail(_Answer):
    """An error; `image` is the index of the image that caused it, from 0."""

    code: str
    message: str
    image: NotRequired[_Count]


class ErrorBody(_Answer):
    """The body of every error."""

    error: ErrorDetail


class ProtocolError(_Answer):
    """The body of every error of the Open Inference Protocol."""

    error: str


_ERRORS: Final = {
    400: "The body, or an image in it, cannot be read.",
    401: "The token is missing or wrong.",
    403: "The server has no admin token, so models are neither loaded nor unloaded.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body, an image, or the number of images is too large.",
    415: "The body, or an image in it, is of a type that is not accepted.",
    422: "A parameter or the body is not as described.",
    429: "The server is busy; Retry-After is the time to wait.",
    500: "The network failed.",
    503: "The server is starting or stopping; Retry-After is the time to wait.",
    504: "No answer within the deadline.",
}
PREDICT_ERRORS: Final = (400, 408, 413, 415, 422, 429, 500, 503, 504)
RETRY_AFTER: Final[dict[str, Any]] = {
    "Retry-After": {
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
        "description": "Seconds.",
    }
}


def error_responses(*statuses: int, body: type = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """Error responses in the form of FastAPI's `responses` argument."""
    return {
        status: {
            "model": body,
            "description": _ERRORS[status],
            **({"headers": RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status in statuses
    }
