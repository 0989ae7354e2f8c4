"""`dynaslim serve`: runs the application in uvicorn, from binding the port to a graceful stop."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ipaddress
import logging
import os
import signal
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import _imaging

from dynaslim.errors import DynaslimError, UsageError, check
from dynaslim.runtime.libraries import installed, require
from dynaslim.serve.options import ProcessOptions, ServeOptions

if TYPE_CHECKING:
    from dynaslim.serve.service import Service

LIBRARIES: Final = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
LINGER_S: Final = 0.3
"""Least time that the port stays open when the server stops, and time that connections stay open
after that, so that clients get a 503 instead of a connection reset."""
_CLOSE_S: Final = 3
"""Time that the server waits at the end for clients that do not read their answers."""
_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
_KEEP_ALIVE_S: Final = 75
_TICK_S: Final = 0.02
_ATTACH_FILTER: Final = 26
"""`SO_ATTACH_FILTER` of Linux, which Python's `socket` does not have."""


def serve(
    models: Sequence[str | Path],
    options: ServeOptions,
    process: ProcessOptions,
    *,
    report: Callable[[str], None] = print,
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    After the signal, accepted requests are answered; the exit code is 0 if this took at most
    `drain_s` seconds, else 1. A second signal ends the process at once with 128 plus its number.

    Raises:
        UsageError: for an invalid host or port, or a missing library; as `create_app`.
        DynaslimError: if the port is in use, or a model does not start.
    """
    check_libraries()
    uvicorn = require("uvicorn")
    from dynaslim.serve.app import create_app

    started = time.perf_counter()
    listener = bind(process.host, process.port)
    try:
        url = _url(listener)
        if options.token is None and not _is_loopback(listener):
            sys.stderr.write(
                f"dynaslim: warning: whoever reaches {url} can use it; set DYNASLIM_TOKEN\n"
            )
        _quiet()
        app = create_app(
            models,
            options,
            backend=process.backend,
            workers=process.workers,
            cache_dir=None if process.no_cache else "auto",
        )
        service: Service = app.state.service
        for model in service.models.values():
            curve = model.engine.curve
            if curve is not None and options.budget is not None and not options.hold:
                note = curve.out_of_reach(options.budget)
                if note is not None:
                    sys.stderr.write(f"dynaslim: {note}\n")
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_S,
        )

        def ready() -> None:
            seconds = time.perf_counter() - started
            served = service.models.values()
            steady = all(model.info.steady for model in served)
            doubt = "" if steady else "; no times, the machine was too busy"
            names = ", ".join(f"{model.name} by {model.backend}" for model in served)
            report(f"{names} at {url} (ready after {seconds:.1f} s{doubt})")

        # asyncio restores the default handlers, not the previous ones
        handlers = {number: signal.getsignal(number) for number in _STOPPING}
        try:
            return asyncio.run(
                _run(uvicorn.Server(config), service, listener, process.drain_s, ready)
            )
        finally:
            for number, handler in handlers.items():
                if handler is not None:  # None: was not set from Python
                    signal.signal(number, handler)
    finally:
        listener.close()


def check_libraries() -> None:
    """Raise `UsageError` if libraries are missing; the message has the command to install them."""
    missing = [library for library in LIBRARIES if not installed(library)]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} not installed: pip install 'dynaslim[serve]' (or, where a "
            f"package runs without torch: pip install fastapi uvicorn python-multipart "
            f"prometheus-client)"
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address but does not listen yet.

    Raises:
        UsageError: if the host is unknown or the port out of range.
        DynaslimError: if the port is in use or not permitted.
    """
    check(0 <= port <= 65535, f"--port {port}: must be from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror or error}") from None
    family, _, _, _, address = found[0]
    # with an explicit protocol: otherwise asyncio does not set TCP_NODELAY
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        what = "is in use" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
        raise DynaslimError(f"port {port} of {host}: {what}; choose another by --port") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _quiet() -> None:
    """Do not log invalid input of clients: it is answered with errors, which are counted."""
    for name in ("uvicorn.error", "python_multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")
    libtiff = ctypes.CDLL(_imaging.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(libtiff, name):  # libtiff prints errors that Pillow raises anyway
            handler = getattr(libtiff, name)
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)
    require("prometheus_client").disable_created_metrics()  # unused extra series


async def _run(
    server: Any,
    service: Service,
    listener: socket.socket,
    drain_s: float,
    ready: Callable[[], None],
) -> int:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(_TICK_S)
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in _STOPPING:  # instead of uvicorn's handlers
        loop.add_signal_handler(number, on_signal, number)
    while service.state == "starting" and not stop.is_set():
        await asyncio.sleep(_TICK_S)
    compiling = service.state == "starting"
    if service.state == "ready":
        ready()
        await stop.wait()
    elif not stop.is_set():
        stop.set()
    left = await _drain(service, drain_s)
    if left or compiling or service.change is not None:
        # a call that blocks in a library cannot be interrupted
        if left:
            sys.stderr.write(f"dynaslim: requests not answered in {drain_s:g} s: {left}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1 if left else 0)
    await _close_port(server, listener)
    await asyncio.sleep(LINGER_S)
    server.should_exit = True
    await serving
    for model in service.models.values():
        if isinstance(model.error, DynaslimError):
            raise model.error
        if model.error is not None:
            what = f"model {model.name}" if len(service.models) > 1 else "the model"
            raise DynaslimError(f"{what} does not start: {model.error}") from model.error
    return 0


async def _drain(service: Service, drain_s: float) -> int:
    """Answer accepted requests and refuse new ones; returns how many remain unanswered."""
    service.stop()
    start = time.monotonic()
    while True:
        passed = time.monotonic() - start
        if passed >= LINGER_S and (not service.in_flight or passed >= drain_s):
            return service.in_flight
        await asyncio.sleep(_TICK_S)


async def _close_port(server: Any, listener: socket.socket) -> None:
    """Accept the pending connections, which closing the port would reset, then close the port."""
    connections = []
    # a packet filter of one instruction, "keep 0 bytes": Linux drops all further requests for
    # connections, so none can be made after the last that is accepted here; clients try again
    keep_nothing = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    with suppress(OSError):
        if sys.platform == "linux":
            packet_filter = struct.pack("HP", 1, ctypes.addressof(keep_nothing))
            listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, packet_filter)
    with suppress(OSError):
        while True:
            connections.append(listener.accept()[0])
    for one in server.servers:
        one.close()
    config = server.config

    def protocol() -> asyncio.Protocol:
        made: asyncio.Protocol = config.http_protocol_class(
            config=config, server_state=server.server_state, app_state=server.lifespan.state
        )
        return made

    for connection in connections:
        with suppress(OSError):  # closed by the client
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
