"""Milliseconds of a network's routes, gates and budgets on this machine, taken in turn.

Suffixes: B rows, C channels, S side in pixels, G gates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from dynaslim.bench.timing import Arm, hardware, interleave, summary
from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import madds
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import normalise
from dynaslim.evaluation import Evaluation, RouteShare
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.budget import BudgetPoint
from dynaslim.runtime.engine import Engine
from dynaslim.spec import NetSpec, Route

BATCH_SIZE: Final = 32
_MOST_BATCHES: Final = 8
_MADDS_PER_ROUND: Final = 2e9
"""Of the widest route: what decides how many batches a round has."""
_SECONDS: Final = 10.0
_ROUNDS: Final = (7, 31)


@dataclass(frozen=True)
class Times:
    """What was timed; every mode ran the same images in every round."""

    backend: str
    rounds: int
    images: int
    """In each round."""
    hardware: Mapping[str, Any]
    ms: Mapping[str, Sequence[float]]
    """Milliseconds per image by mode (`route_mode`, ...) and round."""

    def spread(self, mode: str) -> dict[str, float] | None:
        """Median and quartiles of a mode in ms per image; None if it was not timed."""
        return summary(self.ms[mode]) if mode in self.ms else None

    def median(self, mode: str) -> float | None:
        """Median of a mode in ms per image; None if it was not timed."""
        return summary(self.ms[mode])["median"] if mode in self.ms else None

    @property
    def noise(self) -> float:
        """How far the quartiles of a mode lie apart, as a share of its median; of the worst."""
        found = [summary(values) for values in self.ms.values()]
        return max((one["q3"] - one["q1"]) / one["median"] for one in found)

    def ratio(self, above: str, below: str) -> dict[str, float] | None:
        """Median and quartiles of the ratio of two modes, of pairs of the same round."""
        if above not in self.ms or below not in self.ms:
            return None
        return summary([a / b for a, b in zip(self.ms[above], self.ms[below], strict=True)])


def route_mode(widths: Sequence[int]) -> str:
    """The name of a static route in `Times.ms`."""
    return f"route {Route(tuple(widths))}"


def gate_mode(number: int) -> str:
    """The name of the dynamic mode of a run's gate."""
    return f"gate {number}"


CHOSEN_GATE: Final = gate_mode(0)
"""The gate that the details are of, which is timed first."""


def budget_mode(number: int) -> str:
    """The name of a point of the budget curve."""
    return f"budget {number}"


