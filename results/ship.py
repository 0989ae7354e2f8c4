"""Makes the model that ships: `python -m results.ship SUPERNET --data FOLDER`.

It trains a gate on the training images, calibrates a budget curve on the held-out ones, evaluates
on the test split, and writes the checkpoint and its card to `dynaslim/shipped/`. If interrupted, it
can be continued. For a checkpoint with trained gates, such as the shipped one, only curve,
evaluation and card are made anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dynaslim import shipped
from dynaslim._files import write_atomic
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cost import params
from dynaslim.data import ImageDataset
from dynaslim.errors import DynaslimError
from dynaslim.evaluation import evaluate
from dynaslim.progress import progress
from dynaslim.recipes import DataRecipe, GateRecipe, SupernetRecipe, recipe_from_dict
from dynaslim.runs import RunOptions, run_gate
from dynaslim.runtime.budget import BudgetCurve
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import answer_images, simulate
from results.answers import images_of
from results.cells import RUNS
from results.plan import HUB

TARGET: Final = 0.5
BUDGETS: Final = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
BEYOND: Final = (1.1, 1.3, 1.6, 2.0)
"""Budgets above the widest route's cost, for a second look; used as far as the curve goes."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m results.ship", description=__doc__)
    parser.add_argument("supernet", type=Path, help="checkpoint, such as a run's last.safetensors")
    parser.add_argument("--data", help="folder with cifar10; else the hub")
    parser.add_argument("--name", default=shipped.DEFAULT)
    parser.add_argument("--out", type=Path, default=shipped.FOLDER)
    parser.add_argument("--run", type=Path, default=RUNS / "ship")
    given = parser.parse_args(argv)
    try:
        file = ship(given.supernet, given.data, given.name, given.out, given.run)
    except DynaslimError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{file}: {file.stat().st_size / 1e6:.2f} MB, and its card\n")
    return 0


def ship(supernet: Path, folder: str | None, name: str, out: Path, run: Path) -> Path:
    """Make gate, curve, evaluation, checkpoint and card; return the checkpoint's path."""
    trained = read(supernet)
    recipe = recipe_from_dict(SupernetRecipe, trained.recipe["supernet"])
    data = recipe.data if folder is None else replace(recipe.data, path=f"{folder}/{name}")
    has_gate = "gate" in trained.recipe
    gated = trained if has_gate else _with_gate(supernet, recipe, data, run)
    pre = gated.preprocessing
    assert pre is not None
    held = images_of(data.path, "held_out", pre, data.val_share)
    curve = fit_curve(answer_images(gated, held, 250))
    metrics = {**gated.metrics, **_tested(gated, curve, images_of(data.path, "test", pre))}
    made = replace(
        gated,
        budget=curve.to_dict(),
        metrics=metrics,
        recipe=_without_places(gated.recipe, HUB.get(name, name)),
    )
    file = save(out / f"{name}.safetensors", made)
    write_atomic(out / f"{name}.md", card(name, made).encode())
    return file


def _with_gate(supernet: Path, recipe: SupernetRecipe, data: DataRecipe, run: Path) -> Checkpoint:
    gate = GateRecipe(
        supernet=str(supernet),
        targets=TARGET,
        seed=recipe.seed,
        data=data,
        augment=recipe.augment,
    )
    run_gate(gate, run, RunOptions(resume=True))
    return read(run / f"gate_{TARGET:.2f}.safetensors")


def _tested(gated: Checkpoint, curve: BudgetCurve, test: ImageDataset) -> dict[str, Any]:
    """Results on the test split: routes, the gate as trained, and the budgets of the curve."""
    pre = gated.preprocessing
    assert pre is not None
    with progress("evaluating", len(test)) as bar:
        result = evaluate(gated.net, test, pre, on_batch=bar.advance)
    answers = answer_images(gated, test, 250)
    rows = []
    beyond = [budget for budget in BEYOND if budget <= curve.points[-1].share]
    for budget in (*BUDGETS, *beyond):
        point = curve.at(budget)
        got = simulate(answers, point.shift, point.escalations)
        rows.append(
            {
                "budget": budget,
                "madds": got.madds,
                "top1": got.top1,
                "escalated": got.escalated,
            }
        )
    return {"test": result.to_dict(), "test_budgets": rows}


def _without_places(value: Any, data: str) -> Any:
    """A recipe without local paths; the data set has its name on the hub."""
    if isinstance(value, Mapping):
        found = {key: _without_places(item, data) for key, item in value.items()}
        if "path" in found and "val_share" in found:
            found["path"] = data
        if "supernet" in found and isinstance(found["supernet"], str):
            found["supernet"] = ""
        return found
    return value


# -- the card --------------------------------------------------------------------------------------


def card(name: str, made: Checkpoint) -> str:
    """The card's text: the model, its accuracy and cost, how it was made, and its limits."""
    spec, pre = made.net.spec, made.preprocessing
    assert pre is not None
    test = made.metrics["test"]
    supernet = made.recipe["supernet"]
    gate = made.recipe["gate"]
    rows = []
    for route in test["routes"]:
        widths = "-".join(map(str, route["widths"]))
        rows.append(f"| route {widths} | {route['madds'] / 1e6:.2f} M | {route['top1']:.2%} | |")
    dynamic = test["dynamic"]
    rows.append(
        f"| gate as trained | {dynamic['mean_madds'] / 1e6:.2f} M | {dynamic['top1']:.2%} | |"
    )
    rows += [
        f"| budget {r['budget']:g} | {r['madds'] / 1e6:.2f} M | {r['top1']:.2%} "
        f"| {r['escalated']:.1%} |"
        for r in made.metrics["test_budgets"]
    ]
    table = "\n".join(rows)
    classes = ", ".join(made.class_names or ())
    held = made.metrics["val"]["images"]
    taught = supernet["target"] + (" and the labels" if supernet.get("label_weight") else "")
    return f"""# {name}

`{spec.name}`, {params(spec) / 1e6:.2f} M parameters, for images of {pre.image_size_px}x\
{pre.image_size_px} px:
{classes}.
Used by `dynaslim predict` and `dynaslim serve` where no model is named; anywhere else by its name,
`dynaslim.load("{name}")`.

## What it gives

Top-1 on the {test["images"]:,} test images, by which nothing was chosen. A budget is a part of
the widest route's multiply-adds; its gate and escalation were chosen on {held:,} images held out of
the training split.

| | mean multiply-adds | top-1 | escalated |
| --- | ---: | ---: | ---: |
{table}

## How it was made

Trained on `{supernet["data"]["path"]}`, split `{supernet["data"]["split"]}`, but for {held:,} \
images: {supernet["epochs"]} epochs,
taught by: {taught}; seed {supernet["seed"]}. Gate: {gate["objective"]} loss, target \
{made.recipe["target"]:g}. The whole recipe is in the
checkpoint: `dynaslim info {name} --json`. `python -m results.ship` makes it of a supernet.

## What it is not for

Small pictures of ten classes, as in its training set; other pictures get one of these names too.
It is a small network trained briefly, to show the method and to try the package with.
"""


if __name__ == "__main__":
    sys.exit(main())
