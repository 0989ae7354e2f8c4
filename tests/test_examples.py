"""The examples run as they are, on little data, and do what their first lines describe.

That of a package is in tests/runtime/test_package.py.
"""

import ast
import base64
import functools
import os
import re
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from convertible import trained
from docs_blocks import ROOT, run_script
from helpers import free_port, lively, micro_spec, write_levels

import dynaslim
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.zoo import get_spec

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


NEEDS = {"ray_serve": "ray.serve", "litserve_api": "litserve"}
"""Libraries without which an example is not run."""


def need(name):
    if name in NEEDS:
        reason = f"{NEEDS[name]} is not installed, or a part of it is missing"
        pytest.importorskip(NEEDS[name], reason=reason, exc_type=ImportError)


@pytest.fixture
def folder(tmp_path, monkeypatch, one_thread):
    """Pictures of four classes by brightness, in a folder for each class."""
    write_levels(tmp_path / "photos", 48)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_documents_its_use(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (50 if path.stem in NEEDS else 82)
    described = ast.get_docstring(ast.parse(text))
    assert re.search(rf"^    python examples/{path.name} \S", described, re.MULTILINE)
    assert f"## {path.stem}\n" in (ROOT / "docs" / "examples.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_without_arguments_shows_its_usage(path):
    need(path.stem)
    with pytest.raises(SystemExit, match=rf"usage: {path.name} "):
        run_script(f"examples/{path.name}", [])


def test_adapt_photos(tmp_path, monkeypatch, capsys, one_thread):
    """With a stand-in for timm, which gives a small network."""
    write_levels(tmp_path / "photos", 268)
    prepared = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.2,) * 3, "crop_pct": 1.0}
    timm = types.SimpleNamespace(
        create_model=lambda name, pretrained: trained(name),
        data=types.SimpleNamespace(resolve_model_data_config=lambda _: prepared),
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.chdir(tmp_path)
    short = functools.partial(dynaslim.adapt, val_share=0.4, batch_size=16, backend="eager")
    monkeypatch.setattr(dynaslim, "adapt", short)
    run_script("examples/adapt_photos.py", ["residual", "photos", "out", "0.05"])
    printed = capsys.readouterr().out
    assert "the original" in printed
    assert read("out").class_names == tuple(f"level {n}" for n in range(4))


def test_finetune_folder(folder, capsys):
    """From a network of ten classes to four others; stopped or not, the same line goes on."""
    start = lively(get_spec("ds_mbnet_tiny"), image_size=16)
    names = tuple(f"digit {n}" for n in range(10))
    save(folder / "start.safetensors", Checkpoint(start, names, Preprocessing(16)))
    argv = ["start.safetensors", "photos", "out", "1"]
    run_script("examples/finetune_folder.py", argv)
    printed = capsys.readouterr().out
    tuned = read("out/gate.safetensors")
    assert tuned.class_names == tuple(f"level {n}" for n in range(4))
    assert tuned.recipe["supernet"]["init"] == "start.safetensors"
    assert tuned.recipe["target"] == 0.6
    assert tuned.preprocessing == Preprocessing(16), "as the network was trained"
    assert str(start.spec.routes[0]) in printed
    assert re.search(r"every image its route +\d\.\d\d M +\d+\.\d%", printed)
    run_script("examples/finetune_folder.py", argv)
    assert capsys.readouterr().out == printed


def test_add_zoo_entry(folder, capsys):
    run_script("examples/add_zoo_entry.py", ["mine.yaml"])
    printed = capsys.readouterr().out
    spec = get_spec("mine.yaml")
    for route in spec.routing_space:
        assert f"{route} " in printed
        assert f"{dynaslim.madds(spec, route, 48) / 1e6:.2f} M" in printed
    seen = re.findall(r"(\w+) against static, (\d+) routes: (\S+) of", printed)
    assert [name for name, _, _ in seen] == ["masked", "routed"]
    assert all(int(routes) > 2 and float(error) < 1e-4 for _, routes, error in seen)
    assert dynaslim.create_model("mine.yaml").spec == spec


def _micro(folder):
    names = tuple(f"class {n}" for n in range(5))
    made = Checkpoint(lively(micro_spec()), names, Preprocessing(16))
    return save(folder / "micro.safetensors", made)


@pytest.fixture
def classifier(folder, monkeypatch):
    """The example's class on a small network, its engine's calls written down."""
    path = _micro(folder)
    calls = []
    real = Engine.__call__

    def call(self, x, **options):
        calls.append((len(x), options))
        return real(self, x, **options)

    monkeypatch.setattr(Engine, "__call__", call)
    return path, calls


def test_embed_engine(folder, classifier, capsys):
    path, calls = classifier
    files = sorted(map(str, folder.glob("photos/*/*.png")))
    run_script("examples/embed_engine.py", [str(path), *files])
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(printed) == files
    engine = Engine.from_checkpoint(path, backend="eager")
    for file, answer in printed.items():
        (row,) = dynaslim.predict.predict(engine, [file])
        assert answer == f"{row.class_name}  {row.route}", "as one image at a time"
    assert sum(rows for rows, _ in calls) >= len(files) * 2
    assert max(rows for rows, _ in calls) <= 32


def test_embed_engine_when_it_is_busy_and_when_it_fails(folder, classifier):
    """More waiting than a batch holds: cheaper gates. An error reaches all callers."""
    from runpy import run_path

    path, calls = classifier
    kind = run_path(str(ROOT / "examples" / "embed_engine.py"))["Classifier"]
    example = kind(str(path), most=4)
    picture = next(folder.glob("photos/*/*.png")).read_bytes()
    assert example.classify(picture, "one")[0].startswith("class")
    assert calls[-1] == (1, {"shift": 0.0})
    example._queue.qsize = lambda: 5
    example.classify(picture, "busy")
    assert calls[-1] == (1, {"shift": 1.0})
    example.engine = lambda *_, **__: 1 / 0
    example.engine.preprocessing = Preprocessing(16)
    with pytest.raises(ZeroDivisionError):
        example.classify(picture, "two")
    with pytest.raises(ValueError, match="three: not an image"):
        example.classify(b"no picture", "three")


# -- inside other servers -------------------------------------------------------------------------

RAY = """
import os, runpy, sys
import ray
from ray import serve

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
         log_to_driver=False, logging_level="ERROR")
script, port, model, *images = sys.argv[1:]
for argv in ([script, model, *images], [script, model]):
    serve.start(http_options={"port": int(port)})
    sys.argv = argv
    runpy.run_path(script, run_name="__main__")
    print("has shut down", flush=True)
"""


@contextmanager
def process(*command, **env):
    """A process with a group of its own, which ends with the test."""
    made = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )  # fmt: skip
    try:
        yield made
    finally:
        with suppress(ProcessLookupError):
            os.killpg(made.pid, signal.SIGINT)
        try:
            made.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(made.pid, signal.SIGKILL)
            made.communicate()


