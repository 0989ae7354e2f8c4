"""Routing: rows of a batch sorted into buckets at every gate, each bucket through dense segments.

A bucket is the rows that made the same choice, wherever they came from: its features lie in one
buffer, into which every form of its segment writes its part. A piece of a bucket is gathered by the
thread that runs it, right before it does. What is decided is decided in numpy, on the few logits of
the gates.

Suffixes: B rows, G gates, K options of a gate, N classes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from dynaslim.errors import DynaslimError
from dynaslim.graph import AnySpec
from dynaslim.runtime.arrays import Array, check_finite
from dynaslim.runtime.backends import Backend, Program
from dynaslim.runtime.escalation import averaged
from dynaslim.runtime.forms import Form, FormShape, form_madds, form_shape
from dynaslim.runtime.padding import run_padded
from dynaslim.runtime.schedule import MicroBatch, Timings, plan_step, rows_in_cache
from dynaslim.runtime.workers import Workers, Workspace, Workspaces
from dynaslim.spec import Route

Decide = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(gate, its logits (B, K), which rows of the batch) -> options (B,) int64."""

Merge = Callable[[int, int, np.ndarray], np.ndarray]
"""(gate, width index before, rows of each option (K,)) -> the option (K,) each goes to instead.

Given the allowed options alone, the first so many."""

_FIRST: Final = np.zeros(1, np.int64)


@dataclass
class Bucket:
    """Rows that made the same choice."""

    option: int
    members: np.ndarray
    """Which rows of the batch."""
    features: Array
    """Class logits behind the last gate."""
    gate_logits: Array | None
    """None behind the last gate."""

    def outs(self, start: int = 0, stop: int | None = None) -> tuple[Array, ...]:
        """Where a form writes its results for rows `start` to `stop`, by default for all."""
        features = self.features[start:stop]
        if self.gate_logits is None:
            return (features,)
        return features, self.gate_logits[start:stop]


class Job(NamedTuple):
    """Rows for one form: those `picked` of `source` (None: all, in order); results into `outs`."""

    form: Form
    source: Array
    picked: np.ndarray | None
    outs: tuple[Array, ...]
    rows: int
    first: int = 0
    """Which row of the caller's batch the source begins with."""


