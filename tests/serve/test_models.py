"""Several models in one server: their names, queues and metrics, and how they come and go."""

import gc
import re
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from helpers import form, ready, running, until
from starlette.testclient import TestClient

from dynaslim import predict as predicting
from dynaslim.errors import UsageError
from dynaslim.runtime.engine import Engine
from dynaslim.serve import Batcher, ServeOptions, create_app, model_info
from dynaslim.serve.batcher import FairSemaphore
from dynaslim.serve.repository import find_in_folder

ADMIN = {"authorization": "Bearer admin"}
INDEX = "/v2/repository/index"


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """Models are ready soon."""
    monkeypatch.setattr(model_info, "MEASURE_S", 0)


@pytest.fixture
def folder(package, plain_package, tmp_path):
    """A model folder with packages `one` and `two`, and what is no model."""
    root = tmp_path / "models"
    shutil.copytree(package, root / "one")
    shutil.copytree(plain_package, root / "two")
    (root / "broken").mkdir()
    (root / "broken" / "manifest.json").write_text("{}")
    (root / "notes.txt").write_text("no model")
    return root


@pytest.fixture
def open_engine(monkeypatch):
    """Engines are made quickly; those that were made, by weak references."""
    made, original = [], predicting.open_engine

    def start(path, *given, **named):
        engine = original(path, "onnxruntime", workers=1)
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(predicting, "open_engine", start)
    return made


@pytest.fixture
def administered(engine, folder, open_engine):
    """A server of `micro` that may load the models of the folder; yields its client."""
    options = ServeOptions(model_folder=folder, admin_token="admin")
    with TestClient(create_app(engine, options), raise_server_exceptions=False) as client:
        ready(client)
        yield client


def change(client, what, name, **options):
    options = {"headers": ADMIN, "json": {}} | options
    return client.post(f"/v2/repository/models/{name}/{what}", **options)


def states(client, headers=ADMIN):
    return {one["name"]: one["state"] for one in client.post(INDEX, headers=headers).json()}


# -- several --------------------------------------------------------------------------------------


def test_several_models(engine, package, plain_package, pictures, open_engine):
    sources = [engine, f"b={plain_package}", f"c={package}"]
    with TestClient(create_app(sources)) as client:
        ready(client, "/v2/health/ready")
        models = client.get("/v1/models").json()["models"]
        assert [(one["name"], one["classes"] is None) for one in models] == [
            ("micro", False), ("b", True), ("c", False),
        ]  # fmt: skip
        for query, name in (("", "micro"), ("?model=b", "b"), ("?top_k=2&model=c", "c")):
            answer = client.post(f"/v1/predict{query}", files=form(pictures[0])).json()
            assert answer["model"] == name
        for path in ("/v1/predict?model=d", "/v1/predict?model=", "/v2/models/d/infer"):
            answer = client.post(path, files=form(pictures[0]))
            assert answer.status_code == 404
            assert "there is micro, b, c" in answer.text
        assert client.post("/v1/predict?model=b&model=c").status_code == 422
        expected = engine(np.zeros((1, 3, 16, 16), np.float32)).logits
        sent = {"name": "x", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": [0] * 768}
        for name in ("micro", "b", "c"):
            assert client.get(f"/v2/models/{name}").json()["name"] == name
            assert client.get(f"/v2/models/{name}/ready").json() == {"name": name, "ready": True}
            body = {"inputs": [sent], "outputs": [{"name": "logits"}]}
            answer = client.post(f"/v2/models/{name}/infer", json=body).json()
            assert answer["model_name"] == name
            np.testing.assert_allclose(answer["outputs"][0]["data"], expected[0], atol=2e-5)
        text = client.get("/metrics").text
    counted = re.findall(r'^dynaslim_requests_total\{(?:code="200",)?model="(\w+)"', text, re.M)
    assert 'dynaslim_requests_total{code="200",model="b"} 2.0' in text, counted
    assert 'dynaslim_requests_total{code="404",model="micro"} 3.0' in text
    assert 'dynaslim_ready{model="c"} 1.0' in text
    assert text.count("# TYPE dynaslim_batch_rows histogram") == 1
    bytes_ = {
        name: float(re.search(rf'model_bytes{{model="{name}"}} (\S+)', text)[1]) for name in "bc"
    }
    assert bytes_["c"] == sum(file.stat().st_size for file in package.iterdir())
    assert "\ndynaslim_body_bytes 0.0" in text
    assert float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.M)[1]) > 1e7


