"""The report of a run as one page of HTML that asks for nothing else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from dynaslim.report import text
from dynaslim.report.costs import costs
from dynaslim.report.facts import Facts, Request, gather
from dynaslim.report.headline import headline
from dynaslim.report.plots import BLUE, GREEN, ORANGE
from dynaslim.report.provenance import provenance
from dynaslim.report.sections import (
    class_names,
    classes,
    confidence,
    confusions,
    gallery,
    route_columns,
    taken_table,
    training,
)
from dynaslim.report.timing import CHOSEN_GATE, route_mode
from dynaslim.version import __version__


@dataclass(frozen=True)
class Report:
    """A page, and its main numbers as plain JSON values."""

    html: str
    summary: dict[str, Any]


def make_report(
    run: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    target: float | None = None,
    images: int | None = None,
    baselines: str | Path | None = None,
    title: str | None = None,
    backend: str = "auto",
    rounds: int | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> str:
    """A page of HTML on a run: evaluated on images, timed on this machine.

    `run` is the folder of a run or of the demo, or a checkpoint. `data` and `split` name the
    images; by default they are those that training held back, where they still are. `images` takes
    so many of them. `target` picks the gate of a run with several that the details are of.
    `baselines` is a JSON file of static networks, `[{"name", "top1", "madds", "ms"}]`. `rounds` of
    timing in turn, by default as many as take ten seconds; 0 leaves milliseconds out.

    Raises:
        UsageError: if there is no run, or an argument makes no sense.
        CheckpointError: if a checkpoint cannot be read.
        DataError: if images that were named cannot be read or do not fit the network.
    """
    request = Request(
        Path(run),
        data=data,
        split=split,
        target=target,
        images=images,
        baselines=None if baselines is None else Path(baselines),
        backend=backend,
        rounds=rounds,
        batch_size=batch_size,
        device=device,
    )
    return build_report(request, title=title).html


def build_report(request: Request, *, title: str | None = None) -> Report:
    """As `make_report`, with the main numbers beside the page."""
    facts = gather(request)
    return Report(render(facts, title), summarise(facts))


def render(facts: Facts, title: str | None = None) -> str:
    """The page; all that it is given is escaped, whatever it holds."""
    columns, names = route_columns(facts), class_names(facts)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title or _default_title(facts),
            subtitle=_subtitle(facts),
            style=_style(),
            headline=headline(facts),
            notes=facts.notes,
            costs=costs(facts),
            columns=columns,
            taken=taken_table(facts, columns),
            classes=classes(facts, columns, names),
            gallery=gallery(facts, columns, names),
            confidence=confidence(facts),
            training=training(facts.subject.curves),
            confusion=confusions(facts, names),
            making=provenance(facts),
            gated=facts.subject.chosen.has_gates,
            version=__version__,
        )
    )


def summarise(facts: Facts) -> dict[str, Any]:
    """The main numbers as plain JSON values; times in ms per image."""
    numbers, times = facts.numbers, facts.times

    def ms(mode: str) -> float | None:
        return None if times is None else times.median(mode)

    dynamic = None if numbers is None else numbers.dynamic
    difference = facts.against_widest
    opened = facts.opened
    return {
        "headline": headline(facts).lead,
        "kind": facts.subject.kind,
        "checkpoint": str(facts.subject.chosen.file),
        "target": facts.subject.chosen.target,
        "data": None if opened is None else opened.data,
        "split": None if opened is None else opened.split,
        "images": None if numbers is None else numbers.images,
        "backend": None if times is None else times.backend,
        "routes": [
            {
                "widths": list(route.widths),
                "madds": route.madds,
                "top1": route.top1,
                "ms": ms(route_mode(route.widths)),
            }
            for route in (() if numbers is None else numbers.routes)
        ],
        "dynamic": None
        if dynamic is None
        else {
            "madds": dynamic.mean_madds,
            "top1": dynamic.top1,
            "ms": ms(CHOSEN_GATE),
            "against_widest": None if difference is None else difference._asdict(),
        },
        "notes": list(facts.notes),
    }


def _style() -> Markup:
    sheet = _environment().get_template("report.css.j2")
    return Markup(sheet.render(blue=BLUE, orange=ORANGE, green=GREEN))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dynaslim.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )


def _finalize(value: Any) -> Any:
    """What a page cannot hold is replaced in all text, wherever it comes from."""
    return text.clean(value) if type(value) is str else value


def _default_title(facts: Facts) -> str:
    data = _data_name(facts)
    return facts.spec.name if data is None else f"{facts.spec.name} on {data}"


def _data_name(facts: Facts) -> str | None:
    """What the images are called: the last part of where they lie."""
    if facts.opened is None:
        return None
    path = Path(facts.opened.data)
    return path.parent.name if path.suffix == ".parquet" and path.parent.name else path.name


def _subtitle(facts: Facts) -> str:
    kind = facts.subject.kind
    parts = [f"{kind[0].upper()}{kind[1:]}: {facts.subject.path}"]
    if facts.opened is not None:
        opened = facts.opened
        where = "held-out images" if opened.held_back is not None else f"{opened.split} images"
        number = text.count(facts.evaluation.images if facts.evaluation else len(opened.images))
        parts.append(f"{number} {where}")
    elif facts.numbers is not None:
        parts.append(f"{text.count(facts.numbers.images)} images, as stored by training")
    parts.append(time.strftime("%Y-%m-%d"))
    return " · ".join(parts)