class Router:
    """Runs a network's forms on batches of images of any size; keeps nothing of a call."""

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
        self._workers = Workers(backend)
        self._workspaces = Workspaces(backend.arrays)
        self._programs: dict[tuple[Form, tuple[int, int], bool], Program] = {}
        self._shapes: dict[tuple[Form, tuple[int, int]], FormShape] = {}
        self._madds: dict[tuple[Form, tuple[int, int]], float] = {}
        self._caps: dict[tuple[Form, tuple[int, int]], int] = {}
        self._lock = threading.Lock()
        self.timings: dict[tuple[int, int], Timings] = {}
        """What forms have taken so far, by size of image."""

    # -- programs -----------------------------------------------------------------------------

    def program(self, form: Form, size: tuple[int, int], *, wide: bool) -> Program:
        """A form's program, compiled at its first use."""
        key = (form, size, wide)
        program = self._programs.get(key)
        if program is None:
            with self._lock:  # one compilation at a time, and none twice
                program = self._programs.get(key)
                if program is None:
                    program = self.backend.program(form, self.shape(form, size), wide=wide)
                    self._programs[key] = program
        return program

    def shape(self, form: Form, size: tuple[int, int]) -> FormShape:
        """Sizes of a form for images of (height, width)."""
        key = (form, size)
        if key not in self._shapes:
            self._shapes[key] = form_shape(self.spec, form, size)
        return self._shapes[key]

    def madds(self, form: Form, size: tuple[int, int]) -> float:
        """Multiply-adds of a form per row."""
        key = (form, size)
        if key not in self._madds:
            self._madds[key] = form_madds(self.spec, form, size)
        return self._madds[key]

    def warm_up(self, form: Form, size: tuple[int, int]) -> None:
        """Compile a form for both kinds of calls."""
        self.program(form, size, wide=True)
        if self.backend.workers > 1:
            self.program(form, size, wide=False)

    # -- running ------------------------------------------------------------------------------

    def static(self, x: Array, route: Route, *, first: int = 0) -> Array:
        """All rows along one route, without gates -> logits (B, N) in a new buffer.

        `first` is what errors count the rows from.
        """
        form, size = Form.whole(route), _size(x)
        logits = self.backend.arrays.empty(len(x), (self.spec.num_classes,), floats=True)
        if len(x) == 1:
            check_finite(x, first)
            self._run_program(form, x, (logits,), size, wide=True)
            return logits
        self.run([Job(form, x, None, (logits,), len(x), first)], size)
        return logits

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

        `escalate` looks at logits and options of all rows and says which escalate, from the trunk's
        features, and along which path; their answers replace those before, and it may look once
        more. For a second look their mirror images run from the beginning, and the answers are
        averaged (`escalation.averaged`). No buckets are merged into options above `limits`. `first`
        is what errors count the rows from.
        """
        size, rows, gates = _size(x), len(x), len(self.spec.gates)
        if rows == 1 and escalate is None and self._merge is None:
            return Routed(*self._single(x, decide, size, first), ())
        workspace = self._workspaces.borrow()
        trunk = self._bucket(workspace, 0, 0, np.arange(rows), size)
        self.run([Job(Form(0), x, None, trunk.outs(), rows, first)], size)
        options_BG = np.empty((rows, gates), np.int64)
        logits_BN = np.empty((rows, self.spec.num_classes), np.float32)
        self._onward(workspace, trunk, decide, options_BG, logits_BN, size, limits)
        passes = []
        for unsure in () if escalate is None else escalate(logits_BN, options_BG):
            if unsure.mirror:
                self._second_look(workspace, x, unsure, logits_BN, size)
            else:
                logits_BN[unsure.members] = self._escalated(workspace, trunk, unsure, size)
            passes.append(unsure)
        # not where a call was interrupted: its pieces may still be writing
        self._workspaces.give_back(workspace)
        return Routed(logits_BN, options_BG, tuple(passes))

    def _single(
        self, x: Array, decide: Decide, size: tuple[int, int], first: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """One row: no buckets, one program after the other by all cores.

        The same as any batch; but sorting and planning would take a tenth of a small network's
        time.
        """
        spec, arrays, workspace = self.spec, self.backend.arrays, self._workspaces.borrow()
        path = np.zeros((1, len(spec.gates)), np.int64)
        check_finite(x, first)
        form, features = Form(0), x
        for number, gate in enumerate(spec.gates):
            shape = self.shape(form, size)
            kept = workspace.rows(("out", number), 1, arrays.row(shape.rows_out[0]))
            logits = workspace.rows(("gate", number), 1, shape.rows_out[1], floats=True)
            self._run_program(form, features, (kept, logits), size, wide=True)
            option = int(decide(number, self._gate_logits(logits), _FIRST)[0])
            path[0, number] = option
            before = spec.gates[number - 1].choices[path[0, number - 1]] if number else 0
            form, features = Form(number + 1, before, gate.choices[option]), kept
        answer = workspace.rows("answer", 1, (spec.num_classes,), floats=True)
        self._run_program(form, features, (answer,), size, wide=True)
        result = arrays.host(answer).copy()
        self._workspaces.give_back(workspace)
        return result, path

    def _onward(
        self,
        workspace: Workspace,
        trunk: Bucket,
        decide: Decide,
        options_BG: np.ndarray,
        logits_BN: np.ndarray,
        size: tuple[int, int],
        limits: Sequence[int] | None,
    ) -> None:
        """From the first gate to the end, for all rows of the trunk; fills the results."""
        arrays, buckets = self.backend.arrays, [trunk]
        for number, gate in enumerate(self.spec.gates, start=1):
            # (form, bucket, which of its rows or None for all), by the option that they took
            arriving: dict[int, list[tuple[Form, Bucket, np.ndarray | None]]] = {}
            for bucket in buckets:
                before = self.spec.gates[number - 2].choices[bucket.option] if number > 1 else 0
                picked = decide(number - 1, self._gate_logits(bucket.gate_logits), bucket.members)
                if self._merge is not None:
                    allowed = len(gate.choices) if limits is None else limits[number - 1] + 1
                    counts = np.bincount(picked, minlength=allowed)
                    picked = self._merge(number - 1, before, counts)[picked]
                options_BG[bucket.members, number - 1] = picked
                for option, part in _by_option(picked):
                    form = Form(number, before, gate.choices[option])
                    arriving.setdefault(option, []).append((form, bucket, part))
            jobs, buckets = [], []
            for option, parts in sorted(arriving.items()):
                joining = [
                    bucket.members if part is None else bucket.members[part]
                    for _, bucket, part in parts
                ]
                members = joining[0] if len(joining) == 1 else np.concatenate(joining)
                joined = self._bucket(workspace, number, option, members, size)
                buckets.append(joined)
                start = 0
                for (form, bucket, part), arrived in zip(parts, joining, strict=True):
                    stop = start + len(arrived)
                    outs = joined.outs(start, stop)
                    jobs.append(Job(form, bucket.features, part, outs, len(arrived)))
                    start = stop
            self.run(jobs, size)
        for bucket in buckets:
            logits_BN[bucket.members] = arrays.host(bucket.features)

    def _escalated(
        self,
        workspace: Workspace,
        trunk: Bucket,
        rows: Escalated,
        size: tuple[int, int],
    ) -> np.ndarray:
        """From the first gate to the end, some rows of the trunk along one path; no gate is asked.

        Returns their logits. Buffers may be those of the first pass, which is over.
        """
        members, before, features = rows.members, 0, trunk.features
        # the trunk's rows stand in order: their numbers are those in the batch
        picked = None if len(members) == len(trunk.members) else members
        for number, (gate, option) in enumerate(zip(self.spec.gates, rows.path, strict=True), 1):
            made = self._bucket(workspace, number, option, members, size)
            form = Form(number, before, gate.choices[option])
            self.run([Job(form, features, picked, made.outs(), len(members))], size)
            features, before, picked = made.features, form.choice, None
        return self.backend.arrays.host(features)

    def _second_look(
        self,
        workspace: Workspace,
        x: Array,
        looking: Escalated,
        logits_BN: np.ndarray,
        size: tuple[int, int],
    ) -> None:
        """The mirror images of some rows, all the way along one path; answers are averaged."""
        rows = looking.members
        images = self.backend.arrays.mirrored(x, rows)
        # beside the features of the batch, which a later pass may need
        trunk = self._bucket(workspace, 0, 1, np.arange(len(rows)), size)
        self.run([Job(Form(0), images, None, trunk.outs(), len(rows))], size)
        again = Escalated(trunk.members, looking.path)
        mirror_BN = self._escalated(workspace, trunk, again, size)
        logits_BN[rows] = averaged(logits_BN[rows], mirror_BN)

    def _gate_logits(self, logits: Array) -> np.ndarray:
        logits_BK = self.backend.arrays.host(logits)
        if not np.isfinite(logits_BK).all():
            raise DynaslimError(
                "a gate's logits are not finite; the network's weights or BN statistics are damaged"
            )
        return logits_BK

    def _bucket(
        self,
        workspace: Workspace,
        number: int,
        option: int,
        members: np.ndarray,
        size: tuple[int, int],
    ) -> Bucket:
        """Room for the rows that leave a segment with the same width."""
        spec, arrays = self.spec, self.backend.arrays
        choice = spec.gates[number - 1].choices[option] if number else 0
        # the width before does not matter to what leaves a segment
        shape = self.shape(Form(number, 0, choice), size)
        last = number == len(spec.gates)
        row = arrays.row(shape.rows_out[0])
        features = workspace.rows(("out", number, option), len(members), row, floats=last)
        if last:
            return Bucket(option, members, features, None)
        logits = workspace.rows(
            ("gate", number, option), len(members), shape.rows_out[1], floats=True
        )
        return Bucket(option, members, features, logits)

    # -- one step -----------------------------------------------------------------------------

    def run(self, jobs: Sequence[Job], size: tuple[int, int]) -> None:
        """Divide the rows of all jobs among the cores and run them."""
        backend = self.backend
        timings = self.timings.get(size) or self.timings.setdefault(size, Timings())
        caps = [self._cap(job.form, size) for job in jobs]
        seconds = [timings.get(job.form, self.madds(job.form, size)) for job in jobs]
        plan = plan_step([job.rows for job in jobs], seconds, caps, backend.workers)
        if plan.wide:
            for piece in plan.pieces:
                job = jobs[piece.bucket]
                self._piece(job, piece, self.program(job.form, size, wide=True), size)
            return
        # compiled here, in one thread, before any piece waits for it
        programs = [self.program(job.form, size, wide=False) for job in jobs]

        def task(piece: MicroBatch) -> Callable[[], None]:
            def run() -> None:
                job = jobs[piece.bucket]
                start = time.perf_counter()
                self._piece(job, piece, programs[piece.bucket], size)
                timings.add(job.form, piece.stop - piece.start, time.perf_counter() - start)

            return run

        self._workers.run([task(piece) for piece in plan.pieces])

    def side_by_side(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run tasks on the workers, as the pieces of a step are."""
        self._workers.run(tasks)

    def _cap(self, form: Form, size: tuple[int, int]) -> int:
        key = (form, size)
        cap = self._caps.get(key)
        if cap is None:
            cap, sizes = self._rows_per_piece, self.backend.sizes
            if sizes is not None:
                cap = sizes[-1] if cap is None else min(cap, sizes[-1])
            elif cap is None:
                cap = rows_in_cache(self.shape(form, size).peak, self.backend.piece_values)
            self._caps[key] = cap
        return cap

    def _piece(self, job: Job, piece: MicroBatch, program: Program, size: tuple[int, int]) -> None:
        arrays, rows = self.backend.arrays, piece.stop - piece.start
        outs = [out[piece.start : piece.stop] for out in job.outs]
        if job.picked is None:
            x = job.source[piece.start : piece.stop]
        else:
            row = job.source.shape[1:]
            x = self._workspaces.of_thread().rows(("in", job.form.segment), rows, tuple(row))
            arrays.take(job.source, job.picked[piece.start : piece.stop], x)
        if job.form.segment == 0:
            check_finite(x, job.first + piece.start)
        self._call(program, x, outs, job.form)

    def _run_program(
        self, form: Form, x: Array, outs: Sequence[Array], size: tuple[int, int], *, wide: bool
    ) -> None:
        self._call(self.program(form, size, wide=wide), x, outs, form)

    def _call(self, program: Program, x: Array, outs: Sequence[Array], form: Form) -> None:
        sizes = self.backend.sizes
        if sizes is None or len(x) in sizes:
            program(x, outs)
            return
        rows = next(n for n in sizes if n > len(x))
        run_padded(program, x, outs, rows, self._workspaces.of_thread(), form)

    def close(self) -> None:
        """Let the threads go."""
        self._workers.close()


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
escalate; when the next are asked for, the logits hold what these answered."""
