"""The demo: trains and evaluates both stages on real images that ship with the package."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from dynaslim._files import write_atomic
from dynaslim.checkpoint import Checkpoint, create_model, save
from dynaslim.data import ImageDataset, load_images, open_source
from dynaslim.data.images import channel_statistics, holdout
from dynaslim.data.layout import MINI
from dynaslim.evaluation import Evaluation, evaluate
from dynaslim.preprocessing import Preprocessing
from dynaslim.progress import progress
from dynaslim.recipes import DemoOptions, GateRecipe, SupernetRecipe
from dynaslim.report.charts import evaluation_figure
from dynaslim.runs.context import note_if_busy
from dynaslim.runs.folder import METRICS, environment, write_json
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import Outcome, answer_images, simulate
from dynaslim.train import fit_gate_to_images, train_supernet
from dynaslim.train.step import SupernetLosses

MODEL: Final = "ds_mbnet_tiny"
IMAGE_SIZE_PX: Final = 32
README_TOP1: Final = {"widest route": 0.8680, "gate": 0.8620, "budget": 0.8660}
"""Top-1 in the README, for the default options; other processors give slightly other numbers."""
HELD_OUT: Final = 0.1
"""Share of the training images that budgets are calibrated on."""
LOG_EVERY: Final = 10
"""Steps between lines of the metrics file."""


@dataclass(frozen=True)
class Demo:
    """The measurements of a demo run and the files it wrote."""

    evaluation: Evaluation
    budgeted: tuple[float, Outcome]
    """A budget, as a share of the widest route's cost, and its outcome on the test images."""
    seconds: float
    files: dict[str, Path]

    def beside_readme(self) -> str:
        """Differences in top-1 between this run and the README's, as text."""
        assert self.evaluation.dynamic is not None
        widest = max(self.evaluation.routes, key=lambda route: route.madds)
        found = (widest.top1, self.evaluation.dynamic.top1, self.budgeted[1].top1)
        differences = ", ".join(
            f"{name} {100 * (top1 - shown):+.2f}"
            for (name, shown), top1 in zip(README_TOP1.items(), found, strict=True)
        )
        return (
            f"Top-1 beside the README's, in points: {differences}. Processors and numbers of "
            f"threads round differently."
        )

    def to_dict(self) -> dict[str, Any]:
        budget, outcome = self.budgeted
        return {
            "model": MODEL,
            **self.evaluation.to_dict(),
            "budget": {
                "asked": budget,
                "mean_madds": outcome.madds,
                "top1": outcome.top1,
                "escalated": outcome.escalated,
            },
            "seconds": round(self.seconds, 1),
            "files": {label: str(path) for label, path in self.files.items()},
        }


def run_demo(out: Path, options: DemoOptions, *, train_images: int | None = None) -> Demo:
    """Train, evaluate and save in folder `out`; `train_images` limits the number of images.

    Raises:
        UsageError: for options that make no valid recipe.
        OSError: if the folder cannot be created (raised before training) or written.
    """
    # in few epochs the teacher gets good too late: all widths learn faster from labels
    target, seed = options.target, options.seed
    stage1 = SupernetRecipe(model=MODEL, epochs=options.epochs, seed=seed, target="labels")
    stage2 = GateRecipe(targets=target, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    note_if_busy()

    recipe = {"supernet": stage1.to_dict(), "gate": stage2.to_dict()}
    start = time.monotonic()
    train = _load("train", Preprocessing(IMAGE_SIZE_PX, mean=(0.0,) * 3, std=(1.0,) * 3))
    rest, held = holdout(train.labels_N, HELD_OUT)
    held_out, train = train.subset(held), train.subset(rest)
    mean, std = channel_statistics(train)
    preprocessing = Preprocessing(IMAGE_SIZE_PX, mean=mean, std=std)
    test = _load("test", preprocessing)
    if train_images is not None:
        train = train.subset(torch.arange(train_images))

    torch.manual_seed(seed)  # for the initial weights; all other randomness is seeded by step
    live = create_model(MODEL, num_classes=len(train.class_names))
    lines: list[bytes] = []
    steps = itertools.count(1)
    with progress("stage I: supernet", stage1.epochs * (len(train) // stage1.batch_size)) as bar:

        def supernet_note(losses: SupernetLosses) -> None:
            bar.advance(note=f"loss largest {losses.largest:.2f}, smallest {losses.smallest:.2f}")
            step = next(steps)
            if step % LOG_EVERY == 0:
                line = {"kind": "train", "step": step, **losses._asdict()}
                lines.append(json.dumps(line).encode() + b"\n")

        net = train_supernet(live, train, preprocessing, stage1, on_step=supernet_note)
    with progress("stage II: gate", len(train) // stage2.batch_size) as bar:
        fit_gate_to_images(net, train, preprocessing, stage2, target=target, on_batch=bar.advance)
    with progress("evaluating", len(test)) as bar:
        result = evaluate(net, test, preprocessing, on_batch=bar.advance)
    made = Checkpoint(net, train.class_names, preprocessing, result.to_dict(), recipe)
    curve = fit_curve(answer_images(made, held_out, 250))
    answers = answer_images(made, test, 250)
    at_target = curve.at(target)
    target_outcome = simulate(answers, at_target.shift, at_target.escalations)
    budgets = [simulate(answers, point.shift, point.escalations) for point in curve.points]

    files = {
        "checkpoint": out / "checkpoint.safetensors",
        "results": out / "results.json",
        "picture": out / "accuracy.png",
    }
    save(files["checkpoint"], replace(made, budget=curve.to_dict()))
    title = f"{MODEL} on Fashion-MNIST (2,000 test images)"
    picture = evaluation_figure(net.spec, result, budgets, test, title=title)
    write_atomic(files["picture"], picture)
    done = Demo(result, (target, target_outcome), time.monotonic() - start, files)
    write_atomic(out / METRICS, b"".join(lines))  # for the curves of `dynaslim report`
    results = {**done.to_dict(), "recipe": recipe, "environment": environment()}
    write_json(files["results"], results)
    return done


def _load(split: str, preprocessing: Preprocessing) -> ImageDataset:
    source = open_source(MINI, split)
    with progress(f"reading {split} images", len(source)) as bar:
        return load_images(source, preprocessing, on_image=bar.advance)
