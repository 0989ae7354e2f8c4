"""Every command and every Python block of README.md and docs/ runs, or is marked with a reason."""

import shutil
from pathlib import Path

import datasets
import docs_blocks
import numpy as np
import pytest
import torch
from docs_blocks import ROOT, blocks_of, check_flags, commands_of, run_command, run_python
from helpers import lively
from PIL import Image
from released_file import write_released

import dynaslim
from dynaslim import cli, shipped
from dynaslim.checkpoint import Checkpoint, save
from dynaslim.data.transforms import normalise
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import DataRecipe, SupernetRecipe
from dynaslim.zoo import get_spec

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MINI = ROOT / "dynaslim" / "data" / "fashion_mnist_mini"
COPIES = ("checkpoint.safetensors", "CKPT", "gate_0.60.safetensors")
"""Names that the documents have for a trained network that is simply there."""
TRAINED_BEFORE = ("runs/demo/checkpoint.safetensors", "runs/cifar10_gate/gate_0.60.safetensors")
"""Those that another page of the documents has trained."""

MODEL = """
from torch import nn


def make_model():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """What the reader of a page has: images, a few files, a network with a budget curve."""
    root = tmp_path_factory.mktemp("reader")
    for split, images in (("train", 128), ("test", 120)):
        source = dynaslim.open_source(MINI, split).dataset
        rows = source.select(range(0, len(source), len(source) // images)).select(range(images))
        table = rows.cast_column("image", datasets.Image(decode=True))
        # the latter is read at 224 px
        for folder, few in (("DATA", images), ("IMAGENET", 16 if split == "train" else 4)):
            _made(root / folder)
            name = "val" if (folder, split) == ("IMAGENET", "test") else split
            table.select(range(few)).to_parquet(root / folder / f"{name}.parquet")
    source = dynaslim.open_source(root / "DATA", "train")
    for n in range(48):
        entry = source[n]
        for folder in (root / "photos", root / "PHOTOS" / f"kind {entry.label % 3}"):
            (_made(folder) / f"{n}.png").write_bytes(entry.read())
    for name in ("cat", "dog"):
        Image.open(root / "photos" / "0.png").convert("RGB").save(root / f"{name}.jpg")
    (root / "model.py").write_text(MODEL)
    np.save(root / "images.npy", np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype("f4"))
    net = lively(get_spec("ds_mbnet_tiny"), image_size=32)
    agreed = _agree_with(net, source)
    held_back = SupernetRecipe(data=DataRecipe("DATA", val_share=0.8)).to_dict()
    checkpoint = Checkpoint(
        net, source.class_names, Preprocessing(32), recipe={"supernet": held_back}
    )
    path = str(save(root / "checkpoint.safetensors", checkpoint))
    table = str(root / "ms.json")
    argv = ["profile", path, table, "--backend", "eager", "--batch-size", "2", "--rounds", "2"]
    assert cli.run(argv) == 0
    agreed.to_parquet(_made(root / "agreed") / "test.parquet")
    data = ["--data", str(root / "agreed"), "--split", "test"]
    assert cli.run(["calibrate-budget", path, *data, "--table", table]) == 0
    return root


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _agree_with(net, source):
    """The images as a set on which the widest route is always right: a curve of many points."""
    images = dynaslim.load_images(source, Preprocessing(32))
    x = normalise(images.images_NCSS, Preprocessing(32))
    with torch.inference_mode():
        logits = net(x, net.spec.widest_choice)
        # no class for all of them, and logits as large as rounding was for the features
        net.classifier.bias += logits.abs().max() - logits.mean(0)
        labels = net(x, net.spec.widest_choice).argmax(1).tolist()
    assert len(set(labels)) > 3
    feature = source.dataset.features["label"]
    decoded = source.dataset.cast_column("image", datasets.Image(decode=True))
    return decoded.remove_columns("label").add_column("label", labels, feature=feature)


@pytest.fixture
def reader(stand_ins, tmp_path, monkeypatch, one_thread):
    """A folder for one page, with everything in place."""
    for name, there in (("DATA", "DATA"), ("PATH", "DATA"), ("IMAGENET", "IMAGENET")):
        (tmp_path / name).symlink_to(stand_ins / there)
    for name in ("photos", "PHOTOS"):
        shutil.copytree(stand_ins / name, tmp_path / name)
    for name in ("images.npy", "cat.jpg", "dog.jpg", "model.py"):
        shutil.copy(stand_ins / name, tmp_path)
    for name in (*COPIES, *TRAINED_BEFORE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stand_ins / "checkpoint.safetensors", tmp_path / name)
    (tmp_path / "recipes").mkdir()
    for recipe in ROOT.glob("recipes/*.yaml"):
        (tmp_path / "recipes" / recipe.name).write_text(docs_blocks.short_recipe(recipe))
    mini = tmp_path / MINI.relative_to(ROOT)
    mini.parent.mkdir(parents=True)
    mini.symlink_to(stand_ins / "DATA")
    drawings = tmp_path / shipped.PICTURES.relative_to(ROOT)
    drawings.parent.mkdir()
    drawings.symlink_to(shipped.PICTURES)
    write_released(tmp_path / "model_best.pth.tar")
    monkeypatch.chdir(tmp_path)
    # the folder dynaslim/ in it is no package: a process that is started here must not take it
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    return tmp_path


@pytest.fixture
def servers():
    started = docs_blocks.Servers()
    yield started
    started.stop()


@pytest.fixture
def given(reader):
    """Names that Python on a page may use without having made them."""
    from fastapi import FastAPI

    engine = dynaslim.Engine.from_checkpoint(reader / "CKPT", backend="eager")
    yield {
        "__name__": "a page",
        "engine": engine,
        "pixels_CSS": np.zeros((3, 32, 32), np.uint8),
        "route": engine.spec.routes[1],
        "service": FastAPI(),
        "x": torch.randn(4, 3, 32, 32),
    }
    engine.close()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_works_as_written(path, given, servers, monkeypatch):
    blocks = blocks_of(path)
    for number, block in enumerate(blocks):
        try:
            if block.reason_not_run is not None:
                for line in commands_of(block) if block.language == "bash" else ():
                    check_flags(line, monkeypatch)
            elif block.language == "bash":
                for line in commands_of(block):
                    run_command(line, servers)
            elif block.language == "python" and block.text.startswith("--8<--"):
                assert (ROOT / block.text.split('"')[1]).read_text()
            elif block.language == "python":
                printed = run_python(block, given, servers)
                follows = blocks[number + 1 : number + 2]
                if printed and follows and _is_output(path, block, follows[0]):
                    assert printed.strip() == follows[0].text.strip()
            else:
                docs_blocks.check_data(block)
                if block.title is not None:
                    Path(block.title).write_text(block.text)
        except Exception as error:
            raise AssertionError(f"{block.where}: {error}") from error


def _is_output(path, block, follows):
    """Whether a text fence stands right behind a block of Python: then it is what that prints."""
    end = block.line + block.text.count("\n") + 1  # the closing fence, then an empty line
    return follows.language == "text" and follows.line == end + 3


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_block_hides_what_it_is(path):
    """Every fence names its language, and what is for a shell is not called text."""
    for block in blocks_of(path):
        known = ("bash", "python", *docs_blocks.DATA_LANGUAGES)
        assert block.language in known, f"{block.where}: a fence of {block.language!r}"
        first = block.text.split()[:1]
        if block.language == "text":
            assert not set(first) & set(docs_blocks.COMMANDS), f"{block.where}: a command as text"


def test_what_is_not_run_is_little(capsys):
    """Excuses are for what needs other machines, minutes or a network."""
    blocks = [b for p in PAGES for b in blocks_of(p) if b.language in ("bash", "python")]
    excused = [f"{b.where}: {b.reason_not_run}" for b in blocks if b.reason_not_run is not None]
    assert len(excused) < len(blocks) / 3, "\n".join(excused)


def test_a_marker_excuses_the_next_block_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs a fleet -->\n\n```bash\nmake war\n```\n\n"
        "<!-- not run: lost -->\n\nWords.\n\n    make peace  # now\n      # more\n\n"
        '```yaml title="a.yaml"\na: 1\n```\n'
    )
    fleet, peace, titled = blocks_of(page)
    assert (fleet.reason_not_run, fleet.text, fleet.line) == ("needs a fleet", "make war", 4)
    assert (peace.reason_not_run, commands_of(peace)) == (None, ["make peace  # now"])
    assert titled.title == "a.yaml"


@pytest.mark.parametrize(
    "line",
    ["dynaslim evaluate nowhere --data DATA", "make war", "rm -rf things", "dynaslim bake CKPT"],
)
def test_a_command_that_does_not_work_is_found(reader, servers, line):
    with pytest.raises(AssertionError, match=line.split()[1]):
        run_command(line, servers)


def test_a_flag_that_is_gone_is_found(monkeypatch):
    line = "torchrun --nproc-per-node 8 -m dynaslim train supernet --out RUN --data.path DATA"
    check_flags(line, monkeypatch)
    with pytest.raises(AssertionError, match=r"no.such.flag"):
        check_flags(f"{line} --no-such-flag 1", monkeypatch)
