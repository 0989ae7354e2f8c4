"""The verb `predict`, for image files and streams of frames."""

from __future__ import annotations

import csv
import json as json_text
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

from dynaslim.cli.output import echo, fail, new_table, printable
from dynaslim.errors import check
from dynaslim.model_names import (
    find_model,
    is_hub_address,
    is_package,
    is_saved_folder,
    run_checkpoints,
)

if TYPE_CHECKING:
    from dynaslim.predict import Prediction, Summary
    from dynaslim.predict_stream import StreamOptions, StreamRow, Waiting

FEW: Final = 50
"""Up to this number of files, each gets a line on the screen; for more, only totals are shown."""


MOST_ROWS: Final = 1 << 16
"""Largest batch size; so many images of any size fill any memory."""


def predict(
    paths: list[str],
    *,
    model: str | None = None,
    budget: str | None = None,
    hold: bool = False,
    backend: str = "auto",
    batch_size: int = 64,
    json: bool = False,
    parquet: Path | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    top_k: int = 1,
    stream: bool = False,
    latency_ms: float | None = None,
    same_frame: float | None = None,
    no_cache: bool = False,
) -> int:
    """Predict image files, or a stream of frames, each along the route that the gates choose.

    Args:
        paths: A model, if --model names none, and images: files, folders, and patterns such as
            "photos/**/*.jpg". Without a model, one that ships with dynaslim is used.
        model: A checkpoint file, the folder of a run or of an exported package, or the name of a
            model that ships, such as cifar10. Default: the first path if it is one, else cifar10.
        budget: What an image may cost on average, such as 0.6 (of the widest route) or 4.5ms.
            Default: as trained. The mean holds for images like those it was measured on.
        hold: Keep the mean cost of these images below the budget, for any images.
        backend: Backend that runs the network; auto picks the fastest installed one.
        batch_size: Images per batch.
        json: Print one JSON object.
        parquet: File to write with a row per image; with --engine ray, a new folder of files.
        engine: local, or ray for the workers of a Ray cluster (RAY_ADDRESS, else on this machine).
        workers: Threads that decode images; actors with --engine ray. Default: one for each core.
        top_k: Number of likeliest classes to print, also in JSON.
        stream: Predict frames as they arrive, one line each: the images of a folder, including
            ones added later, or - for JPEGs from standard input. Ends with the input or a signal.
        latency_ms: With --stream, answer each frame within this many milliseconds: the budget is
            lowered as far as needed, then frames are dropped.
        same_frame: With --stream, a frame that differs by at most this much (0 to 255) from the
            last one that ran gets the same answer. Default: never.
        no_cache: Do not use the on-disk cache of compiled programs.
    """
    from dynaslim.predict import Summary, Unreadable, find_images, open_engine
    from dynaslim.predict import predict as predict_here
    from dynaslim.predict_ray import predict_ray
    from dynaslim.predict_stream import StreamOptions
    from dynaslim.predict_tables import ParquetFile, ParquetParts
    from dynaslim.progress import progress
    from dynaslim.runtime.backends import check_backend
    from dynaslim.runtime.budget import parse_budget

    # mistakes are found before torch is imported
    check(
        1 <= batch_size <= MOST_ROWS,
        f"--batch-size {batch_size}: must be between 1 and {MOST_ROWS:,}",
    )
    check(workers is None or workers >= 1, f"--workers {workers}: must be at least 1")
    check(top_k >= 1, f"--top-k {top_k}: must be at least 1")
    check(
        top_k == 1 or (parquet is None and engine == "local"),
        f"--top-k {top_k}: --parquet and --engine ray have the likeliest alone",
    )
    check_backend(backend)
    if budget is not None:
        parse_budget(budget)
    check(budget is not None or not hold, "--hold: give the budget that is to hold with --budget")
    if stream:
        for flag, unused in (
            ("--hold", not hold),
            ("--parquet", parquet is None),
            ("--engine ray", engine == "local"),
            ("--top-k", top_k == 1),
            ("--workers", workers is None),
        ):
            check(unused, f"{flag}: not with --stream, which answers one frame at a time")
        return _stream(
            *_stream_of(paths, model),
            StreamOptions(budget, latency_ms, same_frame),
            backend=backend,
            json=json,
            cache_dir=None if no_cache else "auto",
        )
    for flag, given in (("--latency-ms", latency_ms), ("--same-frame", same_frame)):
        check(given is None, f"{flag} {given}: give --stream with it")
    model, paths = _divided(paths, model)
    files = find_images(paths)
    find_model(model, ("checkpoint", "package"))
    table = None
    if parquet is not None:
        table = (ParquetParts if engine == "ray" else ParquetFile)(parquet)
    cache_dir = None if no_cache else "auto"
    opened = open_engine(model, backend, batch_size=batch_size, cache_dir=cache_dir)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "budget": budget,
        "hold": hold,
        "workers": workers,
    }
    if engine == "ray":
        rows = predict_ray(model, files, backend=backend, cache_dir=cache_dir, **options)
    else:
        rows = predict_here(opened, files, top_k=top_k, **options)
    expected, curve = None, opened.curve
    if budget is not None and curve is not None:
        expected = curve.at(budget).madds
        if not hold and (note := curve.out_of_reach(budget)):
            sys.stderr.write(f"{note}\n")
    show: _Json | _Screen = _Json(sys.stdout) if json else _Screen(len(files) <= FEW)
    summary = Summary(expected)
    started = time.perf_counter()
    with ExitStack() as stack:
        if engine == "ray":  # Ray prints messages about its workers
            stack.enter_context(redirect_stdout(sys.stderr))
        # only many files get a progress bar
        bar = stack.enter_context(progress("predicting", len(files))) if len(files) > FEW else None
        if table is not None:
            stack.enter_context(table)
        stack.enter_context(closing(rows))
        for row in rows:
            summary.add(row)
            if bar is not None:
                bar.advance()
            if isinstance(row, Unreadable):
                sys.stderr.write(f"left out: {printable(row.file)}: {row.reason}\n")
                continue
            show.add(row)
            if table is not None:
                table.add(row)
        seconds = time.perf_counter() - started
        totals = {
            "model": model,
            "budget": budget,
            "hold": hold,
            "engine": engine,
            **summary.to_dict(),
            "seconds": seconds,
            "images_per_s": summary.predicted / seconds,
        }
        if table is not None:
            unreadable = [one.to_dict() for one in summary.unreadable]
            table.commit({**totals, "unreadable": unreadable})
    show.end(summary, totals)
    if parquet is not None and not json:
        count = summary.predicted
        echo(f"{parquet}: {count} row{'' if count == 1 else 's'}, one for each image predicted")
    if summary.unreadable:
        return fail(f"{len(summary.unreadable)} of {len(files)} images could not be read", 1)
    return 0


