"""The model repository extension of the Open Inference Protocol: index, load and unload.

Models are loaded by name from one folder, and names cannot refer to files outside of it. Loading
and unloading require the admin token.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from dynaslim.errors import DynaslimError, UsageError, check
from dynaslim.model_names import find_model, is_package, is_saved_folder, run_checkpoints
from dynaslim.serve.batcher import StoppingError
from dynaslim.serve.endpoint import log_access, stopping
from dynaslim.serve.http import BodyReader, HTTPError, bearer_is, unauthorised
from dynaslim.serve.inference import VERSION, invalid_body
from dynaslim.serve.schemas import ChangeRequest, IndexEntry, IndexRequest
from dynaslim.serve.service import Service

NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""Valid names of models; they contain no path separator and cannot be `..`."""
_SUFFIX: Final = ".safetensors"
_MOST_BODY: Final = 100_000
_STATES: Final[dict[str, Any]] = {"ready": "READY", "failed": "UNAVAILABLE"}
_log = logging.getLogger("dynaslim.serve")
B = TypeVar("B", bound=BaseModel)


def find_in_folder(folder: Path | None, name: str) -> Path:
    """The path of a model: NAME, NAME.safetensors, or the checkpoint in NAME, such as a run's.

    Raises:
        UsageError: if the folder has no such model, or the model has a link that leaves the folder.
    """
    missing = f"model {name!r:.60}: is not in the model folder"
    if folder is None or NAME.fullmatch(name) is None:
        raise UsageError(missing)
    root = folder.resolve()
    path = root / name
    if not (is_package(path) or is_saved_folder(path) or run_checkpoints(path)):
        path = root / f"{name}{_SUFFIX}"
        check(path.is_file(), missing)
    for one in (path, *path.rglob("*")):
        check(
            Path(os.path.realpath(one)).is_relative_to(root),
            f"model {name!r:.60}: has a link that leaves the model folder",
        )
    return find_model(path, ("checkpoint", "package")).path


def _names_in(folder: Path | None) -> set[str]:
    found = set()
    with suppress(OSError):
        for path in [] if folder is None else folder.iterdir():
            with suppress(UsageError, OSError):
                name = path.name.removesuffix(_SUFFIX)
                find_in_folder(folder, name)
                found.add(name)
    return found


async def index(service: Service, request: Request) -> list[IndexEntry]:
    """List the served models and, for holders of the admin token, those that can be loaded."""
    only_ready = (await _body(service, request, IndexRequest)).ready
    models = service.models
    found = [
        (name, _STATES.get(model.state, "LOADING"), str(model.error or ""))
        for name, model in models.items()
    ]
    if bearer_is(request.scope["headers"], service.options.admin_token):
        changing = dict([service.change] if service.change else [])
        others = {*await asyncio.to_thread(_names_in, service.options.model_folder), *changing}
        for name in sorted(others - set(models)):
            reason = "" if name in changing else service.failures.get(name, "not loaded")
            found.append((name, changing.get(name, "UNAVAILABLE"), reason))
    return [
        {"name": name, "version": VERSION, "state": state, "reason": reason}
        for name, state, reason in found
        if state == "READY" or not only_ready
    ]


async def change(service: Service, request: Request, make: Callable[[Service, str], None]) -> None:
    """Load or unload a model with the admin token; `make` is `load` or `Service.unload`."""
    token = service.options.admin_token
    if token is None:
        raise HTTPError(403, "forbidden", "models cannot be changed: there is no admin token")
    if not bearer_is(request.scope["headers"], token):
        raise unauthorised("send the header Authorization: Bearer TOKEN with the admin token")
    began = time.monotonic()
    await _body(service, request, ChangeRequest)
    try:
        await asyncio.to_thread(make, service, request.path_params["name"])
        if service.options.access_log:
            log_access(request.url.path, 200, began)
        await asyncio.to_thread(gc.collect)  # models are in reference cycles and use much memory
    except StoppingError as error:
        raise stopping(str(error)) from None
    except (UsageError, OSError) as error:
        raise HTTPError(404, "not_found", str(error)) from None


def load(service: Service, name: str) -> None:
    """Load a model from the folder; one that is already served is loaded again."""
    path = find_in_folder(service.options.model_folder, name)
    try:
        service.load(name, path)
    except StoppingError:
        raise
    except Exception as error:
        if not isinstance(error, DynaslimError):
            _log.exception("a model cannot be loaded")
        line = " ".join(str(error).split())[:500] or type(error).__name__
        service.failures[name] = line
        raise HTTPError(400, "load", f"model {name}: cannot be loaded: {line}") from None
    service.failures.pop(name, None)


async def _body(service: Service, request: Request, model: type[B]) -> B:
    """Read and validate a request's body, which may be empty."""
    options = service.options
    limit = min(_MOST_BODY, options.body_bytes)
    reader = BodyReader(dict(request.scope), limit, service.buffers)
    try:
        async with asyncio.timeout(options.deadline_ms / 1000):
            body = await reader.read(request.receive)  # type: ignore[arg-type]
        return model.model_validate_json(body or b"{}")
    except TimeoutError:
        raise HTTPError(408, "body_late", "the body did not arrive in time") from None
    except ClientDisconnect:
        raise HTTPError(400, "body_unreadable", "the body is cut off") from None
    except ValidationError as error:
        raise invalid_body(error) from None
    finally:
        reader.release()
