"""From a client's bytes to pixels: what is not safe to decode is refused before it is."""

from __future__ import annotations

import io
from typing import Final, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from dynaslim.data.decode import decode_image, jpeg_scale
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
BYTES_PER_PIXEL: Final = 7
"""Memory for all pictures that are decoded at a time, for each of the most pixels of one."""
LARGE: Final = 1_000_000
"""Work from which on a picture is large: decoded apart from the others, in a process of its own."""
_USUAL_SCANS: Final = 10
"""Of a progressive JPEG; each more takes as long again as a tenth of the picture."""
_WEBP_WORK: Final = 4
"""A pixel of WebP beside one of another format: Pillow keeps Python's lock while it decodes it."""
# bytes of a pixel while it is decoded, as measured, for the most
_WEBP_BYTES: Final = 17
_USUAL_BYTES: Final = 5
_WIDE_BYTES: Final = 9
_USUAL_MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B")
"""Pillow's; pixels of others are copied while they are made eight bits of RGB."""
_CONTENT_COPIES: Final = 3
"""Of a file, while it is decoded."""


class Need(NamedTuple):
    """What decoding a picture takes, by what stands before its pixels."""

    work: int
    """Pixels, or as many as take as long."""
    memory: int
    """In bytes."""

    @property
    def large(self) -> bool:
        """Whether others must not wait for it."""
        return self.work > LARGE


class Decoder:
    """Decodes as `dynaslim.predict` does, within limits."""

    def __init__(self, preprocessing: Preprocessing, max_pixels: int) -> None:
        self._preprocessing = preprocessing
        self._max_pixels = max_pixels
        self.memory = BYTES_PER_PIXEL * max_pixels
        """Bytes for all that is decoded at a time, and so the most for one."""

    def __call__(self, content: bytes, image: int) -> np.ndarray:
        """The pixels, uint8 (C, S, S); `image` is the picture's number in its request.

        Raises:
            Problem: 400 if the picture is damaged.
        """
        try:
            return decode_image(content, self._preprocessing, "image")
        except CorruptImageError as error:
            raise damaged(error.reason, image) from None

    def need(self, content: bytes, image: int) -> Need:
        """What it would take, from the header alone.

        Raises:
            Problem: 400 for damaged pictures, 413 for too large ones, 415 for other formats.
        """
        if not content:
            raise Problem(400, "image_unreadable", "the image is empty", image=image)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                scans = content.count(b"\xff\xda") if isinstance(opened, JpegImageFile) else 1
                per_pixel = self._bytes_per_pixel(opened, scans)
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
            raise damaged(f"its beginning is damaged{reason}", image) from None
        pixels = width * height
        if pixels > self._max_pixels:
            raise self._too_many(f"{width} x {height}", image)
        if scans > MOST_SCANS:
            raise damaged(f"it has more than {MOST_SCANS} scans", image)
        memory = round(pixels * per_pixel) + _CONTENT_COPIES * len(content)
        if memory > self.memory:
            raise self.too_much_memory(image, opened.format, round(self.memory / per_pixel))
        times = _WEBP_WORK if opened.format == "WEBP" else max(1.0, scans / _USUAL_SCANS)
        return Need(round(pixels * times), memory)

    def _bytes_per_pixel(self, opened: Image.Image, scans: int) -> float:
        if isinstance(opened, JpegImageFile):
            side = min(opened.size) * self._preprocessing.crop_fraction
            reduced = jpeg_scale(side, self._preprocessing.image_size_px) ** 2
            # of several scans all coefficients are kept, two bytes each
            kept = 0 if scans == 1 else 2 * len(opened.getbands())
            return kept + _WIDE_BYTES / reduced
        # not of the plugin, which may decode the picture to find it
        orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1)
        turned = orientation not in (0, 1)
        if opened.format == "WEBP":
            return _WEBP_BYTES + 4 * turned
        return _USUAL_BYTES if opened.mode in _USUAL_MODES and not turned else _WIDE_BYTES

    def too_much_memory(self, image: int, kind: str | None = None, most: int = 0) -> Problem:
        """A picture for which there is not enough; of its kind so many pixels are the most."""
        so_many = f"; of such a {kind} at most about {most} pixels are taken" if kind else ""
        return Problem(
            413,
            "too_many_pixels",
            f"decoding the image takes more than {self.memory / 1e6:.0f} MB{so_many}",
            image=image,
        )

    def _too_many(self, has: str, image: int) -> Problem:
        return Problem(
            413,
            "too_many_pixels",
            f"the image has {has} pixels; at most {self._max_pixels} are taken",
            image=image,
        )


def damaged(reason: str, image: int) -> Problem:
    """A picture that cannot be decoded, and why."""
    line = " ".join(reason.split())  # of Pillow's making, so of any form
    return Problem(400, "image_unreadable", f"the image cannot be decoded: {line}", image=image)
