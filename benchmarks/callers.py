"""Many callers of one engine against the ideal, and simulated many cores: docs/performance.md.

    python benchmarks/callers.py --json benchmarks/results/callers.json       # 4 minutes
    python benchmarks/callers.py --quick

*Measured*: N threads call one engine at the same time, each with its own batches, in the mix of
`benchmarks/routed.py`. The ideal is Σ share x time of the static network of each width for the same
rows, batches and number of callers, in the fastest of three ways: as the engine divides work, every
piece on all cores, or every call on its caller's core alone. The routed engine is timed in these
three ways too. Arms are interleaved; results are medians and quartiles of the ratios per round.

*Simulated*: closed loops of callers on 4 to 64 cores. The simulation uses the measured CPU time of
the programs on one core for 1 to 8 rows, and of the Python code around them, which one thread runs
at a time. Memory is assumed to be as fast for all cores as for one, so results are upper bounds.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dynaslim.bench.models import random_network
from dynaslim.bench.routed import Traffic, mixed
from dynaslim.bench.timing import Arm, hardware, interleave, ratio, summary
from dynaslim.runtime.auto import candidates
from dynaslim.runtime.auto import measure as measure_auto
from dynaslim.runtime.backends import Resources, make_backend
from dynaslim.runtime.cache import open_cache, usable_cores
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.router import Router

ROWS = 16
"""Least number of rows in each arm, so that all routes are taken."""
PIECE_ROWS = 8
WAYS = ("engine", "all cores", "own core")
Call = Callable[[np.ndarray, np.ndarray], object]
"""A call with the images of a batch and their options (batch, gates)."""


class Undivided:
    """A backend that does not divide batches among cores: it runs them on all cores or on one."""

    workers = 1

    def __init__(self, backend: Any, *, wide: bool) -> None:
        self._backend = backend
        self._wide = wide
        self.spent: list[tuple[int, float]] | None = None
        """Rows and CPU seconds of every piece; None if they are not recorded."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def program(self, variant: Any, shape: Any, *, wide: bool) -> Any:
        program = self._backend.program(variant, shape, wide=self._wide)

        def run(x: Any, outs: Any) -> None:
            if self.spent is None:
                program(x, outs)
                return
            start = time.process_time()
            program(x, outs)
            self.spent.append((len(x), time.process_time() - start))

        return run


