"""A model that is served: its batcher, its decoders, its state and its counters."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Final, Literal

import numpy as np
from PIL import Image

from dynaslim.errors import DynaslimError
from dynaslim.runtime.cache import usable_cores
from dynaslim.runtime.spending import Spending
from dynaslim.serve.batcher import Batcher
from dynaslim.serve.bodies import Buffers
from dynaslim.serve.facts import Facts, ServedEngine
from dynaslim.serve.jobs import BatchReport
from dynaslim.serve.large import LargePictures
from dynaslim.serve.load import KNOWN
from dynaslim.serve.metrics import Metrics
from dynaslim.serve.options import MEGABYTE, ServeOptions
from dynaslim.serve.pictures import Decoder
from dynaslim.serve.problems import Problem
from dynaslim.serve.samples import find_samples

State = Literal["new", "starting", "ready", "failed"]
MEASURED_ROWS: Final = 8
RECENT: Final = 1000
"""Images whose costs are held against the curve."""
RETRY_STARTING_S: Final = 2.0
RETRY_STOPPING_S: Final = 5.0


class Service:
    """One model, ready to be asked; the HTTP side is `dynaslim.serve.app`."""

    def __init__(
        self, engine: ServedEngine, options: ServeOptions, model: Path | None = None
    ) -> None:
        """Check what the options ask of the model; nothing is compiled yet.

        Raises:
            UsageError: as `Batcher` and `find_samples`.
        """
        self.engine = engine
        self.options = options
        self.samples = find_samples(options.samples, model, engine.class_names)
        self.batcher = Batcher(engine, options, on_batch=self._count)
        self.facts = Facts(engine)
        self.name = engine.spec.name if options.name is None else options.name
        self.buffers = Buffers(round(options.max_buffer_mb * MEGABYTE))
        self.metrics = Metrics(
            lambda choices: self.facts.route(choices).name, self.facts.widest_madds
        )
        self.spending = Spending(last=RECENT)
        """What the last images with a budget cost beside what the curve has for it."""
        self.metrics.watch(
            {
                "queue_rows": lambda: self.batcher.waiting,
                "expected_wait_seconds": lambda: self.batcher.expected_wait_s,
                "budget_share": self._budget_share,
                "ready": lambda: float(self.accepting),
                "body_bytes": lambda: self.buffers.held,
                "lag_seconds": lambda: self.lag_s,
                "cost_ratio": lambda: self.spending.ratio,
                "unlike_curve": lambda: float(self.spending.differs),
            }
        )
        assert engine.preprocessing is not None, "checked by the batcher"
        self.decode = Decoder(engine.preprocessing, options.max_pixels)
        self.state: State = "new"
        self.error: BaseException | None = None
        """Why it is "failed"."""
        self.backend: str | None = None
        """Known when it is ready."""
        self.stopping = False
        self.in_flight = 0
        """Predictions that were accepted and are not answered."""
        self.lag_s = 0.0
        """How long the last prediction had waited before it was looked at, about."""
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        decoders = options.decoders or usable_cores()
        self._decoders = [
            threading.Thread(target=self._decoding, name=f"dynaslim-serve-decode-{n}", daemon=True)
            for n in range(decoders)
        ]
        self.large = LargePictures(engine.preprocessing, self.decode.memory, decoders)
        for thread in self._decoders:
            thread.start()
        self._lock = threading.Lock()

    # -- state --------------------------------------------------------------------------------

    @property
    def accepting(self) -> bool:
        """Whether a prediction that comes now is taken."""
        return self.state == "ready" and not self.stopping

    def start(self) -> None:
        """Compile and time what will be needed, in a thread; does nothing the second time."""
        with self._lock:
            if self.state != "new":
                return
            self.state = "starting"
        threading.Thread(target=self._warm_up, name="dynaslim-start", daemon=True).start()

    def _warm_up(self) -> None:
        try:
            self.engine.warm_up()
            self.backend = self.engine.backend
            self._measure()
            self.facts.measure()
            self.decode(_one_pixel(), 0)  # Pillow reads its plugins in when they are first needed
            self.state = "ready"
        except Exception as error:
            self.error = error
            self.state = "failed"

    def _measure(self) -> None:
        """Run batches for the memory they need, and to know how long they take."""
        spec, side, most = self.engine.spec, self.facts.side, self.options.max_batch
        shape = (spec.in_channels, side, side)
        x_BCSS = np.random.default_rng(0).standard_normal((most, *shape), np.float32)
        rows = min(MEASURED_ROWS, most)
        self.engine(x_BCSS)
        self.engine(x_BCSS[:1])
        for turn in range(KNOWN + 1):
            start = time.perf_counter()
            self.engine(x_BCSS[:rows])
            if turn:  # the first meets cold memory
                self.batcher.throughput.add(rows, time.perf_counter() - start)

    def check_accepting(self) -> None:
        """Raise `Problem` unless a prediction that comes now is taken."""
        if self.accepting:
            return
        self.start()
        if self.stopping:
            raise Problem(503, "stopping", "the server is stopping", retry_after_s=RETRY_STOPPING_S)
        if self.state == "failed":
            raise Problem(500, "failed", f"the model does not start: {self.error}")
        raise Problem(
            503, "starting", "the server is starting; try again", retry_after_s=RETRY_STARTING_S
        )

    def stop(self) -> None:
        """Take no more; what was taken will be answered."""
        self.stopping = True

    def close(self) -> None:
        """Answer what was taken, and end the threads."""
        self.stop()
        self.batcher.close()  # the decoders still work on what it waits for
        for _ in self._decoders:
            self._work.put(None)
        for thread in self._decoders:
            thread.join()
        self.large.close()

    # -- work ---------------------------------------------------------------------------------

    def in_background(self, work: Callable[[], None]) -> None:
        """Let a decoder do it; it must not raise."""
        self._work.put(work)

    def _decoding(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work

    def _count(self, report: BatchReport) -> None:
        self.metrics.batch(report)
        if report.expected_madds is not None:
            self.spending.add(report.madds.tolist(), report.expected_madds)

    def _budget_share(self) -> float:
        point = self.batcher.budget.point
        return float("nan") if point is None else point.share


def failure(error: BaseException) -> Problem:
    """What a client is told of an error of ours."""
    known = isinstance(error, DynaslimError)
    return Problem(500, "failed", str(error) if known else "an error of the server; see its log")


def _one_pixel() -> bytes:
    """A picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()
