"""From encoded bytes to the pixels that a network takes, by Pillow."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dynaslim.errors import DataError
from dynaslim.preprocessing import Preprocessing


def decode_image(content: bytes, preprocessing: Preprocessing, where: str) -> np.ndarray:
    """Decode, turn upright, resize the shorter side and crop the centre: uint8 (C, S, S).

    Raises:
        DataError: if the bytes are no image that Pillow reads; `where` names it.
    """
    size = preprocessing.image_size_px
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened)
            image = image.convert("RGB" if preprocessing.channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{where}: not an image that can be decoded ({reason})") from None
    scale = size / preprocessing.crop_fraction / min(image.size)
    resized = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))
