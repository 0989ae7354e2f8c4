"""A network's answers along every path, from which the outcome of any budget can be computed.

The network runs every path of its gates once on held-out images (`answer_paths`). The results of
any shift, margin threshold and target follow from that table in numpy (`simulate`);
`dynaslim.runtime.budget_search` looks for the settings worth having.

Suffixes: B rows of a batch, N images, K options of a gate, P paths, A answers, Q prefixes.
The options of a path are the digits of its number, the last gate's being the least significant.
A prefix is the options of the gates before a gate, and is numbered in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import CostTable
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import readable_batches
from dynaslim.errors import DataError, DynaslimError, UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.nn.net import ElasticNet
from dynaslim.progress import progress
from dynaslim.runtime.budget import PathCosts, choose, option_costs
from dynaslim.runtime.escalation import (
    Bools,
    Escalation,
    EscalationState,
    Floats,
    Ints,
    Path,
    averaged,
    escalation_cost,
    margins,
)
from dynaslim.runtime.opinion_pool import OpinionPool
from dynaslim.runtime.program_net import for_evaluation
from dynaslim.spec import Route

MAX_PATHS: Final = 256


@dataclass(frozen=True)
class PathAnswers:
    """Answers of every path of a network for every image, and the logits of its gates."""

    spec: AnySpec
    image_size_px: int
    gate_logits: tuple[npt.NDArray[np.float32], ...]
    """Logits of every gate (Q, N, K), by prefix."""
    correct_NP: Bools
    margins_NP: npt.NDArray[np.float32]
    expected_NP: Floats
    """The probability that each answer is right, judged by several paths (`OpinionPool`)."""
    second_look_N: Bools | None = None
    """Whether the widest path's answers for an image and its mirror image, averaged, are right;
    None if mirror images were not run."""
    expected_look_N: Floats | None = None
    """The probability of the same."""

    def __len__(self) -> int:
        return len(self.correct_NP)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """All paths in the order of their numbers: cheapest first, widest last."""
        return _paths(self.spec)

    @cached_property
    def table(self) -> CostTable:
        """Multiply-adds of the segments."""
        return CostTable.from_madds(self.spec, self.image_size_px)

    @cached_property
    def targets(self) -> tuple[Path, ...]:
        """Paths to which rows may escalate: the uniform ones, except the cheapest."""
        return _uniform_paths(self.spec)[1:]

    def costs(self, table: CostTable) -> Floats:
        """Cost of one image along every path (P,), in the table's unit."""
        return PathCosts(table).of(np.array(self.paths))

    def may_escalate(self, target: Path, *, mirror: bool = False) -> Bools:
        """Paths (P,) from which rows may escalate to a target, or with `mirror` look again."""
        return PathCosts(self.table).may_escalate(np.array(self.paths), target, mirror=mirror)

    def taken(self, shift: float) -> Ints:
        """Numbers of the paths (N,) that the gates choose under a shift."""
        path_N = np.zeros(len(self), np.int64)
        everyone = np.arange(len(self))
        for logits_QNK, costs_K in zip(self.gate_logits, option_costs(self.table), strict=True):
            option_N = choose(logits_QNK[path_N, everyone], shift, costs_K)
            path_N = path_N * len(costs_K) + option_N
        return path_N


def _paths(spec: AnySpec) -> tuple[Path, ...]:
    return tuple(itertools.product(*(range(len(gate.choices)) for gate in spec.gates)))


def _uniform_paths(spec: AnySpec) -> tuple[Path, ...]:
    """Paths with the same option at every gate, cheapest first.

    Gates with fewer options take their last.
    """
    options = [len(gate.choices) for gate in spec.gates]
    steps = range(max(options))
    return tuple(dict.fromkeys(tuple(min(k, n - 1) for n in options) for k in steps))


class Outcome(NamedTuple):
    """Means over images: costs in the tables' units, accuracy and escalated share in 0..1."""

    madds: float
    ms: float | None
    top1: float
    escalated: float


def count_paths(spec: AnySpec) -> int:
    """The number of paths that a network's gates have.

    Raises:
        UsageError: if it has no gates, or more than `MAX_PATHS` paths.
    """
    check(bool(spec.gates), f"{spec.name} has no gates: there is nothing to shift")
    count = math.prod(len(gate.choices) for gate in spec.gates)
    check(
        count <= MAX_PATHS,
        f"{spec.name}: its gates have {count} paths, a budget curve is made for {MAX_PATHS} at "
        f"most; give its gates fewer choices",
    )
    return count


