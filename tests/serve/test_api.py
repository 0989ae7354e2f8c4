"""The interface as clients meet it: answers, errors, pages, counters."""

import base64
import dataclasses
import json
import re
import threading

import numpy as np
import pytest
from fastapi import FastAPI
from helpers import form, png, ready, until
from starlette.testclient import TestClient

from dynaslim.cost import CostTable
from dynaslim.data.decode import decode_image
from dynaslim.errors import UsageError
from dynaslim.predict import predict
from dynaslim.preprocessing import normalise_pixels
from dynaslim.runtime.options import RoutedOutput
from dynaslim.serve import ServeOptions, create_app, model_info
from dynaslim.serve.budgets import Budgets
from dynaslim.serve.model_info import ModelInfo
from dynaslim.serve.pages import find_samples

RESULT_KEYS = {
    "name", "top", "route", "widths", "choices", "escalated", "mirrored", "madds", "madds_share",
    "ms", "ms_share",
}  # fmt: skip


def as_json(*images):
    return {"images": [{"data": base64.b64encode(image).decode()} for image in images]}


def error_of(response):
    """The error, once it is one of the right shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert {"code", "message"} <= set(body["error"]) <= {"code", "message", "image"}
    assert "\n" not in body["error"]["message"]
    assert response.headers["content-type"] == "application/json"
    return response.status_code, body["error"]["code"]


# -- predictions ----------------------------------------------------------------------------------


def test_answers_equal_those_of_predict(serve, engine, pictures, tmp_path):
    files = []
    for n, picture in enumerate(pictures):
        files.append(tmp_path / f"{n}.png")
        files[-1].write_bytes(picture)
    expected = list(predict(engine, files))
    assert len({row.route for row in expected}) > 1, "the test needs several routes"
    with serve(name="mine") as client:
        forms = client.post("/v1/predict", files=form(*pictures)).json()
        jsons = client.post("/v1/predict", json=as_json(*pictures)).json()
        alone = [
            client.post("/v1/predict", files=form(picture)).json()["results"][0]
            for picture in pictures
        ]
    assert forms["model"] == "mine"
    assert [result["name"] for result in forms["results"]] == [f"{n}.png" for n in range(8)]
    assert [result["name"] for result in jsons["results"]] == [None] * 8
    for results in (forms["results"], jsons["results"], alone):
        for result, row in zip(results, expected, strict=True):
            assert set(result) == RESULT_KEYS
            best = result["top"][0]
            assert (best["index"], best["class"]) == (row.label, row.class_name)
            assert best["probability"] == pytest.approx(row.confidence, abs=1e-5)
            assert (result["route"], result["madds"]) == (row.route, row.madds)
            assert "-".join(map(str, result["widths"])) == result["route"]
            assert sum(entry["probability"] for entry in result["top"]) == pytest.approx(1)
    assert {result["madds_share"] for result in alone} > {1.0}, "of the widest route"


def test_an_answer_has_its_times_and_costs(serve, pictures):
    with serve() as client:
        body = client.post("/v1/predict?top_k=2", files=form(*pictures[:3])).json()
    assert set(body) == {
        "model", "budget", "budget_used", "results", "timing_ms", "batch_size", "cost_ratio",
        "unlike_curve",
    }  # fmt: skip
    assert (body["cost_ratio"], body["unlike_curve"]) == (None, False)
    assert body["model"] == "micro"
    assert body["budget"] is None
    assert body["budget_used"] is None
    assert body["batch_size"] == 3
    timing = body["timing_ms"]
    assert set(timing) == {"decode", "queue", "engine", "total"}
    assert all(ms >= 0 for ms in timing.values())
    assert timing["decode"] + timing["queue"] + timing["engine"] <= timing["total"]
    assert all(len(result["top"]) == 2 for result in body["results"])
    assert all(result["ms"] > 0 and result["ms_share"] > 0 for result in body["results"])


def test_top_k_is_clipped_to_the_classes(serve, plain_package, pictures):
    with serve(plain_package) as client:
        body = client.post("/v1/predict?top_k=99", files=form(pictures[0])).json()
    assert len(body["results"][0]["top"]) == 5
    assert {entry["class"] for entry in body["results"][0]["top"]} == {None}


def test_names_come_back_as_they_were(serve, pictures):
    with serve() as client:
        data = base64.encodebytes(pictures[0]).decode()  # in lines
        sent = {"images": [{"name": "kätz\ud83d.jpg", "data": data}, {"name": None, "data": data}]}
        content = json.dumps(sent).encode()
        headers = {"content-type": "application/json; charset=utf-8"}
        body = client.post("/v1/predict", content=content, headers=headers).json()
        files = [("images", ("dir/höh.png", pictures[0]))]
        other = client.post("/v1/predict", files=files).json()
    assert [result["name"] for result in body["results"]] == ["kätz\ud83d.jpg", None]
    assert other["results"][0]["name"] == "dir/höh.png"


def test_budgets_and_escalation(serve, engine, pictures):
    spec = engine.spec
    with serve() as client:

        def post(query):
            response = client.post(f"/v1/predict?{query}", files=form(*pictures))
            assert response.status_code == 200, response.text
            return response.json()

        cheap, wide = post("budget=0.01"), post("budget=1&escalate=never")
        unsure = post("budget=0.01&escalate=1")
    assert {r["route"] for r in cheap["results"]} == {str(spec.cheapest_choice)}
    assert (cheap["budget"], cheap["budget_used"]) == ("0.01", "0.01")
    assert {r["route"] for r in wide["results"]} == {str(spec.widest_choice)}
    assert all(r["escalated"] for r in unsure["results"])
    assert {r["route"] for r in unsure["results"]} == {str(spec.widest_choice)}
    assert all(r["madds_share"] > 1 for r in unsure["results"]), "both routes are counted"


def test_budgets_beyond_the_widest_are_offered_where_there_are_points(engine, monkeypatch):
    assert ModelInfo(engine).budget_range()["high"] == 1.0
    curve = engine.curve
    dear = dataclasses.replace(
        curve.points[-1], madds=1.25 * curve.widest_madds, share=1.25, top1=1.0, top1_selecting=1.0,
        tau_mirror=0.5, mirror_along=(1, 2),
    )  # fmt: skip
    looks = dataclasses.replace(curve, points=(*curve.points, dear))
    monkeypatch.setattr(engine, "curve", looks)
    offered = ModelInfo(engine).budget_range()
    assert offered["high"] == offered["points"][-1]["budget"] == 1.25
    budgets = Budgets(looks, ServeOptions(), 0.0)
    assert budgets.parse("1.3", "auto").point == dear
    assert budgets.parse("1.3", None).point.share == 1.0
    with pytest.raises(UsageError, match=r"budget '1\.3': above 1 are points"):
        Budgets(curve, ServeOptions(), 0.0).parse("1.3", "auto")


def test_the_time_of_an_image_that_ran_twice(engine):
    info = ModelInfo(engine)
    for n, route in enumerate(info.listed, start=1):
        route.ms = float(n)
    info._trunk_ms = 0.25
    cheapest, widest = info.listed[0], info.widest
    trunk = CostTable.from_madds(engine.spec, info.side).segments[0][0][0]
    twice = cheapest.madds + widest.madds - trunk
    assert info.ms_of(widest, widest.madds, False) == widest.ms
    assert info.ms_of(widest, twice, True) == widest.ms + 1 - 0.25
    # a mirror image takes the whole route, trunk and all
    assert info.ms_of(widest, 2 * widest.madds, True, mirrored=True) == 2 * widest.ms
    looked = info.ms_of(widest, twice + widest.madds, True, mirrored=True)
    assert looked == 2 * widest.ms + 1 - 0.25
    middle = info.listed[1]
    assert middle is not widest
    thrice = cheapest.madds + middle.madds + widest.madds - 2 * trunk
    assert info.ms_of(widest, thrice, True) == widest.ms + 1 - 0.25 + 2 - 0.25
    info._trunk_ms = 5.0  # noise of the measurement makes no image free
    assert info.ms_of(widest, twice, True) == widest.ms
    widest.ms = None
    assert info.ms_of(widest, twice, True) is None


def test_a_budget_of_the_server(serve, pictures):
    with serve(budget="0.01") as client:
        body = client.post("/v1/predict", files=form(pictures[0])).json()
        own = client.post("/v1/predict?budget=1", files=form(pictures[0])).json()
    assert (body["budget"], body["budget_used"]) == ("0.01", "0.01")
    assert (own["budget"], own["budget_used"]) == ("1", "1")


def test_an_adaptive_budget_shows(serve, held, pictures):
    with serve(held, adaptive_budget="0.01", adaptive_wait_ms=1e-6) as client:
        for _ in range(5):  # until the speed is known
            body = client.post("/v1/predict", files=form(*pictures)).json()
        text = client.get("/metrics").text
    assert body["budget"] == "1"
    assert float(body["budget_used"]) < 0.9, "any wait is too long here"
    share = float(metric(text, "dynaslim_budget_share"))
    assert share == pytest.approx(float(body["budget_used"]), abs=1e-3)


# -- errors ---------------------------------------------------------------------------------------

FORM = "multipart/form-data"
BOUNDARY = {"content-type": f"{FORM}; boundary=b"}
JSON = {"content-type": "application/json"}


def part(name='name="images"', content=b"x"):
    head = f"--b\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode()
    return head + content + b"\r\n"


@pytest.mark.parametrize(
    ("expected", "request_"),
    [
        ((400, "body_unreadable"), {"content": b"{", "headers": JSON}),
        ((400, "body_unreadable"), {"content": b"", "headers": JSON}),
        ((400, "body_unreadable"), {"content": b"\xff\xfe", "headers": JSON}),
        ((400, "body_unreadable"), {"content": b"[" * 100_000, "headers": JSON}),
        ((400, "body_unreadable"), {"content": b"9" * 10_000, "headers": JSON}),
        ((400, "body_unreadable"), {"content": b"", "headers": BOUNDARY}),
        ((400, "body_unreadable"), {"content": b"no form", "headers": BOUNDARY}),
        ((400, "body_unreadable"), {"content": part(), "headers": BOUNDARY}),
        ((400, "body_unreadable"), {"content": part("x=1") + b"--b--", "headers": BOUNDARY}),
        (
            (400, "body_unreadable"),
            {"content": b"x", "headers": {"content-type": FORM}},
        ),
        (
            (400, "body_unreadable"),
            {"content": b"x", "headers": {"content-type": f"{FORM}; boundary={'b' * 999}"}},
        ),
        ((400, "bad_base64"), {"json": {"images": [{"data": "/w=="}, {"data": "a?b="}]}}),
        ((400, "bad_base64"), {"json": {"images": [{"data": "abc"}]}}),
        ((400, "bad_base64"), {"json": {"images": [{"data": "äöü="}]}}),
        ((415, "content_type"), {"content": b"x"}),
        ((415, "content_type"), {"content": b"x", "headers": {"content-type": "image/png"}}),
        ((415, "content_type"), {"data": {"images": "x"}}),
        ((422, "no_images"), {"json": {"images": []}}),
        ((422, "no_images"), {"content": b"--b--\r\n", "headers": BOUNDARY}),
        ((422, "bad_body"), {"json": []}),
        ((422, "bad_body"), {"json": {}}),
        ((422, "bad_body"), {"json": {"images": {}}}),
        ((422, "bad_body"), {"json": {"images": [], "more": 1}}),
        ((422, "bad_body"), {"json": {"images": ["x"]}}),
        ((422, "bad_body"), {"json": {"images": [{"name": "x"}]}}),
        ((422, "bad_body"), {"json": {"images": [{"data": 1}]}}),
        ((422, "bad_body"), {"json": {"images": [{"data": "", "name": 1}]}}),
        ((422, "bad_body"), {"json": {"images": [{"data": "", "url": "file:///etc"}]}}),
        ((422, "unknown_field"), {"content": part('name="image"') + b"--b--", "headers": BOUNDARY}),
        ((413, "too_many_images"), {"json": {"images": [{"data": ""}] * 5}}),
        ((413, "too_many_images"), {"content": part() * 5 + b"--b--", "headers": BOUNDARY}),
        ((413, "body_too_large"), {"content": b"," * 20_000, "headers": JSON}),
        ((413, "body_too_large"), {"content": b"x" * 200_001, "headers": JSON}),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(errors_client, expected, request_):
    assert error_of(errors_client.post("/v1/predict", **request_)) == expected


@pytest.fixture(scope="module")
def errors_client(engine):
    """A server with small limits, for requests that it refuses."""
    options = ServeOptions(max_images=4, max_body_mb=0.2, decoders=1)
    with TestClient(create_app(engine, options), raise_server_exceptions=False) as client:
        ready(client)
        yield client


@pytest.mark.parametrize(
    "query",
    [
        "top_k=0", "top_k=-1", "top_k=two", "top_k=1.5", "top_k=", "top_k=٣", "top_k=1&top_k=2",
        "topk=1", "budget=much", "budget=0", "budget=2", "budget=", "budget=4ms", "budget=nan",
        "escalate=yes", "escalate=2", "escalate=nan", "escalate=-0.1", "deadline_ms=0",
        "deadline_ms=-5", "deadline_ms=inf", "deadline_ms=1e9", "deadline_ms=soon",
        "&".join(["a=1"] * 200),
    ],
)  # fmt: skip
def test_parameters_that_are_refused(errors_client, pictures, query):
    response = errors_client.post(f"/v1/predict?{query}", files=form(pictures[0]))
    assert error_of(response) == (422, "bad_parameter")


def test_the_image_at_fault_is_named(errors_client, pictures):
    response = errors_client.post("/v1/predict", files=form(pictures[0], b"GIF89a", pictures[1]))
    assert error_of(response) == (400, "image_unreadable")
    assert response.json()["error"]["image"] == 1


def test_paths_and_methods(errors_client):
    for path in ("/nothing", "/v1/nothing", "/v1/predict/", "/static/..%2f..%2fapp.py", "/v1"):
        assert error_of(errors_client.get(path)) == (404, "not_found")
    response = errors_client.get("/v1/predict")
    assert error_of(response) == (405, "method")
    assert response.headers["allow"] == "POST"
    assert error_of(errors_client.post("/healthz")) == (405, "method")
    assert error_of(errors_client.delete("/")) == (405, "method")


def test_errors_of_the_engine(serve, engine, pictures, caplog):
    class Broken:
        fails = False

        def __getattr__(self, name):
            return getattr(engine, name)

        def __call__(self, x, **arguments):
            if self.fails:
                raise MemoryError("secret detail")
            return engine(x, **arguments)

    broken = Broken()
    with serve(broken) as client:
        broken.fails = True
        response = client.post("/v1/predict", files=form(pictures[0]))
        assert error_of(response) == (500, "failed")
        assert "secret" not in response.text
        assert "secret detail" in caplog.text
        broken.fails = False
        assert client.post("/v1/predict", files=form(pictures[0])).status_code == 200


def test_the_framework_s_own_errors_have_the_same_shape(engine):
    app = create_app(engine)

    @app.get("/own/{number}")
    async def own(number: int):
        raise RuntimeError("secret detail")

    client = TestClient(app, raise_server_exceptions=False)
    assert error_of(client.get("/own/x")) == (422, "bad_parameter")
    response = client.get("/own/1")
    assert error_of(response) == (500, "failed")
    assert "secret" not in response.text


# -- the token ------------------------------------------------------------------------------------


def test_a_token(serve, pictures):
    right = {"authorization": "Bearer open sesame"}
    with serve(token="open sesame") as client:
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/predict"),
                             ("GET", "/v1/other")):  # fmt: skip
            for headers in ({}, {"authorization": "Bearer open sesam"}, {"authorization": "x"},
                            {"authorization": "Basic open sesame"},
                            {"authorization": b"Bearer \xff"}):  # fmt: skip
                response = client.request(method, path, headers=headers)
                assert error_of(response) == (401, "unauthorised")
                assert response.headers["www-authenticate"] == "Bearer"
        infer = "/v2/models/micro/infer"
        for method, path in (("GET", "/v2"), ("GET", "/v2/models/micro/ready"), ("GET", "/v2x"),
                             ("POST", infer)):  # fmt: skip
            response = client.request(method, path)
            assert (response.status_code, "asks for a token" in response.text) == (401, True)
        for path in ("/", "/healthz", "/readyz", "/static/main.js", "/docs", "/openapi.json",
                     "/v2/health/live", "/v2/health/ready"):  # fmt: skip
            assert client.get(path).status_code == 200
        headers = {**right, "inference-header-content-length": "0"}
        assert client.post(infer, content=pictures[0], headers=headers).is_success
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200
        lower = {"authorization": "bearer open sesame"}
        answer = client.post("/v1/predict", files=form(pictures[0]), headers=lower)
        assert answer.status_code == 200


# -- what it reports about itself -----------------------------------------------------------------


def test_models(serve, engine):
    spec = engine.spec
    with serve(max_images=3) as client:
        (model,) = client.get("/v1/models").json()["models"]
    assert model["name"] == "micro"
    assert model["backend"] == "onnxruntime"
    assert model["classes"] == list("abcde")
    assert (model["num_classes"], model["image_size_px"], model["in_channels"]) == (5, 16, 3)
    assert [stage["gated"] for stage in model["stages"]] == [False, True, True]
    assert model["stages"][1] == {
        "name": "stage 1", "widths": [4, 8, 12], "gated": True, "blocks": 1, "largest": 12,
    }  # fmt: skip
    routes = model["routes"]
    assert {route["route"] for route in routes} == set(map(str, spec.routing_space))
    assert [route["madds"] for route in routes] == sorted(route["madds"] for route in routes)
    assert all(route["ms"] > 0 for route in routes)
    assert routes[-1]["route"] == str(spec.widest_choice)
    assert model["widest"] == {"madds": routes[-1]["madds"], "ms": routes[-1]["ms"]}
    points = model["budget"]["points"]
    assert [point["top1"] for point in points] == [0.5, 0.6, 0.9]
    assert model["budget"]["low"] == points[0]["budget"]
    assert model["budget"]["high"] == points[-1]["budget"] == 1
    for point, own in zip(points, engine.curve.points, strict=True):
        assert engine.curve.at(point["budget"]) == own, "the budget affords its point"
    assert model["limits"] == {
        "images": 3, "body_bytes": 20_000_000, "pixels": 50_000_000, "deadline_ms": 2000.0,
    }  # fmt: skip
    assert model["samples"] == []


def _promising(engine, share):
    """Its curve with a point that sends all images along the widest route, and promises a share."""
    cheapest, _, widest = engine.curve.points
    madds = share * engine.curve.widest_madds
    greedy = dataclasses.replace(widest, madds=madds, share=share, top1=0.7)
    return dataclasses.replace(engine.curve, points=(cheapest, greedy, widest))


def test_costs_unlike_those_of_the_curve_are_reported(serve, engine, pictures):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "curve", _promising(engine, 0.72))
        patch.setattr(engine, "_decided", {})
        with serve() as client:
            assert "dynaslim_cost_ratio NaN" in client.get("/metrics").text
            for _ in range(12):
                body = client.post("/v1/predict?budget=0.75", files=form(*pictures)).json()
            client.post("/v1/predict", files=form(*pictures))  # without a budget: nothing promised
            counted = client.get("/metrics").text
    assert body["cost_ratio"] == pytest.approx(1 / 0.72)
    assert body["unlike_curve"]
    assert re.search(r"^dynaslim_cost_ratio 1\.38", counted, re.MULTILINE)
    assert re.search(r"^dynaslim_unlike_curve 1\.0", counted, re.MULTILINE)


def test_held_budgets_hold(serve, engine, pictures):
    """Of requests with the same budget together, however they come."""
    lowest = engine.curve.points[0].share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "curve", _promising(engine, 0.72))
        for name in ("_decided", "_ledgers"):
            patch.setattr(engine, name, {})
        shares = {"0.85": [], "0.9": []}
        with serve(hold=True) as client:
            for turn in range(30):
                budget = ("0.85", "0.9")[turn % 2]
                some = pictures[turn % 8 : turn % 8 + 1 + turn % 3]
                body = client.post(f"/v1/predict?budget={budget}", files=form(*some)).json()
                shares[budget] += [result["madds_share"] for result in body["results"]]
                assert np.mean(shares[budget]) <= float(budget) * (1 + 1e-9)
            answer = client.post("/v1/predict?budget=0.1", files=form(pictures[0]))
            trained = client.post("/v1/predict", files=form(pictures[0]))
        assert all(np.mean(found) > (lowest + float(b)) / 2 for b, found in shares.items())
    assert answer.status_code == 422
    assert "budget 0.1: cannot hold" in answer.json()["error"]["message"]
    assert trained.status_code == 200


def test_points_that_no_budget_leads_to_are_not_offered(serve, engine):
    """The widest route stands last in a curve, also where a cheaper point is better."""
    curve, worse = engine.curve, dataclasses.replace(engine.curve.points[-1], top1=0.2)
    with pytest.MonkeyPatch.context() as patch:
        points = (*curve.points[:-1], worse)
        patch.setattr(engine, "curve", dataclasses.replace(curve, points=points))
        with serve() as client:
            (model,) = client.get("/v1/models").json()["models"]
        offered = [point["top1"] for point in model["budget"]["points"]]
        assert offered == [0.5, 0.6]
        assert engine.curve.at(1.0).top1 == 0.6


@pytest.mark.parametrize(
    ("busy_tries", "how", "steady"),
    [(0, "slow", True), (1, "slow", True), (9, "slow", False), (9, "uneven", False)],
)
@pytest.mark.usefixtures("steady_times")
def test_times_are_measured_again_until_they_are_steady(
    engine, busy_tries, how, steady, monkeypatch
):
    found = ModelInfo(engine)
    routes = found.listed
    ms = {engine.spec.path_at(r.choices): n for n, r in enumerate(routes, 10)}
    cheapest = engine.spec.path_at(routes[0].choices)
    now, calls, tries = [0.0], [0], [0]

    def routed(images, decide, again):
        path = tuple(int(decide(g, None, np.zeros(1))[0]) for g in range(len(engine.spec.gates)))
        calls[0] += 1
        busy = tries[0] <= busy_tries
        if how == "slow" and busy and path == cheapest:
            now[0] += 0.1
        else:
            now[0] += ms[path] / 1e3 * (3 if how == "uneven" and busy and calls[0] % 2 else 1)

    def trunk(*_):
        tries[0] += 1
        return ([1.0],)

    monkeypatch.setattr(engine.router, "routed", routed)
    monkeypatch.setattr(model_info.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(model_info, "time_variant", trunk)
    found.measure()
    assert found.steady == steady
    assert tries == [min(busy_tries + 1, model_info.MEASURE_TRIES)]
    shown = [route.ms for route in found.listed]
    assert shown == (pytest.approx(sorted(ms.values())) if steady else [None] * len(routes))
    assert (found.ms_of(found.widest, found.widest.madds, True) is None) == (not steady)


@pytest.mark.usefixtures("steady_times")
def test_a_server_without_steady_times_shows_none(serve, pictures, monkeypatch):
    monkeypatch.setattr(ModelInfo, "_rise", lambda _: False)
    with serve() as client:
        (model,) = client.get("/v1/models").json()["models"]
        (result,) = client.post("/v1/predict", files=form(pictures[0])).json()["results"]
    assert model["steady"] is False
    assert [route["ms"] for route in model["routes"]] == [None] * len(model["routes"])
    assert model["widest"]["ms"] is None
    assert (result["ms"], result["ms_share"]) == (None, None)
    assert result["madds_share"] > 0


def test_many_routes_are_listed_by_their_uniform_ones(serve, engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_info, "MOST_ROUTES", 3)
        with serve() as client:
            (model,) = client.get("/v1/models").json()["models"]
            answer = client.post("/v1/predict", files=form(png(3, (16, 16), "RGB"))).json()
    listed = [route["choices"] for route in model["routes"]]
    assert listed == [[0, 0], [2, 2]], "the choices that both gates have"
    assert all(route["ms"] > 0 for route in model["routes"])
    assert answer["results"][0]["ms"] > 0, "timed by their segments"


def test_openapi_document(serve):
    with serve(token="x", deadline_ms=700) as client:
        document = client.get("/openapi.json").json()
        page = client.get("/docs")
    predict_ = document["paths"]["/v1/predict"]["post"]
    assert set(predict_["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    statuses = "200 400 401 404 408 413 415 422 429 500 503 504"
    assert set(predict_["responses"]) == set(statuses.split())
    limits = {p["name"]: p["schema"] for p in predict_["parameters"]}
    assert limits["deadline_ms"]["maximum"] == 700
    assert set(limits) == {"budget", "top_k", "escalate", "deadline_ms", "model"}
    for operations in document["paths"].values():
        for operation in operations.values():
            errors = {s: a for s, a in operation["responses"].items() if s != "200"}
            assert all(set(answer["content"]) == {"application/json"} for answer in errors.values())
            assert all("Retry-After" in errors[s]["headers"] for s in {"429", "503"} & set(errors))
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/predict" in page.text
    assert "src=" not in page.text
    assert "href='http" not in page.text


def metric(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return line.split()[-1]


def test_metrics(serve, engine, pictures):
    pre = engine.preprocessing
    output = engine(normalise_pixels(np.stack([decode_image(p, pre, "") for p in pictures]), pre))
    with serve(max_wait_ms=10_000) as client:
        client.post("/v1/predict", files=form(*pictures))
        client.post("/v1/predict", files=form(b"x"))
        response = client.get("/metrics")
    text = response.text
    assert response.headers["content-type"].startswith("text/plain")
    for name, value in {
        'dynaslim_requests_total{code="200"}': "1.0",
        'dynaslim_requests_total{code="415"}': "1.0",
        "dynaslim_request_seconds_count": "1.0",
        "dynaslim_batch_rows_sum": "8.0",
        "dynaslim_batch_rows_count": "1.0",
        "dynaslim_queue_rows": "0.0",
        "dynaslim_ready": "1.0",
        "dynaslim_budget_share": "NaN",
        "dynaslim_body_bytes": "0.0",
    }.items():
        assert metric(text, name) == value, name
    assert float(metric(text, "dynaslim_engine_seconds_total")) > 0
    spent = float(metric(text, "dynaslim_madds_total"))
    saved = float(metric(text, "dynaslim_madds_saved_total"))
    assert spent == output.madds.sum()
    assert spent + saved == 8 * engine.curve.widest_madds
    routes = [str(engine.route_of(row)) for row in output.routes]
    for route in set(routes):
        count = metric(text, f'dynaslim_images_total{{route="{route}"}}')
        assert float(count) == routes.count(route)


def test_what_dear_batches_cost_is_taken_from_what_others_save(engine):
    """Images that run twice may cost more than the widest route; a counter does not fall."""
    service = create_app(engine).state.service
    (model,) = service.models.values()
    widest, choices = model.info.widest_madds, np.zeros((2, 2), np.int64)
    for shares, saved in (
        ([0.4, 0.6], 1.0),
        ([1.3, 1.1], 1.0),
        ([0.9, 0.9], 1.0),
        ([0.5, 0.2], 2.1),
    ):
        madds, none_B = widest * np.array(shares), np.zeros(2, bool)
        model.metrics.batch(RoutedOutput(None, choices, madds, none_B, none_B), 0.1)
        counted = float(metric(service.metrics_text().decode(), "dynaslim_madds_saved_total"))
        assert counted / widest == pytest.approx(saved)
    service.close()


def test_two_servers_count_apart(serve, pictures):
    with serve() as one, serve() as other:
        one.post("/v1/predict", files=form(pictures[0]))
        assert 'code="200"' in one.get("/metrics").text
        assert 'code="200"' not in other.get("/metrics").text


# -- pages ----------------------------------------------------------------------------------------


def test_pages_and_their_headers(serve):
    with serve() as client:
        for path, kind in (("/", "text/html; charset=utf-8"),
                           ("/static/main.js", "text/javascript; charset=utf-8"),
                           ("/static/icon.svg", "image/svg+xml")):  # fmt: skip
            response = client.get(path)
            assert response.status_code == 200
            assert response.headers["content-type"] == kind
            assert response.headers["x-content-type-options"] == "nosniff"
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert "camera=(self)" in response.headers["permissions-policy"]
            etag = response.headers["etag"]
            for known in (etag, f'"x", W/{etag}', "*"):
                again = client.get(path, headers={"if-none-match": known})
                assert again.status_code == 304
                assert again.content == b""
                assert again.headers["etag"] == etag
            assert client.get(path, headers={"if-none-match": '"x"'}).status_code == 200
            head = client.head(path)
            assert head.status_code == 200
            assert head.headers["content-length"] == str(len(response.content))


def test_samples_of_a_folder(serve, pictures, tmp_path):
    (tmp_path / "b.png").write_bytes(pictures[1])
    (tmp_path / "a.jpg").write_bytes(pictures[0])  # a PNG, whatever it is called
    (tmp_path / "notes.txt").write_text("no picture")
    with serve(samples=tmp_path) as client:
        (model,) = client.get("/v1/models").json()["models"]
        assert model["samples"] == [
            {"name": "a", "url": "/samples/0"},
            {"name": "b", "url": "/samples/1"},
        ]
        response = client.get("/samples/1")
        assert response.content == pictures[1]
        assert response.headers["content-type"] == "image/png"
        assert error_of(client.get("/samples/2")) == (404, "not_found")


def test_samples_that_are_found(tmp_path, pictures):
    shipped = find_samples(None, None, NAMES)
    assert [sample.name for sample in shipped] == NAMES
    assert all(sample.content.startswith(b"\x89PNG") for sample in shipped)
    assert find_samples(None, None, [*NAMES[:9], "Sock"]) == []
    assert find_samples(None, None, None) == []
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "own.png").write_bytes(pictures[0])
    assert [sample.name for sample in find_samples(None, tmp_path, NAMES)] == ["own"]
    with pytest.raises(UsageError, match="no such folder"):
        find_samples(tmp_path / "none", None, None)
    with pytest.raises(UsageError, match="has no pictures"):
        find_samples(tmp_path, None, None)


NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
]  # fmt: skip


# -- inside somebody's own application ------------------------------------------------------------


def test_mounted_in_another_application(engine, pictures):
    inner = create_app(engine, ServeOptions(token="x"))
    outer = FastAPI()
    outer.mount("/vision", inner)
    headers = {"authorization": "Bearer x"}
    with TestClient(outer) as client:
        assert client.get("/vision/v1/models").status_code == 401
        ready(client, "/vision/readyz")
        path = "/vision/v1/predict"
        assert client.post(path, files=form(pictures[0]), headers=headers).status_code == 200
    inner.state.service.close()


def test_a_model_that_does_not_start(engine, pictures):
    class Broken:
        def __getattr__(self, name):
            return getattr(engine, name)

        def warm_up(self):
            raise UsageError("no such kernel")

    app = create_app(Broken())
    with TestClient(app) as client:
        until(lambda: app.state.service.state != "starting")
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
        response = client.post("/v1/predict", files=form(pictures[0]))
        assert error_of(response) == (500, "failed")
        assert "no such kernel" in response.text


def test_before_it_is_ready(held, pictures):
    held.open.clear()
    app = create_app(held)
    with TestClient(app) as client:
        assert held.entered.acquire(timeout=20)
        response = client.post("/v1/predict", files=form(pictures[0]))
        assert error_of(response) == (503, "starting")
        assert int(response.headers["retry-after"]) >= 1
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").json() == {"status": "alive"}
        held.open.set()
        ready(client)
        assert client.post("/v1/predict", files=form(pictures[0])).status_code == 200
        assert app.state.service.models["micro"].batcher.throughput.seconds_for(1) > 0, (
            "its speed was measured"
        )


def test_closing_answers_what_is_still_being_decoded(engine):
    service = create_app(engine, ServeOptions(decoders=1)).state.service
    batcher = service.models["micro"].batcher
    gate = threading.Event()
    pixels = np.zeros((3, 16, 16), np.uint8)

    def decode_first():
        """As a body with two images does: the second is left to any free thread."""
        gate.wait(20)
        service.decoders.submit(batcher.put, item, 1, pixels)
        batcher.put(item, 0, pixels)

    setting = batcher.budgets.parse(None, "auto")
    item = batcher.admit(2, setting, top_k=1, deadline=None)
    service.decoders.submit(decode_first)
    closing = threading.Thread(target=service.close)
    closing.start()
    gate.set()
    closing.join(20)
    assert not closing.is_alive()
    assert item.future.result(0) is item
    assert all(item.answers)
