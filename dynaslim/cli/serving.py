"""The verb `serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dynaslim.shipped import DEFAULT, names


def serve(
    model: str = DEFAULT,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    backend: str = "auto",
    workers: int | None = None,
    max_batch: int = 32,
    max_batch_ms: float = 100.0,
    max_wait_ms: float = 3.0,
    queue: int = 256,
    deadline_ms: float = 2000.0,
    max_body_mb: float = 20.0,
    max_buffer_mb: float = 256.0,
    max_pixels: int = 50_000_000,
    max_images: int = 32,
    decoders: int | None = None,
    budget: str | None = None,
    hold: bool = False,
    adaptive_budget: str | None = None,
    adaptive_wait_ms: float = 100.0,
    token: str | None = None,
    samples: Path | None = None,
    name: str | None = None,
    drain_s: float = 30.0,
    access_log: bool = False,
    no_cache: bool = False,
) -> int:
    """Serve a model over HTTP, with a page to try it.

    Args:
        model: A checkpoint file, the folder of an exported package, or the name of a model that
            ships. Default: cifar10.
        host: Address to listen on; 0.0.0.0 for all: set a token then.
        port: Port to listen at; 0 takes a free one.
        backend: What runs the network; auto takes the fastest that is installed.
        workers: Cores that the network runs on. Default: all.
        max_batch: Most images that run at once.
        max_batch_ms: Longest that a batch should take: slower networks get smaller ones.
        max_wait_ms: How long an image waits for others that are being decoded.
        queue: Images that may wait; requests beyond are refused (429).
        deadline_ms: Time that a request has; later it is answered 504.
        max_body_mb: Largest body of a request, in millions of bytes.
        max_buffer_mb: Bodies of all requests together, in millions of bytes.
        max_pixels: Width times height of the largest picture.
        max_images: Images of one request.
        decoders: Threads that decode pictures. Default: one for each core.
        budget: Budget of requests that name none, such as 0.6 or 4.5ms. Default: as trained.
        hold: Keep the mean cost of the images of every budget under it, whatever they are.
        adaptive_budget: LOW or LOW:HIGH, such as 0.3:0.8: how far the budget may fall under load.
        adaptive_wait_ms: Wait in the queue that an adaptive budget keeps below.
        token: What clients must send as a bearer token; better by DYNASLIM_TOKEN.
        samples: Folder of pictures that the page offers to try.
        name: What the model is called in answers. Default: as its network is, or as a
            model that ships is.
        drain_s: Seconds to answer what was accepted when the server is told to stop.
        access_log: Write a line of JSON to standard error for every prediction.
        no_cache: Keep no compiled programs on disk, and read none.
    """
    from dynaslim.cli.output import say
    from dynaslim.errors import check
    from dynaslim.serve.options import ServeOptions
    from dynaslim.serve.server import serve as run

    check(drain_s >= 0, f"--drain-s {drain_s:g}: must be at least 0")
    check(workers is None or workers >= 1, f"--workers {workers}: must be at least 1")
    options = ServeOptions(
        name=model if name is None and model in names() else name,
        max_batch=max_batch,
        max_batch_ms=max_batch_ms,
        max_wait_ms=max_wait_ms,
        queue=queue,
        deadline_ms=deadline_ms,
        max_body_mb=max_body_mb,
        max_buffer_mb=max_buffer_mb,
        max_pixels=max_pixels,
        max_images=max_images,
        decoders=decoders,
        budget=budget,
        hold=hold,
        adaptive_budget=adaptive_budget,
        adaptive_wait_ms=adaptive_wait_ms,
        token=token if token is not None else os.environ.get("DYNASLIM_TOKEN"),
        samples=samples,
        access_log=access_log,
    )

    def tell(line: str) -> None:
        try:
            say(line)
            sys.stdout.flush()  # the reader of a pipe may wait for this line
        except BrokenPipeError:  # serve even if nobody reads it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return run(
        model,
        options,
        host=host,
        port=port,
        backend=backend,
        workers=workers,
        cache_dir=None if no_cache else "auto",
        drain_s=drain_s,
        tell=tell,
    )
