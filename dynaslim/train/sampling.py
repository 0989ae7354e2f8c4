"""Which sub-networks a training step runs, and the seeds of its randomness.

Everything random is a function of (seed, step), so a resumed run repeats a straight one.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from dynaslim.graph import AnySpec
from dynaslim.seeds import step_seed as step_seed
from dynaslim.spec import Route


class Sandwich(NamedTuple):
    """The sub-networks of one stage-I step (sandwich rule, arXiv 1903.05134)."""

    largest: Route
    randoms: tuple[Route, ...]
    smallest: Route | None
    """None where the largest is trained alone."""

    @property
    def narrow(self) -> tuple[Route, ...]:
        """All but the largest."""
        return self.randoms if self.smallest is None else (*self.randoms, self.smallest)


def sandwich_routes(spec: AnySpec, rng: random.Random, randoms: int = 2) -> Sandwich:
    """The largest, `randoms` random routes and the smallest.

    Random routes take every gate's width index uniformly (arXiv 2103.13258 samples from the second
    width up), are never the smallest, and never the largest where that is a route: it learns the
    labels, and would learn its own prediction. They differ; where there are not so many routes
    between the two, they are all that there are.
    """
    gates, widths = len(spec.gates), spec.num_widths
    # a combination is a number in base `widths`: 0 is the smallest route, the last the widest
    between = range(1, widths**gates - (0 if spec.has_separate_teacher else 1))
    routes = []
    for number in rng.sample(between, min(randoms, len(between))):
        digits = [number // widths**gate % widths for gate in range(gates)]
        routes.append(spec.route_at(digits))
    return Sandwich(spec.largest, tuple(routes), spec.smallest)
