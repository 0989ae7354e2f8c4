"""The results of a frozen supernet that stage II needs: losses along every route, gate features.

A *path* is one option per gate (its position in `GateSpec.choices`); a *prefix* is the options of
the gates before a given one. If there are many paths, a sample of them is cached.

Suffixes: B rows of a batch, N images, P paths, Q prefixes, K options of a gate, R hidden features.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from dynaslim.cost import CostTable
from dynaslim.errors import TrainingError, check
from dynaslim.graph import AnySpec
from dynaslim.nn.net import ElasticNet, SlimNet

Path = tuple[int, ...]

FLOAT32_BYTES: Final = 2**30
"""Hidden features that are larger than this are stored as float16."""
CHUNK_FLOATS: Final = 2**25
"""The most feature values to process at a time; larger caches are processed in chunks."""


@dataclass(frozen=True)
class RouteCache:
    """Losses of every image along the paths, and the features that the gates read; on the CPU.

    Each augmented view of an image is a row.
    """

    spec: AnySpec
    paths: tuple[Path, ...]
    """All combinations of options or a sample of them, in ascending order."""
    losses_NP: Tensor
    """Cross-entropy in nats, float32."""
    correct_NP: Tensor
    """Whether the prediction is correct."""
    features: tuple[Tensor, ...]
    """For every gate (Q, N, R): hidden features by prefix, in the order of `prefixes`."""
    labels: Tensor
    """(N,) classes."""

    @cached_property
    def prefixes(self) -> tuple[tuple[Path, ...], ...]:
        """The distinct prefixes of the paths by length: one empty prefix, ..., the paths."""
        return _prefixes(self.paths)

    @cached_property
    def children(self) -> tuple[Tensor, ...]:
        """For every gate (Q, K): an option's index in the next level of `prefixes`, or -1."""
        return _children(self.spec, self.prefixes)

    @cached_property
    def deviations(self) -> tuple[Tensor, ...]:
        """For every gate (R,): the divisor of each feature for fitting.

        The standard deviation, but at least a tenth of the root mean square; 1 for constant zeros.
        """
        return tuple(_deviation(features) for features in self.features)

    def chunks(self) -> list[slice]:
        """Slices of the rows to process at a time; all but the last have the same length."""
        floats_per_row = sum(features.shape[0] * features.shape[2] for features in self.features)
        step = max(1, CHUNK_FLOATS // floats_per_row)
        return [slice(start, start + step) for start in range(0, len(self.labels), step)]

    def path_costs(self, table: CostTable) -> Tensor:
        """(P,) float64: the cost of one image along every path, in the table's unit.

        Raises:
            UsageError: if the table is for another network.
        """
        table.check_fits(self.spec)
        return torch.tensor([table.route_cost(path) for path in self.paths], dtype=torch.float64)


def choose_paths(spec: AnySpec, max_routes: int, seed: int) -> tuple[Path, ...]:
    """All combinations of the gates' options if they are at most `max_routes`, else a sample.

    The sample always has the uniform routes that the gates can take, and the paths that take the
    first option of every gate, the second, and so on to the last (so the cheapest, the widest and
    every option of every gate). Others are drawn by `seed` until there are `max_routes`.
    """
    options = [len(gate.choices) for gate in spec.gates]
    total = math.prod(options)
    if total <= max_routes:
        return tuple(itertools.product(*map(range, options)))
    chosen = {
        tuple(gate.choices.index(index) for gate in spec.gates)
        for index in range(spec.num_widths)
        if all(index in gate.choices for gate in spec.gates)
    }
    chosen |= {tuple(min(k, n - 1) for n in options) for k in range(max(options))}
    # enough numbers even if they include all the paths that are chosen already
    for number in random.Random(seed).sample(range(total), min(total, max_routes + len(chosen))):
        if len(chosen) >= max_routes:
            break
        path = []
        for count in reversed(options):
            number, option = divmod(number, count)
            path.append(option)
        chosen.add(tuple(reversed(path)))
    return tuple(sorted(chosen))


@torch.no_grad()
def cache_routes(
    net: ElasticNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    max_routes: int,
    seed: int,
    on_batch: Callable[[], None] | None = None,
) -> RouteCache:
    """Run every path of a frozen network on batches of (network input (B, C, H, W), labels (B,)).

    Inputs are moved to the network's device. Paths run depth first and share the segments of common
    prefixes, such as the trunk. See `choose_paths` for `max_routes` and `seed`. Features are stored
    as float16 if they are larger than `FLOAT32_BYTES`.

    Raises:
        UsageError: if the network has no gates or is in training mode.
        TrainingError: if there are no images, or a loss is not finite.
    """
    assert isinstance(net, SlimNet)
    spec = net.spec
    check(bool(spec.gates), f"{spec.name} has no gates to fit")
    check(not net.training, "routes are cached with running statistics: call net.eval() first")
    paths = choose_paths(spec, max_routes, seed)
    prefixes = _prefixes(paths)
    children = [child.tolist() for child in _children(spec, prefixes)]
    gates, device = len(spec.gates), net.device
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    labels: list[Tensor] = []
    hidden: list[list[Tensor]] = [[] for _ in spec.gates]
    stored_bytes, dtype = 0, torch.float32

    def run(number: int, x: Tensor, index: int, at: int) -> None:
        """Run segment `number` at a width index, on prefix `at`, and all later segments."""
        if number == gates:
            logits = net.segment(number, x, index, decide=False).features.float()
            loss_PB[at] = F.cross_entropy(logits, labels_B, reduction="none")
            correct_PB[at] = logits.argmax(1) == labels_B
            return
        x, hidden_BR = net.segment_hidden(number, x, index)
        seen[number][at] = hidden_BR.float()
        for option, child in enumerate(children[number][at]):
            if child >= 0:
                run(number + 1, x, spec.gates[number].choices[option], child)

    for x, labels_B in batches:
        net.check_input(x)
        labels_B = labels_B.to(device)
        loss_PB = torch.empty(len(paths), len(x), device=device)
        correct_PB = torch.empty(len(paths), len(x), dtype=torch.bool, device=device)
        seen: list[list[Tensor]] = [[torch.empty(0)] * len(level) for level in prefixes[:-1]]
        run(0, x.to(device), 0, 0)
        losses.append(loss_PB.T.cpu())
        correct.append(correct_PB.T.cpu())
        labels.append(labels_B.cpu())
        for parts, level in zip(hidden, seen, strict=True):
            parts.append(torch.stack(level).to("cpu", dtype))
            stored_bytes += parts[-1].numel() * 4
        if stored_bytes > FLOAT32_BYTES and dtype == torch.float32:
            dtype = torch.float16
            hidden = [[part.to(dtype) for part in parts] for parts in hidden]
        if on_batch is not None:
            on_batch()
    if not any(map(len, labels)):
        raise TrainingError("no images to fit gates on")
    losses_NP = torch.cat(losses)
    features = []
    while hidden:  # one gate at a time, so that only its parts are in memory twice
        features.append(torch.cat(hidden.pop(0), dim=1))
    for path, values_N in zip(paths, losses_NP.T, strict=True):
        bad = int((~values_N.isfinite()).sum())
        if bad:
            raise TrainingError(
                f"route {spec.route_along(path)}: the loss of {bad} images is not finite"
            )
    for number, values in enumerate(features):
        if not bool(values.isfinite().all()):
            raise TrainingError(f"gate {number}: hidden features are not finite as {values.dtype}")
    return RouteCache(
        spec, paths, losses_NP, torch.cat(correct), tuple(features), torch.cat(labels)
    )


def _prefixes(paths: Sequence[Path]) -> tuple[tuple[Path, ...], ...]:
    return tuple(tuple(sorted({p[:g] for p in paths})) for g in range(len(paths[0]) + 1))


def _children(spec: AnySpec, prefixes: Sequence[Sequence[Path]]) -> tuple[Tensor, ...]:
    tables = []
    for gate, (level, below) in zip(spec.gates, itertools.pairwise(prefixes), strict=True):
        places = {prefix: place for place, prefix in enumerate(below)}
        rows = [
            [places.get((*p, option), -1) for option in range(len(gate.choices))] for p in level
        ]
        tables.append(torch.tensor(rows))
    return tuple(tables)


def _deviation(features_QNR: Tensor) -> Tensor:
    """As `RouteCache.deviations`, for one gate; sums are in float64, part by part."""
    total_R = torch.zeros(features_QNR.shape[2], dtype=torch.float64)
    squares_R = torch.zeros_like(total_R)
    for start in range(0, features_QNR.shape[1], 4096):
        values = features_QNR[:, start : start + 4096].double()
        total_R += values.sum((0, 1))
        squares_R += values.square().sum((0, 1))
    count = features_QNR.shape[0] * features_QNR.shape[1]
    square_R = squares_R / count
    deviation_R = (square_R - (total_R / count).square()).clamp_min(0).sqrt()
    # a feature that hardly varies is a bias to its gate: do not amplify it
    deviation_R = deviation_R.maximum(0.1 * square_R.sqrt())
    return torch.where(deviation_R > 0, deviation_R, 1.0).float()
