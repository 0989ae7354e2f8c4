"""What there is to say about a model: its routes, what they cost, and its limits."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final, Protocol

import numpy as np

from dynaslim.cost import CostTable
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.budget import BudgetCurve
from dynaslim.runtime.forms import Form
from dynaslim.runtime.latency import profile, time_form
from dynaslim.runtime.router import Decide
from dynaslim.serve.budgets import share_text
from dynaslim.serve.options import ServeOptions
from dynaslim.spec import NetSpec

MOST_ROUTES: Final = 64
"""Routing spaces up to so many routes are listed and timed one by one."""
MEASURE_S: Final = 1.0
MEASURE_ROUNDS: Final = 25
MEASURE_TRIES: Final = 3
_STEADY: Final = 0.9
"""Times are not to be trusted where a dearer route takes less than so much of a cheaper one's."""
_SPREAD: Final = 2.0
"""Nor where a quarter of a route's take more than so many times as long as another quarter."""
_PROFILE_ROUNDS: Final = 3


class ServedEngine(Protocol):
    """What a server runs: `Engine`, or anything else with these."""

    @property
    def spec(self) -> NetSpec:
        """The network's."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """By number."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How pictures are prepared."""

    @property
    def curve(self) -> BudgetCurve | None:
        """What budgets are looked up on."""

    @property
    def backend(self) -> str:
        """Its name."""

    @property
    def router(self) -> Any:
        """What divides and runs the batches, to time routes with."""

    def warm_up(self, image_size: int | None = None) -> None:
        """Compile what is needed."""

    def __call__(
        self, x: Any, *, budget: Any = None, escalate: Any = "auto", hold: Any = False
    ) -> Any:
        """Normalised images (B, C, S, S) -> `RoutedOutput`."""


class RouteFacts:
    """A route that gates can take."""

    def __init__(self, spec: NetSpec, choices: tuple[int, ...], madds: float) -> None:
        route = spec.route_at(choices)
        self.name = str(route)
        self.widths = list(route.widths)
        self.choices = list(choices)
        """The width index behind each gate."""
        self.madds = madds
        self.ms: float | None = None
        """Of one image alone, measured when the server started; None if that was not steady."""


