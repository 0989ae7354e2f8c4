"""The experiments, each as a list of training jobs, the most informative first.

Recipes are those of the package. A static network uses the recipe of the supernet that it is
compared with (same images, epochs, optimizer and averaging), but has one width, is trained on the
labels and runs one pass per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal

from dynaslim.data.layout import MINI
from dynaslim.errors import UsageError
from dynaslim.recipes import (
    AugmentRecipe,
    DataRecipe,
    GateRecipe,
    OptimRecipe,
    SgsRecipe,
    SupernetRecipe,
    load_recipe,
)
from dynaslim.spec import GateSpec, NetSpec
from results.cells import HERE, Cell, all_cells, digest

_LATER: Final = {"patience": None, "routes": "sandwich", "trunk_views": 0}
"""Recipe fields that the first cells do not have, with the values equivalent to their absence."""
Kind = Literal["supernet", "static", "gate"]
TARGETS: Final = (0.35, 0.5, 0.7)
"""Mean costs that gates are trained for, as shares of the widest route's."""
HUB: Final = {
    "cifar10": "uoft-cs/cifar10",
    "imagenette": "frgfm/imagenette",
}
"""Data sets on the hub, used unless a folder is given."""
SMALL: Final = "results/nets/resnet8_small.yaml"
LATENCY: Final = "results/latency/ds_resnet8_cifar.json"


@dataclass(frozen=True)
class Job:
    """A cell and how its network is trained."""

    cell: Cell
    kind: Kind
    recipe: SupernetRecipe | GateRecipe
    width: int | None = None
    """For a static network: the width index in the recipe's model."""
    needs: Job | None = None
    """The supernet that a gate is trained for."""

    def settings(self) -> dict[str, Any]:
        """Everything that determines the job's results, as plain values."""
        needs = None
        if self.needs is not None:
            needs = {"cell": str(self.needs.cell), "sha256": digest(self.needs.settings())}
        recipe = self.recipe.to_dict()
        for name, default in _LATER.items():
            if recipe.get(name, ()) == default:
                del recipe[name]
        return {
            "kind": self.kind,
            "width": self.width,
            "needs": needs,
            "recipe": recipe,
        }


def _data(folder: str | None, name: str, **fields: Any) -> DataRecipe:
    return DataRecipe(path=HUB[name] if folder is None else f"{folder}/{name}", **fields)


@cache
def _shipped(name: str) -> SupernetRecipe:
    return load_recipe(SupernetRecipe, HERE.parent / "recipes" / f"{name}.yaml")


EPOCHS: Final = 8
"""Epochs of the comparisons on CIFAR-10: a third of the recipe's."""


def cifar10(folder: str | None, seed: int, epochs: int | None = EPOCHS) -> SupernetRecipe:
    """The recipe of the model that ships; `epochs` None keeps the recipe's number of epochs."""
    recipe = _shipped("cifar10_resnet8_supernet")
    data = replace(recipe.data, path=_data(folder, "cifar10").path)
    return replace(recipe, seed=seed, data=data, epochs=epochs or recipe.epochs)


def mini(seed: int) -> SupernetRecipe:
    """A recipe of a minute and a half on two cores, for the images that ship with the package."""
    return SupernetRecipe(
        model=SMALL,
        epochs=5,
        bf16=True,
        seed=seed,
        optim=OptimRecipe(lr=0.2, weight_decay=5e-4),
        data=DataRecipe(path=str(MINI), image_size_px=28),
        augment=AugmentRecipe(shift_px=2),
    )


def gate(supernet: SupernetRecipe, **fields: Any) -> GateRecipe:
    """A gate's recipe, on the same images as the supernet's recipe."""
    given: dict[str, Any] = {"targets": TARGETS, **fields}
    return GateRecipe(seed=supernet.seed, data=supernet.data, augment=supernet.augment, **given)


def static_spec(spec: NetSpec, width: int) -> NetSpec:
    """The network of one uniform route alone: the same layers with a single width per stage."""
    stages = tuple(
        replace(
            stage,
            widths=(spec.routes[width].widths[number],),
            gate=None if stage.gate is None else GateSpec((0,)),
        )
        for number, stage in enumerate(spec.stages)
    )
    return spec.replace(name=f"{spec.name}_width{width}", stages=stages)


# -- experiments -----------------------------------------------------------------------------------


def headline(folder: str | None, seeds: Sequence[int]) -> list[Job]:
    """CIFAR-10: supernet, gates, and the static networks that a user would train instead."""
    statics = [
        _static(
            "headline",
            f"static{k}",
            cifar10(folder, seed),
            k,
            best_settings("cifar10", (f"static{k}",))[1],
        )
        for seed in seeds
        for k in (3, 2, 1, 0)
    ]
    return _jobs("headline", RECIPE, folder, seeds) + statics


def _static(experiment: str, variant: str, recipe: SupernetRecipe, width: int, lr: float) -> Job:
    """A static network, trained on the labels whatever the recipe's target."""
    cell = Cell(experiment, variant, recipe.seed)
    return Job(cell, "static", replace(at_rate(recipe, lr), **TEACHING_DEFAULTS), width=width)


