import json
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import encoded, fails, lively, micro_spec, output_of, png
from PIL import Image

from dynaslim import cli, predict_tables
from dynaslim import predict as rooms
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cost import CostTable
from dynaslim.data.decode import decode_image
from dynaslim.data.transforms import normalise
from dynaslim.errors import DataError, UsageError
from dynaslim.predict import (
    AHEAD,
    Prediction,
    Summary,
    Unreadable,
    find_images,
    name_of,
    open_engine,
    predict,
)
from dynaslim.predict_tables import ParquetFile, ParquetParts
from dynaslim.preprocessing import Preprocessing, normalise_pixels
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.export import export_package
from dynaslim.runtime.spending import Ledger
from dynaslim.spec import Route

CLASSES = ("dark", "dim", "fair", "bright")
COLUMNS = [
    "file", "class", "class_name", "confidence", "route", "madds", "escalated", "mirrored"
]  # fmt: skip


class FakeEngine:
    """Tells brightness in four steps and routes the brighter half wider; keeps what it is given."""

    preprocessing = Preprocessing(8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    class_names = CLASSES
    curve = None

    def __init__(self):
        self.batches, self.budgets, self.named, self.holds = [], [], [], []

    def __call__(self, x, *, budget=None, hold=False):
        self.batches.append(x)
        self.budgets.append(budget)
        self.holds.append(hold)
        level = np.clip((x.mean((1, 2, 3)) + 2).astype(int), 0, 3)
        wide = level // 2
        return output_of(
            np.eye(4, dtype=np.float32)[level] * 3,
            routes=wide[:, None],
            madds=1e6 * (1.0 + wide),
            escalated=level >= 2,
            mirrored=level == 3,
        )

    def route_of(self, row):
        self.named.append(tuple(row))
        return Route((4, 8 + 4 * int(row[0])))


def grey(level, size=8):
    """A PNG of one shade, 0..255."""
    return encoded(Image.new("RGB", (size, size), (level,) * 3))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def shades(tmp_path):
    """Eight images, two of each class in turn."""
    return [write(tmp_path / "shades" / f"{n}.png", grey(n * 34)) for n in range(8)]


@pytest.fixture
def micro(tmp_path):
    """A checkpoint of five named classes."""
    checkpoint = Checkpoint(
        lively(micro_spec(), image_size=16), tuple("abcde"), Preprocessing(16, std=(0.02,) * 3)
    )
    return save(tmp_path / "micro.safetensors", checkpoint)


# -- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preprocessing", [Preprocessing(9), Preprocessing(9, (0.3,), (0.7,))])
def test_numpy_normalises_as_torch_does(preprocessing):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, preprocessing.channels, 9, 9), dtype=np.uint8)
    before = pixels.copy()
    x = normalise_pixels(pixels, preprocessing)
    assert x.dtype == np.float32
    assert np.array_equal(x, normalise(torch.from_numpy(pixels), preprocessing).numpy())
    assert np.array_equal(pixels, before)


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder of images, deep and mixed; the working folder is above it."""
    for name in ("b.png", "a/z.JPG", "a/deep/y.webp", "a.png", "c[1].png", "notes.txt", "d.bin"):
        write(tmp_path / "tree" / name, b"x")
    (tmp_path / "tree" / "gone.png").symlink_to("nowhere")
    (tmp_path / "tree" / "loop").symlink_to(tmp_path / "tree")
    (tmp_path / "tree" / "round.png").symlink_to("round.png")
    (tmp_path / "tree" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "tree" / "pipe.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tree"


IN_TREE = ["a/deep/y.webp", "a/z.JPG", "a.png", "b.png", "c[1].png", "gone.png", "round.png"]


def _found(*paths):
    return [os.path.relpath(file, "tree") for file in find_images(paths)]


def test_a_folder_is_its_images_sorted(tree):
    assert _found("tree") == IN_TREE
    assert _found(tree / "a") == IN_TREE[:2]
    assert [str(file) for file in find_images(["tree/a"])] == ["tree/a/deep/y.webp", "tree/a/z.JPG"]
    # a file is taken whatever it is called, and once, where it was named first
    odd = ["d.bin", "c[1].png", "gone.png"]
    assert _found(*(f"tree/{name}" for name in odd)) == odd
    named = ["tree/b.png", "tree", "./tree//b.png", tree / "a.png", "tree/a/../b.png"]
    assert _found(*named) == ["b.png", *(file for file in IN_TREE if file != "b.png")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("tree/?.png", ["a.png", "b.png"]),
        ("tree/*.png", ["a.png", "b.png", "c[1].png"]),
        ("tree/*/*.JPG", ["a/z.JPG"]),
        ("tree/a*", ["a/deep/y.webp", "a/z.JPG", "a.png"]),
        ("tree/**/*.webp", ["a/deep/y.webp"]),  # a link that leads back is not followed
        ("tree/**/deep", ["a/deep/y.webp"]),
        ("**/[yz].*", ["a/deep/y.webp", "a/z.JPG"]),
        ("tree/a/../b.*", ["b.png"]),
    ],
)
def test_patterns_that_the_shell_left_alone(tree, pattern, expected):
    found = _found(pattern)
    assert [file for file in found if file not in ("gone.png", "round.png")] == expected


def test_patterns_may_begin_at_the_root(tree):
    assert find_images([f"{tree}/**/y.*"]) == [tree / "a" / "deep" / "y.webp"]
    with pytest.raises(UsageError, match=r"tree/a\*\*: "):
        find_images(["tree/a**"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tree/no.png", "tree/no.png: no such file or folder"),
        ("", "'': no such file or folder"),
        ("tree/*.tiff", r"tree/\*.tiff: matches no image \(.bmp, .gif"),
        ("tree/*.txt", r"tree/\*.txt: matches no image"),
        ("empty", "empty: holds no images"),
    ],
)
def test_paths_that_lead_to_no_image(tree, path, message):
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=message):
        find_images(["tree/b.png", path])


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        find_images(["tree"])


# -- rows -----------------------------------------------------------------------------------------


def test_rows_have_the_answers_of_the_engine(shades):
    engine = FakeEngine()
    rows = list(predict(engine, shades, batch_size=3, budget="4.5ms", workers=2))
    assert [row.file for row in rows] == [str(file) for file in shades]
    assert [row.class_name for row in rows] == [CLASSES[row.label] for row in rows]
    assert [row.label for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [row.route for row in rows] == ["4-8"] * 4 + ["4-12"] * 4
    assert [row.madds for row in rows] == [1e6] * 4 + [2e6] * 4
    assert [row.escalated for row in rows] == [False] * 4 + [True] * 4
    assert [row.mirrored for row in rows] == [False] * 6 + [True] * 2
    assert rows[0].confidence == pytest.approx(np.exp(3) / (np.exp(3) + 3))
    assert engine.budgets == ["4.5ms"] * 3
    assert len(engine.named) == 2  # once for each route
    assert list(rows[0].to_dict()) == COLUMNS


def test_rows_are_those_of_a_real_engine(micro, tmp_path):
    files = [write(tmp_path / f"{n}.png", grey(n * 8)) for n in range(30)]
    engine = open_engine(micro, "eager")
    rows = list(predict(engine, files, batch_size=7))
    pixels = np.stack([decode_image(f.read_bytes(), engine.preprocessing, "") for f in files])
    with torch.no_grad():
        x = normalise(torch.from_numpy(pixels), engine.preprocessing)
        output = engine(x)
    probabilities = output.logits.softmax(1)
    assert [row.label for row in rows] == output.logits.argmax(1).tolist()
    assert [row.route for row in rows] == [str(engine.route_of(row)) for row in output.routes]
    assert [row.madds for row in rows] == output.madds.tolist()
    assert np.allclose([row.confidence for row in rows], probabilities.amax(1), atol=1e-6)
    assert len({row.route for row in rows}) > 1


def test_what_cannot_be_read_keeps_its_place_and_stops_nothing(shades, monkeypatch):
    damaged = {
        1: (b"", "is empty"),
        2: (png(9)[:300], "not an image that can be decoded (image file is truncated"),
        5: (b"words", "not an image that can be decoded (unknown format)"),
        7: (grey(1), "cannot be read: Permission denied"),
    }
    for n, (content, _) in damaged.items():
        shades[n].write_bytes(content)
    gone = shades[0].with_name("gone.png")
    read = Path.read_bytes

    def read_bytes(path):
        if path == shades[7]:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    engine = FakeEngine()
    rows = list(predict(engine, [*shades, gone], batch_size=4))
    assert [row.file for row in rows] == [str(file) for file in [*shades, gone]]
    for n, (_, reason) in damaged.items():
        assert isinstance(rows[n], Unreadable)
        assert rows[n].reason.startswith(reason)
    assert rows[8] == Unreadable(str(gone), "cannot be read: No such file or directory")
    assert [row.label for row in rows if isinstance(row, Prediction)] == [0, 1, 2, 3]
    # a batch is the files that stand together, fewer where some cannot be read
    assert [len(batch) for batch in engine.batches] == [2, 2]


def test_an_output_that_is_not_finite_is_refused(shades):
    class Broken(FakeEngine):
        def __call__(self, x, *, budget=None):
            output = super().__call__(x, budget=budget)
            output.logits[3, 1] = np.nan
            return output

    with pytest.raises(DataError, match=r"3.png: the network's output for it is not finite"):
        next(predict(Broken(), shades))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": 0}])
def test_numbers_are_checked_at_once(wrong):
    with pytest.raises(UsageError, match=r"0: must be at least 1"):
        predict(FakeEngine(), [], **wrong)


def test_an_engine_must_have_a_preprocessing():
    engine = FakeEngine()
    engine.preprocessing = None
    with pytest.raises(UsageError, match="preprocessing"):
        predict(engine, [])


# -- in the background ----------------------------------------------------------------------------


def test_the_next_batch_is_decoded_while_the_engine_works(shades, monkeypatch):
    """Batch 2 begins to be decoded after the engine got batch 1, and before it is done with it."""
    decoding, real = threading.Event(), rooms.decode_image
    in_engine = threading.Event()

    def decode(content, preprocessing, where):
        if where == str(shades[6]):  # of the fourth batch: beyond what is looked ahead at first
            assert in_engine.wait(5)
            decoding.set()
        return real(content, preprocessing, where)

    class Waiting(FakeEngine):
        def __call__(self, x, *, budget=None):
            if len(self.batches) == 1:
                in_engine.set()
                assert decoding.wait(5), "nothing is decoded while the engine works"
            return super().__call__(x, budget=budget)

    monkeypatch.setattr(rooms, "decode_image", decode)
    assert len(list(predict(Waiting(), shades, batch_size=2, workers=1))) == 8


@pytest.mark.parametrize("batch_size", [1, 4])
def test_memory_does_not_grow_with_the_files(tmp_path, monkeypatch, batch_size):
    """Pictures alive: the batch in the engine, and what is looked ahead; then they are let go."""
    file = write(tmp_path / "x.png", grey(50))
    lock, real = threading.Lock(), rooms.decode_image
    alive = most = decoded = 0

    def decode(content, preprocessing, where):
        nonlocal alive, most, decoded
        pixels = real(content, preprocessing, where)
        with lock:
            alive, decoded = alive + 1, decoded + 1
            most = max(most, alive)
        weakref.finalize(pixels, gone)
        return pixels

    def gone():
        nonlocal alive
        with lock:
            alive -= 1

    class Slow(FakeEngine):
        def __call__(self, x, *, budget=None):
            time.sleep(0.01)  # those who decode could run far ahead
            self.batches.clear()
            return super().__call__(x, budget=budget)

    monkeypatch.setattr(rooms, "decode_image", decode)
    rows = predict(Slow(), [file] * 80, batch_size=batch_size, workers=4)
    assert sum(1 for _ in rows) == decoded == 80
    assert batch_size < most <= (AHEAD + 1) * batch_size
    assert alive == 0


def test_closing_early_stops_the_threads(shades, monkeypatch):
    real, decoded = rooms.decode_image, []

    def decode(content, preprocessing, where):
        decoded.append(where)
        return real(content, preprocessing, where)

    monkeypatch.setattr(rooms, "decode_image", decode)
    rows = predict(FakeEngine(), shades * 50, batch_size=2)
    next(rows)
    rows.close()
    assert len(decoded) <= (AHEAD + 1) * 2
    assert not [t for t in threading.enumerate() if t.name.startswith("dynaslim-decode")]


# -- models ---------------------------------------------------------------------------------------


def test_a_package_needs_neither_torch_nor_datasets(micro, tmp_path, capsys):
    """In a process where they cannot be imported, the answers are those of the checkpoint."""
    pytest.importorskip("onnxruntime")
    for n in range(60):  # more than are shown one by one
        write(tmp_path / "images" / f"{n:02}.png", grey(n * 4))
    (tmp_path / "images" / "30.png").write_bytes(b"x")
    export_package(read(micro), tmp_path / "package")
    argv = ["predict", str(tmp_path / "package"), str(tmp_path / "images"), "--json"]
    argv += ["--backend", "onnxruntime", "--parquet", str(tmp_path / "out.parquet")]
    script = (
        "import sys\n"
        "for name in ('torch', 'datasets', 'huggingface_hub', 'kornia'): sys.modules[name] = None\n"
        f"from dynaslim import cli; sys.exit(cli.run({argv}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)["images"]
    code, out, _ = _run(capsys, micro, tmp_path / "images", "--json", "--backend", "eager")
    expected = json.loads(out)["images"]
    assert code == 1
    assert len(rows) == 59
    assert [row.pop("confidence") for row in rows] == pytest.approx(
        [row.pop("confidence") for row in expected], abs=1e-4
    )
    assert rows == expected
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == 59


# -- tables ---------------------------------------------------------------------------------------


def _prediction(n):
    return Prediction(f"{n}.png", n % 4, CLASSES[n % 4], 0.5, "4-8", 1e6 + n)


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(ParquetFile, "GROUP_ROWS", 10)
    target = tmp_path / "sub" / "out.parquet"
    with ParquetFile(target) as table:
        for n in range(25):
            table.add(_prediction(n))
        assert not target.exists()
        table.commit({})
    assert pyarrow.parquet.read_metadata(target).num_row_groups == 3
    rows = pyarrow.parquet.read_table(target)
    assert rows.column_names == COLUMNS
    assert rows["madds"].to_pylist() == [1e6 + n for n in range(25)]
    before = target.read_bytes()

    def interrupted():
        with ParquetFile(target) as table:
            for n in range(25):
                table.add(_prediction(n))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == before
    assert os.listdir(target.parent) == ["out.parquet"]


def test_a_table_without_rows_has_columns(tmp_path):
    for table in (ParquetFile(tmp_path / "a.parquet"), ParquetParts(tmp_path / "parts")):
        with table:
            table.commit({})
    for path in (tmp_path / "a.parquet", tmp_path / "parts"):
        assert pyarrow.parquet.read_table(path).column_names == COLUMNS


def test_parts_are_complete_with_their_summary(tmp_path):
    folder = tmp_path / "deep" / "parts"
    with ParquetParts(folder, part_rows=10) as table:
        for n in range(25):
            table.add(_prediction(n))
        assert sorted(os.listdir(folder)) == ["part-00000.parquet", "part-00001.parquet"]
        table.commit({"predicted": 25})
    names = [*(f"part-0000{n}.parquet" for n in range(3)), predict_tables.SUMMARY]
    assert sorted(os.listdir(folder)) == sorted(names)
    assert json.loads((folder / predict_tables.SUMMARY).read_text()) == {
        "predicted": 25,
        "parts": 3,
    }
    rows = pyarrow.parquet.read_table(folder).to_pylist()  # passes over the summary
    assert [row["file"] for row in rows] == [f"{n}.png" for n in range(25)]
    with pytest.raises(UsageError, match="parts: is not empty"):
        ParquetParts(folder)
    with pytest.raises(UsageError, match="is a file; name a folder"):
        ParquetParts(folder / names[0])


def test_totals_are_by_route(tmp_path):
    summary = Summary()
    assert summary.to_dict() == {"predicted": 0, "mean_madds": None, "routes": []}
    for row in (
        Prediction("a", 0, None, 0.5, "wide", 4e6),
        Prediction("b", 0, None, 0.5, "narrow", 1e6),
        Unreadable("c", "is empty"),
        Prediction("d", 0, None, 0.5, "narrow", 3e6),
        Prediction("e", 0, None, 0.5, "narrow", 2e6),
    ):
        summary.add(row)
    assert summary.unreadable == [Unreadable("c", "is empty")]
    assert summary.to_dict() == {
        "predicted": 4,
        "mean_madds": 2.5e6,
        "routes": [
            {"route": "narrow", "images": 3, "share": 0.75, "mean_madds": 2e6},
            {"route": "wide", "images": 1, "share": 0.25, "mean_madds": 4e6},
        ],
    }


# -- on the command line --------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """A fake engine in place of every model; `opened` are the arguments it was opened with."""
    engine = FakeEngine()
    engine.opened = []

    def opened(*args, **options):
        engine.opened.append((args, options))
        return engine

    monkeypatch.setattr(rooms, "open_engine", opened)
    monkeypatch.setattr("dynaslim.cli.predicting.find_model", lambda *_: None)
    return engine


def _run(capsys, *argv):
    code = cli.run(["predict", *map(str, argv)])
    return code, *capsys.readouterr()


def test_one_image(micro, shades, capsys):
    code, out, err = _run(capsys, micro, shades[0], "--backend", "eager")
    assert (code, err) == (0, "")
    row = next(predict(open_engine(micro, "eager"), shades[:1]))
    for text in (str(shades[0]), row.class_name, row.route, f"{row.confidence:.1%}", "1 image, "):
        assert text in out.replace("\n", "")


def _with_curve(engine):
    """Points of 1 M, 1.2 M and the widest's 2 M; the images of `shades` cost 1.5 M."""

    def point(madds, top1):
        return BudgetPoint(0.0, None, None, madds, madds / 2e6, None, top1, 0.0)

    points = (point(1e6, 0.7), point(1.2e6, 0.8), point(2e6, 0.9))
    engine.curve = BudgetCurve(8, 1000, 2e6, None, 0.9, 1e6, None, 0.7, points, points)


