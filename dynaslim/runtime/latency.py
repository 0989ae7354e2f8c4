"""Measured time of every variant of a network on this machine, stored as a cost table in ms.

`cost_file.read_cost_table` can read the file, so gates can be trained on it. The times for every
number of rows are in its note, for merging buckets and for human readers.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np

from dynaslim.cost import CostTable
from dynaslim.cost_file import read_cost_table, write_cost_table
from dynaslim.errors import UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.runtime.router import Router, SizedVariant, WorkItem
from dynaslim.runtime.variants import SegmentVariant, VariantTable, segment_variants, variant_table

ROUNDS: Final = 9
_ROUNDING: Final = 1e-9
"""Share of the buckets' time below which a gain is due to rounding."""


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of every variant of every segment by the number of rows."""

    table: CostTable
    """Costs in ms per image, at `rows[-1]` rows."""
    image_size_px: int
    rows: tuple[int, ...]
    """Numbers of rows that were measured, ascending."""
    ms: dict[str, tuple[float, ...]]
    """Name of a `SegmentVariant` -> median time of a step, for each of `rows`."""
    spread: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Name of a `SegmentVariant` -> interquartile range in ms, for each of `rows`."""
    note: dict[str, Any] = field(default_factory=dict)
    """Backend, precision, hardware and threads."""

    @classmethod
    def read(cls, path: str | Path, spec: AnySpec) -> LatencyTable:
        """Read a table that `write` wrote for this network.

        Raises:
            UsageError: if the file is not a cost table of the network, or has no times by rows.
        """
        table = read_cost_table(path, spec)
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        note = dict(data["note"])
        try:
            rows = tuple(int(n) for n in note.pop("rows"))
            ms = {name: tuple(map(float, values)) for name, values in note.pop("ms").items()}
            spread = {k: tuple(map(float, v)) for k, v in note.pop("spread", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(
                f"{path}: a cost table, but without times by rows; make one with: dynaslim profile"
            ) from None
        made = cls(table, int(data["image_size_px"][0]), rows, ms, spread, note)
        try:
            made.check_fits(spec)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        return made

    def write(self, path: str | Path, spec: AnySpec) -> Path:
        """Write the table, whole or not at all; raises `OSError` if it cannot be written."""
        note = {
            **self.note,
            "rows": list(self.rows),
            "ms": {name: list(values) for name, values in self.ms.items()},
            "spread": {name: list(values) for name, values in self.spread.items()},
        }
        return write_cost_table(path, self.table, spec, self.image_size_px, note=note)

    def check_fits(self, spec: AnySpec) -> None:
        """Raise `UsageError` unless the table has times for all variants of the network."""
        check(self.table.unit == "ms", f"latency table: unit {self.table.unit!r}, not ms")
        check(
            bool(self.rows) and all(a < b for a, b in itertools.pairwise((0, *self.rows))),
            f"latency table: rows {self.rows} must be positive and rise",
        )
        for variant in segment_variants(spec):
            times = self.ms.get(variant.name, ())
            check(
                len(times) == len(self.rows) and all(math.isfinite(t) and t > 0 for t in times),
                f"latency table: {variant.name} needs {len(self.rows)} positive times",
            )

    def step_ms(self, variant: SegmentVariant, rows: int) -> float:
        """Time of a step with `rows` rows: interpolated linearly; proportional beyond the table."""
        if not rows:
            return 0.0
        times = self.ms[variant.name]
        if rows > self.rows[-1]:
            return times[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, times))

    def merge(
        self, variants: VariantTable, gate: int, before: int, counts: np.ndarray
    ) -> np.ndarray:
        """For each option (K,), the option its rows should take: a wider one if that saves time.

        `variants` are the network's, `before` is the option of the previous gate, `counts` are the
        rows of each option (only the first options if the others are not allowed). From the
        cheapest on, a bucket joins the wider one with which it saves most time.
        """
        goes, left = np.arange(len(counts)), counts.astype(int)
        buckets = variants[gate + 1][before]
        total = sum(self.step_ms(bucket, n) for bucket, n in zip(buckets, left, strict=False))
        for option in range(len(counts) - 1):
            if not left[option]:
                continue
            own = self.step_ms(buckets[option], left[option])
            gains = {
                wider: own
                + self.step_ms(buckets[wider], left[wider])
                - self.step_ms(buckets[wider], left[wider] + left[option])
                for wider in range(option + 1, len(counts))
            }
            best = max(gains, key=lambda wider: gains[wider])
            if gains[best] > _ROUNDING * total:
                goes[goes == option] = best
                left[best] += left[option]
                left[option] = 0
        return goes


def profile(
    router: Router,
    image_size_px: int,
    batch_size: int,
    *,
    rounds: int = ROUNDS,
    note: dict[str, Any] | None = None,
    on_variant: Callable[[], None] | None = None,
) -> LatencyTable:
    """Measure every variant of a network at 1, 2, 4, ... `batch_size` rows.

    Each variant is timed as the engine would run it, divided among its workers; times are medians
    over `rounds`. `on_variant` is called after each variant.

    Raises:
        UsageError: for a batch size below 1, or an image too small for the network.
    """
    check(batch_size >= 1, f"batch size {batch_size}: must be at least 1")
    spec, size = router.spec, (image_size_px, image_size_px)
    spec.check_image_size(*size)
    rows = (*(2**k for k in range(20) if 2**k < batch_size), batch_size)
    rng = np.random.default_rng(0)
    ms: dict[str, tuple[float, ...]] = {}
    spread: dict[str, tuple[float, ...]] = {}
    for sized in chain.from_iterable(chain.from_iterable(router.table(size))):
        times = time_variant(router, sized, rows, rounds, rng)
        ms[sized.variant.name] = tuple(statistics.median(values) for values in times)
        spread[sized.variant.name] = tuple(_quartiles(values) for values in times)
        if on_variant is not None:
            on_variant()
    per_image = {name: values[-1] / rows[-1] for name, values in ms.items()}
    costs = tuple(
        tuple(tuple(per_image[variant.name] for variant in row) for row in segment)
        for segment in variant_table(spec)
    )
    return LatencyTable(CostTable("ms", costs), image_size_px, rows, ms, spread, dict(note or {}))


def time_variant(
    router: Router,
    sized: SizedVariant,
    rows: Sequence[int],
    rounds: int,
    rng: np.random.Generator,
) -> list[list[float]]:
    """Time one variant: milliseconds of every round, for each number of rows.

    Within a round, the numbers of rows are measured in turn.
    """
    arrays, shape = router.backend.arrays, sized.shape
    values = rng.standard_normal((rows[-1], *shape.row_in), np.float32)
    source = arrays.images(values)
    if not sized.variant.takes_images:
        source = arrays.empty(rows[-1], arrays.row(shape.row_in))
        moved = values if arrays.row(shape.row_in) == shape.row_in else values.transpose(0, 2, 3, 1)
        source[:] = arrays.images(np.ascontiguousarray(moved))
    last = len(shape.output_rows) == 1
    outs = [
        arrays.empty(rows[-1], row, floats=last or n == 1)
        for n, row in enumerate(sized.output_rows)
    ]
    times: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds + 1):
        for at, n in enumerate(rows):
            item = WorkItem(sized, source[:n], None, tuple(out[:n] for out in outs), n)
            start = time.perf_counter()
            router.run([item])
            arrays.host(outs[-1][:1])  # wait for a device that may still be busy
            if turn:  # the first round compiles, and its memory is cold
                times[at].append((time.perf_counter() - start) * 1e3)
    return times


def _quartiles(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low
