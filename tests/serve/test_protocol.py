"""The Open Inference Protocol, by the clients of Triton and KServe where they are installed, and
byte for byte.
"""

import asyncio
import base64
import json
import struct
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from helpers import ready, until
from starlette.testclient import TestClient

from dynaslim.data.decode import decode_image
from dynaslim.preprocessing import normalise_pixels
from dynaslim.serve import ServeOptions, create_app, inference

INFER = "/v2/models/micro/infer"
NAMES = ["logits", "label", "confidence", "route", "choices", "madds", "escalated"]


def query(*inputs, **more):
    return {"inputs": list(inputs), **more}


def images(*pictures):
    data = [base64.b64encode(picture).decode() for picture in pictures]
    return {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}


def binary(head, *tensors):
    """A request with binary tensors: its body and headers."""
    text = json.dumps(head).encode()
    return {
        "content": text + b"".join(tensors),
        "headers": {"inference-header-content-length": str(len(text))},
    }


@pytest.fixture
def tensors(engine, pictures):
    """The pictures as the three inputs: pixels, normalised, and what the engine makes of them."""
    pixels = np.stack([decode_image(one, engine.preprocessing, "a picture") for one in pictures])
    x = normalise_pixels(pixels, engine.preprocessing)
    return pixels, x, engine(x)


# -- KServe's client ------------------------------------------------------------------------------


def test_the_head_may_name_the_model_as_kserve_s_client_does(client, pictures):
    body = {"id": None, "model_name": "micro", "inputs": [images(pictures[0])]}
    assert client.post(INFER, json=body).status_code == 200
    assert client.post(INFER, json={**body, "model": "micro"}).status_code == 422


@pytest.mark.parametrize("as_binary", [False, True])
def test_kserve_s_client(engine, live, tensors, as_binary):
    kserve = pytest.importorskip("kserve", reason="kserve is not installed")
    _, x, expected = tensors
    tensor = kserve.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(np.asarray(x), binary_data=as_binary)

    async def infer(url):
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))
        assert await client.is_model_ready(url, "micro")
        request = kserve.InferRequest("micro", [tensor])
        return await client.infer(url, request, model_name="micro")

    with live(create_app(engine, ServeOptions(token=None))) as port:
        answer = asyncio.run(infer(f"http://127.0.0.1:{port}"))
    assert [output.name for output in answer.outputs] == NAMES
    np.testing.assert_allclose(answer.outputs[0].as_numpy(), expected.logits, rtol=1e-5, atol=1e-6)


# -- Triton's client ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton(engine, live):
    """The client's module, and the client of a server."""
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    with live(create_app(engine, ServeOptions(token=None))) as port:
        client = http.InferenceServerClient(f"127.0.0.1:{port}")
        yield http, client
        client.close()


