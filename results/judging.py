"""Judges trained networks: makes tables of answers, and cells of comparisons from them.

Without `test`, settings are chosen on one half of the held-out images and judged on the other. With
`test`, they are chosen on all held-out images and judged on the test split. This is done once, when
there is nothing left to choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from dynaslim.checkpoint import read
from dynaslim.cost_file import read_cost_table
from dynaslim.data import ImageDataset
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import SupernetRecipe
from results import heads, plan, policies
from results.answers import Table, answer, images_of
from results.cells import HERE, RUNS, Cell
from results.comparisons import cascade_rows, compare

FEATURES: Final = ("hidden", "mean", "mean and deviation")
WIDTHS: Final = 4


@cache
def _images(data: str, split: str, pre: Preprocessing, share: float) -> ImageDataset:
    return images_of(data, split, pre, share)


def table_of(cell: Cell, recipe: SupernetRecipe, split: str) -> Table:
    """The answers of a cell's network; computed once, then read from a file."""
    checkpoint = cell.checkpoint
    file = RUNS / "tables" / f"{str(cell).replace('/', '_')}_{split}.npz"
    network = read(checkpoint)
    if file.exists() and file.stat().st_mtime > checkpoint.stat().st_mtime:
        made = Table.read(file)
        if (made.mirrored_NC is not None) == network.mirror:  # else it is of an earlier version
            return made
    assert network.preprocessing is not None
    data = recipe.data
    made = answer(network, _images(data.path, split, network.preprocessing, data.val_share))
    made.save(file)
    return made


Pair = tuple[Table, Table]


def pair_of(cell: Cell, recipe: SupernetRecipe, test: bool) -> Pair:
    """A table for choosing settings and one for judging them."""
    held = table_of(cell, recipe, "held_out")
    if test:
        return held, table_of(cell, recipe, "test")
    # two halves, always the same
    order = np.random.default_rng(0).permutation(len(held.labels_N))
    return held.rows(np.sort(order[1::2])), held.rows(np.sort(order[0::2]))


def _with_gate(pair: Pair, file: Path) -> Pair:
    (weight,) = read(file).net.slimming_parameters()
    head = weight.detach().numpy()
    return pair[0].with_head(head), pair[1].with_head(head)


# -- CIFAR-10 --------------------------------------------------------------------------------------


def headline(folder: str | None, seed: int, test: bool) -> dict[str, Any]:
    """The supernet with its gates, compared with static networks and in-place distillation."""
    found = _beside_statics("headline", folder, seed, test)
    other = Cell("distillation", "supernet", seed)
    if other.checkpoint.exists():
        pair = pair_of(other, plan.cifar10(folder, seed), test)
        found["distillation_top1"] = pair[1].top1_R
    return found


def _beside_statics(experiment: str, folder: str | None, seed: int, test: bool) -> dict[str, Any]:
    """A supernet with its gates, static networks trained equally long, and cascades of two."""
    recipe = plan.cifar10(folder, seed)
    pair, found = _supernet_and_gates(experiment, recipe, seed, test)
    statics = {
        k: pair_of(other, recipe, test)
        for k in range(WIDTHS)
        if (other := Cell("headline", f"static{k}", seed)).checkpoint.exists()
    }
    if len(statics) == WIDTHS:
        found["static_top1"] = [statics[k][1].top1_R[0] for k in range(WIDTHS)]
        found["ways"]["cascade"] = cascade_rows(
            {k: p[0] for k, p in statics.items()}, {k: p[1] for k, p in statics.items()}, pair[1]
        )
    return found


def _trained_on(experiment: str, folder: str | None, seed: int, test: bool) -> dict[str, Any]:
    """A supernet that was trained longer, with its own gates."""
    return _supernet_and_gates(experiment, plan.cifar10(folder, seed), seed, test)[1]


def sgs(folder: str | None, seed: int, test: bool) -> dict[str, Any]:
    """Gates trained by SGS, on the supernet whose target was the ensemble."""
    pair = pair_of(Cell("ensemble", "supernet", seed), plan.cifar10(folder, seed), test)
    return {variant: _gate_rows(pair, Cell("sgs", variant, seed)) for variant in plan.SGS}


def imagenette(folder: str | None, seed: int, test: bool) -> dict[str, Any]:
    """DS-MBNet on photographs, with its gates."""
    (job, _) = plan.imagenette(folder, [seed])
    assert isinstance(job.recipe, SupernetRecipe)
    return _supernet_and_gates("imagenette", job.recipe, seed, test)[1]


def _supernet_and_gates(
    experiment: str, recipe: SupernetRecipe, seed: int, test: bool
) -> tuple[Pair, dict[str, Any]]:
    pair = pair_of(Cell(experiment, "supernet", seed), recipe, test)
    gates = Cell(experiment, "gates", seed)
    middle = f"gate_{plan.TARGETS[1]:.2f}.safetensors"
    found = compare(*_with_gate(pair, gates.run / middle))
    found["gates"] = _gate_rows(pair, gates)
    return pair, found


