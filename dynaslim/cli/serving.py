"""The verb `serve`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from dynaslim.shipped import DEFAULT, names

if TYPE_CHECKING:
    import dynaslim.serve.options


def serve(
    models: tuple[str, ...] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    backend: str = "auto",
    workers: int | None = None,
    options: dynaslim.serve.options.ServeOptions,
    drain_s: float = 30.0,
    no_cache: bool = False,
) -> int:
    """Serve models over HTTP, with a page to try the first.

    Args:
        models: Checkpoint files, folders of exported packages, or names of models that ship.
            NAME=PATH gives one another name. Default: cifar10.
        host: Address to listen on; 0.0.0.0 for all: set a token then.
        port: Port to listen at; 0 takes a free one.
        backend: What runs the networks; auto takes the fastest that is installed.
        workers: Cores that a batch runs on. Default: all.
        options: Limits and behaviour.
        drain_s: Seconds to answer what was accepted when the server is told to stop.
        no_cache: Keep no compiled programs on disk, and read none.
    """
    from dynaslim.cli.output import say
    from dynaslim.errors import check
    from dynaslim.serve.server import serve as run

    check(drain_s >= 0, f"--drain-s {drain_s:g}: must be at least 0")
    check(workers is None or workers >= 1, f"--workers {workers}: must be at least 1")
    if options.token is None:
        options = replace(options, token=os.environ.get("DYNASLIM_TOKEN"))
    if options.admin_token is None:
        options = replace(options, admin_token=os.environ.get("DYNASLIM_ADMIN_TOKEN"))

    def tell(line: str) -> None:
        try:
            say(line)
            sys.stdout.flush()  # the reader of a pipe may wait for this line
        except BrokenPipeError:  # serve even if nobody reads it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return run(
        [f"{model}={model}" if model in names() else model for model in models or [DEFAULT]],
        options,
        host=host,
        port=port,
        backend=backend,
        workers=workers,
        cache_dir=None if no_cache else "auto",
        drain_s=drain_s,
        tell=tell,
    )
