"""Stage I, and the optimizer of both stages, as frozen data with its checks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from dynaslim.errors import check
from dynaslim.recipes.data import AugmentRecipe, DataRecipe, plain_values

Target = Literal["labels", "distillation", "bootstrap", "ensemble"]


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
        check(self.lr > 0, f"lr {self.lr}: must be positive")
        check(0 <= self.warmup_share < 1, f"warmup_share {self.warmup_share}: must be in [0, 1)")
        check(0 <= self.momentum < 1, f"momentum {self.momentum}: must be in [0, 1)")
        check(self.weight_decay >= 0, f"weight_decay {self.weight_decay}: must not be negative")
        check(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm {self.clip_norm}: must be positive",
        )
        check(self.accumulate >= 1, f"accumulate {self.accumulate}: must be at least 1")


@dataclass(frozen=True)
class SupernetRecipe:
    """Stage I: the supernet, by the sandwich rule."""

    model: str = "ds_mbnet_tiny"
    """A name of the zoo, or a spec file (.yaml)."""
    init: str | None = None
    """Checkpoint of this model, or of its widest widths alone, to start from, in place of random
    weights; of the latter the channels are sorted by importance. The classifier starts
    afresh where the classes are others; mean and std are the checkpoint's where `data` has none;
    the gates' choices are the checkpoint's."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step, over all processes; a shorter last batch is left out."""
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
        check_common(self.epochs, self.seed)
        check(self.batch_size >= 2, f"batch_size {self.batch_size}: BN needs at least 2")
        check(
            0 <= self.label_smoothing < 1,
            f"label_smoothing {self.label_smoothing}: must be in [0, 1)",
        )
        check(0 <= self.dropout < 1, f"dropout {self.dropout}: must be in [0, 1)")
        check(0 <= self.ema_decay < 1, f"ema_decay {self.ema_decay}: must be in [0, 1)")
        check(self.label_weight >= 0, f"label_weight {self.label_weight}: must not be negative")
        check(0 <= self.label_warmup <= 1, f"label_warmup {self.label_warmup}: must be in [0, 1]")
        check(
            self.teacher is not None
            or self.target != "labels"
            or (self.label_weight == 0 and self.label_warmup == 0),
            "target labels: label_weight and label_warmup are for a target or a teacher beside it",
        )
        check(self.random_routes >= 0, f"random_routes {self.random_routes}: must not be negative")
        for name in ("calibration_batches", "val_calibration_batches", "val_epochs"):
            value = getattr(self, name)
            check(value >= 1, f"{name} {value}: must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `recipe_from_dict` reads them back."""
        return cast(dict[str, Any], plain_values(asdict(self)))


def check_common(epochs: int, seed: int) -> None:
    """The checks of the fields that the two stages have in common."""
    check(epochs >= 1, f"epochs {epochs}: must be at least 1")
    check(0 <= seed < 2**63, f"seed {seed}: must be between 0 and 2^63 - 1")
