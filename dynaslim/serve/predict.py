"""POST /v1/predict, as an ASGI application.

FastAPI documents it (`app`), but does not parse its requests: a body is read only if the queue has
room, within limits and before the deadline, and the rest of a refused body after the answer.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final
from urllib.parse import parse_qsl

import numpy as np
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from dynaslim.errors import UsageError
from dynaslim.serve.batcher import Answer, DeadlineError, QueueFullError, StoppingError, WorkItem
from dynaslim.serve.decoding import ImageError
from dynaslim.serve.http import (
    BodyReader,
    HTTPError,
    Receive,
    Send,
    form_boundary,
    internal_error,
    parse_body,
    send_json,
)
from dynaslim.serve.schemas import (
    Prediction,
    PredictParameters,
    Result,
    Upload,
    predict_parameters,
)
from dynaslim.serve.service import Service

WATCH_AFTER_S: Final = 0.05
"""Time after which a waiting client is watched for disconnecting; most have their answer before."""
TICK_S: Final = 0.02
RETRY_STARTING_S: Final = 2.0
RETRY_STOPPING_S: Final = 5.0
_CLIENT_GONE: Final = 499
_IMAGE_ERRORS: Final = {"image_unreadable": 400, "too_many_pixels": 413, "image_type": 415}
_log = logging.getLogger("dynaslim.serve")


# -- the event loop -------------------------------------------------------------------------------


class Lag:
    """The delay of the event loop, measured by a timer that runs while there are requests.

    A turn of the loop handles all events that are there, so a new one waits for about one turn.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: float | None = None
        self._requested = False
        self.seconds = 0.0

    def request(self) -> float:
        """The recent delay in seconds; called for every request."""
        self._requested = True
        if self._due is None:
            self._schedule()
        return self.seconds

    def _schedule(self) -> None:
        self._due = self._loop.time() + TICK_S
        self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        assert self._due is not None
        self.seconds = max(0.0, self._loop.time() - self._due)
        if self._requested:
            self._requested = False
            self._schedule()
        else:
            self._due, self.seconds = None, 0.0


def _loop_time(when: float) -> float:
    """A time of `time.monotonic` by the clock of the running loop."""
    return asyncio.get_running_loop().time() + when - time.monotonic()


# -- the endpoint ---------------------------------------------------------------------------------


@dataclass
class _Request:
    """A prediction that is being made."""

    began: float
    body_read: float
    uploads: list[Upload] = field(default_factory=list)


