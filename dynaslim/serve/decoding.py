"""Decodes clients' images within limits of time and memory; large images in separate processes.

Images that are not safe to decode are refused by their headers. A call to Pillow cannot be
interrupted, and some calls hold the GIL until they return. Large images are therefore decoded in
separate processes, a few at a time, the smallest first. A process can be killed, frees all its
memory when it ends, has a memory limit, and has a lower priority than the server's threads.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Final, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from dynaslim._memory import process_bytes
from dynaslim.data.decode import decode_image, jpeg_scale
from dynaslim.data.skipped import CorruptImageError
from dynaslim.preprocessing import Preprocessing

FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Accepted formats by Pillow's names; some of its other plugins start programs or lack checks."""
_SIGNATURES: Final = (
    b"BM", b"GIF87a", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"II*\0",
    b"MM\0*", b"II+\0", b"MM\0+", *(b"P%d" % n for n in range(1, 7)),
)  # fmt: skip
"""The bytes that files of the accepted formats start with."""
MOST_SCANS: Final = 100
"""Most scans of a JPEG: a small file can have so many that decoding takes minutes."""
BYTES_PER_PIXEL: Final = 7
"""Memory for all images being decoded, in bytes per pixel of the largest accepted image."""
LARGE: Final = 1_000_000
"""An image with more work (`DecodingCost.work`) is decoded in a separate process."""
_USUAL_SCANS: Final = 10
"""Scans of a usual progressive JPEG; each further scan adds a tenth of the usual time."""
_WEBP_WORK: Final = 4
"""Work per pixel of a WebP: Pillow holds the GIL while it decodes one."""
# upper bounds, measured, of the bytes per pixel while an image is decoded
_WEBP_BYTES: Final = 17
_USUAL_BYTES: Final = 5
_WIDE_BYTES: Final = 9
_USUAL_MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B")
"""Pillow's modes whose pixels are not copied when they are converted to RGB."""
_CONTENT_COPIES: Final = 3
"""Copies of the file's content in memory while the image is decoded."""

MOST_PROCESSES: Final = 4
IDLE_S: Final = 5.0
"""Time without work after which a process is stopped."""
_POLL_S: Final = 0.02
"""How often the server checks whether a process's image is still wanted."""
_NICE: Final = 10
_SLACK: Final = 32_000_000
"""Bytes that a process may use beyond the image's estimate."""
_DECODED: Final = b"+"
_DAMAGED: Final = b"-"
_NO_MEMORY: Final = b"m"
# lower the priority before the imports, which also compete with the server
_MAIN: Final = f"import os; os.nice({_NICE}); from dynaslim.serve.decoding import main; main()"


