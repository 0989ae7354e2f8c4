import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import encoded, free_port, lively, micro_spec, start_dynaslim

from dynaslim import cli, predict_ray
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.errors import CheckpointError, DataError, UsageError
from dynaslim.predict import Prediction, Unreadable, open_engine, predict
from dynaslim.predict_ray import MOST_PIECES, PIECE_BATCHES, cut
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.export import export_package

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """Two workers on this machine."""
    before = dict(os.environ)
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal")
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # engines of this file go to the workers whole: they cannot import it
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images of rising brightness and roughness, three of them damaged, and a checkpoint."""
    folder = tmp_path_factory.mktemp("ray")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for n in range(40):
        pixels = np.clip(n * 5 + rng.normal(0, n % 7 * 6 + 1, (16, 16, 3)), 0, 255)
        picture = encoded(pixels.astype(np.uint8))
        content = {3: b"", 17: b"words", 38: picture[:200]}.get(n, picture)
        (folder / "images" / f"{n:02}.png").write_bytes(content)
    net = lively(micro_spec(), image_size=16)
    checkpoint = Checkpoint(net, tuple("abcde"), Preprocessing(16, std=(0.02,) * 3))
    save(folder / "micro.safetensors", checkpoint)
    return folder


class Steps:
    """A quick engine without torch: ten steps of brightness; `trouble` is called first."""

    preprocessing = Preprocessing(16)
    class_names = None

    def __init__(self, trouble, log):
        self.trouble, self.log = trouble, log

    def __call__(self, x, *, budget=None):
        level = np.clip((x.mean((1, 2, 3)) + 2) * 2, 0, 9).astype(int)
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()}\n")
        self.trouble(level, budget)
        return SimpleNamespace(
            logits=np.eye(10)[level],
            routes=level[:, None] % 3,
            madds=level * 1e3 + 1,
            escalated=level > 5,
            mirrored=level > 7,
        )

    def route_of(self, row):
        return f"4-{row[0]}"


def _no_trouble(level, budget):
    time.sleep(0.05)


def _steps(folder, tmp_path, trouble, **options):
    """Rows by the cluster, of an engine that is in trouble, and the processes it ran in."""
    files = sorted((folder / "images").iterdir())
    log = tmp_path / "pids"
    made = predict_ray.predict_ray(
        "no model",
        files,
        batch_size=2,
        workers=2,
        make_engine=lambda: Steps(trouble, log),
        **options,
    )
    rows = list(made)
    return rows, log.read_text().split()


def _steps_here(folder, tmp_path):
    files = sorted((folder / "images").iterdir())
    return list(predict(Steps(_no_trouble, tmp_path / "here"), files, batch_size=2))


def _same(rows, expected):
    """As many, in the same order, with the same words; confidence to 1e-5."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert type(row) is type(other)
        if isinstance(row, Unreadable):
            assert row == other
            continue
        assert row.confidence == pytest.approx(other.confidence, abs=1e-5)
        one, two = row.to_dict(), other.to_dict()
        del one["confidence"], two["confidence"]
        assert one == two


@pytest.mark.parametrize(
    ("model", "backend"), [("micro.safetensors", "eager"), ("package", "onnxruntime")]
)
def test_rows_are_those_of_one_process(cluster, folder, monkeypatch, model, backend):
    """Under the names given, which are not paths for a worker; of a checkpoint and a package."""
    if backend != "eager":
        pytest.importorskip(backend)
    monkeypatch.chdir(folder)
    files = [Path("images") / f"{n:02}.png" for n in range(40)] + [Path("images/gone.png")]
    if model == "package":
        export_package(read("micro.safetensors"), model)
    expected = list(predict(open_engine(model, backend), files, batch_size=3))
    made = predict_ray.predict_ray(model, files, backend=backend, batch_size=3, workers=2)
    rows = list(made)
    assert [row.file for row in rows] == list(map(str, files))
    assert sum(isinstance(row, Unreadable) for row in rows) == 4
    assert len({row.route for row in rows if isinstance(row, Prediction)}) > 2
    _same(rows, expected)


def test_a_worker_that_is_killed_loses_and_repeats_nothing(cluster, folder, tmp_path):
    """SIGKILL in the middle of a piece, of which a batch has been answered by then."""
    killed = tmp_path / "killed"
    calls = []

    def trouble(level, budget):
        time.sleep(0.05)
        calls.append(level)  # a list of each worker's own
        if len(calls) == 2:
            try:
                with open(killed, "x") as file:  # one worker, once
                    file.write(str(os.getpid()))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    rows, pids = _steps(folder, tmp_path, trouble)
    assert pids.count(killed.read_text()) == 2
    assert len(set(pids)) == 3  # two workers, and the one in the place of the dead one
    assert len(pids) == 22  # of 20 batches, two were run again: the answered one and the fatal one
    _same(rows, _steps_here(folder, tmp_path))


def test_what_kills_every_worker_ends_in_one_line(cluster, folder, tmp_path):
    def trouble(level, budget):
        if 5 in level:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        DataError, match=r"^a worker of the cluster died, and at 3 retries again: .+$"
    ):
        _steps(folder, tmp_path, trouble)


def test_what_an_engine_refuses_is_reported_as_here(cluster, folder, tmp_path):
    def trouble(level, budget):
        raise UsageError(f"budget {budget}: too small")

    with pytest.raises(UsageError, match=r"^budget 0.01: too small \(on .+\)$"):
        _steps(folder, tmp_path, trouble, budget="0.01")