class PredictEndpoint:
    """The endpoint of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        model = predict_parameters(service.options.deadline_ms)
        self._parameters = lru_cache(256)(functools.partial(parse_parameters, model))

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, and count it."""
        service = self._service
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._lag = loop, Lag(loop)
        service.lag_s = self._lag.request()
        began = time.monotonic() - service.lag_s
        reader = BodyReader(scope["headers"], service.options.body_bytes, service.buffers)
        status, images = _CLIENT_GONE, 0
        accepted = service.accepting  # a refused request does not delay the server's stop
        service.in_flight += accepted
        try:
            request, item = await self._predict(scope, receive, reader, began)
            images, status = len(request.uploads), 200
            await send_json(send, 200, self._prediction(request, item))
        except HTTPError as error:
            status = await self._refuse(error, reader, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            _log.exception("a prediction failed")
            status = await self._refuse(internal_error(error), reader, receive, send)
        finally:
            reader.release()
            service.in_flight -= accepted
            service.metrics.request(status, time.monotonic() - began)
            if service.options.access_log:
                _log_access("POST", scope["path"], status, began, images)

    async def _refuse(
        self, error: HTTPError, reader: BodyReader, receive: Receive, send: Send
    ) -> int:
        self._service.metrics.error(error.status, error.code)
        try:
            await reader.refuse(error, receive, send, close=self._service.stopping)
        except ClientDisconnect:
            return _CLIENT_GONE
        return error.status

    async def _predict(
        self, scope: dict[str, Any], receive: Receive, reader: BodyReader, began: float
    ) -> tuple[_Request, WorkItem]:
        service = self._service
        self._check_accepting()
        parameters = self._parameters(scope["query_string"])
        deadline = began + parameters.deadline_ms / 1000
        boundary = form_boundary(reader.type)
        escalate = None if parameters.escalate == "never" else parameters.escalate
        try:
            setting = service.batcher.budgets.setting(parameters.budget, escalate)
        except UsageError as error:
            raise HTTPError(422, "bad_parameter", str(error)) from None
        if time.monotonic() > deadline:  # it passed while the request waited for the loop
            raise _late(parameters)
        top_k = min(parameters.top_k, service.engine.spec.num_classes)
        item: WorkItem | None = None
        try:
            service.batcher.check_room(deadline)  # before the body is read
            body = await _read(reader, receive, deadline)
            request = _Request(began, time.monotonic())
            loop = asyncio.get_running_loop()
            future: asyncio.Future[WorkItem] = loop.create_future()
            deliver = functools.partial(_deliver, loop, future)
            item = service.batcher.admit(
                1, setting, top_k=top_k, deadline=deadline, on_done=deliver
            )
            service.decoders.submit(self._decode, item, request, body, boundary)
            del body
            return request, await _wait(future, receive, deadline)
        except BaseException as error:
            if item is not None:
                service.batcher.cancel(item)
            if isinstance(error, QueueFullError):
                raise HTTPError(
                    429, "busy", str(error), retry_after_s=error.retry_after_s
                ) from None
            if isinstance(error, StoppingError):
                raise _stopping() from None
            if isinstance(error, DeadlineError | TimeoutError):
                raise _late(parameters) from None
            raise

    def _check_accepting(self) -> None:
        service = self._service
        if service.accepting:
            return
        service.start()
        if service.stopping:
            raise _stopping()
        if service.state == "failed":
            raise HTTPError(500, "failed", f"the model does not start: {service.error}")
        raise HTTPError(
            503, "starting", "the server is starting; try again", retry_after_s=RETRY_STARTING_S
        )

    # -- in a decoder's thread ----------------------------------------------------------------

    def _decode(self, item: WorkItem, request: _Request, body: bytes, boundary: bytes) -> None:
        """Parse a body, decode its first image, and queue the others for any decoder."""
        service = self._service
        try:
            if item.done:
                return
            request.uploads = parse_body(body, boundary, service.options.max_images)
            others = range(1, len(request.uploads))
            if others:
                service.batcher.grow(item, len(others))
            for row in others:
                service.decoders.submit(self._decode_image, item, request.uploads[row], row)
        except Exception as error:
            service.batcher.fail(item, error)
            return
        self._decode_image(item, request.uploads[0], 0)

    def _decode_image(self, item: WorkItem, upload: Upload, row: int) -> None:
        service = self._service
        try:
            if item.done:
                return
            content, upload.data = upload.data, b""  # frees it before the answer
            cost = service.decoder.cost(content)
            if not cost.large:
                service.batcher.put(item, row, service.decoder(content))
                return
            service.batcher.postpone(item)
            service.large.put(
                cost, content, lambda: not item.done, functools.partial(self._deliver, item, row)
            )
        except Exception as error:
            self._deliver(item, row, error)

    def _deliver(self, item: WorkItem, row: int, result: np.ndarray | Exception) -> None:
        """Hand in a large image's pixels, or an image's error."""
        if isinstance(result, np.ndarray):
            self._service.batcher.put(item, row, result, postponed=True)
            return
        if isinstance(result, ImageError):
            status = _IMAGE_ERRORS[result.code]
            result = HTTPError(status, result.code, str(result), image=row)
        self._service.batcher.fail(item, result)

    # -- the answer ---------------------------------------------------------------------------

    def _prediction(self, request: _Request, item: WorkItem) -> Prediction:
        service, spending = self._service, self._service.spending
        now = time.monotonic()
        return {
            "model": service.name,
            "budget": item.setting.asked,
            "budget_used": item.used,
            "results": [
                self._result(upload.name, answer)
                for upload, answer in zip(request.uploads, item.answers, strict=True)
            ],
            "timing_ms": {
                "decode": _ms(item.decoded - request.body_read),
                "queue": _ms(item.started - item.decoded),
                "engine": _ms(item.finished - item.started),
                "total": _ms(now - request.began),
            },
            "batch_size": item.batch_size,
            "cost_ratio": spending.ratio if spending.images else None,
            "unlike_curve": spending.differs,
        }

    def _result(self, name: str | None, answer: Answer | None) -> Result:
        assert answer is not None, "an item without an error has all its answers"
        info, classes = self._service.info, self._service.engine.class_names
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
            "route": route.name,
            "widths": route.widths,
            "choices": route.choices,
            "escalated": answer.escalated,
            "mirrored": answer.mirrored,
            "madds": answer.madds,
            "madds_share": answer.madds / info.widest_madds,
            "ms": ms,
            "ms_share": ms / widest_ms if ms and widest_ms else None,
        }


