"""Renders the report of a run as a single HTML page without external resources."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from dynaslim.bench.timing import hardware
from dynaslim.cost import params
from dynaslim.recipes import ReportOptions
from dynaslim.report import charts, sections, text
from dynaslim.report.data import ReportData, gather
from dynaslim.report.timing import BATCH_SIZE, gate_mode, route_mode
from dynaslim.runtime.budget_search import accuracy_interval
from dynaslim.version import __version__

_MAX_RECIPE: Final = 20_000
"""Most characters of a recipe that are shown."""
_FILTERS: Final = (
    *("count", "interval", "megabytes", "millions", "milliseconds", "percent", "plural", "points"),
    *("three_digits", "times", "widths_of"),
)
"""Functions of `dynaslim.report.text` that templates use."""

_ENVIRONMENT: Final = {
    "started": "started",
    "processor": "processor",
    "cores": "cores",
    "threads": "threads",
    "gpus": "GPUs",
    "platform": "system",
    "python": "Python",
    "torch": "torch",
    "dynaslim": "dynaslim",
}
"""Labels on the page by key of a run's environment."""


@dataclass(frozen=True)
class Report:
    """An HTML page, and its main numbers as JSON values."""

    html: str
    summary: dict[str, Any]


def make_report(run: str | Path, **options: Any) -> str:
    """An HTML page about a run, which is evaluated on images and timed on this machine.

    `run` is the folder of a run, of the demo or of a package, or a checkpoint; `options` are the
    fields of `ReportOptions`.

    Raises:
        UsageError: if there is no run, or an argument is invalid.
        CheckpointError: if a checkpoint cannot be read.
        DataError: if given images cannot be read or do not fit the network.
    """
    return build_report(run, ReportOptions(**options)).html


def build_report(run: str | Path, options: ReportOptions) -> Report:
    """Like `make_report`, but also returns the main numbers."""
    return render(gather(run, options))


def render(data: ReportData) -> Report:
    """Render the data of a report."""
    # each paragraph of the template is a sentence; the first is the headline
    paragraphs = _environment().get_template("headline.txt.j2").render(_context(data)).split("\n\n")
    headline = [sentence for one in paragraphs if (sentence := " ".join(one.split()))]
    return Report(_page(data, headline), _summary(data, headline[0]))


def _page(data: ReportData, headline: list[str]) -> str:
    columns, names = sections.route_columns(data), sections.class_names(data)
    has_costs = data.metrics is not None and bool(data.metrics.routes or data.metrics.dynamic)
    suffixes = {
        "dynamic": ", by target" if len(data.gates) > 1 else "",
        "budget": "" if data.images is not None else " (as calibration measured them)",
    }
    training = [
        (curves.title, charts.loss_chart(curves.lines), charts.accuracy_chart(curves.lines))
        for curves in data.run.curves
    ]
    style = _environment().get_template("report.css.j2").render(colours=charts.COLOURS)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            _context(data),
            title=data.options.title or _default_title(data),
            style=Markup(style),
            headline=headline,
            madds_chart=charts.cost_chart(data.modes, suffixes, by_ms=False) if has_costs else None,
            ms_chart=charts.cost_chart(data.modes, suffixes, by_ms=True)
            if has_costs and data.times is not None
            else None,
            taken=sections.taken_routes(data, columns),
            classes=sections.classes(data, columns, names),
            names=names,
            gallery=sections.gallery(data, columns, names),
            confidences=sections.confidences(data),
            training=[one for one in training if one[1] or one[2]],
            confusions=sections.confusions(data, names),
            file=data.run.model.file.read_bytes(),
            params=params(data.spec),
            started_on=_started_on(data),
            commands=_commands(data),
            recipe=_recipe_text(data.run.model.checkpoint.recipe),
        )
    )


def _context(data: ReportData) -> dict[str, Any]:
    return {"data": data, "metrics": data.metrics, "spec": data.spec, "times": data.times}


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dynaslim.report", "templates"),
        autoescape=lambda name: name is None or name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # replace characters that HTML cannot contain
        finalize=lambda value: value if hasattr(value, "__html__") else text.clean(str(value)),
    )
    environment.filters |= {name: getattr(text, name) for name in _FILTERS} | {"g": "{:g}".format}
    environment.globals |= {
        "BATCH_SIZE": BATCH_SIZE,
        "NONE": text.NONE,
        "version": __version__,
        "gate_mode": gate_mode,
        "route_mode": route_mode,
        "accuracy_interval": accuracy_interval,
        "hardware": hardware,
        "sha256": lambda content: hashlib.sha256(content).hexdigest(),
        "today": lambda: time.strftime("%Y-%m-%d"),
    }
    return environment