def _gate_rows(
    pair: Pair, gates: Cell, unit: str = "madds", costs_R: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """Every gate of a cell as trained: without shift or escalation."""
    rows = []
    for file in sorted(gates.run.glob("gate*.safetensors")):
        _, judging = _with_gate(pair, file)
        _, _, target = file.stem.partition("_")
        row = _gated(judging, unit, costs_R)
        rows.append({"target": float(target) if target else None, **row})
    return rows


def _gated(
    judging: Table, unit: str = "madds", costs_R: Sequence[float] | None = None
) -> dict[str, Any]:
    """Cost and accuracy of a gate; costs are multiply-adds unless `costs_R` is given."""
    costs_R = judging.costs_R if costs_R is None else costs_R
    option_N = judging.gate_logits_NR.argmax(1)
    found = policies.gated(judging.correct_NR, costs_R, option_N)
    counts = np.bincount(option_N, minlength=len(costs_R))
    line = policies.uniform_line(costs_R, judging.top1_R, found.cost)
    target_N = np.where(judging.correct_NR[:, 0], 0, len(costs_R) - 1)
    return {
        unit: found.cost,
        "share": found.cost / max(costs_R),
        "top1": found.top1,
        "over_uniform": found.top1 - line,
        "shares": list(counts / len(option_N)),
        "gate_accuracy": float((option_N == target_N).mean()),
    }


# -- ablations -------------------------------------------------------------------------------------


def quick(_: str | None, seed: int, test: bool) -> dict[str, Any]:
    """Top-1 of the routes by training target, on the images that ship with the package."""
    found = {}
    for target in plan.TEACHING:
        cell = Cell("quick", target, seed)
        if cell.checkpoint.exists():
            found[target] = pair_of(cell, plan.mini(seed), test)[1].top1_R
    return {"top1": found}


def gates(folder: str | None, seed: int, test: bool) -> dict[str, Any]:
    """Possible input features of a gate; gates trained on multiply-adds and on milliseconds."""
    supernet, recipe = Cell("headline", "supernet", seed), plan.cifar10(folder, seed)
    pair = pair_of(supernet, recipe, test)
    train = table_of(supernet, recipe, "train")
    return {"features": features(train, *pair), **_by_ms(pair, seed)}


def features(train: Table, choosing: Table, judging: Table) -> dict[str, list[dict[str, Any]]]:
    """Small heads on possible input features of a gate, with and without a hidden layer.

    They are fitted to the losses on training images; their cost on the `choosing` images meets the
    targets.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name in FEATURES:
        seen, chosen, judged = (_features(t, name) for t in (train, choosing, judging))
        for hidden in (0, 32):
            rows = []
            for target in plan.TARGETS:

                def fit(weight: float, x: Any = seen, hidden: int = hidden) -> heads.Head:
                    return heads.fit(
                        x, train.losses_NR, train.costs_R, cost_weight=weight, hidden=hidden
                    )

                head = heads.fit_to_cost(fit, chosen, choosing.costs_R, target)
                table = replace(judging, gate_logits_NR=head(judged))
                rows.append({"target": target, **_gated(table)})
            found[name + (", hidden layer" if hidden else "")] = rows
    return found


def _features(table: Table, name: str) -> Any:
    if name == "hidden":
        return table.hidden_NF
    if name == "mean":
        return table.mean_NF
    return np.concatenate([table.mean_NF, table.deviation_NF], 1)


def _by_ms(pair: Pair, seed: int) -> dict[str, Any]:
    """Gates trained on multiply-adds and on milliseconds; both are judged by milliseconds."""
    spec, side = pair[0].spec, pair[0].image_size_px
    table = read_cost_table(HERE.parent / plan.LATENCY, spec, image_size=side)
    ms = [table.route_cost((k,)) for k in range(len(pair[1].costs_R))]
    cells = {"madds": Cell("headline", "gates", seed), "ms": Cell("gates", "ms", seed)}
    trained_on = {name: _gate_rows(pair, cell, "ms", ms) for name, cell in cells.items()}
    return {"ms": ms, "trained_on": trained_on}


JUDGED: Final[Mapping[str, Any]] = {
    "headline": headline,
    "labels": partial(_beside_statics, "labels"),
    "ensemble": partial(_beside_statics, "ensemble"),
    "sgs": sgs,
    "longer": partial(_trained_on, "longer"),
    "longer_labels": partial(_trained_on, "longer_labels"),
    "imagenette": imagenette,
    "quick": quick,
    "gates": gates,
}


def judge(name: str, folder: str | None, seeds: Sequence[int], test: bool) -> list[Cell]:
    """Write the comparison's cell for every seed, and return the cells.

    Only the part for the split in use is replaced: results on the other split are kept.
    """
    torch.manual_seed(0)
    cells = []
    for seed in seeds:
        cell = Cell("compare", name, seed)
        before = cell.read() or {}
        values: dict[str, Any] = {key: before[key] for key in ("held_out", "test") if key in before}
        values["test" if test else "held_out"] = JUDGED[name](folder, seed, test)
        cell.write({"compare": name, "seed": seed, "shares": list(plan.TARGETS)}, values)
        cells.append(cell)
    return cells
