"""Load, time and clients that leave or hold on, over real sockets."""

import asyncio
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers import at_once, form, until

from dynaslim.serve import ServeOptions, create_app
from dynaslim.serve.endpoint import Lag


@pytest.fixture
def start(held, live):
    """`with start(option=...) as (url, service):` a server of an engine that can be held."""
    from contextlib import contextmanager

    @contextmanager
    def run(**options):
        app = create_app(held, ServeOptions(**options))
        with live(app) as port:
            held.hold()
            held.open.set()
            try:
                yield f"http://127.0.0.1:{port}", app.state.service
            finally:
                held.open.set()

    return run


def post(url, picture, query="", images=1, **options):
    files = form(*[picture] * images)
    return httpx.post(f"{url}/v1/predict{query}", files=files, timeout=20, **options)


def code(response):
    return response.status_code, response.json()["error"]["code"]


def counted(service, name):
    text = service.metrics_text().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.fixture
def background():
    """Requests that wait for their answer."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_a_full_queue_is_429(start, held, pictures, background):
    with start(queue=4, max_images=4, max_batch=2) as (url, service):
        held.open.clear()
        running = background.submit(post, url, pictures[0])
        assert held.entered.acquire(timeout=10)
        waiting = [background.submit(post, url, pictures[n]) for n in range(3)]
        until(lambda: service.models["micro"].batcher.waiting == 3)
        whole = post(url, pictures[0], images=2)  # one would fit
        assert code(whole) == (429, "busy")
        assert int(whole.headers["retry-after"]) >= 1
        waiting.append(background.submit(post, url, pictures[3]))
        until(lambda: service.models["micro"].batcher.waiting == 4)
        refused = post(url, pictures[4])
        assert code(refused) == (429, "busy")
        assert int(refused.headers["retry-after"]) >= 1
        held.open.set()
        assert [f.result().status_code for f in (running, *waiting)] == [200] * 5
        assert post(url, pictures[0]).status_code == 200
        assert counted(service, 'dynaslim_rejected_total{reason="busy"}') == 2
        until(lambda: counted(service, 'dynaslim_requests_total{code="429"}') == 2)
    assert max(rows for rows, _ in held.calls) == 2


@pytest.mark.parametrize(
    ("options", "query"), [({"deadline_ms": 150}, ""), ({}, "?deadline_ms=150")]
)
def test_a_deadline_is_504_and_what_is_late_is_not_run(
    start, held, pictures, background, options, query
):
    with start(**options) as (url, service):
        held.open.clear()
        began = time.monotonic()
        running = background.submit(post, url, pictures[0], query)
        assert held.entered.acquire(timeout=10)
        waiting = [background.submit(post, url, pictures[n], query) for n in range(3)]
        for future in (running, *waiting):
            assert code(future.result()) == (504, "deadline")
        assert 0.15 <= time.monotonic() - began < 5, "answered at once, not when it is free"
        assert service.models["micro"].batcher.waiting == 0
        assert counted(service, "dynaslim_deadline_missed_total") == 4
        held.open.set()
        if not options:
            assert post(url, pictures[0]).status_code == 200
    assert [rows for rows, _ in held.calls[1:]] == ([] if options else [1])


def test_time_before_the_server_looks_at_a_request_counts(start, pictures, monkeypatch):
    with start() as (url, service):
        assert post(url, pictures[0], "?deadline_ms=1500").status_code == 200
        monkeypatch.setattr(Lag, "request", lambda _: 1.6)
        assert code(post(url, pictures[0], "?deadline_ms=1500")) == (504, "deadline")
        slow = post(url, pictures[0])
        assert slow.status_code == 200
        assert slow.json()["timing_ms"]["total"] > 1600
        assert counted(service, "dynaslim_lag_seconds") == 1.6


def test_a_loop_measures_how_far_it_is_behind():
    async def measure():
        lag = Lag(asyncio.get_running_loop())
        assert lag.request() == 0
        await asyncio.sleep(0.005)
        time.sleep(0.12)  # something takes the loop
        await asyncio.sleep(0.001)
        behind = lag.request()
        await asyncio.sleep(0.1)
        return behind, lag.request()

    behind, after = asyncio.run(measure())
    assert 0.08 < behind < 1
    assert after == 0, "it does not stay behind without requests"


def test_who_has_left_is_not_run(start, held, pictures, background):
    with start(deadline_ms=60_000) as (url, service):
        held.open.clear()
        running = background.submit(post, url, pictures[0])
        assert held.entered.acquire(timeout=10)
        files = [("images", ("x", pictures[1]))] * 3
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/predict", files=files, timeout=httpx.Timeout(20, read=0.3))
        until(lambda: service.models["micro"].batcher.waiting == 0)
        held.open.set()
        assert running.result().status_code == 200
        until(lambda: counted(service, 'dynaslim_requests_total{code="499"}') == 1)
    assert [rows for rows, _ in held.calls] == [1]


def test_who_leaves_halfway_through_a_body(start, pictures):
    with start() as (url, service):
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head(length=1000) + b"--b\r\n")
            until(lambda: service.buffers.held == 5)
        until(lambda: service.buffers.held == 0)
        assert service.in_flight == 0
        assert post(url, pictures[0]).status_code == 200


def head(length=None, extra=""):
    how = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        "POST /v1/predict HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\n{how}\r\n{extra}\r\n"
    ).encode()


def answer_of(connection):
    """Status and JSON of the next answer; what follows stays."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(1)
        assert more, "the connection ended without an answer"
        data += more
    length = int(re.search(rb"content-length: (\d+)", data.lower())[1])
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return int(data[9:12]), json.loads(body), data.lower()


