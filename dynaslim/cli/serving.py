"""The verb `serve`, which serves models over HTTP."""

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
    process: dynaslim.serve.options.ProcessOptions,
    options: dynaslim.serve.options.ServeOptions,
) -> int:
    """Serve models over HTTP, with a web page to try the first one.

    Args:
        models: Checkpoint files, folders of exported packages, or names of models that ship.
            NAME=PATH serves a model under another name. Default: cifar10.
        process: Where the server listens, and how it runs its models.
        options: Limits and behaviour.
    """
    from dynaslim.cli.output import echo
    from dynaslim.serve.server import serve as run

    if options.token is None:
        options = replace(options, token=os.environ.get("DYNASLIM_TOKEN"))
    if options.admin_token is None:
        options = replace(options, admin_token=os.environ.get("DYNASLIM_ADMIN_TOKEN"))

    def report(line: str) -> None:
        try:
            echo(line)
            sys.stdout.flush()  # the reader of a pipe may wait for this line
        except BrokenPipeError:  # serve even if nobody reads it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return run(
        [f"{model}={model}" if model in names() else model for model in models or [DEFAULT]],
        options,
        process,
        report=report,
    )