def test_names(engine, package, plain_package, tmp_path, open_engine):
    before = threading.enumerate()
    for sources, options, message in (
        ([package, plain_package], {}, "model micro: there are two of that name"),
        ([f"a={package}", f"a={plain_package}"], {}, "model a: there are two of that name"),
        ([f"a={package}", engine], {"name": "b"}, "--name b: is for a single model"),
        ([f"a b={package}"], {}, "a model's name has up to 128 letters"),
        ([f"..={package}"], {}, "a model's name has"),
        ([f"a={package}", f"b={plain_package}"], {"budget": "0.5"}, "model b: budget '0.5': the"),
        ([engine], {"model_folder": tmp_path}, "--model-folder: set DYNASLIM_ADMIN_TOKEN"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=re.escape(message)):
            create_app(sources, ServeOptions(**options))
    for options, message in (
        ({"model_folder": tmp_path / "none"}, "none: no such folder"),
        ({"token": "a", "admin_token": "a"}, "--admin-token: is that of the clients"),
        ({"admin_token": ""}, "--admin-token: is empty"),
    ):
        with pytest.raises(UsageError, match=message):
            ServeOptions(**options)
    started = set(threading.enumerate()) - set(before)
    assert not [one for one in started if one.name == "dynaslim-batcher"], "queues were left open"


def test_an_equals_sign_in_a_path(package, tmp_path, open_engine):
    (tmp_path / "a=b").symlink_to(package)
    app = create_app(tmp_path / "a=b")
    assert list(app.state.service.models) == ["micro"]
    app.state.service.close()


# -- the cores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [1, 2])
def test_batches_of_all_models_share_the_cores(engine, places):
    """So many run at once and no more, and a long queue leaves the others their turns."""
    running_, most, order, lock = [0], [0], [], threading.Lock()

    class Counting:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, attribute):
            return getattr(engine, attribute)

        def __call__(self, x, **arguments):
            with lock:
                running_[0] += 1
                most[0] = max(most[0], running_[0])
                order.append(self.name)
            time.sleep(0.01)
            with lock:
                running_[0] -= 1
            return engine(x, **arguments)

    turns, options = FairSemaphore(places), ServeOptions(max_batch=1, max_images=1)
    pixels = [np.zeros((3, 16, 16), np.uint8)]
    with (
        Batcher(Counting("a"), options, turns=turns) as a,
        Batcher(Counting("b"), options, turns=turns) as b,
    ):
        futures = [a.submit(pixels) for _ in range(20)] + [b.submit(pixels) for _ in range(5)]
        for future in futures:
            future.result(20)
        assert a.throughput.seconds_for(1) > a._speed.seconds_for(1) or places == 2
    assert most[0] == places
    last = max(n for n, name in enumerate(order) if name == "b")
    assert last < 14, order


def test_who_is_late_after_the_turns_of_others_is_not_run(engine):
    turns = FairSemaphore(1)
    with Batcher(engine, turns=turns) as batcher:
        with turns:
            late = batcher.submit([np.zeros((3, 16, 16), np.uint8)], deadline_s=0.05)
            time.sleep(0.1)
        with pytest.raises(Exception, match="the deadline passed"):
            late.result(10)


# -- load and unload ------------------------------------------------------------------------------


def test_loading_is_off_without_an_admin_token(serve, pictures):
    with serve() as client:
        for what in ("load", "unload"):
            answer = change(client, what, "micro")
            assert answer.status_code == 403
            assert "no admin token" in answer.json()["error"]
        assert states(client, {}) == {"micro": "READY"}
        assert client.post("/v1/predict", files=form(pictures[0])).status_code == 200
        assert client.get("/v2/repository/models/micro/load").status_code == 405


