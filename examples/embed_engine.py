"""Use an engine inside your own service: many threads send images, one engine answers in batches.

    python examples/embed_engine.py MODEL IMAGES...

MODEL is a checkpoint or an exported package (which needs no torch). A pool of threads sends the
images, as the request handlers of a web server would. `Classifier` is the part to copy: a thread
collects the images of a few milliseconds into one batch, which costs much less than the same images
one by one. While more than a batch is waiting, the gates are shifted towards cheaper routes; with a
budget curve in the checkpoint, `budget=0.5` could be used there instead.
"""

import queue
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from dynaslim.data.decode import decode_image
from dynaslim.predict import open_engine
from dynaslim.preprocessing import normalise_pixels


class Classifier:
    """Call `classify` from any thread; it returns (class, route) or raises an error."""

    def __init__(self, model: str, *, most: int = 32, wait_ms: float = 5) -> None:
        self.engine = open_engine(model)
        self.engine.warm_up()  # compile before the first request, not in it
        self.most, self.wait_s = most, wait_ms / 1000
        self._queue: queue.Queue[tuple[np.ndarray, Future]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def classify(self, content: bytes, name: str) -> tuple[str | int, str]:
        """Classify an encoded image; raises `DataError` for bytes that are not an image."""
        answer: Future = Future()
        # decoded in the calling thread, so that many threads decode while the engine works
        self._queue.put((decode_image(content, self.engine.preprocessing, name), answer))
        return answer.result()

    def _work(self) -> None:
        while True:
            batch, until = [self._queue.get()], time.monotonic() + self.wait_s
            with suppress(queue.Empty):
                while len(batch) < self.most:
                    batch.append(self._queue.get(timeout=max(0, until - time.monotonic())))
            try:
                results = self._answer(np.stack([image for image, _ in batch]))
            except Exception as error:  # raised in the callers; this thread continues
                for _, answer in batch:
                    answer.set_exception(error)
            else:
                for (_, answer), result in zip(batch, results, strict=True):
                    answer.set_result(result)

    def _answer(self, pixels: np.ndarray) -> list[tuple[str | int, str]]:
        is_busy = self._queue.qsize() > self.most
        x = normalise_pixels(pixels, self.engine.preprocessing)
        logits, routes, _ = self.engine(x, shift=1.0 if is_busy else 0.0)
        names = self.engine.class_names or range(logits.shape[1])
        labels = logits.argmax(1)
        return [
            (names[n], str(self.engine.route_of(r))) for n, r in zip(labels, routes, strict=True)
        ]


def main(model: str, files: list[str]) -> None:
    classifier = Classifier(model)
    with ThreadPoolExecutor(16) as threads:
        answers = threads.map(lambda f: classifier.classify(Path(f).read_bytes(), f), files)
        for file, (label, route) in zip(files, answers, strict=True):
            print(f"{file}  {label}  {route}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: embed_engine.py MODEL IMAGES...")
    main(sys.argv[1], sys.argv[2:])
