"""The table behind an evaluation: what every mode answers for every image.

A mode is a route, or the dynamic mode. Processes of one run share the batches and put the table
together; totals are taken from it afterwards (`dynaslim.evaluation`).

Suffixes: N images, B rows of a batch, M modes, G gates, K classes, C channels, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynaslim.cost import madds
from dynaslim.data.transforms import normalise
from dynaslim.distributed import gather, rank, world_size
from dynaslim.errors import DataError, DynaslimError
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import MAX_VIEWS, Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.spec import Route

_SHIFTS: Final = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # the image, up, down, left, right
assert 2 * len(_SHIFTS) == MAX_VIEWS


class LabelledImages(Protocol):
    """What `evaluate` reads: `ImageDataset`, or anything else with these."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def class_names(self) -> Sequence[str]:
        """By label; empty if unknown."""

    @property
    def where(self) -> Sequence[str]:
        """What each image is called in files and messages; empty if unknown."""

    def __len__(self) -> int:
        """How many images."""

    def check_fits(self, preprocessing: Preprocessing, num_classes: int) -> None:
        """Raise `DataError` unless pixels and classes are what the two say."""

    def batches(
        self, batch_size: int, order: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 pixels (B, C, S, S), int64 labels (B,)) of the rows in `order`, a batch at a time.

        An image that cannot be read keeps its place in the batch, with a label below zero.
        """


class Answers(NamedTuple):
    """What the modes answered for some images; the images are the last axis of every tensor."""

    rows_N: Tensor
    labels_N: Tensor
    loss_MN: Tensor
    prediction_MN: Tensor
    rank_MN: Tensor
    """How many classes came before the label: 0 is right, below 5 is right in top-5."""
    confidence_MN: Tensor
    choices_GN: Tensor
    madds_N: Tensor

    @staticmethod
    def join(parts: Sequence[Answers]) -> Answers:
        """All images of the parts, by row."""
        joined = Answers(*(torch.cat(tensors, dim=-1) for tensors in zip(*parts, strict=True)))
        order = joined.rows_N.argsort()
        return Answers(*(tensor[..., order] for tensor in joined))


class Modes:
    """A network's modes, run on batches: some routes, and last the dynamic mode if `gated`."""

    def __init__(
        self,
        net: SlimNet,
        routes: Sequence[Route],
        preprocessing: Preprocessing,
        *,
        gated: bool,
        views: int,
        bf16: bool,
    ) -> None:
        self.net = net
        self.routes = routes
        self.preprocessing = preprocessing
        self.views = views
        self.bf16 = bf16
        self.device = next(net.parameters()).device
        # serial, by torch as it is: every process then computes a batch in just the same way
        self.engine = (
            Engine(
                net,
                backend="eager",
                precision="bf16" if bf16 else "fp32",
                workers=1,
                max_batch=1 << 30,
                cache_dir=None,
            )
            if gated
            else None
        )
        self.names = [f"route {route}" for route in routes]
        if self.engine is not None:
            self.names.append("dynamic mode")

    def madds(self, route: Route) -> int:
        """Multiply-adds of one image along a route, all its views together."""
        return madds(self.net.spec, route, self.preprocessing.image_size_px) * self.views

    def __call__(self, pixels_BCSS: Tensor, labels_B: Tensor, rows_B: Tensor) -> Answers:
        """Answers for a batch; raises `DynaslimError` if the network's output is not finite."""
        x_BCSS = normalise(pixels_BCSS.to(self.device), self.preprocessing)
        logits: list[list[Tensor]] = [[] for _ in self.names]  # of each mode, by view
        choices_GB = torch.empty(0, len(labels_B), dtype=torch.int64)
        madds_B = torch.zeros(len(labels_B), dtype=torch.float64)
        for number in range(self.views):
            seen_BCSS = view(x_BCSS, number)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.net.forward_many(seen_BCSS, self.routes)
                if self.engine is not None:
                    routed = self.engine(seen_BCSS)
                    outputs.append(routed.logits)
                    madds_B += routed.madds.cpu()
                    if number == 0:
                        choices_GB = routed.routes.cpu().T
            for name, mode, output in zip(self.names, logits, outputs, strict=True):
                mode.append(_finite(name, output.float().cpu()))
        scores_MBK = torch.stack([_mean_of_views(mode) for mode in logits])
        return Answers(
            rows_B,
            labels_B,
            torch.stack([F.cross_entropy(s, labels_B, reduction="none") for s in scores_MBK]),
            scores_MBK.argmax(2),
            _ranks(scores_MBK, labels_B),
            scores_MBK.softmax(2).amax(2),
            choices_GB,
            madds_B,
        )