def test_tokens(engine, folder):
    options = ServeOptions(token="client", model_folder=folder, admin_token="admin")
    client = TestClient(create_app(engine, options))
    mine = {"authorization": "Bearer client"}
    for headers in ({}, {"authorization": "Bearer admi"}, {"authorization": "Bearer admin2"}, mine):
        for what in ("load", "unload"):
            answer = change(client, what, "one", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert client.post(INDEX).status_code == 401
    assert states(client, mine) == {"micro": "LOADING"}, "a client sees what is served"
    listed = {
        "micro": "LOADING",
        "broken": "UNAVAILABLE",
        "one": "UNAVAILABLE",
        "two": "UNAVAILABLE",
    }
    assert states(client, ADMIN) == listed
    assert client.get("/v1/models", headers=ADMIN).status_code == 200, "it may do what clients may"
    client.app.state.service.close()


def test_triton_s_client_loads_and_unloads(engine, folder, open_engine, pictures, live):
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    app = create_app(engine, ServeOptions(model_folder=folder, admin_token="admin"))
    with live(app) as port:
        client = http.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=30)
        assert client.get_model_repository_index() == [
            {"name": "micro", "version": "1", "state": "READY", "reason": ""}
        ]
        with pytest.raises(http.InferenceServerException, match="with the admin token") as raised:
            client.load_model("one")
        assert raised.value.status() == "401"
        client.load_model("one", headers=ADMIN)
        assert client.is_model_ready("one")
        index = {one["name"]: one for one in client.get_model_repository_index(headers=ADMIN)}
        assert index["one"]["state"] == "READY"
        assert (index["two"]["state"], index["two"]["reason"]) == ("UNAVAILABLE", "not loaded")
        sent = http.InferInput("image", [8], "BYTES")
        sent.set_data_from_numpy(np.array(pictures, object))
        answers = [client.infer(name, [sent]).as_numpy("logits") for name in ("micro", "one")]
        np.testing.assert_allclose(*answers, atol=2e-5)
        client.unload_model("one", headers=ADMIN)
        assert not client.is_model_ready("one")
        with pytest.raises(http.InferenceServerException, match="model 'one': there is micro"):
            client.infer("one", [sent])
        with pytest.raises(http.InferenceServerException, match="is not loaded") as raised:
            client.unload_model("one", headers=ADMIN)
        assert raised.value.status() == "404"
        with pytest.raises(http.InferenceServerException, match=r"parameters\.config"):
            client.load_model("one", headers=ADMIN, config="{}")
        with pytest.raises(http.InferenceServerException, match=r"parameters\.config"):
            client.load_model("one", headers=ADMIN, config="{}", files={"file:1/model.onnx": b"x"})
        client.close()
    gc.collect()
    assert [one() for one in open_engine] == [None]


def test_a_load_that_fails_changes_nothing(administered, folder, pictures):
    answer = change(administered, "load", "broken")
    assert answer.status_code == 400
    assert "model broken: cannot be loaded" in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    damaged = folder / "two" / "weights.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert change(administered, "load", "two").status_code == 400
    index = {one["name"]: one for one in administered.post(INDEX, headers=ADMIN).json()}
    assert "altered or damaged" in index["two"]["reason"]
    assert administered.get("/readyz").status_code == 200
    assert administered.post("/v1/predict", files=form(pictures[0])).status_code == 200
    # the same for one that was served: the former goes on
    assert change(administered, "load", "one").status_code == 200
    shutil.copy(folder / "broken" / "manifest.json", folder / "one")
    assert change(administered, "load", "one").status_code == 400
    assert administered.post("/v1/predict?model=one", files=form(pictures[0])).status_code == 200
    assert not [one for one in administered.post(INDEX, json={"ready": True}, headers=ADMIN).json()
                if one["state"] != "READY"]  # fmt: skip


def test_a_model_that_does_not_start_when_it_is_loaded(administered, monkeypatch, pictures):
    def broken(self, *_):
        raise RuntimeError("no such\nkernel")

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "warm_up", broken)
        answer = change(administered, "load", "one")
    assert (answer.status_code, answer.json()["error"]) == (
        400, "model one: cannot be loaded: no such kernel",
    )  # fmt: skip
    assert threading.active_count() <= before + 1, "its queue has ended; a thread waits for changes"
    assert change(administered, "load", "one").status_code == 200
    assert states(administered)["one"] == "READY"


