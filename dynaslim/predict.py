"""Predictions for image files, which are decoded in the background while the engine runs.

This module needs neither torch nor a data set: an exported package is enough. Files are processed
as a stream, so memory does not grow with their number.

Suffixes: B images of a batch, C channels, S side in pixels, N classes, G gates.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from dynaslim.data.decode import IMAGE_SUFFIXES, decode_image, is_image_file
from dynaslim.data.skipped import CorruptImageError
from dynaslim.errors import CheckpointError, DataError, UsageError, check
from dynaslim.model_names import find_model
from dynaslim.preprocessing import Preprocessing, normalise_pixels
from dynaslim.runtime.spending import Ledger, Spending

if TYPE_CHECKING:
    from dynaslim.runtime.engine import Engine
    from dynaslim.runtime.options import RoutedOutput

AHEAD: Final = 2
"""Batches decoded or queued for decoding while the engine works on one."""
BATCH_SIZE: Final = 64
_MOST_WORKERS: Final = 32

Budget = float | str | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for an image, and its cost."""

    file: str
    """The file's name as given; bytes that are not UTF-8 are written as \\xNN."""
    label: int
    """Number of the class, from 0."""
    class_name: str | None
    """Name of the class; None if the network has no class names."""
    confidence: float
    """Softmax of the class's logit, 0..1."""
    route: str
    """Widths of the stages, such as 12-24-48-80-160."""
    madds: float
    """Multiply-adds spent on the image, summed over all its routes if it escalated."""
    escalated: bool = False
    """Whether the image escalated because its margin was small; `route` is its last route."""
    mirrored: bool = False
    """Whether the last step ran the mirror image; the answer is then the mean of both."""
    top: tuple[tuple[int, str | None, float], ...] = ()
    """Label, name and softmax of the likeliest classes, in order, if `top_k` is above 1."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `label` is called `class`, as in the tables."""
        top = [
            {"class": label, "class_name": name, "confidence": confidence}
            for label, name, confidence in self.top
        ]
        return {
            "file": self.file,
            "class": self.label,
            "class_name": self.class_name,
            "confidence": self.confidence,
            "route": self.route,
            "madds": self.madds,
            "escalated": self.escalated,
            "mirrored": self.mirrored,
            **({"top": top} if top else {}),
        }


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image without a prediction, because it cannot be read."""

    file: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        return {"file": self.file, "reason": self.reason}


Row = Prediction | Unreadable
Rows = Generator[Row, None, None]


# -- which files ----------------------------------------------------------------------------------


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """List the image files that paths refer to, each once, in the order given.

    A file is taken whatever its name. A folder stands for all files in and below it with an image
    suffix (`IMAGE_SUFFIXES`), sorted; links to folders are not followed. A pattern (`*`, `?`,
    `[a-z]`; `**` for any depth) stands for the matching folders and the matching files with an
    image suffix, sorted. An existing file is never taken for a pattern.

    Raises:
        UsageError: if a path yields no image; the message names it.
        OSError: if a folder cannot be listed.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for file in _named(str(path)):
            found.setdefault(os.path.abspath(file), Path(file))
    return list(found.values())


