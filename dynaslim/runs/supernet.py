"""Stage I as a run: train, validate, keep the best network, resume, write the results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dynaslim._memory import FreedMemory
from dynaslim.checkpoint import Checkpoint, keeps_classifier, read, save, with_classes
from dynaslim.distributed import rank, world_size
from dynaslim.errors import UsageError, check
from dynaslim.evaluation import Evaluation
from dynaslim.graph import AnySpec, GraphSpec
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.nn.sorting import slimmable, widest_only
from dynaslim.progress import note, progress
from dynaslim.recipes import DataRecipe, RunOptions, SupernetRecipe
from dynaslim.runs.context import Callbacks, RunContext, data_results, opened
from dynaslim.spec import NetSpec
from dynaslim.train import recalibrate
from dynaslim.train.features import TrunkFeatures, trunk_features
from dynaslim.train.fit import augmented_views
from dynaslim.train.loop import SupernetTraining, calibration_batches, training_batches
from dynaslim.train.teacher import OutsideTeacher
from dynaslim.zoo import get_spec


def run_supernet(
    recipe: SupernetRecipe, out: str | Path, options: RunOptions | None = None
) -> dict[str, Any]:
    """Train a supernet and write it to folder `out`; returns the content of its `results.json`.

    Writes `last.safetensors` (the averaged network), `last_live.safetensors` (the trained one) and,
    if images are held out, `best.safetensors` (the averaged network of the best evaluation during
    training). Each has its own BN statistics, recalibrated for every route.

    Raises:
        UsageError: if the folder holds another run, or the recipe does not fit the data or the
            checkpoint that it starts from.
        CheckpointError: if that checkpoint cannot be read.
        DataError: if the images cannot be read.
        TrainingError: if a loss is not finite; the last snapshot is unchanged.
        Stopped: on SIGTERM or SIGINT; the run can be resumed.
        OSError: if a file cannot be written; the last snapshot is unchanged.
    """
    with opened("supernet", recipe, out, options) as context:
        return _SupernetRun(recipe, context).run()


def _start(recipe: SupernetRecipe, spec: NetSpec) -> Checkpoint:
    """Read the start checkpoint: a converted network, the recipe's model, or its widest alone."""
    assert recipe.init is not None
    start = read(recipe.init)
    if isinstance(start.net.spec, GraphSpec):
        return start  # a converted network is its own model
    found = start.net.spec
    check(
        _shape(found, widths=False) == _shape(spec, widths=False),
        f"init {recipe.init}: holds {found.name}, which is not the recipe's model {recipe.model}; "
        f"name the model that it was trained as",
    )
    if _shape(found) not in (_shape(spec), _shape(widest_only(spec))):
        pairs = [(a.widths, b.widths) for a, b in zip(found.stages, spec.stages, strict=True)]
        unlike = [number for number, (its, own) in enumerate(pairs) if its != own]
        # a stage that fits neither way or, if each fits one way, the first that differs
        number = next((n for n in unlike if pairs[n][0] != pairs[n][1][-1:]), unlike[0])
        its, own = pairs[number]
        raise UsageError(
            f"init {recipe.init}: stage {number} has widths {its}, in {recipe.model} they are "
            f"{own}; to start from it, a network has all of every stage's widths, or the last "
            f"alone, {own[-1:]}"
        )
    return start


def _shape(spec: NetSpec, *, widths: bool = True) -> dict[str, Any]:
    """A spec as a dict, without the fields in which a network and its start may differ."""
    shape = spec.with_choices((0,)).replace(name="", num_classes=1).to_dict()
    if not widths:
        for stage in shape["stages"]:
            del stage["widths"]
    return shape


def _prepared_as(start: Checkpoint, data: DataRecipe) -> DataRecipe:
    """The recipe's data, prepared as for the checkpoint where the recipe has its defaults.

    Size and crop are only taken from a converted network, which runs at the sizes it was made for.
    """
    pre = start.preprocessing
    if pre is None:
        return data
    if data.mean is None:
        data = replace(data, mean=pre.mean, std=pre.std)
    if isinstance(start.net.spec, GraphSpec) and data.image_size_px == DataRecipe.image_size_px:
        data = replace(data, image_size_px=pre.image_size_px, crop_fraction=pre.crop_fraction)
    return data


_TEACHER_BATCHES: Final = 8


