"""A trained network adapted to photographs, compared with pruned networks.

    python benchmarks/adaptation.py MODEL --weights W --data PHOTOS --size 128 --seeds 0,1,2

For each seed, `dynaslim adapt` makes the original, the routes and the budgets. They are compared
with networks that Torch-Pruning makes from the same original, pruned behind the same trunk by
magnitude and by Taylor terms, and fine-tuned for the same epochs on the same features with the same
teacher. All are evaluated on the test split and timed in one interleaved run. Training steps are
timed too: of all routes at once, and of a plain network for each. Needs timm and torch-pruning.
`--size 128,224` adapts at several image sizes, without pruned networks: they would be those at 224.
Folders of runs are kept, so the same command continues after an interruption. Writes
results/adaptation.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from conversion import let_torchvision_load
from torch import Tensor, nn
from torch.nn import functional as F

from dynaslim._files import write_atomic
from dynaslim.adaptation import Adapted, adapt
from dynaslim.bench.timing import hardware, interleave, ratio, summary
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.conversion import Conversion
from dynaslim.conversion.source import load_source
from dynaslim.cost import madds
from dynaslim.data.images import ImageDataset, open_images
from dynaslim.data.transforms import normalise
from dynaslim.evaluation import RouteMetrics, evaluate
from dynaslim.nn.program import Cut, cut, program
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import RunOptions, SupernetRecipe, recipe_from_dict
from dynaslim.report.data import Mode
from dynaslim.runs import run_supernet
from dynaslim.runs.folder import best_checkpoint
from dynaslim.runtime.engine import Engine
from dynaslim.spec import Route

HERE: Final = Path(__file__).parent
SHARES: Final = (0.5, 0.3)
"""Multiply-adds of the pruned networks, as shares of the original's."""
BUDGETS: Final = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7)
"""For each of these limits, the largest budget of a seed's curve within it is used."""
BATCHES: Final = (1, 32)
TIMED: Final = 64
"""The number of images that are timed."""
TimedRow = tuple[str, np.ndarray, Callable[[np.ndarray], Any]]
"""A row's name, its images, and how to run it."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="such as timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", default="128")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--methods", default="magnitude,taylor", help="of pruning; empty: none")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptation"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "adaptation.json")
    given = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    let_torchvision_load()
    sizes = given.size if "," in given.size else ""
    # a network of several image sizes has no plain network of the same cost
    methods = () if sizes else tuple(filter(None, given.methods.split(",")))
    rows: dict[str, dict[str, list[float]]] = {}
    seeds: list[Adapted] = []
    chosen: dict[str, list[tuple[int, str]]] = {}
    """For every limit, the seed's number and the name of its budget."""
    rivals: dict[str, Checkpoint] = {}
    for seed in map(int, given.seeds.split(",")):
        folder = given.runs / f"{Path(given.data).name}_{given.size}" / f"seed{seed}"
        done = adapt(
            given.model,
            given.data,
            folder,
            run=RunOptions(resume=True),
            weights=given.weights,
            image_size=None if sizes else int(given.size),
            sizes=sizes,
            epochs=given.epochs,
            seed=seed,
            backend=given.backend,
        )
        for mode in done.data.modes:
            # with several sizes, uniform routes are rungs, which differ between seeds
            if mode.kind == "baseline" if sizes else mode.kind != "budget":
                _add(rows, mode.name, mode.top1, mode.madds or 0.0)
        for share in BUDGETS:
            name, dearest = f"budget of at most {share:g}", _dearest(done.data.modes, share)
            if dearest is not None:
                _add(rows, name, dearest.top1, dearest.madds or 0.0)
                chosen.setdefault(name, []).append((len(seeds), dearest.name))
        images = done.data.images
        assert images is not None
        for method in methods:
            for share in SHARES:
                name = f"pruned by {method} to {share:g}"
                rival = _rival(given, folder, method, share, done)
                found = widest_route(rival, images.images)
                _add(rows, name, found.top1, float(found.madds))
                rivals.setdefault(name, rival)
        seeds.append(done)
    made = {
        "hardware": hardware(),
        "command": sys.argv,
        "rows": {name: _summary(values) for name, values in rows.items()},
        "timed_as": {name: name for name in chosen},
        "times": _times(rivals, given, seeds, chosen),
        "training_step": _training_step(given, done) if methods else None,
    }
    write_atomic(given.out, (json.dumps(made, indent=1) + "\n").encode())
    return 0


def widest_route(checkpoint: Checkpoint, images: ImageDataset) -> RouteMetrics:
    """Accuracy and cost of a network along its widest route."""
    pre = checkpoint.preprocessing
    assert pre is not None
    route = checkpoint.net.spec.largest
    return evaluate(checkpoint.net, images, pre, routes=(route,), dynamic=False).routes[0]


