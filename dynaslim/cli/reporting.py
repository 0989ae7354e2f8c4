"""`dynaslim report`: an HTML page on a run."""

from __future__ import annotations

from pathlib import Path

from dynaslim._files import check_writable, write_atomic
from dynaslim.cli.measure import check_device, to_device
from dynaslim.cli.output import echo, print_json
from dynaslim.model_names import run_or_checkpoint
from dynaslim.recipes import ReportOptions


def report(
    run: Path, *, out: Path = Path("report.html"), options: ReportOptions, json: bool = False
) -> None:
    """Make a page (HTML) that shows a run: accuracy, cost, time, routes, images, training.

    Args:
        run: The folder of a run or of the demo, a checkpoint file, a folder of save_pretrained, an
            hf:// address, or the name of a model that ships.
        out: The page to write (.html); one file that needs nothing else.
        options: How the report is made.
        json: Print one JSON object.
    """
    from dynaslim.data.layout import check_path

    run_or_checkpoint(run)
    check_writable(out)
    check_device(options.device)
    if options.data is not None:
        check_path(options.data)

    from dynaslim.report import build_report

    to_device(options.device)
    made = build_report(run, options)
    write_atomic(out, made.html.encode())
    if json:
        print_json({"out": str(out), **made.summary})
        return
    for note in made.summary["notes"]:
        echo(note)
    echo(f"{out}: {made.summary['headline']}")
