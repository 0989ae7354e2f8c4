import os
from pathlib import Path

import pytest
import torch
from helpers import png, write_parquet

from dynaslim.data import load_images, open_source
from dynaslim.data.images import ImageDataset, channel_statistics
from dynaslim.data.layout import MINI, check_path
from dynaslim.data.source import Entry
from dynaslim.errors import DataError
from dynaslim.preprocessing import Preprocessing


def _folder(root, split=None):
    for number, name in enumerate(["cat", "dog"]):
        folder = root / split / name if split else root / name
        folder.mkdir(parents=True)
        for n in range(3):
            (folder / f"{n}.png").write_bytes(png(number * 3 + n))
    return root


def test_shipped_images():
    for split, count in (("train", 10_000), ("test", 2_000)):
        source = open_source(MINI, split)
        assert len(source) == count
        assert source.class_names[0] == "T-shirt/top"
    assert (MINI / "LICENSE").read_text().startswith("The MIT License")


def test_parquet_file_and_folder_agree(tmp_path):
    images = [png(n) for n in range(4)]
    path = write_parquet(tmp_path / "set", images, 2)
    for where in (path, path.parent):
        source = open_source(where, "test")
        assert source.class_names == ("class 0", "class 1")
        assert [(entry.read(), entry.label) for entry in source] == [
            (image, n % 2) for n, image in enumerate(images)
        ]


def test_splits_of_a_parquet_folder(tmp_path):
    write_parquet(tmp_path, [png(0)], 1, "train")
    write_parquet(tmp_path, [png(1)] * 2, 1, "validation-00000-of-00001")
    assert len(open_source(tmp_path, "train")) == 1
    assert len(open_source(tmp_path, "test")) == 2  # validation stands in
    with pytest.raises(DataError, match=r"has no split 'extra', only 'train', 'validation'"):
        open_source(tmp_path, "extra")


@pytest.mark.parametrize("split", [None, "test"])
def test_image_folder(tmp_path, split):
    source = open_source(_folder(tmp_path, split), "test")
    assert source.class_names == ("cat", "dog")
    assert len(source) == 6
    entry = next(iter(source))
    assert entry.where.endswith("cat/0.png")
    assert entry.read() == png(0)
    assert entry.label == 0


def test_class_and_file_names_that_sound_like_splits(tmp_path):
    """Only a top-level folder that is called like a split is one."""
    for name in ("bus", "test_tube", "train_station", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_01.png").write_bytes(png())
        (tmp_path / name / "test [2].png").write_bytes(png())
    source = open_source(tmp_path)
    assert source.split == "whole"
    assert source.class_names == ("bus", "test_tube", "train_station", "val")
    assert len(list(source)) == 8


def test_the_split_is_read_from_table_names_and_folders(tmp_path):
    write_parquet(tmp_path, [png()] * 3, 1, "mnist_train")
    write_parquet(tmp_path, [png()] * 2, 1, "mnist_test")
    write_parquet(tmp_path / "val", [png()], 1, "0000")
    assert [len(open_source(tmp_path, s)) for s in ("train", "test", "val")] == [3, 2, 1]
    write_parquet(tmp_path / "only", [png()], 1, "train-0")
    with pytest.raises(DataError, match="only: has no split 'test', only 'train'"):
        open_source(tmp_path / "only", "test")
    assert len(open_source(tmp_path / "only" / "train-0.parquet", "test")) == 1  # named itself
    write_parquet(tmp_path / "contest", [png()] * 4, 1, "latest")
    assert open_source(tmp_path / "contest", "train").split == "whole"


def test_rows_without_image_or_label_are_named(tmp_path):
    path = write_parquet(tmp_path, [png(), None], None, "a", [1, 0])
    with pytest.raises(DataError, match="row 1: has no image"):
        [entry.read() for entry in open_source(path)]
    path = write_parquet(tmp_path, [png()] * 2, None, "b", [1, None])
    with pytest.raises(DataError, match="row 1: label None is none of the 2 classes"):
        list(open_source(path))


def test_folder_of_one_class_keeps_its_labels(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.png").write_bytes(png())
    assert open_source(tmp_path).class_names == ("only",)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="no/such/folder: no such file or folder"):
        open_source("no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no images; expected .*empty/CLASS/FILE"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(png())
    with pytest.raises(DataError, match=r"an image is outside any class folder \(a.png\)"):
        open_source(tmp_path / "empty")
    (tmp_path / "split" / "train").mkdir(parents=True)
    for n in range(3):
        (tmp_path / "split" / "train" / f"{n}.png").write_bytes(png())
    with pytest.raises(DataError, match=r"3 images are outside .* \(0.png\), so that there are no"):
        open_source(tmp_path / "split")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected a .parquet file or a folder"):
        open_source(tmp_path / "notes.txt")


def test_what_never_ends_is_no_image(tmp_path):
    """A pipe or a device among images; links that lead nowhere are, and are skipped when read."""
    folder = tmp_path / "cat"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "round.png").symlink_to("round.png")
    source = open_source(tmp_path)
    assert [Path(entry.where).name for entry in source] == ["a.png", "round.png"]


def test_a_name_that_is_not_utf8(tmp_path):
    (tmp_path / "cat").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "cat") + b"/a\xff.png")).write_bytes(png())
    with pytest.raises(DataError, match=r"cat/a\\xff.png: its name is not UTF-8; rename it"):
        open_source(tmp_path)