def _named(path: str) -> list[str]:
    if os.path.isdir(path):
        files = _in_folder(path)
        check(bool(files), f"{path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return files
    if os.path.lexists(path):
        return [path]
    check(glob.has_magic(path), f"{path or repr(path)}: no such file or folder")
    files = []
    for match in _matches(path):
        if os.path.isdir(match):
            files += _in_folder(match)
        elif is_image_file(match):
            files.append(match)
    check(bool(files), f"{path}: matches no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _matches(pattern: str) -> list[str]:
    root = Path(pattern).anchor
    try:
        # not by the module glob, whose ** loops where a link leads back to a parent
        return sorted(
            map(str, Path(root).glob(os.path.relpath(pattern, root) if root else pattern))
        )
    except ValueError as error:
        raise UsageError(f"{pattern}: {error}") from None


def _in_folder(root: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise error

    folders = os.walk(root, onerror=fail)
    files = (os.path.join(folder, name) for folder, _, names in folders for name in names)
    return sorted(filter(is_image_file, files), key=lambda file: file.split(os.sep))


def name_of(file: str | Path) -> str:
    """A file's name as text that can be written to any output."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


# -- predicting -----------------------------------------------------------------------------------


def open_engine(model: str | Path, backend: str = "auto", **options: Any) -> Engine:
    """Make an engine for a checkpoint or an exported package (names: `dynaslim.model_names`).

    Raises:
        UsageError: as in `Engine`.
        CheckpointError: if the model cannot be read, or has no preprocessing.
    """
    found = find_model(model, ("checkpoint", "package"))
    from dynaslim.runtime.engine import Engine  # late: an unknown model fails without this import

    make = Engine.from_package if found.kind == "package" else Engine.from_checkpoint
    engine = make(found.path, backend=backend, **options)
    if engine.preprocessing is None:
        raise CheckpointError(f"{model}: does not say how images are prepared (preprocessing)")
    return engine


def preprocessing_of(engine: Engine) -> Preprocessing:
    """The preprocessing of an engine's images; raises `UsageError` if it has none."""
    if engine.preprocessing is None:
        raise UsageError("the engine does not say how images are prepared (preprocessing)")
    return engine.preprocessing


def predict(
    engine: Engine,
    files: Sequence[str | Path],
    *,
    batch_size: int = BATCH_SIZE,
    budget: Budget = None,
    hold: bool = False,
    workers: int | None = None,
    top_k: int = 1,
) -> Rows:
    """Yield a row for every file, in order; an `Unreadable` for a file that cannot be read.

    `workers` threads (by default one per core) decode at most `AHEAD` batches ahead of the engine.
    `budget` is passed to the engine; with `hold`, the mean cost of these files never exceeds it
    after any batch (see `Engine`). A batch is a run of consecutive files, so its composition
    depends on the files alone. Close the iterator to stop early. With `top_k` above 1, a row lists
    that many classes.

    Raises:
        UsageError: for a batch size, workers or top_k below 1, for `hold` without a budget, and as
            in the engine.
        DataError: if the network's output is not finite.
    """
    check_numbers(batch_size, workers)
    check(top_k >= 1, f"top_k {top_k}: must be at least 1")
    preprocessing = preprocessing_of(engine)
    check(budget is not None or not hold, "hold: give the budget that is to hold")
    options: dict[str, Any] = {"budget": budget}
    if hold:
        options["hold"] = Ledger()
    route_name = route_names(engine)
    threads = workers or min(os.cpu_count() or 1, _MOST_WORKERS)

    def rows() -> Rows:
        with closing(_decoded(files, preprocessing, batch_size, threads)) as batches:
            for batch in batches:
                made = answers_for(engine, batch, preprocessing, options, route_name, top_k)
                answers = iter(made)
                answered = [one if isinstance(one, Unreadable) else next(answers) for one in batch]
                del batch  # frees the pixels before waiting for the next batch
                yield from answered

    return rows()


def check_numbers(batch_size: int, workers: int | None) -> None:
    """Raise `UsageError` unless both are at least 1; `workers` may be None."""
    check(batch_size >= 1, f"batch size {batch_size}: must be at least 1")
    check(workers is None or workers >= 1, f"workers {workers}: must be at least 1")


def route_names(engine: Engine) -> Callable[[tuple[int, ...]], str]:
    """A cached function from the width indices behind the gates to the name of the route."""
    return cache(lambda choices: str(engine.route_of(choices)))


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image."""

    file: str
    pixels_CSS: np.ndarray
    """uint8, as `decode_image` returns them."""


def _decoded(
    files: Sequence[str | Path], preprocessing: Preprocessing, batch_size: int, threads: int
) -> Generator[list[Picture | Unreadable], None, None]:
    """Yield batches in order, decoded ahead by threads (Pillow releases the GIL)."""
    waiting: deque[Future[Picture | Unreadable]] = deque()
    rest = iter(files)
    pool = ThreadPoolExecutor(threads, "dynaslim-decode")

    def look_ahead() -> None:
        for file in islice(rest, AHEAD * batch_size - len(waiting)):
            waiting.append(pool.submit(read_picture, file, preprocessing))

    try:
        look_ahead()
        while waiting:
            batch = [waiting.popleft().result() for _ in range(min(batch_size, len(waiting)))]
            look_ahead()  # starts the next batch before the engine gets this one
            yield batch
            del batch
    finally:
        pool.shutdown(cancel_futures=True)


def read_picture(file: str | Path, preprocessing: Preprocessing) -> Picture | Unreadable:
    """Read and decode an image file."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        return Unreadable(name_of(file), f"cannot be read: {error.strerror or error}")
    return picture_of(content, preprocessing, name_of(file))


def picture_of(content: bytes, preprocessing: Preprocessing, name: str) -> Picture | Unreadable:
    """Decode the content of an image file."""
    if not content:
        return Unreadable(name, "is empty")
    try:
        return Picture(name, decode_image(content, preprocessing, name))
    except CorruptImageError as error:
        return Unreadable(name, error.reason)


def answers_for(
    engine: Engine,
    batch: Sequence[Picture | Unreadable],
    preprocessing: Preprocessing,
    options: Mapping[str, Any],
    route_name: Callable[[tuple[int, ...]], str],
    top_k: int,
) -> list[Prediction]:
    """Predictions for the readable images of a batch."""
    pictures = [one for one in batch if isinstance(one, Picture)]
    if not pictures:
        return []
    pixels_BCSS = np.stack([picture.pixels_CSS for picture in pictures])
    output = engine(normalise_pixels(pixels_BCSS, preprocessing), **options)
    broken_B = ~np.isfinite(np.asarray(output.logits)).all(1)
    if broken_B.any():
        where = pictures[int(broken_B.argmax())].file
        raise DataError(f"{where}: the network's output for it is not finite")
    names, predictions = engine.class_names, []
    for picture, answer in zip(pictures, answers_of(output, top_k), strict=True):
        top = tuple((n, None if names is None else names[n], p) for n, p in answer.top)
        predictions.append(
            Prediction(
                picture.file,
                *top[0],
                route_name(answer.choices),
                answer.madds,
                answer.escalated,
                answer.mirrored,
                top if top_k > 1 else (),
            )
        )
    return predictions


class Answer(NamedTuple):
    """The network's answer for one image."""

    top: list[tuple[int, float]]
    """The likeliest classes and their probabilities, in order."""
    choices: tuple[int, ...]
    """The width index behind each gate."""
    madds: float
    escalated: bool
    mirrored: bool
    logits: np.ndarray
    """(N,) float64."""


def answers_of(output: RoutedOutput, top_k: int) -> list[Answer]:
    """The rows of an engine's output; raises `DataError` if logits are not finite."""
    logits_BN = np.asarray(output.logits, np.float64)
    if not np.isfinite(logits_BN).all():
        raise DataError("the network's output is not finite; its weights are damaged")
    return [
        Answer(top, tuple(choices), *rest)
        for top, choices, *rest in zip(
            likeliest(logits_BN, top_k),
            np.asarray(output.routes).tolist(),
            np.asarray(output.madds).tolist(),
            np.asarray(output.escalated).tolist(),
            np.asarray(output.mirrored).tolist(),
            logits_BN,
            strict=True,
        )
    ]


def likeliest(logits_BN: np.ndarray, top_k: int) -> list[list[tuple[int, float]]]:
    """The likeliest classes of each row with their softmax, in order; ties by class number."""
    # one more than top_k, because argpartition picks arbitrarily among ties at its boundary
    count = min(top_k + 1, logits_BN.shape[1])
    some_BK = np.sort(np.argpartition(-logits_BN, count - 1, axis=1)[:, :count], axis=1)
    by_logit_BK = np.argsort(-np.take_along_axis(logits_BN, some_BK, 1), axis=1, kind="stable")
    order_BK = np.take_along_axis(some_BK, by_logit_BK, 1)[:, :top_k]
    odds_BN = np.exp(logits_BN - logits_BN.max(1, keepdims=True))
    best_BK = np.take_along_axis(odds_BN, order_BK, 1) / odds_BN.sum(1, keepdims=True)
    return [
        list(zip(order, best, strict=True))
        for order, best in zip(order_BK.tolist(), best_BK.tolist(), strict=True)
    ]


# -- totals ---------------------------------------------------------------------------------------


class Summary:
    """Totals over rows, updated row by row."""

    def __init__(self, expected_madds: float | None = None) -> None:
        """`expected_madds` is the mean cost of an image by the curve of the budget."""
        self.expected_madds = expected_madds
        self.spending = Spending()
        """Actual costs compared with the expected one."""
        self.predicted = 0
        """Number of images with a prediction."""
        self.unreadable: list[Unreadable] = []
        self._routes: dict[str, tuple[int, float]] = {}

    def add(self, row: Row) -> None:
        if isinstance(row, Unreadable):
            self.unreadable.append(row)
            return
        self.predicted += 1
        if self.expected_madds is not None:
            self.spending.add([row.madds], self.expected_madds)
        images, madds = self._routes.get(row.route, (0, 0.0))
        self._routes[row.route] = (images + 1, madds + row.madds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with routes by rising cost and without the unreadable files."""
        total = sum(madds for _, madds in self._routes.values())
        routes = [
            {
                "route": route,
                "images": images,
                "share": images / self.predicted,
                "mean_madds": madds / images,
            }
            for route, (images, madds) in self._routes.items()
        ]
        beside_the_curve = {}
        if self.expected_madds is not None:
            beside_the_curve = {
                "expected_madds": self.expected_madds,
                "cost_ratio": self.spending.ratio if self.predicted else None,
                "unlike_curve": self.spending.differs,
            }
        return {
            "predicted": self.predicted,
            "mean_madds": total / self.predicted if self.predicted else None,
            **beside_the_curve,
            "routes": sorted(routes, key=lambda entry: (entry["mean_madds"], entry["route"])),
        }
