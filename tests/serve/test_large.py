"""Large pictures beside others: who waits for whom, how much memory they take, and what stops."""

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers import encoded, run_python, running, until
from PIL import Image

from dynaslim.data.decode import decode_image
from dynaslim.predict import predict
from dynaslim.preprocessing import Preprocessing
from dynaslim.serve import ServeOptions, create_app, decoding
from dynaslim.serve.decoding import (
    LARGE,
    Decoder,
    DecodingCost,
    DecodingPool,
    DecodingTask,
    ImageError,
)

WIDTH, HEIGHT = 16_383, 3_000
PRE = Preprocessing(16)
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def huge(mode, kind, width=WIDTH, height=HEIGHT, **options):
    """A file of few bytes that takes many to decode."""
    return encoded(Image.new(mode, (width, height)), kind, **options)


@pytest.fixture
def pictures_of():
    """`pictures_of(memory)` -> a maker of processes that decode, closed at the end."""
    made = []

    def start(memory=10**9, processes=1):
        made.append(DecodingPool(memory, processes))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def processes(monkeypatch):
    """Those that were started."""
    made, popen = [], subprocess.Popen

    def start(*given, **named):
        made.append(popen(*given, **named))
        return made[-1]

    monkeypatch.setattr(decoding.subprocess, "Popen", start)
    return made


LITTLE = DecodingCost(1, 0)


def decoded(pictures, content, cost=LITTLE):
    """What comes of a picture."""
    done, results = threading.Event(), []
    pictures.put(
        DecodingTask(
            cost, content, PRE, lambda: True, lambda one: (results.append(one), done.set())
        )
    )
    assert done.wait(30)
    return results[0]


# -- what it takes --------------------------------------------------------------------------------

FILES = {
    "png": lambda w, h: huge("RGB", "PNG", w, h),
    "transparent png": lambda w, h: huge("RGBA", "PNG", w, h),
    "one bit png": lambda w, h: huge("1", "PNG", w, h),
    "sixteen bit png": lambda w, h: encoded(Image.new("I;16", (w, h)), "PNG"),
    "gif": lambda w, h: huge("P", "GIF", w, h),
    "jpeg": lambda w, h: huge("RGB", "JPEG", w, h),
    "progressive jpeg": lambda w, h: huge("RGB", "JPEG", w, h, progressive=True, subsampling=0),
    "webp": lambda w, h: huge("RGBA", "WEBP", w, h, lossless=True, quality=0, method=0),
    "tiff": lambda w, h: huge("RGB", "TIFF", w, h, compression="tiff_lzw"),
    "cmyk tiff": lambda w, h: huge("CMYK", "TIFF", w, h, compression="tiff_lzw"),
    "float tiff": lambda w, h: huge("F", "TIFF", w, h, compression="tiff_lzw"),
}  # fmt: skip

PEAK = """
import sys
from dynaslim.data.decode import decode_image
from dynaslim.preprocessing import Preprocessing
def status(name):
    line = next(one for one in open("/proc/self/status") if one.startswith(name))
    return int(line.split()[1]) * 1024
content, small = open(sys.argv[1], "rb").read(), open(sys.argv[2], "rb").read()
decode_image(small, Preprocessing(16), "x")
before = status("VmRSS")
decode_image(content, Preprocessing(16), "x")
print(status("VmHWM") - before)
"""


@linux
@pytest.mark.parametrize("name", FILES)
def test_memory_is_reckoned_as_what_it_takes_at_most(name, tmp_path):
    content = FILES[name](4000, 2500)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "small").write_bytes(FILES[name](8, 8))
    cost = Decoder(PRE, 50_000_000).cost(content)
    assert cost.work >= 10_000_000
    files = [str(tmp_path / "file"), str(tmp_path / "small")]
    peak = int(run_python(PEAK, *files).stdout)
    assert peak <= cost.memory + 4_000_000  # what Pillow takes for any picture


def test_what_takes_more_memory_than_there_is():
    decoder = Decoder(PRE, WIDTH * HEIGHT)
    assert decoder.cost(huge("RGB", "PNG")).memory <= decoder.memory
    with pytest.raises(
        ImageError, match=r"more than 344 MB; of such a WEBP at most about 20\d{6} "
    ) as e:
        decoder.cost(FILES["webp"](WIDTH, HEIGHT))
    assert e.value.code == "too_many_pixels"


