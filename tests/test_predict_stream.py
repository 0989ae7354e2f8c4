"""Frames as they come: cutting a pipe, watching a folder, a bound on latency, and the verb."""

import csv
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import encoded, fails, forced_curve, lively, micro_spec, output_of

from dynaslim import predict_stream
from dynaslim.checkpoint import Checkpoint
from dynaslim.errors import UsageError
from dynaslim.predict import Unreadable
from dynaslim.predict_stream import (
    MOST_WAITING,
    BrokenFrame,
    JpegSplitter,
    Stream,
    StreamOptions,
    StreamSummary,
    Waiting,
    watch_folder,
)
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.export import export_package
from dynaslim.spec import Route


def jpeg(level, size=32, **options):
    """A JPEG of one shade, 0..255, with some noise."""
    noise = np.random.default_rng(level).normal(level, 2, (size, size, 3)).clip(0, 255)
    return encoded(noise.astype(np.uint8), "JPEG", **options)


def with_thumbnail(level):
    """A JPEG with a whole JPEG in an application segment."""
    inside = b"Exif\0\0" + jpeg(level, 16)
    segment = b"\xff\xe1" + (len(inside) + 2).to_bytes(2) + inside
    whole = jpeg(level)
    return whole[:2] + segment + whole[2:]


KINDS = [
    jpeg(10),
    with_thumbnail(60),
    jpeg(110, progressive=True),
    jpeg(160, 64, restart_marker_blocks=2),
    jpeg(210, quality=100),
]


def cut(data, sizes):
    """What a splitter finds in chunks of these sizes, and at the end."""
    splitter, found, at = JpegSplitter(), [], 0
    while at < len(data):
        size = next(sizes)
        found += splitter.feed(data[at : at + size])
        at += size
    return found + list(splitter.close())


@pytest.mark.parametrize("seed", range(4))
def test_jpegs_are_cut_at_their_ends(seed):
    rng = random.Random(seed)
    between = [b"", b"\r\n--frame\r\nContent-Type: image/jpeg\r\n\r\n", b"\xff", b"\0\xff\0"]
    data = b"".join(rng.choice(between) + frame for frame in KINDS) + rng.choice(between)
    sizes = (rng.choice([1, 2, 3, 50, 5000]) for _ in itertools.count())
    assert cut(data, sizes) == KINDS


@pytest.mark.parametrize("chunk", [1, 1 << 16])
def test_a_damaged_jpeg_costs_no_other(chunk):
    first, second, third = KINDS[0], KINDS[2], KINDS[4]
    ends_early = third[:-40]
    no_marker = second[:2] + b"\0\0" + second[4:]
    for damaged, reason in (
        (ends_early, "JPEG without an end"),
        (no_marker, "damaged JPEG: no marker at byte 2"),
    ):
        found = cut(first + damaged + third, itertools.repeat(chunk))
        assert found == [first, Unreadable("", reason), third]
    last = cut(first + third[:-2], itertools.repeat(chunk))
    assert last == [first, Unreadable("", "the stream ends in the middle of a JPEG")]
    # in its head, where a length leads into the next one
    head = cut(first + second[:30] + third + first, itertools.repeat(chunk))
    assert [one for one in head if isinstance(one, bytes)] == [first, third, first]


def test_a_jpeg_without_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(predict_stream, "MOST_BYTES", 10_000)
    data = KINDS[0][:-2] + b"\x11" * 20_000 + KINDS[4]
    found = cut(data, itertools.repeat(1000))
    assert [type(one) for one in found] == [Unreadable, bytes]
    assert "more than 10,000 bytes" in found[0].reason


# -- latency, with a clock by hand ----------------------------------------------------------------


def _curve(shares):
    points = tuple(
        BudgetPoint(0.0, None, None, share * 1e6, share, None, 0.5 + share / 4, 0.0)
        for share in shares
    )
    return BudgetCurve(8, 1000, 1e6, None, 0.75, shares[0] * 1e6, None, 0.5, points, points)


class SlowEngine:
    """Takes 50 ms for the widest route, its share for a cheaper budget; answers by brightness."""

    preprocessing = Preprocessing(8, mean=(0.5,) * 3, std=(0.25,) * 3)
    class_names = ("dark", "dim", "fair", "bright")

    def __init__(self, clock, shares=(0.1, 0.2, 0.4, 0.7, 1.0), widest_s=0.05):
        self.curve = _curve(shares)
        self.budgets = []
        self._clock, self._widest_s = clock, widest_s

    def __call__(self, x, *, budget=None, hold=False):
        self.budgets.append(budget)
        share = 1.0 if budget is None else self.curve.at(budget).share
        self._clock.now += share * self._widest_s
        level = np.clip((x.mean((1, 2, 3)) + 2).astype(int), 0, 3)
        return output_of(np.eye(4)[level] * 3, madds=np.array([share * 1e6]))

    def route_of(self, row):
        return Route((4,))


