"""Recipes: what a training run does, as frozen data with its checks.

A recipe holds everything that decides the numbers and nothing about the machine: the number of
processes and the device are in `RunOptions`. No torch here, so that help
is fast.
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
    """Images to train on and to choose by."""

    path: str = ""
    """A parquet file or a folder of them, a folder of images by class, or a hub name."""
    split: str = "train"
    """Split to train on."""
    val_split: str | None = None
    """Split to choose by; None holds images of the training split back."""
    val_share: float = 0.1
    """Part of the training split held out where there is no `val_split`; 0 holds none out."""
    image_size_px: int = 32
    """Side of the square that the network sees."""
    crop_fraction: float = 1.0
    """Part of the shorter side that the centre crop keeps in evaluation."""
    mean: tuple[float, ...] | None = None
    """Per channel, of values in 0..1. None measures images in memory, and takes ImageNet's mean
    for others."""
    std: tuple[float, ...] | None = None
    """As `mean`."""
    load: Literal["memory", "disk", "stream"] = "memory"
    """`memory` decodes a set once and keeps it as uint8; `disk` decodes each image when its turn
    comes; `stream` reads the set from end to end, for one larger than the disk."""
    stream_images: int | None = None
    """Images of a streamed training split, where the set itself does not say."""
    shuffle_buffer: int = 10_000
    """Images that a stream is shuffled among."""
    corrupt_limit: float = 0.01
    """Share of images (one at least) that may turn out not to decode; they are named, counted and
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
    """What is done to training images, on whole batches by kornia."""

    crop: Literal["none", "shift", "resized"] = "shift"
    """`shift` by some pixels, usual for small images; `resized`, a random part of the image at a
    random aspect ratio, usual for ImageNet."""
    shift_px: int = 2
    """Largest shift."""
    scale_min: float = 0.08
    """Smallest part of the area that a `resized` crop takes."""
    mirror: bool = True
    """Random horizontal flip."""
    randaugment_ops: int = 0
    """RandAugment: operations per image; 0 for none."""
    randaugment_magnitude: float = 9.0
    """RandAugment: strength, 0 to 10."""
    randaugment_std: float = 0.5
    """RandAugment: standard deviation of the strength."""
    jitter: float = 0.0
    """Random brightness, contrast and saturation, up to this share."""
    erasing: float = 0.0
    """Probability that a random rectangle is replaced by noise."""
    mixup: float = 0.0
    """Mixup's alpha; 0 for none. With cutmix too, each batch takes one of the two."""
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
    """Peak learning rate, after the warm-up; cosine to zero from there."""
    warmup_share: float = 0.1
    """Part of all steps that the learning rate rises linearly."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = True
    """SGD's momentum by Nesterov."""
    weight_decay: float = 1e-4
    """On convolution and linear weights; none on BN and biases."""
    clip_norm: float | None = None
    """Largest norm of all gradients together; None does not clip."""
    accumulate: int = 1
    """Parts that a batch is run in, to save memory; gradients add up, the optimizer steps once."""

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "clip_norm")
        _check_below_1(self, "warmup_share", "momentum")
        _check_least(self, 0, "weight_decay")
        _check_least(self, 1, "accumulate")


