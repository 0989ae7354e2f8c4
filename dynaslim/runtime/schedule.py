"""How a step of a batch is divided: pieces of buckets, and who runs them.

A step is what lies between two decisions: the trunk, or all buckets of one segment. Several cores
do more work side by side, each on pieces of its own, than together on one piece (no waiting for
each other inside every layer); together they are only better where there is too little to share
out. Pieces are as many rows as stay in the cache, and are made smaller where the last of them
would keep one core busy and the others idle. Of a result only the last bits can depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from dynaslim.runtime.forms import Form

CACHE_VALUES: Final = 3_000_000
"""Values of the largest feature map of a piece: measured, 8 rows of ds_mbnet's trunk at 224 px."""
MOST_ROWS: Final = 256
"""Rows of the largest piece."""
UNEVEN: Final = 1.04
"""Longest over mean time of the workers that is not worth more pieces."""
TOGETHER: Final = 1.2
"""Longest over mean time from which all cores on one piece at a time are faster."""
START_RATE: Final = 2.5e10
"""Multiply-adds per second and core that forms are taken to run at until they have been timed."""


def rows_in_cache(peak_values: int) -> int:
    """Rows of a piece whose largest feature map has so many values per row: a power of two."""
    rows = 1
    while rows < MOST_ROWS and rows * 2 * peak_values <= 1.2 * CACHE_VALUES:
        rows *= 2
    return rows


class Piece(NamedTuple):
    """Rows `start` to `stop` of bucket number `bucket`."""

    bucket: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Pieces in the order they are to be taken; with `wide` one at a time, by all cores."""

    pieces: tuple[Piece, ...]
    wide: bool


def plan_step(
    rows: Sequence[int], seconds: Sequence[float], caps: Sequence[int], workers: int
) -> Plan:
    """Divide buckets of so many rows among workers.

    `seconds` is what one row of each takes on one core, `caps` the most rows of a piece.
    """
    pieces = [
        Piece(bucket, start, stop)
        for bucket, (count, cap) in enumerate(zip(rows, caps, strict=True))
        for start, stop in _even(count, cap)
    ]
    if workers == 1:
        return Plan(tuple(pieces), wide=True)
    mean = sum(n * s for n, s in zip(rows, seconds, strict=True)) / workers
    for _ in range(4 * workers):
        longest, busiest = _share_out(pieces, seconds, workers)
        divisible = [piece for piece in busiest if piece.stop - piece.start > 1]
        if longest <= UNEVEN * mean or not divisible:
            break
        largest = max(divisible, key=lambda piece: _cost(piece, seconds))
        middle = (largest.start + largest.stop) // 2
        pieces.remove(largest)
        pieces += [
            Piece(largest.bucket, largest.start, middle),
            Piece(largest.bucket, middle, largest.stop),
        ]
    longest, _ = _share_out(pieces, seconds, workers)
    if longest > TOGETHER * mean:
        whole = [
            Piece(bucket, start, stop)
            for bucket, (count, cap) in enumerate(zip(rows, caps, strict=True))
            for start, stop in _even(count, cap)
        ]
        return Plan(tuple(whole), wide=True)
    pieces.sort(key=lambda piece: -_cost(piece, seconds))
    return Plan(tuple(pieces), wide=False)


def _even(rows: int, cap: int) -> list[tuple[int, int]]:
    count = -(-rows // cap)
    return [(rows * n // count, rows * (n + 1) // count) for n in range(count)]


def _cost(piece: Piece, seconds: Sequence[float]) -> float:
    return (piece.stop - piece.start) * seconds[piece.bucket]


def _share_out(
    pieces: Sequence[Piece], seconds: Sequence[float], workers: int
) -> tuple[float, list[Piece]]:
    """The longest worker's time and pieces, if each takes the longest piece left when idle."""
    loads = [0.0] * workers
    taken: list[list[Piece]] = [[] for _ in range(workers)]
    for piece in sorted(pieces, key=lambda piece: -_cost(piece, seconds)):
        idle = loads.index(min(loads))
        loads[idle] += _cost(piece, seconds)
        taken[idle].append(piece)
    busiest = loads.index(max(loads))
    return loads[busiest], taken[busiest]


class Timings:
    """Seconds per row of each form on one core, learnt from the pieces that are run.

    Written by several threads without a lock: a lost update costs nothing but itself.
    """

    def __init__(self) -> None:
        self._seconds: dict[Form, float] = {}

    def get(self, form: Form, madds: float) -> float:
        """What one row takes, guessed by its multiply-adds until known."""
        return self._seconds.get(form, madds / START_RATE)

    def add(self, form: Form, rows: int, seconds: float) -> None:
        """A piece of so many rows took so long."""
        now = seconds / rows
        before = self._seconds.get(form)
        # a piece that was held up by another program says little: follow downwards faster
        weight = 0.3 if before is None or now < before else 0.1
        self._seconds[form] = now if before is None else before + weight * (now - before)
