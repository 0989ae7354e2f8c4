"""Which sub-networks a training step runs, and the seeds of its randomness.

Everything random is a function of (seed, step), so a resumed run repeats a straight one.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from dynaslim.seeds import step_seed as step_seed
from dynaslim.spec import NetSpec, Route


class Sandwich(NamedTuple):
    """The sub-networks of one stage-I step (sandwich rule, arXiv 1903.05134)."""

    largest: Route
    randoms: tuple[Route, ...]
    smallest: Route


def sandwich_routes(spec: NetSpec, rng: random.Random, randoms: int = 2) -> Sandwich:
    """The largest, `randoms` random routes and the smallest.

    Random routes take every gate's width index uniformly, and are never the smallest (arXiv
    2103.13258 samples from the second width up). For one gate they differ while there are enough.
    """
    gates, widths = len(spec.gates), spec.num_widths
    total = widths**gates - 1
    if total < 1:
        return Sandwich(spec.largest, (), spec.smallest)
    # a combination is a number in base `widths`; 0 is the smallest route
    if randoms <= total:
        numbers = rng.sample(range(1, total + 1), randoms)
    else:
        numbers = [rng.randint(1, total) for _ in range(randoms)]
    routes = []
    for number in numbers:
        digits = [number // widths**gate % widths for gate in range(gates)]
        routes.append(spec.route_at(digits))
    return Sandwich(spec.largest, tuple(routes), spec.smallest)