@pytest.fixture
def connect():
    """Plain connections, closed at the end."""
    made = []

    def open_one(url):
        made.append(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 20))
        return made[-1]

    yield open_one
    for connection in made:
        connection.close()


def test_a_large_body_is_refused_by_its_length(start, connect):
    with start(max_body_mb=0.1) as (url, service):
        connection = connect(url)
        connection.sendall(head(length=10**12))
        status, body, headers = answer_of(connection)
        assert (status, body["error"]["code"]) == (413, "body_too_large")
        assert b"connection: close" in headers
        # a client that waits for 100 Continue never sends
        connection = connect(url)
        connection.sendall(head(length=10**6, extra="Expect: 100-continue\r\n"))
        assert answer_of(connection)[0] == 413
        assert service.buffers.held == 0


def test_a_large_body_without_a_length_is_refused_while_it_is_read(start, connect):
    with start(max_body_mb=0.1) as (url, service):
        connection = connect(url)
        connection.sendall(head())
        sent, most = 0, 0
        connection.settimeout(0)
        piece = b"4000\r\n" + bytes(0x4000) + b"\r\n"
        end = time.monotonic() + 10
        while sent < 4000 * len(piece) and time.monotonic() < end:
            try:
                sent += connection.send(piece[sent % len(piece) :])
            except BlockingIOError:
                time.sleep(0.002)
            except ConnectionError:
                break
            most = max(most, service.buffers.held)
        connection.settimeout(20)
        assert most < 300_000, "hardly more than the limit is kept"
        until(lambda: counted(service, 'dynaslim_requests_total{code="413"}') == 1)
        assert sent < 4000 * len(piece), "the rest is not read"
        assert service.buffers.held == 0


@pytest.mark.parametrize("chunked", [True, False])
def test_who_sends_a_whole_body_before_reading_reads_why(start, connect, chunked):
    """However much more than the limit it is, within reason; nothing is reset."""
    with start(max_body_mb=0.1) as (url, service):
        for size in (150_000, 250_000, 700_000):
            connection = connect(url)
            connection.sendall(head(None if chunked else size))
            for start_ in range(0, size, 50_000):
                piece = bytes(min(50_000, size - start_))
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                time.sleep(0.01)  # so that a reset would have come
            if chunked:
                connection.sendall(b"0\r\n\r\n")
            status, body, _ = answer_of(connection)
            assert (status, body["error"]["code"]) == (413, "body_too_large")
        assert service.buffers.held == 0


def test_all_bodies_together_are_bounded(start, connect, pictures):
    with start(max_body_mb=0.1, max_buffer_mb=0.1) as (url, service):
        slow = connect(url)
        slow.sendall(head(length=99_000) + bytes(98_900))
        until(lambda: service.buffers.held == 98_900)
        response = post(url, pictures[0])
        assert code(response) == (429, "busy")
        assert response.headers["retry-after"] == "1"
        slow.close()
        until(lambda: service.buffers.held == 0)
        assert post(url, pictures[0]).status_code == 200


def test_a_slow_body_is_408(start, connect):
    with start(deadline_ms=200) as (url, service):
        connection = connect(url)
        connection.sendall(head(length=1000) + b"--b")
        status, body, headers = answer_of(connection)
        assert (status, body["error"]["code"]) == (408, "body_late")
        assert b"connection: close" in headers
        until(lambda: service.in_flight == 0)  # a moment after its answer is on the way


def test_requests_behind_each_other_on_one_connection(start, connect, pictures):
    body = (
        b'--b\r\nContent-Disposition: form-data; name="images"\r\n\r\n'
        + pictures[0] + b"\r\n--b--\r\n"
    )  # fmt: skip
    with start() as (url, _):
        connection = connect(url)
        connection.sendall((head(length=len(body)) + body) * 3)
        answers = [answer_of(connection) for _ in range(3)]
    assert [status for status, _, _ in answers] == [200] * 3


def test_stopping(start, held, pictures, background):
    with start(deadline_ms=60_000) as (url, service):
        held.open.clear()
        running = background.submit(post, url, pictures[0])
        assert held.entered.acquire(timeout=10)
        waiting = background.submit(post, url, pictures[1], images=2)
        until(lambda: service.models["micro"].batcher.waiting == 2)
        service.stop()
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
        assert httpx.get(f"{url}/healthz").status_code == 200
        refused = post(url, pictures[2])
        assert code(refused) == (503, "stopping")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        held.open.set()
        assert running.result().status_code == waiting.result().status_code == 200
        assert counted(service, "dynaslim_ready") == 0


def test_many_clients_at_once(start, held, pictures):
    """Every answer is the one to its own question."""
    with start() as (url, service):
        alone = [post(url, picture).json()["results"][0] for picture in pictures]

        def client(number):
            with httpx.Client(timeout=20) as mine:
                for turn in range(10):
                    n = (number + turn) % len(pictures)
                    files = [("images", (str(n), pictures[n]))]
                    (result,) = mine.post(f"{url}/v1/predict", files=files).json()["results"]
                    assert (result["name"], result["route"]) == (str(n), alone[n]["route"])
                    assert result["top"][0]["index"] == alone[n]["top"][0]["index"]

        at_once(8, client)
        until(lambda: counted(service, 'dynaslim_requests_total{code="200"}') == 88)
