"""Predictions by the workers of a Ray cluster; the rows equal those of a single process.

The files are cut into pieces of whole batches. A worker (an actor of Ray Data) has one engine and
processes one piece at a time. A piece is the unit of retry: if a worker dies, Ray starts another
and gives it the piece again. All rows are sent to this process, which orders and counts them.
Workers write nothing, so nothing is written twice.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim.errors import DataError, DynaslimError, check, first_line
from dynaslim.model_names import find_model
from dynaslim.predict import (
    BATCH_SIZE,
    Budget,
    Rows,
    check_numbers,
    name_of,
    open_engine,
    predict,
)
from dynaslim.runtime.libraries import require

if TYPE_CHECKING:
    from dynaslim.runtime.engine import Engine

PIECE_BATCHES: Final = 4
"""Batches per piece: enough to decode pictures while the engine runs."""
MOST_PIECES: Final = 5_000
RETRIES: Final = 3
"""Retries of a piece whose worker died; limited, because a piece might kill every worker."""
OBJECT_STORE_BYTES: Final = 200 * 2**20
"""Shared memory of a cluster started here; it only has to hold file names and rows."""
ANSWER_S: Final = 10.0
"""Time limit in seconds for connecting to a cluster."""


def predict_ray(
    model: str | Path,
    files: Sequence[str | Path],
    *,
    backend: str = "auto",
    budget: Budget = None,
    hold: bool = False,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    cache_dir: str | Path | None = "auto",
    make_engine: Callable[[], Engine] | None = None,
) -> Rows:
    """`dynaslim.predict.predict` by `workers` actors, each with one core and one engine.

    The cluster is the one that this process is connected to, else that of `RAY_ADDRESS`, else one
    on this machine for this call only. `workers` defaults to the cluster's number of cores. Every
    machine must have the model and the files at the same absolute paths. The backend "auto" is
    resolved here, once for all workers. With `hold`, the budget holds separately for every piece.
    `cache_dir` is passed to the engines. `make_engine` creates a worker's engine, by default with
    `open_engine`; it is pickled and sent to the workers.

    Raises:
        UsageError: as in `predict` and `open_engine`, or if ray is not installed.
        DataError: if the cluster cannot be reached, or workers died at a piece and all its retries.
        DynaslimError: an error of an engine on a worker; the message names the machine.
    """
    check_numbers(batch_size, workers)
    check(budget is not None or not hold, "hold: give the budget that is to hold")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ part logs to our stderr
    ray, data = require("ray"), require("ray.data")
    if make_engine is None:
        options = {"workers": 1, "batch_size": batch_size, "cache_dir": cache_dir}
        # a model that cannot run fails here, before a cluster is started
        path = find_model(model, ("checkpoint", "package")).path.absolute()
        chosen = open_engine(path, backend, **options).backend
        make_engine = partial(open_engine, path, chosen, **options)
    constructor_args = (make_engine, batch_size, budget, hold)

    def rows() -> Rows:
        with _cluster(ray, workers):
            count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            pieces = cut(files, batch_size, count)
            if not pieces:
                return
            with _quiet_logs():
                dataset = data.from_items(pieces, override_num_blocks=len(pieces))
                dataset.context.enable_progress_bars = False
                dataset.context.print_on_execution_start = False
                dataset.context.execution_options.preserve_order = True
                answered = _mapped(
                    dataset,
                    _Worker,
                    fn_constructor_args=constructor_args,
                    batch_size=1,
                    batch_format="pyarrow",
                    compute=data.ActorPoolStrategy(size=count),
                    num_cpus=1,
                )
                try:
                    yield from _in_order(answered, files)
                except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                    raise DataError(
                        f"a worker of the cluster died, and at {RETRIES} retries again: "
                        f"{first_line(error)}"
                    ) from None

    return rows()


def cut(files: Sequence[str | Path], batch_size: int, workers: int) -> list[dict[str, Any]]:
    """Cut the files into pieces: the number of the first file, and absolute paths as bytes.

    Pieces are whole batches, so every batch has the same images as in a single process. There are
    at least two pieces per worker if there are enough batches.
    """
    batches = -(-len(files) // batch_size)
    in_piece = max(1, min(PIECE_BATCHES, batches // (2 * workers)), -(-batches // MOST_PIECES))
    step = in_piece * batch_size
    return [
        {
            "first": first,
            # absolute, because workers have other working folders; bytes, as paths may not be UTF-8
            "files": [os.fsencode(os.path.abspath(file)) for file in files[first : first + step]],
        }
        for first in range(0, len(files), step)
    ]


def _mapped(dataset: Any, worker: type[Any], **options: Any) -> Any:
    """`map_batches` with limited retries, if this Ray has the option; by default they are not."""
    if "ray_remote_args_fn" in inspect.signature(dataset.map_batches).parameters:
        options["ray_remote_args_fn"] = _remote_args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in Ray 2.60, without a replacement
        return dataset.map_batches(worker, **options)


def _remote_args() -> dict[str, Any]:
    return {"max_restarts": -1, "max_task_retries": RETRIES}


def _in_order(answered: Any, files: Sequence[str | Path]) -> Rows:
    """Yield the rows, with file names as given; checks that there is one row for each file."""
    done = 0
    for table in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for piece in table.to_pylist():
            rows = pickle.loads(piece["rows"])
            if isinstance(rows, DynaslimError):
                raise rows
            # this module promises ordered rows; stop rather than return rows out of order
            if piece["first"] != done:
                raise RuntimeError(f"row {piece['first']} came from the cluster for row {done}")
            for row in rows:
                yield replace(row, file=name_of(files[done]))
                done += 1
    if done != len(files):
        raise RuntimeError(f"{done} rows came from the cluster for {len(files)} files")


class _Worker:
    """Predicts pieces of files, all with one engine."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        batch_size: int,
        budget: Budget,
        hold: bool,
    ) -> None:
        self._make_engine = make_engine
        # if `hold` keeps every piece within the budget, the mean over all pieces is too
        self._options: dict[str, Any] = {"batch_size": batch_size, "budget": budget, "hold": hold}
        self._engine: Engine | None = None

    def __call__(self, piece: Any) -> Any:
        """Map a table of one piece to a table of its first number and its pickled rows or error."""
        import pyarrow as pa  # type: ignore[import-untyped]

        files = [Path(os.fsdecode(file)) for file in piece["files"][0].as_py()]
        try:
            if self._engine is None:  # not in __init__, whose errors Ray would report its own way
                self._engine = self._make_engine()
            with closing(predict(self._engine, files, workers=1, **self._options)) as answers:
                rows: Any = list(answers)
        except DynaslimError as error:
            # returned as a value, because Ray would wrap an exception in a long message
            rows = type(error)(f"{error} (on {socket.gethostname()})")
        return pa.table({"first": piece["first"], "rows": [pickle.dumps(rows)]})


@contextmanager
def _cluster(ray: Any, workers: int | None) -> Generator[None, None, None]:
    """Connect to a cluster inside the context; an existing connection is used and kept."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        options = {
            "num_cpus": workers or os.cpu_count() or 1,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise DataError(f"RAY_ADDRESS {address}: Ray does not start: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise `DataError` if nothing listens at the address; Ray itself would retry for minutes."""
    host, colon, port = address.partition("://")[2 if "://" in address else 0].rpartition(":")
    if not colon or not port.isdecimal():  # for example "auto", which Ray resolves
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise DataError(
            f"RAY_ADDRESS {address}: no Ray cluster answers: {error.strerror or error}"
        ) from None


@contextmanager
def _quiet_logs() -> Generator[None, None, None]:
    """Keep Ray Data from logging to stderr in the context, unless RAY_DATA_LOG_LEVEL is set."""
    logger = logging.getLogger("ray.data")
    before = logger.level
    if "RAY_DATA_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