def parse_parameters(model: type[PredictParameters], query: bytes) -> PredictParameters:
    """The parameters of a URL's query.

    Raises:
        HTTPError: 422 for a parameter that is unknown, repeated, or has a wrong value.
    """
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise _bad_parameter("the query has too many parameters") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name not in model.model_fields:
            raise _bad_parameter(
                f"parameter {name!r:.60}: there are {', '.join(model.model_fields)}"
            )
        if name in values:
            raise _bad_parameter(f"parameter {name}: give it once")
        values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _bad_parameter(str(error.errors()[0]["ctx"]["error"])) from None


def _bad_parameter(message: str) -> HTTPError:
    return HTTPError(422, "bad_parameter", message)


def _late(parameters: PredictParameters) -> HTTPError:
    return HTTPError(504, "deadline", f"no answer within {parameters.deadline_ms:g} ms")


def _stopping() -> HTTPError:
    return HTTPError(503, "stopping", "the server is stopping", retry_after_s=RETRY_STOPPING_S)


async def _read(reader: BodyReader, receive: Receive, deadline: float) -> bytes:
    try:
        async with asyncio.timeout_at(_loop_time(deadline)):
            return await reader.read(receive)
    except TimeoutError:
        raise HTTPError(408, "body_late", "the body did not arrive in time") from None


def _deliver(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[WorkItem], item: WorkItem
) -> None:
    """Resolve a future with a finished item, from any thread."""

    def resolve() -> None:
        if future.done():
            return
        if item.error is None:
            future.set_result(item)
        else:
            future.set_exception(item.error)

    with suppress(RuntimeError):  # the loop is closed, and nobody waits
        loop.call_soon_threadsafe(resolve)


async def _wait(future: asyncio.Future[WorkItem], receive: Receive, deadline: float) -> WorkItem:
    """The item when it is done.

    Raises:
        TimeoutError: at the deadline.
        ClientDisconnect: when the client disconnects.
        Exception: the error of the item.
    """
    loop = asyncio.get_running_loop()
    watch: list[asyncio.Task[None]] = []

    def give_up(error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    async def watch_client() -> None:
        # after the body, the only message is that the client disconnected
        if (await receive())["type"] == "http.disconnect":
            give_up(ClientDisconnect())

    late = loop.call_at(_loop_time(deadline), give_up, TimeoutError())
    slow = loop.call_later(WATCH_AFTER_S, lambda: watch.append(loop.create_task(watch_client())))
    try:
        return await future
    finally:
        late.cancel()
        slow.cancel()
        for task in watch:
            task.cancel()


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1e3, 3)


def _log_access(method: str, path: str, status: int, began: float, images: int) -> None:
    """Write a line of JSON to standard error."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": method,
        "path": path,
        "status": status,
        "images": images,
        "ms": round((time.monotonic() - began) * 1e3, 2),
    }
    sys.stderr.write(json.dumps(line) + "\n")
