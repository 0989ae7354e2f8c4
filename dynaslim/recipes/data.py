"""Which images a run takes and what is done to them, as frozen data with its checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dynaslim.errors import check


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
    """Part of the training split held back where there is no `val_split`; 0 holds none back."""
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
        check(0 <= self.val_share < 1, f"val_share {self.val_share}: must be in [0, 1)")
        check(self.image_size_px >= 1, f"image_size_px {self.image_size_px}: must be at least 1")
        check(
            0 < self.crop_fraction <= 1,
            f"crop_fraction {self.crop_fraction}: must be above 0 and at most 1",
        )
        check((self.mean is None) == (self.std is None), "mean and std: give both or neither")
        check(
            self.stream_images is None or self.stream_images >= 1,
            f"stream_images {self.stream_images}: must be at least 1",
        )
        check(self.shuffle_buffer >= 1, f"shuffle_buffer {self.shuffle_buffer}: at least 1")
        check(0 <= self.corrupt_limit <= 1, f"corrupt_limit {self.corrupt_limit}: not in [0, 1]")
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
        check(self.shift_px >= 0, f"shift_px {self.shift_px}: must not be negative")
        check(0 < self.scale_min <= 1, f"scale_min {self.scale_min}: above 0 and at most 1")
        check(self.randaugment_ops >= 0, f"randaugment_ops {self.randaugment_ops}: negative")
        check(
            0 <= self.randaugment_magnitude <= 10,
            f"randaugment_magnitude {self.randaugment_magnitude}: must be between 0 and 10",
        )
        for name in ("randaugment_std", "jitter", "mixup", "cutmix"):
            check(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: must not be negative")
        check(self.jitter <= 1, f"jitter {self.jitter}: at most 1")
        check(0 <= self.erasing <= 1, f"erasing {self.erasing}: must be between 0 and 1")


def plain_values(value: Any) -> Any:
    """Tuples as lists, as JSON and YAML have them."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return value
