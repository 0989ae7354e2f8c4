"""Division of a step into pieces of buckets, and their distribution among cores.

A step is the work between two decisions: the trunk, or all buckets of one segment. Cores get more
done on separate pieces than together on one piece, because they need not synchronise within every
layer. Working together is faster only where there is too little to divide. A piece has as many
rows as fit in the cache, or fewer where the last piece would keep one core busy and the others
idle. The division can affect only the last bits of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

CACHE_VALUES: Final = 3_000_000
"""Values in the largest feature map of a piece: measured, 8 rows of ds_mbnet's trunk at 224 px."""
LEAST_ROWS: Final = 4
MOST_ROWS: Final = 256
"""Maximum number of rows of a piece."""
UNEVEN: Final = 1.01
"""Ratio of the workers' longest to mean time up to which further division is not worthwhile."""
TOGETHER: Final = 1.2
"""Ratio of the workers' longest to mean time above which all cores work on one piece at a time."""
START_RATE: Final = 2.5e10
"""Multiply-adds per second and core that are assumed for a variant until it has been timed."""


def rows_in_cache(peak_values: int, values: int = CACHE_VALUES) -> int:
    """Rows of a piece whose largest feature map has `peak_values` per row, about `values` in all.

    A power of two of at least `LEAST_ROWS`: with fewer, reading the weights costs too much per row.
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
    """Pieces in execution order; if `wide`, all cores run one piece at a time."""

    pieces: tuple[MicroBatch, ...]
    wide: bool


def plan_step(
    rows: Sequence[int], seconds: Sequence[float], caps: Sequence[int], workers: int
) -> Plan:
    """Divide buckets with `rows` rows each among workers.

    For each bucket, `seconds` is the time per row on one core and `caps` the maximum rows per
    piece. Every piece reads all weights of its variant. The widest buckets, whose rows cost most,
    are therefore assigned first, whole where they fit; cheaper ones are cut to fill the gaps.
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
    # an idle core takes the next piece, longest first: a core that is delayed delays no other
    pieces.sort(key=lambda piece: -(piece.stop - piece.start) * seconds[piece.bucket])
    return Plan(tuple(pieces), wide=False)


@lru_cache(maxsize=4096)
def _plan_one(rows: int, cap: int, workers: int) -> Plan:
    """Divide a single bucket into equal shares; cached by the number of rows."""
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
    """Divide rows into parts of at most `cap` rows, as equal as possible."""
    count = -(-rows // cap)
    return [(rows * n // count, rows * (n + 1) // count) for n in range(count)]


class RowTime:
    """Seconds per row of a variant on one core, estimated from the pieces that have run.

    Several threads update it without a lock: a lost update does no harm.
    """

    def __init__(self, madds: float) -> None:
        """Estimate the time from the multiply-adds of a row until a piece has been timed."""
        self.seconds = madds / START_RATE
        self._measured = False

    def add(self, rows: int, seconds: float) -> None:
        """Record the time of a piece with `rows` rows."""
        now = seconds / rows
        # a slow piece may have been delayed by another program: follow decreases faster
        weight = 0.3 if now < self.seconds else 0.1
        self.seconds = self.seconds + weight * (now - self.seconds) if self._measured else now
        self._measured = True
