"""What a client is told when something is wrong: one shape for all errors."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from typing import Any, Final

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Headers = list[tuple[bytes, bytes]]

JSON_HEADERS: Final[Headers] = [
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
]

_encode: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class Problem(Exception):  # noqa: N818 - it is answered, not an error of ours
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        image: int | None = None,
        retry_after_s: float | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.image = image
        """Which image of the request is at fault, from 0."""
        self._headers = headers or []
        if retry_after_s is not None:
            seconds = str(max(1, math.ceil(retry_after_s)))
            self._headers = [*self._headers, (b"retry-after", seconds.encode())]

    def body(self) -> dict[str, Any]:
        """As JSON values."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.image is not None:
            error["image"] = self.image
        return {"error": error}

    def headers(self) -> Headers:
        """Headers that this problem has besides the usual ones."""
        return self._headers


class ClientGone(Exception):  # noqa: N818 - nobody is there to be told
    """The client hung up."""


def unauthorised() -> Problem:
    """The token is missing or wrong."""
    return Problem(
        401,
        "unauthorised",
        "this server asks for a token: send the header Authorization: Bearer TOKEN",
        headers=[(b"www-authenticate", b"Bearer")],
    )


async def send_json(send: Send, status: int, value: Any, headers: Headers | None = None) -> None:
    """Answer with JSON."""
    await send_bytes(send, status, _encode(value).encode(), [*JSON_HEADERS, *(headers or [])])


async def send_bytes(
    send: Send, status: int, body: bytes, headers: Headers, *, more: bool = False
) -> None:
    """Answer with a body that is there as a whole; with `more` an empty piece has to end it."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def send_problem(
    send: Send, problem: Problem, *, close: bool = False, more: bool = False
) -> None:
    """Answer with an error; with `close` the connection ends, `more` as `send_bytes`."""
    headers = [*JSON_HEADERS, *problem.headers(), *([(b"connection", b"close")] if close else [])]
    await send_bytes(send, problem.status, _encode(problem.body()).encode(), headers, more=more)
