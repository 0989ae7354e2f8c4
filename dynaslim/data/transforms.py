"""Batches of uint8 pixels to network input, and augmentation on whole batches by kornia."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from dynaslim.preprocessing import Preprocessing


def normalise(images_BCSS: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 pixels -> float32 of mean 0 and standard deviation 1 per channel."""
    statistics = torch.tensor((preprocessing.mean, preprocessing.std), device=images_BCSS.device)
    mean, std = statistics.mul(255).view(2, 1, preprocessing.channels, 1, 1)
    x: Tensor = (images_BCSS.float() - mean) / std
    return x


class Augment:
    """Random shift and mirror image, the usual for 32 px sets; a function of (seed, step)."""

    def __init__(self, image_size_px: int, *, shift_px: int = 2, mirror: bool = True) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # kornia's own deprecations at import
            import kornia.augmentation as augmentation
        size = (image_size_px, image_size_px)
        layers: list[nn.Module] = []
        if shift_px:
            # slicing is exact and three times faster than kornia's default, resampling
            layers.append(augmentation.RandomCrop(size, padding=shift_px, cropping_mode="slice"))
        if mirror:
            layers.append(augmentation.RandomHorizontalFlip())
        self._layers = nn.Sequential(*layers)

    def __call__(self, x_BCSS: Tensor, seed: int) -> Tensor:
        """Augment float images; the same seed gives the same result."""
        # kornia draws from the global generator: lend it one, so that a step's randomness depends
        # on its seed alone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out: Tensor = self._layers(x_BCSS)
        return out