class Arrivals(Waiting):
    """Frames at given times of a clock by hand."""

    def __init__(self, clock, times, frames=None, *, drop=True):
        super().__init__(drop=drop, clock=lambda: clock.now)
        self._by_hand = clock
        self._coming = list(zip(times, frames or itertools.repeat(jpeg(100, 8)), strict=False))

    def take(self, is_late):
        while self._coming and (not self._frames or self._coming[0][0] <= self._by_hand.now):
            at, content = self._coming.pop(0)
            self._by_hand.now = max(self._by_hand.now, at)
            self.put(content, at)
        if not self._coming:
            self.end()
        return super().take(is_late)


def _answered(times, *, widest_s=0.05, frames=None, **options):
    clock = SimpleNamespace(now=0.0)
    engine = SlowEngine(clock, widest_s=widest_s)
    waiting = Arrivals(clock, times, frames, drop=options.get("latency_ms") is not None)
    rows = list(Stream(engine, StreamOptions(**options)).answers(waiting))
    return rows, waiting, engine


def test_the_budget_falls_until_frames_are_in_time_and_rises_again():
    fast = np.arange(0, 10, 1 / 30)  # 50 ms of work every 33
    slow = np.arange(10, 40, 1 / 10)
    rows, waiting, _ = _answered([*fast, *slow], latency_ms=100)
    assert len(rows) == waiting.count == len(fast) + len(slow)
    assert waiting.dropped == 0
    assert [row.frame for row in rows] == list(range(len(rows)))
    latencies = [row.latency_ms for row in rows]
    assert max(latencies) <= 100.001
    budgets = [float(row.budget) for row in rows]
    assert budgets[0] == 1.0
    assert 0.4 <= np.mean(budgets[30 : len(fast)]) <= 0.75, "what 33 ms afford is 0.66"
    assert budgets[-1] == 1.0, "it comes back"
    # without a bound the wait grows and grows
    rows, _, engine = _answered(fast)
    assert max(row.latency_ms for row in rows) > 1000
    assert set(engine.budgets) == {None}


def test_a_frame_that_waited_too_long_for_its_budget_gets_a_lower_one_at_once():
    times = [*np.arange(0, 1, 0.1), *[1.0] * 4]
    rows, waiting, _ = _answered(times, latency_ms=100)
    assert waiting.dropped == 0
    assert max(row.latency_ms for row in rows) <= 100.001
    assert [row.budget for row in rows[:10]] == ["1"] * 10
    assert [row.budget for row in rows[-4:]] == ["1", "0.7", "0.2", "0.1"]


def test_the_oldest_frames_are_dropped_where_no_budget_is_low_enough():
    # the lowest takes 10 ms, and a frame comes every 4
    times = np.arange(0, 8, 0.004)
    rows, waiting, engine = _answered(times, widest_s=0.1, latency_ms=60)
    numbers = [row.frame for row in rows]
    assert waiting.count == len(times)
    assert len(rows) + waiting.dropped == len(times)
    assert 0.55 < waiting.dropped / len(times) < 0.65
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == len(times) - 1, "the youngest is always answered"
    assert [row.dropped for row in rows] == [
        number - position for position, number in enumerate(numbers)
    ]
    # the last has none behind it to give way to
    assert max(row.latency_ms for row in rows[3:-1]) <= 60.001
    assert set(engine.budgets[3:]) == {"0.1"}


def test_a_bound_that_nothing_can_keep_answers_the_youngest():
    rows, waiting, _ = _answered(np.arange(0, 8, 0.01), widest_s=1.0, latency_ms=20)
    assert len(rows) + waiting.dropped == 800
    assert [row.budget for row in rows[3:]] == ["0.1"] * (len(rows) - 3)
    assert len(rows) > 45, "as many as there is time for"
    assert all(row.latency_ms <= 111 for row in rows[4:]), "its own time, and the wait for a frame"


def test_the_highest_budget_is_the_one_given():
    rows, _, _ = _answered(np.arange(0, 2, 0.1), latency_ms=100, budget="0.5")
    assert {row.budget for row in rows} == {"0.5"}
    rows, _, engine = _answered(np.arange(0, 2, 0.1), budget="0.5")
    assert set(engine.budgets) == {"0.5"}


