"""Recipes: the settings of a training run, as frozen data with validation.

A recipe contains everything that determines the results and nothing about the machine; device,
workers and logging are in `RunOptions`. This module does not import torch, so that help is fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dynaslim._files import read_yaml
from dynaslim.errors import UsageError, check

Target = Literal["labels", "distillation", "bootstrap", "ensemble"]
Objective = Literal["expected", "sgs"]


def _values(recipe: object, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in names:
        value = getattr(recipe, name)
        if value is not None:
            yield name, value


def _check_least(recipe: object, low: float, *names: str) -> None:
    for name, value in _values(recipe, names):
        check(value >= low, f"{name} {value}: must be at least {low}")


def _check_most(recipe: object, high: float, *names: str) -> None:
    for name, value in _values(recipe, names):
        check(value <= high, f"{name} {value}: must be at most {high}")


def _check_positive(recipe: object, *names: str) -> None:
    for name, value in _values(recipe, names):
        check(value > 0, f"{name} {value}: must be above 0")


def _check_below_1(recipe: object, *names: str) -> None:
    for name, value in _values(recipe, names):
        check(0 <= value < 1, f"{name} {value}: must be in [0, 1)")


@dataclass(frozen=True)
class DataRecipe:
    """Images for training and for model selection."""

    path: str = ""
    """A parquet file or a folder of them, a folder of images by class, or a hub name."""
    split: str = "train"
    """Split to train on."""
    val_split: str | None = None
    """Split for model selection; None holds out images of the training split."""
    val_share: float = 0.1
    """Part of the training split held out if there is no `val_split`; 0 holds out none."""
    image_size_px: int = 32
    """Side of the network's square input."""
    crop_fraction: float = 1.0
    """Part of the shorter side that the centre crop keeps in evaluation."""
    mean: tuple[float, ...] | None = None
    """Mean per channel, of values in 0..1. None computes it from images in memory; otherwise
    ImageNet's mean is used."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel, of values in 0..1. None: as for `mean`."""
    load: Literal["memory", "disk", "stream"] = "memory"
    """`memory` decodes a set once and keeps it as uint8; `disk` decodes each image when it is
    needed; `stream` reads the set sequentially, for one larger than the disk."""
    stream_images: int | None = None
    """Number of images in a streamed training split, if the data set does not state it."""
    shuffle_buffer: int = 10_000
    """Images in the shuffle buffer of a stream."""
    corrupt_limit: float = 0.01
    """Share of images (at least one image) that may fail to decode; they are named, counted and
    skipped."""

    def __post_init__(self) -> None:
        _check_below_1(self, "val_share")
        _check_least(self, 1, "image_size_px", "stream_images", "shuffle_buffer")
        _check_least(self, 0, "corrupt_limit")
        _check_positive(self, "crop_fraction")
        _check_most(self, 1, "crop_fraction", "corrupt_limit")
        check((self.mean is None) == (self.std is None), "mean and std: give both or neither")
        check(
            self.load != "stream" or self.val_split is not None or self.val_share == 0,
            "load stream: a stream holds nothing back; name a val_split, or set val_share 0",
        )


@dataclass(frozen=True)
class AugmentRecipe:
    """Augmentation of training images, on whole batches by kornia."""

    crop: Literal["none", "shift", "resized"] = "shift"
    """`shift` by some pixels, usual for small images; `resized`, a random part of the image at a
    random aspect ratio, usual for ImageNet."""
    shift_px: int = 2
    """Largest shift in pixels."""
    scale_min: float = 0.08
    """Smallest part of the image's area in a `resized` crop."""
    mirror: bool = True
    """Random horizontal flip."""
    randaugment_ops: int = 0
    """RandAugment: operations per image; 0 for none."""
    randaugment_magnitude: float = 9.0
    """RandAugment: strength, 0 to 10."""
    randaugment_std: float = 0.5
    """RandAugment: standard deviation of the strength."""
    jitter: float = 0.0
    """Random change of brightness, contrast and saturation by up to this share."""
    erasing: float = 0.0
    """Probability that a random rectangle is replaced by noise."""
    mixup: float = 0.0
    """Mixup's alpha; 0 for none. If cutmix is on too, each batch gets one of the two."""
    cutmix: float = 0.0
    """CutMix's alpha; 0 for none."""

    def __post_init__(self) -> None:
        _check_least(self, 0, "shift_px", "randaugment_ops", "randaugment_magnitude")
        _check_least(self, 0, "randaugment_std", "jitter", "erasing", "mixup", "cutmix")
        _check_positive(self, "scale_min")
        _check_most(self, 1, "scale_min", "jitter", "erasing")
        _check_most(self, 10, "randaugment_magnitude")


