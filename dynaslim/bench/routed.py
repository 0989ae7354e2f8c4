"""Routed inference against the ideal: every image in a network built for its width alone.

The ideal time of a batch is Σ share x static time, where each static network runs the whole batch
in pieces of the size that suits it best, side by side or with all cores on each, whichever is
faster, on the same backend. Routing cannot be faster than that; the ratio measures the overhead.
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
    """The paths (one option per gate) that the rows of a batch take, and which row takes which."""

    paths: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    """Number of a path for every row of the batch."""
    shares: tuple[float, ...]
    """Of all images: what the times of one row each are weighted by."""


def apportion(weights: np.ndarray, rows: int) -> np.ndarray:
    """Whole numbers in these shares with the sum `rows`, by the largest remainders."""
    exact = weights / weights.sum() * rows
    counts: np.ndarray = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return counts


def mixed(spec: AnySpec, mix: Sequence[float], rows: int, seed: int = 0) -> Traffic:
    """Rows in given shares over the paths that take the same option at every gate, in random order.

    Raises:
        UsageError: if the shares are not one for each option, positive in sum, none negative.
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
    """The traffic that gates chose: the first `rows` images in order, shares of all.

    Raises:
        UsageError: if they took too many routes to time each.
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
    """Time a routed batch (B, C, H, W) against the ideal; plain JSON values, times in ms.

    Decisions are the traffic's: gates are computed, and then overruled. Of a batch of one, every
    path is timed as a call of its own and weighted by its share.
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
    # of each static network, the faster of the engine's own way and the best found
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
    """A way to run a static network."""

    arm: Arm
    rows: int
    """Rows of a piece."""
    side_by_side: bool


def _best_static(router: Router, images: Array, route: Route) -> _Static:
    """The fastest of all sizes of pieces, side by side and one at a time."""
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
    """A static network on a batch, in pieces of so many rows; with no other work at all."""
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
        router.backend.arrays.host(logits[-1:])  # a device may still be busy

    return one_by_one if wide else lambda: router.workers.run(tasks)


def _static(router: Router, images: Array, route: Route) -> Arm:
    arrays = router.backend.arrays
    # what is read last is waited for: on a device a call returns before its work is done
    return lambda: arrays.host(router.static(images, route)[-1:])


def _routed(router: Router, images: Array, paths: Sequence[tuple[int, ...]]) -> Arm:
    options_BG = np.array(paths, np.int64)
    return lambda: router.routed(images, lambda gate, _, rows: options_BG[rows, gate], None)