class ImageError(Exception):
    """An image was refused; `code` is one of the HTTP interface's error codes."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class DecodingCost(NamedTuple):
    """The time and memory that decoding an image takes, estimated from its header."""

    work: int
    """Time, as the number of pixels of a simple image that takes as long."""
    memory: int
    """Bytes of memory."""

    @property
    def large(self) -> bool:
        """Whether the image must be decoded in a separate process."""
        return self.work > LARGE


class Decoder:
    """Decodes images like `dynaslim.predict`, within limits."""

    def __init__(self, preprocessing: Preprocessing, max_pixels: int) -> None:
        self.preprocessing = preprocessing
        self._max_pixels = max_pixels
        self.memory = BYTES_PER_PIXEL * max_pixels
        """Bytes for all images being decoded together, and thus the limit for one image."""

    def __call__(self, content: bytes) -> np.ndarray:
        """The pixels, uint8 (C, S, S); raises `ImageError` if the image is damaged."""
        try:
            return decode_image(content, self.preprocessing, "image")
        except CorruptImageError as error:
            raise _damaged(error.reason) from None

    def cost(self, content: bytes) -> DecodingCost:
        """The cost of decoding an image, from its header.

        Raises `ImageError` if it is damaged, too large, or of a format that is not accepted.
        """
        if not content:
            raise ImageError("image_unreadable", "the image is empty")
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                scans = content.count(b"\xff\xda") if isinstance(opened, JpegImageFile) else 1
                per_pixel = self._bytes_per_pixel(opened, scans)
        except Image.DecompressionBombError:
            raise self._too_many_pixels("more") from None
        except Exception as error:  # Pillow's plugins raise many types for damaged files
            if not content.startswith(_SIGNATURES):
                raise ImageError(
                    "image_type", f"not an image of a type that is taken: {', '.join(FORMATS)}"
                ) from None
            reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
            raise _damaged(f"its beginning is damaged{reason}") from None
        pixels = width * height
        if pixels > self._max_pixels:
            raise self._too_many_pixels(f"{width} x {height}")
        if scans > MOST_SCANS:
            raise _damaged(f"it has more than {MOST_SCANS} scans")
        memory = round(pixels * per_pixel) + _CONTENT_COPIES * len(content)
        if memory > self.memory:
            most = round(self.memory / per_pixel)
            raise _no_memory(
                self.memory, f"; of such a {opened.format} at most about {most} pixels are taken"
            )
        times = _WEBP_WORK if opened.format == "WEBP" else max(1.0, scans / _USUAL_SCANS)
        return DecodingCost(round(pixels * times), memory)

    def _bytes_per_pixel(self, opened: Image.Image, scans: int) -> float:
        if isinstance(opened, JpegImageFile):
            side = min(opened.size) * self.preprocessing.crop_fraction
            reduced = jpeg_scale(side, self.preprocessing.image_size_px) ** 2
            # with several scans, all coefficients are kept, two bytes each
            kept = 0 if scans == 1 else 2 * len(opened.getbands())
            return kept + _WIDE_BYTES / reduced
        # the base class's method: a plugin's own getexif may decode the whole image
        orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1)
        turned = orientation not in (0, 1)
        if opened.format == "WEBP":
            return _WEBP_BYTES + 4 * turned
        return _USUAL_BYTES if opened.mode in _USUAL_MODES and not turned else _WIDE_BYTES

    def _too_many_pixels(self, count: str) -> ImageError:
        return ImageError(
            "too_many_pixels",
            f"the image has {count} pixels; at most {self._max_pixels} are taken",
        )


def _no_memory(memory: int, most: str = "") -> ImageError:
    return ImageError(
        "too_many_pixels", f"decoding the image takes more than {memory / 1e6:.0f} MB{most}"
    )


def _damaged(reason: str) -> ImageError:
    line = " ".join(reason.split())  # Pillow's messages may have several lines
    return ImageError("image_unreadable", f"the image cannot be decoded: {line}")


# -- large images, in the server ------------------------------------------------------------------


class DecodingTask(NamedTuple):
    cost: DecodingCost
    content: bytes
    preprocessing: Preprocessing
    wanted: Callable[[], bool]
    deliver: Callable[[np.ndarray | Exception], None]
    """Called in any thread with the pixels, uint8 (C, S, S), or an error; not called for an image
    dropped because `wanted` returned False."""


class DecodingPool:
    """Processes that decode large images, and the images waiting for memory and a process."""

    def __init__(self, memory: int, processes: int) -> None:
        """All images being decoded share `memory` bytes."""
        self._memory = memory
        self._free = memory
        self._changed = threading.Condition()
        self._tasks: list[DecodingTask] = []
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"dynaslim-serve-large-{n}", daemon=True)
            for n in range(min(processes, MOST_PROCESSES))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, task: DecodingTask) -> None:
        with self._changed:
            self._tasks.append(task)
            self._tasks.sort(key=lambda task: task.cost.work)
            self._changed.notify()

    def close(self) -> None:
        """End the processes and threads, and drop the waiting images."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        process: _Process | None = None
        while True:
            task = self._next(None if process is None else IDLE_S)
            if task is not None:
                result: np.ndarray | Exception | None
                try:
                    process = process or _Process(self._memory)
                    result = process.decode(task, self._is_wanted)
                except Exception as error:
                    result = error
                with self._changed:
                    self._free += task.cost.memory
                    self._changed.notify_all()
                if result is not None:
                    task.deliver(result)
            if process is not None and (task is None or process.spent):
                process.end()
                process = None
            if self._closed:
                return
            del task

    def _is_wanted(self, task: DecodingTask) -> bool:
        return not self._closed and task.wanted()

    def _next(self, idle_s: float | None) -> DecodingTask | None:
        """The smallest image that fits in free memory; None after `idle_s` or when closed."""
        with self._changed:
            while not self._closed:
                self._tasks = [task for task in self._tasks if task.wanted()]
                for place, task in enumerate(self._tasks):
                    if task.cost.memory <= self._free:
                        del self._tasks[place]
                        self._free -= task.cost.memory
                        return task
                if not self._changed.wait(idle_s) and not self._tasks:
                    return None
            return None


class _Process:
    """The server's side of a decoding process."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self.spent = False
        """Whether the process cannot be used again."""
        self._connection, other = Pipe()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries write warnings about images there
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )

    def decode(
        self, task: DecodingTask, wanted: Callable[[DecodingTask], bool]
    ) -> np.ndarray | Exception | None:
        """The pixels, uint8 (C, S, S), or an error; None if the image is no longer wanted."""
        self.spent = True
        how = task.preprocessing
        try:
            self._connection.send_bytes(json.dumps([task.cost.memory, how.to_dict()]).encode())
            self._connection.send_bytes(task.content)
            while not self._connection.poll(_POLL_S):
                if not wanted(task):
                    return None
            answer = self._connection.recv_bytes()
        except (EOFError, OSError):
            return _damaged("the process that decoded it has failed")
        kind, rest = answer[:1], answer[1:]
        if kind == _NO_MEMORY:
            return _no_memory(self._memory)
        self.spent = False
        if kind == _DAMAGED:
            return _damaged(rest.decode())
        side = how.image_size_px
        return np.frombuffer(rest, np.uint8).reshape(how.channels, side, side)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


# -- large images, in the process -----------------------------------------------------------------


def main() -> None:
    """Decode images from the pipe until the server closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the server ends this process
    start = 0
    with suppress(OSError):  # there may be no /proc
        start = process_bytes("address space")
    with Connection(int(sys.argv[1])) as connection, suppress(EOFError, OSError):
        while True:
            memory, how = json.loads(connection.recv_bytes())
            content = connection.recv_bytes()
            _limit_address_space(start + memory + _SLACK)
            connection.send_bytes(_decoded(content, Preprocessing.from_dict(how)))
            del content


def _decoded(content: bytes, preprocessing: Preprocessing) -> bytes:
    try:
        return _DECODED + decode_image(content, preprocessing, "image").tobytes()
    except CorruptImageError as error:
        if isinstance(error.__context__, MemoryError):
            return _NO_MEMORY
        return _DAMAGED + error.reason.encode("utf-8", "replace")


def _limit_address_space(most: int) -> None:
    import resource  # does not exist on all systems

    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