@dataclass(frozen=True)
class OptimRecipe:
    """Optimizer and schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.4
    """Peak learning rate, after the warm-up; then cosine decay to zero."""
    warmup_share: float = 0.1
    """Share of all steps in which the learning rate rises linearly."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """Nesterov momentum for SGD."""
    weight_decay: float = 1e-4
    """Weight decay of convolution and linear weights; none for BN and biases."""
    clip_norm: float | None = None
    """Largest total gradient norm; None does not clip."""
    accumulate: int = 1
    """Number of parts into which a batch is split to save memory; gradients are accumulated, and
    the optimizer steps once."""

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "clip_norm")
        _check_below_1(self, "warmup_share", "momentum")
        _check_least(self, 0, "weight_decay")
        _check_least(self, 1, "accumulate")


class _Recipe:
    """Common base of the recipes of both stages."""

    epochs: int
    seed: int

    def __post_init__(self) -> None:
        _check_least(self, 1, "epochs")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be between 0 and 2^63 - 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `recipe_from_dict` reads them back."""
        # through JSON, which turns tuples into lists
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]
        return plain


@dataclass(frozen=True)
class SupernetRecipe(_Recipe):
    """Stage I: the supernet, trained by the sandwich rule."""

    model: str = "ds_mbnet_tiny"
    """Name of an architecture in the zoo, or a spec file (.yaml)."""
    init: str | None = None
    """Checkpoint to start from instead of random weights: of this model, or of its widest network
    alone, whose channels are then sorted by importance. The classifier is initialised anew if the
    classes differ; a converted network keeps its architecture, whatever `model` is; mean and std
    come from the checkpoint if `data` has none; the gates' choices come from the checkpoint."""
    epochs: int = 10
    """Passes over the training images."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a better mean; None trains all epochs."""
    batch_size: int = 128
    """Images per step, over all processes; an incomplete last batch is left out."""
    routes: Literal["sandwich", "largest"] = "sandwich"
    """Routes of a step: by the sandwich rule, or only the largest, as in ordinary training."""
    trunk_views: int = 0
    """Augmented views of every image whose trunk features are computed once, before training, and
    kept in memory; the trunk is frozen. 0 trains the trunk too."""
    target: Target = "ensemble"
    """Training target of the sub-networks; the largest always learns the labels. `labels`;
    `distillation`, the largest network's prediction; `bootstrap`, the averaged (EMA) largest
    network's prediction; `ensemble`, the same, but for the smallest the mean of the averaged
    network's predictions along the step's routes."""
    teacher: str | None = None
    """Checkpoint of a trained network with the same classes and image size. All routes, including
    the largest, learn its prediction instead of `target`."""
    label_weight: float = 0.0
    """Weight of the loss on labels, added to the loss against predictions."""
    label_warmup: float = 0.0
    """Share of all steps in which the loss moves linearly from the labels alone to the loss set by
    `target`, `teacher` and `label_weight`."""
    random_routes: int = 2
    """Random routes between the largest and the smallest in each step; fewer if there are fewer."""
    label_smoothing: float = 0.1
    """Label smoothing."""
    dropout: float = 0.2
    """Dropout on the pooled features of the largest network only."""
    ema_decay: float = 0.997
    """Decay of the averaged (EMA) network; in the warm-up it is (1 + t) / (10 + t)."""
    calibration_batches: int = 100
    """Training batches per route for the BN statistics after training."""
    val_calibration_batches: int = 8
    """Training batches per route for the BN statistics before an evaluation during training."""
    val_epochs: int = 1
    """Epochs between evaluations on the held-out images; the last epoch is always followed by
    one."""
    bf16: bool = False
    """bfloat16 autocast of the forward passes."""
    channels_last: bool = True
    """Memory format of weights and images; the faster one on most hardware."""
    compile: bool = False
    """Use torch.compile for every variant of every segment."""
    seed: int = 0
    """Seed of all randomness in the stage."""
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.batch_size >= 2, f"batch_size {self.batch_size}: BN needs at least 2")
        _check_below_1(self, "label_smoothing", "dropout", "ema_decay")
        _check_least(self, 0, "label_weight", "label_warmup", "random_routes")
        _check_most(self, 1, "label_warmup")
        _check_least(self, 0, "trunk_views")
        _check_least(self, 1, "calibration_batches", "val_calibration_batches", "val_epochs")
        _check_least(self, 1, "patience")
        check(
            not (self.trunk_views and (self.augment.mixup or self.augment.cutmix)),
            "trunk_views: mixup and cutmix need the images themselves; leave them out",
        )
        check(
            not (self.trunk_views and self.compile),
            "trunk_views: compile is for whole networks; leave one of the two out",
        )
        check(
            self.teacher is not None
            or self.target != "labels"
            or (self.label_weight == 0 and self.label_warmup == 0),
            "target labels: label_weight and label_warmup are for a target or a teacher beside it",
        )