def _add(rows: dict[str, dict[str, list[float]]], name: str, top1: float, cost: float) -> None:
    row = rows.setdefault(name, {"top1": [], "madds": []})
    row["top1"].append(top1)
    row["madds"].append(cost)


def _dearest(modes: Sequence[Mode], share: float) -> Mode | None:
    whole = max(mode.madds or 0.0 for mode in modes if mode.kind == "uniform")
    fitting = [m for m in modes if m.kind == "budget" and (m.madds or 0.0) <= share * whole]
    return max(fitting, key=lambda mode: mode.madds or 0.0, default=None)


def _summary(values: dict[str, list[float]]) -> dict[str, Any]:
    top1 = values["top1"]
    spread = statistics.stdev(top1) if len(top1) > 1 else None
    return {**values, "mean_top1": statistics.mean(top1), "deviation": spread}


# -- pruned networks of the same original ---------------------------------------------------------


def _rival(given: Any, folder: Path, method: str, share: float, done: Adapted) -> Checkpoint:
    """The original, pruned behind the trunk and fine-tuned as the supernet was."""
    own = folder / f"{method}_{share:g}"
    if not (own / "results.json").exists():
        original = read(done.files["original"])
        model = _module(given, original)
        images = open_images(original, given.data, "train")
        example = _example(original)
        # pruned, the network would get its gate elsewhere, and with it another trunk
        trunk = [node.name for node in Conversion(model, example).cuts]
        pruned = _pruned(model, original, images, method, share)
        name = f"{method}_{share:g}"
        conversion = Conversion(pruned, example, (1.0,), name=name, cuts=trunk)
        start = folder / f"{method}_{share:g}.safetensors"
        save(start, replace(original, net=conversion.net(), metrics={}))
        recipe = recipe_from_dict(SupernetRecipe, read(done.files["checkpoint"]).recipe["supernet"])
        run_supernet(
            replace(recipe, init=str(start), routes="largest"), own, RunOptions(resume=True)
        )
    return read(best_checkpoint(own))


def _example(checkpoint: Checkpoint) -> Tensor:
    assert checkpoint.preprocessing is not None
    side = checkpoint.preprocessing.image_size_px
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _module(given: Any, original: Checkpoint) -> nn.Module:
    """The original as the library's module, with its trained weights."""
    classes = original.net.spec.num_classes
    model = load_source(given.model, num_classes=classes, image_size=int(given.size)).model
    own, found = model.state_dict(), original.net.state_dict()
    for name, value in own.items():
        if name in found:
            # statistics are per width; the last set is that of the full width
            value.copy_(found[name] if found[name].shape == value.shape else found[name][-1])
        elif not name.endswith("num_batches_tracked"):
            raise AssertionError(f"{name}: the original has no such weight")
    x = _example(original)
    with torch.no_grad():
        expected, got = original.net(x, original.net.spec.largest), model(x)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    return model


def _pruned(
    model: nn.Module, original: Checkpoint, images: ImageDataset, method: str, share: float
) -> nn.Module:
    """Prune to a share of the multiply-adds, with one ratio for all layers behind the trunk."""
    whole = madds(original.net.spec, original.net.spec.largest, original.net.spec.usual_image_size)
    low, high = 0.0, 0.9
    for _ in range(7):  # by magnitude, which is fast: the cost depends on the ratio alone
        ratio = (low + high) / 2
        cut = _cut(copy.deepcopy(model), original, images, "magnitude", ratio)
        if _madds(cut, original) > share * whole:
            low = ratio
        else:
            high = ratio
    return _cut(copy.deepcopy(model), original, images, method, high)


def _madds(model: nn.Module, original: Checkpoint) -> int:
    spec = Conversion(model, _example(original), (1.0,)).net().spec
    return int(madds(spec, spec.largest, spec.usual_image_size))


def _cut(
    model: nn.Module, original: Checkpoint, images: ImageDataset, method: str, ratio: float
) -> nn.Module:
    import torch_pruning as tp

    net = original.net
    trunk = {node.path for node in net.spec.nodes if node.segment == 0}
    kept = [module for name, module in model.named_modules() if name in trunk]
    kept.append(model.get_submodule(str(net.spec.classifier)))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    importance: Any = tp.importance.MagnitudeImportance(p=2)
    if method == "taylor":
        importance = tp.importance.TaylorImportance()
    pruner = tp.pruner.MetaPruner(
        model,
        _example(original),
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=kept,
        round_to=8,
    )
    if method == "taylor":
        model.eval()
        for pixels, labels in images.sample(256).batches(32):
            assert original.preprocessing is not None
            x = normalise(pixels, original.preprocessing)
            torch.autograd.backward(F.cross_entropy(model(x), labels))
    pruner.step()
    return model.eval()