class _Recipe:
    """What the recipes of both stages have in common."""

    epochs: int
    seed: int

    def __post_init__(self) -> None:
        _check_least(self, 1, "epochs")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be between 0 and 2^63 - 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `recipe_from_dict` reads them back."""
        # through JSON, which makes lists of tuples
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]
        return plain


@dataclass(frozen=True)
class SupernetRecipe(_Recipe):
    """Stage I: the supernet, by the sandwich rule."""

    model: str = "ds_mbnet_tiny"
    """A name of the zoo, or a spec file (.yaml)."""
    init: str | None = None
    """Checkpoint of this model, or of its widest widths alone, to start from, in place of random
    weights; of the latter the channels are sorted by importance. The classifier starts
    afresh where the classes are others; a converted network is its own model, whatever
    `model` says; mean and std are the checkpoint's where `data` has none;
    the gates' choices are the checkpoint's."""
    epochs: int = 10
    """Passes over the training images."""
    patience: int | None = None
    """Evaluations in a row without a better mean that end the run; None trains all epochs."""
    batch_size: int = 128
    """Images per step, over all processes; a shorter last batch is left out."""
    routes: Literal["sandwich", "largest"] = "sandwich"
    """Routes of a step: by the sandwich rule, or the largest alone, as any network is trained."""
    trunk_views: int = 0
    """Augmented views of every image whose features behind the trunk are computed once, before
    training, and kept in memory; the trunk stays as it is. 0 trains the trunk too."""
    target: Target = "ensemble"
    """What the sub-networks learn, the largest always the labels: `labels`; `distillation`, the
    live largest's prediction; `bootstrap`, the averaged (EMA) network's largest; `ensemble`, that
    and for the smallest the mean of the averaged network's predictions along the step's routes."""
    teacher: str | None = None
    """Checkpoint of a trained network of the same classes and image size. All routes, the largest
    too, learn its prediction in place of what `target` names."""
    label_weight: float = 0.0
    """Weight of the labels' loss beside the loss against predictions."""
    label_warmup: float = 0.0
    """Part of all steps over which the loss goes over, linearly, from the labels alone to what
    `target`, `teacher` and `label_weight` say."""
    random_routes: int = 2
    """Routes between the largest and the smallest in each step; fewer where there are fewer."""
    label_smoothing: float = 0.1
    """Of the labels."""
    dropout: float = 0.2
    """On the pooled features of the largest network alone."""
    ema_decay: float = 0.997
    """Of the averaged network; reached by a warm-up, (1 + t) / (10 + t) before."""
    calibration_batches: int = 100
    """Training batches per route for the BN statistics after training."""
    val_calibration_batches: int = 8
    """The same before an evaluation on the way."""
    val_epochs: int = 1
    """Epochs between evaluations on the held-out images; the last is always followed by one."""
    bf16: bool = False
    """bfloat16 autocast of the forward passes."""
    channels_last: bool = True
    """Memory format of weights and images; the faster one on most hardware."""
    compile: bool = False
    """torch.compile of every segment form."""
    seed: int = 0
    """Of everything random in the stage."""
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
    """Where an image goes that the smallest route gets wrong: `try_best` to the last choice;
    `give_up` to the last only if the widest route is right, and else to the first, to save
    compute."""
    gumbel: bool = True
    """Classification through sampled (straight-through Gumbel-softmax) gates, as in the paper;
    without it gates are the straight-through argmax and there is no noise."""
    tau: float = 1.0
    """Temperature of the gates."""
    easy_share: float | None = None
    """Weight of the easy images in the sparsification term. None counts every image the same, as
    the paper does: where nine of ten are easy, no image is then likelier hard than easy, and the
    gate sends all of them along the cheapest route."""
    class_weight: float = 1.0
    """Weight of the classification term."""
    sgs_weight: float = 1.0
    """Weight of the sparsification term."""
    cost_weight: float = 0.5
    """Weight of the cost term, (mean cost / cost_scale) squared."""
    cost_scale: float | None = None
    """The cost term's T, in the cost table's unit; None takes the target cost, or where there is
    none 1.77 times the widest route's: the paper's 1e9 against 565 M."""
    label_smoothing: float = 0.1
    """Of the labels and of the sparsification labels; the released code smooths both."""

    def __post_init__(self) -> None:
        _check_positive(self, "tau", "easy_share", "cost_scale")
        _check_below_1(self, "easy_share", "label_smoothing")
        _check_least(self, 0, "class_weight", "sgs_weight", "cost_weight")