def _summary(data: ReportData, headline: str) -> dict[str, Any]:
    """The main numbers as JSON values; times are in ms per image."""
    metrics, times, images, model = data.metrics, data.times, data.images, data.run.model
    dynamic, difference = metrics and metrics.dynamic, data.against_widest
    return {
        "headline": headline,
        "kind": data.run.kind,
        "checkpoint": str(model.file),
        "target": model.target,
        "data": images and images.data,
        "split": images and images.split,
        "images": metrics and metrics.images,
        "backend": times and times.backend,
        "routes": [
            {
                "widths": list(route.widths),
                "madds": route.madds,
                "top1": route.top1,
                "ms": times and times.median(route_mode(route.widths)),
            }
            for route in (metrics.routes if metrics else ())
        ],
        "dynamic": dynamic
        and {
            "madds": dynamic.mean_madds,
            "top1": dynamic.top1,
            "ms": times and times.median(gate_mode(0)),
            "against_widest": difference and difference._asdict(),
        },
        "notes": list(data.notes),
    }


def _default_title(data: ReportData) -> str:
    """The network's name and the last part of the path of its images."""
    if data.images is None:
        return data.spec.name
    path = Path(data.images.data)
    folder = path.suffix == ".parquet" and path.parent.name
    return f"{data.spec.name} on {folder or path.name}"


def _started_on(data: ReportData) -> list[tuple[str, object]]:
    """Versions and hardware at the run's last start; the demo stores them in its results."""
    starts = data.run.environments
    found = starts[-1] if starts else data.run.results and data.run.results.get("environment")
    if not isinstance(found, Mapping):
        return []
    rows: list[tuple[str, object]] = []
    for key, label in _ENVIRONMENT.items():
        value = found.get(key)
        if value not in (None, [], ""):
            value = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((label, value))
    return [*rows, ("starts", len(starts))] if len(starts) > 1 else rows


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    import yaml

    if not recipe:
        return ""
    plain = json.loads(json.dumps(recipe))
    written: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text.shorten(written.rstrip("\n"), _MAX_RECIPE)


# -- commands -------------------------------------------------------------------------------------


def _commands(data: ReportData) -> dict[str, str]:
    """Shell commands, by purpose, that repeat the run and the report."""
    run, images, file = data.run, data.images, str(data.run.model.file)
    source = ["--data", "PATH" if images is None else images.data]
    held_back = images is not None and images.held_back is not None
    if images is not None and not held_back and images.split != "test":
        source += ["--split", images.split]
    commands: dict[str, list[str]] = {"train it": _training_command(data)}
    if not held_back:
        commands["evaluate it"] = ["dynaslim", "evaluate", file, *source]
    report = ["dynaslim", "report", str(run.path), "-o", "report.html"]
    for flag in ("data", "split", "target", "images", "baselines"):
        value = getattr(data.options, flag)
        if value is not None:
            report += [f"--{flag}", f"{value:g}" if flag == "target" else str(value)]
    if data.times is not None:
        report += ["--backend", data.times.backend]
    commands["make this report"] = report
    if run.model.has_trained_gates:
        if images is not None and not held_back:
            bench = ["dynaslim", "bench", file, "--mix", "real", *source]
            commands["time it against the ideal"] = bench
        commands["take it elsewhere"] = ["dynaslim", "export", file, "package"]
    elif data.spec.gates:
        train = ["dynaslim", "train", "gate", "--supernet", file, "--out", "runs/gates"]
        train += ["--targets", "0.4,0.6,0.8", "--data.path", source[1]]
        commands["train gates for it"] = train
    return {what: shlex.join(command) for what, command in commands.items() if command}


def _training_command(data: ReportData) -> list[str]:
    """The command that started the run; for the demo, rebuilt from its recipe; [] if unknown."""
    run = data.run
    if run.environments:
        command = run.environments[-1].get("command")
        if isinstance(command, list) and command:
            first, *rest = map(str, command)
            return [Path(first).name, *rest]
    supernet, gate = (run.model.checkpoint.recipe.get(stage) for stage in ("supernet", "gate"))
    if run.kind != "demo" or not isinstance(supernet, Mapping) or not isinstance(gate, Mapping):
        return []
    command = ["dynaslim", "demo", "--epochs", str(supernet.get("epochs"))]
    targets = gate.get("targets")
    if isinstance(targets, list) and targets:
        command += ["--target", f"{targets[0]}"]
    return [*command, "--seed", str(supernet.get("seed"))]
