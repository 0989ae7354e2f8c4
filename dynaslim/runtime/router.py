"""Routing: rows of a batch sorted into buckets at every gate, each bucket through dense segments.

A bucket is the rows that made the same choice, wherever they came from: its features lie in one
buffer, into which every variant of its segment writes its part. A piece of a bucket is gathered by
the thread that runs it, right before it does. What is decided is decided in numpy, on the few
logits of the gates.

Suffixes: B rows, G gates, K options of a gate, N classes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, NamedTuple

import numpy as np

from dynaslim.errors import DynaslimError
from dynaslim.graph import AnySpec
from dynaslim.runtime.arrays import Array, check_finite
from dynaslim.runtime.backends import Backend, Program
from dynaslim.runtime.escalation import averaged
from dynaslim.runtime.schedule import MicroBatch, RowTime, plan_step, rows_in_cache
from dynaslim.runtime.variants import RouteVariant, Variant, VariantShape, variant_table
from dynaslim.runtime.workers import Workers, Workspace, Workspaces
from dynaslim.spec import Route

Decide = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(gate, its logits (B, K), which rows of the batch) -> options (B,) int64."""

Merge = Callable[[int, int, np.ndarray], np.ndarray]
"""(gate, option before, rows of each option (K,)) -> the option (K,) each goes to instead.

Given the allowed options alone, the first so many."""

_FIRST: Final = np.zeros(1, np.int64)
_ROW: Final = MicroBatch(0, 0, 1)


@dataclass(slots=True, eq=False)
class SizedVariant:
    """A variant for one size of image, with all that running it needs."""

    variant: Variant
    shape: VariantShape
    rows_out: tuple[tuple[int, ...], ...]
    """How a row of features and one of gate logits, or one of class logits, lie in memory."""
    most_rows: int
    """Of a piece."""
    row_time: RowTime


Table = tuple[tuple[tuple[SizedVariant, ...], ...], ...]
"""Of every segment, by the options before and behind it."""


@dataclass(slots=True)
class Bucket:
    """Rows that made the same choice."""

    option: int
    members: np.ndarray
    """Which rows of the batch."""
    outs: tuple[Array, ...]
    """Features and gate logits; behind the last gate class logits."""

    def part(self, start: int, stop: int) -> tuple[Array, ...]:
        """Where a variant writes its results for rows `start` to `stop`."""
        if stop - start == len(self.members):
            return self.outs
        return tuple(out[start:stop] for out in self.outs)


class WorkItem(NamedTuple):
    """Rows for a variant: those `picked` of `source` (None: all, in order); results into `outs`."""

    sized: SizedVariant
    source: Array
    picked: np.ndarray | None
    outs: tuple[Array, ...]
    rows: int
    first: int = 0
    """Which row of the caller's batch the source begins with."""