@dataclass(frozen=True)
class SgsRecipe:
    """Sandwich gate sparsification, the paper's objective."""

    hard: Literal["try_best", "give_up"] = "try_best"
    """Target for an image that the smallest route gets wrong: `try_best`, the last choice;
    `give_up`, the last choice only if the widest route is right, else the first, which saves
    compute."""
    gumbel: bool = True
    """Sample the gates of the classification loss (straight-through Gumbel-softmax), as in the
    paper; without it, gates are the straight-through argmax, without noise."""
    tau: float = 1.0
    """Temperature of the gates."""
    easy_share: float | None = None
    """Total weight of the easy images in the sparsification term. None weighs all images equally,
    as in the paper: if nine of ten are easy, the gate then predicts every image to be easy and
    sends all along the cheapest route."""
    class_weight: float = 1.0
    """Weight of the classification term."""
    sgs_weight: float = 1.0
    """Weight of the sparsification term."""
    cost_weight: float = 0.5
    """Weight of the cost term, (mean cost / cost_scale) squared."""
    cost_scale: float | None = None
    """The cost term's T, in the cost table's unit. None takes the target cost or, without one, 1.77
    times the widest route's: the paper's ratio of 1e9 to 565 M."""
    label_smoothing: float = 0.1
    """Smoothing of labels and sparsification labels; the released code smooths both."""

    def __post_init__(self) -> None:
        _check_positive(self, "tau", "easy_share", "cost_scale")
        _check_below_1(self, "easy_share", "label_smoothing")
        _check_least(self, 0, "class_weight", "sgs_weight", "cost_weight")


@dataclass(frozen=True)
class ExpectedRecipe:
    """The exact expected loss, computed from cached losses of the routes."""

    max_routes: int = 64
    """Most combinations of choices to cache; if there are more, this many are sampled."""
    views: int = 1
    """Augmented views of every training image in the cache."""
    iterations: int = 100
    """Most L-BFGS steps over the whole cache per fit; it stops when converged."""
    entropy: float = 0.3
    """Weight of the entropy of the gates' choices, as a share of the spread of loss and cost
    between the routes; keeps the heads from overfitting. 0 fits the expected loss alone."""
    weight_decay: float = 1e-3
    """Weight decay of the heads, on features of standard deviation 1."""
    sgs_weight: float = 0.0
    """Weight of the sparsification term added to the expected loss."""
    bisections: int = 8
    """Bisections of the range of cost weights in the search for a target cost, on a log scale."""
    cost_weight: float = 1.0
    """Weight of the cost, as a share of the widest route's, if the recipe has no target."""

    def __post_init__(self) -> None:
        _check_least(self, 1, "max_routes", "views", "iterations", "bisections")
        _check_least(self, 0, "entropy", "weight_decay", "sgs_weight", "cost_weight")


