"""Predictions for a stream of frames, one at a time: a growing folder, or a pipe of JPEGs.

A thread reads frames and queues them. `Stream` takes the oldest frame, chooses a budget by the time
left until its latency bound, and answers it. The latency of a frame is the time from when it was
read, or its file was found, to its answer. This module does not need torch.

Suffixes: C channels, S side in pixels, T side of a thumbnail.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from PIL import Image

from dynaslim.data.decode import is_image_file
from dynaslim.errors import check
from dynaslim.predict import (
    Picture,
    Prediction,
    Unreadable,
    answers_for,
    picture_of,
    preprocessing_of,
    read_picture,
    route_names,
)
from dynaslim.runtime.adaptive import BudgetControl, Throughput, levels
from dynaslim.runtime.budget import needed_curve, parse_budget

if TYPE_CHECKING:
    from dynaslim.runtime.engine import Engine

MOST_WAITING: Final = 256
"""Most frames in the queue."""
MOST_BYTES: Final = 1 << 26
"""Most bytes of one JPEG."""
THUMBNAIL: Final = 16
"""Cells per side of the thumbnails by which frames are compared."""
POLL_S: Final = 0.01
"""Seconds between two scans of a folder."""
_LOOK_S: Final = 0.1
"""Seconds after which a waiting thread checks whether it should stop."""
_RECENT_NS: Final = 1_000_000_000
"""Within this time after a folder's time stamp, it may have changed again without a new one."""
_BIN: Final = math.log(1.01)
"""Width of a histogram bin of latencies, in log space."""


@dataclass(frozen=True)
class StreamOptions:
    """Options for answering a stream of frames."""

    budget: str | None = None
    """Budget of a frame; with `latency_ms`, the highest. Default: as trained, or 1."""
    latency_ms: float | None = None
    """Bound on the latency of a frame, kept by lowering the budget and then by dropping frames.
    None: every frame is answered, with one budget."""
    same_frame: float | None = None
    """A frame that differs by at most this much from the last one that the network answered reuses
    its answer. The difference is the largest of 16 x 16 cells' means, in 0..255. None: never."""

    def __post_init__(self) -> None:
        if self.budget is not None:
            parse_budget(self.budget)
        bound, same = self.latency_ms, self.same_frame
        check(
            bound is None or (math.isfinite(bound) and bound > 0),
            f"--latency-ms {bound}: must be above 0",
        )
        check(
            same is None or 0 <= same <= 255,
            f"--same-frame {same}: must be from 0 to 255, a difference of 8-bit values",
        )


class Frame(NamedTuple):
    """A frame in the queue."""

    number: int
    """Number of the frame among all received, from 0."""
    content: bytes | Path | Unreadable
    """An encoded image, its file, or the reason why it is unreadable."""
    arrived: float
    """Time of arrival in seconds, by the clock of the queue."""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """The answer for a frame."""

    frame: int
    """Number of the frame among all received, from 0."""
    prediction: Prediction
    """The prediction. Its `madds` are 0 if `same`; `file` is empty for a frame from a pipe."""
    budget: str | None
    """Budget of the frame; None: as trained."""
    latency_ms: float
    same: bool
    """Whether the frame looked like an earlier one and reuses its answer."""
    dropped: int
    """Number of frames dropped so far."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        row = self.prediction.to_dict()
        file = row.pop("file")
        return {
            "frame": self.frame,
            "file": file or None,
            **row,
            "budget": self.budget,
            "latency_ms": round(self.latency_ms, 3),
            "same": self.same,
            "dropped": self.dropped,
        }


class BrokenFrame(NamedTuple):
    """A frame that could not be read."""

    frame: int
    file: str
    """Empty for a frame from a pipe."""
    reason: str


# -- where frames come from -----------------------------------------------------------------------


class Waiting:
    """The queue of frames between the reading and the answering thread.

    If the queue is full, `drop` discards its oldest frame; otherwise the reader waits.
    """

    def __init__(
        self, *, drop: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        self.count = 0
        """Number of frames received."""
        self.dropped = 0
        self.stopped = False
        """Set by `stop`."""
        self._drop = drop
        self._frames: deque[Frame] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, content: bytes | Path | Unreadable, arrived: float | None = None) -> bool:
        """Queue a frame; returns False if the queue is stopped."""
        with self._changed:
            while len(self._frames) >= MOST_WAITING and not (self._drop or self.stopped):
                self._changed.wait(_LOOK_S)
            if self.stopped:
                return False
            if len(self._frames) >= MOST_WAITING:
                self._frames.popleft()
                self.dropped += 1
            now = self.clock() if arrived is None else arrived
            self._frames.append(Frame(self.count, content, now))
            self.count += 1
            self._changed.notify_all()
            return True

    def end(self, error: BaseException | None = None) -> None:
        """Mark the end of the frames; `take` raises `error` once the queue is empty."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def stop(self) -> None:
        """Accept no more frames and drop the waiting ones. Takes effect within 0.1 s.

        It takes no lock, so a signal handler may call it.
        """
        self.stopped = True

    def take(self, is_late: Callable[[Frame], bool]) -> Frame | None:
        """Wait for a frame and return the oldest one; None at the end.

        Late frames are dropped, except for the newest frame in the queue.
        """
        with self._changed:
            while not self._frames and not self._ended and not self.stopped:
                self._changed.wait(_LOOK_S)
            if self.stopped:
                self.dropped += len(self._frames)
                self._frames.clear()
            while len(self._frames) > 1 and is_late(self._frames[0]):
                self._frames.popleft()
                self.dropped += 1
            self._changed.notify_all()
            if self._frames:
                return self._frames.popleft()
            if self._error is not None and not self.stopped:
                raise self._error
            return None


