"""Times a network's routes, gates and budgets per image on this machine, in interleaved rounds.

Suffixes: B rows, C channels, S side in pixels, N images, G gates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from dynaslim.bench.routed import apportion
from dynaslim.bench.timing import Arm, hardware, interleave, ratio, summary
from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import madds
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import normalise
from dynaslim.evaluation import Evaluation, RouteShare
from dynaslim.graph import AnySpec
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.budget import BudgetPoint
from dynaslim.runtime.engine import Engine
from dynaslim.spec import Route

BATCH_SIZE: Final = 32
_MAX_BATCHES: Final = 8
_MADDS_PER_ROUND: Final = 2e9
"""Multiply-adds per round on the widest route; they determine the number of batches."""
_SECONDS: Final = 10.0
_ROUNDS: Final = (7, 31)
"""Fewest and most rounds if no number is given."""


@dataclass(frozen=True)
class Times:
    """Measured times; in each round, every mode ran the same images."""

    backend: str
    rounds: int
    images: int
    """Number of images in each round."""
    hardware: Mapping[str, Any]
    ms: Mapping[str, Sequence[float]]
    """Milliseconds per image in every round, by mode (`route_mode`, `gate_mode`, `budget_mode`)."""

    def spread(self, mode: str) -> dict[str, float] | None:
        """Median and quartiles of a mode in ms per image; None if it was not timed."""
        return summary(self.ms[mode]) if mode in self.ms else None

    def median(self, mode: str) -> float | None:
        return summary(self.ms[mode])["median"] if mode in self.ms else None

    def ratio(self, above: str, below: str) -> float | None:
        """Median ratio of two modes in the same round; None if one was not timed."""
        if above not in self.ms or below not in self.ms:
            return None
        return ratio(self.ms[above], self.ms[below])["median"]

    @property
    def noise(self) -> float:
        """Largest interquartile range of a mode, as a share of its median."""
        spreads = [summary(values) for values in self.ms.values()]
        return max((one["q3"] - one["q1"]) / one["median"] for one in spreads)


def route_mode(widths: Sequence[int]) -> str:
    """Key of a static route in `Times.ms`."""
    return f"route {Route(tuple(widths))}"


def gate_mode(number: int) -> str:
    """Key of a gate's dynamic mode in `Times.ms`; 0 is the model reported in detail."""
    return f"gate {number}"


def budget_mode(number: int) -> str:
    """Key of a point of the budget curve in `Times.ms`."""
    return f"budget {number}"


def rows_per_round(spec: AnySpec, image_size_px: int) -> int:
    """Number of images per round: several batches for a small network, one for a large network."""
    batch = madds(spec, spec.widest_choice, image_size_px) * BATCH_SIZE
    return BATCH_SIZE * int(min(max(_MADDS_PER_ROUND // batch, 1), _MAX_BATCHES))


def representative_images(
    evaluation: Evaluation, images: ImageDataset, pre: Preprocessing, rows: int
) -> np.ndarray:
    """Network input (rows, C, S, S), float32, with each route's share equal to that of all images.

    The order is random with a fixed seed. If a route has too few images, they are repeated.
    """
    rng = np.random.default_rng(0)
    number_N = evaluation.taken_number.numpy()
    counts = apportion(np.bincount(number_N, minlength=len(evaluation.taken)), rows)
    picked = []
    for route, count in enumerate(counts):
        own = rng.permutation(np.flatnonzero(number_N == route))
        picked.append(np.resize(own, count))
    positions = torch.from_numpy(rng.permutation(np.concatenate(picked)))
    (pixels_BCSS, _) = next(iter(images.batches(rows, evaluation.rows[positions])))
    x: np.ndarray = normalise(pixels_BCSS, pre).numpy()
    return x


def noise_images(spec: AnySpec, rows: int, image_size_px: int) -> np.ndarray:
    """Gaussian noise for use without images: (rows, C, S, S) float32."""
    shape = (rows, spec.in_channels, image_size_px, image_size_px)
    x: np.ndarray = np.random.default_rng(0).standard_normal(shape, np.float32)
    return x


def measure_times(
    engine: Engine,
    others: Sequence[Checkpoint],
    x_NCSS: np.ndarray,
    *,
    cache_dir: str | Path | None = "auto",
    routes: Sequence[Sequence[int]],
    budgets: Sequence[BudgetPoint],
    shares: Sequence[Sequence[RouteShare]] | None,
    rounds: int | None,
    on_round: Callable[[], None] | None = None,
) -> Times:
    """Time an engine's routes, budgets and dynamic mode, and the dynamic mode of other checkpoints.

    `others` are the same network with other gates. If `shares` is None, the gates choose. Otherwise
    their choices are replaced so that routes have the given shares, one list per gate, the engine's
    first; a gate without shares is not timed. With `rounds` None, timing takes about ten seconds.
    Closes the engine.
    """
    batches = np.split(x_NCSS, range(BATCH_SIZE, len(x_NCSS), BATCH_SIZE))

    def over_batches(run: Callable[[Any], Any]) -> Arm:
        return lambda: [run(batch) for batch in batches]

    def at_budget(point: BudgetPoint) -> Callable[[Any], Any]:
        return lambda batch: engine(batch, budget=point)

    arms = {route_mode(widths): over_batches(engine.static(list(widths))) for widths in routes}
    engines = [engine]
    if shares is None:
        engines += [Engine(other, backend=engine.backend, cache_dir=cache_dir) for other in others]
        arms |= {gate_mode(number): over_batches(one) for number, one in enumerate(engines)}
    else:
        for number, mix in enumerate(shares):
            if sum(one.share for one in mix):
                arms[gate_mode(number)] = _overruled(engine, mix, batches)
    arms |= {budget_mode(n): over_batches(at_budget(point)) for n, point in enumerate(budgets)}
    try:
        if rounds is None:
            rounds = _rounds_for(arms)
        times = interleave(arms, rounds, on_round)
    finally:
        for one in engines:
            one.close()
    ms = {mode: [value / len(x_NCSS) for value in values] for mode, values in times.items()}
    return Times(engine.backend, rounds, len(x_NCSS), hardware(), ms)


def _rounds_for(arms: Mapping[str, Arm]) -> int:
    """The number of rounds that take about `_SECONDS`, within `_ROUNDS`."""
    for arm in arms.values():
        arm()  # compile first
    start = time.perf_counter()
    for arm in arms.values():
        arm()
    least, most = _ROUNDS
    return int(min(max(_SECONDS / (time.perf_counter() - start), least), most))


def _overruled(engine: Engine, shares: Sequence[RouteShare], batches: Sequence[np.ndarray]) -> Arm:
    """The dynamic mode with the gates' choices replaced by fixed ones with these shares."""
    spec, router = engine.spec, engine.router
    paths = [spec.path_of(Route(one.widths)) for one in shares]
    rows = sum(map(len, batches))
    counts = apportion(np.array([one.share for one in shares]), rows)
    options_NG = np.repeat(np.array(paths, np.int64), counts, axis=0)
    options_NG = np.random.default_rng(0).permutation(options_NG)
    parts = np.split(options_NG, range(BATCH_SIZE, rows, BATCH_SIZE))

    def decide(options_BG: np.ndarray) -> Callable[[int, Any, np.ndarray], np.ndarray]:
        return lambda gate, _, rows: options_BG[rows, gate]

    def run() -> None:
        for batch, options_BG in zip(batches, parts, strict=True):
            router.routed(router.backend.arrays.images(batch), decide(options_BG), None)

    return run
