"""Output: tables for people, JSON for scripts, and one-line errors."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dynaslim._files import is_shown
from dynaslim.data.skipped import report_lines
from dynaslim.errors import DynaslimError

if TYPE_CHECKING:
    from dynaslim.evaluation import Evaluation
    from dynaslim.runtime.calibrate_budget import Outcome


def _route_cells(widths: Sequence[int], madds: float, top1: float) -> tuple[str, str, str]:
    return "-".join(map(str, widths)), f"{madds / 1e6:.2f} M", f"{top1:.2%}"


def evaluation_table(result: Evaluation, budgeted: tuple[float, Outcome] | None = None) -> Any:
    """A table of an evaluation: the routes by cost, then the dynamic mode.

    `budgeted` is a budget (a share of the widest route's cost) and its outcome on these images.
    """
    shares = {}
    if result.dynamic is not None:
        shares = {share.widths: share.share for share in result.dynamic.route_shares}
    table = new_table("route", "MAdds", "top-1", "share of images")
    uniform = {route.widths for route in result.routes}
    for route in result.routes:
        share = shares.get(route.widths)
        shown = "" if share is None else f"{share:.1%}"
        table.add_row(*_route_cells(route.widths, route.madds, route.top1), shown)
    others = sum(share for widths, share in shares.items() if widths not in uniform)
    if others:
        table.add_row("other combinations", "", "", f"{others:.1%}")
    dynamic = []
    if result.dynamic is not None:
        dynamic.append(("gate", result.dynamic.mean_madds, result.dynamic.top1))
    if budgeted is not None:
        budget, outcome = budgeted
        dynamic.append((f"budget {budget:g}", outcome.madds, outcome.top1))
    if dynamic:
        table.add_section()
    for name, madds, top1 in dynamic:
        table.add_row(f"dynamic ({name})", f"{madds / 1e6:.2f} M", f"{top1:.2%}", "100.0%")
    return table


def saving(result: Evaluation, budgeted: tuple[float, Outcome] | None = None) -> str:
    """A sentence comparing the gate's multiply-adds and accuracy with the widest route's, or "".

    A second sentence compares the budget in `budgeted` (as for `evaluation_table`), if given.
    """
    if result.dynamic is None:
        return ""
    widest = max(result.routes, key=lambda route: route.madds)

    def saved(madds: float) -> str:
        return f"{1 - madds / widest.madds:.0%}"

    def change(top1: float, of: str) -> str:
        points = 100 * (top1 - widest.top1)
        return f"{abs(points):.2f} points{of} {'more' if points > 0 else 'less'}"

    gate = result.dynamic
    sentence = (
        f"Against the widest route the gate saves {saved(gate.mean_madds)} of the multiply-adds, "
        f"for {change(gate.top1, ' of top-1')}."
    )
    if budgeted is not None:
        share, outcome = budgeted
        sentence += (
            f"\nA budget of {share:g} saves {saved(outcome.madds)}, "
            f"for {change(outcome.top1, '')}: "
            f"{outcome.escalated:.0%} of the images escalated."
        )
    return sentence


def class_table(result: Evaluation) -> Any:
    """A table of accuracy and cost of each class in the dynamic mode, costliest first."""
    table = new_table("class", "images", "top-1", "mean MAdds")
    rows = [entry for entry in result.per_class if entry.images]
    for entry in sorted(rows, key=lambda entry: (-(entry.mean_madds or 0), entry.index)):
        table.add_row(
            printable(entry.name or str(entry.index)),
            str(entry.images),
            f"{entry.top1:.2%}",
            "" if entry.mean_madds is None else f"{entry.mean_madds / 1e6:.2f} M",
        )
    return table


def routes_table(result: Mapping[str, Any]) -> Any:
    """A table of the routes in an evaluation's summary (`Evaluation.to_dict`)."""
    table = new_table("route", "MAdds", "top-1", "top-5", "loss")
    for route in result["routes"]:
        cells = _route_cells(route["widths"], route["madds"], route["top1"])
        table.add_row(*cells, f"{route['top5']:.2%}", f"{route['loss']:.3f}")
    return table


def gates_table(results: Mapping[str, Any]) -> Any:
    """A table of the gates that a run trained, and of the uniform routes for comparison."""
    table = new_table("", "MAdds", "top-1", "cost / widest")
    for route in results["routes"]:
        table.add_row(*_route_cells(route["widths"], route["madds"], route["top1"]), "")
    table.add_section()
    for gate in results["gates"]:
        aim = "no target" if gate["target"] is None else f"target {gate['target']:g}"
        if gate["val"] is None:
            table.add_row(f"dynamic, {aim}", "", "not measured: no image held out", "")
            continue
        dynamic = gate["val"]["dynamic"]
        table.add_row(
            f"dynamic, {aim}",
            f"{dynamic['mean_madds'] / 1e6:.2f} M",
            f"{dynamic['top1']:.2%}",
            f"{gate['cost_share']:.3f}",
        )
    return table


def print_skipped(lines: Sequence[str]) -> None:
    """Print the images that were skipped."""
    for line in report_lines(lines):
        echo(line)


def print_files(files: Mapping[str, object]) -> None:
    """Print the files of a run, one per line."""
    for label, path in files.items():
        echo(f"{label:<11} {path}")


def new_table(*columns: str) -> Any:
    """A table whose first column is left-aligned text, and whose other columns are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def help_columns() -> int:
    """Width of help in characters: that of the terminal, at most 100."""
    return min(shutil.get_terminal_size().columns, 100)


def shell_lines(command: str, columns: int) -> list[str]:
    """Break a command into lines to paste into a shell; each flag stays with its value."""
    words = re.sub(r"( --?\S+) (?=[^-])", "\\1\0", command).split(" ")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 1 <= columns - 2:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    lines = [line.replace("\0", " ") for line in lines]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def echo(what: Any, end: str = "\n") -> None:
    """Print text or a table to standard output."""
    if isinstance(what, str):
        sys.stdout.write(what + end)
        return
    from rich.console import Console

    # a pipe has no width: do not fold lines that a script or a log will read
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(what)


def printable(text: str) -> str:
    """Escape control and text-direction characters in a name, for safe printing in a terminal."""
    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def print_json(value: object) -> None:
    """Print one JSON value to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def errors_as_data(json: bool) -> Iterator[None]:
    """With --json, print an error as a JSON object before it is raised again."""
    try:
        yield
    except DynaslimError as error:
        if json:
            print_json({"error": str(error), **error.details})
        raise


def fail(message: str, code: int) -> int:
    """Print an error in one line; returns the exit code."""
    sys.stderr.write(f"dynaslim: {message}\n")
    return code