class JpegSplitter:
    """Splits a stream of bytes into JPEGs, as `image2pipe` and cameras write them.

    It follows the markers of ITU-T T.81 (annex B), so a thumbnail inside a JPEG is not taken for a
    frame. Bytes between JPEGs are skipped. After a damaged JPEG it continues with the next start of
    an image.
    """

    _ENDS_SCAN: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._at = 0
        """Position at which the next marker is searched; 0 between two JPEGs."""
        self._in_scan = False

    def feed(self, data: bytes) -> Iterator[bytes | Unreadable]:
        """Yield the JPEGs that end in these bytes, and an `Unreadable` for damaged ones."""
        self._bytes += data
        while (found := self._next()) is not None:
            yield found

    def close(self) -> Iterator[bytes | Unreadable]:
        """Report the incomplete JPEG at the end, if any, and yield JPEGs that it contains."""
        while self._at:
            yield self._broken(2, "the stream ends in the middle of a JPEG")
            yield from self.feed(b"")

    def _next(self) -> bytes | Unreadable | None:
        data = self._bytes
        if not self._at:
            start = data.find(b"\xff\xd8")
            if start < 0:
                del data[: max(0, len(data) - 1)]  # the last byte may be half of a marker
                return None
            del data[:start]
            self._at, self._in_scan = 2, False
        while True:
            if self._in_scan:
                found = self._ENDS_SCAN.search(data, self._at)
                if found is None:
                    self._at = max(self._at, len(data) - 1)
                    break
                self._at, self._in_scan = found.start(), False
            while data[self._at : self._at + 2] == b"\xff\xff":  # fill bytes
                self._at += 1
            if len(data) < self._at + 2:
                break
            mark, code = data[self._at], data[self._at + 1]
            if mark != 0xFF or code == 0:
                return self._broken(2, f"damaged JPEG: no marker at byte {self._at}")
            if code == 0xD8:
                return self._broken(self._at, "JPEG without an end")
            if code == 0xD9:
                frame = bytes(data[: self._at + 2])
                del data[: self._at + 2]
                self._at = 0
                return frame
            if code == 0x01 or 0xD0 <= code <= 0xD7:
                self._at += 2
                continue
            if len(data) < self._at + 4:
                break
            self._at += 2 + max(2, int.from_bytes(data[self._at + 2 : self._at + 4]))
            self._in_scan = code == 0xDA
        if len(data) > MOST_BYTES:
            return self._broken(len(data), f"JPEG of more than {MOST_BYTES:,} bytes")
        return None

    def _broken(self, gone: int, reason: str) -> Unreadable:
        del self._bytes[:gone]
        self._at = 0
        return Unreadable("", reason)


def read_pipe(descriptor: int, waiting: Waiting) -> None:
    """Queue the JPEGs of a pipe until it ends."""
    splitter = JpegSplitter()
    # not through sys.stdin: the interpreter cannot exit while another thread holds its buffer
    while data := os.read(descriptor, 1 << 16):
        for one in splitter.feed(data):
            if not waiting.put(one):
                return
    for one in splitter.close():
        waiting.put(one)


