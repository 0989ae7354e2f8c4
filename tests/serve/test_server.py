"""`dynaslim serve` as a process: how it starts, how it stops, what it needs."""

import json
import signal
import socket
import threading
import time
from collections import Counter

import httpx
import pytest
from helpers import encoded, fails, free_port, running, until
from PIL import Image

from dynaslim.serve import server

# a finder that refuses what a server of a package must not need, then the command line
# batches that take their time, so that requests wait when the signal comes
SLOW = """
import sys, time
from dynaslim import cli
from dynaslim.serve import batcher
prepare = batcher.normalise_pixels
def slow(*given):
    time.sleep(%r)
    return prepare(*given)
batcher.normalise_pixels = slow
cli.main(sys.argv[1:])
"""
# connections have time to come between the last that is accepted and the closed port
SLOW_CLOSE = """
import asyncio, time
close = asyncio.base_events.Server.close
def slowly(server):
    time.sleep(0.2)
    close(server)
asyncio.base_events.Server.close = slowly
"""


def ended(process, seconds=30):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_accepted_request(package, pictures, number):
    """Clients send without a pause; each request that was sent before has its answer."""
    sent, answered, refused, cut_off = [0] * 8, [0] * 8, [0] * 8, [0] * 8
    with running(package, "--max-batch", "2", script=SLOW % 0.02) as (process, url):
        stopping = threading.Event()

        def client(n):
            with httpx.Client(timeout=20) as mine:
                while True:
                    sent_before = not stopping.is_set()
                    sent[n] += 1
                    try:
                        files = [("images", pictures[n])]
                        answer = mine.post(f"{url}/v1/predict", files=files)
                    except httpx.TransportError:
                        cut_off[n] += sent_before
                        return
                    if answer.status_code == 200:
                        answered[n] += 1
                    else:
                        assert answer.status_code == 503
                        assert answer.json()["error"]["code"] == "stopping"
                        refused[n] += 1
                        return

        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: min(answered) >= 3)
        process.send_signal(number)
        time.sleep(0.005)
        stopping.set()
        for thread in threads:
            thread.join(20)
        returned, _, err = ended(process)
    assert sum(cut_off) == 0
    assert sum(refused) == 8, "the port stays open for a moment, to answer that it stops"
    assert sum(sent) == sum(answered) + sum(refused)
    assert (returned, err) == (0, "")


def test_a_stop_resets_no_new_connection(package, pictures):
    """Clients open a connection for each request until there is no server any more."""
    picture = pictures[0]
    body = (
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        + picture + b"\r\n--b--\r\n"
    )  # fmt: skip
    request = (
        b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n%s" % (len(body), body)
    )
    outcomes = Counter()
    with running(package, script=SLOW_CLOSE + SLOW % 0.005) as (process, url):
        port = int(url.rpartition(":")[2])

        def client():
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), 20) as connection:
                        connection.sendall(request)
                        outcomes[connection.recv(12)[9:]] += 1
                except ConnectionRefusedError:
                    return
                except OSError as error:
                    outcomes[repr(error)] += 1

        threads = [threading.Thread(target=client) for _ in range(24)]
        for thread in threads:
            thread.start()
        until(lambda: outcomes[b"200"] >= 200)
        process.terminate()
        for thread in threads:
            thread.join(20)
        returned, _, err = ended(process)
    assert set(outcomes) == {b"200", b"503"}, outcomes
    assert (returned, err) == (0, "")


def test_what_cannot_be_answered_in_time(package, pictures):
    flags = ["--drain-s", "0.2", "--deadline-ms", "60000"]
    with running(package, *flags, script=SLOW % 1.5) as (process, url):
        outcome = []

        def client():
            try:
                httpx.post(f"{url}/v1/predict", files=[("images", pictures[0])], timeout=20)
            except httpx.TransportError as error:
                outcome.append(error)

        thread = threading.Thread(target=client)
        thread.start()
        time.sleep(0.5)
        process.terminate()
        returned, _, err = ended(process)
        thread.join()
    assert returned == 1
    assert err == "dynaslim: requests not answered in 0.2 s: 1\n"
    assert len(outcome) == 1


