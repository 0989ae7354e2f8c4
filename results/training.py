"""Runs a job (a supernet, a static network or gates) and writes its cell."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynaslim.cost import madds
from dynaslim.errors import UsageError
from dynaslim.recipes import GateRecipe, SupernetRecipe
from dynaslim.runs import RunOptions, run_gate, run_supernet
from dynaslim.zoo import get_spec, write_spec
from results.plan import Job, static_spec


def run(job: Job) -> None:
    """Train the networks of a job, resuming if interrupted before, and write its cell."""
    if job.kind == "gate":
        values = _gates(job)
    else:
        values = {"madds": _costs(job), "held_out": _supernet(job)}
    job.cell.write(job.settings(), values)


def _supernet(job: Job) -> dict[str, Any]:
    """Train a supernet, or one width alone. Only the widest has dropout, as in the supernet."""
    assert isinstance(job.recipe, SupernetRecipe)
    recipe, run = job.recipe, job.cell.run
    _needed(job)
    if job.width is not None:
        whole = get_spec(recipe.model)
        run.mkdir(parents=True, exist_ok=True)
        model = write_spec(run / "model.yaml", static_spec(whole, job.width))
        widest = job.width == len(whole.routes) - 1
        dropout = recipe.dropout if widest else 0.0
        recipe = replace(recipe, model=str(model), routes="largest", dropout=dropout)
    done = run_supernet(recipe, run, RunOptions(resume=True))
    return {**_routes(done["val"]["last"]), "images_per_s": done["images_per_s"]}


def _needed(job: Job) -> Path | None:
    if job.needs is None:
        return None
    checkpoint = job.needs.cell.checkpoint
    if not checkpoint.exists():
        raise UsageError(f"{job.cell}: needs {job.needs.cell}, which is not trained yet")
    return checkpoint


def _gates(job: Job) -> dict[str, Any]:
    assert isinstance(job.recipe, GateRecipe)
    recipe = replace(job.recipe, supernet=str(_needed(job)))
    started = time.perf_counter()
    done = run_gate(recipe, job.cell.run, RunOptions(resume=True))
    widest = done["widest_madds"]
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "held_out": {
            **_routes({"routes": done["routes"]}),
            "gates": [
                {
                    "target": entry["target"],
                    "file": Path(entry["file"]).name,
                    "top1": entry["val"]["dynamic"]["top1"],
                    "madds": entry["val"]["dynamic"]["mean_madds"],
                    "share": entry["val"]["dynamic"]["mean_madds"] / widest,
                    "gate_accuracy": entry["val"]["dynamic"]["gate_accuracy"],
                    "shares": [s["share"] for s in entry["val"]["dynamic"]["route_shares"]],
                }
                for entry in done["gates"]
            ],
        },
    }


def _routes(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "top1": [route["top1"] for route in result["routes"]],
        "loss": [route["loss"] for route in result["routes"]],
    }


def _costs(job: Job) -> list[int]:
    assert isinstance(job.recipe, SupernetRecipe)
    spec = get_spec(job.recipe.model)
    if job.width is not None:
        spec = static_spec(spec, job.width)
    return [madds(spec, route, job.recipe.data.image_size_px) for route in spec.routes]