def watch_folder(folder: Path, waiting: Waiting) -> None:
    """Queue the image files of a folder, including new ones, until the queue is stopped.

    A file is queued when two scans find it with the same size. Files of one scan are queued in the
    order of their names.
    """
    taken: set[str] = set()
    growing: dict[str, tuple[int, float]] = {}
    scanned = None
    while not waiting.stopped:
        stamp = os.stat(folder).st_mtime_ns
        if stamp != scanned or growing or time.time_ns() - stamp < _RECENT_NS:
            scanned = stamp
            with os.scandir(folder) as entries:
                names = {entry.name for entry in entries}
            taken &= names
            growing = {name: found for name, found in growing.items() if name in names}
            for name in sorted(names - taken):
                if not is_image_file(folder / name):
                    continue
                try:
                    size = os.stat(folder / name).st_size
                except OSError:  # deleted, or a broken link: reading it will report which
                    size = -1
                before, arrived = growing.get(name, (None, waiting.clock()))
                growing[name] = (size, arrived)
                if size and size == before:
                    if not waiting.put(folder / name, arrived):
                        return
                    taken.add(name)
                    del growing[name]
        time.sleep(POLL_S)


def start_reader(read: Callable[[], object], waiting: Waiting) -> threading.Thread:
    """Start a thread that reads frames; `Waiting.take` raises its error."""

    def run() -> None:
        error = None
        try:
            read()
        except BaseException as caught:
            error = caught
        waiting.end(error)

    thread = threading.Thread(target=run, name="dynaslim-frames", daemon=True)
    thread.start()
    return thread


# -- answers --------------------------------------------------------------------------------------


class Stream:
    """Answers frames, each with the highest budget that is expected to meet its latency bound.

    The time per multiply-add is estimated from earlier frames (`Throughput`). The budget moves
    along the curve as in the server (`BudgetControl`); a frame that would still be late gets a
    lower one. Budgets are mean costs: a frame that escalates takes longer than its budget.
    """

    def __init__(self, engine: Engine, options: StreamOptions | None = None) -> None:
        """Check the options against the engine.

        Raises:
            UsageError: if the engine has no preprocessing, or lacks the curve that a budget or a
                bound needs.
        """
        options = StreamOptions() if options is None else options
        self._engine = engine
        self._preprocessing = preprocessing_of(engine)
        self._bound_s = None if options.latency_ms is None else options.latency_ms / 1e3
        self._same = options.same_frame
        self._route_name = route_names(engine)
        self._levels = [options.budget]
        self._costs = [0.0]
        if options.budget is not None or self._bound_s is not None:
            setting = f"budget {options.budget!r}"
            if self._bound_s is not None:
                setting = f"--latency-ms {options.latency_ms:g}"
            curve = needed_curve(engine.curve, setting)
            if self._bound_s is not None:
                high = 1.0 if options.budget is None else curve.share_of(options.budget)
                self._levels = [*levels(curve, curve.points[0].share, high)]
            self._costs = [curve.at(level).madds for level in self._levels if level is not None]
        self._madds = Throughput()
        self._decoding = Throughput()
        self._control: BudgetControl | None = None

    def answers(self, waiting: Waiting) -> Iterator[StreamRow | BrokenFrame]:
        """Yield a row for every frame that is not dropped, until the queue ends or is stopped.

        Raises:
            OSError: if the folder or the pipe cannot be read any longer.
            DataError: if the network's output is not finite.
        """
        clock = waiting.clock
        if self._bound_s is not None:
            self._control = BudgetControl(len(self._levels), self._bound_s, clock())
        last: tuple[StreamRow, np.ndarray] | None = None
        while (frame := waiting.take(lambda frame: self._is_late(frame, clock()))) is not None:
            started = clock()
            picture = self._decoded(frame)
            self._decoding.add(1, clock() - started)
            if isinstance(picture, Unreadable):
                yield BrokenFrame(frame.number, picture.file, picture.reason)
                continue
            thumbnail = None if self._same is None else _thumbnail(picture.pixels_CSS)
            if (
                last is not None
                and thumbnail is not None
                and self._same is not None
                and np.abs(thumbnail - last[1]).max() <= self._same
            ):
                kept = replace(last[0].prediction, file=picture.file, madds=0.0)
                latency_ms = (clock() - frame.arrived) * 1e3
                yield replace(
                    last[0],
                    frame=frame.number,
                    prediction=kept,
                    latency_ms=latency_ms,
                    same=True,
                    dropped=waiting.dropped,
                )
                continue
            started = clock()
            budget = self._budget(started - frame.arrived, started)
            answer = self._answer(picture, budget)
            now = clock()
            self._madds.add(answer.madds, now - started)
            latency_ms = (now - frame.arrived) * 1e3
            row = StreamRow(frame.number, answer, budget, latency_ms, False, waiting.dropped)
            if thumbnail is not None:
                last = (row, thumbnail)
            yield row

    def warm_up(self) -> None:
        """Answer a grey picture with every budget, so that no frame waits for lazy initialisation;
        its timing is the first estimate of the time per frame.
        """
        side, buffer = self._preprocessing.image_size_px, io.BytesIO()
        Image.new("RGB", (side, side), "grey").save(buffer, "JPEG")
        picture = picture_of(buffer.getvalue(), self._preprocessing, "")
        assert isinstance(picture, Picture)
        for level in self._levels:
            self._answer(picture, level)
            started = time.perf_counter()
            answer = self._answer(picture, level)
            self._madds.add(answer.madds, time.perf_counter() - started)

    def _answer(self, picture: Picture, budget: str | None) -> Prediction:
        (answer,) = answers_for(
            self._engine,
            [picture],
            self._preprocessing,
            {"budget": budget},
            self._route_name,
            top_k=1,
        )
        return answer

    def _decoded(self, frame: Frame) -> Picture | Unreadable:
        content = frame.content
        if isinstance(content, Unreadable):
            return content
        if isinstance(content, Path):
            return read_picture(content, self._preprocessing)
        return picture_of(content, self._preprocessing, "")

    def _is_late(self, frame: Frame, now: float) -> bool:
        """Whether a frame is expected to be late even with the lowest budget."""
        if self._bound_s is None:
            return False
        rest_s = self._decoding.seconds_for(1) + self._madds.seconds_for(self._costs[0])
        return now - frame.arrived + rest_s > self._bound_s

    def _budget(self, waited_s: float, now: float) -> str | None:
        """The budget of a frame that has waited for `waited_s`."""
        if self._control is None or self._bound_s is None:
            return self._levels[0]

        def expected_s(level: int) -> float:
            return waited_s + self._madds.seconds_for(self._costs[level])

        expected = expected_s(self._control.level)
        # if the level meets the bound, only the waiting counts as load, not the answering itself
        level = self._control.observe(waited_s if expected <= self._bound_s else expected, now)
        while level and expected_s(level) > self._bound_s:
            level -= 1
        return self._levels[level]