def test_what_is_large():
    decoder = Decoder(PRE, 50_000_000)
    rough = Image.effect_noise((900, 900), 50)
    scans = encoded(rough, "JPEG", progressive=True)
    start = scans.rindex(b"\xff\xda")
    many = scans[:start] + scans[start:-2] * 60 + scans[-2:]
    assert not decoder.cost(encoded(rough, "PNG")).large
    assert not decoder.cost(scans).large
    assert decoder.cost(many).large, "each scan takes its time"
    assert decoder.cost(encoded(rough, "WEBP")).large, "Python's lock is kept all the time"
    assert decoder.cost(huge("1", "PNG", 1001, 1000)).work > LARGE


# -- in a process of its own ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_a_large_picture_is_answered_as_predict_does(serve, engine, kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise).resize((1400, 1050)), kind[0], **kind[1])
    (tmp_path / "file").write_bytes(content)
    (row,) = predict(engine, [tmp_path / "file"])
    with serve(deadline_ms=60_000) as client:
        assert client.app.state.service.models["micro"].decoder.cost(content).large
        answer = client.post("/v1/predict", files=[("images", content)] * 2)
        cut = client.post("/v1/predict", files=[("images", content[:-3000])])
    assert answer.status_code == 200, answer.text
    for result in answer.json()["results"]:
        assert result["top"][0]["index"] == row.label
        assert result["top"][0]["probability"] == pytest.approx(row.confidence, abs=1e-5)
        assert result["route"] == row.route
    assert (cut.status_code, cut.json()["error"]["code"]) == (400, "image_unreadable")


@linux
def test_a_process_keeps_to_its_memory(pictures_of, processes):
    """Also where it was reckoned wrongly."""
    pictures = pictures_of()
    content = huge("RGB", "PNG", 4000, 5000)
    failed = decoded(pictures, content, DecodingCost(1, 0))
    assert (failed.code, "more than 1000 MB" in str(failed)) == ("too_many_pixels", True)
    fine = decoded(pictures, content, DecodingCost(1, 10**9))
    assert np.array_equal(fine, decode_image(content, PRE, "x"))
    assert len(processes) == 2, "another one, since the first had no memory left"


def test_a_process_that_dies_fails_its_picture_alone(pictures_of, processes):
    pictures = pictures_of()
    small = encoded(Image.new("RGB", (20, 20)), "PNG")
    assert isinstance(decoded(pictures, small), np.ndarray)
    with ThreadPoolExecutor(1) as pool:
        dying = pool.submit(decoded, pictures, huge("RGB", "PNG"), DecodingCost(1, 10**9))
        until(lambda: pictures._free < 10**9 and not pictures._tasks)  # the process has it
        processes[0].kill()
        assert isinstance(dying.result(), ImageError)
    assert isinstance(decoded(pictures, small), np.ndarray)


def test_the_smallest_that_there_is_memory_for_comes_first(pictures_of):
    pictures, order, done = pictures_of(memory=100), [], threading.Event()
    small = encoded(Image.new("RGB", (20, 20)), "PNG")
    gate = threading.Event()

    def put(name, work, memory, deliver=order.append):
        cost = DecodingCost(work, memory)
        pictures.put(DecodingTask(cost, small, PRE, lambda: True, lambda _: deliver(name)))

    put("first", 1, 60, lambda name: (gate.wait(20), order.append(name)))
    time.sleep(0.05)
    put("dear", 9, 60, lambda name: (order.append(name), done.set()))
    put("cheap", 2, 60)
    put("cheaper", 1, 60)
    gate.set()
    assert done.wait(30)
    assert order == ["first", "cheaper", "cheap", "dear"]