def _divided(paths: list[str], model: str | None) -> tuple[str, list[str]]:
    """Split the paths of a command line into model and images."""
    from dynaslim import shipped

    first, *others = paths
    if model is not None:
        check(
            not _is_model(first) or bool(run_checkpoints(first)),
            f"{first}: is a model, and --model {model} names one too; give one of them",
        )
        return model, paths
    is_folder = Path(first).is_dir() and not _is_model(first)
    check(
        not (is_folder and first in shipped.names()),
        f"{first}: is a folder here, and a model that ships; give --model {first} for the model, "
        f"or ./{first} for the folder",
    )
    if _names_images(first):
        return str(shipped.DEFAULT), paths
    check(bool(others) or not is_folder, f"{first}: holds no images, and is no package")
    check(bool(others), f"{first}: is taken for the model; name image files, folders or patterns")
    return first, others


def _is_model(path: str) -> bool:
    """Whether a path is certainly a model: by its suffix, a hub address, a package or a run."""
    # a run's folder holds plots too, but means the run's network
    is_folder = is_package(path) or is_saved_folder(path) or bool(run_checkpoints(path))
    return path.endswith(".safetensors") or is_hub_address(path) or is_folder


def _names_images(path: str) -> bool:
    """Whether a path is an image file (by suffix), a folder that holds images, or a pattern."""
    import glob

    from dynaslim.data.decode import IMAGE_SUFFIXES

    if _is_model(path):
        return False
    if Path(path).is_dir():
        return any(f.suffix.lower() in IMAGE_SUFFIXES for f in Path(path).rglob("*"))
    return Path(path).suffix.lower() in IMAGE_SUFFIXES or (
        glob.has_magic(path) and not Path(path).exists()
    )


def _stream_of(paths: list[str], model: str | None) -> tuple[str, str]:
    """Split the paths of a command line into model and source of frames."""
    from dynaslim import shipped

    *models, source = paths
    right = "give one folder of frames, or - for JPEGs from standard input"
    check(len(models) + (model is not None) <= 1, f"--stream: {' '.join(paths)}: {right}")
    check(not _is_model(source), f"--stream: {source} is a model; {right}")
    check(source == "-" or Path(source).is_dir(), f"--stream: {source} is no folder; {right}")
    return models[0] if models else model or str(shipped.DEFAULT), source


def _stream(
    model: str,
    source: str,
    options: StreamOptions,
    *,
    backend: str,
    json: bool,
    cache_dir: str | None,
) -> int:
    """Answer frames, one line each, until they end or a signal arrives."""
    from dynaslim.predict import open_engine
    from dynaslim.predict_stream import (
        BrokenFrame,
        Stream,
        StreamSummary,
        Waiting,
        read_pipe,
        start_reader,
        watch_folder,
    )

    engine = open_engine(model, backend, batch_size=1, cache_dir=cache_dir)
    answering = Stream(engine, options)
    curve = engine.curve
    if curve is not None and options.budget is not None:
        note = curve.out_of_reach(options.budget)
        sys.stderr.write(f"{note}\n" if note else "")
    engine.warm_up()  # so that no frame waits for compiling
    answering.warm_up()
    waiting, summary = Waiting(drop=options.latency_ms is not None), StreamSummary()
    write = _json_line if json else _CsvLines(sys.stdout).write
    read = partial(read_pipe, 0) if source == "-" else partial(watch_folder, Path(source))
    with _stopped_by_signals(waiting):
        start_reader(partial(read, waiting), waiting)
        try:
            for row in answering.answers(waiting):
                summary.add(row)
                if isinstance(row, BrokenFrame):
                    file = f" ({printable(row.file)})" if row.file else ""
                    sys.stderr.write(f"left out: frame {row.frame}{file}: {row.reason}\n")
                    continue
                write(row)
                sys.stdout.flush()
            interrupted = waiting.stopped
        finally:
            waiting.stop()
            sys.stderr.write(f"{summary.line(waiting)}\n")
    if not interrupted and not summary.answered:
        return fail("standard input: holds no JPEG that could be read", 1)
    return 0


