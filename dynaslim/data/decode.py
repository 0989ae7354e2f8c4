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
            if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips, we scale
                image = Image.fromarray((np.asarray(image, np.float32) / 257).astype(np.uint8))
            image = image.convert("RGB" if preprocessing.channels == 3 else "L")
    except Exception as error:  # Pillow's plugins raise of many kinds for damaged files
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{where}: not an image that can be decoded ({reason})") from None
    side = min(image.size) * preprocessing.crop_fraction
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # the crop is resized alone: a tiny file of a long, thin picture must not fill the memory
    box = (left, top, left + side, top + side)
    if box != (0, 0, size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))
