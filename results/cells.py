"""One JSON file for each trained network or comparison: `cells/EXPERIMENT/VARIANT_sSEED.json`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaslim.bench.timing import hardware
from dynaslim.runs.folder import write_json

HERE = Path(__file__).parent
CELLS = HERE / "cells"
RUNS = HERE.parent / "runs" / "results"
"""Folder of runs and tables of answers, which are not under version control."""


@dataclass(frozen=True)
class Cell:
    """One cell of an experiment's table: a variant at a seed."""

    experiment: str
    variant: str
    seed: int

    @property
    def path(self) -> Path:
        return CELLS / self.experiment / f"{self.variant}_s{self.seed}.json"

    @property
    def run(self) -> Path:
        return RUNS / self.experiment / f"{self.variant}_s{self.seed}"

    @property
    def checkpoint(self) -> Path:
        """The trained network of the cell; a cell of gates has one file per target instead."""
        return self.run / "last.safetensors"

    def __str__(self) -> str:
        return f"{self.experiment}/{self.variant}_s{self.seed}"

    def read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found

    def write(self, made_by: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Write the cell's file: settings and their hash, the machine, and the results."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "experiment": self.experiment,
            "variant": self.variant,
            "seed": self.seed,
            "settings_sha256": digest(made_by),
            "written": time.strftime("%Y-%m-%d"),
            "environment": hardware(),
            "settings": _without_places(made_by),
        }
        write_json(self.path, {**head, **values})

    def is_done(self, made_by: Mapping[str, Any]) -> bool:
        found = self.read()
        return found is not None and found["settings_sha256"] == digest(made_by)


def digest(made_by: Mapping[str, Any]) -> str:
    """A hash of the settings that make a cell, without paths of images and checkpoints."""
    return hashlib.sha256(json.dumps(_without_places(made_by), sort_keys=True).encode()).hexdigest()


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_places(v) for k, v in value.items() if k not in ("path", "supernet")}
    return [_without_places(v) for v in value] if isinstance(value, list | tuple) else value


def all_cells(experiment: str) -> list[dict[str, Any]]:
    """All existing cells of an experiment, sorted by variant and seed."""
    found = [json.loads(file.read_text()) for file in (CELLS / experiment).glob("*.json")]
    return sorted(found, key=lambda cell: (cell["variant"], cell["seed"]))