class Facts:
    """A model's routes by their choices, found as they are asked for."""

    def __init__(self, engine: ServedEngine) -> None:
        assert engine.preprocessing is not None, "checked by the batcher"
        self._engine = engine
        self.spec = engine.spec
        self.side = engine.preprocessing.image_size_px
        self._table = CostTable.from_madds(self.spec, self.side)
        self.widest_madds = self._table.widest_cost
        self._ms_table: CostTable | None = None
        self._trunk_ms: float | None = None
        self._before: dict[float, tuple[RouteFacts, ...]] = {}
        self.steady = True
        """False where something else kept the machine busy, so that there are no times."""
        self._routes: dict[tuple[int, ...], RouteFacts] = {}
        self.widest = self.route(tuple(gate.choices[-1] for gate in self.spec.gates))

    def route(self, choices: tuple[int, ...]) -> RouteFacts:
        """The route with these width indices."""
        known = self._routes.get(choices)
        if known is None:
            known = RouteFacts(self.spec, choices, self._table.route_cost(self._options(choices)))
            if self._ms_table is not None:
                known.ms = self._ms_table.route_cost(self._options(choices))
            self._routes[choices] = known
        return known

    def ms_of(
        self, route: RouteFacts, madds: float, escalated: bool, *, mirrored: bool = False
    ) -> float | None:
        """What an image takes alone: the time of its route, of all where it escalated.

        The routes before the last of an image that was `escalated` are those that its `madds` leave
        room for: one, or two if that fits better. The trunk, whose features are kept, counts once.
        Of one that was `mirrored` the last route counts twice, trunk and all, and there may be none
        before.
        """
        if mirrored and route.ms is not None:
            first = self.ms_of(route, madds - route.madds, madds > 2 * route.madds + 0.5)
            return None if first is None else first + route.ms
        if not escalated or route.ms is None or self._trunk_ms is None:
            return route.ms
        trunk, left = self._table.segments[0][0][0], madds - route.madds
        before = self._before.get(left)
        if before is None:
            listed = [other for other in self.listed() if other.madds <= left + trunk + 0.5]
            ways: list[tuple[RouteFacts, ...]] = [(one,) for one in listed or self.listed()[:1]]
            ways += itertools.combinations(listed, 2)
            before = min(ways, key=lambda way: abs(sum(r.madds - trunk for r in way) - left))
            self._before[left] = before
        return route.ms + sum(
            max(0.0, first.ms - self._trunk_ms) for first in before if first.ms is not None
        )

    def _options(self, choices: Sequence[int]) -> list[int]:
        gates = self.spec.gates
        return [gate.choices.index(c) for gate, c in zip(gates, choices, strict=True)]

    def listed(self) -> list[RouteFacts]:
        """All routes of the gates, the cheapest first; of many those with one choice behind all."""
        return self._listed

    @cached_property
    def _listed(self) -> list[RouteFacts]:
        gates = self.spec.gates
        if math.prod(len(gate.choices) for gate in gates) <= MOST_ROUTES:
            space = list(itertools.product(*(gate.choices for gate in gates)))
        else:
            shared = set(gates[0].choices).intersection(*(gate.choices for gate in gates))
            ends = {tuple(gate.choices[end] for gate in gates) for end in (0, -1)}
            space = sorted({(index,) * len(gates) for index in shared} | ends)
        return sorted(map(self.route, space), key=lambda route: route.madds)

    def measure(self) -> None:
        """Time one image along every route, and the trunk, for about a second.

        Again where the times are not steady; if they never are, there are none.
        """
        many = math.prod(len(gate.choices) for gate in self.spec.gates) > MOST_ROUTES
        for _ in range(MEASURE_TRIES):
            self.steady = self._measure_forms() if many else self._measure_routes()
            if self.steady:
                return
        self._ms_table = self._trunk_ms = None
        for route in self._routes.values():
            route.ms = None

    def _measure_forms(self) -> bool:
        """Whether times by segment are steady, as far as their sums say."""
        by_form = profile(self._engine.router, self.side, 1, rounds=_PROFILE_ROUNDS)
        self._ms_table = by_form.table
        self._trunk_ms = by_form.ms[Form(0).name][0]
        for choices, route in self._routes.items():
            route.ms = self._ms_table.route_cost(self._options(choices))
        return self._rise()

    def _measure_routes(self) -> bool:
        """Whether times by route are steady."""
        router, routes = self._engine.router, self.listed()
        shape = (1, self.spec.in_channels, self.side, self.side)
        rng = np.random.default_rng(0)
        (trunk,) = time_form(router, Form(0), shape[2:], (1,), MEASURE_ROUNDS, rng)
        self._trunk_ms = statistics.median(trunk)
        x = rng.standard_normal(shape, np.float32)
        images = router.backend.arrays.images(x)
        times: dict[str, list[float]] = {route.name: [] for route in routes}
        end = time.perf_counter() + MEASURE_S
        for turn in range(MEASURE_ROUNDS + 1):
            for route in routes:
                decide = _always(self._options(route.choices))
                start = time.perf_counter()
                router.routed(images, decide, None)
                if turn:  # the first meets cold memory
                    times[route.name].append((time.perf_counter() - start) * 1e3)
            if turn and time.perf_counter() > end:
                break
        narrow = True
        for route in routes:
            low, route.ms, high = map(float, np.quantile(times[route.name], (0.25, 0.5, 0.75)))
            narrow &= high <= _SPREAD * low
        return narrow and self._rise()

    def _rise(self) -> bool:
        """Whether a dearer route takes hardly less time than a cheaper one."""
        ms = [route.ms for route in self.listed() if route.ms is not None]
        return all(b >= _STEADY * a for a, b in itertools.pairwise(ms))

    def describe(self, name: str, backend: str | None, options: ServeOptions) -> dict[str, Any]:
        """The model as `/v1/models` shows it, without samples."""
        spec, names = self.spec, self._engine.class_names
        return {
            "name": name,
            "backend": backend,
            "classes": None if names is None else list(names),
            "num_classes": spec.num_classes,
            "image_size_px": self.side,
            "in_channels": spec.in_channels,
            "stages": [
                {
                    "name": "stem" if number == 0 else f"stage {number}",
                    "widths": list(stage.widths),
                    "gated": stage.gate is not None,
                    "blocks": stage.blocks,
                    "largest": stage.widths[-1],
                }
                for number, stage in enumerate(spec.stages)
            ],
            "routes": [
                {
                    "route": route.name,
                    "widths": route.widths,
                    "choices": route.choices,
                    "madds": route.madds,
                    "ms": route.ms,
                }
                for route in self.listed()
            ],
            "widest": {"madds": self.widest_madds, "ms": self.widest.ms},
            "steady": self.steady,
            "budget": self._budget(),
            "limits": {
                "images": options.max_images,
                "body_bytes": options.body_bytes,
                "pixels": options.max_pixels,
                "deadline_ms": options.deadline_ms,
            },
        }

    def _budget(self) -> dict[str, Any] | None:
        curve = self._engine.curve
        if curve is None:
            return None
        points = [
            {
                "budget": float(share_text(point)),
                "madds_share": point.share,
                "ms": point.ms,
                "top1": point.top1,
            }
            for point in curve.reachable
        ]
        low, dearest = (float(share_text(curve.points[end])) for end in (0, -1))
        # above 1 only where a second look is worth it
        return {"low": low, "high": max(1.0, dearest), "unit": "share", "points": points}


def _always(path: Sequence[int]) -> Decide:
    """The same option behind each gate for every row."""
    return lambda gate, _, rows: np.full(len(rows), path[gate], np.int64)