def test_what_triton_s_client_reads_of_a_server(triton):
    _, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("micro")
    assert client.is_model_ready("micro", "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("micro", "2")
    assert set(client.get_server_metadata()) == {"name", "version", "extensions"}
    for version in ("", "1"):
        model = client.get_model_metadata("micro", version)
        assert (model["name"], model["versions"]) == ("micro", ["1"])
        shapes = {one["name"]: (one["datatype"], one["shape"]) for one in model["inputs"]}
        assert shapes == {
            "image": ("BYTES", [-1]),
            "pixels": ("UINT8", [-1, 3, 16, 16]),
            "x": ("FP32", [-1, 3, 16, 16]),
        }
        assert [one["name"] for one in model["outputs"]] == NAMES


@pytest.mark.parametrize("as_binary", [True, False])
@pytest.mark.parametrize("name", ["image", "pixels", "x"])
def test_triton_s_client_gets_the_engine_s_answers(
    triton, engine, pictures, tensors, name, as_binary
):
    http, client = triton
    pixels, x, expected = tensors
    given = {"image": np.array(pictures, object), "pixels": pixels, "x": x}[name]
    if name == "image" and not as_binary:  # its JSON has no place for bytes
        given = np.array([base64.b64encode(one).decode() for one in pictures], object)
    kind = {"image": "BYTES", "pixels": "UINT8", "x": "FP32"}[name]
    sent = http.InferInput(name, list(given.shape), kind)
    sent.set_data_from_numpy(given, binary_data=as_binary)
    outputs = [http.InferRequestedOutput(one, binary_data=as_binary) for one in NAMES]
    for wanted in (outputs, None):
        got = client.infer(
            "micro", [sent], request_id="7", outputs=wanted, parameters={"top_k": 2},
        )  # fmt: skip
        response = got.get_response()
        assert (response["model_name"], response["id"]) == ("micro", "7")
        assert [one["name"] for one in response["outputs"]] == NAMES
        np.testing.assert_allclose(got.as_numpy("logits"), expected.logits, rtol=0, atol=2e-5)
        assert got.as_numpy("label").shape == got.as_numpy("confidence").shape == (8, 2)
        assert got.as_numpy("label")[:, 0].tolist() == expected.logits.argmax(1).tolist()
        best = 1 / np.exp(expected.logits - expected.logits.max(1, keepdims=True)).sum(1)
        np.testing.assert_allclose(got.as_numpy("confidence")[:, 0], best, rtol=1e-5)
        assert got.as_numpy("madds").tolist() == expected.madds.tolist()
        assert got.as_numpy("choices").tolist() == expected.routes.tolist()
        assert got.as_numpy("escalated").tolist() == [False] * 8
        routes = [str(engine.spec.route_at(path)).encode() for path in expected.routes.tolist()]
        assert [np.char.encode(got.as_numpy("route").astype(str)).tolist()] == [routes]
    assert len(set(routes)) > 1, "the test needs several routes"


def test_triton_s_client_names_budgets_and_classes(triton, engine, pictures):
    http, client = triton
    sent = http.InferInput("image", [8], "BYTES")
    sent.set_data_from_numpy(np.array(pictures, object))
    best = http.InferRequestedOutput("logits", class_count=2)
    route = http.InferRequestedOutput("route", binary_data=False)

    def infer(**parameters):
        return client.infer("micro", [sent], outputs=[best, route], parameters=parameters)

    cheap, wide = infer(budget=0.01), infer(budget="1", escalate="never")
    assert set(cheap.as_numpy("route")) == {str(engine.spec.cheapest_choice)}
    assert cheap.get_response()["parameters"] == {"budget": "0.01", "budget_used": "0.01"}
    assert set(wide.as_numpy("route")) == {str(engine.spec.widest_choice)}
    classes = wide.as_numpy("logits")
    assert classes.shape == (8, 2)
    for row in classes:
        (first, index, name), (second, *_) = (text.decode().split(":") for text in row)
        assert float(first) >= float(second)
        assert name == engine.class_names[int(index)]
    unsure = client.infer("micro", [sent], parameters={"budget": 0.01, "escalate": 1.0})
    assert unsure.as_numpy("escalated").all()


def test_triton_s_client_raises_what_the_server_writes(triton, pictures):
    http, client = triton
    sent = http.InferInput("image", [1], "BYTES")
    sent.set_data_from_numpy(np.array([b"no picture"], object))
    with pytest.raises(http.InferenceServerException, match="image 0: not an image") as raised:
        client.infer("micro", [sent])
    assert raised.value.status() == "415"
    sent.set_data_from_numpy(np.array(pictures[:1], object))
    with pytest.raises(http.InferenceServerException, match="model 'other': there is micro"):
        client.infer("other", [sent])
    with pytest.raises(http.InferenceServerException, match=r"no answer within 0\.001 ms"):
        client.infer("micro", [sent], timeout=1)
    with pytest.raises(http.InferenceServerException, match=r"budget 'much'"):
        client.infer("micro", [sent], parameters={"budget": "much"})
    with pytest.raises(http.InferenceServerException, match="gzip: send it uncompressed"):
        client.infer("micro", [sent], request_compression_algorithm="gzip")
    # what only Triton has is refused, not overlooked
    with pytest.raises(http.InferenceServerException, match=r"parameters\.sequence_id 3"):
        client.infer("micro", [sent], sequence_id=3)


# -- byte for byte --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(engine):
    options = ServeOptions(max_images=4, max_body_mb=0.2)
    with TestClient(create_app(engine, options), raise_server_exceptions=False) as made:
        ready(made, "/v2/health/ready")
        yield made


def test_json_and_binary_are_the_same(client, pictures, tensors):
    pixels = tensors[0][:2]
    sent = {"name": "pixels", "datatype": "UINT8", "shape": [2, 3, 16, 16]}
    flat = client.post(INFER, json=query({**sent, "data": pixels.ravel().tolist()})).json()
    nested = client.post(INFER, json=query({**sent, "data": pixels.tolist()})).json()
    sized = {**sent, "parameters": {"binary_data_size": pixels.size}}
    raw = client.post(INFER, **binary(query(sized), pixels.tobytes())).json()
    both = client.post(
        f"{INFER.removesuffix('/infer')}/versions/1/infer", json=query(images(*pictures[:2]))
    ).json()
    assert flat == nested == raw == both
    assert set(flat) == {"model_name", "model_version", "outputs"}
    assert [one["name"] for one in flat["outputs"]] == NAMES
    wanted = [
        {"name": "route", "parameters": {"binary_data": True}},
        {"name": "choices"},
        {"name": "madds", "parameters": {"binary_data": True}},
    ]
    answer = client.post(INFER, json=query(images(*pictures[:2]), outputs=wanted))
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    route, choices, madds = json.loads(answer.content[:length])["outputs"]
    by_name = {one["name"]: one["data"] for one in flat["outputs"]}
    assert choices == next(one for one in flat["outputs"] if one["name"] == "choices")
    packed = b"".join(struct.pack("<I", len(r)) + r.encode() for r in by_name["route"])
    assert answer.content[length:] == packed + struct.pack("<2d", *by_name["madds"])
    assert route["parameters"]["binary_data_size"] == len(packed)
    assert madds["parameters"]["binary_data_size"] == 16


def test_a_body_that_is_an_image(client, pictures):
    """As `curl --data-binary @image.png -H 'Inference-Header-Content-Length: 0'` sends it."""
    answer = client.post(
        INFER, content=pictures[0], headers={"inference-header-content-length": "0"}
    )
    assert answer.json() == client.post(INFER, json=query(images(pictures[0]))).json()


def json_length(text):
    return {"content": b"{}", "headers": {"inference-header-content-length": text}}


PIXELS = {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 16, 16]}
X = {"name": "x", "datatype": "FP32", "shape": [1, 3, 16, 16]}
IMAGE = {"name": "image", "datatype": "BYTES", "shape": [1]}
SIZE = 3 * 16 * 16


