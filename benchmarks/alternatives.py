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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from adaptation import run_all
from ladder import BACKENDS, BATCHES, TIMED

from dynaslim._files import write_atomic
from dynaslim.bench.timing import hardware, interleave, summary
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.conversion.source import load_source
from dynaslim.data.images import ImageDataset, open_images
from dynaslim.data.transforms import normalise
from dynaslim.evaluation import evaluate
from dynaslim.recipes import RunOptions, SupernetRecipe, recipe_from_dict
from dynaslim.runs import run_supernet
from dynaslim.runtime.budget import BudgetPoint
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import answer_images, simulate
from dynaslim.runtime.cascade import cascade
from dynaslim.runtime.engine import Engine

HERE: Final = Path(__file__).parent
LIMITS: Final = (0.25, 0.35, 0.5, 0.65, 0.8)
"""Mean multiply-adds of budgets, as shares of the reference's."""
Run = Callable[[np.ndarray], Any]


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
        original = _best(run / "original")
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
        "times": rows.times(given.rounds),
    }
    write_atomic(given.out, (json.dumps(made, indent=1) + "\n").encode())
    return 0


def _name(checkpoint: Checkpoint) -> str:
    assert checkpoint.preprocessing is not None
    name = checkpoint.net.spec.name.removeprefix("tf_")
    return f"{name}@{checkpoint.preprocessing.image_size_px}"


def _best(folder: Path) -> Checkpoint:
    best = folder / "best.safetensors"
    return read(best if best.exists() else folder / "last.safetensors")


def _trained(name: str, like: Path, folder: Path) -> Checkpoint:
    """A pretrained network, trained as the network in folder `like` was."""
    if not (folder / "results.json").exists():
        model, _, side = name.partition("@")
        source = load_source(model, image_size=int(side))
        start = folder.parent / f"{name}.safetensors"
        pre = source.preprocessing
        net = source.conversion((0.25, 0.5, 0.75, 1.0), (), ()).net()
        save(start, Checkpoint(net=net, preprocessing=pre))
        recipe = recipe_from_dict(SupernetRecipe, _best(like).recipe["supernet"])
        data = replace(recipe.data, image_size_px=int(side), crop_fraction=pre.crop_fraction)
        run_supernet(replace(recipe, init=str(start), data=data), folder, RunOptions(resume=True))
    return _best(folder)


class _Rows:
    """Accuracy and cost of every row, and how to run it."""

    def __init__(self, data: str, reference: Checkpoint) -> None:
        self.data = data
        images = self._images(reference, "test")
        self.whole, self.images = float(_widest(reference, images).madds), len(images)
        self.found: dict[str, dict[str, float]] = {}
        self.runs: list[tuple[str, np.ndarray, Run]] = []

    def _images(self, checkpoint: Checkpoint, split: str) -> ImageDataset:
        share = 0.15 if split == "train" else None
        return open_images(checkpoint, self.data, split, share=share)

    def add_network(self, name: str, checkpoint: Checkpoint) -> None:
        """The network alone, along its widest route."""
        images = self._images(checkpoint, "test")
        found = _widest(checkpoint, images)
        self._add(name, found.top1, found.madds)
        x = _batch(images, checkpoint)
        for backend in BACKENDS:
            engine = Engine(checkpoint, backend=backend)
            self._add_run(name, backend, x, engine.static(checkpoint.net.spec.largest))

    def add_budgets(self, name: str, checkpoint: Checkpoint) -> None:
        """A network with several routes, or a cascade, with budgets from the held-out images."""
        curve = fit_curve(answer_images(checkpoint, self._images(checkpoint, "train"), 32))
        images = self._images(checkpoint, "test")
        answers = answer_images(checkpoint, images, 32)
        x = _batch(images, checkpoint)
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
                self._add_run(row, backend, x, partial(engine, budget=point))

    def _add(self, name: str, top1: float, cost: float) -> None:
        self.found[name] = {"top1": top1, "share": float(cost) / self.whole}
        print(f"{name}: {top1:.1%} at {float(cost) / self.whole:.2f}", flush=True)

    def _add_run(self, row: str, backend: str, x: np.ndarray, run: Run) -> None:
        self.runs.append((f"{row} by {backend}", x, run))

    def times(self, rounds: int) -> dict[str, Any]:
        """Milliseconds per image of every row and backend, interleaved."""
        found: dict[str, Any] = {"rounds": rounds}
        for size in BATCHES:
            arms = {
                name: partial(run_all, run, np.split(x, len(x) // size))
                for name, x, run in self.runs
            }
            times = interleave(arms, rounds)
            found[f"batch {size}"] = {
                name: summary([value / TIMED for value in values]) for name, values in times.items()
            }
        return found


def _widest(checkpoint: Checkpoint, images: ImageDataset) -> Any:
    pre = checkpoint.preprocessing
    assert pre is not None
    route = checkpoint.net.spec.largest
    return evaluate(checkpoint.net, images, pre, routes=(route,), dynamic=False).routes[0]


def _batch(images: ImageDataset, checkpoint: Checkpoint) -> np.ndarray:
    """The images that are timed, a random choice, prepared for a network."""
    pre = checkpoint.preprocessing
    assert pre is not None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:TIMED]
    return np.concatenate([normalise(p, pre).numpy() for p, _ in images.batches(32, order)])


if __name__ == "__main__":
    sys.exit(main())
