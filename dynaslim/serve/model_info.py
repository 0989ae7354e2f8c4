"""A model's routes with their costs and measured times, and its description for clients."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from dynaslim.cascade_spec import CascadeSpec
from dynaslim.cost import CostTable
from dynaslim.graph import AnySpec, GraphSpec
from dynaslim.predict import preprocessing_of
from dynaslim.runtime.adaptive import share_text
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.latency import profile, time_variant
from dynaslim.runtime.router import Decide
from dynaslim.serve.options import ServeOptions

if TYPE_CHECKING:
    from dynaslim.serve.schemas import BudgetRange, Model, SampleLink, Stage, TimedRoute

MOST_ROUTES: Final = 64
"""Up to this number, all routes are listed and timed one by one."""
MEASURE_S: Final = 1.0
MEASURE_ROUNDS: Final = 25
MEASURE_TRIES: Final = 3
_STEADY: Final = 0.9
"""Times are unsteady if a costlier route takes less than this part of a cheaper route's time."""
_SPREAD: Final = 2.0
"""Times are also unsteady if the quartiles of a route's times differ by more than this factor."""
_PROFILE_ROUNDS: Final = 3


@dataclass
class RouteInfo:
    """A route that the gates can take; the fields are those of `schemas.TimedRoute`."""

    route: str
    widths: list[int]
    choices: list[int]
    """The width index behind each gate."""
    madds: float
    ms: float | None = None
    """Time of a single image in ms, measured at the start; None if times were not steady."""