@pytest.mark.parametrize(
    ("status", "message", "request_"),
    [
        (400, "not JSON", {"content": b"{"}),
        (400, "not JSON", {"content": b""}),
        (400, "not JSON", {"content": b"\xff" * 9}),
        (400, "not JSON", {"content": b'{"inputs":' + b"[" * 90_000}),
        (422, "inputs: Field required", {"json": {}}),
        (422, "body [", {"json": []}),
        (422, "inputs.0", {"json": query(1)}),
        (422, "inputs []", {"json": query()}),
        (422, "inputs", {"json": query(IMAGE, IMAGE)}),
        (422, "inputs.0.name 'picture': Input should be 'image', 'pixels' or 'x'",
         {"json": query({**IMAGE, "name": "picture"})}),
        (422, "datatype BYTES: must be FP32", {"json": query({**IMAGE, "name": "x", "data": []})}),
        (422, "inputs.0.datatype 'INT8'", {"json": query({**IMAGE, "datatype": "INT8"})}),
        (422, "inputs.0.shape.0 -1", {"json": query({**IMAGE, "shape": [-1]})}),
        (422, "shape [1, 2]: must be [-1]",
         {"json": query({**IMAGE, "shape": [1, 2], "data": []})}),
        (422, "shape [1, 16, 16, 3]: must be [-1, 3, 16, 16]",
         {"json": query({**X, "shape": [1, 16, 16, 3], "data": []})}),
        (422, "has no images", {"json": query({**IMAGE, "shape": [0], "data": []})}),
        (413, "at most 4 images", {"json": query({**IMAGE, "shape": [5], "data": ["a"] * 5})}),
        (413, "at most 4 images", {"json": query({**X, "shape": [10**12, 3, 16, 16], "data": []})}),
        (422, "1 images, and shape [2]", {"json": query({**IMAGE, "shape": [2], "data": [""]})}),
        (422, "must be images in base64", {"json": query({**IMAGE, "data": [1]})}),
        (400, "image 0: data is not base64", {"json": query({**IMAGE, "data": ["a"]})}),
        (422, "either data or binary_data_size", {"json": query(IMAGE)}),
        (422, "inputs.0.parameters.shared_memory_region",
         {"json": query({**X, "parameters": {"shared_memory_region": "a"}})}),
        (422, "768 numbers", {"json": query({**PIXELS, "data": [0] * 767})}),
        (422, "768 numbers", {"json": query({**PIXELS, "data": [0.5] * SIZE})}),
        (422, "768 numbers", {"json": query({**PIXELS, "data": ["0"] * SIZE})}),
        (422, "768 numbers", {"json": query({**PIXELS, "data": [True] * SIZE})}),
        (422, "768 numbers", {"json": query({**PIXELS, "data": [[0], [0, 1]]})}),
        (422, "768 numbers", {"json": query({**X, "data": [10**400] + [0] * (SIZE - 1)})}),
        (422, "from 0 to 255", {"json": query({**PIXELS, "data": [256] * SIZE})}),
        (422, "from 0 to 255", {"json": query({**PIXELS, "data": [-1] * SIZE})}),
        (422, "normalised pixels are from -9.7 to 11.9",
         {"json": query({**X, "data": [255] * SIZE})}),
        (422, "normalised", {"content": json.dumps(query({**X, "data": [float("nan")] * SIZE}))}),
        (422, "normalised", {"content": json.dumps(query({**X, "data": [float("inf")] * SIZE}))}),
        (413, "more than 200000 bytes", {"content": b"x" * 200_001}),
        (415, "content type text/plain",
         {"content": b"{}", "headers": {"content-type": "text/plain"}}),
        (422, "output label: classification is for logits", {"json": query(
            {**IMAGE, "data": [""]},
            outputs=[{"name": "label", "parameters": {"classification": 1}}])}),
        (422, "outputs.0.name 'prob'", {"json": query(IMAGE, outputs=[{"name": "prob"}])}),
        (422, "top_k 0: must be", {"json": query(IMAGE, parameters={"top_k": 0})}),
        (422, "top_k True: must be", {"json": query(IMAGE, parameters={"top_k": True})}),
        (422, "escalate 2: give auto", {"json": query(IMAGE, parameters={"escalate": 2})}),
        (422, "deadline_ms 1e+09: at most",
         {"json": query(IMAGE, parameters={"deadline_ms": 1e9})}),
        (422, "parameters.topk 1", {"json": query(IMAGE, parameters={"topk": 1})}),
        (422, "budget '2': ", {"json": query({**IMAGE, "data": [""]}, parameters={"budget": 2})}),
        (400, "follow the JSON, and binary_data_size is 9", binary(
            query({**IMAGE, "parameters": {"binary_data_size": 9}}), b"12345678")),
        (400, "3 bytes follow the JSON", binary(query({**IMAGE, "data": [""]}), b"123")),
        (422, "767 bytes: shape [1, 3, 16, 16] takes 768", binary(
            query({**PIXELS, "parameters": {"binary_data_size": 767}}), bytes(767))),
        (422, "length is cut off", binary(
            query({**IMAGE, "parameters": {"binary_data_size": 2}}), b"12")),
        (422, "of 4294967295 bytes is cut off", binary(
            query({**IMAGE, "parameters": {"binary_data_size": 5}}), b"\xff\xff\xff\xff1")),
        (400, "Content-Length 99", json_length("99")),
        (400, "Content-Length -1", json_length("-1")),
        (400, "Content-Length 9", json_length("9" * 5000)),
        (422, "normalised", binary(query({**X, "parameters": {"binary_data_size": 4 * SIZE}}),
                                   np.full(SIZE, np.nan, "<f4").tobytes())),
    ],
)  # fmt: skip
def test_requests_that_are_refused(client, status, message, request_):
    answer = client.post(INFER, **request_)
    assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    assert message in answer.json()["error"], answer.text
    assert "\n" not in answer.json()["error"]
    assert len(answer.text) < 400