@dataclass(frozen=True)
class GateRecipe(_Recipe):
    """Stage II: the slimming heads; everything else is frozen.

    Learning rate, weight decay and the weights of the sgs terms default to the paper's.
    """

    objective: Objective = "expected"
    """`sgs`, sandwich gate sparsification (the paper's), or `expected`, the exact expected loss
    from cached losses of every route."""
    supernet: str = ""
    """Checkpoint of the trained supernet."""
    targets: tuple[float, ...] | float | str = ()
    """Target mean costs as shares of the widest route's, such as 0.4,0.6,0.8: one gate is trained
    for each. `expected` meets them; for `sgs` each is the scale of a cost term. Without targets,
    one gate is trained, and its cost depends on the weights of the loss terms alone."""
    choices: tuple[tuple[int, ...], ...] | str = ()
    """Width indices that the gates choose among: 0,1,2,3 for all gates, or one set for each gate,
    such as 0,2;0,1,2. Empty keeps the supernet's."""
    cost_table: str | None = None
    """File of a cost table (MAdds or measured ms); None counts MAdds."""
    epochs: int = 3
    """Passes over the training images (sgs)."""
    batch_size: int = 128
    """Images per step, over all processes; an incomplete last batch is left out."""
    bf16: bool = False
    """bfloat16 autocast of the forward passes."""
    seed: int = 0
    """Seed of all randomness in the stage."""
    sgs: SgsRecipe = field(default_factory=SgsRecipe)
    expected: ExpectedRecipe = field(default_factory=ExpectedRecipe)
    optim: OptimRecipe = field(
        default_factory=lambda: OptimRecipe(lr=0.08, warmup_share=0.0, weight_decay=0.01)
    )
    data: DataRecipe = field(default_factory=DataRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_least(self, 1, "batch_size")
        object.__setattr__(self, "targets", _shares(self.targets))
        object.__setattr__(self, "choices", _choices(self.choices))
        mixed = self.augment.mixup or self.augment.cutmix
        check(
            self.optim.accumulate == 1,
            "optim.accumulate: gates are trained on whole batches; take a smaller batch_size",
        )
        check(
            self.objective != "sgs" or self.sgs.cost_scale is None or not self.targets,
            "targets and sgs.cost_scale: both are the scale of the cost term; give one",
        )
        check(not mixed, "mixup and cutmix: an image that is a mixture has no route of its own")


def _choices(value: tuple[tuple[int, ...], ...] | str) -> tuple[tuple[int, ...], ...]:
    """Parse sets of width indices from a file or the command line."""
    try:
        if isinstance(value, str):
            sets = [part for part in value.split(";") if part.strip()]
            return tuple(tuple(int(index) for index in part.split(",")) for part in sets)
        return tuple(tuple(int(index) for index in part) for part in value)
    except (TypeError, ValueError):
        raise UsageError(f"choices {value}: expected width indices such as 0,1,2,3") from None


def _shares(value: tuple[float, ...] | float | str) -> tuple[float, ...]:
    """Parse target costs from a file or the command line."""
    try:
        match value:
            case str():
                shares = tuple(float(part) for part in value.split(",") if part.strip())
            case tuple() | list():
                shares = tuple(float(part) for part in value)
            case _:
                shares = (float(value),)
    except (TypeError, ValueError):
        raise UsageError(f"targets {value}: expected numbers such as 0.4,0.6,0.8") from None
    check(
        all(0 < share <= 1 for share in shares) and len(set(shares)) == len(shares),
        f"targets {value}: shares of the widest route's cost, each above 0, at most 1, and once",
    )
    return shares


Recipe = TypeVar("Recipe", SupernetRecipe, GateRecipe)


def load_recipe(kind: type[Recipe], path: str | Path) -> Recipe:
    """Read a recipe from a YAML file; missing keys take the defaults.

    Raises:
        UsageError: if the file cannot be read, or has unknown keys or values that do not fit.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected keys and values of a recipe")
    try:
        return recipe_from_dict(kind, data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def recipe_from_dict(kind: type[Recipe], data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        UsageError: for unknown keys or values that do not fit.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "recipe")
    try:
        parsed = parser.parse_object({"recipe": dict(data)})
    except (jsonargparse.ArgumentError, TypeError, KeyError) as error:
        raise UsageError(" ".join(str(error).replace("recipe.", "").split())) from None
    built: Recipe = parser.instantiate(parsed).recipe
    return built


@dataclass(frozen=True)
class AdaptOptions:
    """Options for adapting a trained network to images."""

    data: str
    """A parquet file or a folder of them, a folder of images by class, or a hub name."""
    split: str = "train"
    """Split to train on."""
    test_split: str = "test"
    """Split for the report; if there is none, the report uses the held-out images."""
    val_share: float = 0.15
    """Part of the training split held out, for model selection and to calibrate budgets."""
    weights: Path | None = None
    """Weights of the model, .safetensors or .pth; not for a checkpoint, which has its own."""
    num_classes: int | None = None
    """Number of classes that the weights are for, if it is not the default of the model's
    library."""
    image_size: int | None = None
    """Side of the network's input image in pixels. Default: the model's."""
    sizes: str = ""
    """Several image sizes instead of one, such as 128,224: an image is run at the smallest size
    first, and at a larger one if the answer is uncertain."""
    widths: str = "0.25,0.5,0.75,1"
    """Shares of the channels behind the gate, rising to 1."""
    gate_at: str = ""
    """Modules behind which gates are inserted, separated by commas. Default: one gate, where it
    saves most multiply-adds."""
    protect: str = ""
    """Modules whose channels stay whole, separated by commas."""
    epochs: int | None = None
    """Epochs, for the original and for the supernet each. Default: as many as make
    12,000 images, at least 4 and at most 30."""
    minutes: float | None = None
    """Time to plan for instead of epochs; a few steps are timed first."""
    lr: float = 0.03
    """Peak learning rate; low, because the weights are already trained."""
    batch_size: int = 64
    """Images per step."""
    views: int | None = None
    """Augmented views of every image whose trunk features are kept in memory; 0 trains the trunk
    too. Default: by the number of images, 2 to 8; 0 if the largest route has a wider trunk."""
    label_weight: float = 0.5
    """Weight of the loss on labels, added to the loss against the original's predictions."""
    no_mirror: bool = False
    """Never mirror images, because a mirror image may be of another class (as with text)."""
    budget: float = 0.5
    """Mean cost that the gate is trained for, as a share of the widest route's."""
    backend: str = "auto"
    """Backend to time: auto, eager, inductor, onnxruntime, openvino or cudagraph."""
    seed: int = 0
    """Seed of all randomness."""

    def __post_init__(self) -> None:
        _check_least(self, 1, "epochs", "image_size")
        _check_least(self, 2, "batch_size", "num_classes")
        _check_least(self, 0, "views", "label_weight")
        _check_positive(self, "minutes", "lr", "budget", "val_share")
        _check_most(self, 1, "budget")
        _check_below_1(self, "val_share")
        check(
            self.epochs is None or self.minutes is None,
            "epochs and minutes: both say how long to train; give one",
        )
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be between 0 and 2^63 - 1")
        self.shares  # noqa: B018  # raises if it is not a list of shares
        sides = self.sides
        check(
            not sides or (len(sides) > 1 and sides[0] > 0 and self.image_size is None),
            f"sizes {self.sizes}: give two or more, in place of an image_size",
        )

    @property
    def shares(self) -> tuple[float, ...]:
        """`widths` as numbers."""
        return parse_shares(self.widths)

    @property
    def sides(self) -> tuple[int, ...]:
        """`sizes` as numbers, the smallest first."""
        try:
            return tuple(sorted({int(part) for part in self.sizes.split(",") if part.strip()}))
        except ValueError:
            raise UsageError(f"sizes {self.sizes}: expected numbers such as 128,224") from None


def parse_shares(widths: str) -> tuple[float, ...]:
    """Parse shares of the channels such as "0.25,0.5,1"; raises `UsageError` otherwise."""
    try:
        shares = tuple(float(part) for part in widths.split(","))
    except ValueError:
        raise UsageError(f"widths {widths}: expected numbers such as 0.25,0.5,1") from None
    return shares


def parse_names(text: str) -> list[str]:
    """Split names at commas; an empty text has no names."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class ReportOptions:
    """Options for making a report."""

    data: str | None = None
    """Images to evaluate on: a parquet file or a folder of them, a folder of images by class, or a
    hub name. By default those that training held out, if they still exist."""
    split: str | None = None
    """Split of the data; by default test, or what training held out."""
    target: float | None = None
    """Target of the gate to show in detail, for a run with several; by default the middle one."""
    images: int | None = None
    """Number of images to evaluate on, a fixed random sample; by default all."""
    baselines: Path | None = None
    """JSON file of static networks to compare with, [{"name", "top1", "madds", "ms"}, ...]; by
    default the run's baselines.json."""
    title: str | None = None
    """Title of the page."""
    backend: str = "auto"
    """Backend to time: auto, eager, inductor, onnxruntime, openvino or cudagraph."""
    rounds: int | None = None
    """Rounds of timing; 0 omits milliseconds. By default as many as fit into ten seconds."""
    batch_size: int = 256
    """Images per batch of the evaluation."""
    device: str = "cpu"
    """Device of the evaluation: cpu, cuda or mps."""
    no_cache: bool = False
    """Neither store nor reuse compiled programs on disk."""

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("rounds", 0), ("batch_size", 1)):
            value = getattr(self, name)
            flag = name.replace("_", "-")
            check(value is None or value >= least, f"--{flag} {value}: must be at least {least}")
        check(self.rounds != 1, "--rounds 1: has no spread; give at least 2, or 0 for no timing")

    @property
    def cache_dir(self) -> str | None:
        return None if self.no_cache else "auto"


