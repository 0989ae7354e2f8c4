"""POST /v1/predict, as a plain ASGI endpoint: a tenth of a millisecond less than by a framework."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dynaslim.data.skipped import CorruptImageError
from dynaslim.errors import UsageError
from dynaslim.serve.bodies import BodyReader, Upload, check_type, parse
from dynaslim.serve.jobs import Answer, DeadlineError, Job, QueueFullError, StoppingError
from dynaslim.serve.large import NoMemoryError
from dynaslim.serve.loops import Lag, Outbox
from dynaslim.serve.pictures import damaged
from dynaslim.serve.problems import (
    ClientGone,
    Problem,
    Receive,
    Send,
    send_json,
)
from dynaslim.serve.queries import Query, parse_query
from dynaslim.serve.service import RETRY_STOPPING_S, Service, failure

WATCH_AFTER_S: Final = 0.05
"""From then on a client that waits is watched for hanging up; most have their answer before."""
_CLIENT_GONE: Final = 499
_log = logging.getLogger("dynaslim.serve")


@dataclass
class _Request:
    """A prediction on its way."""

    began: float
    deadline: float
    query: Query
    uploads: list[Upload]
    read: float = 0.0
    """When the body was there."""


class _Loop:
    """What a prediction needs of the event loop that it runs in."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.outbox = Outbox(loop)
        self.lag = Lag(loop)


