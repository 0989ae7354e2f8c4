"""Compare routed inference with the ideal: each image runs in a network of just its width.

The ideal time of a batch is Σ share x static time. Each static network runs the whole batch on the
same backend, in pieces of the size that is fastest for it: either several pieces side by side or
all cores on one piece. Routing cannot be faster than that; the ratio measures its overhead.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dynaslim.bench.timing import Arm, interleave, ratio, summary
from dynaslim.cost import madds
from dynaslim.errors import check
from dynaslim.graph import AnySpec
from dynaslim.runtime.arrays import Array
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.router import Router
from dynaslim.spec import Route

SCOUT_ROUNDS: Final = 5
MOST_ROUTES: Final = 32


@dataclass(frozen=True)
class Traffic:
    """The paths (one option per gate) that the rows of a batch take, and the path of each row."""

    paths: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    """For each row of the batch, the index of its path in `paths`."""
    shares: tuple[float, ...]
    """Share of all images that takes each path; the weights when batches of one row are timed."""


def apportion(weights: np.ndarray, rows: int) -> np.ndarray:
    """Integers proportional to `weights` with the sum `rows`, by the largest remainders."""
    exact = weights / weights.sum() * rows
    counts: np.ndarray = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return counts


def mixed(spec: AnySpec, mix: Sequence[float], rows: int, seed: int = 0) -> Traffic:
    """Rows in random order, divided in given shares among the paths with one option at all gates.

    Raises:
        UsageError: if gates differ in their number of options, or if `mix` does not have one share
            of at least 0 for each option and a positive sum.
    """
    counts = {len(gate.choices) for gate in spec.gates}
    check(len(counts) == 1, f"{spec.name}: its gates differ in options; give --mix real")
    options = counts.pop()
    check(
        len(mix) == options and min(mix) >= 0 and sum(mix) > 0,
        f"mix {','.join(f'{share:g}' for share in mix)}: {spec.name} needs {options} shares of at "
        f"least 0, one for each option of a gate",
    )
    shares = np.array(mix) / sum(mix)
    whole = apportion(shares, rows)
    numbers = np.random.default_rng(seed).permutation(np.repeat(np.arange(options), whole))
    paths = tuple((option,) * len(spec.gates) for option in range(options))
    return Traffic(paths, tuple(numbers.tolist()), tuple(shares.tolist()))


def observed(spec: AnySpec, routes_BG: np.ndarray, rows: int) -> Traffic:
    """Traffic as the gates chose it: rows are the first `rows` images, shares are of all images.

    Raises:
        UsageError: if the images took too many routes to time each of them.
    """
    found, numbers = np.unique(routes_BG, axis=0, return_inverse=True)
    check(
        len(found) <= MOST_ROUTES,
        f"the images took {len(found)} routes, too many to time each (at most {MOST_ROUTES})",
    )
    paths = tuple(map(spec.path_at, found.tolist()))
    numbers = numbers.reshape(-1)
    shares = np.bincount(numbers, minlength=len(paths)) / len(numbers)
    return Traffic(paths, tuple(numbers[:rows].tolist()), tuple(shares.tolist()))


def bench_routed(
    engine: Engine,
    x: np.ndarray,
    traffic: Traffic,
    *,
    rounds: int = 15,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Time a routed batch (B, C, H, W) against the ideal; returns JSON values, times in ms.

    The gates are computed, but decisions are taken from `traffic`. For a batch of one, each path is
    timed in a separate call and weighted by its share.
    """
    spec, router = engine.spec, engine.router
    images = router.backend.arrays.images(x)
    size = (x.shape[2], x.shape[3])
    routes = list(map(spec.route_along, traffic.paths))
    best = {route: _best_static(router, images, route) for route in routes}
    arms: dict[str, Arm] = {}
    for route in routes:
        arms[f"static {route}"] = _static(router, images, route)
        arms[f"best {route}"] = best[route].arm
    single = len(x) == 1
    if single:
        for path, route in zip(traffic.paths, routes, strict=True):
            arms[f"routed {route}"] = _routed(router, images, (path,))
    else:
        paths = tuple(traffic.paths[number] for number in traffic.rows)
        arms["routed"] = _routed(router, images, paths)
    times = interleave(arms, rounds, on_round)

    if single:
        weights = list(traffic.shares)
    else:
        counts = np.bincount(traffic.rows, minlength=len(routes))
        weights = (counts / counts.sum()).tolist()
    # for each static network, the faster of the engine's own schedule and the best one found
    static = {
        route: min(times[f"static {route}"], times[f"best {route}"], key=statistics.median)
        for route in routes
    }
    ideal = [
        sum(w * static[route][turn] for w, route in zip(weights, routes, strict=True))
        for turn in range(rounds)
    ]
    if single:
        routed = [
            sum(w * times[f"routed {r}"][turn] for w, r in zip(weights, routes, strict=True))
            for turn in range(rounds)
        ]
    else:
        routed = times["routed"]
    costs = [madds(spec, route, size) for route in routes]
    widest = routes[int(np.argmax(costs))]
    mean = sum(w * cost for w, cost in zip(weights, costs, strict=True))
    result: dict[str, Any] = {
        "backend": engine.backend,
        "precision": engine.source.precision,
        "workers": router.backend.workers,
        "batch_size": len(x),
        "image_size_px": list(size),
        "rounds": rounds,
        "routes": [str(route) for route in routes],
        "madds": costs,
        "rows": None if single else np.bincount(traffic.rows, minlength=len(routes)).tolist(),
        "shares": weights,
        "static_ms": {str(r): summary(times[f"static {r}"]) for r in routes},
        "best_static_ms": {
            str(r): {
                **summary(static[r]),
                "rows_per_piece": best[r].rows,
                "side_by_side": best[r].side_by_side,
            }
            for r in routes
        },
        "routed_ms": summary(routed),
        "ideal_ms": summary(ideal),
        "ratio_to_ideal": ratio(ideal, routed),
        "madds_ratio": max(costs) / mean,
        "speedup_over_widest": ratio(static[widest], routed),
    }
    if single:
        result["routed_over_static"] = {
            str(r): ratio(times[f"routed {r}"], static[r]) for r in routes
        }
    return result