def test_who_is_not_waited_for_any_more_is_not_decoded(serve, processes):
    """Neither what is being decoded, nor what waits for it."""
    content = huge("RGBA", "PNG", 7000, 7000)
    with serve(decoders=1, deadline_ms=60_000) as client:
        service = client.app.state.service
        files = [("images", content)] * 3
        answer = client.post("/v1/predict?deadline_ms=300", files=files)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        until(lambda: len(processes) == 1 and processes[0].poll() is not None, 5)
        until(lambda: not service.large._tasks and service.large._free == service.large._memory, 5)
        assert service.models["micro"].batcher.waiting == 0
        assert len(processes) == 1, "the others were not begun"


def test_memory_goes_back(pictures_of, processes, monkeypatch):
    monkeypatch.setattr(decoding, "IDLE_S", 0.1)
    pictures = pictures_of()
    content = encoded(Image.new("RGB", (20, 20)), "PNG")
    for turn in (1, 2):
        assert isinstance(decoded(pictures, content), np.ndarray)
        until(lambda: processes[-1].poll() is not None)
        assert len(processes) == turn


# -- beside other requests ------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    "make", [lambda: huge("RGB", "PNG"), lambda: FILES["webp"](5000, 4000)], ids=["png", "webp"]
)
def test_small_files_of_large_pictures_do_not_starve_others(package, pictures, make):
    """Four clients send nothing else for some seconds."""
    content = make()
    assert len(content) < 200_000
    with running(package, "--decoders", "1") as (process, url):

        def ordinary(seconds):
            """How long the answers take, the slowest twentieth left out, in order."""
            times = []
            with httpx.Client(timeout=20) as client:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    began = time.monotonic()
                    answer = client.post(f"{url}/v1/predict", files=[("images", pictures[0])])
                    assert answer.status_code == 200, answer.text
                    times.append(time.monotonic() - began)
                    time.sleep(0.01)
            return sorted(times)[: len(times) * 19 // 20]

        stopped, codes = threading.Event(), set()

        def hostile():
            with httpx.Client(timeout=20) as client:
                while not stopped.is_set():
                    answer = client.post(f"{url}/v1/predict", files=[("images", content)])
                    codes.add(answer.status_code)

        quiet, memory = ordinary(1)[-1], used(process)
        with ThreadPoolExecutor(5) as pool:
            clients = [pool.submit(hostile) for _ in range(4)]
            peak = pool.submit(highest, process, stopped)
            try:
                beside = ordinary(4)[-1]
            finally:
                stopped.set()
            for client in clients:
                client.result()
            assert codes <= {200, 429, 504}
            assert beside < max(10 * quiet, 0.5), "before, they waited for two seconds and got 504"
            assert peak.result() - memory < 450_000_000
        until(lambda: len(family(process)) == 1)
        assert used(process) - memory < 60_000_000


def family(process):
    """A process and its children."""
    own = f"/proc/{process.pid}"
    found = [own]
    for name in os.listdir(f"{own}/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            children = Path(own, "task", name, "children").read_text().split()
            found += [f"/proc/{pid}" for pid in children]
    return found


def used(process):
    """Bytes of memory of a process and its children, shared ones counted once."""
    total = 0
    for one in family(process):
        try:
            text = Path(one, "smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        found = re.search(r"Pss:\s+(\d+) kB", text)
        total += int(found[1]) * 1024 if found else 0
    return total


def highest(process, stopped):
    most = 0
    while not stopped.wait(0.02):
        most = max(most, used(process))
    return most


def test_large_pictures_have_half_of_the_queue(engine, live):
    """Others find room, however many there are."""
    app = create_app(engine, ServeOptions(queue=8, max_images=4, decoders=1, deadline_ms=60_000))
    app.state.service.large.close()  # so that they stay
    content, small = huge("1", "PNG", 2000, 2000), huge("1", "PNG", 20, 20)
    with live(app) as port, ThreadPoolExecutor(5) as pool:
        url = f"http://127.0.0.1:{port}/v1/predict"

        def post(content, count=1, query=""):
            return httpx.post(f"{url}{query}", files=[("images", content)] * count, timeout=20)

        waiting = pool.submit(post, content, 4, "?deadline_ms=3000")
        until(lambda: app.state.service.models["micro"].batcher.waiting == 4)
        refused = post(content)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "busy")
        assert post(small, 4).status_code == 200
        assert waiting.result().status_code == 504
        assert app.state.service.models["micro"].batcher.waiting == 0
