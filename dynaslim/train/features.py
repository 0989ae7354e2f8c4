"""Trunk features, computed once for some augmented views of every training image.

If only the layers after the first gate are trained, the trunk's features of an image never change.
Stage I then needs neither the images nor the trunk, which takes a third of the multiply-adds and a
larger share of the time.

Suffixes: V views, N images, B rows, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dynaslim._memory import available_bytes
from dynaslim.errors import TrainingError
from dynaslim.nn.net import ElasticNet
from dynaslim.runtime.program_net import frozen
from dynaslim.runtime.variants import SegmentVariant
from dynaslim.seeds import step_seed

Predict = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) -> probabilities (B, K)."""


class Batch(NamedTuple):
    """The training data of one step of stage I."""

    x: Tensor
    """Images or trunk features (B, C, H, W)."""
    labels: Tensor
    """Classes (B,)."""
    outside: Tensor | None
    """Probabilities (B, K) predicted by another network, if there is a teacher."""


@dataclass(frozen=True)
class TrunkFeatures:
    """Features in float16, with labels and the predictions of a teacher.

    A view has all images but those of an incomplete last batch.
    """

    features_VNCHW: Tensor
    labels_VN: Tensor
    outside_VNK: Tensor | None
    seed: int

    @property
    def nbytes(self) -> int:
        return self.features_VNCHW.nbytes

    def batches(self, start: int, stop: int, size: int, purpose: str = "train") -> Iterator[Batch]:
        """Batches of `size` rows for global steps start to stop - 1; an epoch uses one view.

        The order is a function of (seed, epoch, purpose).
        """
        views, images = self.labels_VN.shape
        steps = images // size
        for step in range(start, stop):
            epoch, at = divmod(step, steps)
            if step == start or at == 0:
                seed = step_seed(self.seed, epoch, f"order features {purpose}")
                order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
            rows, view = order[at * size : (at + 1) * size], epoch % views
            outside = None if self.outside_VNK is None else self.outside_VNK[view][rows]
            features = self.features_VNCHW[view][rows].float()
            yield Batch(features, self.labels_VN[view][rows], outside)


@torch.no_grad()
def trunk_features(
    net: ElasticNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    shape: tuple[int, int],
    seed: int,
    *,
    outside: Predict | None = None,
    on_batch: Callable[[], None] | None = None,
) -> TrunkFeatures:
    """Run the trunk in evaluation mode on normalised images (B, C, H, W) and labels (B,).

    `shape` is (views, batches per view). All `batches` have the same size; views come in turn.

    Raises:
        TrainingError: if a feature is not finite in float16, or all do not fit into memory.
    """
    was_training = net.training
    trunk = frozen(net.eval(), SegmentVariant(0))
    net.train(was_training)
    kept: dict[str, Tensor] = {}

    def keep(name: str, number: int, part: Tensor) -> None:
        view, at = divmod(number, shape[1])
        if name not in kept:
            rows, values = shape[1] * len(part), part[0].numel()
            _check_memory(shape[0] * rows * values * part.element_size())
            kept[name] = part.new_empty((shape[0], rows, *part.shape[1:]), device="cpu")
        kept[name][view, at * len(part) : (at + 1) * len(part)] = part

    for number, (x, labels_B) in enumerate(batches):
        rows = net.rows_at_once(x.shape[-1], len(x))
        features = torch.cat([trunk(part)[0].half() for part in torch.split(x, rows)])
        if not torch.isfinite(features).all():
            raise TrainingError(
                "trunk_views: the trunk's features are not finite in float16; set it to 0"
            )
        keep("features", number, features)
        keep("labels", number, labels_B)
        if outside is not None:
            keep("outside", number, outside(x))
        if on_batch is not None:
            on_batch()
    return TrunkFeatures(kept["features"], kept["labels"], kept.get("outside"), seed)


def _check_memory(needed: int) -> None:
    with suppress(OSError, ValueError, StopIteration):  # not known on this system
        free = available_bytes()
        if needed > free:
            raise TrainingError(
                f"trunk_views: the features take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB "
                f"are free; use fewer views, or 0"
            )
