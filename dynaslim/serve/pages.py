"""The web page: its files, its sample images, and the page that documents the HTTP interface."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from PIL import Image
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dynaslim.data.decode import is_image_file
from dynaslim.errors import DataError, check
from dynaslim.serve.decoding import FORMATS

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Media types by file extension; files with other extensions are not served."""
PAGE_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
        "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
MOST_SAMPLES: Final = 24
_SHIPPED: Final = "dynaslim.data.fashion_mnist_mini"


class File(Response):
    """An ASGI endpoint for GET and HEAD with fixed content; answers 304 if the client has it."""

    def __init__(self, content: bytes, media_type: str, *, max_age_s: int = 0) -> None:
        self._etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        # a new version keeps the URL, so clients must revalidate by the ETag
        cache = f"max-age={max_age_s}" if max_age_s else "no-cache"
        headers = {"cache-control": cache, "etag": self._etag, **PAGE_HEADERS}
        super().__init__(content, headers=headers, media_type=media_type)
        self._unchanged = Response(status_code=304, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tags = ",".join(Headers(scope=scope).getlist("if-none-match")).split(",")
        listed = [tag.strip().removeprefix("W/") for tag in tags]
        if self._etag in listed or listed == ["*"]:
            await self._unchanged(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def web_files() -> dict[str, File]:
    """The files of the web page by name."""
    files = {}
    for entry in (resources.files("dynaslim.serve") / "web").iterdir():
        media_type = TYPES.get(Path(entry.name).suffix)
        if media_type is not None:
            files[entry.name] = File(entry.read_bytes(), media_type)
    return files


# -- samples --------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A sample image that the page offers."""

    name: str
    content: bytes
    media_type: str


def find_samples(
    folder: Path | None, model: Path | None, class_names: Sequence[str] | None
) -> list[Sample]:
    """The images of `folder`, else of the model's folder `samples`, else suitable shipped ones.

    Raises:
        UsageError: if `folder` does not exist, or has no images.
        DataError: for a file that is not an image.
    """
    if folder is not None:
        check(folder.is_dir(), f"--samples {folder}: no such folder")
        found = _samples_in(folder)
        check(bool(found), f"--samples {folder}: has no pictures ({', '.join(FORMATS)})")
        return found
    if model is not None and (model / "samples").is_dir():
        return _samples_in(model / "samples")
    return _shipped_samples(class_names)


def _samples_in(folder: Path) -> list[Sample]:
    found: list[Sample] = []
    for path in sorted(filter(is_image_file, folder.iterdir()))[:MOST_SAMPLES]:
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                media_type = Image.MIME.get(image.format or "", "application/octet-stream")
        except Exception as error:  # Pillow's plugins raise many types for damaged files
            raise DataError(f"{path}: not a picture that can be shown ({error})") from None
        found.append(Sample(path.stem, content, media_type))
    return found


def _shipped_samples(class_names: Sequence[str] | None) -> list[Sample]:
    """One Fashion-MNIST image of each class, for networks with exactly these classes."""
    if class_names is None or len(class_names) != 10:
        return []
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError:  # not needed to serve a package
        return []
    with resources.as_file(resources.files(_SHIPPED) / "test.parquet") as path:
        file = parquet.ParquetFile(path)
        metadata = json.loads(file.schema_arrow.metadata[b"huggingface"])
        names: list[str] = metadata["info"]["features"]["label"]["names"]
        if sorted(names) != sorted(class_names):
            return []
        rows = next(file.iter_batches(batch_size=200)).to_pylist()
    by_label: dict[int, bytes] = {}
    for row in rows:
        by_label.setdefault(row["label"], row["image"]["bytes"])
    return [Sample(names[n], by_label[n], "image/png") for n in sorted(by_label)]


# -- the OpenAPI document for people --------------------------------------------------------------


def interface_page(document: Mapping[str, Any]) -> File:
    """Render an OpenAPI document as a single HTML page without external resources."""
    title = escape(document["info"]["title"])
    operations = "\n".join(
        _operation(f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "\n".join(
        f"<h3 id='{escape(name)}'>{escape(name)}</h3>"
        f"<pre>{escape(json.dumps(schema, indent=2))}</pre>"
        for name, schema in document["components"]["schemas"].items()
    )
    page = f"""<!doctype html><html lang='en'><head><meta charset='utf-8'>
<meta name='viewport' content='width=device-width, initial-scale=1'>
<title>{title}: interface</title></head><body>
<h1>{title}: interface</h1>
<p>{escape(document["info"].get("description", ""))}</p>
<p>The same for programs: <a href='openapi.json'>openapi.json</a></p>
{operations}
<h2>What bodies look like</h2>
{schemas}
</body></html>"""
    return File(page.encode(), TYPES[".html"])


def _operation(name: str, operation: Mapping[str, Any]) -> str:
    parameters = "".join(
        f"<dt><code>{escape(one['name'])}</code></dt><dd>{escape(one.get('description', ''))}</dd>"
        for one in operation.get("parameters", ())
    )
    answers = "".join(
        f"<dt>{status}</dt>"
        f"<dd>{escape(answer['description'])} {_media_types(answer.get('content', {}))}</dd>"
        for status, answer in operation["responses"].items()
    )
    body = _media_types(operation.get("requestBody", {}).get("content", {}))
    return f"""<h2><code>{escape(name)}</code></h2>
<p>{escape(operation.get("summary", ""))}</p>
<p>{escape(operation.get("description", ""))}</p>
<dl>{parameters}</dl>
{f"<p>Body: {body}</p>" if body else ""}
<dl>{answers}</dl>"""


def _media_types(content: Mapping[str, Any]) -> str:
    shown = []
    for media_type, media in content.items():
        schema = media.get("schema", {})
        name = escape(schema.get("$ref", "").rpartition("/")[2])
        link = f"<a href='#{name}'>{name}</a>" if name else escape(json.dumps(schema))
        shown.append(f"<code>{escape(media_type)}</code>: {link}")
    return ", ".join(shown)