NAMES = [
    "..", ".", "...", "%2e%2e", "..%2fmodels%2fone", "one%2f..%2ftwo", "%2fetc", "one%00", "none",
    ".hidden", "one%5c..%5ctwo", "a" * 200, "one%20", "%ff", "notes.txt", "notes",
]  # fmt: skip


def test_names_do_not_leave_the_folder(administered, open_engine):
    for name in NAMES:
        for what in ("load", "unload"):
            assert change(administered, what, name).status_code == 404, name
    assert open_engine == []


def test_links_do_not_leave_the_folder(administered, folder, package, tmp_path, open_engine):
    (folder / "linked").symlink_to(package)
    (folder / "through").symlink_to(folder / "one")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "hidden").mkdir()
    for file in package.iterdir():
        (folder / "hidden" / file.name).symlink_to(file)
    (tmp_path / "out.safetensors").write_text("x")
    (folder / "out.safetensors").symlink_to(tmp_path / "out.safetensors")
    for name in ("linked", "hidden", "out"):
        answer = change(administered, "load", name)
        assert answer.status_code == 404
        assert "has a link that leaves the model folder" in answer.json()["error"]
        assert name not in states(administered)
    assert change(administered, "load", "loop").status_code == 404
    assert open_engine == []
    assert change(administered, "load", "through").status_code == 200
    with pytest.raises(UsageError, match="is not in the model folder"):
        find_in_folder(None, "one")


def test_bodies_of_a_change(administered):
    for status, content in (
        (400, b"{"), (422, b"[]"), (422, b'"x"'), (422, b'{"parameters": {"config": "{}"}}'),
        (422, b'{"more": 1}'), (422, b'{"parameters": {"unload_dependents": "no"}}'),
        (400, b"\xff"), (400, b"[" * 90_000), (413, b" " * 200_000),
    ):  # fmt: skip
        answer = change(administered, "unload", "micro", content=content, json=None)
        assert answer.status_code == status, content[:99]
        assert isinstance(answer.json()["error"], str)
    assert states(administered)["micro"] == "READY"
    for content in (b"", b"{}", b'{"parameters": {"unload_dependents": true}}'):
        assert change(administered, "load", "one").status_code == 200
        answer = change(administered, "unload", "one", content=content, json=None)
        assert answer.status_code == 200, content


def test_unload_answers_what_it_has_accepted(held, live, pictures, folder):
    """What runs and what waits is answered; what comes later is not taken."""
    options = ServeOptions(admin_token="admin", deadline_ms=60_000, max_batch=1)
    app = create_app(held, options)
    with live(app) as port, ThreadPoolExecutor(8) as pool:
        url = f"http://127.0.0.1:{port}"
        model = app.state.service.models["micro"]
        held.hold()
        requests = [
            pool.submit(httpx.post, f"{url}/v1/predict", files=form(one), timeout=20)
            for one in pictures[:4]
        ]
        assert held.entered.acquire(timeout=10)
        until(lambda: model.batcher.waiting == 3)
        # a request that was on its way: its body is not there when the model goes
        with httpx.Client(timeout=20) as slow:
            gone = threading.Event()

            def body():
                yield b'--b\r\nContent-Disposition: form-data; name="images"\r\n\r\n'
                assert gone.wait(10)
                yield pictures[0] + b"\r\n--b--\r\n"

            headers = {"content-type": "multipart/form-data; boundary=b"}
            late = pool.submit(slow.post, f"{url}/v1/predict", content=body(), headers=headers)
            until(lambda: app.state.service.in_flight == 5)
            path = f"{url}/v2/repository/models/micro/unload"
            leaving = pool.submit(httpx.post, path, headers=ADMIN, timeout=20)
            until(lambda: "micro" not in app.state.service.models)
            refused = httpx.post(f"{url}/v1/predict", files=form(pictures[0]))
            assert refused.status_code == 404
            index = httpx.post(f"{url}{INDEX}", headers=ADMIN).json()
            assert [(one["name"], one["state"]) for one in index] == [("micro", "UNLOADING")]
            gone.set()
            answer = late.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
            assert "micro is being unloaded" in answer.json()["error"]["message"]
            assert not leaving.done()
            held.open.set()
            assert [one.result().status_code for one in requests] == [200] * 4
            assert leaving.result().status_code == 200
        assert httpx.get(f"{url}/v2/health/ready").status_code == 200
        assert httpx.get(f"{url}/v1/models").json() == {"models": []}
        assert httpx.post(f"{url}{INDEX}", headers=ADMIN).json() == []


