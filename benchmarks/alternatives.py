"""An adapted network compared with the networks that one would train instead.

    python benchmarks/alternatives.py PHOTOS --adapted RUN [RUN...] --networks NAME@SIZE [...]

RUN is a folder of `dynaslim adapt`. Networks, such as efficientnet_lite1@224 and
efficientnet_lite2@160, are trained as the first run's original was: same images, epochs and rates.
The first run's original is the reference; it is also the second network of cascades that start with
the cheaper ones. Budgets are chosen on the images that training held out. All rows are evaluated on
the test split and timed in one interleaved run. Needs `dynaslim[imagenet]`. Writes
results/alternatives.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from adaptation import TimedRow, measured, timed_images, widest_route
from ladder import BACKENDS, TIMED

from dynaslim._files import write_atomic
from dynaslim.bench.timing import hardware
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.conversion.source import load_source
from dynaslim.cost import madds
from dynaslim.data.images import ImageDataset, open_images
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import RunOptions, SupernetRecipe, recipe_from_dict
from dynaslim.runs import run_supernet
from dynaslim.runs.folder import best_checkpoint
from dynaslim.runtime.budget import BudgetPoint
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import answer_images, simulate
from dynaslim.runtime.cascade import cascade
from dynaslim.runtime.engine import Engine

HERE: Final = Path(__file__).parent
LIMITS: Final = (0.25, 0.35, 0.5, 0.65, 0.8)
"""Mean multiply-adds of budgets, as shares of the reference's."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--adapted", type=Path, nargs="+", required=True)
    parser.add_argument("--networks", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, default=Path("runs/alternatives"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "alternatives.json")
    given = parser.parse_args(argv)
    plain: dict[str, Checkpoint] = {}
    adapted: dict[str, Checkpoint] = {}
    for run in given.adapted:
        original = read(best_checkpoint(run / "original"))
        plain[_name(original)] = original
        adapted[f"adapted {_name(original)}"] = read(run / "gate.safetensors")
    for name in given.networks:
        plain[name] = _trained(name, given.adapted[0] / "original", given.runs / name)
    rows = _Rows(given.data, next(iter(plain.values())))
    for name, checkpoint in plain.items():
        rows.add_network(name, checkpoint)
    for name, checkpoint in adapted.items():
        rows.add_budgets(name, checkpoint)
    reference, *others = plain
    for name in others:
        if rows.found[name]["share"] < 1:
            rows.add_budgets(f"{name}, {reference}", cascade([plain[name], plain[reference]]))
    made = {
        "hardware": hardware(),
        "command": sys.argv,
        "images": rows.images,
        "rows": rows.found,
        "times": measured(rows.runs, given.rounds),
    }
    write_atomic(given.out, (json.dumps(made, indent=1) + "\n").encode())
    return 0


def _name(checkpoint: Checkpoint) -> str:
    name = checkpoint.net.spec.name.removeprefix("tf_")
    return f"{name}@{_prepared(checkpoint).image_size_px}"


def _prepared(checkpoint: Checkpoint) -> Preprocessing:
    assert checkpoint.preprocessing is not None
    return checkpoint.preprocessing


def _trained(name: str, like: Path, folder: Path) -> Checkpoint:
    """A pretrained network, trained as the network in folder `like` was."""
    if not (folder / "results.json").exists():
        model, _, side = name.partition("@")
        source = load_source(model, image_size=int(side))
        start = folder.parent / f"{name}.safetensors"
        pre = source.preprocessing
        net = source.conversion((0.25, 0.5, 0.75, 1.0), (), ()).net()
        save(start, Checkpoint(net=net, preprocessing=pre))
        recipe = recipe_from_dict(SupernetRecipe, read(best_checkpoint(like)).recipe["supernet"])
        data = replace(recipe.data, image_size_px=int(side), crop_fraction=pre.crop_fraction)
        run_supernet(replace(recipe, init=str(start), data=data), folder, RunOptions(resume=True))
    return read(best_checkpoint(folder))


class _Rows:
    """Accuracy and cost of every row, and how to run it."""

    def __init__(self, data: str, reference: Checkpoint) -> None:
        self.data, spec = data, reference.net.spec
        self.whole = madds(spec, spec.largest, spec.usual_image_size)
        self.images = len(self._images(reference, "test"))
        self.found: dict[str, dict[str, float]] = {}
        self.runs: list[TimedRow] = []

    def _images(self, checkpoint: Checkpoint, split: str) -> ImageDataset:
        share = 0.15 if split == "train" else None
        return open_images(checkpoint, self.data, split, share=share)

    def add_network(self, name: str, checkpoint: Checkpoint) -> None:
        """The network alone, along its widest route."""
        images = self._images(checkpoint, "test")
        found = widest_route(checkpoint, images)
        self._add(name, found.top1, found.madds)
        x = timed_images(images, _prepared(checkpoint), TIMED)
        for backend in BACKENDS:
            engine = Engine(checkpoint, backend=backend)
            run = engine.static(checkpoint.net.spec.largest)
            self.runs.append((f"{name} by {backend}", x, run))

    def add_budgets(self, name: str, checkpoint: Checkpoint) -> None:
        """A network with several routes, or a cascade, with budgets from the held-out images."""
        curve = fit_curve(answer_images(checkpoint, self._images(checkpoint, "train"), 32))
        images = self._images(checkpoint, "test")
        answers = answer_images(checkpoint, images, 32)
        x = timed_images(images, _prepared(checkpoint), TIMED)
        engines = {backend: Engine(checkpoint, backend=backend) for backend in BACKENDS}
        points: dict[float, BudgetPoint] = {}
        for limit in LIMITS:
            fitting = [point for point in curve.points if point.madds <= limit * self.whole]
            if fitting and fitting[-1] not in points.values():
                points[limit] = fitting[-1]
        for limit, point in points.items():
            row = f"{name}, at most {limit:g}"
            out = simulate(answers, point.shift, point.escalations)
            self._add(row, out.top1, out.madds)
            for backend, engine in engines.items():
                self.runs.append((f"{row} by {backend}", x, partial(engine, budget=point)))

    def _add(self, name: str, top1: float, cost: float) -> None:
        self.found[name] = {"top1": top1, "share": float(cost) / self.whole}
        print(f"{name}: {top1:.1%} at {float(cost) / self.whole:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
