"""What is trained: every experiment as a list of jobs, the most telling first.

Recipes are the package's own. A static network is trained by the recipe of the supernet that it is
compared with: same images, epochs, optimizer and averaging; one width, the labels, one pass a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""Fields that are newer than the first cells, and the values that equal their absence."""
Kind = Literal["supernet", "static", "gate"]
TARGETS: Final = (0.35, 0.5, 0.7)
"""Mean costs that gates are trained for, as shares of the widest route's."""
HUB: Final = {
    "cifar10": "uoft-cs/cifar10",
    "imagenette": "frgfm/imagenette",
}
"""Where the images come from unless a folder is given."""
SMALL: Final = "results/nets/resnet8_small.yaml"
LATENCY: Final = "results/latency/ds_resnet8_cifar.json"


@dataclass(frozen=True)
class Job:
    """A cell and how its network comes about."""

    cell: Cell
    kind: Kind
    recipe: SupernetRecipe | GateRecipe
    width: int | None = None
    """Of a static network: which width of the recipe's model."""
    needs: Job | None = None
    """The supernet that a gate is trained for."""

    def settings(self) -> dict[str, Any]:
        """All that decides its numbers, as plain values."""
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
"""Of CIFAR-10's comparisons: a third of the recipe's."""


def cifar10(folder: str | None, seed: int, epochs: int | None = EPOCHS) -> SupernetRecipe:
    """The recipe of the model that ships; None: with all of its epochs."""
    recipe = _shipped("cifar10_resnet8_supernet")
    data = replace(recipe.data, path=_data(folder, "cifar10").path)
    return replace(recipe, seed=seed, data=data, epochs=epochs or recipe.epochs)


def mini(seed: int) -> SupernetRecipe:
    """A minute and a half on two cores; the images ship with the package."""
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
    """A gate's recipe on the images of a supernet's."""
    given: dict[str, Any] = {"targets": TARGETS, **fields}
    return GateRecipe(seed=supernet.seed, data=supernet.data, augment=supernet.augment, **given)


def static_spec(spec: NetSpec, width: int) -> NetSpec:
    """The network along one uniform route, alone: the same layers, one width everywhere."""
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
    """CIFAR-10: supernet, gates, and what a user would train instead."""
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
    return _taught("headline", RECIPE, folder, seeds) + statics


def _static(experiment: str, variant: str, recipe: SupernetRecipe, width: int, lr: float) -> Job:
    """A network trained alone: by the labels, whatever the recipe teaches its routes by."""
    cell = Cell(experiment, variant, recipe.seed)
    return Job(cell, "static", replace(at_rate(recipe, lr), **UNTAUGHT), width=width)


def distillation(folder: str | None, seeds: Sequence[int]) -> list[Job]:
    """CIFAR-10: in-place distillation, the slimmable baseline; no gates."""
    jobs = _taught("distillation", "distillation", folder, seeds)
    return [job for job in jobs if job.kind == "supernet"]


SGS: Final = {"gates": SgsRecipe(), "balanced": SgsRecipe(easy_share=0.5, cost_weight=0.1)}
"""With the paper's weights; and with easy and hard images weighed alike, and a weaker cost term."""


def sgs(folder: str | None, seeds: Sequence[int]) -> list[Job]:
    """CIFAR-10: gates by SGS, in two ways, on the supernets of `ensemble`."""
    return [
        Job(
            Cell("sgs", variant, seed),
            "gate",
            gate(cifar10(folder, seed), objective="sgs", targets=(), epochs=2, sgs=way),
            needs=_taught("ensemble", "ensemble", folder, [seed])[0],
        )
        for seed in seeds
        for variant, way in SGS.items()
    ]


