"""The verb that adapts a trained network to images."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim.cli.output import echo, fail, new_table, print_files, print_json
from dynaslim.model_names import checkpoint_file
from dynaslim.recipes import AdaptOptions, RunOptions
from dynaslim.shipped import PRETRAINED

if TYPE_CHECKING:
    from dynaslim.report.data import ReportData

SHOWN: Final = ("kind", "name", "top1", "interval", "madds", "ms", "weights")
"""Fields of a mode in the JSON."""


def adapt(
    model: str, *, out: Path, options: AdaptOptions, run: RunOptions, json: bool = False
) -> int:
    """Make a trained network cost less on your images: one run, from the weights to the report.

    The network learns the classes, if it does not have them; its channels are sorted, narrower
    routes are trained beside it, then a gate, and budgets on images held out. Stop it at any moment
    and go on with --resume.

    Args:
        model: timm:NAME, torchvision:NAME, module:FILE.py:FUNCTION (a function that returns a torch
            module; the file is run), or a checkpoint.
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
                    {name: getattr(mode, name) for name in SHOWN} for mode in done.data.modes
                ],
                "verdict": done.verdict,
                "files": {name: str(path) for name, path in done.files.items()},
            }
        )
        return 0
    echo(_table(done.data))
    echo(done.verdict)
    print_files(done.files)
    return 0


def _table(data: ReportData) -> Any:
    """Every way to run the network, the original first."""
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
