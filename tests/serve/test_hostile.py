"""Pictures of all kinds, and such as are made to do harm: answered as `predict` does, or 4xx."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from helpers import encoded, ready
from PIL import Image
from starlette.testclient import TestClient

from dynaslim.predict import Unreadable, predict
from dynaslim.serve import ServeOptions, create_app

INFER = "/v2/models/micro/infer"
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 30, 3), dtype=np.uint8)


def rgb():
    return Image.fromarray(PIXELS)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb_png(width, height):
    """A PNG whose header names a size, with hardly any data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def many_scans():
    """A progressive JPEG with one of its scans over and over."""
    content = encoded(rgb(), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * 500 + content[-2:]


def animated(kind):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def upright():
    """Turned by its EXIF tag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(rgb(), "JPEG", exif=exif)


TAKEN = {
    "png": lambda: encoded(rgb(), "PNG"),
    "jpeg": lambda: encoded(rgb(), "JPEG"),
    "progressive jpeg": lambda: encoded(rgb(), "JPEG", progressive=True),
    "cmyk jpeg": lambda: encoded(rgb().convert("CMYK"), "JPEG"),
    "grey jpeg": lambda: encoded(rgb().convert("L"), "JPEG"),
    "turned jpeg": upright,
    "jpeg of several pictures": lambda: animated("MPO"),
    "palette png": lambda: encoded(rgb().convert("P"), "PNG"),
    "transparent png": lambda: encoded(rgb().convert("RGBA"), "PNG"),
    "one bit png": lambda: encoded(rgb().convert("1"), "PNG"),
    "sixteen bit png": lambda: encoded(
        Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257), "PNG"
    ),
    "animated gif": lambda: animated("GIF"),
    "animated webp": lambda: animated("WEBP"),
    "animated png": lambda: animated("PNG"),
    "bmp": lambda: encoded(rgb(), "BMP"),
    "tiff": lambda: encoded(rgb(), "TIFF"),
    "tiff of several pages": lambda: animated("TIFF"),
    "float tiff": lambda: encoded(Image.fromarray(PIXELS[:, :, 0].astype(np.float32)), "TIFF"),
    "ppm": lambda: encoded(rgb(), "PPM"),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1)), "PNG"),
    "long and thin": lambda: encoded(Image.new("L", (60_000, 1)), "PNG"),
}
REFUSED = {
    "no picture": (415, "image_type", lambda: b"hello"),
    "empty": (400, "image_unreadable", lambda: b""),
    "html": (415, "image_type", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "pdf": (415, "image_type", lambda: encoded(rgb(), "PDF")),
    "ico": (415, "image_type", lambda: encoded(rgb(), "ICO")),
    "postscript": (415, "image_type", lambda: encoded(rgb(), "EPS")),
    "zeros": (415, "image_type", lambda: bytes(1000)),
    "wave file": (400, "image_unreadable", lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(100)),
    "cut off png": (400, "image_unreadable", lambda: TAKEN["png"]()[:-300]),
    "cut off jpeg": (400, "image_unreadable", lambda: TAKEN["jpeg"]()[:-300]),
    "cut off gif": (400, "image_unreadable", lambda: TAKEN["animated gif"]()[:30]),
    "cut off webp": (400, "image_unreadable", lambda: TAKEN["animated webp"]()[:40]),
    "cut off tiff": (400, "image_unreadable", lambda: TAKEN["tiff"]()[:-500]),
    "cut off bmp": (400, "image_unreadable", lambda: TAKEN["bmp"]()[:-500]),
    "head alone": (400, "image_unreadable", lambda: b"\x89PNG\r\n\x1a\n"),
    "bad checksum": (400, "image_unreadable", lambda: TAKEN["png"]().replace(b"IDAT", b"IDAT\xff")),
    "bomb": (413, "too_many_pixels", lambda: bomb_png(60_000, 60_000)),
    "larger bomb": (413, "too_many_pixels", lambda: bomb_png(2**31 - 1, 2**31 - 1)),
    "no size": (400, "image_unreadable", lambda: bomb_png(0, 10)),
    "just too large": (413, "too_many_pixels", lambda: bomb_png(1001, 1000)),
    "bomb of another kind": (413, "too_many_pixels", lambda: b"P6 50000 50000 255\n"),
    "bomb as gif": (
        413,
        "too_many_pixels",
        lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + TAKEN["animated gif"]()[10:],
    ),
    "many scans": (400, "image_unreadable", many_scans),
    "data of a smaller picture": (400, "image_unreadable", lambda: bomb_png(500, 500)),
}


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(create_app(engine, ServeOptions(max_pixels=1_000_000))) as made:
        ready(made)
        yield made


@pytest.mark.parametrize("name", TAKEN)
def test_taken_as_predict_takes_them(client, engine, name, tmp_path):
    content = TAKEN[name]()
    (tmp_path / "file").write_bytes(content)
    (row,) = predict(engine, [tmp_path / "file"])
    # neither the name nor the type that the client gives matter
    files = [("images", ("x.exe", content, "text/html"))]
    response = client.post("/v1/predict", files=files)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    assert result["top"][0]["index"] == row.label
    assert result["top"][0]["probability"] == pytest.approx(row.confidence, abs=1e-5)
    assert result["route"] == row.route
    response = client.post(INFER, **as_tensor(content))
    assert response.status_code == 200, response.text
    outputs = {one["name"]: one["data"] for one in response.json()["outputs"]}
    assert outputs["label"] == [entry["index"] for entry in result["top"]]
    assert outputs["route"] == [row.route]


def as_tensor(*contents):
    """Files as one binary tensor of the Open Inference Protocol: a request's body and headers."""
    tensor = b"".join(struct.pack("<I", len(one)) + one for one in contents)
    sent = {"name": "image", "datatype": "BYTES", "shape": [len(contents)]}
    sent["parameters"] = {"binary_data_size": len(tensor)}
    head = json.dumps({"inputs": [sent]}).encode()
    return {
        "content": head + tensor,
        "headers": {"inference-header-content-length": str(len(head))},
    }


@pytest.mark.parametrize("name", REFUSED)
def test_refused(client, engine, tmp_path, name):
    status, code, make = REFUSED[name]
    if name == "many scans":  # a picture that could be decoded
        (tmp_path / "file").write_bytes(make())
        assert not isinstance(next(iter(predict(engine, [tmp_path / "file"]))), Unreadable)
    good = TAKEN["png"]()
    files = [("images", ("0.png", good)), ("images", ("1.png", make())), ("images", ("2", good))]
    response = client.post("/v1/predict", files=files)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert response.json()["error"]["image"] == 1
    assert "\n" not in response.text
    response = client.post(INFER, **as_tensor(good, make(), good))
    assert response.status_code == status, response.text
    assert response.json()["error"].startswith("image 1: ")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_at_random(client):
    """Pictures with some bytes changed: an answer, or an error of the client's."""
    rng = np.random.default_rng(1)
    names = (
        "png", "jpeg", "animated gif", "bmp", "tiff", "ppm", "animated webp", "sixteen bit png",
        "cmyk jpeg",
    )  # fmt: skip
    kinds = [TAKEN[name]() for name in names]
    statuses = set()
    for turn in range(180):
        content = bytearray(kinds[turn % len(kinds)])
        for at in rng.integers(0, min(len(content), 200 if turn % 2 else 10**9), 1 + turn % 5):
            content[at] = rng.integers(0, 256)
        response = client.post("/v1/predict", files=[("images", ("x", bytes(content)))])
        statuses.add(response.status_code)
        tensor = client.post(INFER, **as_tensor(bytes(content)))
        assert tensor.status_code == response.status_code
    assert statuses <= {200, 400, 413, 415}
    assert {200, 400} <= statuses


# -- a model that was loaded, and what loads models -----------------------------------------------

ADMIN = {"authorization": "Bearer admin"}
REPOSITORY = "/v2/repository/models"


@pytest.fixture(scope="module")
def loaded(engine, package, tmp_path_factory):
    """A client of a server with a second model, `one`, that was loaded."""
    folder = tmp_path_factory.mktemp("folder")
    shutil.copytree(package, folder / "one")
    options = ServeOptions(max_pixels=1_000_000, model_folder=folder, admin_token="admin")
    app = create_app(engine, options, backend="onnxruntime", workers=1)
    with TestClient(app, raise_server_exceptions=False) as made:
        ready(made)
        assert made.post(f"{REPOSITORY}/one/load", headers=ADMIN).status_code == 200
        yield made


@pytest.mark.parametrize("name", ["no picture", "empty", "just too large", "many scans"])
def test_refused_by_a_model_that_was_loaded(loaded, name):
    status, _, make = REFUSED[name]
    answer = loaded.post("/v2/models/one/infer", **as_tensor(make()))
    assert answer.status_code == status
    answer = loaded.post("/v1/predict?model=one", files=[("images", ("x", make()))])
    assert answer.status_code == status


def test_requests_at_random_to_the_repository(loaded):
    """Names and bodies that are damaged, with the token and without."""
    rng = np.random.default_rng(0)
    names = ("none", "%00", "..", "%2e%2e%2fone", "one%ff", "a" * 999)
    good = json.dumps({"parameters": {"unload_dependents": False}}).encode()
    statuses = set()
    for turn in range(400):
        content = bytearray(good if turn % 2 else rng.bytes(int(rng.integers(0, 200))))
        for at in rng.integers(0, len(content), turn % 3) if content else ():
            content[at] = rng.integers(0, 256)
        what = ("load", "unload")[turn // 2 % 2]
        path = f"{REPOSITORY}/{names[turn % 6]}/{what}" if turn % 7 else "/v2/repository/index"
        headers = ADMIN if turn % 5 else {}
        statuses.add(loaded.post(path, content=bytes(content), headers=headers).status_code)
    assert statuses == {400, 401, 404, 422}
    listed = loaded.post("/v2/repository/index", headers=ADMIN).json()
    assert [one["name"] for one in listed] == ["micro", "one"]