def test_parts_and_json_on_the_command_line(cluster, folder, tmp_path, capsys, monkeypatch):
    """By a process of its own, which finds the cluster by its address."""
    out = tmp_path / "rows"
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    argv = ["predict", "micro.safetensors", "images", "--backend", "eager", "--batch-size", "4"]
    ray_argv = ["--engine", "ray", "--workers", "2", "--parquet", str(out)]
    process = start_dynaslim([*argv, *ray_argv, "--json"])
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 1, stderr  # some cannot be read
    assert "3 of 40 images could not be read" in stderr
    assert "Traceback" not in stderr
    data = json.loads(stdout)
    assert cli.run([*argv, "--json"]) == 1
    here = json.loads(capsys.readouterr().out)
    for result in (data, here):
        for row in result["images"]:
            row["confidence"] = round(row["confidence"], 4)
        for changing in ("seconds", "images_per_s", "engine"):
            del result[changing]
    assert data == here
    assert sorted(os.listdir(out)) == ["_summary.json", "part-00000.parquet"]
    table = pyarrow.parquet.read_table(out)
    assert [row["file"] for row in data["images"]] == table["file"].to_pylist()
    summary = json.loads((out / "_summary.json").read_text())
    assert summary["predicted"] + len(summary["unreadable"]) == 40
    assert summary["unreadable"] == data["unreadable"]


def test_a_cluster_for_one_call(folder, tmp_path):
    """Started and ended by the command; a worker killed from outside; only JSON on stdout."""
    many = tmp_path / "many"
    many.mkdir()
    for n in range(200):  # links, so that there is time to kill
        (many / f"{n:03}.png").symlink_to(folder / "images" / "05.png")
    argv = ["predict", str(folder / "micro.safetensors"), str(many), "--backend", "eager"]
    argv += ["--engine", "ray", "--workers", "2", "--batch-size", "1", "--json"]
    process = start_dynaslim(argv)
    victims = []

    def kill_one():
        while process.poll() is None and not victims:
            found = _workers_of(process.pid)
            if len(found) == 2:
                victims.append(found[0])
                os.kill(found[0], signal.SIGKILL)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    out, err = process.communicate(timeout=100)
    killer.join()
    assert process.returncode == 0, err
    assert victims, err
    assert [row["file"] for row in json.loads(out)["images"]] == sorted(map(str, many.iterdir()))
    assert "Traceback" not in err
    assert not _workers_of(process.pid)


def _workers_of(pid):
    """Processes below this one that run a worker's actor and have begun to work."""
    found = subprocess.run(
        ["ps", "-e", "-o", "pid=,sid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in found.stdout.splitlines()]
    children = {int(row[0]): int(row[2]) for row in rows}

    def below(one):
        while one in children:
            if one == pid:
                return True
            one = children[one]
        return False

    return [
        int(r[0]) for r in rows if "MapWorker" in r[3] and "submit" in r[3] and below(int(r[0]))
    ]


# -- without a cluster ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 100, 1001, 50_000])
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (8, 2), (64, 16)])
def test_pieces_are_whole_batches_and_hold_every_file_once(count, batch_size, workers):
    files = [f"{n}.png" for n in range(count)]
    pieces = cut(files, batch_size, workers)
    assert [file for piece in pieces for file in piece["files"]] == [
        os.fsencode(os.path.abspath(file)) for file in files
    ]
    sizes = [len(piece["files"]) for piece in pieces]
    assert all(piece["first"] == sum(sizes[:n]) for n, piece in enumerate(pieces[:50]))
    assert all(size % batch_size == 0 for size in sizes[:-1])
    assert len(set(sizes[:-1])) <= 1
    assert len(pieces) <= MOST_PIECES
    batches = -(-count // batch_size)
    assert len(pieces) >= min(batches, 2 * workers)
    if batches <= MOST_PIECES * PIECE_BATCHES and sizes:
        assert sizes[0] <= PIECE_BATCHES * batch_size


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 2], "row 2 came from the cluster for row 1"),
        ([0, 1, 1], "row 1 came from the cluster for row 2"),
        ([0, 1], "2 rows came from the cluster for 3 files"),
    ],
)
def test_rows_that_are_lost_or_repeated_are_found_out(numbers, message):
    rows = pickle.dumps([Unreadable("a", "is empty")])
    table = pa.Table.from_pylist([{"first": number, "rows": rows} for number in numbers])
    answer = SimpleNamespace(iter_batches=lambda **options: iter([table]))
    with pytest.raises(RuntimeError, match=message):
        list(predict_ray._in_order(answer, ["a", "b", "c"]))


def test_nobody_answers_at_the_address(folder, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray would try for minutes"))
    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        rows = predict_ray.predict_ray(
            folder / "micro.safetensors", [folder / "images" / "00.png"], backend="eager"
        )
        with pytest.raises(DataError, match=f"RAY_ADDRESS {address}: no Ray cluster answers"):
            next(rows)


def test_models_are_looked_at_before_a_cluster_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"no.safetensors: no such file"):
        predict_ray.predict_ray(tmp_path / "no.safetensors", ["x.png"])
    with pytest.raises(UsageError, match="workers 0"):
        predict_ray.predict_ray(tmp_path / "no.safetensors", ["x.png"], workers=0)


def test_without_ray_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"^ray is not installed .+: pip install ray"):
        predict_ray.predict_ray(tmp_path / "no.safetensors", ["x.png"])