def answer_images(
    checkpoint: Checkpoint,
    images: ImageDataset,
    batch_size: int,
    *,
    on_answers: Callable[[int, npt.NDArray[np.float32], Ints], None] | None = None,
) -> PathAnswers:
    """Run `answer_paths` for a checkpoint, on the images that are readable, with a progress bar."""
    assert checkpoint.preprocessing is not None
    pre = checkpoint.preprocessing
    net, rows = for_evaluation(checkpoint.net, pre.image_size_px, len(images), batch_size)
    with progress("running every path", len(images)) as bar:
        return answer_paths(
            net,
            readable_batches(images, pre, rows),
            mirror=checkpoint.mirror,
            on_batch=bar.advance,
            on_answers=on_answers,
        )


@torch.inference_mode()
def answer_paths(
    net: ElasticNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    mirror: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_answers: Callable[[int, npt.NDArray[np.float32], Ints], None] | None = None,
) -> PathAnswers:
    """Run every path on batches of (network input (B, C, S, S), labels (B,)).

    Paths run depth first and share their common beginnings, above all the trunk. With `mirror`, the
    widest path also runs on the mirror images. `on_batch` is called with the number of images of
    each batch, `on_answers` with a path's number, its logits (B, N) and the labels (B,) of a batch.

    Raises:
        UsageError: for a network in training mode, one without gates or with too many paths, or
            images that are not square or differ in size.
        DataError: if there are no images.
        DynaslimError: if logits are not finite.
    """
    spec = net.spec
    count = count_paths(spec)
    check(not net.training, "paths are compared with running statistics: call net.eval() first")
    device = net.device
    options = [len(gate.choices) for gate in spec.gates]
    gate_logits: list[list[npt.NDArray[np.float32]]] = [[] for _ in spec.gates]
    right: list[Bools] = []
    margin: list[npt.NDArray[np.float32]] = []
    pool = OpinionPool()
    paths = _paths(spec)
    members = [paths.index(path) for path in _uniform_paths(spec)]
    sides: set[tuple[int, int]] = set()

    def run(number: int, x: Tensor, index: int, at: int) -> None:
        """Run segment `number` at a width index, which makes prefix `at`, and all after it."""
        out = net.segment(number, x, index)
        if out.gate_logits is None:
            logits_BN = _finite(f"route {at}", out.features)
            classes_AB[at] = logits_BN.argmax(1)
            margins_PB[at] = margins(logits_BN)
            if on_answers is not None:
                on_answers(at, logits_BN, labels)
            if at in members:
                opinions.append(logits_BN)
            if mirror and at == count - 1:
                mirror_BN = _finite("mirror images", net(image.flip(3), spec.widest_choice))
                opinions.append(averaged(logits_BN, mirror_BN))
                classes_AB[count] = opinions[-1].argmax(1)
            return
        decided[number][at] = _finite(f"gate {number}", out.gate_logits)
        for option, choice in enumerate(spec.gates[number].choices):
            run(number + 1, out.features, choice, at * options[number] + option)

    for x, labels_B in batches:
        net.check_input(x)
        sides.add((x.shape[2], x.shape[3]))
        labels = labels_B.cpu().numpy()
        # the answers of all paths, and that of the second look
        classes_AB = np.empty((count + mirror, len(x)), np.int64)
        opinions: list[npt.NDArray[np.float32]] = []
        margins_PB = np.empty((count, len(x)), np.float32)
        decided = [
            np.empty((math.prod(options[:gate]), len(x), k), np.float32)
            for gate, k in enumerate(options)
        ]
        image = x.to(device)
        run(0, image, 0, 0)
        right.append(labels[:, None] == classes_AB.T)
        margin.append(margins_PB.T)
        pool.add(classes_AB.T, np.stack(opinions), labels)
        for parts, logits_QBK in zip(gate_logits, decided, strict=True):
            parts.append(logits_QBK)
        if on_batch is not None:
            on_batch(len(x))
    if not any(map(len, right)):
        raise DataError("no images to measure budgets on")
    height, width = sides.pop()
    check(not sides and height == width, "budgets are measured on square images of one size")
    right_NA, expected_NA = np.concatenate(right), pool.probabilities()
    return PathAnswers(
        spec,
        height,
        tuple(np.concatenate(parts, axis=1) for parts in gate_logits),
        right_NA[:, :count],
        np.concatenate(margin),
        expected_NA[:, :count],
        right_NA[:, count] if mirror else None,
        expected_NA[:, count] if mirror else None,
    )


