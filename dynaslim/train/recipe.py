"""Recipes: what a training run does, as frozen data with its checks."""

from __future__ import annotations

from dataclasses import dataclass

from dynaslim.errors import UsageError


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise UsageError(message)


@dataclass(frozen=True)
class SupernetRecipe:
    """Stage I: the supernet, by the sandwich rule and in-place ensemble bootstrapping."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step; a shorter last batch is left out."""
    lr: float = 0.4
    """Peak learning rate, after the warm-up; cosine to zero from there."""
    warmup_share: float = 0.1
    """Part of all steps that the learning rate rises linearly."""
    momentum: float = 0.9
    """SGD momentum (Nesterov)."""
    weight_decay: float = 1e-4
    """On convolution and linear weights; none on BN and biases."""
    label_smoothing: float = 0.1
    """Of the largest network's labels."""
    dropout: float = 0.2
    """On the pooled features of the largest network alone."""
    random_routes: int = 2
    """Routes between the largest and the smallest in each step."""
    ema_decay: float = 0.997
    """Of the target network; reached by a warm-up, (1 + t) / (10 + t) before."""
    shift_px: int = 2
    """Augmentation: largest random shift."""
    mirror: bool = True
    """Augmentation: random horizontal flip."""
    calibration_batches: int = 100
    """Training batches per route for the BN statistics after training."""
    seed: int = 0
    """Of everything random in the stage."""

    def __post_init__(self) -> None:
        _check_both(self)
        _check(self.batch_size >= 2, f"batch_size {self.batch_size}: BN needs at least 2")
        _check(0 <= self.warmup_share < 1, f"warmup_share {self.warmup_share}: must be in [0, 1)")
        _check(
            0 <= self.label_smoothing < 1,
            f"label_smoothing {self.label_smoothing}: must be in [0, 1)",
        )
        _check(0 <= self.dropout < 1, f"dropout {self.dropout}: must be in [0, 1)")
        _check(0 <= self.ema_decay < 1, f"ema_decay {self.ema_decay}: must be in [0, 1)")
        _check(self.random_routes >= 0, f"random_routes {self.random_routes}: must not be negative")
        _check(
            self.calibration_batches >= 1,
            f"calibration_batches {self.calibration_batches}: must be at least 1",
        )


@dataclass(frozen=True)
class GateRecipe:
    """Stage II: the slimming heads, by sandwich gate sparsification; all else frozen.

    Learning rate, weight decay and the weights of the terms default to the paper's.
    """

    epochs: int = 3
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step; a shorter last batch is left out."""
    lr: float = 0.08
    """Peak learning rate; cosine to zero."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 0.01
    """On the slimming heads."""
    easy_share: float | None = None
    """Weight of the easy images in the sparsification term. None counts every image the same, as
    the paper does: where nine of ten are easy, no image is then likelier hard than easy, and the
    gate sends all of them along the cheapest route."""
    sgs_weight: float = 1.0
    """Weight of the sandwich gate sparsification term."""
    cost_weight: float = 0.5
    """Weight of the cost term, (mean MAdds / cost_scale_madds) squared."""
    cost_scale_madds: float | None = None
    """The cost term's T, in MAdds; None takes the widest route's."""
    tau: float = 1.0
    """Temperature of the Gumbel-softmax gates."""
    shift_px: int = 2
    """Augmentation: largest random shift."""
    mirror: bool = True
    """Augmentation: random horizontal flip."""
    seed: int = 0
    """Of everything random in the stage."""

    def __post_init__(self) -> None:
        _check_both(self)
        _check(self.batch_size >= 1, f"batch_size {self.batch_size}: must be at least 1")
        _check(self.tau > 0, f"tau {self.tau}: must be positive")
        _check(
            self.easy_share is None or 0 < self.easy_share < 1,
            f"easy_share {self.easy_share}: must be between 0 and 1",
        )
        _check(
            self.cost_scale_madds is None or self.cost_scale_madds > 0,
            f"cost_scale_madds {self.cost_scale_madds}: must be positive",
        )


def _check_both(recipe: SupernetRecipe | GateRecipe) -> None:
    """The checks of the fields that the two stages have in common."""
    _check(recipe.epochs >= 1, f"epochs {recipe.epochs}: must be at least 1")
    _check(0 <= recipe.seed < 2**63, f"seed {recipe.seed}: must be between 0 and 2^63 - 1")
    _check(recipe.shift_px >= 0, f"shift_px {recipe.shift_px}: must not be negative")
    _check(0 <= recipe.momentum < 1, f"momentum {recipe.momentum}: must be in [0, 1)")
    _check(recipe.lr > 0, f"lr {recipe.lr}: must be positive")
