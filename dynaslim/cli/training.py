"""Verbs that train."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dynaslim.cli.output import (
    evaluation_table,
    fail,
    gates_table,
    print_json,
    routes_table,
    saving,
    say,
    say_skipped,
)
from dynaslim.model_names import checkpoint_file
from dynaslim.recipes import GateRecipe, RunOptions, SupernetRecipe
from dynaslim.zoo import get_spec


def demo(
    *,
    out: Path = Path("runs/demo"),
    epochs: int = 6,
    target: float = 0.5,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Train a small network in both stages on real images, evaluate it and show the savings.

    Args:
        out: Folder for the checkpoint, the results and the picture.
        epochs: Passes over the 9,000 images in stage I (the supernet).
        target: Mean cost that the gate of stage II aims at, as a share of the widest route's.
        seed: Of everything random: the same seed and number of threads give the same numbers.
        json: Print one JSON object.
    """
    from dynaslim.demo import run_demo

    done = run_demo(out, epochs=epochs, target=target, seed=seed)
    if json:
        print_json(done.to_dict())
        return
    say(evaluation_table(done.evaluation, done.budgeted))
    say(saving(done.evaluation, done.budgeted))
    if (epochs, target, seed) == (6, 0.5, 0):
        say(done.beside_readme())
    say("")
    _print_files(done.files)


def train_supernet(
    recipe: SupernetRecipe,
    *,
    out: Path,
    options: RunOptions,
    json: bool = False,
) -> int:
    """Stage I: train a supernet; it can be stopped at any time and resumed with --resume.

    Args:
        recipe: What to train, and how.
        out: Folder of the run.
        options: How the run works on this machine.
        json: Print one JSON object.
    """
    _check_named(recipe.data.path, recipe.init)
    get_spec(recipe.model)

    from dynaslim.runs import run_supernet

    def show(results: dict[str, Any]) -> None:
        for name, result in results["val"].items():
            say(f"{name}: {result['images']} held-out images")
            say(routes_table(result))

    return _run_and_show(lambda: run_supernet(recipe, out, options), show, json=json)


def train_gate(
    recipe: GateRecipe,
    *,
    out: Path,
    options: RunOptions,
    json: bool = False,
) -> int:
    """Stage II: train the gates of a supernet; one checkpoint for each target cost.

    Args:
        recipe: What to train, and how.
        out: Folder of the run.
        options: How the run works on this machine.
        json: Print one JSON object.
    """
    _check_named(recipe.data.path, recipe.supernet or None)

    from dynaslim.runs import run_gate

    return _run_and_show(
        lambda: run_gate(recipe, out, options),
        lambda results: say(gates_table(results)),
        json=json,
    )


def _check_named(data: str, checkpoint: str | None) -> None:
    """Raise `DynaslimError` for images or a checkpoint that do not exist; no torch."""
    from dynaslim.data.layout import check_path

    if checkpoint is not None:
        checkpoint_file(checkpoint)
    if data:
        check_path(data)


def _run_and_show(
    run: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None], *, json: bool
) -> int:
    """Run a stage and print its results; returns the exit code."""
    from dynaslim.runs import Stopped

    try:
        results = run()
    except Stopped as stopped:
        return fail(f"{stopped}; go on with the same command and --resume", stopped.exit_code)
    if is_quiet_process():
        return 0
    if json:
        print_json(results)
        return 0
    images = (results["train_images"], results["val_images"], len(results["skipped"]))
    say("{} images trained on, {} held out, {} skipped".format(*images))
    say_skipped(results["skipped"])
    show(results)
    _print_files(results["files"])
    return 0


def _print_files(files: Mapping[str, object]) -> None:
    for label, path in files.items():
        say(f"{label:<11} {path}")


def is_quiet_process() -> bool:
    """Whether another process of this run prints: only the first of several does."""
    # the process group is closed by now; torchrun's variables are still set
    return int(os.environ.get("RANK", 0)) > 0
