"""The preprocessing of images, as data that is stored in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from dynaslim._files import validated
from dynaslim.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

MOST_PX: Final = 1 << 14
"""Largest side of a network's input; a single larger image could fill the memory."""
_LARGEST: Final = 10.0
_SMALLEST: Final = 1e-4
"""Smallest standard deviation; division by much smaller ones overflows float32."""
MAX_VIEWS: Final = 10
"""Most views of an image in test-time augmentation: the image, four shifts, and their mirrors."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, crop the centre, scale to 0..1, normalise per channel."""

    image_size_px: int
    """Side of the network's square input."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean per channel, of values in 0..1; one for each input channel of the network (1 or 3)."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation per channel, of values in 0..1."""
    crop_fraction: float = 1.0
    """Part of the resized shorter side that the crop keeps (0.875 is usual for ImageNet)."""

    def __post_init__(self) -> None:
        if type(self.image_size_px) is not int or not 1 <= self.image_size_px <= MOST_PX:
            raise UsageError(
                f"image_size_px {self.image_size_px}: must be a whole number above 0, at most "
                f"{MOST_PX}"
            )
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop_fraction {self.crop_fraction}: must be above 0 and at most 1")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise UsageError(
                f"mean {self.mean} and std {self.std}: give one value per channel, 1 or 3"
            )
        if not all(abs(value) <= _LARGEST for value in self.mean):
            raise UsageError(f"mean {self.mean}: must be that of values in 0..1")
        if not all(_SMALLEST <= value <= _LARGEST for value in self.std):
            raise UsageError(f"std {self.std}: must be positive, and that of values in 0..1")

    @property
    def channels(self) -> int:
        """Input channels: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from `to_dict`; raises `UsageError` for anything else."""
        return validated(data, cls, "not a preprocessing description")


def normalise_pixels(pixels_BCSS: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Normalise uint8 pixels (B, C, S, S) to float32 of mean 0 and deviation 1 per channel.

    The numpy counterpart of `data.transforms.normalise`, for use without torch.
    """
    import numpy as np  # late, so that command-line help loads fast

    statistics = np.asarray((preprocessing.mean, preprocessing.std), np.float32) * np.float32(255)
    mean, std = statistics.reshape(2, preprocessing.channels, 1, 1)
    x = pixels_BCSS.astype(np.float32)
    x -= mean
    x /= std
    return x