def simulate(
    answers: PathAnswers,
    shift: float,
    escalations: Sequence[Escalation] = (),
    *,
    latency: CostTable | None = None,
    rows: Ints | None = None,
) -> Outcome:
    """The outcome of a shift, followed by steps of escalation, on the images.

    `rows` restricts the means to these images.

    Raises:
        UsageError: if a target is not one of the network's paths, or for a second look that was
            not run.
    """
    walked = walk(answers, shift, escalations, latency=latency)
    some = slice(None) if rows is None else rows
    return Outcome(
        float(walked.madds_N[some].mean()),
        None if walked.ms_N is None else float(walked.ms_N[some].mean()),
        float(walked.right_N[some].mean()),
        float(walked.escalated_N[some].mean()),
    )


class Walked(NamedTuple):
    """The outcome for every image."""

    madds_N: Floats
    ms_N: Floats | None
    right_N: Bools
    expected_N: Floats
    escalated_N: Bools


def walk(
    answers: PathAnswers,
    shift: float,
    escalations: Sequence[Escalation] = (),
    *,
    latency: CostTable | None = None,
) -> Walked:
    """Like `simulate`, but for each image."""
    own_N = answers.taken(shift)
    everyone = np.arange(len(answers))
    right_N = answers.correct_NP[everyone, own_N]
    expected_N = answers.expected_NP[everyone, own_N]
    madds_N = answers.costs(answers.table)[own_N]
    ms_N = None if latency is None else answers.costs(latency)[own_N]
    state, up_N = EscalationState(len(answers)), np.zeros(len(answers), bool)
    for number, (tau, target, mirror) in enumerate(escalations, start=1):
        assert not mirror or number == len(escalations), "a second look is the last step"
        if target not in answers.paths:
            raise UsageError(f"target {target}: {answers.spec.name} has no such path")
        path = answers.paths.index(target)
        able_N = answers.may_escalate(target, mirror=mirror)[own_N]
        escalated_N = state.next(able_N, answers.margins_NP[everyone, own_N], tau)
        own_N = np.where(escalated_N, path, own_N)
        then_right_N, then_expected_N = _answered(answers, path, mirror)
        right_N = np.where(escalated_N, then_right_N, right_N)
        expected_N = np.where(escalated_N, then_expected_N, expected_N)
        madds_N = madds_N + escalated_N * escalation_cost(answers.table, target, mirror=mirror)
        if ms_N is not None and latency is not None:
            ms_N = ms_N + escalated_N * escalation_cost(latency, target, mirror=mirror)
        up_N |= escalated_N
    return Walked(madds_N, ms_N, right_N, expected_N, up_N)


def _answered(answers: PathAnswers, path: int, mirror: bool) -> tuple[Bools, Floats]:
    """Whether a step's answer is right (N,), and the probability of that."""
    if not mirror:
        return answers.correct_NP[:, path], answers.expected_NP[:, path]
    check(
        answers.second_look_N is not None and path == len(answers.paths) - 1,
        f"mirror image along {answers.paths[path]}: has not been run; the answers have "
        f"{'none' if answers.second_look_N is None else 'that of the widest path'}",
    )
    assert answers.second_look_N is not None
    assert answers.expected_look_N is not None
    return answers.second_look_N, answers.expected_look_N


def uniform_outcomes(
    answers: PathAnswers, *, latency: CostTable | None = None
) -> list[tuple[Route, Outcome]]:
    """Outcomes if all images take one route, for comparison: the cheapest path and every target."""
    result = []
    for path in (answers.paths[0], *answers.targets):
        right_N = answers.correct_NP[:, answers.paths.index(path)]
        ms = None if latency is None else latency.route_cost(path)
        outcome = Outcome(answers.table.route_cost(path), ms, float(right_N.mean()), 0.0)
        result.append((answers.spec.route_along(path), outcome))
    return result


def _finite(name: str, logits: Tensor) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = logits.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise DynaslimError(
            f"{name}: logits are not finite; the weights or BN statistics are damaged, or the "
            f"images are"
        )
    return values