def batches_per_round(spec: NetSpec, image_size_px: int) -> int:
    """How many batches of 32 a round has: several of a small network, one of a large one."""
    batch = madds(spec, spec.widest_choice, image_size_px) * BATCH_SIZE
    return int(min(max(_MADDS_PER_ROUND // batch, 1), _MOST_BATCHES))


def representative(evaluation: Evaluation, rows: int, seed: int = 0) -> torch.Tensor:
    """Positions of so many evaluated images whose routes have the shares of all, mixed.

    Fewer images are taken several times.
    """
    rng = np.random.default_rng(seed)
    number_N = evaluation.taken_number.numpy()
    counts = _counts(np.bincount(number_N, minlength=len(evaluation.taken)), rows)
    picked = []
    for route, count in enumerate(counts):
        own = rng.permutation(np.flatnonzero(number_N == route))
        picked.append(np.resize(own, count))
    return torch.from_numpy(rng.permutation(np.concatenate(picked)))


def pixels_at(images: ImageDataset, preprocessing: Preprocessing, rows: torch.Tensor) -> np.ndarray:
    """Network input (B, C, S, S) of these rows of a set, float32."""
    (pixels_BCSS, _) = next(iter(images.batches(len(rows), rows)))
    x: np.ndarray = normalise(pixels_BCSS, preprocessing).numpy()
    return x


def noise(spec: NetSpec, rows: int, image_size_px: int) -> np.ndarray:
    """Normal noise in place of images: (rows, C, S, S) float32."""
    shape = (rows, spec.in_channels, image_size_px, image_size_px)
    x: np.ndarray = np.random.default_rng(0).standard_normal(shape, np.float32)
    return x


def measure_times(
    engine: Engine,
    others: Sequence[Checkpoint],
    x_BCSS: np.ndarray,
    *,
    cache_dir: str | Path | None = "auto",
    routes: Sequence[Sequence[int]],
    budgets: Sequence[BudgetPoint],
    shares: Sequence[Sequence[RouteShare]] | None,
    rounds: int | None,
    on_round: Callable[[], None] | None = None,
) -> Times:
    """Time routes and budgets of an engine, and its dynamic mode and that of others, in turn.

    `others` are the same network with other gates. `shares` None lets the gates choose; else each
    gate, the engine's first, is overruled to send rows along routes in its shares, and left out if
    it has none. `rounds` None takes about ten seconds. The engine is closed in the end.
    """
    spec = engine.spec
    batches = np.split(x_BCSS, range(BATCH_SIZE, len(x_BCSS), BATCH_SIZE))
    arms: dict[str, Arm] = {
        route_mode(widths): _all(engine.static(list(widths)), batches) for widths in routes
    }
    engines = [engine]
    if shares is None:
        engines += [Engine(other, backend=engine.backend, cache_dir=cache_dir) for other in others]
        for number, one in enumerate(engines):
            arms[gate_mode(number)] = _all(one, batches)
    else:
        for number, mix in enumerate(shares):
            if not sum(one.share for one in mix):
                continue
            arms[gate_mode(number)] = _overruled(engine, spec, mix, batches)
    for number, point in enumerate(budgets):
        arms[budget_mode(number)] = _all(_at_budget(engine, point), batches)
    try:
        if rounds is None:
            rounds = _rounds_for(arms)
        times = interleave(arms, rounds, on_round)
    finally:
        for one in engines:
            one.close()
    return Times(
        engine.backend,
        rounds,
        len(x_BCSS),
        hardware(),
        {mode: [ms / len(x_BCSS) for ms in values] for mode, values in times.items()},
    )


def _rounds_for(arms: Mapping[str, Arm]) -> int:
    """As many rounds as take `_SECONDS`, but enough for a spread."""
    for arm in arms.values():
        arm()  # compiles
    start = time.perf_counter()
    for arm in arms.values():
        arm()
    least, most = _ROUNDS
    return int(min(max(_SECONDS / (time.perf_counter() - start), least), most))


def _all(run: Callable[[Any], Any], batches: Sequence[np.ndarray]) -> Arm:
    return lambda: [run(batch) for batch in batches]


def _at_budget(engine: Engine, point: BudgetPoint) -> Callable[[Any], Any]:
    return lambda batch: engine(batch, budget=point)


def _overruled(
    engine: Engine, spec: NetSpec, shares: Sequence[RouteShare], batches: Sequence[np.ndarray]
) -> Arm:
    """The dynamic mode with decisions made beforehand."""
    paths = [
        [gate.choices.index(index) for gate, index in zip(spec.gates, indices, strict=True)]
        for indices in (spec.segment_indices(Route(one.widths))[1:] for one in shares)
    ]
    router = engine.router
    rows = sum(map(len, batches))
    counts = _counts(np.array([one.share for one in shares]), rows)
    options_NG = np.repeat(np.array(paths, np.int64), counts, axis=0)
    options_NG = np.random.default_rng(0).permutation(options_NG)
    parts = np.split(options_NG, range(BATCH_SIZE, rows, BATCH_SIZE))

    def run() -> None:
        for batch, options_BG in zip(batches, parts, strict=True):
            images = router.backend.arrays.images(batch)
            router.routed(images, _told(options_BG), None)

    return run


def _told(options_BG: np.ndarray) -> Callable[[int, Any, np.ndarray], np.ndarray]:
    return lambda gate, _, rows: options_BG[rows, gate]


def _counts(weights: np.ndarray, rows: int) -> np.ndarray:
    """Whole numbers in these shares that add up to `rows`; the largest remainders get the rest."""
    exact = weights / weights.sum() * rows
    counts: np.ndarray = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]:
        counts[place] += 1
    return counts
