"""POST /v1/predict: images as a form or as JSON, answers as JSON."""

from __future__ import annotations

import time
from functools import lru_cache
from urllib.parse import parse_qsl

from pydantic import ValidationError

from dynaslim.predict import Answer
from dynaslim.serve.batcher import WorkItem
from dynaslim.serve.endpoint import Call, Reply, bad_parameter
from dynaslim.serve.http import JSON_HEADERS, encode_json, form_boundary, parse_body
from dynaslim.serve.schemas import (
    Prediction,
    QueryParameters,
    Result,
    Upload,
    query_parameters,
)


class PredictCall(Call):
    """A request to /v1/predict."""

    _uploads: list[Upload]
    _body_read: float

    async def answer(self) -> Reply:
        limited = query_parameters(self._service.options.deadline_ms)
        parameters = parse_parameters(limited, self._scope["query_string"])
        boundary = form_boundary(self._reader.type)
        setting = self._setting(parameters)
        body = await self._read(parameters.deadline_ms)
        self._body_read = time.monotonic()

        def start(item: WorkItem) -> None:
            nonlocal body
            self._service.decoders.submit(self._start, item, body, boundary)
            body = b""  # freed as soon as it is parsed

        item = await self._run(1, parameters, setting, start)
        return Reply(len(self._uploads), encode_json(self._prediction(item)), JSON_HEADERS)

    def _start(self, item: WorkItem, body: bytes, boundary: bytes) -> None:
        """Parse a body, decode its first image, and queue the others for any decoder."""
        service, batcher = self._service, self._model.batcher
        try:
            if item.done:
                return
            self._uploads = parse_body(body, boundary, service.options.max_images)
            others = range(1, len(self._uploads))
            if others:
                batcher.grow(item, len(others))
            for row in others:
                service.decoders.submit(self._decode, item, _content(self._uploads[row]), row)
        except Exception as error:
            batcher.fail(item, error)
            return
        self._decode(item, _content(self._uploads[0]), 0)

    # -- the answer ---------------------------------------------------------------------------

    def _prediction(self, item: WorkItem) -> Prediction:
        spending = self._model.spending
        now = time.monotonic()
        return {
            "model": self._model.name,
            "budget": item.setting.requested,
            "budget_used": item.used,
            "results": [
                self._result(upload.name, answer)
                for upload, answer in zip(self._uploads, item.answers, strict=True)
            ],
            "timing_ms": {
                "decode": _ms(item.decoded - self._body_read),
                "queue": _ms(item.started - item.decoded),
                "engine": _ms(item.finished - item.started),
                "total": _ms(now - self._began),
            },
            "batch_size": item.batch_size,
            "cost_ratio": spending.ratio if spending.images else None,
            "unlike_curve": spending.differs,
        }

    def _result(self, name: str | None, answer: Answer | None) -> Result:
        assert answer is not None, "an item without an error has all its answers"
        info, classes = self._model.info, self._model.engine.class_names
        route = info.route(answer.choices)
        ms = info.ms_of(route, answer.madds, answer.escalated, mirrored=answer.mirrored)
        widest_ms = info.widest.ms
        return {
            "name": name,
            "top": [
                {
                    "index": index,
                    "class": None if classes is None else classes[index],
                    "probability": probability,
                }
                for index, probability in answer.top
            ],
            "route": route.route,
            "widths": route.widths,
            "choices": route.choices,
            "escalated": answer.escalated,
            "mirrored": answer.mirrored,
            "madds": answer.madds,
            "madds_share": answer.madds / info.widest_madds,
            "ms": ms,
            "ms_share": ms / widest_ms if ms and widest_ms else None,
        }


@lru_cache(256)
def model_named(query: bytes) -> str | None:
    """The model named in a URL's query, or None."""
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=100)
    except ValueError:  # the endpoint will refuse it
        return None
    return dict(pairs).get("model")


@lru_cache(256)
def parse_parameters(model: type[QueryParameters], query: bytes) -> QueryParameters:
    """The parameters in a URL's query; raises `HTTPError` if one is unknown or invalid."""
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise bad_parameter("the query has too many parameters") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name not in model.model_fields:
            raise bad_parameter(
                f"parameter {name!r:.60}: there are {', '.join(model.model_fields)}"
            )
        if name in values:
            raise bad_parameter(f"parameter {name}: give it once")
        values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise bad_parameter(str(error.errors()[0]["ctx"]["error"])) from None


def _content(upload: Upload) -> bytes:
    """Remove and return an upload's file, so that its memory is freed before the answer."""
    content, upload.data = upload.data, b""
    return content


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1e3, 3)
