"""What is counted, in a registry of its own, as Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from dynaslim.runtime.libraries import require

if TYPE_CHECKING:
    from dynaslim.serve.jobs import BatchReport

SECONDS: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The server's counters; the names stand in docs/serving.md."""

    def __init__(self, route_name: Callable[[tuple[int, ...]], str], widest_madds: float) -> None:
        client = require("prometheus_client")
        self._client = client
        self._registry = client.CollectorRegistry()
        self._route_name = route_name
        self._widest_madds = widest_madds
        self._owed = 0.0
        own: dict[str, Any] = {"registry": self._registry}
        client.ProcessCollector(**own)
        self._requests = client.Counter(
            "dynaslim_requests", "Predictions asked for, by status; 499: client left.", ["code"],
            **own,
        )  # fmt: skip
        self._latency = client.Histogram(
            "dynaslim_request_seconds", "From a request's head to its answer, answered ones only.",
            buckets=SECONDS, **own,
        )  # fmt: skip
        self._rejected = client.Counter(
            "dynaslim_rejected", "Requests refused because of load or stopping.", ["reason"], **own
        )
        self._missed = client.Counter(
            "dynaslim_deadline_missed", "Requests whose deadline passed.", **own
        )
        self._batches = client.Histogram(
            "dynaslim_batch_rows", "Images of a batch.", buckets=ROWS, **own
        )
        self._engine = client.Counter("dynaslim_engine_seconds", "Time in the engine.", **own)
        self._images = client.Counter("dynaslim_images", "Images by route.", ["route"], **own)
        self._madds = client.Counter("dynaslim_madds", "Multiply-adds spent.", **own)
        self._saved = client.Counter(
            "dynaslim_madds_saved", "Multiply-adds that the widest route would have cost more.",
            **own,
        )  # fmt: skip
        self._escalated = client.Counter(
            "dynaslim_images_escalated", "Images that escalated.", **own
        )
        self._mirrored = client.Counter(
            "dynaslim_images_mirrored", "Images whose mirror image was run too.", **own
        )
        self._gauges = {
            name: client.Gauge(f"dynaslim_{name}", text, **own)
            for name, text in (
                ("queue_rows", "Images waiting, decoding included."),
                ("expected_wait_seconds", "How long an image that comes now will wait."),
                ("budget_share", "Budget of requests that name none, of the widest route's cost."),
                ("ready", "1 if the server takes requests."),
                ("body_bytes", "Bytes of bodies that are held."),
                ("lag_seconds", "How long requests wait before the server looks at them."),
                ("cost_ratio", "Mean cost of recent images with a budget, 1 as the curve has it."),
                ("unlike_curve", "1 if that is clearly another cost than the curve's."),
            )
        }

    def watch(self, values: Mapping[str, Callable[[], float]]) -> None:
        """Where the gauges read their values."""
        for name, value in values.items():
            self._gauges[name].set_function(value)

    def request(self, status: int, seconds: float) -> None:
        """A prediction was answered."""
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._latency.observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was refused because of what the server is busy with."""
        self._rejected.labels(reason).inc()

    def missed(self) -> None:
        """A deadline passed."""
        self._missed.inc()

    def batch(self, report: BatchReport) -> None:
        """The engine has run a batch."""
        self._batches.observe(report.rows)
        self._engine.inc(report.seconds)
        spent = float(report.madds.sum())
        self._madds.inc(spent)
        # a batch of images that escalated may cost more than the widest route: the next ones pay,
        # since a counter does not fall
        saved = self._widest_madds * report.rows - spent - self._owed
        self._saved.inc(max(0.0, saved))
        self._owed = max(0.0, -saved)
        self._escalated.inc(report.escalated)
        self._mirrored.inc(report.mirrored)
        # by a Counter, since numpy's unique rows take longer than a small network
        for path, count in Counter(map(tuple, report.choices.tolist())).items():
            self._images.labels(self._route_name(path)).inc(count)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its content type."""
        return (
            self._client.generate_latest(self._registry),
            self._client.CONTENT_TYPE_LATEST,
        )
