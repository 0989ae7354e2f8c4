"""Turn batches of uint8 pixels into network input, and augment whole batches with kornia.

Suffixes: B images, C channels, S side in pixels, N classes.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe
from dynaslim.seeds import step_seed

if TYPE_CHECKING:
    from dynaslim.data.images import ImageDataset


def normalise(images_BCSS: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 pixels (or floats in 0..255) -> float32, normalised by the mean and std per channel."""
    statistics = torch.tensor((preprocessing.mean, preprocessing.std), device=images_BCSS.device)
    mean, std = statistics.mul(255).view(2, 1, preprocessing.channels, 1, 1)
    x: Tensor = (images_BCSS.float() - mean) / std
    return x


def readable_batches(
    images: ImageDataset, preprocessing: Preprocessing, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Network inputs (B, C, S, S) and labels (B,) of readable images, in stored order."""
    for pixels, labels in images.batches(batch_size):
        good = labels >= 0
        if good.any():
            yield normalise(pixels[good], preprocessing), labels[good]


def sample_batches(
    images: ImageDataset, preprocessing: Preprocessing, batch_size: int, count: int
) -> Iterator[Tensor]:
    """Network inputs (B, C, S, S) of at most `count` images, drawn at random with a fixed seed."""
    return (x for x, _ in readable_batches(images.sample(count), preprocessing, batch_size))


class Augment:
    """Random, normalised views of a batch of training images; a function of (pixels, seed)."""

    def __init__(
        self, recipe: AugmentRecipe, preprocessing: Preprocessing, *, resized_already: bool = False
    ) -> None:
        """With `resized_already`, decoding has already made the recipe's `resized` crop."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # kornia's own deprecations at import
            import kornia.augmentation as augmentation
        self._recipe = recipe
        self._preprocessing = preprocessing
        size = (preprocessing.image_size_px, preprocessing.image_size_px)
        layers: list[nn.Module] = []
        if recipe.crop == "shift" and recipe.shift_px:
            # slicing is exact and three times faster than kornia's default, resampling
            layers.append(
                augmentation.RandomCrop(size, padding=recipe.shift_px, cropping_mode="slice")
            )
        if recipe.crop == "resized" and not resized_already:
            layers.append(
                augmentation.RandomResizedCrop(
                    size, (recipe.scale_min, 1.0), resample="bicubic", align_corners=False
                )
            )
        if recipe.mirror:
            layers.append(augmentation.RandomHorizontalFlip())
        self._layers = nn.Sequential(*layers)
        self._erase = augmentation.RandomErasing(p=recipe.erasing)

    def __call__(self, pixels_BCSS: Tensor, seed: int) -> Tensor:
        """uint8 pixels to augmented network input, float32; the same seed gives the same result.

        RandAugment and jitter come first, on values in 0..1. The pixels are then normalised, so
        that areas that a shift uncovers have the mean colour, then cropped, mirrored and erased.
        """
        x = normalise(self._recoloured(pixels_BCSS, seed), self._preprocessing)
        # kornia draws from the global CPU generator: fork and seed it, so that a step's
        # randomness depends on its seed alone
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            x = self._layers(x)
            if self._recipe.erasing:
                x = self._erased(x, seed)
        return x

    def _recoloured(self, pixels_BCSS: Tensor, seed: int) -> Tensor:
        recipe = self._recipe
        if not (recipe.randaugment_ops or recipe.jitter):
            return pixels_BCSS
        from dynaslim.data.colour import jitter, rand_augment

        generator = torch.Generator().manual_seed(step_seed(seed, 0, "colour"))
        x = pixels_BCSS.float() / 255
        if recipe.randaugment_ops:
            x = rand_augment(
                x,
                recipe.randaugment_ops,
                recipe.randaugment_magnitude,
                recipe.randaugment_std,
                generator,
            )
        if recipe.jitter:
            x = jitter(x, recipe.jitter, generator)
        return x * 255

    def _erased(self, x_BCSS: Tensor, seed: int) -> Tensor:
        """Erase rectangles with noise of mean 0 and deviation 1, as in the images (1708.04896)."""
        # kornia can only fill with a constant: here its zeros mark the rectangle
        keep_B1SS = self._erase(torch.ones_like(x_BCSS[:, :1]))
        generator = torch.Generator(x_BCSS.device).manual_seed(step_seed(seed, 0, "erasing"))
        noise = torch.empty_like(x_BCSS).normal_(generator=generator)
        return torch.where(keep_B1SS > 0, x_BCSS, noise)


def mix(
    x_BCSS: Tensor, labels_B: Tensor, num_classes: int, recipe: AugmentRecipe, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with another of the batch: (x, class probabilities (B, N) that sum to 1).

    Mixup (arXiv 1710.09412) takes a weighted sum of the two; CutMix (arXiv 1905.04899) puts a
    rectangle of one into the other. If the recipe has both, one is drawn for the batch with equal
    chances. There is one weight per batch, from Beta(alpha, alpha); CutMix replaces it by the share
    that the rectangle leaves. If the recipe has neither, x and the labels (B,) are returned
    unchanged. kornia's own mixup draws its weight uniformly. A function of the seed.
    """
    if not (recipe.mixup or recipe.cutmix):
        return x_BCSS, labels_B
    rng = random.Random(step_seed(seed, 0, "mix"))
    cut = bool(recipe.cutmix) and (not recipe.mixup or rng.random() < 0.5)
    alpha = recipe.cutmix if cut else recipe.mixup
    weight = rng.betavariate(alpha, alpha)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    other = torch.randperm(len(labels_B), generator=generator).to(labels_B.device)
    if cut:
        x_BCSS, weight = _cut_in(x_BCSS, x_BCSS[other], weight, rng)
    else:
        x_BCSS = weight * x_BCSS + (1 - weight) * x_BCSS[other]
    targets_BN = F.one_hot(labels_B, num_classes).float()
    return x_BCSS, weight * targets_BN + (1 - weight) * targets_BN[other]


def _cut_in(
    x_BCSS: Tensor, other_BCSS: Tensor, weight: float, rng: random.Random
) -> tuple[Tensor, float]:
    """Put a rectangle of `other`, about 1 - weight of the area, into x; also the share kept."""
    height, width = x_BCSS.shape[-2:]
    cut_h, cut_w = (round(side * math.sqrt(1 - weight)) for side in (height, width))
    # the rectangle's centre is anywhere in the image, so borders are cut as often as the middle
    y, x = rng.randrange(height) - cut_h // 2, rng.randrange(width) - cut_w // 2
    top, bottom = max(y, 0), min(y + cut_h, height)
    left, right = max(x, 0), min(x + cut_w, width)
    mixed = x_BCSS.clone()
    mixed[..., top:bottom, left:right] = other_BCSS[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
