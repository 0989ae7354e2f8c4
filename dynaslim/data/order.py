"""Which images make each step's batch: functions of (seed, epoch), divided among processes."""

from __future__ import annotations

import torch
from torch import Tensor

from dynaslim import distributed
from dynaslim.errors import TrainingError, UsageError
from dynaslim.seeds import step_seed


class EpochOrder:
    """The order of a set's images in each epoch; remembers the last, as steps come in turn."""

    def __init__(self, images: int, seed: int, purpose: str) -> None:
        self._images = images
        self._seed = seed
        self._purpose = purpose
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __call__(self, epoch: int) -> Tensor:
        """All images in the order of the epoch."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(order_seed(self._seed, epoch, self._purpose))
            self._order = torch.randperm(self._images, generator=generator)
            self._epoch = epoch
        return self._order


def order_seed(seed: int, epoch: int, purpose: str) -> int:
    """The seed of an epoch's order; "train" is not named, so that recorded runs stay the same."""
    return step_seed(seed, epoch, "order" if purpose == "train" else f"order {purpose}")


def own_rows(batch_size: int) -> slice:
    """The rows of each batch that are for this process: all together see what one would.

    Raises:
        UsageError: if the batch cannot be divided evenly among the processes.
    """
    processes, rank = distributed.world_size(), distributed.rank()
    if batch_size % processes:
        raise UsageError(
            f"batch_size {batch_size}: cannot be divided evenly among {processes} processes"
        )
    share = batch_size // processes
    return slice(rank * share, (rank + 1) * share)


def whole_batches(name: str, images: int, batch_size: int) -> int:
    """Whole batches that so many images fill; raises `TrainingError` if not even one."""
    if images < batch_size:
        raise TrainingError(
            f"{name or 'data'}: {images} images do not fill one batch of {batch_size}"
        )
    return images // batch_size


def holdout(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to hold back, both rising: a function of (labels, share, seed).

    The share held back is the same in every class, to within one image.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, 0, "holdout"))
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]
    # class by class, every 1/share-th of a random order: where the rounded sum moves on
    passed = torch.arange(len(labels) + 1, dtype=torch.float64).mul(share).round()
    back = passed[1:] > passed[:-1]
    return order[~back].sort().values, order[back].sort().values
