"""The common part of the prediction routes, which are ASGI applications.

FastAPI documents these routes (`app`) but does not parse their requests. A body is read only if the
queue has room, within limits and before the deadline. The rest of a refused body is read after the
answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np
from starlette.requests import ClientDisconnect

from dynaslim.errors import UsageError
from dynaslim.serve import tracing
from dynaslim.serve.batcher import DeadlineError, QueueFullError, StoppingError, WorkItem
from dynaslim.serve.budgets import Setting
from dynaslim.serve.decoding import DecodingTask, ImageError
from dynaslim.serve.http import (
    BodyReader,
    Headers,
    HTTPError,
    Receive,
    Send,
    internal_error,
    send_bytes,
)
from dynaslim.serve.schemas import PredictParameters
from dynaslim.serve.service import ServedModel, Service

WATCH_AFTER_S: Final = 0.05
"""Time after which the server checks whether a client has left; most are answered by then."""
TICK_S: Final = 0.02
RETRY_STARTING_S: Final = 2.0
RETRY_STOPPING_S: Final = 5.0
_CLIENT_GONE: Final = 499
_IMAGE_ERRORS: Final = {"image_unreadable": 400, "too_many_pixels": 413, "image_type": 415}
_log = logging.getLogger("dynaslim.serve")


# -- the event loop -------------------------------------------------------------------------------


class Lag:
    """Measures the delay of the event loop with a timer that runs while requests arrive.

    One iteration of the loop handles all pending events, so a new event waits for about one
    iteration.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: float | None = None
        self._requested = False
        self.seconds = 0.0

    def request(self) -> float:
        """The recent delay in seconds; to be called for every request."""
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
    """Convert a time of `time.monotonic` to the clock of the running loop."""
    return asyncio.get_running_loop().time() + when - time.monotonic()


# -- requests -------------------------------------------------------------------------------------