class ModelInfo:
    """A model's routes with costs and times, looked up by the gates' choices when needed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.spec = engine.spec
        self.side = preprocessing_of(engine).image_size_px
        self._table = CostTable.from_madds(self.spec, self.side)
        self.widest_madds = self._table.widest_cost
        self._ms_table: CostTable | None = None
        self._trunk_ms: float | None = None
        self._before: dict[float, tuple[RouteInfo, ...]] = {}
        self.steady = True
        """False if the machine was too busy to measure times."""
        self._routes: dict[tuple[int, ...], RouteInfo] = {}
        self.widest = self.route(tuple(gate.choices[-1] for gate in self.spec.gates))

    def route(self, choices: tuple[int, ...]) -> RouteInfo:
        """The route with these width indices behind the gates."""
        known = self._routes.get(choices)
        if known is None:
            path, route = self.spec.path_at(choices), self.spec.route_at(choices)
            cost = self._table.route_cost(path)
            known = RouteInfo(str(route), list(route.widths), list(choices), cost)
            if self._ms_table is not None:
                known.ms = self._ms_table.route_cost(path)
            self._routes[choices] = known
        return known

    def ms_of(
        self, route: RouteInfo, madds: float, escalated: bool, *, mirrored: bool = False
    ) -> float | None:
        """Time in ms of a single image whose answer is from this route, including all its runs.

        The earlier routes of an `escalated` image are estimated: the one or two routes whose cost
        fits its `madds` best. The trunk is counted once, since its features are kept. For a
        `mirrored` image the last route counts twice, trunk included, and there may be no earlier
        routes. None if times were not steady.
        """
        if mirrored and route.ms is not None:
            first = self.ms_of(route, madds - route.madds, madds > 2 * route.madds + 0.5)
            return None if first is None else first + route.ms
        if not escalated or route.ms is None or self._trunk_ms is None:
            return route.ms
        trunk, left = self._table.segments[0][0][0], madds - route.madds
        before = self._before.get(left)
        if before is None:
            listed = [other for other in self.listed if other.madds <= left + trunk + 0.5]
            ways: list[tuple[RouteInfo, ...]] = [(one,) for one in listed or self.listed[:1]]
            ways += itertools.combinations(listed, 2)
            before = min(ways, key=lambda way: abs(sum(r.madds - trunk for r in way) - left))
            self._before[left] = before
        return route.ms + sum(
            max(0.0, first.ms - self._trunk_ms) for first in before if first.ms is not None
        )

    @property
    def _many_routes(self) -> bool:
        return math.prod(len(gate.choices) for gate in self.spec.gates) > MOST_ROUTES

    @cached_property
    def listed(self) -> list[RouteInfo]:
        """The routes, cheapest first; if there are too many, those with one choice at all gates."""
        gates = self.spec.gates
        if self._many_routes:
            shared = set(gates[0].choices).intersection(*(gate.choices for gate in gates))
            ends = {tuple(gate.choices[end] for gate in gates) for end in (0, -1)}
            space = sorted({(index,) * len(gates) for index in shared} | ends)
        else:
            space = list(itertools.product(*(gate.choices for gate in gates)))
        return sorted(map(self.route, space), key=lambda route: route.madds)

    def measure(self) -> None:
        """Time a single image along every route, and through the trunk, for about a second.

        This is tried up to `MEASURE_TRIES` times until the times are steady; otherwise the routes
        have no times.
        """
        for _ in range(MEASURE_TRIES):
            self.steady = self._measure_segments() if self._many_routes else self._measure_routes()
            if self.steady:
                return
        self._ms_table = self._trunk_ms = None
        for route in self._routes.values():
            route.ms = None

    def _measure_segments(self) -> bool:
        """Time each segment; returns whether the sums along routes are steady."""
        by_variant = profile(self._engine.router, self.side, 1, rounds=_PROFILE_ROUNDS)
        self._ms_table = by_variant.table
        self._trunk_ms = self._ms_table.segments[0][0][0]
        for choices, route in self._routes.items():
            route.ms = self._ms_table.route_cost(self.spec.path_at(choices))
        return self._rise()

    def _measure_routes(self) -> bool:
        """Time each route; returns whether the times are steady."""
        router, routes = self._engine.router, self.listed
        shape = (1, self.spec.in_channels, self.side, self.side)
        rng = np.random.default_rng(0)
        trunk = router.table((self.side, self.side))[0][0][0]
        self._trunk_ms = statistics.median(*time_variant(router, trunk, (1,), MEASURE_ROUNDS, rng))
        x = rng.standard_normal(shape, np.float32)
        images = router.backend.arrays.images(x)
        times: dict[str, list[float]] = {route.route: [] for route in routes}
        end = time.perf_counter() + MEASURE_S
        for turn in range(MEASURE_ROUNDS + 1):
            for route in routes:
                decide = _always(self.spec.path_at(route.choices))
                start = time.perf_counter()
                router.routed(images, decide, None)
                if turn:  # the first round runs with cold caches
                    times[route.route].append((time.perf_counter() - start) * 1e3)
            if turn and time.perf_counter() > end:
                break
        narrow = True
        for route in routes:
            low, route.ms, high = map(float, np.quantile(times[route.route], (0.25, 0.5, 0.75)))
            narrow &= high <= _SPREAD * low
        return narrow and self._rise()

    def _rise(self) -> bool:
        """Whether times rise with the routes' costs, within the tolerance `_STEADY`."""
        ms = [route.ms for route in self.listed if route.ms is not None]
        return all(b >= _STEADY * a for a, b in itertools.pairwise(ms))

    def describe(
        self, name: str, backend: str | None, options: ServeOptions, samples: list[SampleLink]
    ) -> Model:
        """The model's entry in `/v1/models`."""
        spec, names = self.spec, self._engine.class_names
        return {
            "name": name,
            "backend": backend,
            "classes": None if names is None else list(names),
            "num_classes": spec.num_classes,
            "image_size_px": self.side,
            "in_channels": spec.in_channels,
            "stages": list(_stages(spec)),
            "routes": [cast("TimedRoute", asdict(route)) for route in self.listed],
            "widest": {"madds": self.widest_madds, "ms": self.widest.ms},
            "steady": self.steady,
            "budget": self.budget_range(),
            "limits": {
                "images": options.max_images,
                "body_bytes": options.body_bytes,
                "pixels": options.max_pixels,
                "deadline_ms": options.deadline_ms,
            },
            "samples": samples,
        }

    def budget_range(self) -> BudgetRange | None:
        """The budgets that the model can run with; None without a budget curve."""
        curve = self._engine.curve
        if curve is None:
            return None
        low, dearest = (float(share_text(curve.points[end])) for end in (0, -1))
        return {
            "low": low,
            "high": max(1.0, dearest),  # above 1 only if a second run of unsure images pays off
            "unit": "share",
            "points": [
                {
                    "budget": float(share_text(point)),
                    "madds_share": point.share,
                    "ms": point.ms,
                    "top1": point.top1,
                }
                for point in curve.reachable
            ],
        }


def _always(path: Sequence[int]) -> Decide:
    """Choose the same option behind each gate for every row."""
    return lambda gate, _, rows: np.full(len(rows), path[gate], np.int64)


def _stages(spec: AnySpec) -> Iterator[Stage]:
    """The stages that the page draws. For a converted network, these are its segments, with widths
    in percent; for a cascade, a single stage whose widths are the numbers of its rungs.
    """

    def stage(name: str, widths: Iterable[int], *, gated: bool, blocks: int = 1) -> Stage:
        listed = list(widths)
        return {
            "name": name,
            "widths": listed,
            "gated": gated,
            "blocks": blocks,
            "largest": listed[-1],
        }

    if isinstance(spec, CascadeSpec):
        yield stage("network", range(1, len(spec.rungs) + 1), gated=True)
    elif isinstance(spec, GraphSpec):
        for number in range(spec.num_segments):
            blocks = sum(node.segment == number for node in spec.nodes)
            name, widths = (f"segment {number}", spec.percents) if number else ("trunk", (100,))
            yield stage(name, widths, gated=number > 0, blocks=blocks)
    else:
        for number, one in enumerate(spec.stages):
            name = f"stage {number}" if number else "stem"
            yield stage(name, one.widths, gated=one.gate is not None, blocks=one.blocks)
