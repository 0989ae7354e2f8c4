"""Routing: sorts the rows of a batch into buckets at every gate and runs each bucket densely.

A bucket is the rows that made the same choice, whatever their previous choices. Its features are
in one buffer, into which every variant of its segment writes its part. The thread that runs a
piece of a bucket gathers the rows right before. Decisions are made in numpy, on the gates' logits.

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

from dynaslim.cascade_spec import CascadeSpec
from dynaslim.errors import DynaslimError
from dynaslim.graph import AnySpec
from dynaslim.runtime.arrays import Array, NumpyArrays, check_finite
from dynaslim.runtime.backends import Backend, Program
from dynaslim.runtime.budget import cascade_logits
from dynaslim.runtime.escalation import averaged
from dynaslim.runtime.schedule import MicroBatch, RowTime, plan_step, rows_in_cache
from dynaslim.runtime.variants import (
    RouteVariant,
    SegmentVariant,
    Variant,
    VariantShape,
    variant_table,
)
from dynaslim.runtime.workers import Workers, Workspace, Workspaces
from dynaslim.spec import Route

Decide = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(gate, its logits (B, K), row numbers in the batch (B,)) -> options (B,) int64."""

Merge = Callable[[int, int, np.ndarray], np.ndarray]
"""(gate, option of the previous gate, rows of each option (K,)) -> options that replace them (K,).

K counts only the allowed options, which are the first ones."""

_TRUNK: Final = SegmentVariant(0)
_FIRST: Final = np.zeros(1, np.int64)
_ROW: Final = MicroBatch(0, 0, 1)


@dataclass(slots=True, eq=False)
class SizedVariant:
    """A variant for one image size, with everything needed to run it."""

    variant: Variant
    shape: VariantShape
    output_rows: tuple[tuple[int, ...], ...]
    """Memory layouts of a row of features and of gate logits, or of class logits alone."""
    most_rows: int
    """Maximum number of rows of a piece."""
    row_time: RowTime


Table = tuple[tuple[tuple[SizedVariant, ...], ...], ...]
"""Laid out like `variants.VariantTable`."""


@dataclass(slots=True)
class Bucket:
    """Rows that made the same choice."""

    option: int
    members: np.ndarray
    """Row numbers in the batch."""
    outs: tuple[Array, ...]
    """Features and gate logits, or in the last segment class logits."""

    def part(self, start: int, stop: int) -> tuple[Array, ...]:
        """The buffers in which a variant writes its results for rows `start` to `stop`."""
        if stop - start == len(self.members):
            return self.outs
        return tuple(out[start:stop] for out in self.outs)


class WorkItem(NamedTuple):
    """Rows for a variant: `picked` from `source` (None: all, in order); results go into `outs`."""

    sized: SizedVariant
    source: Array
    picked: np.ndarray | None
    outs: tuple[Array, ...]
    rows: int
    first: int = 0
    """Number of the source's first row in the caller's batch."""