@dataclass(frozen=True)
class _Static:
    """One schedule for running a static network."""

    arm: Arm
    rows: int
    """Rows per piece."""
    side_by_side: bool


def _best_static(router: Router, images: Array, route: Route) -> _Static:
    """The fastest schedule among all piece sizes, run side by side or one at a time."""
    total = len(images)
    sizes = sorted({min(total, 2**k) for k in range(9) if 2**k < 2 * total})
    ways = {}
    for rows in sizes:
        ways[f"wide {rows}"] = _Static(_pieces(router, images, route, rows, wide=True), rows, False)
        if router.backend.workers > 1 and total > 1:
            arm = _pieces(router, images, route, rows, wide=False)
            ways[f"side {rows}"] = _Static(arm, rows, True)
    times = interleave({name: way.arm for name, way in ways.items()}, SCOUT_ROUNDS)
    return ways[min(times, key=lambda name: statistics.median(times[name]))]


def _pieces(router: Router, images: Array, route: Route, rows: int, *, wide: bool) -> Arm:
    """Run only a static network on a batch, in pieces of `rows` rows."""
    size = (int(images.shape[2]), int(images.shape[3]))
    program = router.program(router.whole(route, size), wide=wide)
    total = len(images)
    logits = router.backend.arrays.empty(total, (router.spec.num_classes,), floats=True)
    parts = [slice(start, min(total, start + rows)) for start in range(0, total, rows)]

    def part(rows: slice) -> Callable[[], None]:
        return lambda: program(images[rows], [logits[rows]])

    tasks = [part(rows) for rows in parts]

    def one_by_one() -> None:
        for task in tasks:
            task()
        router.backend.arrays.host(logits[-1:])  # wait: a device may still be busy

    return one_by_one if wide else lambda: router.workers.run(tasks)


def _static(router: Router, images: Array, route: Route) -> Arm:
    arrays = router.backend.arrays
    # reading the result waits for it: on a device, a call returns before its work is done
    return lambda: arrays.host(router.static(images, route)[-1:])


def _routed(router: Router, images: Array, paths: Sequence[tuple[int, ...]]) -> Arm:
    options_BG = np.array(paths, np.int64)
    return lambda: router.routed(images, lambda gate, _, rows: options_BG[rows, gate], None)