def _thumbnail(pixels_CSS: np.ndarray) -> np.ndarray:
    """Means of cells (C, T, T), float32; pixels beyond the last whole cell are ignored."""
    channels, side, _ = pixels_CSS.shape
    cell = max(1, side // THUMBNAIL)
    count = side // cell
    cut = pixels_CSS[:, : count * cell, : count * cell]
    means: np.ndarray = cut.reshape(channels, count, cell, count, cell).mean((2, 4), np.float32)
    return means


class StreamSummary:
    """Totals over a stream, in constant memory."""

    def __init__(self) -> None:
        self.answered = 0
        self.same = 0
        self.broken = 0
        self._budgets: Counter[str] = Counter()
        self._latencies: Counter[int] = Counter()

    def add(self, row: StreamRow | BrokenFrame) -> None:
        if isinstance(row, BrokenFrame):
            self.broken += 1
            return
        self.answered += 1
        self.same += row.same
        self._latencies[round(math.log(max(row.latency_ms, 1e-3)) / _BIN)] += 1
        if row.budget is not None and not row.same:
            self._budgets[row.budget] += 1

    def latency_ms(self, quantile: float) -> float:
        """A quantile of the latencies, with 1 % precision; NaN before the first answer."""
        left = quantile * self.answered
        for number, count in sorted(self._latencies.items()):
            left -= count
            if left <= 0:
                return math.exp(number * _BIN)
        return math.nan

    def line(self, waiting: Waiting) -> str:
        parts = [f"{waiting.count} frames: {self.answered} answered"]
        if self.same:
            parts[0] += f" ({self.same} as the one before)"
        parts.append(f"{waiting.dropped} dropped")
        parts.append(f"{self.broken} broken")
        if self.answered:
            p50, p99 = self.latency_ms(0.5), self.latency_ms(0.99)
            parts.append(f"latency p50 {p50:.1f} ms, p99 {p99:.1f} ms")
        if self._budgets:
            parts.append(f"mean budget {self._mean_budget()}")
        return ", ".join(parts)

    def _mean_budget(self) -> str:
        if len(self._budgets) == 1:
            return next(iter(self._budgets))
        total = sum(float(budget) * count for budget, count in self._budgets.items())
        return f"{total / self._budgets.total():.3f}"
