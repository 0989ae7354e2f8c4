"""Decode image files to pixels for a network, with Pillow."""

from __future__ import annotations

import io
import math
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from dynaslim.data.skipped import CorruptImageError
from dynaslim.preprocessing import Preprocessing

if TYPE_CHECKING:
    from dynaslim.data.source import Entry

IMAGE_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""Suffixes of image files, in lower case."""
_TURNED: Final = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
_MODES: Final = {1: "L", 3: "RGB"}
_REDUCING_GAP: Final = 3
"""Least ratio of the crop's side to the output's when a JPEG is reduced in decoding: with three the
result hardly differs from that of full-size decoding."""
_BAND_PIXELS: Final = 1 << 20
Crop = Callable[[int, int], tuple[float, float, float, float]]
"""Maps a picture's width and height to the part to take: left, top, right, bottom."""


def is_image_file(path: str | Path) -> bool:
    """Whether a path is a regular file with an image suffix.

    Reading a pipe or a device might never end. Broken links count, so that they are reported.
    """
    if os.path.splitext(path)[1].lower() not in IMAGE_SUFFIXES:
        return False
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def decode_image(
    content: bytes, preprocessing: Preprocessing, where: str, crop: Crop | None = None
) -> np.ndarray:
    """Decode, turn upright, crop and resize (bicubic) to the square: uint8 (C, S, S).

    `crop` selects the part of the picture; None takes the central square, with `crop_fraction` of
    the shorter side. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop's side is then
    still at least three times the output's.

    Raises:
        DataError: if Pillow cannot decode the bytes; the message names them by `where`.
    """
    size, channels = preprocessing.image_size_px, preprocessing.channels
    crop = _centre(preprocessing.crop_fraction) if crop is None else crop
    try:
        with Image.open(io.BytesIO(content)) as opened:
            box = _load(opened, size, crop)
            # only the crop is resized: a tiny file of a long, thin picture must not fill the
            # memory; nor are all pixels converted where converting those of the crop is enough
            if opened.mode in ("1", "L", "LA") or opened.mode.startswith("I"):
                image = _resized(_eight_bits(opened), size, box).convert(_MODES[channels])
            elif opened.mode == "RGBA" and channels == 3:
                bands = [_resized(opened.getchannel(band), size, box) for band in "RGB"]
                image = Image.merge("RGB", bands)
            elif opened.mode == _MODES[channels]:
                image = _resized(opened, size, box)
            else:
                image = _resized(opened.convert(_MODES[channels]), size, box)
            pixels = np.asarray(image, dtype=np.uint8)
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise CorruptImageError(where, f"not an image that can be decoded ({reason})") from None
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def jpeg_scale(side: float, image_size_px: int) -> int:
    """The factor by which to reduce a JPEG in decoding, for a crop with sides of `side` px."""
    return max((s for s in (2, 4, 8) if s * _REDUCING_GAP * image_size_px <= side), default=1)


def _centre(fraction: float) -> Crop:
    def crop(width: int, height: int) -> tuple[float, float, float, float]:
        side = min(width, height) * fraction
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    return crop


def _load(opened: Image.Image, size: int, crop: Crop) -> tuple[float, float, float, float]:
    """Decode a picture in place and turn it upright; returns the part to take."""
    scale, box = 1, None
    if isinstance(opened, JpegImageFile):
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
        width, height = opened.size
        box = crop(height, width) if turned else crop(width, height)
        scale = jpeg_scale(min(box[2] - box[0], box[3] - box[1]), size)
        if scale > 1 and opened.draft(None, (width // scale, height // scale)) is None:
            scale = 1
    ImageOps.exif_transpose(opened, in_place=True)
    left, top, right, bottom = crop(*opened.size) if box is None else box
    return left / scale, top / scale, right / scale, bottom / scale


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image.convert("L")
    # 16 bits: Pillow's own conversion clips, this one scales; in bands of rows, to save memory
    grey = np.empty((image.height, image.width), np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        grey[top : top + rows] = np.asarray(band, np.float32) / 257
    return Image.fromarray(grey)


def _resized(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Image.Image:
    if box == (0, 0, size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def decode_entry(
    entry: Entry, preprocessing: Preprocessing, crop: Crop | None = None
) -> np.ndarray | CorruptImageError:
    """Apply `decode_image` to an entry; if it cannot be read, the error is returned."""
    try:
        return decode_image(entry.read(), preprocessing, entry.where, crop)
    except CorruptImageError as error:
        return error


def random_crop(scale_min: float, seed: str) -> Crop:
    """A random crop: `scale_min` to 1 of the area, aspect ratio 3/4 to 4/3 (arXiv 1409.4842).

    A function of the seed. Sizes and positions are whole pixels, as usual. If ten draws do not fit
    the picture, the largest centred part with an allowed ratio is taken.
    """

    def crop(width: int, height: int) -> tuple[float, float, float, float]:
        rng = random.Random(seed)
        for _ in range(10):
            area = rng.uniform(scale_min, 1) * width * height
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * 4 / 3)))
        h = min(height, max(1, round(width * 4 / 3)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    return crop
