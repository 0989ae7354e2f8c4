"""What is asked of a batcher, what it answers, and why it may not.

Suffixes: B rows of a batch, C channels, G gates, K likeliest classes, N classes, S side in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from dynaslim.errors import DataError, DynaslimError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.budget import BudgetCurve
from dynaslim.serve.budgets import Setting

LEAST_RETRY_S: Final = 1.0
"""Of a refused caller, who may come back later than that."""


class QueueFullError(DynaslimError):
    """No room in the queue, or not enough time; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = max(LEAST_RETRY_S, retry_after_s)


class DeadlineError(DynaslimError):
    """Time ran out before the images were run."""


class StoppingError(DynaslimError):
    """The batcher takes no more."""


class BatchEngine(Protocol):
    """What a batcher runs: `Engine`, or anything else with these."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How pictures are prepared."""

    @property
    def curve(self) -> BudgetCurve | None:
        """What budgets are looked up on."""

    def __call__(
        self, x: Any, *, budget: Any = None, escalate: Any = "auto", hold: Any = False
    ) -> Any:
        """Normalised images (B, C, S, S) -> `RoutedOutput`."""


class Answer(NamedTuple):
    """What the network says about an image."""

    top: list[tuple[int, float]]
    """Likeliest classes and their probabilities, in order."""
    choices: tuple[int, ...]
    """The width index behind each gate."""
    madds: float
    escalated: bool
    mirrored: bool


class Job:
    """Images that were asked for together; they may run in several batches."""

    __slots__ = (
        "answers", "batch_size", "deadline", "decoded", "error", "finished", "missing", "on_done",
        "pixels", "postponed", "ready", "setting", "started", "top_k", "unread", "used", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        rows: int,
        setting: Setting,
        top_k: int,
        deadline: float | None,
        on_done: Callable[[Job], None],
    ) -> None:
        self.setting = setting
        self.top_k = top_k
        self.deadline = deadline
        self.on_done = on_done
        self.answers: list[Answer | None] = [None] * rows
        self.pixels: list[np.ndarray | None] = [None] * rows
        self.ready: deque[int] = deque()
        """Rows that are decoded and wait for the engine."""
        self.unread = rows
        """Rows that are still being decoded."""
        self.postponed = 0
        """Of these, rows that nobody is to wait for."""
        self.waiting = rows
        """Rows that the engine can run soon, or has not begun with."""
        self.missing = rows
        """Rows without an answer."""
        self.error: BaseException | None = None
        self.used: str | None = None
        """The budget that the last of it ran with."""
        self.batch_size = 0
        """Rows of the largest batch that had a part of it."""
        self.decoded = self.started = self.finished = 0.0
        """When the last row was decoded, went to the engine and came back, by the clock."""

    @property
    def done(self) -> bool:
        """Whether nothing is to be done for it any more."""
        return self.missing == 0


@dataclass(frozen=True)
class BatchReport:
    """What a batch was, for those who count."""

    rows: int
    seconds: float
    """In the engine."""
    choices: np.ndarray
    """(B, G) int64."""
    madds: np.ndarray
    """(B,)."""
    escalated: int
    """Rows that escalated."""
    mirrored: int
    """Rows of these whose mirror image ran too."""
    expected_madds: float | None = None
    """What a row costs on average by the curve, for the batch's budget; None without one."""


def answers_of(output: Any, top_k: int) -> list[Answer]:
    """The rows of a `RoutedOutput`, each with its likeliest classes.

    Raises:
        DataError: if logits are not finite.
    """
    logits_BN = np.asarray(output.logits, np.float64)
    if not np.isfinite(logits_BN).all():
        raise DataError("the network's output is not finite; its weights are damaged")
    # one more than is asked for: argpartition decides freely between equals at the border
    count = min(top_k + 1, logits_BN.shape[1])
    some_BK = np.sort(np.argpartition(-logits_BN, count - 1, axis=1)[:, :count], axis=1)
    by_logit_BK = np.argsort(-np.take_along_axis(logits_BN, some_BK, 1), axis=1, kind="stable")
    order_BK = np.take_along_axis(some_BK, by_logit_BK, 1)[:, :top_k]
    shifted_BN = np.exp(logits_BN - logits_BN.max(1, keepdims=True))
    best_BK = np.take_along_axis(shifted_BN, order_BK, 1) / shifted_BN.sum(1, keepdims=True)
    return [
        Answer(list(zip(order, best, strict=True)), tuple(choices), madds, escalated, mirrored)
        for order, best, choices, madds, escalated, mirrored in zip(
            order_BK.tolist(),
            best_BK.tolist(),
            np.asarray(output.routes).tolist(),
            np.asarray(output.madds).tolist(),
            np.asarray(output.escalated).tolist(),
            np.asarray(output.mirrored).tolist(),
            strict=True,
        )
    ]