def test_hub_name_that_cannot_be_had(monkeypatch):
    with pytest.raises(DataError, match="no/such-set: no such file or folder, and not to be had"):
        open_source("no/such-set")
    # a name without an owner is refused without a word to the hub
    monkeypatch.setattr("datasets.load_dataset", None)
    for refuse in (check_path, open_source):
        with pytest.raises(DataError, match=r"^nosuch: no such file or folder; .* is OWNER/NAME$"):
            refuse("nosuch")


def test_hub_name_goes_to_the_hub(monkeypatch):
    import datasets

    requests = []

    def load_dataset(name):
        requests.append(name)
        features = datasets.Features(
            {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"])}
        )
        rows = {"img": [{"bytes": png(), "path": None}], "fine": [1]}
        return datasets.DatasetDict(test=datasets.Dataset.from_dict(rows, features=features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("owner/pictures")
    assert requests == ["owner/pictures"]
    assert next(iter(source)) == Entry("owner/pictures [test] row 0", png(), 1)


def test_damaged_parquet(tmp_path):
    path = write_parquet(tmp_path, [png()], 1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"test.parquet: cannot be read as parquet"):
        open_source(path)


def test_table_without_images_or_labels(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"label": [1, 2]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="has no image column, only label"):
        open_source(tmp_path)
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": png(), "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="has no label column"):
        open_source(tmp_path)


def test_one_image_that_does_not_decode_is_never_too_many(tmp_path):
    """1 % of a small set is less than one image; two are too many, and both are named."""
    table = write_parquet(tmp_path / "table", [b"no image", *[png()] * 20], 2)
    images = load_images(open_source(table), Preprocessing(32))
    assert (len(images), len(images.digests()), images.skipped.count) == (20, 20, 1)
    table = write_parquet(tmp_path / "table", [b"no image", *[png()] * 20, b"none"], 2)
    with pytest.raises(DataError, match=r"2 of 22 images .*row 0: .*; .*row 21: "):
        load_images(open_source(table), Preprocessing(32))


def test_load_images_counts_and_statistics(tmp_path):
    path = write_parquet(tmp_path, [png(n) for n in range(5)], 5)
    calls = []
    images = load_images(open_source(path), Preprocessing(32), on_image=lambda: calls.append(1))
    assert images.images_NCSS.shape == (5, 3, 32, 32)
    assert images.images_NCSS.dtype == torch.uint8
    assert images.labels_N.tolist() == [0, 1, 2, 3, 4]
    assert len(calls) == 5
    mean, std = channel_statistics(images)
    floats = images.images_NCSS.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(floats.mean(1).tolist(), abs=1e-4)
    assert std == pytest.approx(floats.std(1, unbiased=False).tolist(), abs=1e-4)


def test_batches_cover_everything_once():
    images = ImageDataset(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10), ("a",))
    order = torch.randperm(10)
    labels = [y for _, y in images.batches(4, order)]
    assert [len(y) for y in labels] == [4, 4, 2]
    assert torch.equal(torch.cat(labels), order)
    assert images.subset(torch.tensor([3, 5])).labels_N.tolist() == [3, 5]


def test_what_stands_beside_the_splits_is_no_class(tmp_path):
    """A folder of tools beside train and val; but a class may be called val."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "a" / split / name
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(png())
    (tmp_path / "a" / "devkit").mkdir()
    source = open_source(tmp_path / "a", "train")
    assert source.class_names == ("cat", "dog")
    assert source.split == "train"
    for name in ("cat", "val"):
        folder = tmp_path / "b" / name
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png())
    assert open_source(tmp_path / "b", "train").class_names == ("cat", "val")
