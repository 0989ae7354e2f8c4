"""HTTP errors, and request bodies, which are read up to a limit and then parsed."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from dynaslim.errors import DynaslimError
from dynaslim.serve.schemas import FIELD, ErrorBody, JSONBody, ProtocolError, Upload

if TYPE_CHECKING:
    from dynaslim.serve.service import Buffers

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Headers = Sequence[tuple[bytes, bytes]]

MULTIPART: Final = b"multipart/form-data"
_COMMAS: Final = 10_000
"""Most commas in a JSON body beyond two per image: more values could fill the memory."""
_DISCARD_S: Final = 1.0
"""Longest time that the rest of a refused body is read before the answer."""
_LINGER_S: Final = 2.0
"""Longest time that the rest of a refused body is read after the answer."""
_LINGER_BODIES: Final = 8
"""Most bytes read after the answer, as a multiple of the largest accepted body."""
_HOW: Final = (
    f"send multipart/form-data with files in the field {FIELD}, or application/json "
    '{"images": [{"data": BASE64}]}'
)
ANSWER_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
)
JSON_HEADERS: Final = ((b"content-type", b"application/json"), *ANSWER_HEADERS)

_encode: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class HTTPError(Exception):
    """The request is answered with this error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        image: int | None = None,
        retry_after_s: float | None = None,
        headers: Headers = (),
    ) -> None:
        """`image` is the index of the image that caused the error, from 0."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = list(headers)
        self.body: ErrorBody = {"error": {"code": code, "message": message}}
        if image is not None:
            self.body["error"]["image"] = image
        if retry_after_s is not None:
            seconds = str(max(1, math.ceil(retry_after_s)))
            self.headers.append((b"retry-after", seconds.encode()))


def error_body(error: HTTPError, path: str) -> ErrorBody | ProtocolError:
    """The body of an error on a path; the Open Inference Protocol's has only the message."""
    if path != "/v2" and not path.startswith("/v2/"):
        return error.body
    image = error.body["error"].get("image")
    return {"error": str(error) if image is None else f"image {image}: {error}"}


def path_of(scope: Mapping[str, Any]) -> str:
    """A request's path within the application, which may be mounted below another path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def bearer_is(headers: Headers, *tokens: str | None) -> bool:
    """Whether a request has one of the tokens; the comparison's time does not reveal them."""
    scheme, _, rest = dict(headers).get(b"authorization", b"").partition(b" ")
    given = scheme.capitalize() + b" " + rest.strip()
    expected = [f"Bearer {token}".encode() for token in tokens if token is not None]
    return any(hmac.compare_digest(given, one) for one in expected)


def unauthorised(message: str) -> HTTPError:
    """The error for a missing or wrong token."""
    bearer = [(b"www-authenticate", b"Bearer")]
    return HTTPError(401, "unauthorised", message, headers=bearer)


def internal_error(error: BaseException) -> HTTPError:
    """The answer to an internal error; shows the message only of errors of this package."""
    known = isinstance(error, DynaslimError)
    return HTTPError(500, "failed", str(error) if known else "an error of the server; see its log")


async def send_bytes(
    send: Send, status: int, body: bytes, headers: Headers, *, more: bool = False
) -> None:
    """Send a response with its whole body; with `more`, the caller must end the response."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body, "more_body": more})


def encode_json(value: Any) -> bytes:
    """Encode a value as a JSON body."""
    return _encode(value).encode()


# -- reading --------------------------------------------------------------------------------------


class BodyReader:
    """Reads the body of one request; `release` stops counting its bytes in the buffers."""

    def __init__(self, scope: dict[str, Any], limit: int, buffers: Buffers) -> None:
        self._path = path_of(scope)
        self._limit = limit
        self._buffers = buffers
        self._held = 0
        self.complete = False
        """Whether the whole body has been received."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        self.type = headers.get(b"content-type", b"")
        self.encoding = headers.get(b"content-encoding", b"")
        self.json_length = headers.get(b"inference-header-content-length")
        """Length in bytes of the JSON before binary tensors, as the header states it."""
        length = headers.get(b"content-length", b"")
        self._length = int(length) if length.isdigit() else None
        self._expects_continue = b"expect" in headers

    async def read(self, receive: Receive) -> bytes:
        """Read the whole body. Raises `HTTPError` if it is too large, or if all bodies in memory
        together are, and `ClientDisconnect` if it ends early.
        """
        if self._length is not None and self._length > self._limit:
            raise self._too_large()
        chunks: list[bytes] = []
        while not self.complete:
            chunk = await self._receive(receive)
            self._held += len(chunk)
            self._buffers.held += len(chunk)
            if self._held > self._limit:
                chunks.clear()
                raise self._too_large()
            if self._buffers.held > self._buffers.most:
                chunks.clear()
                raise HTTPError(
                    429, "busy", "too many bodies at once; try again later", retry_after_s=1
                )
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _receive(self, receive: Receive) -> bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self.complete = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk

    def release(self) -> None:
        self._buffers.held -= self._held
        self._held = 0

    async def refuse(
        self, error: HTTPError, receive: Receive, send: Send, *, close: bool = False
    ) -> None:
        """Send an error in such a way that a client that is still sending its body receives it.

        The rest of the body is read for a moment and discarded: if the connection were closed
        earlier, it would be reset, and the error could be lost. A short rest is read before the
        error is sent, and the connection is kept open; a long one is read afterwards. Raises
        `ClientDisconnect`.
        """
        self.release()
        if error.status != 408 and (self._length is None or self._length <= 2 * self._limit):
            await self._discard(receive, self._limit, _DISCARD_S)
        headers = [*JSON_HEADERS, *error.headers]
        if close or not self.complete:
            headers.append((b"connection", b"close"))
        body = encode_json(error_body(error, self._path))
        await send_bytes(send, error.status, body, headers, more=not self.complete)
        if not self.complete:
            with suppress(ClientDisconnect):
                await self._discard(receive, _LINGER_BODIES * self._limit, _LINGER_S)
            await send({"type": "http.response.body"})

    async def _discard(self, receive: Receive, most: int, seconds: float) -> None:
        if self._expects_continue:  # the client has not sent the body, and never will
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.complete and most > 0:
                    most -= len(await self._receive(receive))

    def _too_large(self) -> HTTPError:
        return HTTPError(413, "body_too_large", f"the body has more than {self._limit} bytes")