def test_costs_are_reported_beside_those_of_the_curve(fake, shades, capsys):
    _with_curve(fake)
    code, out, err = _run(capsys, "m", *shades, "--budget", "0.61")
    assert (code, err) == (0, "")
    line = "budget 0.61: 1.25 times the 1.20 M of the images that it was measured on"
    assert line in out.replace("\n", " ")
    assert "unlike" not in out
    bright = [write(shades[0].with_name(f"bright{n}.png"), grey(255)) for n in range(40)]
    code, out, err = _run(capsys, "m", *bright, "--budget", "0.61")
    assert "these are unlike them, and --hold would keep" in out.replace("\n", " ")
    assert "1.67 times" in out
    code, out, err = _run(capsys, "m", *bright, "--budget", "0.61", "--json")
    data = json.loads(out)
    assert (data["expected_madds"], data["unlike_curve"], data["hold"]) == (1.2e6, True, False)
    assert data["cost_ratio"] == pytest.approx(2 / 1.2)
    code, out, err = _run(capsys, "m", *shades, "--json")
    assert "cost_ratio" not in json.loads(out)


def test_budgets_out_of_reach_are_reported(fake, shades, capsys):
    _with_curve(fake)
    code, _, err = _run(capsys, "m", shades[0], "--budget", "0.3")
    assert code == 0
    assert err.splitlines() == [
        "budget 0.3: the curve reaches from 0.500 to 1 of the widest route's cost; its cheapest "
        "point is taken"
    ]
    code, _, err = _run(capsys, "m", shades[0], "--budget", "0.9")
    assert "budget 0.9: between 0.600 and 1 of the widest" in err
    assert _run(capsys, "m", shades[0], "--budget", "1")[2] == ""


