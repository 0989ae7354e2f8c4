"""From encoded bytes to the pixels that a network takes, by Pillow."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dynaslim.data.skipped import CorruptImageError
from dynaslim.preprocessing import Preprocessing

if TYPE_CHECKING:
    from dynaslim.data.source import Entry

IMAGE_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""What files of a folder are taken for images, in lower case."""
Crop = Callable[[int, int], tuple[float, float, float, float]]
"""From a picture's width and height to the part of it to take: left, top, right, bottom."""


def decode_image(
    content: bytes, preprocessing: Preprocessing, where: str, crop: Crop | None = None
) -> np.ndarray:
    """Decode, turn upright, crop and resize (bicubic) to the square: uint8 (C, S, S).

    `crop` says which part of the picture to take; None takes the centre of the shorter side.

    Raises:
        DataError: if the bytes are no image that Pillow reads; `where` names it.
    """
    size = preprocessing.image_size_px
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips, we scale
                image = Image.fromarray((np.asarray(image, np.float32) / 257).astype(np.uint8))
            image = image.convert("RGB" if preprocessing.channels == 3 else "L")
    except Exception as error:  # Pillow's plugins raise of many kinds for damaged files
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise CorruptImageError(where, f"not an image that can be decoded ({reason})") from None
    if crop is None:
        side = min(image.size) * preprocessing.crop_fraction
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    else:
        box = crop(image.width, image.height)
    # the crop is resized alone: a tiny file of a long, thin picture must not fill the memory
    if box != (0, 0, size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def decode_entry(
    entry: Entry, preprocessing: Preprocessing, crop: Crop | None = None
) -> np.ndarray | CorruptImageError:
    """`decode_image` of an entry; for one that cannot be read, the error is returned."""
    try:
        return decode_image(entry.read(), preprocessing, entry.where, crop)
    except CorruptImageError as error:
        return error


def random_crop(scale_min: float, seed: str) -> Crop:
    """A part of `scale_min` to 1 of the area with a width/height ratio of 3/4 to 4/3 (1409.4842).

    A function of the seed. Sizes and places are whole pixels, as is usual; where ten drawings do
    not fit the picture, the largest centred part of an allowed ratio is taken.
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
