"""The web page, its files, the samples, and a page that describes the interface."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Final

from dynaslim.serve.problems import Headers, Problem, Receive, Send, send_bytes, send_problem
from dynaslim.serve.samples import Sample

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
"""Files with other endings are not served."""
PAGE_HEADERS: Final[Headers] = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
        b"img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; "
        b"manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class File:
    """Something that does not change while the server runs: an ASGI endpoint for GET and HEAD."""

    def __init__(self, content: bytes, kind: str, *, max_age_s: int = 0) -> None:
        digest = hashlib.sha256(content).hexdigest()[:32]
        self._content = content
        self._etag = f'"{digest}"'.encode()
        # its name stays where the content changes with a new version: ask each time, by the ETag
        cache = f"max-age={max_age_s}" if max_age_s else "no-cache"
        self._headers = [
            (b"cache-control", cache.encode()),
            (b"etag", self._etag),
            *PAGE_HEADERS,
        ]
        self._type = kind.encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer with the content, or that the client has it."""
        for name, value in scope["headers"]:
            if name == b"if-none-match" and self._known(value):
                await send({"type": "http.response.start", "status": 304, "headers": self._headers})
                await send({"type": "http.response.body", "body": b""})
                return
        headers = [(b"content-type", self._type), *self._headers]
        await send_bytes(send, 200, self._content, headers)

    def _known(self, tags: bytes) -> bool:
        listed = [tag.strip().removeprefix(b"W/") for tag in tags.split(b",")]
        return self._etag in listed or listed == [b"*"]


class Missing:
    """Where no file is."""

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Say so."""
        await send_problem(send, not_found(scope["path"]))


def not_found(path: str) -> Problem:
    """There is nothing at a path."""
    return Problem(404, "not_found", f"nothing at {path[:200]}; see /docs")


def web_files() -> dict[str, File]:
    """The files of the page by their path below /static/."""
    found: dict[str, File] = {}
    root = resources.files("dynaslim.serve") / "web"
    if root.is_dir():
        _collect(root, "", found)
    return found


def _collect(folder: Traversable, prefix: str, found: dict[str, File]) -> None:
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            _collect(entry, f"{name}/", found)
        elif (kind := TYPES.get(f".{entry.name.rpartition('.')[2]}")) is not None:
            found[name] = File(entry.read_bytes(), kind)


def sample_file(sample: Sample) -> File:
    """A sample; it may be kept for an hour."""
    return File(sample.content, sample.type, max_age_s=3600)


# -- a description for people ---------------------------------------------------------------------


def describe(document: Mapping[str, Any]) -> File:
    """The OpenAPI document as one plain page: nothing is fetched from elsewhere."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{_e(document['info']['title'])}: interface</title></head><body>",
        f"<h1>{_e(document['info']['title'])}: interface</h1>",
        f"<p>{_e(document['info'].get('description', ''))}</p>",
        "<p>The same for programs: <a href='openapi.json'>openapi.json</a></p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(method, path, operation)
    parts.append("<h2>What bodies look like</h2>")
    for name, schema in document["components"]["schemas"].items():
        text = json.dumps(schema, indent=2)
        parts.append(f"<h3 id='{_e(name)}'>{_e(name)}</h3><pre>{_e(text)}</pre>")
    return File("\n".join([*parts, "</body></html>"]).encode(), TYPES[".html"])


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> list[str]:
    parts = [
        f"<h2><code>{_e(method.upper())} {_e(path)}</code></h2>",
        f"<p>{_e(operation.get('summary', ''))}</p>",
        f"<p>{_e(operation.get('description', ''))}</p>",
    ]
    if operation.get("parameters"):
        parts.append("<dl>")
        for parameter in operation["parameters"]:
            parts.append(f"<dt><code>{_e(parameter['name'])}</code></dt>")
            parts.append(f"<dd>{_e(parameter.get('description', ''))}</dd>")
        parts.append("</dl>")
    if "requestBody" in operation:
        parts.append(f"<p>Body: {_kinds(operation['requestBody']['content'])}</p>")
    parts.append("<dl>")
    for status, answer in operation["responses"].items():
        kinds = _kinds(answer.get("content", {}))
        parts.append(f"<dt>{_e(status)}</dt><dd>{_e(answer['description'])} {kinds}</dd>")
    parts.append("</dl>")
    return parts


def _kinds(content: Mapping[str, Any]) -> str:
    shown = []
    for kind, media in content.items():
        name = media.get("schema", {}).get("$ref", "").rpartition("/")[2]
        link = f": <a href='#{_e(name)}'>{_e(name)}</a>" if name else ""
        shown.append(f"<code>{_e(kind)}</code>{link}")
    return ", ".join(shown)


def _e(text: str) -> str:
    return html.escape(str(text))
