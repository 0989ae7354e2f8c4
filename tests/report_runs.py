"""Shared helpers of the report tests: synthetic runs, and the visible content of a page."""

from html.parser import HTMLParser

import torch
from helpers import encoded, lively, micro_spec, noise, write_parquet

from dynaslim.data import open_source
from dynaslim.data.images import ImageDataset, holdout
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import DataRecipe, GateRecipe, SupernetRecipe

PRE = Preprocessing(16, mean=(0.5,) * 3, std=(0.125,) * 3)
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "turned \u202e around \x07\uffff",
    "&amp; & <b>co</b> {{ 7 * 7 }}",
    "w" * 300,
)
TARGETS = (0.4, 0.6, 0.8)
SHARE = 0.25


def write_images(folder, split, count, names, channels=3, size=16):
    """Write a parquet file of varied noise, which gates can distinguish; labels cycle."""
    levels = noise(micro_spec(in_channels=channels), count, image_size=size) * 32 + 128
    pixels = levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).squeeze(3).numpy()
    write_parquet(folder, list(map(encoded, pixels)), names, split)


def recipes(data, *, target=None, gated=True, supernet=""):
    """Recipes as a run writes them to its checkpoints."""
    images = DataRecipe(path=str(data), val_share=SHARE, image_size_px=16)
    stage1 = SupernetRecipe(data=images).to_dict()
    if not gated:
        return {"supernet": stage1}
    stage2 = GateRecipe(data=images, targets=TARGETS, supernet=supernet).to_dict()
    return {"supernet": stage1, "gate": stage2, "target": target}


def held_images(data):
    """The images of a parquet folder that training holds out for `SHARE`."""
    source = open_source(data, "train")
    return ImageDataset.of(source, PRE, rows=holdout(source.labels(), SHARE)[1])


def make_net(number=0, **changes):
    """The micro network, with answers spread over the classes; `number` varies its gates."""
    net = lively(micro_spec(**changes), image_size=16)
    with torch.no_grad():
        for parameter in net.slimming_parameters():
            parameter.copy_(parameter.roll(number, 0))
        net.classifier.weight *= 100
        x = noise(net.spec, 64, image_size=16)
        net.classifier.bias -= net(x, net.spec.smallest).mean(0)
    return net


class Page(HTMLParser):
    """The elements, the tables and the words of a page."""

    def __init__(self, html):
        super().__init__()
        self.elements = []  # (tag, attributes)
        self.tables = []  # rows of cells
        self.words = []
        self._open = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "elements are closed in their order"

    def handle_data(self, text):
        if "style" not in self._open:
            self.words.append(text)
        if {"th", "td"} & set(self._open) and "svg" not in self._open:
            self.tables[-1][-1][-1] += text

    @property
    def text(self):
        """All words, with single spaces."""
        return " ".join(" ".join(self.words).split())

    @property
    def parts(self):
        """The ids of the page's sections."""
        return [given["id"] for tag, given in self.elements if tag == "section"]

    def rows(self, first_cell):
        """The rows of the only table whose header begins with these cells."""
        found = [t for t in self.tables if t and t[0][: len(first_cell)] == list(first_cell)]
        assert len(found) == 1, f"{len(found)} tables begin with {first_cell}"
        return found[0][1:]


VOID = {"meta", "link", "img", "br"}