def view(x_BCSS: Tensor, number: int) -> Tensor:
    """View `number` (0 to `MAX_VIEWS` - 1) of normalised images, for test-time augmentation.

    View 0 is the image and 1 its mirror image; then come the image moved up, down, left and right
    by a sixteenth of its side (at least 1 px), each followed by its mirror image. What moves in is
    zero, the mean colour.
    """
    step = max(1, x_BCSS.shape[-1] // 16)
    down, right = (step * sign for sign in _SHIFTS[number // 2])
    # a negative pad crops: rows taken off one side are added as zeros on the other
    moved = F.pad(x_BCSS, (right, -right, down, -down)) if down or right else x_BCSS
    return moved.flip(3) if number % 2 else moved


T = TypeVar("T")


def answer_all(
    modes: Modes,
    images: LabelledImages,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """The whole table, on every process; `on_batch` hears of the images of this one's batches.

    Raises:
        DataError: if no image can be read.
        DynaslimError: if the network's output is not finite, or another process failed.
    """

    def own_batches() -> list[Answers]:
        return list(_own_answers(modes, images, batch_size, on_batch))

    parts = [part for process in _everyone(own_batches) for part in process]
    if not parts:
        raise DataError(f"{images.name or 'data'}: none of its {len(images)} images can be read")
    return Answers.join(parts)


def _own_answers(
    modes: Modes,
    images: LabelledImages,
    batch_size: int,
    on_batch: Callable[[int], None] | None,
) -> Iterator[Answers]:
    """Answers for this process's batches, which are composed as one process's would be."""
    own = torch.split(torch.arange(len(images)), batch_size)[rank() :: world_size()]
    if not own:
        return
    loaded = images.batches(batch_size, torch.cat(own))
    for rows_B, (pixels_BCSS, labels_B) in zip(own, loaded, strict=True):
        if len(labels_B) != len(rows_B):
            raise DataError(
                f"{images.name}: gave {len(labels_B)} images for a batch of {len(rows_B)}"
            )
        readable = labels_B >= 0
        if readable.all():
            yield modes(pixels_BCSS, labels_B, rows_B)
        elif readable.any():
            yield modes(pixels_BCSS[readable], labels_B[readable], rows_B[readable])
        if on_batch is not None:
            on_batch(len(labels_B))


def _everyone(work: Callable[[], T]) -> list[T]:
    """Every process's result; if one fails, all raise, where they would wait for it forever."""
    if world_size() == 1:
        return [work()]
    try:
        own = work()
    except Exception as error:
        # a stranger's exception may not survive the journey to the other processes
        ours = isinstance(error, DynaslimError)
        told = f"process {rank()}: {type(error).__name__}: {error}"
        gather(error if ours else DynaslimError(told))
        raise
    results = gather(own)
    for result in results:
        if isinstance(result, DynaslimError):
            raise result
    return results


def _finite(name: str, logits_BK: Tensor) -> Tensor:
    if not torch.isfinite(logits_BK).all():
        raise DynaslimError(
            f"{name}: the network's output is not finite; its weights or BN statistics "
            f"are damaged, or the input is"
        )
    return logits_BK


def _mean_of_views(logits: Sequence[Tensor]) -> Tensor:
    """Scores whose softmax is the mean of the views' probabilities; one view's are its logits.

    Not the mean of logits as in the released code: that top-1 was never the higher (docs/log.md).
    `runtime.escalation.averaged` does the same.
    """
    if len(logits) == 1:
        return logits[0]
    log_probs = torch.stack([logits_BK.log_softmax(1) for logits_BK in logits])
    return log_probs.logsumexp(0) - math.log(len(logits))


def _ranks(scores_MBK: Tensor, labels_B: Tensor) -> Tensor:
    """How many classes come before the label; of equals the lower number does, as in argmax."""
    own_MB1 = scores_MBK.gather(2, labels_B.expand(len(scores_MBK), -1)[..., None])
    lower_BK = torch.arange(scores_MBK.shape[2]) < labels_B[:, None]
    return ((scores_MBK > own_MB1) | ((scores_MBK == own_MB1) & lower_BK)).sum(2)