class Endpoint:
    """A route that answers prediction requests; each request selects a model by name."""

    def __init__(
        self,
        service: Service,
        kind: type[Call],
        name_of: Callable[[dict[str, Any]], str | None],
    ) -> None:
        """`name_of` returns the model's name from an ASGI scope, or None for the first model."""
        self._service, self._kind, self._name_of = service, kind, name_of
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        service = self._service
        reader = BodyReader(scope, service.options.body_bytes, service.buffers)
        name = self._name_of(scope)
        name = service.first if name is None else name
        model = service.models.get(name)
        if model is None:
            if (first := service.models.get(service.first)) is not None:
                first.metrics.request(404, 0)
            with suppress(ClientDisconnect):
                await reader.refuse(no_such_model(service, name), receive, send)
            return
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._lag = loop, Lag(loop)
        service.lag_s = self._lag.request()
        began = time.monotonic() - service.lag_s
        call = self._kind(model, scope, receive, reader, began)
        status, images = _CLIENT_GONE, 0
        accepted = model.accepting  # a refused request does not delay the server's stop
        service.in_flight += accepted
        try:
            call.check_accepting()
            images, body, headers = await call.answer()
            status = 200
            await send_bytes(send, 200, body, headers)
        except HTTPError as error:
            status = await call.refuse(error, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            _log.exception("a prediction failed")
            status = await call.refuse(internal_error(error), send)
        finally:
            reader.release()
            service.in_flight -= accepted
            model.metrics.request(status, time.monotonic() - began)
            if service.options.access_log:
                log_access(scope["path"], status, began, images)


class Reply(NamedTuple):
    """A successful answer."""

    images: int
    """Number of images, for the access log."""
    body: bytes
    headers: Headers


class Call(ABC):
    """One prediction request."""

    def __init__(
        self,
        model: ServedModel,
        scope: dict[str, Any],
        receive: Receive,
        reader: BodyReader,
        began: float,
    ) -> None:
        """`began` is when the request arrived, by `time.monotonic`."""
        self._model = model
        self._service = model.service
        self._scope = scope
        self._receive = receive
        self._reader = reader
        self._began = began

    @abstractmethod
    async def answer(self) -> Reply:
        """The answer; raises `HTTPError` if the request is refused."""

    async def refuse(self, error: HTTPError, send: Send) -> int:
        """Send and count an error; returns the status."""
        self._model.metrics.error(error.status, error.code)
        try:
            await self._reader.refuse(error, self._receive, send, close=self._service.stopping)
        except ClientDisconnect:
            return _CLIENT_GONE
        return error.status

    def check_accepting(self) -> None:
        """Raise `HTTPError` if the model accepts no predictions."""
        service, model = self._service, self._model
        if model.accepting:
            return
        service.start()
        if service.stopping or model.state == "unloading":
            raise self._stopping()
        if model.state == "failed":
            raise HTTPError(500, "failed", f"the model does not start: {model.error}")
        raise HTTPError(
            503, "starting", "the server is starting; try again", retry_after_s=RETRY_STARTING_S
        )

    def _stopping(self) -> HTTPError:
        if self._service.stopping:
            return stopping("the server is stopping")
        return stopping(f"model {self._model.name} is being unloaded")

    def _unavailable(self, error: QueueFullError | StoppingError) -> HTTPError:
        if isinstance(error, StoppingError):
            return self._stopping()
        return HTTPError(429, "busy", str(error), retry_after_s=error.retry_after_s)

    def _setting(self, parameters: PredictParameters) -> Setting:
        escalate = None if parameters.escalate == "never" else parameters.escalate
        try:
            return self._model.batcher.budgets.parse(parameters.budget, escalate)
        except UsageError as error:
            raise HTTPError(422, "bad_parameter", str(error)) from None

    async def _read(self, deadline_ms: float) -> bytes:
        """Read the body, if the queue has room."""
        deadline = self._deadline(deadline_ms)
        try:
            self._model.batcher.check_room(deadline)
            async with asyncio.timeout_at(_loop_time(deadline)):
                return await self._reader.read(self._receive)
        except TimeoutError:
            raise HTTPError(408, "body_late", "the body did not arrive in time") from None
        except (QueueFullError, StoppingError) as error:
            raise self._unavailable(error) from None

    async def _run(
        self,
        rows: int,
        parameters: PredictParameters,
        setting: Setting,
        start: Callable[[WorkItem], object],
    ) -> WorkItem:
        """Reserve room for rows, let `start` deliver them, and wait for their answers."""
        batcher, deadline = self._model.batcher, self._deadline(parameters.deadline_ms)
        top_k = min(parameters.top_k, self._model.engine.spec.num_classes)
        try:
            item = batcher.admit(rows, setting, top_k=top_k, deadline=deadline)
            try:
                start(item)
                async with asyncio.timeout_at(_loop_time(deadline)):
                    await _wait(item, self._receive)
            finally:
                batcher.cancel(item)  # has no effect once it is answered
        except (QueueFullError, StoppingError) as error:
            raise self._unavailable(error) from None
        except (DeadlineError, TimeoutError):
            raise _late(parameters.deadline_ms) from None
        if self._service.tracer is not None:
            tracing.record(self._service.tracer, self._model.name, item)
        return item

    def _deadline(self, deadline_ms: float) -> float:
        """The deadline; raises `HTTPError` if it has already passed."""
        deadline = self._began + deadline_ms / 1000
        if time.monotonic() > deadline:
            raise _late(deadline_ms)
        return deadline

    # -- in a decoder's thread ----------------------------------------------------------------

    def _decode(self, item: WorkItem, content: bytes, row: int) -> None:
        """Decode an image in this thread or a process, and pass its pixels to the batcher."""
        batcher, decoder = self._model.batcher, self._model.decoder
        try:
            if item.done:
                return
            cost = decoder.cost(content)
            if not cost.large:
                batcher.put(item, row, decoder(content))
                return
            batcher.postpone(item)
            self._service.large.put(
                DecodingTask(
                    cost,
                    content,
                    decoder.preprocessing,
                    wanted=lambda: not item.done,
                    deliver=lambda result: self._hand_in(item, row, result),
                )
            )
        except Exception as error:
            self._hand_in(item, row, error)

    def _hand_in(self, item: WorkItem, row: int, result: np.ndarray | Exception) -> None:
        """Pass a large image's pixels, or any image's error, to the batcher."""
        if isinstance(result, np.ndarray):
            self._model.batcher.put(item, row, result, postponed=True)
            return
        if isinstance(result, ImageError):
            status = _IMAGE_ERRORS[result.code]
            result = HTTPError(status, result.code, str(result), image=row)
        self._model.batcher.fail(item, result)


def no_such_model(service: Service, name: str) -> HTTPError:
    """The error for a name that no model has."""
    known = ", ".join(service.models) or "none"
    return HTTPError(404, "not_found", f"model {name!r:.60}: there is {known}")


def stopping(message: str) -> HTTPError:
    """The error for a request that arrives while the server or its model is stopping."""
    return HTTPError(503, "stopping", message, retry_after_s=RETRY_STOPPING_S)


def bad_parameter(message: str) -> HTTPError:
    """The error for a parameter that is unknown, repeated or invalid."""
    return HTTPError(422, "bad_parameter", message)


def _late(deadline_ms: float) -> HTTPError:
    return HTTPError(504, "deadline", f"no answer within {deadline_ms:g} ms")


async def _wait(item: WorkItem, receive: Receive) -> None:
    """Wait until an item is answered; raises the item's error, or `ClientDisconnect`."""
    answered = asyncio.wrap_future(item.future)
    gone: asyncio.Future[Any] | None = None
    try:
        await asyncio.wait([answered], timeout=WATCH_AFTER_S)
        if not answered.done():
            # after the body, the only message is that the client disconnected
            gone = asyncio.ensure_future(receive())
            await asyncio.wait([answered, gone], return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise ClientDisconnect
        answered.result()
    finally:
        answered.cancel()
        if gone is not None:
            gone.cancel()


def log_access(path: str, status: int, began: float, images: int = 0) -> None:
    """Write an access log line (JSON) to standard error."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": "POST",
        "path": path,
        "status": status,
        "images": images,
        "ms": round((time.monotonic() - began) * 1e3, 2),
    }
    sys.stderr.write(json.dumps(line) + "\n")