@contextmanager
def _stopped_by_signals(waiting: Waiting) -> Iterator[None]:
    """End the stream at the first SIGINT or SIGTERM; a second one has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, _: Any) -> None:
        waiting.stop()
        signal.signal(number, before[signal.Signals(number)])

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _json_line(row: StreamRow) -> None:
    sys.stdout.write(json_text.dumps(row.to_dict(), allow_nan=False) + "\n")


class _CsvLines:
    """Writes CSV: a header line, then a line for each row."""

    def __init__(self, out: TextIO) -> None:
        self._writer = csv.writer(out, lineterminator="\n")
        self._started = False

    def write(self, row: StreamRow) -> None:
        values = row.to_dict()
        if not self._started:
            self._writer.writerow(values)
            self._started = True
        values["file"] = printable(values["file"] or "")
        self._writer.writerow(values.values())


class _Json:
    """Writes one JSON object; rows are written at once, so that memory does not grow with them."""

    def __init__(self, out: TextIO) -> None:
        # the stream itself, since sys.stdout is redirected at times
        self._out = out
        self._started = False

    def add(self, row: Prediction) -> None:
        # nothing is written before the first row: an early failure leaves no partial object
        self._out.write(",\n    " if self._started else '{\n  "images": [\n    ')
        self._started = True
        self._out.write(json_text.dumps(row.to_dict(), allow_nan=False))

    def end(self, summary: Summary, totals: dict[str, Any]) -> None:
        self._out.write("\n  ],\n" if self._started else '{\n  "images": [],\n')
        rest = {"unreadable": [one.to_dict() for one in summary.unreadable], **totals}
        self._out.write(json_text.dumps(rest, indent=2, allow_nan=False).removeprefix("{\n") + "\n")


class _Screen:
    """Prints a line for each of a few images, or totals for many."""

    def __init__(self, few: bool) -> None:
        self._rows: list[Prediction] | None = [] if few else None

    def add(self, row: Prediction) -> None:
        if self._rows is not None:
            self._rows.append(row)

    def end(self, summary: Summary, totals: dict[str, Any]) -> None:
        if self._rows:
            echo(_rows_table(self._rows))
        elif summary.predicted:
            echo(_routes_table(totals))
        if not summary.predicted:
            echo("no image could be read")
            return
        images = f"{summary.predicted} image{'' if summary.predicted == 1 else 's'}"
        madds = f"{totals['mean_madds'] / 1e6:.2f} M MAdds on average"
        echo(f"{images}, {madds}, {totals['images_per_s']:.1f} images/s, by {totals['model']}")
        if summary.expected_madds is not None:
            echo(_spent(summary, totals))


def _spent(summary: Summary, totals: dict[str, Any]) -> str:
    """A sentence comparing the images' mean cost with what the budget promises."""
    expected, spending = summary.expected_madds, summary.spending
    assert expected is not None
    message = (
        f"budget {totals['budget']}: {spending.ratio:.2f} times the {expected / 1e6:.2f} M of the "
        f"images that it was measured on"
    )
    if not spending.differs:
        return message
    message += "; these are unlike them"
    if spending.ratio > 1 and not totals["hold"]:
        message += ", and --hold would keep their mean under the budget"
    return message


def _rows_table(rows: list[Prediction]) -> Any:
    from rich.text import Text

    table = new_table("file", "class", "confidence", "route", "MAdds")
    table.columns[0].no_wrap = False
    table.columns[0].overflow = "fold"  # a truncated name would be useless
    for row in rows:
        # as Text, so that brackets in names are not markup
        top = row.top or ((row.label, row.class_name, row.confidence),)
        table.add_row(
            Text(printable(row.file)),
            Text("\n".join(printable(str(n) if name is None else name) for n, name, _ in top)),
            "\n".join(f"{confidence:.1%}" for _, _, confidence in top),
            row.route,
            f"{row.madds / 1e6:.2f} M"
            + (", escalated" if row.escalated else "")
            + (", mirrored" if row.mirrored else ""),
        )
    return table


def _routes_table(totals: dict[str, Any]) -> Any:
    table = new_table("route", "mean MAdds", "images", "share")
    for entry in totals["routes"]:
        table.add_row(
            entry["route"],
            f"{entry['mean_madds'] / 1e6:.2f} M",
            str(entry["images"]),
            f"{entry['share']:.1%}",
        )
    return table
