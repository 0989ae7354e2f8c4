"""Stage II as frozen data with its checks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from dynaslim.errors import UsageError, check
from dynaslim.recipes.data import AugmentRecipe, DataRecipe, plain_values
from dynaslim.recipes.supernet import OptimRecipe, check_common

Objective = Literal["expected", "sgs"]


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
        check(self.tau > 0, f"tau {self.tau}: must be positive")
        check(
            self.easy_share is None or 0 < self.easy_share < 1,
            f"easy_share {self.easy_share}: must be between 0 and 1",
        )
        for name in ("class_weight", "sgs_weight", "cost_weight"):
            value = getattr(self, name)
            check(value >= 0, f"{name} {value}: must not be negative")
        check(
            self.cost_scale is None or self.cost_scale > 0,
            f"cost_scale {self.cost_scale}: must be positive",
        )
        check(
            0 <= self.label_smoothing < 1,
            f"label_smoothing {self.label_smoothing}: must be in [0, 1)",
        )


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
        for name in ("max_routes", "views", "iterations", "bisections"):
            value = getattr(self, name)
            check(value >= 1, f"{name} {value}: must be at least 1")
        for name in ("entropy", "weight_decay", "sgs_weight", "cost_weight"):
            value = getattr(self, name)
            check(value >= 0, f"{name} {value}: must not be negative")


@dataclass(frozen=True)
class GateRecipe:
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
        check_common(self.epochs, self.seed)
        check(self.batch_size >= 1, f"batch_size {self.batch_size}: must be at least 1")
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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `recipe_from_dict` reads them back."""
        return cast(dict[str, Any], plain_values(asdict(self)))


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