class Router:
    """Runs a network's variants on batches of images of any size; keeps nothing of a call."""

    def __init__(
        self,
        spec: AnySpec,
        backend: Backend,
        *,
        rows_per_piece: int | None = None,
        merge: Merge | None = None,
    ) -> None:
        self.spec = spec
        self._merge = merge
        self.backend = backend
        self._rows_per_piece = rows_per_piece
        self.workers = Workers(backend)
        self._workspaces = Workspaces(backend.arrays)
        self._running: set[int] = set()
        """Threads that are inside a step."""
        self._tables: dict[tuple[int, int], Table] = {}
        self._routes: dict[tuple[Route, tuple[int, int]], SizedVariant] = {}

    # -- variants --------------------------------------------------------------------------------

    def table(self, size: tuple[int, int]) -> Table:
        """All variants for images of (height, width)."""
        table = self._tables.get(size)
        if table is None:
            made = tuple(
                tuple(tuple(self._prepared(variant, size) for variant in row) for row in segment)
                for segment in variant_table(self.spec)
            )
            table = self._tables.setdefault(size, made)  # another thread's, if it was first
        return table

    def whole(self, route: Route, size: tuple[int, int]) -> SizedVariant:
        """A route as one program."""
        key = (route, size)
        if key not in self._routes:
            self._routes.setdefault(key, self._prepared(RouteVariant(route), size))
        return self._routes[key]

    def _prepared(self, variant: Variant, size: tuple[int, int]) -> SizedVariant:
        shape, backend, rows = variant.shape(self.spec, size), self.backend, self._rows_per_piece
        if backend.sizes is not None:
            rows = backend.sizes[-1] if rows is None else min(rows, backend.sizes[-1])
        elif rows is None:
            rows = rows_in_cache(shape.peak, backend.piece_values)
        rows_out = tuple(backend.arrays.row(row) for row in shape.rows_out)
        return SizedVariant(variant, shape, rows_out, rows, RowTime(shape.madds))

    def program(self, sized: SizedVariant, *, wide: bool) -> Program:
        """A variant's program; the first use compiles it."""
        return self.backend.program(sized.variant, sized.shape, wide=wide)

    def warm_up(self, size: tuple[int, int]) -> None:
        """Compile all variants for images of (height, width), for both kinds of calls."""
        for sized in chain.from_iterable(chain.from_iterable(self.table(size))):
            self.program(sized, wide=True)
            if self.backend.workers > 1:
                self.program(sized, wide=False)

    # -- running ------------------------------------------------------------------------------

    def static(self, x: Array, route: Route, *, first: int = 0) -> Array:
        """All rows along one route, without gates -> logits (B, N) in a new buffer.

        `first` is what errors count the rows from.
        """
        logits = self.backend.arrays.empty(len(x), (self.spec.num_classes,), floats=True)
        self.run([WorkItem(self.whole(route, _size(x)), x, None, (logits,), len(x), first)])
        return logits

    def along(self, x: Array, path: Sequence[int], *, first: int = 0) -> np.ndarray:
        """As `static`, segment by segment, along a path that the gates could choose."""
        workspace, table = self._workspaces.borrow(), self.table(_size(x))
        trunk = self._trunk(workspace, table, x, first)
        logits_BN = self._together(workspace, table, trunk, None, _fixed(path)).copy()
        self._workspaces.give_back(workspace)
        return logits_BN

    def routed(
        self,
        x: Array,
        decide: Decide,
        escalate: WhoEscalates | None,
        *,
        limits: Sequence[int] | None = None,
        first: int = 0,
    ) -> Routed:
        """Every row along its own route.

        `escalate` yields, from logits and options of all rows, which of them escalate from the
        trunk's features, and along which path; their answers replace those before, step after step.
        For a second look their mirror images run from the beginning, and the answers are averaged
        (`escalation.averaged`). No buckets are merged into options above `limits`. `first` is what
        errors count the rows from.
        """
        workspace, table, rows = self._workspaces.borrow(), self.table(_size(x)), len(x)
        options_BG = np.empty((rows, len(self.spec.gates)), np.int64)
        trunk = self._trunk(workspace, table, x, first)
        if rows == 1 and self._merge is None:  # need not be sorted

            def choose(gate: int, bucket: Bucket) -> int:
                options_BG[0, gate] = option = decide(gate, self._gate_logits(bucket), _FIRST)[0]
                return int(option)

            logits_BN = self._together(workspace, table, trunk, None, choose).copy()
        else:
            logits_BN = np.empty((rows, self.spec.num_classes), np.float32)
            self._sorted(workspace, table, trunk, decide, options_BG, logits_BN, limits)
        passes = []
        for unsure in () if escalate is None else escalate(logits_BN, options_BG):
            members, along = unsure.members, _fixed(unsure.path)
            if unsure.mirror:
                mirrored = self.backend.arrays.mirrored(x, members)
                # beside the features of the batch, which a later pass may need
                start = self._trunk(workspace, table, mirrored, beside=True)
                mirror_BN = self._together(workspace, table, start, None, along)
                logits_BN[members] = averaged(logits_BN[members], mirror_BN)
            else:
                logits_BN[members] = self._together(workspace, table, trunk, members, along)
            passes.append(unsure)
        # not where a call was interrupted: its pieces may still be writing
        self._workspaces.give_back(workspace)
        return Routed(logits_BN, options_BG, tuple(passes))

    def _trunk(
        self, workspace: Workspace, table: Table, x: Array, first: int = 0, *, beside: bool = False
    ) -> Bucket:
        """All images through the trunk; with `beside` into other memory than without."""
        bucket = self._bucket(workspace, table[0][0], 0, np.arange(len(x)), beside=beside)
        self.run([WorkItem(table[0][0][0], x, None, bucket.outs, len(x), first)])
        return bucket

    def _together(
        self,
        workspace: Workspace,
        table: Table,
        bucket: Bucket,
        picked: np.ndarray | None,
        choose: Callable[[int, Bucket], int],
    ) -> np.ndarray:
        """Some rows of the trunk to the end, all of them by the option that is chosen at each gate.

        Returns their logits, in the workspace. Buffers may be those of an earlier pass, which is
        over.
        """
        # the trunk's rows stand in order: their numbers are those in the batch
        members = bucket.members if picked is None else picked
        if len(members) == len(bucket.members):
            picked = None
        for number in range(1, len(table)):
            option = choose(number - 1, bucket)
            # whatever the option before, what leaves a segment by an option is of one shape
            made = self._bucket(workspace, table[number][0], option, members)
            sized = table[number][bucket.option][option]
            self.run([WorkItem(sized, bucket.outs[0], picked, made.outs, len(members))])
            bucket, picked = made, None
        return self.backend.arrays.host(bucket.outs[0])

    def _sorted(
        self,
        workspace: Workspace,
        table: Table,
        trunk: Bucket,
        decide: Decide,
        options_BG: np.ndarray,
        logits_BN: np.ndarray,
        limits: Sequence[int] | None,
    ) -> None:
        """All rows of the trunk to the end, in buckets by their options; fills the results."""
        buckets = [trunk]
        for number, gate in enumerate(self.spec.gates, start=1):
            # buckets and which of their rows, None for all, by the option that they took
            arriving: dict[int, list[tuple[Bucket, np.ndarray | None]]] = {}
            for bucket in buckets:
                picked = decide(number - 1, self._gate_logits(bucket), bucket.members)
                if self._merge is not None:
                    allowed = len(gate.choices) if limits is None else limits[number - 1] + 1
                    counts = np.bincount(picked, minlength=allowed)
                    picked = self._merge(number - 1, bucket.option, counts)[picked]
                options_BG[bucket.members, number - 1] = picked
                for option, part in _by_option(picked):
                    arriving.setdefault(option, []).append((bucket, part))
            items, buckets = [], []
            for option, parts in sorted(arriving.items()):
                joining = [
                    bucket.members if part is None else bucket.members[part]
                    for bucket, part in parts
                ]
                members = joining[0] if len(joining) == 1 else np.concatenate(joining)
                joined = self._bucket(workspace, table[number][0], option, members)
                buckets.append(joined)
                start = 0
                for (bucket, part), arrived in zip(parts, joining, strict=True):
                    stop = start + len(arrived)
                    sized, outs = table[number][bucket.option][option], joined.part(start, stop)
                    items.append(WorkItem(sized, bucket.outs[0], part, outs, len(arrived)))
                    start = stop
            self.run(items)
        for bucket in buckets:
            logits_BN[bucket.members] = self.backend.arrays.host(bucket.outs[0])

    def _gate_logits(self, bucket: Bucket) -> np.ndarray:
        logits_BK = self.backend.arrays.host(bucket.outs[1])
        if not np.isfinite(logits_BK).all():
            raise DynaslimError(
                "a gate's logits are not finite; the network's weights or BN statistics are damaged"
            )
        return logits_BK

    @staticmethod
    def _bucket(
        workspace: Workspace,
        leaving: Sequence[SizedVariant],
        option: int,
        members: np.ndarray,
        *,
        beside: bool = False,
    ) -> Bucket:
        """Room for the rows that leave a segment by an option; `leaving` are variants by option."""
        sized, rows = leaving[option], len(members)
        last = len(sized.rows_out) == 1
        features = workspace.rows((sized, beside), rows, sized.rows_out[0], floats=last)
        if last:
            return Bucket(option, members, (features,))
        logits = workspace.rows((sized, beside, "gate"), rows, sized.rows_out[1], floats=True)
        return Bucket(option, members, (features, logits))

    # -- one step -----------------------------------------------------------------------------

    def run(self, items: Sequence[WorkItem]) -> None:
        """Divide the rows of all items among the cores and run them."""
        caller = threading.get_ident()
        self._running.add(caller)
        try:
            if (
                1 < self.backend.workers <= len(self._running)
                and sum(item.rows for item in items) <= self.backend.own_core_rows
            ):
                for item in items:
                    program = self.program(item.sized, wide=False)
                    self._piece(item, MicroBatch(0, 0, item.rows), program)
            else:
                self._divided(items)
        finally:
            self._running.discard(caller)

    def _divided(self, items: Sequence[WorkItem]) -> None:
        """As `plan_step` divides them."""
        if len(items) == 1 and items[0].rows == 1:  # planning would take as long as a small network
            self._piece(items[0], _ROW, self.program(items[0].sized, wide=True))
            return
        plan = plan_step(
            [item.rows for item in items],
            [item.sized.row_time.seconds for item in items],
            [item.sized.most_rows for item in items],
            self.backend.workers,
        )
        if plan.wide:
            for piece in plan.pieces:
                item = items[piece.bucket]
                self._piece(item, piece, self.program(item.sized, wide=True))
            return
        # compiled here, in one thread, before any piece waits for it
        programs = [self.program(item.sized, wide=False) for item in items]

        def task(piece: MicroBatch) -> Callable[[], None]:
            def run() -> None:
                item = items[piece.bucket]
                start = time.perf_counter()
                self._piece(item, piece, programs[piece.bucket])
                item.sized.row_time.add(piece.stop - piece.start, time.perf_counter() - start)

            return run

        self.workers.run([task(piece) for piece in plan.pieces])

    def _piece(self, item: WorkItem, piece: MicroBatch, program: Program) -> None:
        rows, x, outs = piece.stop - piece.start, item.source, item.outs
        if rows < item.rows:
            outs = tuple(out[piece.start : piece.stop] for out in outs)
        if item.picked is not None:
            row = tuple(x.shape[1:])
            x = self._workspaces.of_thread().rows("in", rows, row)
            self.backend.arrays.take(item.source, item.picked[piece.start : piece.stop], x)
        elif rows < item.rows:
            x = x[piece.start : piece.stop]
        if item.sized.variant.takes_images:
            check_finite(x, item.first + piece.start)
        sizes = self.backend.sizes
        if sizes is None or rows in sizes:
            program(x, outs)
        else:
            self._padded(program, x, outs, next(n for n in sizes if n > rows), item.sized.rows_out)

    def _padded(
        self,
        program: Program,
        x: Array,
        outs: Sequence[Array],
        rows: int,
        rows_out: Sequence[tuple[int, ...]],
    ) -> None:
        """Run a program, which takes `rows` rows, on fewer: those of x, into those of `outs`.

        Behind x stand zeros; what the program makes of them is ignored.
        """
        workspace, last = self._workspaces.of_thread(), len(outs) - 1
        full = workspace.rows("pad", rows, tuple(x.shape[1:]))
        full[: len(x)] = x
        full[len(x) :] = 0
        # the last are logits: float32 whatever the precision
        room = [
            workspace.rows(("padded", n == last), rows, row, floats=n == last)
            for n, row in enumerate(rows_out)
        ]
        program(full, room)
        for out, made in zip(outs, room, strict=True):
            out[:] = made[: len(x)]