@dataclass(frozen=True)
class DemoOptions:
    """Options for training the demo's network."""

    epochs: int = 6
    """Passes over the 9,000 images in stage I (the supernet)."""
    target: float = 0.5
    """Mean cost that the gate of stage II is trained for, as a share of the widest route's."""
    seed: int = 0
    """Seed of all randomness: the same seed and number of threads give the same numbers."""


@dataclass(frozen=True)
class RunOptions:
    """How a run uses the machine; none of this changes the results of a single process."""

    resume: bool = False
    """Continue the run in the folder; start a new one if there is none."""
    force: bool = False
    """Resume although the recipe has changed."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `mps`; under torchrun, each process uses one device."""
    workers: int = 2
    """Processes that decode images, per process of the run; 0 decodes in the run's process."""
    save_every_s: float = 60.0
    """Seconds between snapshots; a snapshot is also written after every epoch."""
    log_every: int = 10
    """Steps between lines of the metrics file."""

    def __post_init__(self) -> None:
        known = self.device in ("auto", "cpu", "cuda", "mps")
        check(known, f"--device {self.device}: choose auto, cpu, cuda or mps")
        check(self.workers >= 0, f"workers {self.workers}: must not be negative")
        check(self.save_every_s >= 0, f"save_every_s {self.save_every_s}: must not be negative")
        check(self.log_every >= 1, f"log_every {self.log_every}: must be at least 1")
