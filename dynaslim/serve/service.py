"""The served models, each with its batcher, state and metrics; HTTP is handled in `app`."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import prometheus_client
from PIL import Image

from dynaslim.errors import UsageError, check
from dynaslim.runtime.adaptive import LEAST_BATCHES
from dynaslim.runtime.cache import usable_cores
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.options import RoutedOutput
from dynaslim.runtime.spending import Spending
from dynaslim.serve.batcher import Batcher, FairSemaphore, StoppingError
from dynaslim.serve.budgets import Setting
from dynaslim.serve.decoding import BYTES_PER_PIXEL, Decoder, DecodingPool
from dynaslim.serve.model_info import ModelInfo
from dynaslim.serve.options import MEGABYTE, ServeOptions

State = Literal["new", "starting", "ready", "failed", "unloading"]
MEASURED_ROWS: Final = 8
RECENT: Final = 1000
"""Number of recent images whose mean cost is compared with the budget curve."""
_SECONDS: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Buffers:
    """The bytes that all request bodies in memory take, and their limit."""

    def __init__(self, most: int) -> None:
        self.held = 0
        self.most = most


class ServedModel:
    """A served model: its engine, queue, costs, state and metrics."""

    def __init__(
        self, service: Service, name: str, engine: Engine, path: Path | None = None
    ) -> None:
        """Check the server's options against the model, as `Batcher` does; compiles nothing."""
        self.service = service
        self.name = name
        self.engine = engine
        options = service.options
        self.batcher = Batcher(engine, options, on_batch=self._count, turns=service.turns)
        self.info = ModelInfo(engine)
        self.file_bytes = float("nan") if path is None else _file_bytes(path)
        """Bytes of the model's files; NaN if an engine was passed instead of a path."""
        self.spending = Spending(last=RECENT)
        """Costs of recent images with a budget, relative to the budget curve."""
        self.decoder = Decoder(self.batcher.preprocessing, options.max_pixels)
        self.state: State = "new"
        self.error: Exception | None = None
        """Why the model did not start; set if the state is "failed"."""
        self.backend: str | None = None
        """Name of the engine's backend; set once the model is ready."""
        self.metrics = Metrics(self)

    @property
    def accepting(self) -> bool:
        """Whether a prediction that arrives now is accepted."""
        return self.state == "ready" and not self.service.stopping

    def warm_up(self) -> None:
        """Compile and time the network; sets `error` on failure."""
        try:
            self.engine.warm_up()
            self.backend = self.engine.backend
            self._measure_throughput()
            self.info.measure()
            self.decoder(_one_pixel())  # Pillow imports its plugins when they are first used
            self.state = "ready"
        except Exception as error:
            self.error = error
            self.state = "failed"

    def _measure_throughput(self) -> None:
        """Run batches to allocate their memory and to measure the throughput."""
        spec, side, most = self.engine.spec, self.info.side, self.service.options.max_batch
        shape = (spec.in_channels, side, side)
        x_BCSS = np.random.default_rng(0).standard_normal((most, *shape), np.float32)
        rows = min(MEASURED_ROWS, most)
        for turn, count in enumerate((most, 1, *[rows] * (LEAST_BATCHES + 1))):
            with self.service.turns:
                start = time.perf_counter()
                self.engine(x_BCSS[:count])
            if turn > 2:  # caches are cold before
                self.batcher.observe(rows, time.perf_counter() - start)

    def close(self) -> None:
        """Accept no more predictions, answer the accepted ones, and end the thread."""
        self.state = "unloading"
        self.batcher.close()

    def _count(self, output: RoutedOutput, setting: Setting, seconds: float) -> None:
        self.metrics.batch(output, seconds)
        if setting.point is not None:
            self.spending.add(output.madds.tolist(), setting.point.madds)

    @property
    def budget_share(self) -> float:
        """Budget of requests without one, as a share of the widest route's cost; NaN if none."""
        point = self.batcher.budget.point
        return float("nan") if point is None else point.share


Source = tuple[str | None, Engine, Path | None]
"""A model's name (None for the network's), its engine, and its file or folder (if any)."""