def test_a_second_signal_stops_at_once(package, pictures):
    with running(package, "--deadline-ms", "60000", script=SLOW % 5) as (process, url):

        def client():
            with pytest.raises(httpx.TransportError):
                httpx.post(f"{url}/v1/predict", files=[("images", pictures[0])], timeout=20)

        thread = threading.Thread(target=client)
        thread.start()
        time.sleep(0.5)
        process.terminate()
        until(lambda: httpx.get(f"{url}/readyz").status_code == 503, 5)
        began = time.monotonic()
        process.terminate()
        assert ended(process)[0] == 128 + signal.SIGTERM
        assert time.monotonic() - began < 3
        thread.join()


def damaged_tiffs():
    """Such as libtiff warns about."""
    made = []
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        picture = Image.effect_noise((64, 64), 50)
        made.append(bytearray(encoded(picture, "TIFF", compression=compression)))
        made[-1][2000:2400] = bytes(400)
    return [bytes(one) for one in made]


def test_a_process_s_token_log_and_warning(package, pictures, monkeypatch):
    monkeypatch.setenv("DYNASLIM_TOKEN", "from the environment")
    with running(package, "--access-log") as (process, url):
        files = [("images", pictures[0])] * 2
        assert httpx.post(f"{url}/v1/predict", files=files).status_code == 401
        headers = {"authorization": "Bearer from the environment"}
        for content in damaged_tiffs():
            damaged = [("images", content)]
            httpx.post(f"{url}/v1/predict", files=damaged, headers=headers)
        good = httpx.post(f"{url}/v1/predict", files=files, headers=headers)
        assert good.status_code == 200
        process.terminate()
        returned, _, err = ended(process)
    *lines, line = map(json.loads, err.splitlines())
    assert len(lines) == len(damaged_tiffs()), "a line for each, and none of a library"
    assert returned == 0
    assert (line["method"], line["path"], line["status"], line["images"]) == (
        "POST", "/v1/predict", 200, 2,
    )  # fmt: skip
    assert "environment" not in err
    monkeypatch.delenv("DYNASLIM_TOKEN")
    with running(package, "--host", "0.0.0.0") as (process, url):
        process.terminate()
        _, _, err = ended(process)
    assert err == f"dynaslim: warning: whoever reaches {url}/ can use it; set DYNASLIM_TOKEN\n"


# -- one line for each mistake --------------------------------------------------------------------


def test_mistakes(package, plain_package, tmp_path, capsys, monkeypatch):
    def refused(code, message, *argv):
        fails(capsys, ["serve", *argv], code, message)

    port = free_port()
    with server.bind("127.0.0.1", port) as taken:
        taken.listen()
        refused(1, f"port {port} of 127.0.0.1: is in use", package, "--port", port)
    (tmp_path / "manifest.json").write_text("{")
    refused(1, "not JSON", tmp_path, "--port", 0)
    for message, *argv in (
        ("--port 70000", package, "--port", 70_000),
        ("--host no.such.host.invalid", package, "--host", "no.such.host.invalid"),
        ("--max-batch 0", package, "--max-batch", 0),
        ("--drain-s -1", package, "--drain-s", -1),
        ("--workers 0", package, "--workers", 0),
        ("backend 'abacus': choose from", package, "--port", 0, "--backend", "abacus"),
        ("has no budget curve", plain_package, "--port", 0, "--adaptive-budget", 0.5),
    ):
        refused(2, message, *argv)
    monkeypatch.setattr(server, "installed", lambda library: library != "uvicorn")
    refused(2, "uvicorn not installed: pip install 'dynaslim[serve]'", package, "--port", 0)


def test_a_model_that_does_not_start(package, capsys, monkeypatch):
    from dynaslim.runtime.engine import Engine

    def broken(self, *_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Engine, "warm_up", broken)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    argv = ["serve", package, "--port", 0, "--backend", "onnxruntime"]
    fails(capsys, argv, 1, "dynaslim: the model does not start: no such kernel\n")
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
