"""Verbs that train."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynaslim.cli.output import (
    echo,
    evaluation_table,
    fail,
    gates_table,
    print_files,
    print_json,
    print_skipped,
    routes_table,
    saving,
)
from dynaslim.model_names import checkpoint_file
from dynaslim.recipes import DemoOptions, GateRecipe, RunOptions, SupernetRecipe
from dynaslim.zoo import get_spec


def demo(*, out: Path = Path("runs/demo"), options: DemoOptions, json: bool = False) -> None:
    """Train a small network in both stages on real images, evaluate it and show the savings.

    Args:
        out: Folder for the checkpoint, the results and the picture.
        options: How the network is trained.
        json: Print one JSON object.
    """
    from dynaslim.demo import run_demo

    done = run_demo(out, options)
    if json:
        print_json(done.to_dict())
        return
    echo(evaluation_table(done.evaluation, done.budgeted))
    echo(saving(done.evaluation, done.budgeted))
    if options == DemoOptions():
        echo(done.beside_readme())
    echo("")
    print_files(done.files)


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
            echo(f"{name}: {result['images']} held-out images")
            echo(routes_table(result))

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
        lambda results: echo(gates_table(results)),
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
    # of several processes only the first prints; their group is closed by now, but torchrun's
    # variables are still set
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    if json:
        print_json(results)
        return 0
    images = (results["train_images"], results["val_images"], len(results["skipped"]))
    echo("{} images trained on, {} held out, {} skipped".format(*images))
    print_skipped(results["skipped"])
    show(results)
    print_files(results["files"])
    return 0