def test_a_budget_is_held_over_all_files(fake, shades, capsys):
    _with_curve(fake)
    code, _, err = _run(capsys, "m", *shades, "--budget", "0.6", "--hold", "--batch-size", "3")
    assert (code, err) == (0, "")
    assert len(fake.holds) == 3
    assert len({id(hold) for hold in fake.holds}) == 1
    assert isinstance(fake.holds[0], Ledger)
    message = "--hold: give the budget that is to hold with --budget"
    fails(capsys, ["predict", "m", *shades, "--hold"], 2, message)
    with pytest.raises(UsageError, match="hold: give the budget"):
        predict(fake, shades, hold=True)


def test_a_held_budget_is_the_same_in_one_batch_or_many(micro, shades):
    """By a real engine: at no batch is the mean above the budget."""
    engine = open_engine(micro, "eager")
    table = CostTable.from_madds(engine.spec, engine.preprocessing.image_size_px)
    widest, cheapest = table.widest_cost, table.route_cost([0] * len(engine.spec.gates))
    share = 0.5 + 0.5 * cheapest / widest
    point = BudgetPoint(-1e6, None, None, share * widest, share, None, 0.9, 0.0)
    assert np.mean([r.madds for r in predict(engine, shades, budget=point)]) == widest
    for batch_size in (1, 3, 8):
        arguments = {"budget": point, "hold": True, "batch_size": batch_size}
        rows = [row.madds for row in predict(engine, shades, **arguments)]
        means = np.cumsum(rows) / np.arange(1, 9)
        assert means[batch_size - 1 :: batch_size].max() <= share * widest
        assert [row.madds for row in predict(engine, shades, **arguments)] == rows
        assert np.mean(rows) > cheapest


