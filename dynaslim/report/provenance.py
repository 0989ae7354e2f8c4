"""The last part of a report: recipe, environment, what the checkpoint is, and how to repeat it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dynaslim.bench.timing import hardware
from dynaslim.cost import params
from dynaslim.report import text
from dynaslim.report.charts import Table
from dynaslim.report.facts import Facts

_LONGEST: Final = 20_000
"""Characters of a recipe on the page."""
_ENVIRONMENT: Final = (
    ("started", "started"),
    ("processor", "processor"),
    ("cores", "cores"),
    ("threads", "threads"),
    ("gpus", "GPUs"),
    ("platform", "system"),
    ("python", "Python"),
    ("torch", "torch"),
    ("dynaslim", "dynaslim"),
)


@dataclass(frozen=True)
class Provenance:
    """How the network and the report came to be."""

    checkpoint: Table
    trained_on: Table | None
    reported_on: Table
    recipe: str
    commands: tuple[tuple[str, str], ...]
    """(what it does, the command)."""


def provenance(facts: Facts) -> Provenance:
    """All of it; what the run did not write down is not there."""
    return Provenance(
        _checkpoint(facts),
        _environment(facts),
        _table(hardware()),
        _recipe(facts.subject.chosen.checkpoint.recipe),
        _commands(facts),
    )


def _checkpoint(facts: Facts) -> Table:
    chosen, spec = facts.subject.chosen, facts.spec
    content = chosen.file.read_bytes()
    pre = chosen.checkpoint.preprocessing
    gates = "; ".join(
        f"gate {number} chooses among {len(gate.choices)} widths"
        for number, gate in enumerate(spec.gates)
    )
    rows = {
        "file": str(chosen.file),
        "size": f"{len(content) / 1e6:.2f} MB",
        "SHA-256": hashlib.sha256(content).hexdigest(),
        "network": f"{spec.name}, {params(spec) / 1e6:.2f} M parameters",
        "classes": text.count(spec.num_classes),
        "input": text.NONE
        if pre is None
        else f"{pre.image_size_px} x {pre.image_size_px} px, {pre.channels} channel"
        + ("" if pre.channels == 1 else "s"),
        "routes": f"{len(spec.routes)} uniform, {len(spec.routing_space)} that gates can take"
        if spec.gates
        else f"{len(spec.routes)}",
        "gates": gates or "none",
    }
    opened = facts.opened
    if opened is not None:
        part = f"split {opened.split}"
        if opened.held_back is not None:
            part = f"the {opened.held_back:.0%} of split {opened.split} that training held back"
        rows["evaluated on"] = f"{opened.data}, {part}: {text.count(len(opened.images))} images"
        if opened.whole > len(opened.images):
            rows["evaluated on"] += f" at random of {text.count(opened.whole)}"
    return _table(rows)


def _environment(facts: Facts) -> Table | None:
    """What the run was last started on; the demo writes it among its results."""
    subject = facts.subject
    found: Any = subject.environments[-1] if subject.environments else None
    if found is None and subject.results is not None:
        found = subject.results.get("environment")
    if not isinstance(found, Mapping):
        return None
    rows = {}
    for key, label in _ENVIRONMENT:
        value = found.get(key)
        if value in (None, [], ""):
            continue
        rows[label] = ", ".join(map(str, value)) if isinstance(value, list) else value
    if len(subject.environments) > 1:
        rows["starts"] = len(subject.environments)
    return _table(rows) if rows else None


def _table(rows: Mapping[str, object]) -> Table:
    return Table(
        (), tuple((text.clean(key), text.clean(str(value))) for key, value in rows.items())
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML."""
    import yaml

    if not recipe:
        return ""
    written: str = yaml.safe_dump(
        json.loads(json.dumps(recipe)), sort_keys=False, allow_unicode=True
    )
    return text.shorten("\n".join(map(text.clean, written.splitlines())), _LONGEST)


def _commands(facts: Facts) -> tuple[tuple[str, str], ...]:
    subject, opened, request = facts.subject, facts.opened, facts.request
    file = str(subject.chosen.file)
    images: list[str] = []
    named = "PATH"
    if opened is not None:
        named = opened.data
        if opened.held_back is None and opened.split != "test":
            images = ["--split", opened.split]
    found = []
    trained = _training_command(facts)
    if trained:
        found.append(("train it", trained))
    if opened is None or opened.held_back is None:
        evaluate = ["dynaslim", "evaluate", file, "--data", named, *images]
        found.append(("evaluate it", shlex.join(evaluate)))
    report = ["dynaslim", "report", str(subject.path), "-o", "report.html"]
    for flag in ("data", "split", "target", "images", "baselines"):
        value = getattr(request, flag)
        if value is not None:
            report += [f"--{flag}", f"{value:g}" if flag == "target" else str(value)]
    if facts.times is not None:
        report += ["--backend", facts.times.backend]
    found.append(("make this report", shlex.join(report)))
    if subject.chosen.has_gates:
        if opened is not None and opened.held_back is None:
            bench = ["dynaslim", "bench", file, "--mix", "real", "--data", named, *images]
            found.append(("time it against the ideal", shlex.join(bench)))
        export = ["dynaslim", "export", file, "package"]
        found.append(("take it elsewhere", shlex.join(export)))
    elif facts.spec.gates:
        train = ["dynaslim", "train", "gate", "--supernet", file, "--out", "runs/gates"]
        train += ["--targets", "0.4,0.6,0.8", "--data.path", named]
        found.append(("train gates for it", shlex.join(train)))
    return tuple((what, text.clean(command)) for what, command in found)


def _training_command(facts: Facts) -> str:
    """The command that the run was started by, or the demo's, from its recipe."""
    subject = facts.subject
    if subject.environments:
        command = subject.environments[-1].get("command")
        if isinstance(command, list) and command:
            words = [str(word) for word in command]
            return shlex.join([Path(words[0]).name, *words[1:]])
    recipe = subject.chosen.checkpoint.recipe
    stages = [recipe.get(stage) for stage in ("supernet", "gate")]
    if subject.kind != "demo" or not all(isinstance(stage, Mapping) for stage in stages):
        return ""
    supernet, gate = stages
    assert isinstance(supernet, Mapping)
    assert isinstance(gate, Mapping)
    command = ["dynaslim", "demo", "--epochs", str(supernet.get("epochs"))]
    targets = gate.get("targets")
    if isinstance(targets, list) and targets:
        command += ["--target", f"{targets[0]}"]
    return shlex.join([*command, "--seed", str(supernet.get("seed"))])
