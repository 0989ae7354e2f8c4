"""What a server can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dynaslim.errors import check
from dynaslim.runtime.budget import parse_budget

MEGABYTE: Final = 1_000_000
MOST_PIXELS: Final = 178_956_970
"""What Pillow opens at most."""


@dataclass(frozen=True)
class ServeOptions:
    """Limits and behaviour of a server; every field has a value that is good to start with."""

    name: str | None = None
    """What the model is called in answers; by default as its network is."""
    max_batch: int = 32
    """Most images that the network runs at once."""
    max_batch_ms: float = 100.0
    """A batch is made so small that it takes no longer by the speed of late, but at least of four
    images: larger ones let others wait and are hardly faster."""
    max_wait_ms: float = 3.0
    """How long an image waits for others that are being decoded; with none on the way it does not
    wait."""
    queue: int = 256
    """Images that may wait, decoding included; a request that finds no room is refused (429)."""
    deadline_ms: float = 2000.0
    """Time that a request has, and the most that it may ask for; later it is answered 504."""
    max_body_mb: float = 20.0
    """Largest body of a request, in millions of bytes."""
    max_buffer_mb: float = 256.0
    """Bodies of all requests together, in millions of bytes."""
    max_pixels: int = 50_000_000
    """Width times height of the largest picture that is decoded; all that are decoded at a time
    take at most seven bytes for each."""
    max_images: int = 32
    """Images of one request."""
    decoders: int | None = None
    """Threads that decode pictures, by default one for each core, and as many processes, at most
    four, for large ones."""
    budget: str | None = None
    """Budget of requests that name none; by default as trained."""
    hold: bool = False
    """Keep the mean cost of the images of every budget under it, whatever they are."""
    adaptive_budget: str | None = None
    """LOW or LOW:HIGH, shares of the widest route's cost: how far the budget may fall under load,
    and where it stands without."""
    adaptive_wait_ms: float = 100.0
    """Wait in the queue that an adaptive budget keeps below."""
    token: str | None = field(default=None, repr=False)
    """What clients must send as `Authorization: Bearer TOKEN`."""
    samples: Path | None = None
    """Folder of pictures that the page offers to try."""
    access_log: bool = False
    """Write a line of JSON to standard error for every prediction."""

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
        check(self.token != "", "--token: is empty; give a secret, or leave it out")
        check(
            self.token is None or self.token.isascii(),
            "--token: may have ASCII characters only, as HTTP headers do",
        )
        if self.budget is not None:
            parse_budget(self.budget)
        if self.adaptive_budget is not None:
            self.adaptive_range()

    @property
    def body_bytes(self) -> int:
        """Largest body of a request."""
        return round(self.max_body_mb * MEGABYTE)

    def adaptive_range(self) -> tuple[float, float]:
        """Lowest and highest share of `adaptive_budget`.

        Raises:
            UsageError: if it is not LOW or LOW:HIGH, or does not fit `budget`.
        """
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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