def test_others_are_served_while_a_model_is_loaded(administered, monkeypatch, pictures, folder):
    entered, go = threading.Event(), threading.Event()
    warm_up = Engine.warm_up

    def slow(self, *given):
        entered.set()
        assert go.wait(20)
        return warm_up(self, *given)

    monkeypatch.setattr(Engine, "warm_up", slow)
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(change, administered, "load", "one")
        assert entered.wait(10)
        assert administered.get("/healthz").status_code == 200
        assert administered.get("/v2/health/ready").json() == {"ready": True}
        assert administered.get("/v2/models/one/ready").status_code == 404
        assert states(administered)["one"] == "LOADING"
        assert administered.post("/v1/predict", files=form(pictures[0])).status_code == 200
        second = pool.submit(change, administered, "load", "two")
        go.set()
        assert loading.result().status_code == second.result().status_code == 200
    assert states(administered)["two"] == "READY"
    # again, in place of the one that serves meanwhile
    former = administered.app.state.service.models["one"]
    assert change(administered, "load", "one").status_code == 200
    assert administered.app.state.service.models["one"] is not former
    assert not former.batcher._thread.is_alive()


def test_the_first_model_keeps_its_place(administered, folder, package, pictures):
    shutil.copytree(package, folder / "micro")
    assert change(administered, "load", "one").status_code == 200
    assert change(administered, "unload", "micro").status_code == 200
    answer = administered.post("/v1/predict", files=form(pictures[0]))
    assert answer.status_code == 404, "no other model answers in its place"
    assert "model 'micro': there is one" in answer.text
    assert change(administered, "load", "micro").status_code == 200
    listed = administered.get("/v1/models").json()["models"]
    assert [one["name"] for one in listed] == ["micro", "one"]
    answer = administered.post("/v1/predict", files=form(pictures[0]))
    assert answer.json()["model"] == "micro"


def test_a_stop_does_not_wait_for_a_load(package, folder):
    script = """
import sys, time
from dynaslim import cli
from dynaslim.runtime.engine import Engine
warm_up, times = Engine.warm_up, []
def slow(self, *given):
    times.append(1)
    if len(times) > 1:
        time.sleep(60)
    return warm_up(self, *given)
Engine.warm_up = slow
cli.main(sys.argv[1:])
"""
    flags = ["--model-folder", folder, "--admin-token", "admin", "--access-log"]
    with (
        running(package, *map(str, flags), script=script) as (process, url),
        ThreadPoolExecutor(1) as pool,
    ):
        load = pool.submit(
            httpx.post, f"{url}/v2/repository/models/one/load", headers=ADMIN, timeout=30
        )
        until(lambda: states(httpx.Client(base_url=url)).get("one") == "LOADING")
        began = time.monotonic()
        process.terminate()
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5
        with pytest.raises(httpx.TransportError):
            load.result()


# -- tracing --------------------------------------------------------------------------------------


def test_spans_of_a_request(engine, pictures, monkeypatch):
    """By OpenTelemetry's SDK where the process has set it up, and nothing where it has not."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="dynaslim[otel] is not installed")
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    plain = create_app(engine).state.service
    assert plain.tracer is None
    plain.close()
    provider, exporter = sdk.TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    with TestClient(create_app(engine)) as client:
        ready(client)
        before = time.time_ns()
        assert client.post("/v1/predict", files=form(pictures[0])).status_code == 200
        assert client.post("/v2/models/micro/infer", json={}).status_code == 422
    queue, run, request, refused = exporter.get_finished_spans()
    assert [one.name for one in (queue, run, request)] == ["queue", "engine", "POST /v1/predict"]
    assert refused.name == "POST /v2/models/{name}/infer"
    assert queue.parent.span_id == run.parent.span_id == request.context.span_id
    assert before <= queue.start_time <= queue.end_time == run.start_time < run.end_time
    assert run.end_time <= request.end_time + 10**7, "the clocks differ by little"
    assert dict(run.attributes) == {
        "dynaslim.model": "micro", "dynaslim.images": 1, "dynaslim.batch_size": 1,
    }  # fmt: skip