def test_without_a_bound_the_reader_waits_for_room():
    waiting = Waiting()
    put = []

    def read():
        for number in range(MOST_WAITING + 50):
            put.append(waiting.put(b"%d" % number))
        waiting.end()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + 10
    while len(put) < MOST_WAITING and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(put) == MOST_WAITING
    taken = list(iter(lambda: waiting.take(lambda _: False), None))
    reader.join(10)
    assert [int(frame.content) for frame in taken] == list(range(MOST_WAITING + 50))
    assert waiting.dropped == 0
    # with one, a full queue loses its oldest
    waiting = Waiting(drop=True)
    for number in range(MOST_WAITING + 50):
        waiting.put(b"%d" % number)
    assert int(waiting.take(lambda _: False).content) == waiting.dropped == 50
    waiting.stop()
    assert waiting.take(lambda _: False) is None
    assert waiting.dropped == waiting.count - 1
    assert not waiting.put(b"")


def test_an_error_of_the_reader_is_raised():
    waiting = Waiting()
    waiting.put(jpeg(9, 8))
    waiting.end(PermissionError(13, "Permission denied", "frames"))
    rows = Stream(SlowEngine(SimpleNamespace(now=0.0))).answers(waiting)
    assert next(rows).frame == 0
    with pytest.raises(PermissionError, match="frames"):
        next(rows)


# -- frames that look alike -----------------------------------------------------------------------


def test_a_frame_that_looks_as_the_last_keeps_its_answer():
    # it darkens by 2 a frame: no two neighbours differ, and 24 steps do
    frames = [jpeg(level, 8, quality=95) for level in range(240, 40, -2)]
    times = np.arange(len(frames)) * 0.1
    every, _, engine = _answered(times, frames=frames)
    assert len(engine.budgets) == len(frames)
    assert not any(row.same for row in every)
    rows, _, engine = _answered(times, frames=frames, same_frame=10.0)
    ran = [row for row in rows if not row.same]
    assert len(engine.budgets) == len(ran)
    assert 15 <= len(ran) <= 50, "compared with the frame that ran, not with the one before"
    agree = [a.prediction.label == b.prediction.label for a, b in zip(rows, every, strict=True)]
    assert 0.9 < np.mean(agree) < 1, "what it costs"
    kept = next(row for row in rows if row.same)
    assert kept.prediction.madds == 0
    assert kept.latency_ms < 1
    assert kept.frame == 1


def test_a_small_thing_that_appears_is_seen():
    plain = np.full((64, 64, 3), 100, np.uint8)
    spot = plain.copy()
    spot[8:16, 40:48] = 220  # 1.6 % of the picture
    frames = list(map(encoded, (plain, plain, spot, spot)))
    rows, _, _ = _answered([0, 1, 2, 3], frames=frames, same_frame=30.0)
    assert [row.same for row in rows] == [False, True, False, True]


# -- summary --------------------------------------------------------------------------------------


def test_summary():
    frames = [jpeg(100, 8)] * 50
    frames[7] = b"x"
    rows, waiting, _ = _answered(np.arange(50) * 0.2, frames=frames, latency_ms=100)
    summary = StreamSummary()
    for row in rows:
        summary.add(row)
    assert isinstance(rows[7], BrokenFrame)
    assert rows[7].frame == 7
    line = "50 frames: 49 answered, 0 dropped, 1 broken, latency p50 49.9 ms, p99 49.9 ms, "
    assert summary.line(waiting) == line + "mean budget 1"
    for quantile in (0.5, 0.99):
        assert summary.latency_ms(quantile) == pytest.approx(50, rel=0.01)
    assert StreamSummary().line(Waiting()) == "0 frames: 0 answered, 0 dropped, 0 broken"


# -- a folder -------------------------------------------------------------------------------------


