"""Runs a job: a supernet, a static network or gates; and writes its cell."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dynaslim.checkpoint import Checkpoint, save
from dynaslim.cost import madds
from dynaslim.data.feed import Training, open_training
from dynaslim.errors import UsageError
from dynaslim.evaluation import evaluate
from dynaslim.nn.net import SlimNet
from dynaslim.progress import progress
from dynaslim.recipes import GateRecipe, SupernetRecipe
from dynaslim.runs import RunOptions, run_gate, run_supernet
from dynaslim.runs.folder import read_snapshot, save_snapshot, write_json
from dynaslim.train.loop import SupernetTraining
from dynaslim.zoo import get_spec
from results.plan import Job, static_spec


def run(job: Job) -> None:
    """Train what a job asks for, going on where it was interrupted, and write its cell."""
    if job.kind == "gate":
        values = _gates(job)
    else:
        results = _static(job) if job.kind == "static" else _supernet(job)
        values = {"madds": _costs(job), "held_out": results}
    job.cell.write(job.asked(), values)


def checkpoint_of(job: Job) -> Path:
    """The network that a job leaves, of gates the last."""
    return job.cell.run / "last.safetensors"


def _supernet(job: Job) -> dict[str, Any]:
    assert isinstance(job.recipe, SupernetRecipe)
    _needed(job)
    done = run_supernet(job.recipe, job.cell.run, RunOptions(resume=True))
    return {**_routes(done["val"]["last"]), "images_per_s": done["images_per_s"]}


def _needed(job: Job) -> Path | None:
    """The checkpoint that a job builds on."""
    if job.needs is None:
        return None
    checkpoint = job.needs.run / "last.safetensors"
    if not checkpoint.exists():
        raise UsageError(f"{job.cell}: needs {job.needs}, which is not trained yet")
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


# -- static networks -------------------------------------------------------------------------------


def _static(job: Job) -> dict[str, Any]:
    """One width alone. Dropout is for the widest, as it is in the supernet."""
    assert isinstance(job.recipe, SupernetRecipe)
    assert job.width is not None
    whole = get_spec(job.recipe.model)
    widest = job.width == len(whole.routes) - 1
    recipe = replace(job.recipe, routes="largest", dropout=job.recipe.dropout if widest else 0.0)
    spec = static_spec(whole, job.width)
    data = open_training(
        recipe.data,
        recipe.augment,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        workers=0,
        channels=spec.in_channels,
    )
    torch.manual_seed(recipe.seed)
    net = SlimNet(spec.replace(num_classes=len(data.class_names)))
    net.to("cuda" if torch.cuda.is_available() else "cpu")  # as `run_supernet` does
    training = SupernetTraining(net, data.feed, data.augment, recipe)
    snapshot = job.cell.run / "snapshot.safetensors"
    if snapshot.exists():
        training.load_state(read_snapshot(snapshot))
    started, first = time.perf_counter(), training.step
    with progress(str(job.cell), training.total, done=training.step) as bar:
        for losses in training:
            bar.advance(note=f"loss {losses.largest:.2f}")
            if training.step % training.feed.steps_per_epoch == 0:
                save_snapshot(snapshot, training.state())
    seconds = time.perf_counter() - started
    averaged = training.recalibrate(training.averaged_network(), recipe.calibration_batches)
    result = _evaluated(averaged, data)
    _keep(job, averaged, data, result)
    steps = training.step - first
    speed = round(steps * recipe.batch_size / seconds, 1) if steps else None
    return {**_routes(result), "images_per_s": speed}


def _evaluated(net: SlimNet, data: Training) -> dict[str, Any]:
    assert data.validation is not None
    return evaluate(net, data.validation, data.preprocessing, dynamic=False).to_dict()


def _keep(job: Job, net: SlimNet, data: Training, result: dict[str, Any]) -> None:
    save(
        checkpoint_of(job),
        Checkpoint(
            net=net,
            class_names=data.class_names,
            preprocessing=data.preprocessing,
            metrics={"val": result},
            recipe={"supernet": job.recipe.to_dict()},
        ),
    )
    write_json(job.cell.run / "results.json", result)