class Prediction:
    """The endpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loop: _Loop | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        service = self._service
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop.loop is not loop:
            self._loop = _Loop(loop)
        service.lag_s = self._loop.lag.request()
        began = time.monotonic() - service.lag_s
        reader = BodyReader(scope["headers"], service.options.body_bytes, service.buffers)
        status, images = _CLIENT_GONE, 0
        taken = service.accepting  # what is refused does not keep a server that stops
        service.in_flight += taken
        try:
            request, job = await self._predict(scope, receive, reader, began)
            images, status = len(request.uploads), 200
            await send_json(send, 200, self._show(request, job))
        except Problem as problem:
            status = await self._refuse(problem, reader, receive, send)
        except ClientGone:
            pass
        except Exception as error:
            _log.exception("a prediction failed")
            status = await self._refuse(failure(error), reader, receive, send)
        finally:
            reader.release()
            service.in_flight -= taken
            service.metrics.request(status, time.monotonic() - began)
            if service.options.access_log:
                _say_access("POST", scope["path"], status, began, images)

    async def _refuse(
        self, problem: Problem, reader: BodyReader, receive: Receive, send: Send
    ) -> int:
        if problem.status in (429, 503):
            self._service.metrics.rejected(problem.code)
        if problem.status in (408, 504):
            self._service.metrics.missed()
        try:
            await reader.refuse(problem, receive, send, close=self._service.stopping)
        except ClientGone:
            return _CLIENT_GONE
        return problem.status

    async def _predict(
        self, scope: dict[str, Any], receive: Receive, reader: BodyReader, began: float
    ) -> tuple[_Request, Job]:
        service, options = self._service, self._service.options
        service.check_accepting()
        query = parse_query(scope["query_string"])
        longest = options.deadline_ms
        milliseconds = longest if query.deadline_ms is None else query.deadline_ms
        if milliseconds > longest:
            raise Problem(
                422, "bad_parameter", f"deadline_ms {milliseconds:g}: at most {longest:g} here"
            )
        deadline = began + milliseconds / 1000
        boundary = check_type(reader.type)
        try:
            setting = service.batcher.budgets.setting(query.budget, query.escalate)
        except UsageError as error:
            raise Problem(422, "bad_parameter", str(error)) from None
        if time.monotonic() > deadline:  # it has waited that long to be looked at
            raise _late(milliseconds)
        top_k = min(query.top_k, service.engine.spec.num_classes)
        self._check_room(deadline)
        body = await self._body(reader, receive, deadline)
        request = _Request(began, deadline, query, [], time.monotonic())
        assert self._loop is not None
        loop = self._loop.loop
        future: asyncio.Future[Job] = loop.create_future()
        deliver = functools.partial(self._loop.outbox.put, future)
        try:
            job = service.batcher.admit(1, setting, top_k=top_k, deadline=deadline, on_done=deliver)
        except (QueueFullError, StoppingError) as error:
            raise _refused(error) from None
        service.in_background(functools.partial(self._decode, job, request, body, boundary))
        del body
        try:
            return request, await _answer(loop, future, receive, deadline)
        except BaseException as error:
            service.batcher.cancel(job)
            if isinstance(error, QueueFullError | StoppingError):
                raise _refused(error) from None
            if isinstance(error, DeadlineError | TimeoutError):
                raise _late(milliseconds) from None
            raise

    def _check_room(self, deadline: float) -> None:
        """Refuse before the body is read where it would be refused behind."""
        try:
            self._service.batcher.check_room(deadline)
        except (QueueFullError, StoppingError) as error:
            raise _refused(error) from None

    async def _body(self, reader: BodyReader, receive: Receive, deadline: float) -> bytes:
        try:
            async with asyncio.timeout_at(_loop_time(deadline)):
                return await reader.read(receive)
        except TimeoutError:
            raise Problem(408, "body_late", "the body did not arrive in time") from None

    # -- by a decoder -------------------------------------------------------------------------

    def _decode(self, job: Job, request: _Request, body: bytes, boundary: bytes) -> None:
        """Take a body apart; decode its first image, let any decoder take the others."""
        service = self._service
        try:
            if job.done:
                return
            uploads = parse(body, boundary, service.options.max_images)
            request.uploads = uploads
            if len(uploads) > 1:
                service.batcher.grow(job, len(uploads) - 1)
                for row in range(1, len(uploads)):
                    service.in_background(functools.partial(self._decode_one, job, uploads, row))
        except Exception as error:
            service.batcher.fail(job, error)
            return
        self._decode_one(job, uploads, 0)

    def _decode_one(self, job: Job, uploads: list[Upload], row: int) -> None:
        service = self._service
        try:
            if job.done:
                return
            content = uploads[row].content
            uploads[row] = uploads[row]._replace(content=b"")  # not to be kept for the answer
            need = service.decode.need(content, row)
            if not need.large:
                service.batcher.put(job, row, service.decode(content, row))
                return
            service.batcher.postpone(job)
            service.large.put(
                need, content, lambda: not job.done, functools.partial(self._deliver, job, row)
            )
        except Exception as error:
            service.batcher.fail(job, error)

    def _deliver(self, job: Job, row: int, result: np.ndarray | Exception) -> None:
        """A large picture is decoded."""
        service = self._service
        if isinstance(result, np.ndarray):
            service.batcher.put(job, row, result, postponed=True)
        elif isinstance(result, CorruptImageError):
            service.batcher.fail(job, damaged(result.reason, row))
        elif isinstance(result, NoMemoryError):
            service.batcher.fail(job, service.decode.too_much_memory(row))
        else:
            service.batcher.fail(job, result)

    # -- the answer ---------------------------------------------------------------------------

    def _show(self, request: _Request, job: Job) -> dict[str, Any]:
        service, spending = self._service, self._service.spending
        now = time.monotonic()
        return {
            "model": service.name,
            "budget": job.setting.asked,
            "budget_used": job.used,
            "results": [
                self._result(upload.name, answer)
                for upload, answer in zip(request.uploads, job.answers, strict=True)
            ],
            "timing_ms": {
                "decode": _ms(job.decoded - request.read),
                "queue": _ms(job.started - job.decoded),
                "engine": _ms(job.finished - job.started),
                "total": _ms(now - request.began),
            },
            "batch_size": job.batch_size,
            "cost_ratio": spending.ratio if spending.images else None,
            "unlike_curve": spending.differs,
        }

    def _result(self, name: str | None, answer: Answer | None) -> dict[str, Any]:
        assert answer is not None, "a job that is done has all its answers"
        facts, classes = self._service.facts, self._service.engine.class_names
        route = facts.route(answer.choices)
        ms = facts.ms_of(route, answer.madds, answer.escalated, mirrored=answer.mirrored)
        widest_ms = facts.widest.ms
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
            "madds_share": answer.madds / facts.widest_madds,
            "ms": ms,
            "ms_share": ms / widest_ms if ms and widest_ms else None,
        }


async def _answer(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[Job],
    receive: Receive,
    deadline: float,
) -> Job:
    """The job when it is done.

    Raises:
        TimeoutError: at the deadline.
        ClientGone: when the client hangs up.
        Exception: what the job failed with.
    """
    watch: list[asyncio.Task[None]] = []

    def give_up(error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    def start_watch() -> None:
        watch.append(loop.create_task(_hang_up(receive, give_up)))

    late = loop.call_at(_loop_time(deadline), give_up, TimeoutError())
    slow = loop.call_later(WATCH_AFTER_S, start_watch)
    try:
        return await future
    finally:
        late.cancel()
        slow.cancel()
        for task in watch:
            task.cancel()


async def _hang_up(receive: Receive, tell: Callable[[Exception], None]) -> None:
    # behind the whole body nothing else comes
    if (await receive())["type"] == "http.disconnect":
        tell(ClientGone())


def _loop_time(when: float) -> float:
    """A time of `time.monotonic` by the clock of the running loop."""
    return asyncio.get_running_loop().time() + when - time.monotonic()


def _refused(error: QueueFullError | StoppingError) -> Problem:
    if isinstance(error, QueueFullError):
        return Problem(429, "busy", str(error), retry_after_s=error.retry_after_s)
    return Problem(503, "stopping", "the server is stopping", retry_after_s=RETRY_STOPPING_S)


def _late(milliseconds: float) -> Problem:
    return Problem(504, "deadline", f"no answer within {milliseconds:g} ms")


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1e3, 3)


def _say_access(method: str, path: str, status: int, began: float, images: int) -> None:
    """A prediction as a line of JSON on standard error."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": method,
        "path": path,
        "status": status,
        "images": images,
        "ms": round((time.monotonic() - began) * 1e3, 2),
    }
    sys.stderr.write(json.dumps(line) + "\n")
