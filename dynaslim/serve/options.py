"""Options of the server and of its process."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dynaslim.errors import check

MEGABYTE: Final = 1_000_000
MOST_PIXELS: Final = 178_956_970
"""Pillow's own limit."""


@dataclass(frozen=True)
class ServeOptions:
    """Limits and behaviour of a server."""

    max_batch: int = 32
    """Most images in a batch."""
    max_batch_ms: float = 100.0
    """Milliseconds that a batch should take at most, at the recent speed; four images are always
    allowed."""
    max_wait_ms: float = 3.0
    """Most milliseconds that a batch waits for images that are being decoded."""
    queue: int = 256
    """Most images that may wait for a model, including those being decoded; further requests are
    refused (429)."""
    deadline_ms: float = 2000.0
    """Default and longest deadline of a request in milliseconds; a late one is answered 504."""
    max_body_mb: float = 20.0
    """Largest body of a request, in millions of bytes."""
    max_buffer_mb: float = 256.0
    """Most memory for the bodies of all requests together, in millions of bytes."""
    max_pixels: int = 50_000_000
    """Largest width times height of an image. All images being decoded share seven bytes of memory
    for each of these pixels."""
    max_images: int = 32
    """Most images in a request."""
    decoders: int | None = None
    """Threads that decode images, and processes for large ones, of which there are at most four.
    Default: the number of cores."""
    budget: str | None = None
    """Budget of requests that specify none, such as 0.6 or 4.5ms. Default: as trained."""
    hold: bool = False
    """Keep the mean cost of all images with a budget below that budget, for any images."""
    adaptive_budget: str | None = None
    """LOW or LOW:HIGH, such as 0.3:0.8: the budgets at high load and without load, as shares of the
    widest route's cost."""
    adaptive_wait_ms: float = 100.0
    """Milliseconds in the queue that an adaptive budget tries to stay below."""
    token: str | None = field(default=None, repr=False)
    """Bearer token that clients must send; it is safer to set DYNASLIM_TOKEN."""
    model_folder: Path | None = None
    """Folder of models that may be loaded while the server runs; needs an admin token."""
    admin_token: str | None = field(default=None, repr=False)
    """Bearer token for loading and unloading models; it is safer to set DYNASLIM_ADMIN_TOKEN.
    Default: models cannot be changed."""
    samples: Path | None = None
    """Folder of sample images that the page offers."""
    name: str | None = None
    """Name of a single model in answers. Default: the name of its network, or of the model that
    ships."""
    access_log: bool = False
    """Write a line of JSON to standard error for every prediction and every change of models."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "queue", "max_pixels", "max_images", "decoders"):
            value = getattr(self, name)
            fine = type(value) is int and value >= 1
            check(
                fine or (value is None and name == "decoders"),
                f"{_flag(name)} {value!r}: must be a whole number of at least 1",
            )
        for name in (
            "max_batch_ms",
            "deadline_ms",
            "max_body_mb",
            "max_buffer_mb",
            "adaptive_wait_ms",
        ):
            value = getattr(self, name)
            check(_finite(value) and value > 0, f"{_flag(name)} {value!r}: must be above 0")
        wait = self.max_wait_ms
        check(_finite(wait) and wait >= 0, f"{_flag('max_wait_ms')} {wait!r}: must be at least 0")
        check(
            self.max_pixels <= MOST_PIXELS,
            f"--max-pixels {self.max_pixels}: at most {MOST_PIXELS}, Pillow's own limit",
        )
        check(
            self.max_images <= self.queue,
            f"--queue {self.queue}: must hold a whole request, which may have --max-images "
            f"{self.max_images}",
        )
        check(
            self.max_body_mb <= self.max_buffer_mb,
            f"--max-buffer-mb {self.max_buffer_mb:g}: must hold a whole body of --max-body-mb "
            f"{self.max_body_mb:g}",
        )
        for name in ("token", "admin_token"):
            token, flag = getattr(self, name), _flag(name)
            check(token != "", f"{flag}: is empty; give a secret, or leave it out")
            check(
                token is None or token.isascii(),
                f"{flag}: may have ASCII characters only, as HTTP headers do",
            )
        check(
            self.admin_token is None or self.admin_token != self.token,
            "--admin-token: is that of the clients, who could then load models; give another",
        )
        check(
            self.model_folder is None or self.model_folder.is_dir(),
            f"--model-folder {self.model_folder}: no such folder",
        )
        from dynaslim.runtime.budget import parse_budget  # needs NumPy, which help must not import

        if self.budget is not None:
            parse_budget(self.budget)
        if self.adaptive_budget is not None:
            self.adaptive_range()

    @property
    def body_bytes(self) -> int:
        """Largest body of a request, in bytes."""
        return round(self.max_body_mb * MEGABYTE)

    def adaptive_range(self) -> tuple[float, float]:
        """The lowest and the highest share of `adaptive_budget`.

        Raises:
            UsageError: if it is not LOW or LOW:HIGH, or does not fit `budget`.
        """
        from dynaslim.runtime.budget import parse_budget

        assert self.adaptive_budget is not None
        low, colon, high = self.adaptive_budget.partition(":")
        right = "give LOW or LOW:HIGH, shares of the widest route's cost, such as 0.3 or 0.3:0.8"
        where = f"--adaptive-budget {self.adaptive_budget}: {right}"
        if not colon:
            high = "1" if self.budget is None else self.budget
            where += "" if self.budget is None else f", below --budget {self.budget}"
        else:
            check(
                self.budget is None,
                f"--adaptive-budget {self.adaptive_budget}: has a HIGH, leave --budget out",
            )
        shares = []
        for text in (low, high):
            kind, share = parse_budget(text)
            check(kind == "share", where)
            shares.append(share)
        check(shares[0] < shares[1], where)
        return shares[0], shares[1]


@dataclass(frozen=True)
class ProcessOptions:
    """Where the server listens, how it runs its models, and how it stops."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses (set a token then)."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    backend: str = "auto"
    """Backend that runs the networks; auto picks the fastest installed one."""
    workers: int | None = None
    """Number of cores that a batch runs on. Default: all."""
    drain_s: float = 30.0
    """Seconds that accepted requests may take to finish after a stop signal."""
    no_cache: bool = False
    """Do not use the on-disk cache of compiled programs."""

    def __post_init__(self) -> None:
        check(self.drain_s >= 0, f"--drain-s {self.drain_s:g}: must be at least 0")
        check(
            self.workers is None or self.workers >= 1,
            f"--workers {self.workers}: must be at least 1",
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
