"""What a report is of: the folder of a run, the demo's, or one checkpoint; and what lies there.

Only the checkpoints have to be sound. What else a folder holds may be missing, cut short or not
ours: it is left out then, and `Subject.notes` says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from dynaslim.checkpoint import Checkpoint, read
from dynaslim.errors import UsageError
from dynaslim.pretrained import run_checkpoints

Kind = Literal["supernet run", "gate run", "demo", "checkpoint"]

METRICS: Final = "metrics.jsonl"
_EXPECTED: Final = (
    "expected a checkpoint file, or the folder of a run: with gate*.safetensors, last.safetensors, "
    "best.safetensors or (the demo's) checkpoint.safetensors"
)


@dataclass(frozen=True)
class Trained:
    """A checkpoint of the run, and the mean cost that its gate was trained for, if any."""

    file: Path
    checkpoint: Checkpoint
    target: float | None = None

    @property
    def has_gates(self) -> bool:
        """Whether its gates are there and have learnt something.

        A network of stage I has gates too, with the weights that they were made with.
        """
        recipe = self.checkpoint.recipe
        return bool(self.checkpoint.net.spec.gates) and not (
            "supernet" in recipe and "gate" not in recipe
        )

    @property
    def label(self) -> str:
        """What tells it from the others of its run."""
        return "dynamic" if self.target is None else f"dynamic, target {self.target:g}"


@dataclass(frozen=True)
class Curves:
    """The lines of a metrics file, and whose they are."""

    title: str
    lines: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Subject:
    """The networks of a run and the files beside them."""

    path: Path
    kind: Kind
    chosen: Trained
    """The network that the details are of."""
    gates: tuple[Trained, ...]
    """Every trained gate of the run by its target, the chosen one among them."""
    curves: tuple[Curves, ...] = ()
    environments: tuple[Mapping[str, Any], ...] = ()
    """What the run was started on, one entry for every start."""
    results: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    """What could not be read."""


def find_subject(path: str | Path, target: float | None = None) -> Subject:
    """Read what is at `path`; `target` picks one of several gates, by default the middle one.

    Raises:
        UsageError: if there is nothing there to report on, or no gate for the target.
        CheckpointError: if a checkpoint there cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; {_EXPECTED}")
    if path.is_file():
        kind: Kind = "checkpoint"
        networks = [_trained(path)]
    else:
        kind, files = _checkpoints_of(path)
        networks = [_trained(file) for file in files]
    networks.sort(key=lambda one: (one.target is not None, one.target or 0.0, one.file.name))
    chosen = _choose(path, networks, target)
    gates = tuple(one for one in networks if one.has_gates)
    if path.is_file():
        return Subject(path, kind, chosen, gates)
    notes: list[str] = []
    found = _read_json(path / "results.json", dict, notes)
    started = _read_json(path / "environment.json", list, notes) or []
    return Subject(
        path,
        kind,
        chosen,
        gates,
        curves=tuple(_all_curves(path, kind, chosen, networks)),
        environments=tuple(entry for entry in started if isinstance(entry, dict)),
        results=found,
        notes=tuple(notes),
    )


def _checkpoints_of(folder: Path) -> tuple[Kind, list[Path]]:
    found = run_checkpoints(folder)
    if found:
        first = found[0].stem
        gates = first.startswith("gate")
        return "gate run" if gates else "demo" if first == "checkpoint" else "supernet run", found
    if (folder / METRICS).is_file():
        raise UsageError(f"{folder}: the run has written no checkpoint yet; let it go on")
    raise UsageError(f"{folder}: holds no run; {_EXPECTED}")


def _trained(file: Path) -> Trained:
    checkpoint = read(file)
    target = checkpoint.recipe.get("target")
    if isinstance(target, int | float) and 0 < target <= 1:
        return Trained(file, checkpoint, float(target))
    return Trained(file, checkpoint)


def _choose(path: Path, networks: Sequence[Trained], target: float | None) -> Trained:
    if target is None:
        return networks[len(networks) // 2]
    for one in networks:
        if one.target is not None and math.isclose(one.target, target, rel_tol=1e-6):
            return one
    known = ", ".join(f"{one.target:g}" for one in networks if one.target is not None)
    raise UsageError(
        f"--target {target:g}: {path} has "
        + (f"gates for {known}" if known else "no gates for targets; leave it out")
    )


def _all_curves(
    folder: Path, kind: Kind, chosen: Trained, networks: Sequence[Trained]
) -> list[Curves]:
    """Those of the run, of a gate run those of the chosen gate; and those of its supernet."""
    lines = read_lines(folder / METRICS)
    if kind != "gate run":
        return [Curves("Training", lines)] if lines else []
    found = []
    gate = chosen.checkpoint.recipe.get("gate")
    supernet = gate.get("supernet") if isinstance(gate, Mapping) else None
    if isinstance(supernet, str) and supernet:
        beside = Path(supernet).parent
        # runs that were moved, or are looked at from elsewhere, are mostly still neighbours
        first = read_lines(beside / METRICS) or read_lines(folder.parent / beside.name / METRICS)
        if first:
            found.append(Curves("Stage I: the supernet", first))
    own = networks.index(chosen)
    # gates are trained in the order of the recipe, which may not be that of their targets
    targets = gate.get("targets") if isinstance(gate, Mapping) else None
    if isinstance(targets, list) and chosen.target in targets:
        own = targets.index(chosen.target)
    lines = tuple(line for line in lines if line.get("gate", own) == own)
    if lines:
        found.append(Curves("Stage II: the gate", lines))
    return found


def read_lines(file: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of a metrics file that say what they are of and at which step.

    Others, such as a last one that a crash cut short, are left out; so is a file that is not there.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    lines = []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and "kind" in line:
            lines.append(line)
    return tuple(lines)


def _read_json(file: Path, kind: type[Any], notes: list[str]) -> Any:
    """What a file of the folder holds; None, and a note, if it cannot be read or is another."""
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if isinstance(value, kind):
        return value
    notes.append(f"{file.name} cannot be read, what it says is left out.")
    return None