# -- time -----------------------------------------------------------------------------------------


def timed_images(images: ImageDataset, pre: Preprocessing, count: int) -> np.ndarray:
    """A fixed random choice of the images, prepared for a network."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    batches = images.batches(32, order)
    return np.concatenate([normalise(pixels, pre).numpy() for pixels, _ in batches])


def measured(rows: Sequence[TimedRow], rounds: int) -> dict[str, Any]:
    """Milliseconds per image of every row, interleaved."""

    def run_all(run: Callable[[np.ndarray], Any], batches: Sequence[np.ndarray]) -> None:
        for batch in batches:
            run(batch)

    found: dict[str, Any] = {"rounds": rounds}
    for size in BATCHES:
        arms = {name: partial(run_all, run, np.split(x, len(x) // size)) for name, x, run in rows}
        times = interleave(arms, rounds)
        found[f"batch {size}"] = {
            name: summary([value / len(x) for value in times[name]]) for name, x, _ in rows
        }
    return found


def _times(
    rivals: dict[str, Checkpoint],
    given: Any,
    seeds: Sequence[Adapted],
    chosen: dict[str, list[tuple[int, str]]],
) -> dict[str, Any]:
    """Milliseconds per image of every network, interleaved, on images of the test split.

    Routes and pruned networks are those of the first seed; budgets differ between seeds, so they
    are timed with each seed's network, and their times are the means over seeds.
    """
    images, pre = seeds[0].data.images, seeds[0].checkpoint.preprocessing
    assert images is not None
    assert pre is not None
    x = timed_images(images.images, pre, TIMED)
    engines = [Engine(seeds[0].checkpoint, backend=given.backend)]
    backend = engines[0].backend
    engines += [Engine(done.checkpoint, backend=backend) for done in seeds[1:]]
    runs: list[TimedRow] = [
        (f"route {route}", x, engines[0].static(route))
        for route in seeds[0].checkpoint.net.spec.routes
    ]
    for number, (engine, done) in enumerate(zip(engines, seeds, strict=True)):
        names = [mode.name for mode in done.data.modes if mode.kind == "budget"]
        for name, budget in zip(names, done.data.budgets, strict=True):
            if any((number, name) in pairs for pairs in chosen.values()):
                runs.append((f"{number}: {name}", x, partial(engine, budget=budget.point)))
    for name, rival in rivals.items():
        engines.append(Engine(rival, backend=backend))
        runs.append((name, x, engines[-1].static(rival.net.spec.largest)))
    found = {"backend": backend, **measured(runs, given.rounds)}
    for size in BATCHES:
        times = found[f"batch {size}"]
        for name, pairs in chosen.items():
            own = [times[f"{number}: {budget}"] for number, budget in pairs]
            times[name] = {key: statistics.mean(one[key] for one in own) for key in own[0]}
    for one in engines:
        one.close()
    return found


def _training_step(given: Any, done: Adapted) -> dict[str, Any]:
    """Time of forward and backward of all routes, over the sum for their plain networks."""
    original = read(done.files["original"])
    net = copy.deepcopy(original.net).train()
    plain = [
        _plain(_module(given, original), original.net, route).train() for route in net.spec.routes
    ]
    assert original.preprocessing is not None
    side = original.preprocessing.image_size_px
    x = torch.randn(32, 3, side, side, generator=torch.Generator().manual_seed(0))

    def ours() -> None:
        answers = net.forward_many(x, net.spec.routes)
        torch.autograd.backward([logits.square().mean() for logits in answers])

    def theirs() -> None:
        for one in plain:
            one(x).square().mean().backward()

    times = interleave({"ours": ours, "plain": theirs}, min(given.rounds, 11))
    found = ratio(times["ours"], times["plain"])
    return {"batch": len(x), "routes": len(net.spec.routes), "ratio_to_plain": found}


def _plain(model: nn.Module, net: Any, route: Route) -> nn.Module:
    """The model's own layers, with weights cut to a route's width."""
    cuts: dict[str, Cut] = {}
    before = 0
    for number, choice in enumerate(net.spec.segment_indices(route)):
        for step in program(net.graph, number, before, choice):
            cuts |= {arg.name: arg for arg in step.args if isinstance(arg, Cut)}
        before = choice
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            found = cuts.get(f"{path}.{name}")
            if found is not None and tensor is not None:
                with torch.no_grad():
                    tensor.set_(cut(tensor, found.slicers).clone())
        if isinstance(module, nn.Conv2d) and module.groups > 1:  # depthwise
            module.groups = len(module.weight)
    return model


if __name__ == "__main__":
    sys.exit(main())