def distillation(folder: str | None, seeds: Sequence[int]) -> list[Job]:
    """CIFAR-10: in-place distillation, the usual slimmable baseline; without gates."""
    jobs = _jobs("distillation", "distillation", folder, seeds)
    return [job for job in jobs if job.kind == "supernet"]


SGS: Final = {"gates": SgsRecipe(), "balanced": SgsRecipe(easy_share=0.5, cost_weight=0.1)}
"""`gates`: the paper's weights; `balanced`: equal weight for easy and hard images, weaker cost."""


def sgs(folder: str | None, seeds: Sequence[int]) -> list[Job]:
    """CIFAR-10: gates trained by SGS in two ways, on the supernets of `ensemble`."""
    return [
        Job(
            Cell("sgs", variant, seed),
            "gate",
            gate(cifar10(folder, seed), objective="sgs", targets=(), epochs=2, sgs=way),
            needs=_jobs("ensemble", "ensemble", folder, [seed])[0],
        )
        for seed in seeds
        for variant, way in SGS.items()
    ]


def _jobs(
    experiment: str,
    way: str,
    folder: str | None,
    seeds: Sequence[int],
    epochs: int | None = EPOCHS,
) -> list[Job]:
    """Supernets taught in a given way, at its best learning rate and decay, and their gates.

    The decays were chosen for `EPOCHS`; for `epochs` None the recipe's own decay is used.
    """
    jobs = []
    for seed in seeds:
        recipe = cifar10(folder, seed, epochs)
        best = at_best("cifar10", recipe, way)
        if epochs is None:
            best = replace(best, ema_decay=recipe.ema_decay)
        jobs += _supernet_and_gates(experiment, best)
    return jobs


def _supernet_and_gates(experiment: str, recipe: SupernetRecipe) -> list[Job]:
    supernet = Job(Cell(experiment, "supernet", recipe.seed), "supernet", recipe)
    gates = Job(Cell(experiment, "gates", recipe.seed), "gate", gate(recipe), needs=supernet)
    return [supernet, gates]


def quick(_: str | None, seeds: Sequence[int]) -> list[Job]:
    """All training targets on the images that ship with the package; anyone can repeat this."""
    return [
        Job(Cell("quick", way, seed), "supernet", at_best("quick", mini(seed), way))
        for way in TEACHING
        for seed in seeds
    ]


TEACHING_DEFAULTS: Final[dict[str, Any]] = {
    "label_weight": 0.0,
    "label_warmup": 0.0,
    "ema_decay": 0.997,
}
"""Values of the recipe fields that a way of teaching does not set."""
TEACHING: Final[dict[str, dict[str, Any]]] = {
    "labels": {"target": "labels"},
    "ensemble": {"target": "ensemble"},
    "distillation": {"target": "distillation"},
    "bootstrap": {"target": "bootstrap"},
    "both": {"target": "ensemble", "label_weight": 1.0},
    "handover": {"target": "ensemble", "label_warmup": 0.5},
}
"""Ways of teaching the sub-networks, as recipe fields: `ensemble` is the paper's way, `both` adds
the labels, `handover` moves from the labels to the teacher."""
DECAYS: Final = {"quick": (0.8, 0.9), "cifar10": (0.98,)}
"""By experiment, EMA decays to try besides the recipe's: in a short training the averaged teacher
must follow its students quickly."""
RECIPE: Final = "both"
"""The way of teaching in the recipe that ships."""
RATES: Final = (0.1, 0.2, 0.4)
"""Learning rates to try for each way of teaching."""


def tried_rates(experiment: str) -> dict[str, dict[float, list[float]]]:
    """Held-out top-1 (mean over the routes) of every seed, by variant and learning rate.

    The values are from the cells of `rates_...`.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for cell in all_cells(f"rates_{experiment}"):
        variant, _, rate = cell["variant"].partition("_lr")
        seeds = found.setdefault(variant, {}).setdefault(float(rate), [])
        seeds.append(fmean(cell["held_out"]["top1"]))
    return found


def ways_of(experiment: str) -> dict[str, dict[str, Any]]:
    """All ways of teaching; `both` and `ensemble` also with each of the experiment's decays."""
    return TEACHING | {
        f"{way}_ema{decay:g}": {**TEACHING[way], "ema_decay": decay}
        for way in ("both", "ensemble")
        for decay in DECAYS.get(experiment, ())
    }


def at_best(experiment: str, recipe: SupernetRecipe, way: str) -> SupernetRecipe:
    """The recipe for a way of teaching, at the decay and rate that are best on held-out images."""
    ways = ways_of(experiment)
    others = [other for other in ways if other.startswith(f"{way}_ema")]
    chosen, rate = best_settings(experiment, (way, *others))
    return replace(at_rate(recipe, rate), **TEACHING_DEFAULTS | ways[chosen])


