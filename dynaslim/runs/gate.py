"""Stage II as a run: train one gate for each target cost on one supernet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cost import CostTable, madds
from dynaslim.cost_file import read_cost_table
from dynaslim.data.transforms import readable_batches
from dynaslim.distributed import rank
from dynaslim.errors import DataError, check
from dynaslim.evaluation import Evaluation
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.progress import progress
from dynaslim.recipes import GateRecipe, RunOptions
from dynaslim.runs.context import Callbacks, RunContext, data_results, opened
from dynaslim.train.expected import apply_heads
from dynaslim.train.fit import augmented_views, fit_to
from dynaslim.train.loop import GateTraining, check_has_gates
from dynaslim.train.route_cache import RouteCache, cache_routes


def run_gate(
    recipe: GateRecipe, out: str | Path, options: RunOptions | None = None
) -> dict[str, Any]:
    """Train gates and write them to folder `out`; returns the content of its `results.json`.

    Writes `gate.safetensors`, or one file such as `gate_0.40.safetensors` for each target. A file
    holds the whole network, which differs from the supernet in the slimming heads alone.

    Raises:
        UsageError: if the folder holds another run, the network has no gates, or a target cannot
            be met.
        CheckpointError: if the supernet cannot be read.
        DataError: if the images cannot be read, or their classes are not the network's.
        TrainingError: if a loss is not finite; the last snapshot is unchanged.
        Stopped: on SIGTERM or SIGINT; the run can be resumed.
        OSError: if a file cannot be written; the last snapshot is unchanged.
    """
    check(bool(recipe.supernet), "name the trained supernet: --supernet CHECKPOINT")
    single_process_for = "objective expected" if recipe.objective == "expected" else ""
    with opened("gate", recipe, out, options, single_process_for=single_process_for) as context:
        return _GateRun(recipe, context).run()


def with_choices(net: ElasticNet, recipe: GateRecipe) -> ElasticNet:
    """The network with the recipe's routing space, if it sets one, and new slimming heads for it.

    Raises:
        UsageError: if the network has no such widths, or another number of gates.
    """
    choices = recipe.choices
    if not choices:
        return net
    assert isinstance(choices, tuple)
    torch.manual_seed(recipe.seed)  # the heads' initial weights
    other = SlimNet(net.spec.with_choices(*choices))
    kept = {k: v for k, v in net.state_dict().items() if not k.endswith(".slimming_weight")}
    other.load_state_dict(kept, strict=False)
    return other.eval()


class _GateRun:
    def __init__(self, recipe: GateRecipe, context: RunContext) -> None:
        self.recipe, self.context = recipe, context
        self.folder, self.stop, self.device = context.folder, context.stop, context.device
        self.supernet = read(recipe.supernet)
        pre = self.supernet.needed_preprocessing(recipe.supernet)
        check_has_gates(self.supernet.net)
        self.net: ElasticNet = with_choices(self.supernet.net, recipe).to(self.device)
        spec = self.net.spec
        data = replace(recipe.data, **pre.to_dict())  # as in the supernet's training
        self.data = context.open_images(data, recipe, spec.in_channels)
        names = self.supernet.class_names
        if len(self.data.class_names) != spec.num_classes or names not in (
            None,
            self.data.class_names,
        ):
            raise DataError(
                f"{self.data.feed.name}: its classes are not those of {recipe.supernet}: "
                f"{', '.join(self.data.class_names)}"
            )
        self.table = (
            CostTable.from_madds(spec, pre.image_size_px)
            if recipe.cost_table is None
            else read_cost_table(recipe.cost_table, spec, image_size=pre.image_size_px)
        )
        # every gate starts from these, whatever was trained before it
        self.first_heads = [head.detach().clone() for head in self.net.slimming_parameters()]
        targets = recipe.targets
        assert isinstance(targets, tuple)
        self.targets: tuple[float | None, ...] = targets or (None,)
        state = self.folder.state or {"gate": 0, "done": [], "training": None}
        if self.folder.state is not None:
            self.data.feed.load_state(self.folder.state)
        self.number: int = state["gate"]
        self.done: list[dict[str, Any]] = state["done"]
        self.unfinished: dict[str, Any] | None = state["training"]
        self.training: GateTraining | None = None

    def run(self) -> dict[str, Any]:
        if self.number == len(self.targets) and (done := self.context.results()) is not None:
            return done
        train = self._train_sgs if self.recipe.objective == "sgs" else self._expected()
        while self.number < len(self.targets):
            self.stop.check()
            target = self.targets[self.number]
            apply_heads(self.net, self.first_heads)
            extra = train(target)
            self.training = self.unfinished = None
            self.done.append(self._keep(target, extra))
            self.number += 1
            self.folder.save_state(self._state())
        return self._finish()

    def _state(self) -> dict[str, Any]:
        training = None if self.training is None else self.training.state()
        return {
            "step": self._steps_before() + (0 if training is None else training["step"]),
            "gate": self.number,
            "done": self.done,
            "training": training,
            **self.data.feed.state(),
        }

    def _steps_before(self) -> int:
        return self.number * self.data.feed.steps_per_epoch * self.recipe.epochs

    # -- sandwich gate sparsification ---------------------------------------------------------

    def _train_sgs(self, target: float | None) -> dict[str, Any]:
        training = GateTraining(
            self.net, self.data.feed, self.data.augment, self.recipe, self.table, target=target
        )
        self.training = training
        if self.unfinished is not None:
            training.load_state(self.unfinished)
        label = "stage II: gate" + ("" if target is None else f" for {target:g}")
        with progress(label, training.total, done=training.step) as bar:
            callbacks = Callbacks(self.context, self._state, bar, self.recipe.batch_size)
            for losses in training:
                callbacks.after_step(
                    self._steps_before() + training.step,
                    {"gate": self.number, "lr": training.lr, **losses._asdict()},
                    f"loss {losses.classification:.2f} | sgs {losses.sgs:.2f} | "
                    f"cost {losses.mean_cost / self.table.widest_cost:.3f} of the widest",
                    save=training.step % training.feed.steps_per_epoch == 0,
                )
        return {"epochs": self.recipe.epochs}

    # -- the exact expected loss --------------------------------------------------------------

    def _expected(self) -> Any:
        """Cache the losses of every route; returns a function that fits a gate to a target."""
        recipe, feed = self.recipe.expected, self.data.feed
        steps = feed.steps_per_epoch * recipe.views
        with progress("caching routes", steps) as bar:
            views = augmented_views(
                feed, self.data.augment, self.device, recipe.views, self.recipe.seed
            )
            train = self._cache(views, self.stop.checked(bar.advance))
        holdout: RouteCache | None = None
        validation = self.data.validation
        if validation is not None:
            images = readable_batches(validation, self.data.preprocessing, self.recipe.batch_size)
            with progress("caching held-out", -(-len(validation) // self.recipe.batch_size)) as bar:
                holdout = self._cache(images, self.stop.checked(bar.advance))

        def fit(target: float | None) -> dict[str, Any]:
            found = fit_to(train, self.table, self.recipe, target, holdout)
            apply_heads(self.net, found.heads)
            return {"cost_weight": found.cost_weight}

        return fit

    def _cache(self, batches: Iterator[tuple[Tensor, Tensor]], on_batch: Any) -> RouteCache:
        self.net.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            return cache_routes(
                self.net,
                batches,
                max_routes=self.recipe.expected.max_routes,
                seed=self.recipe.seed,
                on_batch=on_batch,
            )

    # -- results ------------------------------------------------------------------------------

    def _keep(self, target: float | None, extra: dict[str, Any]) -> dict[str, Any]:
        self.net.eval()
        result = self.context.evaluate(
            self.net, self.data, f"gate {self.number + 1} of {len(self.targets)}"
        )
        name = self._name(target)
        summary = None if result is None else result.to_dict()
        entry = {
            "target": target,
            **extra,
            "cost_share": None if result is None else self._cost_share(result),
            "val": summary,
            "file": str(self.folder.file(name)),
        }
        if rank() == 0:
            checkpoint = Checkpoint(
                net=self.net,
                class_names=self.data.class_names,
                preprocessing=self.supernet.preprocessing,
                metrics={} if summary is None else {"val": summary},
                recipe={**self.supernet.recipe, "gate": self.recipe.to_dict(), "target": target},
            )
            save(self.folder.file(name), checkpoint)
        return entry

    def _name(self, target: float | None) -> str:
        if target is None:
            return "gate.safetensors"
        rounded = [f"{other:.2f}" for other in self.targets]
        shown = f"{target:.2f}" if len(set(rounded)) == len(rounded) else f"{target:g}"
        return f"gate_{shown}.safetensors"

    def _cost_share(self, result: Evaluation) -> float:
        """Mean cost of the routes taken, by the table, as a share of the widest route's."""
        total = 0.0
        spec = self.net.spec
        rows, counts = torch.unique(result.choices, dim=0, return_counts=True)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            total += self.table.route_cost(spec.path_at(row)) * count
        return total / len(result.choices) / self.table.widest_cost

    def _finish(self) -> dict[str, Any]:
        spec, pre = self.net.spec, self.data.preprocessing
        first = self.done[0]["val"]
        return self.context.write_results(
            {
                "stage": "gate",
                "model": spec.name,
                "objective": self.recipe.objective,
                "unit": self.table.unit,
                **data_results(self.data),
                "widest_madds": madds(spec, spec.widest_choice, pre.image_size_px),
                "routes": [] if first is None else first["routes"],
                "gates": self.done,
                "files": {Path(entry["file"]).stem: entry["file"] for entry in self.done},
            }
        )
