"""Runs the images of many callers in batches on one engine, with a bounded queue and deadlines.

    with Batcher(engine) as batcher:
        answers = batcher.submit([pixels_CSS]).result().answers

One thread takes the queued images as soon as the engine is free. It does not wait for a batch to
fill up: images queue while the engine runs, and form the next batch. It waits only for images that
are being decoded, and for a few milliseconds at most (`max_wait_ms`).

Suffixes: B rows of a batch, C channels, G gates, K likeliest classes, N classes, S side in pixels.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, field
from typing import Final

import numpy as np

from dynaslim.errors import DynaslimError, check
from dynaslim.predict import Answer, answers_of, preprocessing_of
from dynaslim.preprocessing import Preprocessing, normalise_pixels
from dynaslim.runtime.adaptive import Throughput
from dynaslim.runtime.engine import Engine, Escalate
from dynaslim.runtime.options import RoutedOutput
from dynaslim.serve.budgets import Budgets, Setting
from dynaslim.serve.options import ServeOptions

LEAST_ROWS: Final = 4
"""`max_batch_ms` never limits a batch to fewer rows than this."""
MARGIN: Final = 2.0
"""A request is refused if less than this multiple of its expected wait is left before its deadline.
Speed varies, and a shorter queue keeps the engine just as busy."""
LEAST_RETRY_S: Final = 1.0
"""Smallest value of `retry_after_s`."""


class QueueFullError(DynaslimError):
    """The queue is full or the wait too long; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = max(LEAST_RETRY_S, retry_after_s)


class DeadlineError(DynaslimError):
    """The deadline passed before the images were run."""


class StoppingError(DynaslimError):
    """The batcher accepts no more images."""


@dataclass(slots=True, eq=False)
class WorkItem:
    """The images (rows) of one request; they may run in several batches."""

    rows: InitVar[int]
    setting: Setting
    top_k: int
    deadline: float | None
    future: Future[WorkItem] = field(default_factory=Future)
    """Resolved with this item once all its rows have answers, or with its error."""
    answers: list[Answer | None] = field(init=False)
    pixels: list[np.ndarray | None] = field(init=False)
    ready: deque[int] = field(default_factory=deque)
    """Decoded rows that wait for the engine."""
    undecoded: int = field(init=False)
    postponed: int = 0
    """Number of undecoded rows that no batch waits for."""
    missing: int = field(init=False)
    """Number of rows without an answer."""
    error: BaseException | None = None
    used: str | None = None
    """The budget that its most recent rows ran with."""
    batch_size: int = 0
    """Size of the largest batch that any of its rows ran in."""
    decoded: float = 0.0
    """When its last row was decoded."""
    started: float = 0.0
    """When the engine started its last rows."""
    finished: float = 0.0
    """When the engine finished its last rows."""

    def __post_init__(self, rows: int) -> None:
        self.answers, self.pixels = [None] * rows, [None] * rows
        self.undecoded = self.missing = rows
        self.future.set_running_or_notify_cancel()  # the caller can no longer cancel it

    @property
    def done(self) -> bool:
        """Whether all rows have answers, or the item has failed or was cancelled."""
        return self.missing == 0

    def resolve(self) -> None:
        """Resolve the future; to be called without holding the batcher's lock."""
        if self.error is None:
            self.future.set_result(self)
        else:
            self.future.set_exception(self.error)


Batch = tuple[Setting, list[tuple[WorkItem, int]], list[np.ndarray]]
OnBatch = Callable[[RoutedOutput, Setting, float], None]
"""Called with the engine's output for a batch, the batch's setting and its time in seconds."""


def inputs_of(rows: Sequence[np.ndarray], preprocessing: Preprocessing) -> np.ndarray:
    """Stack rows (C, S, S) into (B, C, S, S); uint8 pixels are normalised, float32 rows kept."""
    if all(row.dtype == np.uint8 for row in rows):
        return normalise_pixels(np.stack(rows), preprocessing)
    one = [row if row.dtype == np.float32 else normalise_pixels(row, preprocessing) for row in rows]
    return np.stack(one)


