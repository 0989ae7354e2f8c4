"""Verbs that train networks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim.cli.output import (
    echo,
    evaluation_table,
    fail,
    gates_table,
    new_table,
    print_files,
    print_json,
    print_skipped,
    routes_table,
    saving,
)
from dynaslim.model_names import checkpoint_file
from dynaslim.recipes import AdaptOptions, DemoOptions, GateRecipe, RunOptions, SupernetRecipe
from dynaslim.shipped import PRETRAINED
from dynaslim.zoo import get_spec

if TYPE_CHECKING:
    from dynaslim.report.data import ReportData


def demo(*, out: Path = Path("runs/demo"), options: DemoOptions, json: bool = False) -> None:
    """Train a small network in both stages on real images, evaluate it and show the savings.

    Args:
        out: Folder for the checkpoint, the results and the plot.
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
    """Stage I: train a supernet. It can be stopped at any time and resumed with --resume.

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
    """Stage II: train the gates of a supernet, with one checkpoint for each target cost.

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


MODE_FIELDS: Final = ("kind", "name", "top1", "interval", "madds", "ms", "weights")
"""Fields of each mode (a way to run the network) in the JSON."""


def adapt(
    model: str, *, out: Path, options: AdaptOptions, run: RunOptions, json: bool = False
) -> int:
    """Make a trained network cost less on your images: one run, from the weights to the report.

    The network learns the classes, if it does not have them. Its channels are sorted, narrower
    routes and then a gate are trained, and budgets are calibrated on held-out images. The run can
    be stopped at any time and continued with --resume.

    Args:
        model: efficientnet_lite0 (or 1, 2), timm:NAME, torchvision:NAME, module:FILE.py:FUNCTION (a
            function that returns a torch module, alone or with its Preprocessing; the file is
            executed), or a checkpoint.
        out: Folder of the run.
        options: How the network is adapted.
        run: How the run works on this machine.
        json: Print one JSON object.
    """
    from dynaslim.data.layout import check_path

    if ":" in model:
        check_path(options.data)
    elif model not in PRETRAINED:
        checkpoint_file(model)

    from dynaslim.adaptation import adapt as adapted
    from dynaslim.runs import Stopped

    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    try:
        done = adapted(model, chosen.pop("data"), out, run=run, **chosen)
    except Stopped as stopped:
        return fail(f"{stopped}; go on with the same command and --resume", stopped.exit_code)
    if json:
        print_json(
            {
                "modes": [
                    {name: getattr(mode, name) for name in MODE_FIELDS} for mode in done.data.modes
                ],
                "verdict": done.verdict,
                "files": {name: str(path) for name, path in done.files.items()},
            }
        )
        return 0
    echo(_modes_table(done.data))
    echo(done.verdict)
    print_files(done.files)
    return 0


def _modes_table(data: ReportData) -> Any:
    """A table of every way to run the network, the original network first."""
    from dynaslim.report.text import megabytes

    table = new_table("", "MAdds", "top-1", "95% interval", "ms per image", "speed", "weights")
    baselines = [mode for mode in data.modes if mode.kind == "baseline"]
    reference = baselines[0].ms
    for mode in (*baselines, *(mode for mode in data.modes if mode.kind != "baseline")):
        ends = mode.interval
        table.add_row(
            mode.name,
            "" if mode.madds is None else f"{mode.madds / 1e6:.1f} M",
            f"{mode.top1:.2%}",
            "" if ends is None else f"{ends.low:.1%} to {ends.high:.1%}",
            "" if mode.ms is None else f"{mode.ms:.3g}",
            "" if mode.ms is None or reference is None else f"{reference / mode.ms:.2f}x",
            megabytes(mode.weights),
            end_section=mode.kind == "baseline",
        )
    return table


def _check_named(data: str, checkpoint: str | None) -> None:
    """Raise `DynaslimError` if images or a checkpoint do not exist, without importing torch."""
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
    # of several processes only the first prints; their process group is closed by now, but
    # torchrun's environment variables are still set
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