@dataclass(frozen=True)
class ExpectedRecipe:
    """The exact expected loss over cached losses of the routes."""

    max_routes: int = 64
    """Combinations of choices that are cached; where there are more, so many are sampled."""
    views: int = 1
    """Augmented views of every training image in the cache."""
    iterations: int = 100
    """Most steps of L-BFGS over the whole cache at a time; it stops when converged."""
    entropy: float = 0.3
    """Weight of the entropy of the gates' choices, as a share of the spread of loss and cost
    between the routes; keeps the heads from overfitting. 0 fits the expected loss alone."""
    weight_decay: float = 1e-3
    """Pull of the heads towards no preference, on features of deviation 1."""
    sgs_weight: float = 0.0
    """Weight of the sparsification term beside the expected loss."""
    bisections: int = 8
    """Halvings of the range of cost weights in the search for a target cost, on a log scale."""
    cost_weight: float = 1.0
    """Weight of the cost, as a share of the widest route's, where the recipe has no target."""

    def __post_init__(self) -> None:
        _check_least(self, 1, "max_routes", "views", "iterations", "bisections")
        _check_least(self, 0, "entropy", "weight_decay", "sgs_weight", "cost_weight")


@dataclass(frozen=True)
class GateRecipe(_Recipe):
    """Stage II: the slimming heads; all else is frozen.

    Learning rate, weight decay and the weights of the sgs terms default to the paper's.
    """

    objective: Objective = "expected"
    """`sgs`, sandwich gate sparsification (the paper's), or `expected`, the exact expected loss
    over cached losses of every route."""
    supernet: str = ""
    """Checkpoint of the trained supernet."""
    targets: tuple[float, ...] | float | str = ()
    """Mean costs to aim at, as shares of the widest route's, such as 0.4,0.6,0.8: one gate is
    trained for each. With `expected` they are met; with `sgs` each is the scale of a cost term.
    Without any, one gate is trained and the weights alone say what compute is worth."""
    choices: tuple[tuple[int, ...], ...] | str = ()
    """Width indices that the gates choose among: 0,1,2,3 for every gate alike, or 0,2;0,1,2 for
    one after the other. Empty keeps the supernet's."""
    cost_table: str | None = None
    """File of a cost table (MAdds or measured ms); None counts MAdds."""
    epochs: int = 3
    """Passes over the training images (sgs)."""
    batch_size: int = 128
    """Images per step, over all processes; a shorter last batch is left out."""
    bf16: bool = False
    """bfloat16 autocast of the forward passes."""
    seed: int = 0
    """Of everything random in the stage."""
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
    """Sets of width indices from what a file or a command line has."""
    try:
        if isinstance(value, str):
            sets = [part for part in value.split(";") if part.strip()]
            return tuple(tuple(int(index) for index in part.split(",")) for part in sets)
        return tuple(tuple(int(index) for index in part) for part in value)
    except (TypeError, ValueError):
        raise UsageError(f"choices {value}: expected width indices such as 0,1,2,3") from None