# -- parsing --------------------------------------------------------------------------------------


def form_boundary(content_type: bytes) -> bytes:
    """The boundary of a multipart body, or b"" for JSON; raises `HTTPError` for other types."""
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(content_type)
    if kind == MULTIPART:
        boundary: bytes = options.get(b"boundary", b"")
        if not boundary:
            raise HTTPError(400, "body_unreadable", "multipart/form-data without a boundary")
        return boundary
    if kind == b"application/json":
        return b""
    shown = kind.decode("latin-1") or "none"
    raise HTTPError(415, "content_type", f"content type {shown}: {_HOW}")


def parse_body(body: bytes, boundary: bytes, max_images: int) -> list[Upload]:
    """The images of a body; raises `HTTPError` if it is malformed or has other content."""
    uploads = _parse_form(body, boundary, max_images) if boundary else _parse_json(body, max_images)
    if not uploads:
        raise HTTPError(422, "no_images", f"no images: {_HOW}")
    return uploads


def _too_many_images(max_images: int) -> HTTPError:
    return HTTPError(413, "too_many_images", f"a request may have at most {max_images} images")


def _parse_form(body: bytes, boundary: bytes, max_images: int) -> list[Upload]:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import Field, File, FormParser

    uploads: list[Upload] = []
    ended = False

    def add(part: Field | File) -> None:
        name = (part.field_name or b"").decode("utf-8", "replace")
        if name != FIELD:
            raise HTTPError(422, "unknown_field", f"field {name!r:.60}: files go into {FIELD}")
        if len(uploads) == max_images:
            raise _too_many_images(max_images)
        shown, content = None, b""
        if isinstance(part, File):
            assert isinstance(part.file_object, io.BytesIO), "files are kept in memory"
            content = part.file_object.getvalue()
            shown = (part.file_name or b"").decode("utf-8", "replace")
        elif part.value is not None:
            content = part.value
        uploads.append(Upload(name=shown, data=content))

    def end() -> None:
        nonlocal ended
        ended = True

    try:
        in_memory = {"MAX_MEMORY_FILE_SIZE": math.inf}
        parser = FormParser(MULTIPART.decode(), add, add, end, boundary, config=in_memory)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise HTTPError(400, "body_unreadable", f"not multipart/form-data: {error}") from None
    if not ended:
        raise HTTPError(400, "body_unreadable", "the form ends before its last boundary")
    return uploads


def _parse_json(body: bytes, max_images: int) -> list[Upload]:
    if body.count(b",") > _COMMAS + 2 * max_images:
        raise HTTPError(413, "body_too_large", "the JSON has more values than images can have")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise HTTPError(400, "body_unreadable", f"not JSON: {line}") from None
    try:
        images = JSONBody.model_validate(value).images
    except ValidationError:
        raise HTTPError(
            422, "bad_body", f"expected an object with nothing but a list: {_HOW}"
        ) from None
    if len(images) > max_images:
        raise _too_many_images(max_images)
    return [_json_image(image, number) for number, image in enumerate(images)]


def _json_image(image: Any, number: int) -> Upload:
    if not isinstance(image, dict) or not {"data"} <= image.keys() <= {"data", "name"}:
        message = "an image must be an object with data and perhaps name"
        raise HTTPError(422, "bad_body", message, image=number)
    name, data = image.get("name"), image["data"]
    if not isinstance(data, str) or not isinstance(name, str | None):
        message = "data and name of an image must be strings"
        raise HTTPError(422, "bad_body", message, image=number)
    # base64 broken into lines is common; other characters outside its alphabet are errors
    return Upload(name=name, data=decode_base64("".join(data.split()), number))


def decode_base64(text: str, number: int) -> bytes:
    """Decode an image file in JSON; raises `HTTPError` if it is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        message = f"data is not base64: {' '.join(str(error).split())}"
        raise HTTPError(400, "bad_base64", message, image=number) from None
