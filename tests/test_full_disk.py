"""A full disk: the file is named, nothing half is left, and what was there stays."""

import errno
import subprocess

import pytest
from helpers import lively_net, png

from dynaslim import Checkpoint, Preprocessing, cli
from dynaslim._files import check_writable, naming, write_atomic
from dynaslim.checkpoint import save
from dynaslim.predict import Prediction
from dynaslim.predict_tables import ParquetFile, ParquetParts
from dynaslim.runtime import export

ROW = Prediction("a.png", 1, "cat", 0.5, "4-8-8", 100.0, False)


def _full(*_, **__):
    raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] no space")


def _write(table, rows):
    with table:
        for number in range(rows):
            table.add(Prediction(f"{number}.png", 1, "cat", 0.5, "4-8-8", 100.0, False))
        table.commit({})


def _fill(disk, left=0):
    """Fill a disk but for so many bytes."""
    with open(disk / "fill", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - left))


@pytest.mark.parametrize("when", ["opened", "written", "closed"])
def test_a_parquet_file_that_does_not_fit_is_named_and_gone(when, tmp_path, monkeypatch):
    target = tmp_path / "out.parquet"
    target.write_bytes(b"of before")
    table = ParquetFile(target)
    real = table._parquet.ParquetWriter

    class Writer(real):
        def __init__(self, where, schema):
            super().__init__(where, schema)
            if when == "opened":
                _full()

        def write_table(self, rows):
            if when == "written":
                _full()

        def close(self):
            super().close()
            if when == "closed":
                _full()

    monkeypatch.setattr(table._parquet, "ParquetWriter", Writer)
    with pytest.raises(OSError, match="No space left on device") as caught:
        _write(table, 1)
    assert caught.value.filename == str(target)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert target.read_bytes() == b"of before"


@pytest.mark.parametrize("left", [0, 4096])
def test_a_parquet_file_on_a_full_disk(left, small_disk):
    _fill(small_disk, left)
    target = small_disk / "out.parquet"
    with pytest.raises(OSError, match="No space left on device") as caught:
        _write(ParquetFile(target), 6 * ParquetFile.GROUP_ROWS)
    assert caught.value.filename == str(target)
    assert [path.name for path in small_disk.iterdir()] == ["fill"]


def test_verbs_name_the_file_and_leave_nothing(small_disk, tmp_path, monkeypatch, capsys):
    checkpoint = Checkpoint(lively_net("micro"), preprocessing=Preprocessing(32))
    model = save(tmp_path / "net.safetensors", checkpoint)
    package = tmp_path / "package"
    export.export_package(checkpoint, package)
    (tmp_path / "a.png").write_bytes(png(0, (32, 32), "RGB"))
    _fill(small_disk)
    runs = {
        "out.parquet": ["predict", package, tmp_path / "a.png", "--parquet"],
        "package": ["export", model],
        "net.onnx": ["export", model, "--single-file"],
        "table.json": ["profile", package, "--batch-size", "1", "--rounds", "1"],
    }
    for name, (verb, *argv) in runs.items():
        assert cli.run([verb, *map(str, argv), str(small_disk / name)]) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert message == f"dynaslim: {small_disk / name}: No space left on device"
        assert [path.name for path in small_disk.iterdir()] == ["fill"], name


def test_a_place_that_cannot_be_written_is_reported_before_any_work(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    target = small_disk / "new" / "table.parquet"
    with pytest.raises(OSError, match="Read-only file system") as caught:
        check_writable(target)
    assert caught.value.filename == str(target)
    # before the checkpoint is looked for
    assert cli.run(["evaluate", "nosuch", "--data", "no/such", "--table", str(target)]) == 1
    assert capsys.readouterr().err == f"dynaslim: {target}: Read-only file system\n"


def test_a_folder_of_parts_names_the_part(small_disk):
    parts = ParquetParts(small_disk / "parts")
    with parts:
        _fill(small_disk)
        parts.add(ROW)
        with pytest.raises(OSError, match="No space left") as caught:
            parts.commit({})
    assert caught.value.filename == str(small_disk / "parts" / "part-00000.parquet")
    assert list((small_disk / "parts").iterdir()) == []


def test_which_file_an_error_names(tmp_path):
    target = tmp_path / "folder" / "file"
    for given, named in (
        (OSError(errno.ENOSPC, "no space"), target),
        (OSError(errno.EACCES, "no", str(target.with_name(".file.1.tmp"))), target),
        (FileExistsError(errno.EEXIST, "is there", str(target.parent)), target.parent),
        (OSError("a library's own words"), target),
    ):
        with pytest.raises(OSError) as caught, naming(target):  # noqa: PT011
            raise given
        assert caught.value.filename == str(named)
        assert caught.value.strerror in (
            "No space left on device", "Permission denied", "File exists", "a library's own words"
        )  # fmt: skip
    (tmp_path / "in the way").write_text("")
    with pytest.raises(FileExistsError) as caught:
        write_atomic(tmp_path / "in the way" / "file", b"")
    assert caught.value.filename == str(tmp_path / "in the way")