def best_settings(experiment: str, variants: Sequence[str]) -> tuple[str, float]:
    """The variant and learning rate with the best top-1 on held-out images.

    It is the highest mean among settings tried with the most seeds. If none was tried, the first
    variant and a rate of 0.2.
    """
    tried = tried_rates(experiment)
    found = [
        (len(seeds), fmean(seeds), variant, rate)
        for variant in variants
        for rate, seeds in tried.get(variant, {}).items()
    ]
    return max(found)[2:] if found else (variants[0], 0.2)


def rates_quick(_: str | None, seeds: Sequence[int], rates: Sequence[float] = RATES) -> list[Job]:
    """Every way of teaching at every rate, on the images that ship with the package."""
    return _rates("rates_quick", [mini(seed) for seed in seeds], ways_of("quick"), rates)


def rates_cifar10(
    folder: str | None, seeds: Sequence[int], rates: Sequence[float] = RATES
) -> list[Job]:
    """Ways of teaching and static networks at every rate on CIFAR-10; for the first seed only."""
    recipe = cifar10(folder, seeds[0])
    left_out = ("bootstrap", "handover")
    ways = {way: fields for way, fields in ways_of("cifar10").items() if way not in left_out}
    return _rates("rates_cifar10", [recipe], ways, rates) + [
        _static("rates_cifar10", f"static{k}_lr{lr:g}", recipe, k, lr)
        for lr in rates
        for k in (3, 2, 1, 0)
    ]


def _rates(
    experiment: str,
    recipes: Sequence[SupernetRecipe],
    ways: Mapping[str, Mapping[str, Any]],
    rates: Sequence[float],
) -> list[Job]:
    return [
        Job(
            Cell(experiment, f"{way}_lr{lr:g}", recipe.seed),
            "supernet",
            replace(at_rate(recipe, lr), **TEACHING_DEFAULTS | dict(fields)),
        )
        for recipe in recipes
        for lr in rates
        for way, fields in ways.items()
    ]


def at_rate(recipe: SupernetRecipe, lr: float) -> SupernetRecipe:
    """The recipe with another peak learning rate."""
    return replace(recipe, optim=replace(recipe.optim, lr=lr))


def gates(folder: str | None, seeds: Sequence[int]) -> list[Job]:
    """CIFAR-10: the gates of `headline`, trained on milliseconds; run `measure_ms` first."""
    return [
        Job(
            Cell("gates", "ms", seed),
            "gate",
            gate(cifar10(folder, seed), cost_table=LATENCY),
            needs=headline(folder, [seed])[0],
        )
        for seed in seeds
    ]


def imagenette(folder: str | None, seeds: Sequence[int]) -> list[Job]:
    """Photographs at 128 px, for a GPU: supernet by the recipe that ships, and gates."""
    jobs = []
    for seed in seeds:
        recipe = _shipped("imagenette_ds_mbnet_supernet")
        path = _data(folder, "imagenette").path
        recipe = replace(recipe, seed=seed, data=replace(recipe.data, path=path))
        jobs += _supernet_and_gates("imagenette", recipe)
    return jobs


SEARCHES: Final = {
    "rates_quick": rates_quick,
    "rates_cifar10": rates_cifar10,
}
"""Searches of the learning rate."""
EXPERIMENTS: Final[dict[str, Callable[..., list[Job]]]] = {
    "headline": headline,
    "labels": partial(_jobs, "labels", "labels"),
    "ensemble": partial(_jobs, "ensemble", "ensemble"),
    "distillation": distillation,
    "sgs": sgs,
    "longer": partial(_jobs, "longer", RECIPE, epochs=None),
    "longer_labels": partial(_jobs, "longer_labels", "labels", epochs=None),
    "gates": gates,
    "quick": quick,
    **SEARCHES,
    "imagenette": imagenette,
}
"""All experiments. `labels`: all routes learn the labels. `ensemble`: the paper's way, in-place
ensemble bootstrapping. `longer...`: all epochs of the recipe, three times as many as the others."""


def jobs_of(
    experiment: str,
    folder: str | None,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    rates: Sequence[float] = RATES,
) -> list[Job]:
    """The jobs of an experiment, or `only` those of some variants.

    `rates` are the learning rates that the experiments `rates_...` try.
    """
    if experiment not in EXPERIMENTS:
        raise UsageError(f"experiment {experiment!r}: choose from {', '.join(EXPERIMENTS)}")
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"--data {folder}: no such folder")
    if experiment.startswith("rates_"):
        if not rates or min(rates) <= 0:
            given = ",".join(f"{rate:g}" for rate in rates)
            raise UsageError(f"--rates {given!r}: give learning rates to try, such as 0.1,0.2,0.4")
        jobs = SEARCHES[experiment](folder, seeds, rates)
    else:
        jobs = EXPERIMENTS[experiment](folder, seeds)
    known = list(dict.fromkeys(job.cell.variant for job in jobs))
    for variant in only:
        if variant not in known:
            raise UsageError(f"--only {variant}: {experiment} has {', '.join(known)}")
    return [job for job in jobs if not only or job.cell.variant in only]