class Service:
    """The models of a server and what they share: cores, decoders and memory limits."""

    def __init__(
        self,
        sources: Sequence[Source],
        options: ServeOptions,
        open_model: Callable[[Path], Engine],
        places: int = 1,
    ) -> None:
        """Up to `places` batches run at once; `open_model` opens models that are loaded later.
        Raises `UsageError` if two models have the same name, for options that exclude each other,
        and as `ServedModel`.
        """
        several = len(sources) > 1
        check(
            not several or options.name is None,
            f"--name {options.name}: is for a single model; write NAME=PATH for each",
        )
        check(
            options.model_folder is None or options.admin_token is not None,
            "--model-folder: set DYNASLIM_ADMIN_TOKEN, without which nothing can be loaded",
        )
        self.options = options
        self.turns = FairSemaphore(places)
        self.buffers = Buffers(round(options.max_buffer_mb * MEGABYTE))
        self.stopping = False
        self.in_flight = 0
        """Number of accepted predictions that are not answered yet."""
        self.tracer: Any = None
        """OpenTelemetry's tracer; None if tracing is off."""
        self.lag_s = 0.0
        """Estimated time that the most recent request waited for the event loop."""
        self.change: tuple[str, Literal["LOADING", "UNLOADING"]] | None = None
        """Name of the model that is being loaded or unloaded, and which of the two."""
        self.failures: dict[str, str] = {}
        """Error messages by name of the models whose most recent load failed."""
        self._open_model = open_model
        self._changing = threading.Lock()
        self._lock = threading.Lock()
        self.models: dict[str, ServedModel] = {}
        """Models by name, `first` first; the dict is replaced on changes, never modified."""
        for given, engine, path in sources:
            name = options.name or given or engine.spec.name
            try:
                check(name not in self.models, "there are two of that name; write NAME=PATH")
                self.models[name] = ServedModel(self, name, engine, path)
            except BaseException as error:
                for model in self.models.values():
                    model.close()
                if several and isinstance(error, UsageError):
                    raise UsageError(f"model {name}: {error}") from None
                raise
        self.first = next(iter(self.models))
        """Name of the model for requests that name none."""
        threads = options.decoders or usable_cores()
        self.decoders = ThreadPoolExecutor(threads, "dynaslim-serve-decode")
        self.large = DecodingPool(BYTES_PER_PIXEL * options.max_pixels, threads)
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        self._registry.register(_ModelMetrics(self, several or options.model_folder is not None))
        gauge = partial(_gauge, self._registry)
        gauge("body_bytes", "Bytes of bodies that are held.", lambda: self.buffers.held)
        text = "How long requests wait before the server looks at them."
        gauge("lag_seconds", text, lambda: self.lag_s)

    @property
    def state(self) -> State:
        """The models' combined state: "failed", "starting" or "new" if any is so, else "ready"."""
        states = {model.state for model in self.models.values()}
        some: tuple[State, ...] = ("failed", "starting", "new")
        return next((state for state in some if state in states), "ready")

    @property
    def accepting(self) -> bool:
        """Whether predictions by all models are accepted."""
        return self.state == "ready" and not self.stopping

    def start(self) -> None:
        """Compile and time the networks one by one in a thread; further calls do nothing."""
        with self._lock:
            if self.state != "new":
                return
            new = [model for model in self.models.values() if model.state == "new"]
            for model in new:
                model.state = "starting"

        def warm_up() -> None:
            for model in new:
                model.warm_up()
                if model.error is not None:
                    break

        threading.Thread(target=warm_up, name="dynaslim-start", daemon=True).start()

    def load(self, name: str, path: Path) -> None:
        """Load and serve the model at a path, which may take minutes.

        A model of the same name serves until the new one is ready.

        Raises:
            StoppingError: if the server is stopping.
            Exception: if the model cannot be read or does not start; served models do not change.
        """
        with self._one_change(name, "LOADING"):
            model = ServedModel(self, name, self._open_model(path), path)
            model.warm_up()
            former: ServedModel | None = model
            with self._lock:
                if model.error is None and not self.stopping:
                    former = self.models.get(name)
                    models = {**self.models, name: model}.items()
                    self.models = dict(sorted(models, key=lambda one: one[0] != self.first))
            if former is not None:
                former.close()
        if former is model:
            raise model.error or StoppingError("the server is stopping")

    def unload(self, name: str) -> None:
        """Stop serving a model; returns when all requests it accepted are answered. Raises
        `UsageError` if there is no such model.
        """
        with self._one_change(name, "UNLOADING"):
            model = self.models.get(name)
            if model is None:
                raise UsageError(f"model {name!r:.60}: is not loaded")
            self.models = {n: one for n, one in self.models.items() if n != name}
            model.close()

    @contextmanager
    def _one_change(self, name: str, what: Literal["LOADING", "UNLOADING"]) -> Iterator[None]:
        with self._changing:
            self.change = name, what
            try:
                yield
            finally:
                self.change = None

    def metrics_text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        text: bytes = prometheus_client.generate_latest(self._registry)
        return text

    def stop(self) -> None:
        """Accept no more predictions; accepted ones are still answered."""
        with self._lock:
            self.stopping = True

    def close(self) -> None:
        """Answer the accepted predictions, and end all threads and processes."""
        self.stop()
        for model in self.models.values():
            model.batcher.stop()
        for model in self.models.values():
            model.close()  # before the decoders, as it waits for decoded images
        self.decoders.shutdown()
        self.large.close()