class FairSemaphore:
    """A fair semaphore: lets `places` batches run at once, first come, first served.

    The standard library's semaphores are not fair: a model with a long queue would keep its place.
    """

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()
        self._free = places
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        mine = threading.Lock()
        with self._lock:
            self._free -= 1
            if self._free < 0:
                mine.acquire()
                self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._free += 1
            if self._waiting:
                self._waiting.popleft().release()


class Batcher:
    """Runs images from any thread in batches on an engine; see the module's docstring."""

    def __init__(
        self,
        engine: Engine,
        options: ServeOptions | None = None,
        *,
        on_batch: OnBatch | None = None,
        clock: Callable[[], float] = time.monotonic,
        turns: AbstractContextManager[object] | None = None,
    ) -> None:
        """Start the thread. Batchers with the same `turns` take turns on the cores.

        Raises:
            UsageError: if the engine has no preprocessing or cannot run with the options' budget.
        """
        self.options = ServeOptions() if options is None else options
        self._engine = engine
        self.preprocessing = preprocessing_of(engine)
        self._clock = clock
        self.budgets = Budgets(engine.curve, self.options, clock())
        self._on_batch = on_batch
        self._turns = nullcontext() if turns is None else turns
        self.throughput = Throughput()
        """Throughput that counts the time in which batches of other models ran."""
        self._speed = Throughput()
        """Throughput without that time."""
        self._changed = threading.Condition()
        self._ready: deque[WorkItem] = deque()
        """Items with decoded rows, in the order in which their first rows were decoded."""
        self._ready_rows = 0
        """Decoded rows in the queue."""
        self._decoding = 0
        """Rows in the queue that are not decoded yet, without the postponed ones."""
        self._postponed = 0
        """Rows of large images: in the queue, but no batch waits for them."""
        self._running = 0
        self._busy_since = 0.0
        """When the engine last finished a batch, or the first row arrived while it was idle."""
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
    ) -> Future[WorkItem]:
        """Queue images (C, S, S), each uint8 as `decode_image` returns it or normalised float32.

        The future cannot be cancelled. Its result has the `answers` in the order of the images. It
        fails with `DeadlineError` if they have not run after `deadline_s` seconds, or with the
        engine's error.

        Raises:
            UsageError: for pixels of another shape or type or not finite, no images, or a budget
                that the network cannot run with.
            QueueFullError: if there is no room, or the deadline would pass during the wait.
            StoppingError: if the batcher accepts no more images.
        """
        side, channels = self.preprocessing.image_size_px, self.preprocessing.channels
        for one in pixels:
            check(
                one.dtype in (np.uint8, np.float32) and one.shape == (channels, side, side),
                f"pixels {one.dtype} {one.shape}: give uint8 ({channels}, {side}, {side}), or "
                f"float32 if they are normalised",
            )
            check(one.dtype == np.uint8 or bool(np.isfinite(one).all()), "pixels: must be finite")
        check(bool(pixels), "no images: give at least one")
        item = self.admit(
            len(pixels),
            self.budgets.parse(budget, escalate),
            top_k=top_k,
            deadline=None if deadline_s is None else self._clock() + deadline_s,
        )
        for row, one in enumerate(pixels):
            self.put(item, row, one)
        return item.future

    def admit(self, rows: int, setting: Setting, *, top_k: int, deadline: float | None) -> WorkItem:
        """Reserve room for rows that `put` will deliver later; raises errors as `submit`."""
        with self._changed:
            self._check_room(rows, deadline)
            self._expect(rows)
            return WorkItem(rows, setting, top_k, deadline)

    def _expect(self, rows: int) -> None:
        """Count rows that will be decoded."""
        if not self._unanswered:
            self._busy_since = self._clock()
        self._decoding += rows

    def check_room(self, deadline: float | None = None) -> None:
        """Raise the error that `admit` would raise for one row, if any."""
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
        ahead = self._unanswered
        if deadline is None or not ahead:
            return
        # answers arrive in whole batches, which rows of other requests fill up
        batch = self._batch_rows()
        wait_s = self.throughput.seconds_for(-(-(ahead + rows) // batch) * batch)
        late = self._clock() + MARGIN * wait_s - deadline
        if late > 0:
            raise QueueFullError(
                f"{ahead} images are before it, more than can be run in the time that the request "
                f"has; try again later",
                late,
            )

    def grow(self, item: WorkItem, rows: int) -> None:
        """Reserve room for more rows of an item; raises `QueueFullError` if there is none."""
        with self._changed:
            if item.done:
                return
            over = self.waiting + rows - self.options.queue
            if over > 0:
                raise QueueFullError(
                    f"the queue has no room for {len(item.answers) + rows} images; try again later",
                    self.throughput.seconds_for(over),
                )
            self._decoding += rows
            item.undecoded += rows
            item.missing += rows
            item.answers += [None] * rows
            item.pixels += [None] * rows

    def postpone(self, item: WorkItem) -> None:
        """Mark one image of an item as large: no batch waits for it, and it does not count towards
        expected waits. Raises `QueueFullError` if such images already fill their half of the queue.
        """
        with self._changed:
            if item.done:
                return
            if self._postponed >= max(self.options.queue // 2, self.options.max_images):
                raise QueueFullError("too many large images at once; try again later", 0)
            item.postponed += 1
            self._postponed += 1
            self._decoding -= 1
            if self._idle and not self._decoding:
                self._changed.notify_all()

    def put(
        self, item: WorkItem, row: int, pixels_CSS: np.ndarray, *, postponed: bool = False
    ) -> None:
        """Deliver the pixels of one row; set `postponed` if `postpone` was called for it."""
        with self._changed:
            if item.done:
                return
            if postponed:  # it now counts like any other row
                self._expect(1)
                item.postponed -= 1
                self._postponed -= 1
            if not item.ready:
                self._ready.append(item)
            item.pixels[row] = pixels_CSS
            item.ready.append(row)
            item.undecoded -= 1
            if not item.undecoded:
                item.decoded = self._clock()
            self._decoding -= 1
            self._ready_rows += 1
            if self._idle and (
                self._ready_rows == 1
                or not self._decoding
                or self._ready_rows >= self._batch_rows()
            ):
                self._changed.notify_all()

    def fail(self, item: WorkItem, error: BaseException) -> None:
        """Fail an item with an error, unless it is done."""
        with self._changed:
            if item.done:
                return
            self._drop(item, error)
        item.resolve()

    def cancel(self, item: WorkItem) -> None:
        """Drop an item whose client has disconnected or whose time is up, unless it is done."""
        with self._changed:
            if not item.done:
                self._drop(item, None)

    def _drop(self, item: WorkItem, error: BaseException | None) -> None:
        self._decoding -= item.undecoded - item.postponed
        self._postponed -= item.postponed
        self._ready_rows -= len(item.ready)
        if item.ready:
            self._ready.remove(item)
            item.ready.clear()
        item.pixels.clear()
        item.error = error
        item.undecoded = item.postponed = item.missing = 0
        if self._idle and not self._decoding:
            self._changed.notify_all()

    # -- state --------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Images in the queue, including those that are being decoded."""
        return self._decoding + self._ready_rows + self._postponed

    @property
    def _unanswered(self) -> int:
        """Rows in the queue or in the engine, without the postponed ones."""
        return self._decoding + self._ready_rows + self._running

    @property
    def expected_wait_s(self) -> float:
        """How long an image that arrives now will wait, at the recent throughput."""
        return self.throughput.seconds_for(self._unanswered)

    @property
    def budget(self) -> Setting:
        """The setting of requests without a budget, at the present load."""
        with self._changed:
            wait_s = self.throughput.seconds_for(self._ready_rows)
            self.budgets.observe(wait_s, self._clock())  # it also rises over time
            return self.budgets.current

    def observe(self, rows: int, seconds: float, waited_s: float = 0.0) -> None:
        """Record a batch and its time, which includes `waited_s` of waiting for other models."""
        self.throughput.add(rows, max(1e-6, seconds))
        self._speed.add(rows, max(1e-6, seconds - waited_s))

    def _batch_rows(self) -> int:
        """The most rows that the next batch may have."""
        most = self.options.max_batch
        least = min(LEAST_ROWS, most)
        return self._speed.rows_in(self.options.max_batch_ms / 1000, least, most)

    def stop(self) -> None:
        """Accept no more images; those in the queue are answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """Call `stop`, wait until all images are answered, and end the thread."""
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
        while self._wait():
            ready = self._clock()
            with self._turns:
                batch = self._take()
                if batch is None:
                    continue
                setting, members, pixels = batch
                try:
                    self._run_batch(setting, members, pixels, self._clock() - ready)
                except Exception as error:
                    for item in dict.fromkeys(item for item, _ in members):
                        self.fail(item, error)
                finally:
                    del batch, members, pixels  # free the pixels before the thread waits
                    with self._changed:
                        self._running = 0
                        self._busy_since = self._clock()

    def _wait(self) -> bool:
        """Wait until a batch may run; returns False after `close`."""
        longest = self.options.max_wait_ms / 1000
        until: float | None = None
        while True:
            with self._changed:
                now = self._clock()
                late = self._expired(now)
                if not late:
                    if self._ready:
                        if (
                            not self._decoding
                            or self._ready_rows >= self._batch_rows()
                            or (until is not None and now >= until)
                        ):
                            return True
                        until = now + longest if until is None else until
                    elif self._closed and not self.waiting:
                        return False
                    else:
                        until = None
                    self._idle = True
                    self._changed.wait(None if until is None else max(0.0, until - now))
                    self._idle = False
            for item in late:
                item.resolve()

    def _expired(self, now: float) -> list[WorkItem]:
        late = [j for j in self._ready if j.deadline is not None and j.deadline <= now]
        for item in late:
            self._drop(item, DeadlineError("the deadline passed before the images were run"))
        return late

    def _take(self) -> Batch | None:
        """The next batch; None if all rows were cancelled or late while other models ran."""
        with self._changed:
            now = self._clock()
            late = self._expired(now)
            batch = self._pick(now) if self._ready else None
        for item in late:
            item.resolve()
        return batch

    def _pick(self, now: float) -> Batch:
        """Take rows that share a setting for the next batch, the oldest first."""
        self.budgets.observe(self.throughput.seconds_for(self._ready_rows), now)
        setting = self.budgets.limited_by_load(self._ready[0].setting)
        members: list[tuple[WorkItem, int]] = []
        pixels: list[np.ndarray] = []
        left: deque[WorkItem] = deque()
        most = self._batch_rows()
        while self._ready and len(members) < most:
            item = self._ready.popleft()
            own = self.budgets.limited_by_load(item.setting)
            if not own.runs_as(setting):
                left.append(item)
                continue
            while item.ready and len(members) < most:
                row = item.ready.popleft()
                members.append((item, row))
                one = item.pixels[row]
                assert one is not None, "a ready row has its pixels"
                pixels.append(one)
                item.pixels[row] = None
            item.started = now
            item.used = own.used
            if item.ready:
                left.append(item)
        self._ready.extendleft(reversed(left))
        for item in dict.fromkeys(item for item, _ in members):
            item.batch_size = max(item.batch_size, len(members))
        self._ready_rows -= len(members)
        self._running = len(members)
        return setting, members, pixels

    def _run_batch(
        self,
        setting: Setting,
        members: list[tuple[WorkItem, int]],
        pixels: list[np.ndarray],
        waited_s: float,
    ) -> None:
        start = self._clock()
        x_BCSS = inputs_of(pixels, self.preprocessing)
        if setting.hold:
            output = self._engine(x_BCSS, budget=setting.used, escalate=setting.escalate, hold=True)
        else:
            output = self._engine(x_BCSS, budget=setting.point, escalate=setting.escalate)
        now = self._clock()
        answers = answers_of(output, max(item.top_k for item, _ in members))
        done = []
        with self._changed:
            self.observe(len(members), now - self._busy_since, waited_s)
            for (item, row), answer in zip(members, answers, strict=True):
                if item.done:  # cancelled or late
                    continue
                item.answers[row] = answer._replace(top=answer.top[: item.top_k])
                item.finished = now
                item.missing -= 1
                if not item.missing:
                    done.append(item)
        for item in done:
            item.resolve()
        if self._on_batch is not None:
            self._on_batch(output, setting, now - start)