def test_json_of_too_many_values_is_not_parsed(client, monkeypatch):
    monkeypatch.setattr(inference, "_NUMBERS", 1000)
    tensor = {**PIXELS, "shape": [2, 3, 16, 16], "data": [0] * 2 * SIZE}
    answer = client.post(INFER, json=query(tensor))
    assert answer.status_code == 413
    assert "more than 1000 values; send tensors in binary form" in answer.json()["error"]


def test_other_paths_of_the_protocol(client):
    for path in (
        "/v2/", "/v2/nothing", "/v2/models", "/v2/models/other", "/v2/models/micro/versions/2",
        "/v2/models/other/ready", "/v2/models/..%2fmicro", "/v2/health/",
    ):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == 404
        assert isinstance(answer.json()["error"], str)
    for path in ("/v2/models/other/infer", "/v2/models/micro/versions/2/infer"):
        answer = client.post(path, json={})
        assert answer.status_code == 404
        assert "there is" in answer.json()["error"]
    assert client.get(INFER).status_code == 405
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/models/micro/versions/1/ready").json() == {
        "name": "micro",
        "ready": True,
    }


def test_the_protocol_before_it_is_ready_and_when_it_stops(engine, pictures):
    app = create_app(engine)
    client = TestClient(app)  # not entered: nothing has started
    answer = client.post(INFER, json=query(images(pictures[0])))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    ready(client, "/v2/health/ready")
    app.state.service.stop()
    for path in ("/v2/health/ready", "/v2/models/micro/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        assert answer.headers["retry-after"] == "2"
    assert client.get("/v2/health/live").status_code == 200
    assert client.post(INFER, json=query(images(pictures[0]))).status_code == 503
    app.state.service.close()


def test_tensors_and_files_share_batches(held, live, tensors, pictures):
    """A request of each kind in one batch, each with its own answer."""

    pixels, x, expected = tensors
    app = create_app(held, ServeOptions(deadline_ms=60_000))
    with live(app) as port, ThreadPoolExecutor(4) as pool:
        url = f"http://127.0.0.1:{port}{INFER}"
        held.hold()
        first = pool.submit(httpx.post, url, json=query(images(pictures[0])), timeout=20)
        assert held.entered.acquire(timeout=10)
        sent = [
            query(images(*pictures[1:3])),
            query({**PIXELS, "shape": [2, 3, 16, 16], "data": pixels[3:5].ravel().tolist()}),
            query({**X, "shape": [3, 3, 16, 16], "data": x[5:8].ravel().tolist()}),
        ]
        rest = [pool.submit(httpx.post, url, json=one, timeout=20) for one in sent]
        until(lambda: app.state.service.models["micro"].batcher.waiting == 7)
        held.open.set()
        found = [one.result().json()["outputs"] for one in (first, *rest)]
    assert [rows for rows, _ in held.calls] == [1, 7]
    logits = [value for outputs in found for value in outputs[0]["data"]]
    np.testing.assert_allclose(np.reshape(logits, (8, -1)), expected.logits, rtol=0, atol=2e-5)
