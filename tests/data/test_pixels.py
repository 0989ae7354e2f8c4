import io

import numpy as np
import pytest
import torch
from helpers import encoded, png
from PIL import Image, ImageOps

from dynaslim.data.decode import decode_image, jpeg_scale, random_crop
from dynaslim.data.transforms import normalise
from dynaslim.errors import DataError, UsageError
from dynaslim.preprocessing import Preprocessing


def test_pixels_of_the_right_size_are_untouched():
    content = png(size=(32, 32), mode="RGB")
    pixels = decode_image(content, Preprocessing(32), "x")
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1))


def test_shorter_side_then_centre_crop():
    wide = Image.new("RGB", (60, 20))
    wide.paste((255, 0, 0), (20, 0, 40, 20))  # the middle third is red
    content = encoded(wide)
    pixels = decode_image(content, Preprocessing(20), "x")
    assert pixels.shape == (3, 20, 20)
    assert (pixels[0] == 255).all()
    assert (pixels[1:] == 0).all()


def test_crop_fraction_cuts_the_border():
    framed = Image.new("L", (40, 40), 255)
    framed.paste(0, (5, 5, 35, 35))
    content = encoded(framed)
    grey = Preprocessing(30, mean=(0.5,), std=(0.5,), crop_fraction=0.75)
    assert (decode_image(content, grey, "x") == 0).all()


def test_grey_and_colour_channels():
    assert decode_image(png(), Preprocessing(28), "x").shape == (3, 28, 28)
    grey = Preprocessing(28, mean=(0.5,), std=(0.5,))
    assert decode_image(png(mode="RGB"), grey, "x").shape == (1, 28, 28)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    content = encoded(ramp)
    pixels = decode_image(content, Preprocessing(32), "x")
    assert np.abs(pixels[0].astype(float) - ramp / 257).max() <= 1


def test_a_long_thin_picture_does_not_fill_the_memory():
    content = encoded(Image.new("L", (1, 60_000), 7))
    assert (decode_image(content, Preprocessing(224), "x") == 7).all()


def test_exif_orientation_is_followed():
    image = Image.new("RGB", (20, 20))
    image.paste((255, 255, 255), (0, 0, 20, 10))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    content = encoded(image, exif=exif)
    pixels = decode_image(content, Preprocessing(20), "x")
    assert pixels[0, 0, 0] == 0
    assert pixels[0, -1, 0] == 255


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("crop", [None, random_crop(0.3, "here")])
def test_a_large_jpeg_is_decoded_at_reduced_size(orientation, crop, monkeypatch):
    smooth = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = encoded(image, "JPEG", exif=exif, quality=95), encoded(image, exif=exif)
    sizes, transpose = [], ImageOps.exif_transpose

    def spy(opened, **options):
        sizes.append(opened.size)
        return transpose(opened, **options)

    monkeypatch.setattr(ImageOps, "exif_transpose", spy)
    reduced, full = (decode_image(one, Preprocessing(32), "x", crop).astype(int) for one in files)
    assert sizes[0][0] <= 400
    assert sizes[1] == (1600, 1200)
    assert np.abs(reduced - full).mean() < 1.5
    assert np.abs(reduced - full).max() < 12


def test_how_much_a_jpeg_is_reduced():
    """At least three pixels are left for one."""
    assert [jpeg_scale(side, 10) for side in (10, 59, 60, 119, 120, 240, 9999)] == [
        1, 1, 2, 2, 4, 8, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"GIF89a", png()[:40], png()[:200], b"\x00" * 1000])
def test_not_an_image(content):
    with pytest.raises(DataError, match=r"here\.png: not an image that can be decoded"):
        decode_image(content, Preprocessing(32), "here.png")


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb.png: not an image .*exceeds limit"):
        decode_image(png(size=(30, 30)), Preprocessing(32), "bomb.png")


def test_normalise():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    out = normalise(pixels, Preprocessing(2, mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 2.0)))
    assert out[:, :, 0, 0].tolist() == [[-1.0, 0.0, -0.5], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size_px": 0}, "image_size_px 0"),
        ({"crop_fraction": 1.5}, "crop_fraction 1.5"),
        ({"mean": (0.5,)}, "one value per channel"),
        ({"std": (1.0, 0.0, 1.0)}, "must be positive"),
    ],
)
def test_preprocessing_checks_itself(change, message):
    with pytest.raises(UsageError, match=message):
        Preprocessing(**{"image_size_px": 32, **change})


def test_preprocessing_survives_json():
    pre = Preprocessing(64, mean=(0.1,), std=(0.2,), crop_fraction=0.9)
    assert Preprocessing.from_dict(pre.to_dict()) == pre
    with pytest.raises(UsageError, match="not a preprocessing"):
        Preprocessing.from_dict({"size": 3})