def _file_bytes(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return float(sum(file.stat().st_size for file in files if file.is_file()))


def _one_pixel() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


class Metrics:
    """A model's Prometheus metrics in a separate registry (see docs/serving.md)."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.registry = prometheus_client.CollectorRegistry()
        self._owed = 0.0

        counter = partial(prometheus_client.Counter, registry=self.registry)
        histogram = partial(prometheus_client.Histogram, registry=self.registry)
        gauge = partial(_gauge, self.registry)
        self._requests = counter(
            "dynaslim_requests", "Predictions asked for, by status; 499: client left.", ("code",)
        )
        self._latency = histogram(
            "dynaslim_request_seconds",
            "From a request's head to its answer, answered ones only.",
            buckets=_SECONDS,
        )
        self._rejected = counter(
            "dynaslim_rejected", "Requests refused because of load or stopping.", ("reason",)
        )
        self._missed = counter("dynaslim_deadline_missed", "Requests whose deadline passed.")
        self._batches = histogram("dynaslim_batch_rows", "Images of a batch.", buckets=_ROWS)
        self._engine = counter("dynaslim_engine_seconds", "Time in the engine.")
        self._images = counter("dynaslim_images", "Images by route.", ("route",))
        self._madds = counter("dynaslim_madds", "Multiply-adds spent.")
        self._saved = counter(
            "dynaslim_madds_saved", "Multiply-adds that the widest route would have cost more."
        )
        self._escalated = counter("dynaslim_images_escalated", "Images that escalated.")
        self._mirrored = counter(
            "dynaslim_images_mirrored", "Images whose mirror image was run too."
        )
        batcher, spending = model.batcher, model.spending
        gauge("queue_rows", "Images waiting, decoding included.", lambda: batcher.waiting)
        text = "How long an image that comes now will wait."
        gauge("expected_wait_seconds", text, lambda: batcher.expected_wait_s)
        text = "Budget of requests that name none, of the widest route's cost."
        gauge("budget_share", text, lambda: model.budget_share)
        gauge("ready", "1 if the server takes requests.", lambda: model.accepting)
        text = "Bytes of the model's files, its weights and programs."
        gauge("model_bytes", text, lambda: model.file_bytes)
        text = "Mean cost of recent images with a budget, 1 as the curve has it."
        gauge("cost_ratio", text, lambda: spending.ratio)
        text = "1 if that is clearly another cost than the curve's."
        gauge("unlike_curve", text, lambda: spending.differs)

    def error(self, status: int, code: str) -> None:
        """Count an error that load, stopping or the deadline caused."""
        if status in (429, 503):
            self._rejected.labels(code).inc()
        if status in (408, 504):
            self._missed.inc()

    def request(self, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._latency.observe(seconds)

    def batch(self, output: RoutedOutput, seconds: float) -> None:
        """Count a batch that took `seconds` in the engine."""
        rows = len(output.madds)
        self._batches.observe(rows)
        self._engine.inc(seconds)
        spent = float(output.madds.sum())
        self._madds.inc(spent)
        # escalated images may cost more than the widest route, but a counter must not fall: the
        # excess is deducted from the savings of later batches
        saved = self._model.info.widest_madds * rows - spent - self._owed
        self._saved.inc(max(0.0, saved))
        self._owed = max(0.0, -saved)
        self._escalated.inc(int(output.escalated.sum()))
        self._mirrored.inc(int(output.mirrored.sum()))
        # np.unique with axis=0 would take longer than a small network
        for path, count in Counter(map(tuple, output.routes.tolist())).items():
            self._images.labels(self._model.info.route(path).route).inc(count)


class _ModelMetrics:
    """The metrics of all models; with `labelled`, the label `model` distinguishes them."""

    def __init__(self, service: Service, labelled: bool) -> None:
        self._service = service
        self._labelled = labelled

    def collect(self) -> Iterable[Any]:
        """The metric families; called by Prometheus' client library."""
        merged: dict[str, Any] = {}
        for model in self._service.models.values():
            label = {"model": model.name} if self._labelled else {}
            for family in model.metrics.registry.collect():
                samples = [one._replace(labels={**label, **one.labels}) for one in family.samples]
                known = merged.setdefault(family.name, family)
                known.samples = (known.samples if known is not family else []) + samples
        return merged.values()


def _gauge(registry: Any, name: str, text: str, value: Callable[[], float]) -> None:
    prometheus_client.Gauge(f"dynaslim_{name}", text, registry=registry).set_function(value)