def _fixed(path: Sequence[int]) -> Callable[[int, Bucket], int]:
    return lambda gate, _: path[gate]


def _by_option(picked: np.ndarray) -> list[tuple[int, np.ndarray | None]]:
    """The options that were picked, and where, in rising order; None for everywhere."""
    counts = np.bincount(picked)
    if counts[-1] == len(picked):
        return [(len(counts) - 1, None)]
    return [
        (option, np.flatnonzero(picked == option)) for option in np.flatnonzero(counts).tolist()
    ]


def _size(x: Array) -> tuple[int, int]:
    return int(x.shape[2]), int(x.shape[3])


class Escalated(NamedTuple):
    """Rows that escalate, one or more in rising order, and the option of every gate on the
    path that they take.
    """

    members: np.ndarray
    path: tuple[int, ...]
    mirror: bool = False
    """Whether it is their mirror images that run, from the first layer on."""


class Routed(NamedTuple):
    """What a batch gave."""

    logits: np.ndarray
    """(B, N), of every row's last route."""
    options: np.ndarray
    """(B, G) of every row's first route, the one that the gates chose."""
    passes: tuple[Escalated, ...]
    """Which rows escalated, in the order of the passes."""


WhoEscalates = Callable[[np.ndarray, np.ndarray], Iterator[Escalated]]
"""(logits (B, N) of every row's last route, options (B, G) of its first) -> rows that
escalate; when the generator goes on, the logits hold what these answered."""
