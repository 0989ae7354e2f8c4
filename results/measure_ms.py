"""Measures milliseconds: `python -m results.measure_ms --data FOLDER`, on an idle machine.

One interleaved run times the uniform routes of a supernet as plain programs, the static networks
(for CIFAR-10), and the routed engine at every budget. All get the same held-out images in batches
of 32; routes and budgets also in batches of 128. The script also writes the tables of milliseconds
per segment (`latency/`) on which gates are trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from dynaslim.bench.timing import hardware, interleave, ratio, summary
from dynaslim.checkpoint import read
from dynaslim.data.transforms import normalise
from dynaslim.errors import DynaslimError, UsageError
from dynaslim.progress import progress
from dynaslim.runs.folder import write_json
from dynaslim.runtime.budget import BudgetPoint
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.latency import profile
from results import plan
from results.answers import images_of
from results.cells import HERE, Cell, digest
from results.comparisons import SHARES, escalations_of
from results.judging import WIDTHS

BACKENDS: Final = ("openvino", "onnxruntime")
BATCH: Final = 32
LARGE: Final = 128
SUPERNETS: Final = ("headline", "labels", "ensemble", "longer", "longer_labels")
BATCHES: Final = {**dict.fromkeys(SUPERNETS, 16), "imagenette": 4}
"""Number of different batches per arm and round, because routes differ from batch to batch."""
ROUNDS: Final = 25
EXPERIMENTS: Final = tuple(BATCHES)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m results.measure_ms", description=__doc__)
    parser.add_argument("--data", help="folder with cifar10, imagenette; else the hub")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default=",".join((*SUPERNETS, "tables")), help="or imagenette")
    given = parser.parse_args(argv)
    seeds, only = [int(seed) for seed in given.seeds.split(",")], given.only.split(",")
    try:
        for name in only:
            if name not in (*EXPERIMENTS, "tables"):
                raise UsageError(f"--only {name}: choose from {', '.join(EXPERIMENTS)}, tables")
        if "tables" in only:
            write_tables(given.data, seeds[0])
        for name in EXPERIMENTS:
            for seed in seeds if name in only else ():
                made = measure(name, given.data, seed, given.rounds)
                write_json(HERE / "ms" / f"{name}_s{seed}.json", made)
    except DynaslimError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def write_tables(folder: str | None, seed: int) -> None:
    """Write the milliseconds of every segment of the network used in the gate ablation."""
    cell, recipe = Cell("headline", "supernet", seed), plan.cifar10(folder, seed)
    # onnxruntime routes pictures of this size fastest
    engine = Engine.from_checkpoint(cell.checkpoint, backend="onnxruntime")
    note = {"backend": engine.backend, **hardware()}
    made = profile(engine.router, recipe.data.image_size_px, BATCH, rounds=15, note=note)
    made.write(HERE.parent / plan.LATENCY, engine.spec)


def measure(name: str, folder: str | None, seed: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per image of every arm in an experiment's table, by backend."""
    supernet = plan.jobs_of(name, folder, [seed])[0]
    gates = Cell(name, "gates", seed).run / f"gate_{plan.TARGETS[1]:.2f}.safetensors"
    if not gates.exists():
        raise UsageError(f"{gates}: is not there; run the experiment {name} first")
    judged = Cell("compare", name, seed).read() or {}
    compared = judged.get("test") or judged.get("held_out")
    if compared is None:
        raise UsageError(f"compare it first: python -m results.run {name} --judge")
    checkpoint = read(gates)
    assert checkpoint.preprocessing is not None
    images = images_of(supernet.recipe.data.path, "held_out", checkpoint.preprocessing)
    # shuffled, so that the result does not depend on the order of the set
    order = np.random.default_rng(0).permutation(len(images))[: BATCH * BATCHES[name]]
    x = normalise(images.images_NCSS[order], checkpoint.preprocessing).numpy()
    found: dict[str, Any] = {}
    large: dict[str, Any] = {}
    for backend in BACKENDS:
        arms = _arms(name, checkpoint, backend, seed, compared)
        label = f"{name} {seed}, {backend}"
        found[backend] = _timed(arms, x, BATCH, rounds, label)
        some = {arm: run for arm, run in arms.items() if arm.startswith(("route", "both"))}
        large[backend] = _timed(some, x, LARGE, rounds, label)
    return {
        "settings_sha256": digest(supernet.settings()),
        "batch": BATCH,
        "images": len(x),
        "rounds": rounds,
        "hardware": hardware(),
        "shares": list(SHARES),
        "ms_per_image": found,
        "large_batch": LARGE,
        "ms_per_image_large": large,
    }


Arm = Callable[[np.ndarray], object]


def _timed(
    arms: dict[str, Arm], x: np.ndarray, batch: int, rounds: int, label: str
) -> dict[str, Any]:
    """Milliseconds per image of every arm on the same images, in interleaved rounds."""
    batches = [x[at : at + batch] for at in range(0, len(x), batch)]
    with progress(f"timing {label}, batches of {batch}", rounds) as bar:
        times = interleave(
            {name: partial(_all, arm, batches) for name, arm in arms.items()},
            rounds,
            bar.advance,
        )
    widest = times[max(name for name in times if name.startswith("route"))]
    return {
        name: {
            **{k: v / len(x) for k, v in summary(values).items()},
            "faster_than_widest": ratio(widest, values),
        }
        for name, values in times.items()
    }


def _all(arm: Arm, batches: list[np.ndarray]) -> None:
    for batch in batches:
        arm(batch)


def _arms(
    name: str, checkpoint: Any, backend: str, seed: int, compared: dict[str, Any]
) -> dict[str, Arm]:
    """The arms: routes and static networks as plain programs, the engine at every budget."""
    engine = Engine(replace(checkpoint, budget=None), backend=backend)
    (gate,) = engine.spec.gates
    arms: dict[str, Arm] = {
        f"route{k}": engine.static(engine.spec.route_at((choice,)))
        for k, choice in enumerate(gate.choices)
    }
    for k in range(WIDTHS if name != "imagenette" else 0):
        file = Cell("headline", f"static{k}", seed).checkpoint
        if file.exists():
            alone = Engine.from_checkpoint(file, backend=backend)
            arms[f"static{k}"] = alone.static(alone.spec.smallest)
    for way in ("both", "gate", "escalation"):
        for share, row in zip(SHARES, compared["settings"][way], strict=True):
            arms[f"{way}@{share:g}"] = partial(engine, budget=_point(row))
    for file in sorted(Cell(name, "gates", seed).run.glob("gate_*.safetensors")):
        gated = Engine(replace(read(file), budget=None), backend=backend)
        arms[f"trained@{file.stem.removeprefix('gate_')}"] = gated
    return arms


def _point(row: dict[str, Any]) -> BudgetPoint:
    steps = escalations_of(row)
    # steps that the setting lacks are None
    none = (None, None, False)
    wider = [step for step in steps if not step.mirror]
    (tau, target, _), (then, then_target, _) = [*wider, none, none][:2]
    tau_mirror, along, _ = next((step for step in steps if step.mirror), none)
    return BudgetPoint(
        row["shift"],
        tau,
        target,
        madds=1.0,
        share=1.0,
        ms=None,
        top1=0.0,
        escalated=0.0,
        tau_then=then,
        escalate_then=then_target,
        tau_mirror=tau_mirror,
        mirror_along=along,
    )


if __name__ == "__main__":
    sys.exit(main())