def first_answer(made, url, **request):
    """The answer to a request as soon as the server takes it."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert made.poll() is None, made.stderr.read()
        with suppress(httpx.TransportError):
            answer = httpx.post(url, timeout=30, **request)
            if answer.status_code != 404:  # the application is not there yet
                return answer
        time.sleep(0.2)
    pytest.fail("the server did not start")


@pytest.fixture
def predicted(folder):
    """A model, pictures, and what `predict` answers."""
    path = _micro(folder)
    files = sorted(map(str, folder.glob("photos/*/*.png")))[::6]
    engine = Engine.from_checkpoint(path, backend="eager")
    rows = list(dynaslim.predict.predict(engine, files))
    return str(path), files, [(r.label, r.route, r.madds) for r in rows]


def short(answer):
    return answer["top"][0][0], answer["route"], answer["madds"]


def test_ray_serve(predicted):
    need("ray_serve")
    model, files, expected = predicted
    script, port = str(ROOT / "examples" / "ray_serve.py"), free_port()
    with process("-c", RAY, script, str(port), model, *files, RAY_USAGE_STATS_ENABLED="0") as made:
        printed = [ast.literal_eval(made.stdout.readline()) for _ in files]
        # until then the first server may take a request on the port of the second
        assert "has shut down\n" in made.stdout  # behind lines of Ray's own
        url = f"http://127.0.0.1:{port}/"
        first = first_answer(made, url, content=Path(files[0]).read_bytes())
        with ThreadPoolExecutor(8) as pool:
            posts = [pool.submit(httpx.post, url, content=Path(f).read_bytes()) for f in files]
            answers = [one.result().json() for one in posts]
        wrong = httpx.post(url, content=b"no picture")
        budget = httpx.post(f"{url}?budget=0.5", content=Path(files[0]).read_bytes())
    for found in (printed, answers):
        assert [short(answer) for answer in found] == expected
    assert short(first.json()) == expected[0]
    assert (wrong.status_code, budget.status_code) == (400, 400)
    assert "not an image" in wrong.json()["error"]
    assert "no budget curve" in budget.json()["error"]


def test_litserve(predicted):
    need("litserve_api")
    model, files, expected = predicted
    script, port = str(ROOT / "examples" / "litserve_api.py"), free_port()
    url = f"http://127.0.0.1:{port}/predict"
    sent = [{"image": base64.b64encode(Path(f).read_bytes()).decode()} for f in files]
    with process(script, model, str(port)) as made:
        first = first_answer(made, url, json=sent[0])
        with ThreadPoolExecutor(8) as pool:
            answers = [one.json() for one in pool.map(lambda s: httpx.post(url, json=s), sent)]
        wrong = [
            httpx.post(url, json=one).status_code
            for one in ({}, {"image": "AAAA"}, {"image": 3}, {**sent[0], "budget": 0.5})
        ]
    assert [short(answer) for answer in answers] == expected
    assert short(first.json()) == expected[0]
    assert wrong == [400] * 4
