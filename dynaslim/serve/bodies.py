"""The images in a request's body: read up to a limit, then taken apart."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dynaslim.serve.problems import ClientGone, Problem, Receive, Send, send_problem

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD: Final = "images"
MULTIPART: Final = b"multipart/form-data"
_COMMAS: Final = 10_000
"""In JSON, besides one for each image: more would be a way to fill the memory."""
_DISCARD_S: Final = 1.0
"""How long a body that is refused is read on before it is answered."""
_LINGER_S: Final = 2.0
"""How long behind the answer."""
_LINGER_BODIES: Final = 8
"""How much, beside the most that a body may have."""
_HOW: Final = (
    f"send multipart/form-data with files in the field {FIELD}, or application/json "
    '{"images": [{"data": BASE64}]}'
)


class Upload(NamedTuple):
    """An image as it came."""

    name: str | None
    content: bytes


class Buffers:
    """Bytes of all bodies that are held, and the most that may be."""

    def __init__(self, most: int) -> None:
        self.held = 0
        self.most = most


class BodyReader:
    """Reads one body; give back what it holds by `release`."""

    def __init__(self, headers: list[tuple[bytes, bytes]], limit: int, buffers: Buffers) -> None:
        self._limit = limit
        self._buffers = buffers
        self._held = 0
        self.complete = False
        """Whether all of it has been read, or thrown away."""
        self.type = b""
        self._length: int | None = None
        self._asks_first = False
        for name, value in headers:
            if name == b"content-type":
                self.type = value
            elif name == b"content-length" and value.isdigit():
                self._length = int(value)
            elif name == b"expect":
                self._asks_first = True

    async def read(self, receive: Receive) -> bytes:
        """The body.

        Raises:
            Problem: 413 if it is too large, 429 if all of them are.
            ClientGone: if it does not end.
        """
        if self._length is not None and self._length > self._limit:
            raise self._too_large()
        chunks: list[bytes] = []
        while not self.complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk: bytes = message.get("body", b"")
            self.complete = not message.get("more_body", False)
            self._held += len(chunk)
            self._buffers.held += len(chunk)
            if self._held > self._limit:
                chunks.clear()
                raise self._too_large()
            if self._buffers.held > self._buffers.most:
                chunks.clear()
                raise Problem(
                    429, "busy", "too many bodies at once; try again later", retry_after_s=1
                )
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def release(self) -> None:
        """The body is not held any more."""
        self._buffers.held -= self._held
        self._held = 0

    async def refuse(
        self, problem: Problem, receive: Receive, send: Send, *, close: bool = False
    ) -> None:
        """Answer with an error, in such a way that whoever still sends the body comes to read it.

        What is left of a body is read on without keeping anything, for a moment: a connection that
        is closed before is reset, and the answer may be lost. Little enough is read before the
        answer, and the connection kept; else behind it.

        Raises:
            ClientGone: if nobody is there to be told.
        """
        self.release()
        late = problem.status == 408
        if not late and (self._length is None or self._length <= 2 * self._limit):
            await self._discard(receive, self._limit, _DISCARD_S)
        if self.complete:
            await send_problem(send, problem, close=close)
            return
        await send_problem(send, problem, close=True, more=True)
        with suppress(ClientGone):
            await self._discard(receive, _LINGER_BODIES * self._limit, _LINGER_S)
        await send({"type": "http.response.body"})

    async def _discard(self, receive: Receive, most: int, seconds: float) -> None:
        if self._asks_first:  # it has not been sent, and will not be
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.complete and most > 0:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    most -= len(message.get("body", b""))
                    self.complete = not message.get("more_body", False)

    def _too_large(self) -> Problem:
        return Problem(413, "body_too_large", f"the body has more than {self._limit} bytes")


# -- taking it apart ------------------------------------------------------------------------------


def check_type(content_type: bytes) -> bytes:
    """The boundary of a multipart body, or nothing for JSON.

    Raises:
        Problem: 415 for any other type, 400 for multipart without a boundary.
    """
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(content_type)
    if kind == MULTIPART:
        boundary: bytes = options.get(b"boundary", b"")
        if not boundary:
            raise Problem(400, "body_unreadable", "multipart/form-data without a boundary")
        return boundary
    if kind == b"application/json":
        return b""
    shown = kind.decode("latin-1") or "none"
    raise Problem(415, "content_type", f"content type {shown}: {_HOW}")


def parse(body: bytes, boundary: bytes, max_images: int) -> list[Upload]:
    """The images of a body.

    Raises:
        Problem: 400 if it cannot be read, 413 for too many images, 422 for something else in it.
    """
    uploads = _multipart(body, boundary, max_images) if boundary else _json(body, max_images)
    if not uploads:
        raise Problem(422, "no_images", f"no images: {_HOW}")
    return uploads


def _too_many(max_images: int) -> Problem:
    return Problem(413, "too_many_images", f"a request may have at most {max_images} images")


class _Parts:
    """Collects the parts of a multipart body as its parser meets them."""

    def __init__(self, max_images: int) -> None:
        self.uploads: list[Upload] = []
        self.ended = False
        self._max_images = max_images
        self._data: list[bytes] = []
        self._header = b""
        self._value = b""
        self._disposition = b""

    def callbacks(self) -> MultipartCallbacks:
        """By the parser's names."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._data.append(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._end_all,
        }

    def _begin(self) -> None:
        if len(self.uploads) == self._max_images:
            raise _too_many(self._max_images)
        self._data, self._disposition = [], b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _end(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise Problem(400, "body_unreadable", "a part of the form has no name")
        name = options[b"name"].decode("utf-8", "replace")
        if name != FIELD:
            raise Problem(422, "unknown_field", f"field {name!r:.60}: files go into {FIELD}")
        file = options.get(b"filename")
        shown = None if file is None else file.decode("utf-8", "replace")
        self.uploads.append(Upload(shown, b"".join(self._data)))

    def _end_all(self) -> None:
        self.ended = True


def _multipart(body: bytes, boundary: bytes, max_images: int) -> list[Upload]:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser

    parts = _Parts(max_images)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem(400, "body_unreadable", f"not multipart/form-data: {error}") from None
    if not parts.ended:
        raise Problem(400, "body_unreadable", "the form ends before its last boundary")
    return parts.uploads


def _json(body: bytes, max_images: int) -> list[Upload]:
    if body.count(b",") > _COMMAS + 2 * max_images:
        raise Problem(413, "body_too_large", "the JSON has more values than images can have")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "body_unreadable", f"not JSON: {_line(error)}") from None
    if not isinstance(value, dict) or set(value) != {FIELD} or not isinstance(value[FIELD], list):
        raise Problem(422, "bad_body", f"expected an object with nothing but a list: {_HOW}")
    if len(value[FIELD]) > max_images:
        raise _too_many(max_images)
    return [_image(image, number) for number, image in enumerate(value[FIELD])]


def _image(image: Any, number: int) -> Upload:
    if not isinstance(image, dict) or not {"data"} <= set(image) <= {"data", "name"}:
        raise Problem(
            422, "bad_body", "an image must be an object with data and perhaps name", image=number
        )
    name, data = image.get("name"), image["data"]
    if not isinstance(data, str) or not (name is None or isinstance(name, str)):
        raise Problem(422, "bad_body", "data and name of an image must be strings", image=number)
    try:
        # lines of base64 are usual; anything else that is not of its alphabet is not
        return Upload(name, base64.b64decode("".join(data.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        raise Problem(
            400, "bad_base64", f"data is not base64: {_line(error)}", image=number
        ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