class _SupernetRun:
    def __init__(self, recipe: SupernetRecipe, context: RunContext) -> None:
        self.recipe, self.context = recipe, context
        self.folder, self.stop = context.folder, context.stop
        named = get_spec(recipe.model)
        start = None if recipe.init is None else _start(recipe, named)
        spec: AnySpec = named
        if start is not None and isinstance(start.net.spec, GraphSpec):
            spec = start.net.spec
        data = recipe.data if start is None else _prepared_as(start, recipe.data)
        self.data = context.open_images(data, recipe, spec.in_channels)
        names = self.data.class_names
        torch.manual_seed(recipe.seed)  # for the initial weights; all else is seeded by step
        self.classifier = "started anew"
        if start is not None:
            if spec is named and _shape(start.net.spec) != _shape(named):
                assert isinstance(start.net, SlimNet)
                start = replace(start, net=self._slimmable(start.net, named))
            net = with_classes(start, names)
            if keeps_classifier(start, names):
                self.classifier = "taken over"
            classes = f"{len(names)} classes: {', '.join(names[:6])}{', ...' * (len(names) > 6)}"
            note(f"classifier of {recipe.init}: {self.classifier} for {classes}")
        else:
            net = SlimNet(named.replace(num_classes=len(names)))
        net.to(context.device)
        size = self.data.preprocessing.image_size_px
        net.spec.check_image_size(size, size)
        state = context.folder.state
        if state is not None:  # before the trunk's features are computed
            net.load_state_dict(state["modules"]["net"])
        outside = self._teacher(net.spec)
        features = self._features(net, outside) if recipe.trunk_views else None
        self.training = SupernetTraining(
            net,
            self.data.feed,
            self.data.augment,
            recipe,
            outside=None if features is not None else outside,
            features=features,
        )
        self.best: dict[str, Any] | None = None
        self.misses = 0
        """Number of consecutive evaluations without a new best."""
        self.validated = 0
        if state is not None:
            self.training.load_state(state)
            self.best, self.validated = state["best"], state["validated"]
            self.misses = state.get("misses", 0)
            self.data.feed.load_state(state)

    def _teacher(self, spec: NetSpec) -> OutsideTeacher | None:
        """The recipe's teacher, with the route and BN statistics of the lowest loss on a sample."""
        recipe, data = self.recipe, self.data
        if recipe.teacher is None:
            return None
        teacher = OutsideTeacher(recipe.teacher, data.class_names, data.preprocessing, spec)
        teacher.to(self.context.device)
        count = min(_TEACHER_BATCHES, data.feed.steps_per_epoch)
        chosen = teacher.choose(
            training_batches(data.feed, data.augment, self.context.device, count, recipe.seed)
        )
        if self.folder.state is None:
            self.folder.log("teacher", 0, chosen)
        return teacher

    def _features(self, net: ElasticNet, outside: OutsideTeacher | None) -> TrunkFeatures:
        """Trunk features of the recipe's views of every training image."""
        recipe, feed = self.recipe, self.data.feed
        check(world_size() == 1, "trunk_views: runs in one process; leave torchrun out")
        check(bool(net.spec.gates), f"trunk_views: {net.spec.name} has no gate behind a trunk")
        check(
            not net.spec.has_separate_teacher,
            f"trunk_views: the largest network of {net.spec.name} has a wider trunk; set it to 0",
        )
        steps = feed.steps_per_epoch
        with progress("running the trunk", recipe.trunk_views * steps) as bar:
            views = augmented_views(
                feed, self.data.augment, self.context.device, recipe.trunk_views, recipe.seed
            )
            made = trunk_features(
                net,
                views,
                (recipe.trunk_views, steps),
                recipe.seed,
                outside=outside,
                on_batch=self.stop.checked(bar.advance),
            )
        note(f"trunk features: {made.nbytes / 2**20:.0f} MiB for {recipe.trunk_views} views")
        return made

    def _slimmable(self, wide: SlimNet, spec: NetSpec) -> SlimNet:
        """Make the recipe's model from its widest alone: sort channels, calibrate narrow routes."""
        if self.folder.state is not None:
            return SlimNet(spec.replace(num_classes=wide.spec.num_classes))  # the snapshot has all

        def batches() -> Iterator[Tensor]:
            recipe, data = self.recipe, self.data
            count = recipe.val_calibration_batches
            return calibration_batches(
                data.feed, data.augment, self.context.device, count, recipe.seed
            )

        net = slimmable(wide.to(self.context.device), spec, batches())
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        recalibrate(net, batches(), on_batch=self.stop.check)
        for name, buffer in net.named_buffers():
            buffer[-1] = before[name][-1]  # the last slot is the largest network's: unchanged
        return net

    def run(self) -> dict[str, Any]:
        training, recipe = self.training, self.recipe
        if self._has_ended() and (done := self.context.results()) is not None:
            return done
        every = recipe.val_epochs * training.feed.steps_per_epoch
        first, memory = training.step, FreedMemory(world_size())
        with progress("stage I: supernet", training.total, done=training.step) as bar:
            callbacks = Callbacks(self.context, self._state, bar, recipe.batch_size)
            if training.step and self._is_due(every):
                self._validate()  # the run was stopped between the step and its evaluation
                callbacks.restart_clock()
            for losses in () if self._has_ended() else training:
                if self.context.device.type == "cpu":
                    memory.after_step()
                middle = " ".join(f"{loss:.2f}" for loss in losses.randoms)
                callbacks.after_step(
                    training.step,
                    {
                        "epoch": round(training.step / training.feed.steps_per_epoch, 3),
                        "lr": training.lr,
                        "largest": losses.largest,
                        "randoms": list(losses.randoms),
                        "smallest": losses.smallest,
                    },
                    f"loss {losses.largest:.2f} | {middle} | {losses.smallest:.2f}",
                    save=training.step % training.feed.steps_per_epoch == 0,
                )
                if self._is_due(every):
                    self._validate()
                    if self._has_ended():
                        break
                    callbacks.restart_clock()
        return self._finish(callbacks.seconds, training.step - first)

    def _state(self) -> dict[str, Any]:
        return {
            **self.training.state(),
            "best": self.best,
            "validated": self.validated,
            "misses": self.misses,
            **self.data.feed.state(),
        }

    def _has_ended(self) -> bool:
        """Whether all steps are done or the recipe's patience is exhausted."""
        patience = self.recipe.patience
        return self.training.step == self.training.total or (
            patience is not None and self.misses >= patience
        )

    def _is_due(self, every: int) -> bool:
        step = self.training.step
        at_end = step == self.training.total
        return self.validated < step and (step % every == 0 or at_end)

    def _validate(self) -> None:
        """Evaluate the averaged network on the held-out images, and save it if it is the best."""
        self.validated = self.training.step
        if self.data.validation is None:
            return
        net = self.training.averaged_network()
        self._recalibrate(net, self.recipe.val_calibration_batches)
        result = self._evaluate(net)
        assert result is not None
        top1 = [route.top1 for route in result.routes]
        mean = sum(top1) / len(top1)
        is_best = self.best is None or mean > self.best["mean_top1"]
        self.misses = 0 if is_best else self.misses + 1
        self.folder.log(
            "val",
            self.training.step,
            {"top1": top1, "mean_top1": mean, "loss": [route.loss for route in result.routes]},
        )
        if is_best:
            self.best = {"step": self.training.step, "mean_top1": mean}
            self._save("best.safetensors", net, {"val": result.to_dict()})
        self.folder.save_state(self._state())

    def _finish(self, seconds: float, steps: int) -> dict[str, Any]:
        training = self.training
        evaluations: dict[str, Any] = {}
        files: dict[str, str] = {}
        for name, net in (
            ("last", training.averaged_network()),
            ("last_live", training.live_network()),
        ):
            self._recalibrate(net, self.recipe.calibration_batches, f"recalibrating {name}")
            result = self._evaluate(net, name)
            if result is not None:
                evaluations[name] = result.to_dict()
            metrics = {} if result is None else {"val": evaluations[name]}
            files[name] = self._save(f"{name}.safetensors", net, metrics)
        if self.best is not None:
            files["best"] = str(self.folder.file("best.safetensors"))
        return self.context.write_results(
            {
                "stage": "supernet",
                "model": training.net.spec.name,
                **data_results(self.data),
                "classifier": self.classifier,
                "steps": training.step,
                "images_per_s": round(steps * self.recipe.batch_size / seconds, 1)
                if steps
                else None,
                "best": self.best,
                "val": evaluations,
                "files": files,
            }
        )

    def _recalibrate(self, net: ElasticNet, batches: int, label: str = "") -> None:
        batches = min(batches, self.training.feed.steps_per_epoch)
        with progress(label, batches) as bar:
            self.training.recalibrate(net, batches, on_batch=self.stop.checked(bar.advance))

    def _evaluate(self, net: ElasticNet, label: str = "") -> Evaluation | None:
        # the gates are not trained yet
        routes = (net.spec.largest,) if self.recipe.routes == "largest" else None
        return self.context.evaluate(net, self.data, label, routes=routes, dynamic=False)

    def _save(self, name: str, net: ElasticNet, metrics: dict[str, Any]) -> str:
        path = self.folder.file(name)
        if rank() == 0:
            save(
                path,
                Checkpoint(
                    net=net,
                    class_names=self.data.class_names,
                    preprocessing=self.data.preprocessing,
                    metrics=metrics,
                    recipe={"supernet": self.recipe.to_dict()},
                ),
            )
        return str(path)
