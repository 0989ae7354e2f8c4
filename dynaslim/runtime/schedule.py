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
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

CACHE_VALUES: Final = 3_000_000
"""Values of the largest feature map of a piece: measured, 8 rows of ds_mbnet's trunk at 224 px."""
LEAST_ROWS: Final = 4
MOST_ROWS: Final = 256
"""Rows of the largest piece."""
UNEVEN: Final = 1.01
"""Longest over mean time of the workers that is not worth more pieces."""
TOGETHER: Final = 1.2
"""Longest over mean time from which all cores on one piece at a time are faster."""
START_RATE: Final = 2.5e10
"""Multiply-adds per second and core that a variant is taken to run at until it has been timed."""


def rows_in_cache(peak_values: int, values: int = CACHE_VALUES) -> int:
    """Rows of a piece whose largest feature map has `peak_values` a row and about `values` in all.

    A power of two, and at least `LEAST_ROWS`: fewer rows share the reading of the weights badly.
    """
    rows = LEAST_ROWS
    while rows < MOST_ROWS and rows * 2 * peak_values <= 1.2 * values:
        rows *= 2
    return rows


class MicroBatch(NamedTuple):
    """Rows `start` to `stop` of bucket number `bucket`."""

    bucket: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Pieces in the order they are to be taken; with `wide` one at a time, by all cores."""

    pieces: tuple[MicroBatch, ...]
    wide: bool


def plan_step(
    rows: Sequence[int], seconds: Sequence[float], caps: Sequence[int], workers: int
) -> Plan:
    """Divide buckets of so many rows among workers.

    `seconds` is what one row of each takes on one core, `caps` the most rows of a piece. Every
    piece reads all weights of its variant, so the widest buckets, whose rows cost most, are handed
    out first and whole where they fit; those of cheap rows are cut to fill what is left.
    """
    if len(rows) == 1:
        return _plan_one(rows[0], caps[0], workers)
    if workers == 1:
        return _together(rows, caps)
    mean = sum(n * s for n, s in zip(rows, seconds, strict=True)) / workers
    loads = [0.0] * workers
    pieces: list[MicroBatch] = []
    for bucket in sorted(range(len(rows)), key=lambda bucket: -seconds[bucket]):
        start, row_s = 0, seconds[bucket]
        while start < rows[bucket]:
            idle = loads.index(min(loads))
            left, room = rows[bucket] - start, mean - loads[idle]
            if left * row_s > room + (UNEVEN - 1) * mean:
                left = max(1, min(left, round(room / row_s)))
            pieces += [
                MicroBatch(bucket, start + a, start + b) for a, b in _even(left, caps[bucket])
            ]
            loads[idle] += left * row_s
            start += left
    if max(loads) > TOGETHER * mean:
        return _together(rows, caps)
    # an idle core takes the next, the longest first: a core that is held up holds up no other
    pieces.sort(key=lambda piece: -(piece.stop - piece.start) * seconds[piece.bucket])
    return Plan(tuple(pieces), wide=False)


@lru_cache(maxsize=4096)
def _plan_one(rows: int, cap: int, workers: int) -> Plan:
    """One bucket, in equal shares; the same at every call of as many rows."""
    if workers == 1 or -(-rows // workers) > TOGETHER * rows / workers:
        return _together([rows], [cap])
    bounds = [rows * n // workers for n in range(workers + 1)]
    pieces = [
        MicroBatch(0, start + a, start + b)
        for start, stop in pairwise(bounds)
        for a, b in _even(stop - start, cap)
    ]
    pieces.sort(key=lambda piece: piece.start - piece.stop)
    return Plan(tuple(pieces), wide=False)


def _together(rows: Sequence[int], caps: Sequence[int]) -> Plan:
    pieces = [
        MicroBatch(bucket, start, stop)
        for bucket, (count, cap) in enumerate(zip(rows, caps, strict=True))
        for start, stop in _even(count, cap)
    ]
    return Plan(tuple(pieces), wide=True)


def _even(rows: int, cap: int) -> list[tuple[int, int]]:
    """Parts of at most `cap` rows, as equal as can be."""
    count = -(-rows // cap)
    return [(rows * n // count, rows * (n + 1) // count) for n in range(count)]


class RowTime:
    """Seconds per row of a variant on one core, learnt from the pieces that are run.

    Written by several threads without a lock: a lost update costs nothing but itself.
    """

    def __init__(self, madds: float) -> None:
        """Guessed by the multiply-adds of a row until a piece was timed."""
        self.seconds = madds / START_RATE
        self._measured = False

    def add(self, rows: int, seconds: float) -> None:
        """A piece of so many rows took so long."""
        now = seconds / rows
        # a slow piece may have been held up by another program: follow downwards faster
        weight = 0.3 if now < self.seconds else 0.1
        self.seconds = self.seconds + weight * (now - self.seconds) if self._measured else now
        self._measured = True
