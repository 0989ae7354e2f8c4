"""From a client's bytes to pixels: what is not safe to decode is refused before it is."""

from __future__ import annotations

import io
import threading
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from dynaslim.data.decode import decode_image
from dynaslim.data.skipped import CorruptImageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.serve.problems import Problem

FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are taken, by Pillow's names; some of its others start programs or lack checks."""
_SIGNATURES: Final = (
    b"BM", b"GIF87a", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"II*\0",
    b"MM\0*", b"II+\0", b"MM\0+", *(b"P%d" % n for n in range(1, 7)),
)  # fmt: skip
"""What files of these formats begin with."""
MOST_SCANS: Final = 100
"""Of a JPEG: a small file can have so many that it takes minutes to decode."""
_LARGE_SHARE: Final = 0.25
"""Pictures of more than this part of the most pixels are decoded one at a time, for memory."""


class Decoder:
    """Decodes as `dynaslim.predict` does, within limits."""

    def __init__(self, preprocessing: Preprocessing, max_pixels: int) -> None:
        self._preprocessing = preprocessing
        self._max_pixels = max_pixels
        self._large = threading.Lock()

    def __call__(self, content: bytes, image: int) -> np.ndarray:
        """The pixels, uint8 (C, S, S); `image` is the picture's number in its request.

        Raises:
            Problem: 400 for damaged pictures, 413 for too large ones, 415 for other formats.
        """
        pixels = self._size(content, image)
        if pixels > _LARGE_SHARE * self._max_pixels:
            with self._large:
                return self._decode(content, image)
        return self._decode(content, image)

    def _size(self, content: bytes, image: int) -> int:
        """Width times height, from the header alone."""
        if not content:
            raise Problem(400, "image_unreadable", "the image is empty", image=image)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
        except Image.DecompressionBombError:
            raise self._too_many("more", image) from None
        except Exception as error:  # Pillow's plugins raise of many kinds for damaged files
            if not content.startswith(_SIGNATURES):
                raise Problem(
                    415,
                    "image_type",
                    f"not an image of a type that is taken: {', '.join(FORMATS)}",
                    image=image,
                ) from None
            reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
            raise _damaged(f"its beginning is damaged{reason}", image) from None
        if width * height > self._max_pixels:
            raise self._too_many(f"{width} x {height}", image)
        if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MOST_SCANS:
            raise _damaged(f"it has more than {MOST_SCANS} scans", image)
        return width * height

    def _too_many(self, has: str, image: int) -> Problem:
        return Problem(
            413,
            "too_many_pixels",
            f"the image has {has} pixels; at most {self._max_pixels} are taken",
            image=image,
        )

    def _decode(self, content: bytes, image: int) -> np.ndarray:
        try:
            return decode_image(content, self._preprocessing, "image")
        except CorruptImageError as error:
            raise _damaged(error.reason, image) from None


def _damaged(reason: str, image: int) -> Problem:
    line = " ".join(reason.split())  # of Pillow's making, so of any form
    return Problem(400, "image_unreadable", f"the image cannot be decoded: {line}", image=image)