class Router:
    """Runs a network's variants on batches of images of any size; keeps no results of a call."""

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
        self._passed_on: np.ndarray | None = None
        """The gate logits (K,) of every row, if a cascade's trunk would only copy the images."""
        same_layout = isinstance(backend.arrays, NumpyArrays)  # of features and images
        if isinstance(spec, CascadeSpec) and spec.trunk is None and same_layout:
            self._passed_on = cascade_logits(spec)
        self._running: set[int] = set()
        """Identifiers of the threads that are running a step."""
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
            table = self._tables.setdefault(size, made)  # another thread may have been first
        return table

    def whole(self, route: Route, size: tuple[int, int]) -> SizedVariant:
        """A whole route as one variant."""
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
        output_rows = tuple(backend.arrays.row(row) for row in shape.output_rows)
        return SizedVariant(variant, shape, output_rows, rows, RowTime(shape.madds))

    def program(self, sized: SizedVariant, *, wide: bool) -> Program:
        """A variant's program; the first use compiles it."""
        if self._passed_on is not None and sized.variant == _TRUNK:
            return _pass_on
        return self.backend.program(sized.variant, sized.shape, wide=wide)

    def warm_up(self, size: tuple[int, int]) -> None:
        """Compile all variants for images of (height, width), for wide and for parallel calls."""
        for sized in chain.from_iterable(chain.from_iterable(self.table(size))):
            self.program(sized, wide=True)
            if self.backend.workers > 1:
                self.program(sized, wide=False)

    # -- running ------------------------------------------------------------------------------

    def static(self, x: Array, route: Route, *, first: int = 0) -> Array:
        """Run all rows along one route, without gates -> logits (B, N) in a new buffer.

        `first` is the number of the first row for error messages.
        """
        logits = self.backend.arrays.empty(len(x), (self.spec.num_classes,), floats=True)
        self.run([WorkItem(self.whole(route, _size(x)), x, None, (logits,), len(x), first)])
        return logits

    def along(self, x: Array, path: Sequence[int], *, first: int = 0) -> np.ndarray:
        """Like `static`, but segment by segment, along a path that the gates could choose."""
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
        """Run every row along its own route.

        `escalate` gets the logits and options of all rows and yields, step by step, rows that
        escalate and their path. These run again from the trunk's features, and their new answers
        replace the old ones. For a second look, their mirror images run from the first layer on,
        and the answers are averaged (`escalation.averaged`). No buckets are merged into options
        above `limits`. `first` is the number of the first row for error messages.
        """
        workspace, table, rows = self._workspaces.borrow(), self.table(_size(x)), len(x)
        options_BG = np.empty((rows, len(self.spec.gates)), np.int64)
        trunk = self._trunk(workspace, table, x, first)
        if rows == 1 and self._merge is None:  # no sorting needed

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
        # an interrupted call does not give it back: its pieces may still be writing
        self._workspaces.give_back(workspace)
        return Routed(logits_BN, options_BG, tuple(passes))

    def _trunk(
        self, workspace: Workspace, table: Table, x: Array, first: int = 0, *, beside: bool = False
    ) -> Bucket:
        """Run all images through the trunk; `beside` selects a second set of buffers."""
        members = np.arange(len(x))
        if self._passed_on is None:
            bucket = self._bucket(workspace, table[0][0], 0, members, beside=beside)
        else:
            logits_BK = np.broadcast_to(self._passed_on, (len(x), len(self._passed_on)))
            bucket = Bucket(0, members, (x, logits_BK))
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
        """Run some rows of the trunk to the end, all with the one option chosen at each gate.

        Returns their logits, in the workspace, whose buffers may be reused from an earlier pass.
        """
        # the trunk's rows are in order, so their positions are their numbers in the batch
        members = bucket.members if picked is None else picked
        if len(members) == len(bucket.members):
            picked = None
        for number in range(1, len(table)):
            option = choose(number - 1, bucket)
            # the output shape of an option does not depend on the previous option
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
        """Run all rows of the trunk to the end, in buckets by option; fills the result arrays."""
        buckets = [trunk]
        for number, gate in enumerate(self.spec.gates, start=1):
            # option -> buckets, each with the positions of its rows that took it (None: all)
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
        """A bucket with buffers for an option's outputs; `leaving` are variants by option."""
        sized, rows = leaving[option], len(members)
        last = len(sized.output_rows) == 1
        features = workspace.rows((sized, beside), rows, sized.output_rows[0], floats=last)
        if last:
            return Bucket(option, members, (features,))
        logits = workspace.rows((sized, beside, "gate"), rows, sized.output_rows[1], floats=True)
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
        """Run the items divided as in `plan_step`."""
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
        # compile here, in one thread, rather than while pieces wait for it
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
            self._padded(
                program, x, outs, next(n for n in sizes if n > rows), item.sized.output_rows
            )

    def _padded(
        self,
        program: Program,
        x: Array,
        outs: Sequence[Array],
        rows: int,
        output_rows: Sequence[tuple[int, ...]],
    ) -> None:
        """Run a program for exactly `rows` rows on the fewer rows of x, writing them into `outs`.

        x is padded with zeros; the results for the padding are ignored.
        """
        workspace, last = self._workspaces.of_thread(), len(outs) - 1
        full = workspace.rows("pad", rows, tuple(x.shape[1:]))
        full[: len(x)] = x
        full[len(x) :] = 0
        # the last output is logits: float32 whatever the precision
        room = [
            workspace.rows(("padded", n == last), rows, row, floats=n == last)
            for n, row in enumerate(output_rows)
        ]
        program(full, room)
        for out, made in zip(outs, room, strict=True):
            out[:] = made[: len(x)]


def _pass_on(x: Array, outs: Sequence[Array]) -> None:
    """The program of a trunk whose outputs are there already."""


def _fixed(path: Sequence[int]) -> Callable[[int, Bucket], int]:
    return lambda gate, _: path[gate]


def _by_option(picked: np.ndarray) -> list[tuple[int, np.ndarray | None]]:
    """The options that were picked, ascending, with the positions of each; None for all."""
    counts = np.bincount(picked)
    if counts[-1] == len(picked):
        return [(len(counts) - 1, None)]
    return [
        (option, np.flatnonzero(picked == option)) for option in np.flatnonzero(counts).tolist()
    ]


def _size(x: Array) -> tuple[int, int]:
    return int(x.shape[2]), int(x.shape[3])


class Escalated(NamedTuple):
    """One or more rows that escalate together."""

    members: np.ndarray
    """Row numbers in the batch, ascending."""
    path: tuple[int, ...]
    """Option of every gate on the path that they take."""
    mirror: bool = False
    """Whether their mirror images run, from the first layer on."""


class Routed(NamedTuple):
    """Results of a routed batch."""

    logits: np.ndarray
    """(B, N) class logits, from every row's last route."""
    options: np.ndarray
    """(B, G) options of every row's first route, which the gates chose."""
    passes: tuple[Escalated, ...]
    """The rows that escalated, in the order of the passes."""


WhoEscalates = Callable[[np.ndarray, np.ndarray], Iterator[Escalated]]
"""(logits (B, N) of every row's last route, options (B, G) of its first) -> rows that
escalate. When the generator resumes, the logits include the answers of those rows."""
