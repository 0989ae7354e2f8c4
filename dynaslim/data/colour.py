"""Random changes of colour and shape on batches of images in 0..1: RandAugment and jitter.

kornia's RandAugment draws one list of operations for a whole batch, and some of its operations
weaken as the magnitude rises. Here every image draws its own operations, and magnitude 0 is always
the weakest. Where possible the pixels are changed by kornia's functions.

Suffixes: B images, C channels, S side in pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # kornia's own deprecations at import
    from kornia.enhance import equalize, posterize, sharpness
    from kornia.geometry.transform import affine

_LUMA: Final = (0.299, 0.587, 0.114)


def jitter(x_BCSS: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Scale brightness, contrast and saturation of each image by factors within 1 ± share.

    `generator` is on the CPU, so that the numbers are the same for all devices.
    """
    factors = torch.rand(3, len(x_BCSS), generator=generator).mul(2).sub(1).mul(share).add(1)
    for change, factor_B in zip((_brightness, _contrast, _saturation), factors, strict=True):
        x_BCSS = change(x_BCSS, factor_B.to(x_BCSS))
    return x_BCSS


def rand_augment(
    x_BCSS: Tensor, operations: int, magnitude: float, std: float, generator: torch.Generator
) -> Tensor:
    """RandAugment (arXiv 1909.13719): `operations` times, one of the paper's 14 for each image.

    Each time, an image draws an operation, a magnitude from a normal distribution around
    `magnitude` (clipped to 0..10), and a direction if there are two. Magnitude 10 is the paper's
    strongest. Magnitude 0 does not change the image, except for autocontrast and equalize, which
    have no strength (in the paper some operations are strongest at 0). Areas that a geometric
    operation uncovers are grey. `generator` is on the CPU, so that numbers are the same for all
    devices.
    """
    rows = len(x_BCSS)
    for _ in range(operations):
        drawn_B = torch.randint(len(_PIXELS) + len(_SHAPES) + 1, (rows,), generator=generator)
        level_B = torch.randn(rows, generator=generator).mul(std).add(magnitude).clamp(0, 10) / 10
        sign_B = torch.randint(2, (rows,), generator=generator) * 2.0 - 1
        amount_B = level_B * sign_B
        x_BCSS = x_BCSS.clone()
        for number, change in enumerate(_PIXELS):
            if len(at := (drawn_B == number).nonzero().flatten()):
                amount = amount_B[at].to(x_BCSS)
                at = at.to(x_BCSS.device)
                x_BCSS[at] = change(x_BCSS[at], amount)
        shapes_B = drawn_B - len(_PIXELS)  # the number after the last shape is the identity
        if len(at := ((shapes_B >= 0) & (shapes_B < len(_SHAPES))).nonzero().flatten()):
            matrix = _matrices(shapes_B[at], amount_B[at], x_BCSS.shape[-1])
            at = at.to(x_BCSS.device)
            # affine fills with 0: shifted by 0.5, that is grey
            x_BCSS[at] = affine(x_BCSS[at] - 0.5, matrix.to(x_BCSS), align_corners=True) + 0.5
    return x_BCSS


def _matrices(shapes: Tensor, amount: Tensor, side: int) -> Tensor:
    """Affine matrices (n, 2, 3) in pixels of n drawn shapes, each by its amount in -1..1."""
    values = amount[:, None] * torch.tensor(_SHAPES)
    rotate, shear_x, shear_y, shift_x, shift_y = torch.where(
        torch.arange(len(_SHAPES)) == shapes[:, None], values, 0.0
    ).T
    cos, sin = rotate.cos(), rotate.sin()
    linear = torch.stack([cos, shear_x - sin, shear_y + sin, cos], 1).view(-1, 2, 2)
    # about the centre of the image
    centre = torch.full((2,), (side - 1) / 2)
    shift = torch.stack([shift_x, shift_y], 1) * side + centre - linear @ centre
    return torch.cat([linear, shift[:, :, None]], 2)


def _blend(base: Tensor, x_BCSS: Tensor, factor_B: Tensor) -> Tensor:
    return torch.lerp(base.expand_as(x_BCSS), x_BCSS, factor_B.view(-1, 1, 1, 1)).clamp(0, 1)


def _grey(x_BCSS: Tensor) -> Tensor:
    if x_BCSS.shape[1] == 1:
        return x_BCSS
    weights = torch.tensor(_LUMA, device=x_BCSS.device, dtype=x_BCSS.dtype)
    return (x_BCSS * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def _brightness(x_BCSS: Tensor, factor_B: Tensor) -> Tensor:
    return _blend(torch.zeros_like(x_BCSS), x_BCSS, factor_B)


def _contrast(x_BCSS: Tensor, factor_B: Tensor) -> Tensor:
    return _blend(_grey(x_BCSS).mean((1, 2, 3), keepdim=True), x_BCSS, factor_B)


def _saturation(x_BCSS: Tensor, factor_B: Tensor) -> Tensor:
    return _blend(_grey(x_BCSS), x_BCSS, factor_B)


def _autocontrast(x_BCSS: Tensor, _amount_B: Tensor) -> Tensor:
    low, high = x_BCSS.amin((2, 3), keepdim=True), x_BCSS.amax((2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (x_BCSS - low) / span.clamp(min=1e-6), x_BCSS)


def _solarize(x_BCSS: Tensor, amount_B: Tensor) -> Tensor:
    """Invert values above a threshold that falls from 1 to 0 as the amount rises."""
    return torch.where(x_BCSS > 1 - amount_B.abs().view(-1, 1, 1, 1), 1 - x_BCSS, x_BCSS)


def _both_ways(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The change with a factor of 0.1 to 1.9 for amounts of -1 to 1."""
    return lambda x_BCSS, amount_B: change(x_BCSS, 1 + 0.9 * amount_B)


_PIXELS: Final[tuple[Callable[[Tensor, Tensor], Tensor], ...]] = (
    _autocontrast,
    lambda x_BCSS, _: equalize(x_BCSS),
    _solarize,
    # 8 to 4 bits
    lambda x_BCSS, amount_B: posterize(x_BCSS, 8 - (4 * amount_B.abs()).round().int()),
    _both_ways(sharpness),
    _both_ways(_brightness),
    _both_ways(_contrast),
    _both_ways(_saturation),
)
"""Functions of images in 0..1 and an amount in -1..1 for each; they return images in 0..1."""
_SHAPES: Final = (torch.pi / 6, 0.3, 0.3, 0.45, 0.45)
"""Largest rotation (radians), shear along x and y, shift along x and y (share of the side)."""