def _taught(
    experiment: str,
    way: str,
    folder: str | None,
    seeds: Sequence[int],
    epochs: int | None = EPOCHS,
) -> list[Job]:
    """Supernets of the recipe taught in a way at that way's own rate and decay, and their gates.

    Decays were tried in few epochs: in all of them the recipe's own is used.
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
    """What the sub-networks learn, on the images that ship: to be repeated by anyone."""
    return [
        Job(Cell("quick", way, seed), "supernet", at_best("quick", mini(seed), way))
        for way in TEACHING
        for seed in seeds
    ]


UNTAUGHT: Final[dict[str, Any]] = {"label_weight": 0.0, "label_warmup": 0.0, "ema_decay": 0.997}
"""Fields of the teaching where a way does not set them."""
TEACHING: Final[dict[str, dict[str, Any]]] = {
    "labels": {"target": "labels"},
    "ensemble": {"target": "ensemble"},
    "distillation": {"target": "distillation"},
    "bootstrap": {"target": "bootstrap"},
    "both": {"target": "ensemble", "label_weight": 1.0},
    "handover": {"target": "ensemble", "label_warmup": 0.5},
}
"""What the sub-networks of a supernet learn: `ensemble` is the paper's way, `both` adds the labels,
`handover` goes from the labels over to the teacher."""
DECAYS: Final = {"quick": (0.8, 0.9), "cifar10": (0.98,)}
"""By experiment, decays of the averaged network that are tried instead of the recipe's: a short
training needs a teacher of short memory."""
RECIPE: Final = "both"
"""How the networks of the recipe that ships are taught."""
RATES: Final = (0.1, 0.2, 0.4)
"""Learning rates that each way of teaching is tried at."""


def tried_rates(experiment: str) -> dict[str, dict[float, list[float]]]:
    """By variant and learning rate, held-out top-1 of every seed, mean over the routes.

    From the cells of `rates_...`.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for cell in all_cells(f"rates_{experiment}"):
        variant, _, rate = cell["variant"].partition("_lr")
        seeds = found.setdefault(variant, {}).setdefault(float(rate), [])
        seeds.append(fmean(cell["held_out"]["top1"]))
    return found


def ways_of(experiment: str) -> dict[str, dict[str, Any]]:
    """Ways of teaching, those by an average with every decay that an experiment tries."""
    return TEACHING | {
        f"{way}_ema{decay:g}": {**TEACHING[way], "ema_decay": decay}
        for way in ("both", "ensemble")
        for decay in DECAYS.get(experiment, ())
    }


def at_best(experiment: str, recipe: SupernetRecipe, way: str) -> SupernetRecipe:
    """The recipe taught in a way, at the decay and rate that held-out images chose for it."""
    ways = ways_of(experiment)
    others = [other for other in ways if other.startswith(f"{way}_ema")]
    chosen, rate = best_settings(experiment, (way, *others))
    return replace(at_rate(recipe, rate), **UNTAUGHT | ways[chosen])


def best_settings(experiment: str, variants: Sequence[str]) -> tuple[str, float]:
    """Of several variants the one that held-out images chose, and its learning rate.

    Of what was tried with the most seeds, the highest mean; a rate of 0.2 where nothing was tried.
    """
    tried = tried_rates(experiment)
    found = [
        (len(seeds), fmean(seeds), variant, rate)
        for variant in variants
        for rate, seeds in tried.get(variant, {}).items()
    ]
    return max(found)[2:] if found else (variants[0], 0.2)


def rates_quick(_: str | None, seeds: Sequence[int], rates: Sequence[float] = RATES) -> list[Job]:
    """Every way of teaching at every rate on the images that ship."""
    return _rates("rates_quick", [mini(seed) for seed in seeds], ways_of("quick"), rates)


def rates_cifar10(
    folder: str | None, seeds: Sequence[int], rates: Sequence[float] = RATES
) -> list[Job]:
    """Ways of teaching and networks trained alone on CIFAR-10; the first seed only."""
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
            replace(at_rate(recipe, lr), **UNTAUGHT | dict(fields)),
        )
        for recipe in recipes
        for lr in rates
        for way, fields in ways.items()
    ]


def at_rate(recipe: SupernetRecipe, lr: float) -> SupernetRecipe:
    """The recipe with another peak learning rate."""
    return replace(recipe, optim=replace(recipe.optim, lr=lr))


def gates(folder: str | None, seeds: Sequence[int]) -> list[Job]:
    """CIFAR-10: the gates of `headline`, trained on measured milliseconds: `measure_ms` first."""
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
    """Photographs at 128 px, for a GPU: supernet and gates by the recipes that ship."""
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
EXPERIMENTS: Final = {
    "headline": headline,
    "labels": partial(_taught, "labels", "labels"),
    "ensemble": partial(_taught, "ensemble", "ensemble"),
    "distillation": distillation,
    "sgs": sgs,
    "longer": partial(_taught, "longer", RECIPE, epochs=None),
    "longer_labels": partial(_taught, "longer_labels", "labels", epochs=None),
    "gates": gates,
    "quick": quick,
    **SEARCHES,
    "imagenette": imagenette,
}
"""`labels`: all routes taught by the labels. `ensemble`: the paper's way, in-place ensemble
bootstrapping. The longer ones are trained for all epochs of the recipe, three times as many."""


def jobs_of(
    experiment: str,
    folder: str | None,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    rates: Sequence[float] = RATES,
) -> list[Job]:
    """The jobs of an experiment, `only` those of some variants; searches of rates try `rates`."""
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
