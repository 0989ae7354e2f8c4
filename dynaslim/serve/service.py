"""One model that is served: its batcher, decoders, state and metrics; HTTP is in `app`."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

import numpy as np
import prometheus_client
from PIL import Image

from dynaslim.runtime.adaptive import LEAST_BATCHES
from dynaslim.runtime.cache import usable_cores
from dynaslim.runtime.spending import Spending
from dynaslim.serve.batcher import Batcher, BatchReport
from dynaslim.serve.decoding import Decoder, DecodingPool
from dynaslim.serve.model_info import ModelInfo, ServedEngine
from dynaslim.serve.options import MEGABYTE, ServeOptions

State = Literal["new", "starting", "ready", "failed"]
MEASURED_ROWS: Final = 8
RECENT: Final = 1000
"""Images whose mean cost is compared with the curve."""
_SECONDS: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Buffers:
    """Bytes of all bodies in memory, and the limit for them."""

    def __init__(self, most: int) -> None:
        self.held = 0
        self.most = most


class Service:
    """One model: started, asked through its batcher, stopped and closed."""

    def __init__(self, engine: ServedEngine, options: ServeOptions) -> None:
        """Check the options against the model; nothing is compiled yet.

        Raises:
            UsageError: as `Batcher`.
        """
        self.engine = engine
        self.options = options
        self.batcher = Batcher(engine, options, on_batch=self._count)
        self.info = ModelInfo(engine)
        self.name = engine.spec.name if options.name is None else options.name
        self.buffers = Buffers(round(options.max_buffer_mb * MEGABYTE))
        self.spending = Spending(last=RECENT)
        """Costs of recent images with a budget, compared with the curve."""
        assert engine.preprocessing is not None, "checked by the batcher"
        self.decoder = Decoder(engine.preprocessing, options.max_pixels)
        self.state: State = "new"
        self.error: BaseException | None = None
        """Set if the state is "failed"."""
        self.backend: str | None = None
        """Set when it is ready."""
        self.stopping = False
        self.in_flight = 0
        """Accepted predictions without an answer."""
        self.lag_s = 0.0
        """Estimated time that the last prediction waited for the event loop."""
        self.metrics = Metrics(self)
        threads = options.decoders or usable_cores()
        self.decoders = ThreadPoolExecutor(threads, "dynaslim-serve-decode")
        self.large = DecodingPool(engine.preprocessing, self.decoder.memory, threads)
        self._lock = threading.Lock()

    @property
    def accepting(self) -> bool:
        """Whether a prediction that comes now is accepted."""
        return self.state == "ready" and not self.stopping

    def start(self) -> None:
        """Compile and time the network in a thread; does nothing the second time."""
        with self._lock:
            if self.state != "new":
                return
            self.state = "starting"
        threading.Thread(target=self._warm_up, name="dynaslim-start", daemon=True).start()

    def _warm_up(self) -> None:
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
        """Run batches, so that their memory is allocated and the throughput is known."""
        spec, side, most = self.engine.spec, self.info.side, self.options.max_batch
        shape = (spec.in_channels, side, side)
        x_BCSS = np.random.default_rng(0).standard_normal((most, *shape), np.float32)
        rows = min(MEASURED_ROWS, most)
        self.engine(x_BCSS)
        self.engine(x_BCSS[:1])
        for turn in range(LEAST_BATCHES + 1):
            start = time.perf_counter()
            self.engine(x_BCSS[:rows])
            if turn:  # the first runs with cold caches
                self.batcher.throughput.add(rows, time.perf_counter() - start)

    def stop(self) -> None:
        """Accept no more predictions; those accepted are answered."""
        self.stopping = True

    def close(self) -> None:
        """Answer what was accepted, and end the threads and processes."""
        self.stop()
        self.batcher.close()  # before the decoders, which it waits for
        self.decoders.shutdown()
        self.large.close()

    def _count(self, report: BatchReport) -> None:
        self.metrics.batch(report)
        if report.expected_madds is not None:
            self.spending.add(report.madds.tolist(), report.expected_madds)

    @property
    def budget_share(self) -> float:
        """Budget of requests that name none, as a share of the widest route's cost; or NaN."""
        point = self.batcher.budget.point
        return float("nan") if point is None else point.share


def _one_pixel() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


class Metrics:
    """A service's metrics for Prometheus, in a registry of their own (see docs/serving.md)."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = prometheus_client.CollectorRegistry()
        self._owed = 0.0
        prometheus_client.ProcessCollector(registry=self._registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
            return prometheus_client.Counter(
                f"dynaslim_{name}", text, labels, registry=self._registry
            )

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return prometheus_client.Histogram(
                f"dynaslim_{name}", text, buckets=buckets, registry=self._registry
            )

        self._requests = counter(
            "requests", "Predictions asked for, by status; 499: client left.", ("code",)
        )
        self._latency = histogram(
            "request_seconds", "From a request's head to its answer, answered ones only.", _SECONDS
        )
        self._rejected = counter(
            "rejected", "Requests refused because of load or stopping.", ("reason",)
        )
        self._missed = counter("deadline_missed", "Requests whose deadline passed.")
        self._batches = histogram("batch_rows", "Images of a batch.", _ROWS)
        self._engine = counter("engine_seconds", "Time in the engine.")
        self._images = counter("images", "Images by route.", ("route",))
        self._madds = counter("madds", "Multiply-adds spent.")
        self._saved = counter(
            "madds_saved", "Multiply-adds that the widest route would have cost more."
        )
        self._escalated = counter("images_escalated", "Images that escalated.")
        self._mirrored = counter("images_mirrored", "Images whose mirror image was run too.")
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "queue_rows": (
                "Images waiting, decoding included.",
                lambda: service.batcher.waiting,
            ),
            "expected_wait_seconds": (
                "How long an image that comes now will wait.",
                lambda: service.batcher.expected_wait_s,
            ),
            "budget_share": (
                "Budget of requests that name none, of the widest route's cost.",
                lambda: service.budget_share,
            ),
            "ready": ("1 if the server takes requests.", lambda: service.accepting),
            "body_bytes": ("Bytes of bodies that are held.", lambda: service.buffers.held),
            "lag_seconds": (
                "How long requests wait before the server looks at them.",
                lambda: service.lag_s,
            ),
            "cost_ratio": (
                "Mean cost of recent images with a budget, 1 as the curve has it.",
                lambda: service.spending.ratio,
            ),
            "unlike_curve": (
                "1 if that is clearly another cost than the curve's.",
                lambda: service.spending.differs,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = prometheus_client.Gauge(f"dynaslim_{name}", text, registry=self._registry)
            gauge.set_function(value)

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

    def batch(self, report: BatchReport) -> None:
        """Count a batch."""
        self._batches.observe(report.rows)
        self._engine.inc(report.seconds)
        spent = float(report.madds.sum())
        self._madds.inc(spent)
        # escalated images may cost more than the widest route; a counter must not fall, so the
        # excess is deducted from what later batches save
        saved = self._service.info.widest_madds * report.rows - spent - self._owed
        self._saved.inc(max(0.0, saved))
        self._owed = max(0.0, -saved)
        self._escalated.inc(report.escalated)
        self._mirrored.inc(report.mirrored)
        # numpy's unique rows would take longer than a small network
        for path, count in Counter(map(tuple, report.choices.tolist())).items():
            self._images.labels(self._service.info.route(path).name).inc(count)

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        text: bytes = prometheus_client.generate_latest(self._registry)
        return text