def test_json_is_one_object(fake, shades, capsys, monkeypatch):
    shades[2].write_bytes(b"x")
    code, out, err = _run(capsys, "m", *shades, "--json", "--budget", "0.6", "--batch-size", "3")
    assert code == 1
    data = json.loads(out)
    assert [row["class_name"] for row in data["images"]] == [
        CLASSES[n // 2] for n in range(8) if n != 2
    ]
    assert all(list(row) == COLUMNS for row in data["images"])
    reason = "not an image that can be decoded (unknown format)"
    assert data["unreadable"] == [{"file": str(shades[2]), "reason": reason}]
    assert (data["predicted"], data["model"], data["budget"]) == (7, "m", "0.6")
    assert [entry["images"] for entry in data["routes"]] == [3, 4]
    assert data["mean_madds"] == pytest.approx(11e6 / 7)
    assert data["images_per_s"] > 0
    assert err.splitlines() == [
        f"left out: {shades[2]}: {reason}",
        "dynaslim: 1 of 8 images could not be read",
    ]
    shades[3].write_bytes(b"")
    code, out, _ = _run(capsys, "m", *shades[2:4], "--json")
    assert code == 1
    assert json.loads(out)["images"] == []
    assert json.loads(out)["mean_madds"] is None
    code, out, _ = _run(capsys, "m", *shades[2:4])
    assert (code, out) == (1, "no image could be read\n")


def test_the_likeliest_classes(micro, shades, capsys, tmp_path):
    engine = open_engine(micro, "eager")
    alone = list(predict(engine, shades))
    for row, whole, three in zip(
        alone, predict(engine, shades, top_k=9), predict(engine, shades, top_k=3), strict=True
    ):
        assert row.top == ()
        assert sum(p for _, _, p in whole.top) == pytest.approx(1)
        assert {(n, name) for n, name, _ in whole.top} == set(enumerate(engine.class_names))
        assert whole.top[0] == (row.label, row.class_name, pytest.approx(row.confidence))
        assert [p for _, _, p in whole.top] == sorted((p for _, _, p in whole.top), reverse=True)
        assert [one[:2] for one in three.top] == [one[:2] for one in whole.top[:3]]
        odds = [p for _, _, p in whole.top[:3]]
        assert [p for _, _, p in three.top] == pytest.approx(odds, rel=1e-6)
    code, out, _ = _run(capsys, micro, shades[0], "--backend", "eager", "--top-k", "2", "--json")
    (image,) = json.loads(out)["images"]
    assert (code, list(image)) == (0, [*COLUMNS, "top"])
    (row,) = predict(engine, shades[:1], top_k=2)
    assert [one["class_name"] for one in image["top"]] == [name for _, name, _ in row.top]
    code, out, _ = _run(capsys, micro, shades[0], "--backend", "eager", "--top-k", "2")
    assert image["top"][1]["class_name"] in out
    assert f"{image['top'][1]['confidence']:.1%}" in out
    for flags in (("--top-k", "0"), ("--top-k", "2", "--parquet", tmp_path / "rows.parquet")):
        fails(capsys, ["predict", micro, shades[0], *flags], 2, f"--top-k {flags[1]}: ")


def test_json_stays_on_its_stream_beside_a_bar(fake, tmp_path, capsys, monkeypatch):
    """A bar on a terminal takes sys.stdout over, to print above itself."""
    for n in range(60):
        write(tmp_path / "many" / f"{n:02}.png", grey(n * 4))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = _run(capsys, "m", tmp_path / "many", "--json")
    assert code == 0
    assert json.loads(out)["predicted"] == 60
    assert "predicting" in err


def test_the_arguments_of_the_model(fake, shades, capsys):
    argv = ["m", shades[0], "--backend", "openvino", "--budget", "4.5ms", "--batch-size", "5"]
    assert _run(capsys, *argv)[0] == 0
    assert fake.budgets == ["4.5ms"]
    assert fake.opened == [(("m", "openvino"), {"batch_size": 5, "cache_dir": "auto"})]
    assert _run(capsys, "m", shades[0])[0] == 0
    assert fake.budgets[1:] == [None]


def test_few_images_have_lines_and_many_have_totals(fake, tmp_path, capsys):
    for n in range(60):
        write(tmp_path / "many" / f"shade [{n:02}].png", grey(n * 4))
    code, out, err = _run(capsys, "m", tmp_path / "many" / "*0[[]*.png")
    assert code == 2  # no such file: the pattern means something else
    code, out, err = _run(capsys, "m", tmp_path / "many" / "shade [[]0*.png")
    assert (code, err) == (0, "")
    assert all(f"[{n:02}].png" in out for n in range(10))  # no markup, and nothing cut off
    code, out, err = _run(capsys, "m", tmp_path / "many")
    assert code == 0
    assert "shade" not in out
    assert "60 images, 1.47 M MAdds on average" in out
    assert [line.split()[::3] for line in out.splitlines() if " M  " in line] == [
        ["4-8", "32"],
        ["4-12", "28"],
    ]


def test_parquet_has_a_row_for_every_image_that_was_read(fake, shades, tmp_path, capsys):
    shades[6].write_bytes(b"x")
    target = tmp_path / "out" / "rows.parquet"
    code, out, _ = _run(capsys, "m", shades[0].parent, "--parquet", target)
    assert code == 1
    assert out.splitlines()[-1] == f"{target}: 7 rows, one for each image predicted"
    rows = pyarrow.parquet.read_table(target).to_pylist()
    expected = [r.to_dict() for r in predict(FakeEngine(), shades) if isinstance(r, Prediction)]
    assert [row.pop("confidence") for row in rows] == pytest.approx(
        [row.pop("confidence") for row in expected]
    )
    assert rows == expected


def test_names_that_are_no_text(fake, tmp_path, capsys):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    write(Path(os.fsdecode(name)), grey(3))
    target = tmp_path / "rows.parquet"
    code, out, _ = _run(capsys, "m", tmp_path, "--json", "--parquet", target)
    assert code == 0
    expected = f"{tmp_path}/\\xff.png"
    assert name_of(os.fsdecode(name)) == expected
    assert json.loads(out)["images"][0]["file"] == expected
    assert pyarrow.parquet.read_table(target)["file"].to_pylist() == [expected]
    assert "\\xff.png" in _run(capsys, "m", tmp_path)[1]


def test_what_is_refused_before_any_work(fake, shades, tmp_path, capsys):
    def refused(message, *argv):
        fails(capsys, ["predict", "m", *argv], 2, message)

    one = shades[0]
    refused("nowhere.png: no such file or folder", one, "nowhere.png")
    refused("matches no image", tmp_path / "*.jpg")
    refused("is a folder; name a file to write", one, "--parquet", tmp_path)
    refused("--batch-size 0: must be between 1 and 65,536", one, "--batch-size", "0")
    refused("must be between 1 and 65,536", one, "--batch-size", 1 << 64)
    refused("--workers 0: must be at least 1", one, "--workers", "0")
    refused("is a file; name a folder", one, "--engine", "ray", "--parquet", shades[1])
    refused("is not empty", one, "--engine", "ray", "--parquet", one.parent)
    refused("rays", one, "--engine", "rays")
    refused("m")
    assert fake.opened == []
    assert fake.batches == []


def test_models_that_cannot_be_run(micro, shades, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    bare = save(tmp_path / "bare.safetensors", Checkpoint(lively(micro_spec())))
    for code, message, *argv in (
        (1, "no.safetensors: no such file", tmp_path / "no.safetensors"),
        (1, "is a folder without a checkpoint; ", tmp_path / "empty"),
        (1, "bare.safetensors: does not say how", bare, "--backend", "eager"),
        (2, "backend 'nonsense': choose from auto", micro, "--backend", "nonsense"),
        (2, "budget 'x'", micro, "--backend", "eager", "--budget", "x"),
    ):
        fails(capsys, ["predict", argv[0], shades[0], *argv[1:]], code, message)


def test_interrupted_in_the_middle(fake, shades, tmp_path, capsys, monkeypatch):
    def interrupted(x, budget):
        raise KeyboardInterrupt

    target = tmp_path / "out" / "rows.parquet"
    monkeypatch.setattr(FakeEngine, "__call__", lambda self, x, budget: interrupted(x, budget))
    code, out, err = _run(capsys, "m", *shades, "--json", "--parquet", target)
    assert (code, out, err) == (130, "", "dynaslim: interrupted\n")
    assert os.listdir(target.parent) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("dynaslim-decode")]
