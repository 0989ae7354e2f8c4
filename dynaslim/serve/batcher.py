"""Images of many callers, run by one engine in batches: a bounded queue, deadlines, no HTTP.

    with Batcher(engine) as batcher:
        answers = batcher.submit([pixels_CSS]).result().answers

A thread takes what is there whenever the engine is free. It does not wait for a batch to fill:
while the engine works, the next batch gathers by itself. Only for images that are on their way (a
decoder has them) it waits, for a few milliseconds.

Suffixes: B rows of a batch, C channels, S side in pixels.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

import numpy as np

from dynaslim.errors import UsageError, check
from dynaslim.preprocessing import normalise_pixels
from dynaslim.serve.budgets import Budgets, Escalate, Setting
from dynaslim.serve.jobs import (
    BatchEngine,
    BatchReport,
    DeadlineError,
    Job,
    QueueFullError,
    StoppingError,
    answers_of,
)
from dynaslim.serve.load import Throughput
from dynaslim.serve.options import ServeOptions

LEAST_ROWS: Final = 4
"""Of a batch that is cut short for time."""
MARGIN: Final = 2.0
"""Times the expected wait that must be left before a deadline: speed varies, and a shorter queue
keeps the engine as busy."""


class Batcher:
    """Runs an engine for callers of any thread; see above."""

    def __init__(
        self,
        engine: BatchEngine,
        options: ServeOptions | None = None,
        *,
        on_batch: Callable[[BatchReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread.

        Raises:
            UsageError: if the engine does not say how images are prepared, or has no such budget.
        """
        self.options = ServeOptions() if options is None else options
        if engine.preprocessing is None:
            raise UsageError("the engine does not say how images are prepared (preprocessing)")
        self._engine = engine
        self._preprocessing = engine.preprocessing
        self._clock = clock
        self.budgets = Budgets(engine.curve, self.options, clock())
        self._on_batch = on_batch
        self.throughput = Throughput()
        self._changed = threading.Condition()
        self._ready: deque[Job] = deque()
        """Jobs with rows for the engine, in the order they came to have some."""
        self._ready_rows = 0
        self._decoding = 0
        self._waiting = 0
        """Rows that are decoded, or will be soon."""
        self._postponed = 0
        """Rows that will be at some time."""
        self._running = 0
        self._busy_since = 0.0
        """When the oldest row that nobody has answered came, or the last batch ended."""
        self._stopping = False
        self._closed = False
        self._idle = False
        self._thread = threading.Thread(target=self._run, name="dynaslim-batcher", daemon=True)
        self._thread.start()

    # -- callers ------------------------------------------------------------------------------

    def submit(
        self,
        pixels: Sequence[np.ndarray],
        *,
        budget: str | None = None,
        escalate: Escalate = "auto",
        top_k: int = 5,
        deadline_s: float | None = None,
    ) -> Future[Job]:
        """Ask for images, each uint8 (C, S, S) as `decode_image` gives them.

        The future's result has their `answers` in order; it fails with `DeadlineError` if they have
        not been run after `deadline_s`, and with what the engine raised.

        Raises:
            UsageError: for pixels of another shape, no images, or a budget that the network cannot
                be asked for.
            QueueFullError: if there is no room, or the wait would be longer than the deadline.
            StoppingError: if the batcher takes no more.
        """
        side, channels = self._preprocessing.image_size_px, self._preprocessing.channels
        for one in pixels:
            check(
                one.dtype == np.uint8 and one.shape == (channels, side, side),
                f"pixels {one.dtype} {one.shape}: give uint8 ({channels}, {side}, {side})",
            )
        check(bool(pixels), "no images: give at least one")
        future: Future[Job] = Future()

        def deliver(job: Job) -> None:
            if job.error is None:
                future.set_result(job)
            else:
                future.set_exception(job.error)

        job = self.admit(
            len(pixels),
            self.budgets.setting(budget, escalate),
            top_k=top_k,
            deadline=None if deadline_s is None else self._clock() + deadline_s,
            on_done=deliver,
        )
        for row, one in enumerate(pixels):
            self.put(job, row, one)
        return future

    def admit(
        self,
        rows: int,
        setting: Setting,
        *,
        top_k: int,
        deadline: float | None,
        on_done: Callable[[Job], None],
    ) -> Job:
        """Room for rows that will be `put`; `on_done` is called once, by any thread.

        Raises:
            QueueFullError, StoppingError: as `submit`.
        """
        with self._changed:
            self._check_room(rows, deadline)
            if not self._waiting + self._running:
                self._busy_since = self._clock()
            self._waiting += rows
            self._decoding += rows
            return Job(rows, setting, top_k, deadline, on_done)

    def check_room(self, deadline: float | None = None) -> None:
        """Raise what `admit` would for one row."""
        with self._changed:
            self._check_room(1, deadline)

    def _check_room(self, rows: int, deadline: float | None) -> None:
        if self._stopping:
            raise StoppingError("the server is stopping; ask another one")
        over = self.waiting + rows - self.options.queue
        if over > 0:
            raise QueueFullError(
                f"the queue is full ({self.waiting} of {self.options.queue} images); try again "
                f"later",
                self.throughput.seconds_for(over),
            )
        ahead = self._waiting + self._running
        if deadline is None or not ahead:
            return
        # rows come back by whole batches, which others fill up
        batch = self._batch_rows()
        wait_s = self.throughput.seconds_for(-(-(ahead + rows) // batch) * batch)
        late = self._clock() + MARGIN * wait_s - deadline
        if late > 0:
            raise QueueFullError(
                f"{ahead} images are before it, more than can be run in the time that the request "
                f"has; try again later",
                late,
            )

    def grow(self, job: Job, rows: int) -> None:
        """Room for more rows of a job.

        Raises:
            QueueFullError: if there is none; the job stays as it was.
        """
        with self._changed:
            if job.done:
                return
            over = self.waiting + rows - self.options.queue
            if over > 0:
                raise QueueFullError(
                    f"the queue has no room for {len(job.answers) + rows} images; try again later",
                    self.throughput.seconds_for(over),
                )
            self._waiting += rows
            self._decoding += rows
            job.unread += rows
            job.waiting += rows
            job.missing += rows
            job.answers += [None] * rows
            job.pixels += [None] * rows

    def postpone(self, job: Job) -> None:
        """An image of a job takes long to decode: nobody waits for it, or is told to come again.

        Raises:
            QueueFullError: if such images have their half of the queue already.
        """
        with self._changed:
            if job.done:
                return
            if self._postponed >= max(self.options.queue // 2, self.options.max_images):
                raise QueueFullError("too many large images at once; try again later", 0)
            job.postponed += 1
            self._postponed += 1
            job.waiting -= 1
            self._waiting -= 1
            self._decoding -= 1
            if self._idle and not self._decoding:
                self._changed.notify_all()

    def put(self, job: Job, row: int, pixels_CSS: np.ndarray, *, postponed: bool = False) -> None:
        """An image of a job is decoded."""
        with self._changed:
            if job.done:
                return
            if postponed:  # it comes to the others now
                if not self._waiting + self._running:
                    self._busy_since = self._clock()
                job.postponed -= 1
                self._postponed -= 1
                job.waiting += 1
                self._waiting += 1
                self._decoding += 1
            if not job.ready:
                self._ready.append(job)
            job.pixels[row] = pixels_CSS
            job.ready.append(row)
            job.unread -= 1
            if not job.unread:
                job.decoded = self._clock()
            self._decoding -= 1
            self._ready_rows += 1
            if self._idle and (
                self._ready_rows == 1
                or not self._decoding
                or self._ready_rows >= self._batch_rows()
            ):
                self._changed.notify_all()

    def fail(self, job: Job, error: BaseException) -> None:
        """A job cannot be done; it is told why unless it is done already."""
        with self._changed:
            if job.done:
                return
            self._drop(job, error)
        job.on_done(job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more; `on_done` will not be called."""
        with self._changed:
            if not job.done:
                self._drop(job, None)

    def _drop(self, job: Job, error: BaseException | None) -> None:
        self._waiting -= job.waiting
        self._decoding -= job.unread - job.postponed
        self._postponed -= job.postponed
        self._ready_rows -= len(job.ready)
        if job.ready:
            self._ready.remove(job)
            job.ready.clear()
        job.pixels.clear()
        job.error = error
        job.waiting = job.unread = job.postponed = job.missing = 0
        if self._idle and not self._decoding:
            self._changed.notify_all()

    # -- state --------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Images in the queue, those that are being decoded included."""
        return self._waiting + self._postponed

    @property
    def expected_wait_s(self) -> float:
        """How long an image that comes now will wait, by the throughput of late."""
        return self.throughput.seconds_for(self._waiting + self._running)

    @property
    def budget(self) -> Setting:
        """What requests run with now if they name no budget."""
        with self._changed:
            wait_s = self.throughput.seconds_for(self._ready_rows)
            self.budgets.observe(wait_s, self._clock())  # time alone may have raised it
            return self.budgets.current

    def _batch_rows(self) -> int:
        """Most rows of the next batch."""
        most = self.options.max_batch
        least = min(LEAST_ROWS, most)
        return self.throughput.rows_in(self.options.max_batch_ms / 1000, least, most)

    def stop(self) -> None:
        """Take no more; what was taken is answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """`stop`, wait until all is answered, and end the thread."""
        with self._changed:
            self._stopping = self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            setting, members, pixels = batch
            try:
                self._answer(setting, members, pixels)
            except Exception as error:
                for job in dict.fromkeys(job for job, _ in members):
                    self.fail(job, error)
            finally:
                del batch, members, pixels  # not to be kept while the next are waited for
                with self._changed:
                    self._running = 0
                    self._busy_since = self._clock()

    def _next(self) -> tuple[Setting, list[tuple[Job, int]], list[np.ndarray]] | None:
        """Rows of one setting, the oldest first; None at the end."""
        longest = self.options.max_wait_ms / 1000
        while True:
            late: list[Job] = []
            try:
                with self._changed:
                    until: float | None = None
                    while True:
                        now = self._clock()
                        late = self._expired(now)
                        if late:
                            break
                        if self._ready:
                            if (
                                not self._decoding
                                or self._ready_rows >= self._batch_rows()
                                or (until is not None and now >= until)
                            ):
                                return self._take(now)
                            until = now + longest if until is None else until
                        elif self._closed and not self.waiting:
                            return None
                        else:
                            until = None
                        self._idle = True
                        self._changed.wait(None if until is None else max(0.0, until - now))
                        self._idle = False
            finally:
                for job in late:
                    job.on_done(job)

    def _expired(self, now: float) -> list[Job]:
        late = [j for j in self._ready if j.deadline is not None and j.deadline <= now]
        for job in late:
            self._drop(job, DeadlineError("the deadline passed before the images were run"))
        return late

    def _take(self, now: float) -> tuple[Setting, list[tuple[Job, int]], list[np.ndarray]]:
        self.budgets.observe(self.throughput.seconds_for(self._ready_rows), now)
        setting = self.budgets.in_use(self._ready[0].setting)
        members: list[tuple[Job, int]] = []
        pixels: list[np.ndarray] = []
        left: deque[Job] = deque()
        most = self._batch_rows()
        while self._ready and len(members) < most:
            job = self._ready.popleft()
            own = self.budgets.in_use(job.setting)
            if not own.runs_as(setting):
                left.append(job)
                continue
            while job.ready and len(members) < most:
                row = job.ready.popleft()
                members.append((job, row))
                one = job.pixels[row]
                assert one is not None, "a ready row has its pixels"
                pixels.append(one)
                job.pixels[row] = None
                job.waiting -= 1
            job.started = now
            job.used = own.used
            if job.ready:
                left.append(job)
        self._ready.extendleft(reversed(left))
        for job in dict.fromkeys(job for job, _ in members):
            job.batch_size = max(job.batch_size, len(members))
        self._waiting -= len(members)
        self._ready_rows -= len(members)
        self._running = len(members)
        return setting, members, pixels

    def _answer(
        self, setting: Setting, members: list[tuple[Job, int]], pixels: list[np.ndarray]
    ) -> None:
        start = self._clock()
        x_BCSS = normalise_pixels(np.stack(pixels), self._preprocessing)
        if setting.hold:
            output = self._engine(x_BCSS, budget=setting.used, escalate=setting.escalate, hold=True)
        else:
            output = self._engine(x_BCSS, budget=setting.point, escalate=setting.escalate)
        now = self._clock()
        answers = answers_of(output, max(job.top_k for job, _ in members))
        done = []
        with self._changed:
            self.throughput.add(len(members), max(1e-6, now - self._busy_since))
            for (job, row), answer in zip(members, answers, strict=True):
                if job.done:  # its caller has left meanwhile
                    continue
                job.answers[row] = answer._replace(top=answer.top[: job.top_k])
                job.finished = now
                job.missing -= 1
                if not job.missing:
                    done.append(job)
        for job in done:
            job.on_done(job)
        if self._on_batch is not None:
            report = BatchReport(
                len(members),
                now - start,
                np.asarray(output.routes),
                np.asarray(output.madds),
                int(np.count_nonzero(output.escalated)),
                int(np.count_nonzero(output.mirrored)),
                expected_madds=None if setting.point is None else setting.point.madds,
            )
            self._on_batch(report)