def _shares(value: tuple[float, ...] | float | str) -> tuple[float, ...]:
    """Target costs from what a file or a command line has."""
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
    """How a trained network is adapted to images."""

    data: str
    """A parquet file or a folder of them, a folder of images by class, or a hub name."""
    split: str = "train"
    """Split to train on."""
    test_split: str = "test"
    """Split that the report is on; without it, the report is on the images held out."""
    val_share: float = 0.15
    """Part of the training split held out, to choose by and to find budgets on."""
    weights: Path | None = None
    """Weights of the model, .safetensors or .pth; of a checkpoint its own."""
    image_size: int | None = None
    """Side of the image in pixels that the network sees. Default: the model's."""
    sizes: str = ""
    """Several image sizes in place of one, such as 128,224: an image is looked at in the smallest
    first, and in a larger one where that leaves it unsure."""
    widths: str = "0.25,0.5,0.75,1"
    """Shares of the channels behind the gate, rising to 1."""
    gate_at: str = ""
    """Modules behind which gates are put, separated by commas. Default: one gate, where most
    multiply-adds can be saved."""
    protect: str = ""
    """Modules whose channels stay whole, separated by commas."""
    epochs: int | None = None
    """Passes over the images, of the original and of the supernet each. Default: by the number of
    images, about 12,000 of them in all."""
    minutes: float | None = None
    """Time to plan for, in place of epochs: a few steps are measured first."""
    lr: float = 0.03
    """Peak learning rate; the weights are trained already."""
    batch_size: int = 64
    """Images per step."""
    views: int | None = None
    """Augmented views of every image whose trunk features are kept in memory; 0 trains the trunk
    too. Default: by the number of images, 2 to 8."""
    label_weight: float = 0.5
    """Weight of the labels' loss beside the loss against the original's predictions."""
    no_mirror: bool = False
    """A mirror image may be of another class, as of text: never mirror."""
    budget: float = 0.5
    """Mean cost that the gate is trained for, as a share of the widest route's."""
    backend: str = "auto"
    """Backend that is timed: auto, eager, inductor, onnxruntime, openvino or cudagraph."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        _check_least(self, 1, "epochs", "image_size")
        _check_least(self, 2, "batch_size")
        _check_least(self, 0, "views", "label_weight")
        _check_positive(self, "minutes", "lr", "budget", "val_share")
        _check_most(self, 1, "budget")
        _check_below_1(self, "val_share")
        check(
            self.epochs is None or self.minutes is None,
            "epochs and minutes: both say how long to train; give one",
        )
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be between 0 and 2^63 - 1")
        self.shares  # noqa: B018  # raises for what is no list of shares
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
    """Shares of the channels such as "0.25,0.5,1"; raises `UsageError` for anything else."""
    try:
        shares = tuple(float(part) for part in widths.split(","))
    except ValueError:
        raise UsageError(f"widths {widths}: expected numbers such as 0.25,0.5,1") from None
    return shares


def parse_names(text: str) -> list[str]:
    """Names separated by commas; none of an empty text."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class ReportOptions:
    """How a report is made."""

    data: str | None = None
    """Images to evaluate on: a parquet file or a folder of them, a folder of images by class, or a
    hub name. By default those that training held out, if they still exist."""
    split: str | None = None
    """Split of the data; by default test, or what training held out."""
    target: float | None = None
    """The gate to show in detail, of a run with several; by default the middle one."""
    images: int | None = None
    """Number of images to evaluate on, a fixed random choice; by default all."""
    baselines: Path | None = None
    """JSON file of static networks to compare with, [{"name", "top1", "madds", "ms"}, ...]; by
    default baselines.json of the run."""
    title: str | None = None
    """Title of the page."""
    backend: str = "auto"
    """Backend to time: auto, eager, inductor, onnxruntime, openvino or cudagraph."""
    rounds: int | None = None
    """Rounds of timing; 0 leaves milliseconds out. By default as many as take ten seconds."""
    batch_size: int = 256
    """Images per batch of the evaluation."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    no_cache: bool = False
    """Keep no compiled programs on disk, and read none."""

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
    """How the demo's network is trained."""

    epochs: int = 6
    """Passes over the 9,000 images in stage I (the supernet)."""
    target: float = 0.5
    """Mean cost that the gate of stage II aims at, as a share of the widest route's."""
    seed: int = 0
    """Of everything random: the same seed and number of threads give the same numbers."""


@dataclass(frozen=True)
class RunOptions:
    """How a run uses the machine; nothing here changes the numbers of a single process."""

    resume: bool = False
    """Go on where the run in the folder stopped; starts it if there is none."""
    force: bool = False
    """Resume although the recipe has changed."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `mps`; under torchrun each process takes one."""
    workers: int = 2
    """Processes that decode images, per process of the run; 0 decodes in the run itself."""
    save_every_s: float = 60.0
    """Seconds between snapshots, which are also written after every epoch."""
    log_every: int = 10
    """Steps between lines of the metrics file."""

    def __post_init__(self) -> None:
        known = self.device in ("auto", "cpu", "cuda", "mps")
        check(known, f"--device {self.device}: choose auto, cpu, cuda or mps")
        check(self.workers >= 0, f"workers {self.workers}: must not be negative")
        check(self.save_every_s >= 0, f"save_every_s {self.save_every_s}: must not be negative")
        check(self.log_every >= 1, f"log_every {self.log_every}: must be at least 1")