class Load:
    """The callers' rows, in calls of one batch each; the same for every arm."""

    def __init__(self, spec: Any, mix: Sequence[float], callers: int, batch: int, side: int):
        calls = max(1, ROWS // (callers * batch))
        self.total = callers * batch * calls
        self.traffic: Traffic = mixed(spec, mix, self.total)
        numbers = np.array(self.traffic.rows).reshape(callers, calls, batch)
        self.options = np.array(self.traffic.paths, np.int64)[numbers]
        """Options of all rows, (callers, calls, batch, gates)."""
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((batch, spec.in_channels, side, side), np.float32)
        counts = np.bincount(self.traffic.rows, minlength=len(self.traffic.paths))
        self.shares = counts / counts.sum()
        self._pool = ThreadPoolExecutor(callers)

    def arm(self, call: Call) -> Arm:
        """An arm with all callers at once; `call` gets images and their options (batch, gates)."""

        def caller(calls: np.ndarray) -> None:
            for options in calls:
                call(self.x, options)

        return lambda: list(self._pool.map(caller, self.options))

    def close(self) -> None:
        self._pool.shutdown()


def routed_call(router: Router) -> Call:
    """Route a batch along given options; gates are computed, but their decisions are ignored."""
    return lambda x, options: router.routed(x, lambda gate, _, rows: options[rows, gate], None)


def static_call(router: Router, route: Any) -> Call:
    return lambda x, _: router.static(x, route)


def bench(routers: dict[str, Router], load: Load, rounds: int) -> dict[str, Any]:
    """Time one backend with one number of callers and batch size; `routers` are by `WAYS`."""
    spec = routers["engine"].spec
    routes = [
        spec.route_at([g.choices[o] for g, o in zip(spec.gates, path, strict=True)])
        for path in load.traffic.paths
    ]
    ways = {
        (route, way): load.arm(static_call(router, route))
        for route in routes
        for way, router in routers.items()
    }
    scouted = interleave({f"{route} {way}": arm for (route, way), arm in ways.items()}, 1)
    best = {r: min(routers, key=lambda way: scouted[f"{r} {way}"][0]) for r in routes}
    arms = {f"static {r}": ways[r, best[r]] for r in routes}
    arms |= {way: load.arm(routed_call(router)) for way, router in routers.items()}
    times = interleave(arms, rounds)
    ideal = [
        sum(s * times[f"static {r}"][turn] for s, r in zip(load.shares, routes, strict=True))
        for turn in range(rounds)
    ]

    return {
        "images_per_s": summary([load.total / ms * 1e3 for ms in times["engine"]]),
        "ratio_to_ideal": ratio(ideal, times["engine"]),
        "ideal_ways": {str(route): best[route] for route in routes},
        "faster_than_the_engine": {
            way: ratio(times["engine"], times[way]) for way in routers if way != "engine"
        },
    }


# -- simulated ------------------------------------------------------------------------------------


Pieces = dict[tuple[int, int], list[float]]
"""CPU seconds on one core for 1 to `PIECE_ROWS` rows, by segment and path (0 for the trunk)."""


def measured_pieces(own: Router, load: Load, rounds: int) -> tuple[Pieces, float]:
    """Measure every piece, and the CPU seconds of a call of `load` outside of programs."""
    backend: Any = own.backend
    call, paths = routed_call(own), load.traffic.paths
    times: dict[tuple[int, int, int], list[float]] = {}
    python = []
    for turn, number in itertools.product(range(rounds + 1), range(len(paths))):
        for rows in range(1, PIECE_ROWS + 1):
            backend.spent = []
            call(load.x[:rows], np.tile(paths[number], (rows, 1)))
            for segment, (_, seconds) in enumerate(backend.spent):
                key = (segment, number if segment else 0, rows)
                if turn:  # the first compiles
                    times.setdefault(key, []).append(seconds)
        backend.spent = []
        start = time.process_time()
        call(load.x, load.options[0, 0])
        total = time.process_time() - start
        python.append(total - sum(seconds for _, seconds in backend.spent))
        backend.spent = None
    # the minimum, which is least disturbed by other work
    pieces: Pieces = {}
    for segment, number, rows in sorted(times):
        pieces.setdefault((segment, number), []).append(min(times[segment, number, rows]))
    return pieces, max(0.0, statistics.median(python))


def steps_of(numbers: np.ndarray, pieces: Pieces, parts: int) -> list[list[float]]:
    """Seconds of the pieces of every step of a call, each bucket in up to `parts` pieces.

    `numbers` are the rows' paths.
    """
    steps = []
    for segment in range(1 + max(segment for segment, _ in pieces)):
        found, counts = np.unique(numbers if segment else 0 * numbers, return_counts=True)
        costs = []
        for number, rows in zip(found.tolist(), counts.tolist(), strict=True):
            count = max(min(parts, rows), -(-rows // PIECE_ROWS))
            costs += [
                pieces[segment, number][rows * (n + 1) // count - rows * n // count - 1]
                for n in range(count)
            ]
        steps.append(sorted(costs, reverse=True))
    return steps


def simulate(
    calls: Sequence[list[list[float]]], python_s: float, cores: int, callers: int
) -> float:
    """Calls per second of closed loops; a call consists of the pieces of its steps, in order.

    Cores take pieces in the order in which steps submit them. Between steps, and at both ends, a
    call runs an equal part of `python_s`; only one call at a time can do so (the GIL).
    """
    events: list[tuple[float, int, Callable[[float], None]]] = []
    order, upcoming = itertools.count(), itertools.cycle(calls)
    waiting: deque[tuple[float, Callable[[float], None]]] = deque()
    state = {"idle": cores, "python": 0.0, "done": 0}

    def at(when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (when, next(order), what))

    def dispatch(now: float) -> None:
        while state["idle"] and waiting:
            seconds, done = waiting.popleft()
            state["idle"] -= 1

            def finish(when: float, done: Callable[[float], None] = done) -> None:
                state["idle"] += 1
                done(when)
                dispatch(when)

            at(now + seconds, finish)

    def begin(now: float) -> None:
        steps = next(upcoming)
        part = python_s / (len(steps) + 1)

        def after(now: float, number: int) -> None:
            """Run the Python code before step `number`, or after the last step."""
            start = max(now, state["python"])
            state["python"] = start + part
            at(state["python"], lambda when: launch(when, number))

        def launch(now: float, number: int) -> None:
            if number == len(steps):
                state["done"] += 1
                begin(now)
                return
            left = [len(steps[number])]

            def done(when: float) -> None:
                left[0] -= 1
                if not left[0]:
                    after(when, number + 1)

            waiting.extend((seconds, done) for seconds in steps[number])
            dispatch(now)

        after(now, 0)

    for _ in range(callers):
        begin(0.0)
    now, target = 0.0, 50 * max(callers, cores)
    while state["done"] < target:
        now, _, what = heapq.heappop(events)
        what(now)
    return state["done"] / now


def on_paper(own: Router, mix: Sequence[float], side: int, rounds: int) -> dict[str, Any]:
    """Measured pieces, and simulated calls on many cores."""
    runs: list[dict[str, Any]] = []
    measured: dict[str, Any] = {}
    for batch in (8, 32):
        load = Load(own.spec, mix, 1, batch, side)
        pieces, python_s = measured_pieces(own, load, rounds)
        measured[str(batch)] = {
            "python_ms_per_call": python_s * 1e3,
            "piece_ms": {f"{s} {n}": [c * 1e3 for c in costs] for (s, n), costs in pieces.items()},
        }
        batches = np.array(mixed(own.spec, mix, 40 * batch, seed=1).rows).reshape(40, batch)
        # the ideal: every image on one core, at the cost per row of a full piece, without Python
        row_s = {key: costs[-1] / PIECE_ROWS for key, costs in pieces.items()}
        last = max(segment for segment, _ in pieces)
        image_s = row_s[0, 0] + float(
            np.mean(
                [sum(row_s[s, n] for s in range(1, last + 1)) for n in batches.ravel().tolist()]
            )
        )
        for cores in (4, 8, 16, 32, 64):
            for callers in sorted({1, 4, cores, 2 * cores}):
                run: dict[str, Any] = {"cores": cores, "callers": callers, "batch_size": batch}
                for policy, parts in (("side by side", cores), ("own core", 1)):
                    calls = [steps_of(numbers, pieces, parts) for numbers in batches]
                    if policy == "own core":
                        calls = [[[sum(map(sum, steps))]] for steps in calls]
                    rate = simulate(calls, python_s, cores, callers) * batch
                    run[policy] = {
                        "images_per_s": rate,
                        "ratio_to_ideal": rate * image_s / cores,
                    }
                runs.append(run)
    return {"measured": measured, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ds_mbnet")
    parser.add_argument("--backends", default="openvino,onnxruntime")
    parser.add_argument("--callers", default="1,2,4,8")
    parser.add_argument("--batch-sizes", default="1,2,4,8")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--mix", default="0.55,0.2,0.1,0.15")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1 and 4 callers, 1 and 8 rows")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    if options.quick:
        options.callers, options.batch_sizes = "1,4", "1,8"
    side, mix = options.image_size, [float(share) for share in options.mix.split(",")]
    source = NetworkSource(random_network(options.model, side))
    resources = Resources(usable_cores(), open_cache(source.key, "auto"))
    known = candidates(source, resources)
    names = [name for name in options.backends.split(",") if name in known]
    left_out = sorted({*options.backends.split(",")} - set(names))
    print("left out, not installed or not compiled:", ", ".join(left_out) or "none", flush=True)
    backends: dict[str, Any] = {name: make_backend(name, source, resources) for name in names}
    routers: dict[str, dict[str, Router]] = {}
    for name, backend in backends.items():
        routers[name] = {"engine": Router(source.spec, backend)}
        if backend.workers > 1 and not backend.own_threads:
            for way in WAYS[1:]:
                together: Any = Undivided(backend, wide=way == "all cores")
                routers[name][way] = Router(source.spec, together)
    batches = list(map(int, options.batch_sizes.split(",")))
    result: dict[str, Any] = {
        "model": options.model,
        "image_size_px": side,
        "mix": options.mix,
        "rounds": options.rounds,
        "hardware": hardware(),
        "auto_ms": {
            batch: measure_auto(list(backends.values()), source, (side, side), batch)
            for batch in batches
        },
        "measured": [],
        "simulated": {},
    }
    for callers, batch in itertools.product(map(int, options.callers.split(",")), batches):
        load = Load(source.spec, mix, callers, batch, side)
        for name, by_way in routers.items():
            run = {
                "backend": name,
                "callers": callers,
                "batch_size": batch,
                **bench(by_way, load, options.rounds),
            }
            result["measured"].append(run)
            others = ", ".join(
                f"{way} x{faster['median']:.2f}"
                for way, faster in run["faster_than_the_engine"].items()
            )
            print(
                f"{name:<12} {callers} callers, batch {batch}: "
                f"{run['images_per_s']['median']:7.1f} images/s, ratio to ideal "
                f"{run['ratio_to_ideal']['median']:.3f}; {others}",
                flush=True,
            )
        load.close()
        save(result, options.json)
    for name, by_way in routers.items():
        if "own core" in by_way:
            backend = by_way["own core"].backend
            own = Router(source.spec, backend, rows_per_piece=PIECE_ROWS)
            paper = on_paper(own, mix, side, options.rounds)
            result["simulated"][name] = paper
            for run in paper["runs"]:
                shown = [
                    f"{p} {run[p]['ratio_to_ideal']:.3f}" for p in ("side by side", "own core")
                ]
                where = f"{run['cores']} cores, {run['callers']} callers, batch {run['batch_size']}"
                print(f"{name:<12} {where}: {', '.join(shown)}", flush=True)
    save(result, options.json)


def save(result: dict[str, Any], path: Path | None) -> None:
    """Save intermediate results, in case the benchmark is interrupted."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