def test_a_growing_folder(tmp_path):
    waiting = Waiting()
    for name in ("b.jpg", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(jpeg(3))
    (tmp_path / "sub.jpg").mkdir()
    reader = predict_stream.start_reader(lambda: watch_folder(tmp_path, waiting), waiting)

    def name():
        return waiting.take(lambda _: False).content.name

    assert [name(), name()] == ["a.jpg", "b.jpg"]
    # written in two parts: not taken before it is whole
    half = tmp_path / "c.jpg"
    with half.open("wb") as out:
        for number in range(20):
            out.write(jpeg(3)[number * 40 : number * 40 + 40])
            out.flush()
            time.sleep(0.002)
        out.write(jpeg(3)[800:])
    assert name() == "c.jpg"
    # a name that is there again is another frame
    half.unlink()
    time.sleep(0.1)
    (tmp_path / "new").write_bytes(jpeg(4))
    (tmp_path / "new").rename(half)
    (tmp_path / "d.png").symlink_to("nowhere")
    assert [name(), name()] == ["c.jpg", "d.png"]
    waiting.stop()
    reader.join(10)
    assert not reader.is_alive()


# -- the verb -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package with a budget curve."""
    spec = micro_spec()
    folder = tmp_path_factory.mktemp("stream") / "micro"
    curve = forced_curve(spec, 16).to_dict()
    net = lively(spec, image_size=16)
    checkpoint = Checkpoint(net, tuple("abcde"), Preprocessing(16), budget=curve)
    export_package(checkpoint, folder)
    return folder


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["datasets"] = None
from dynaslim.cli import main
main(sys.argv[1:])
"""


def start(package, *argv):
    """The verb in a process of its own, where torch cannot be imported."""
    argv = ["predict", str(package), *map(str, argv), "--stream", "--backend", "onnxruntime"]
    return subprocess.Popen(
        [sys.executable, "-c", WITHOUT_TORCH, *argv, "--no-cache"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_pipe_of_jpegs_with_a_broken_and_a_truncated_one(package):
    frames = [jpeg(level) for level in (20, 90, 160)]
    with start(package, "-", "--json", "--latency-ms", "60000") as process:
        process.stdin.write(frames[0])
        process.stdin.flush()
        first = json.loads(process.stdout.readline())  # as it is answered, not at the end
        assert (first["frame"], first["file"]) == (0, None)
        broken = KINDS[4][:-40] + b"\xff\xd8\xff\xfe\0\4no\xff\xd9"
        rest = frames[1] + broken + frames[2] + frames[0] + frames[1][:-40]
        out, err = process.communicate(rest, timeout=60)
    rows = [first, *map(json.loads, out.splitlines())]
    assert process.returncode == 0, err
    assert [row["frame"] for row in rows] == [0, 1, 4, 5]
    assert rows[3] | {"frame": 0, "latency_ms": 0} == rows[0] | {"latency_ms": 0}
    assert {row["budget"] for row in rows} == {"1"}
    assert set(rows[0]) >= {"class", "confidence", "route", "latency_ms", "dropped", "same"}
    *left_out, summary = err.decode().splitlines()
    assert [line.split(" (")[0] for line in left_out] == [
        "left out: frame 2: JPEG without an end",
        "left out: frame 3: not an image that can be decoded",
        "left out: frame 6: the stream ends in the middle of a JPEG",
    ]
    assert summary.startswith("7 frames: 4 answered, 0 dropped, 3 broken, latency p50 ")
    assert summary.endswith("mean budget 1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(package, tmp_path, number):
    with start(package, tmp_path) as process:
        rows = csv.DictReader(io.TextIOWrapper(process.stdout))
        for name in ("0.jpg", "1.jpg", "2.png"):
            if name == "2.png":
                (tmp_path / name).write_bytes(b"no picture")
                continue
            (tmp_path / name).write_bytes(jpeg(40))
            row = next(rows)
            assert Path(row["file"]) == tmp_path / name
            assert row["class"] in set("01234")
            assert (row["budget"], row["same"]) == ("", "False")
        line = process.stderr.readline().decode()
        assert line.startswith(f"left out: frame 2 ({tmp_path / '2.png'}): not an image")
        process.send_signal(number)
        err = process.stderr.read().decode()
        assert process.wait(30) == 0
        assert list(rows) == []
    (summary,) = err.splitlines()
    assert summary.startswith("3 frames: 2 answered, 0 dropped, 1 broken, latency p50 ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-"], "--latency-ms 0.0: must be above 0"),
        (["-"], "--same-frame 300.0: must be from 0 to 255"),
        (["photo.jpg"], "--stream: photo.jpg is no folder; give one folder of frames, or -"),
        (["m", ".", "."], "give one folder of frames, or - for JPEGs"),
        (["m.safetensors"], "--stream: m.safetensors is a model"),
        (["-", "--hold", "--budget", "0.5"], "--hold: not with --stream"),
        (["-", "--top-k", "2"], "--top-k: not with --stream"),
        (["-", "--parquet", "rows.parquet"], "--parquet: not with --stream"),
    ],
)
def test_what_is_refused(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flag = message.partition(":")[0].split()
    extra = flag if flag[0] in ("--latency-ms", "--same-frame") else []
    fails(capsys, ["predict", *argv, "--stream", *extra], 2, message)


def test_what_needs_a_stream_or_a_curve(capsys, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(3))
    for flag in ("--latency-ms", "--same-frame"):
        fails(capsys, ["predict", tmp_path, flag, "5"], 2, f"{flag} 5.0: give --stream with it")
    engine = SlowEngine(SimpleNamespace(now=0.0))
    engine.curve = None
    for options in ({"latency_ms": 50}, {"budget": "0.5"}):
        with pytest.raises(UsageError, match="no budget curve; measure one with"):
            Stream(engine, StreamOptions(**options))
    engine.preprocessing = None
    with pytest.raises(UsageError, match="how images are prepared"):
        Stream(engine)
