"""Compares ways of spending compute at equal cost, from tables of answers.

Settings are chosen on one set of images and judged on another. A way is judged by how far its top-1
is above the line of the uniform routes at its own cost (`policies.uniform_line`).

Suffixes: N images, R routes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from dynaslim.runtime.budget import BudgetPoint
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import simulate
from dynaslim.runtime.escalation import Escalation
from results import policies
from results.answers import Table
from results.policies import Outcome

SHARES: Final = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 1.0, 1.3)
"""Budgets, as shares of the widest route's cost; above 1 there is room for a second look."""
FAR: Final = 1e6
"""A shift that sends every image along the cheapest route."""
STEPS: Final = 40
"""The thresholds that `ladder` tries have multiples of 1 / STEPS of the images below them."""


def compare(choosing: Table, judging: Table) -> dict[str, Any]:
    """Judge every way at every budget of `SHARES`, with settings chosen on another table.

    Both tables are of the same network, with a trained gate. The `settings` of the result can be
    passed to the engine.
    """
    costs = judging.costs_R
    curve = fit_curve(choosing.paths)
    dearest = curve.points[-1].share
    # a budget beyond the curve's last point is an error
    limits = [min(share, max(1.0, dearest)) for share in SHARES]
    settings = {
        "both": [_of_point(curve.at(limit)) for limit in limits],
        "gate": [_of_point(curve.at(limit, escalate=False)) for limit in limits],
        "escalation": escalation(choosing),
    }
    ways = {name: [_at(judging, point) for point in found] for name, found in settings.items()}
    ways["ladder"] = ladder(choosing, judging)
    ways["cascade_one_network"] = cascade(_alone(choosing), _alone(judging))
    if choosing.mirrored_NC is not None:
        once = fit_curve(choosing.seen_once.paths)
        ways["seen_once"] = [_at(judging, _of_point(once.at(min(share, 1.0)))) for share in SHARES]
    ways["random"] = [_random(judging, point["shift"]) for point in settings["gate"]]
    return {
        "images": len(judging.labels_N),
        "shares": list(SHARES),
        "madds": costs,
        "trunk_madds": judging.trunk,
        "top1": judging.top1_R,
        "settings": settings,
        "ways": {name: _rows(judging, found) for name, found in ways.items()},
        "oracle": policies.oracle(judging.correct_NR, costs)._asdict(),
        "seen_twice": _seen_twice(judging),
    }


def _seen_twice(judging: Table) -> dict[str, float] | None:
    """The oracle's control; None if the table has no mirror images."""
    if judging.mirrored_NC is None:
        return None
    mirrored_N = judging.mirrored_NC.argmax(1) == judging.labels_N
    found = policies.seen_twice(judging.correct_NR[:, -1], mirrored_N, judging.costs_R[-1])
    return found._asdict()


def _setting(shift: float, escalations: Sequence[Escalation]) -> dict[str, Any]:
    steps = [
        {"tau": tau, "target": list(target), **({"mirror": True} if mirror else {})}
        for tau, target, mirror in escalations
    ]
    return {"shift": shift, "escalations": steps}


def _of_point(point: BudgetPoint) -> dict[str, Any]:
    return _setting(point.shift, point.escalations)


def escalations_of(setting: Mapping[str, Any]) -> list[Escalation]:
    """The escalation steps of a setting in the form in which it is stored."""
    return [
        Escalation(step["tau"], tuple(step["target"]), step.get("mirror", False))
        for step in setting["escalations"]
    ]


def _at(table: Table, point: Mapping[str, Any]) -> Outcome:
    """The engine's outcome at a setting, as simulated by the runtime."""
    found = simulate(table.paths, point["shift"], escalations_of(point))
    return Outcome(found.madds, found.top1, found.escalated)


def _rows(judging: Table, found: Sequence[Outcome]) -> list[dict[str, float]]:
    costs, top1 = judging.costs_R, judging.top1_R
    return [
        {
            "share": o.cost / max(costs),
            "madds": o.cost,
            "top1": o.top1,
            "again": o.escalated,
            "over_uniform": o.top1 - policies.uniform_line(costs, top1, o.cost),
        }
        for o in found
    ]


def _random(judging: Table, shift: float) -> Outcome:
    """Random routes, in the shares in which the gate takes them at this budget."""
    option_N = judging.paths.taken(shift)
    counts = np.bincount(option_N, minlength=len(judging.costs_R))
    return policies.random_routing(judging.costs_R, judging.top1_R, list(counts / len(option_N)))


def escalation(choosing: Table) -> list[dict[str, Any]]:
    """Escalation without a gate: all images take the cheapest route, unsure ones then a wider one.

    For every budget, the setting has the best target route and the threshold that spends the whole
    budget. The threshold of highest top-1 would often be a cheaper one that is better by chance on
    these images.
    """
    costs, found = choosing.costs_R, []
    for limit in _limits(choosing):
        settings = []
        for target in range(1, len(costs)):
            room = (limit - costs[0]) / (costs[target] - choosing.trunk)
            tau = _spending(choosing.margins_NR[:, 0], room)
            settings.append(_setting(FAR, [Escalation(tau, (target,))]))
        found.append(max(settings, key=lambda setting: _at(choosing, setting).top1))
    return found


def _spending(sure_N: Any, room: float) -> float:
    """The threshold that at most a share `room` of the margins are below; `room` is clamped."""
    count = int(min(max(room, 0.0), 1.0) * len(sure_N))
    return policies.threshold_for(sure_N, count / len(sure_N))


def _limits(table: Table) -> list[float]:
    return [share * max(table.costs_R) for share in SHARES]


def ladder(choosing: Table, judging: Table) -> list[Outcome]:
    """Escalation in two steps without a gate: the cheapest route, a wider one, the widest."""
    last = len(choosing.costs_R) - 1
    seen, settings = [], []
    for middle in range(1, last):
        for first, second in itertools.product(range(2, 25, 2), repeat=2):
            taus = (
                policies.threshold_for(choosing.margins_NR[:, 0], first / STEPS),
                policies.threshold_for(choosing.margins_NR[:, middle], second / STEPS),
            )
            settings.append((middle, taus))
            seen.append(_climb(choosing, middle, taus))
    best = policies.best_settings(
        np.array([o.cost for o in seen]), np.array([o.top1 for o in seen]), _limits(choosing)
    )
    return [_climb(judging, *settings[number]) for number in best]


def _climb(table: Table, middle: int, taus: Sequence[float]) -> Outcome:
    steps = (0, middle, len(table.costs_R) - 1)
    return policies.ladder(
        table.correct_NR, table.margins_NR, table.costs_R, table.trunk, steps, taus
    )


Networks = Mapping[int, Table]
"""Single-route tables by width."""


def _alone(table: Table) -> Networks:
    """The tables of a network's routes, as if they were separate networks."""
    return {k: table.route(k) for k in range(len(table.costs_R))}


def cascade(choosing: Networks, judging: Networks) -> list[Outcome]:
    """The best cascade of two networks at every budget; on unsure images both run as a whole.

    Budgets are shares of the widest network's cost, and thresholds are chosen as in `escalation`.
    """
    costs = {k: table.costs_R[0] for k, table in choosing.items()}
    found = []
    for limit in [share * max(costs.values()) for share in SHARES]:
        settings = []
        for first, second in itertools.combinations(sorted(choosing), 2):
            room = (limit - costs[first]) / costs[second]
            tau = _spending(choosing[first].margins_NR[:, 0], room)
            if costs[first] <= limit or first == min(choosing):
                settings.append((first, second, tau))
        # ties go to wider networks
        best = max(settings, key=lambda setting: (_cascade(choosing, *setting).top1, setting))
        found.append(_cascade(judging, *best))
    return found


def _cascade(tables: Networks, first: int, second: int, tau: float) -> Outcome:
    a, b = tables[first], tables[second]
    return policies.cascade(
        a.correct_NR[:, 0],
        a.margins_NR[:, 0],
        b.correct_NR[:, 0],
        (a.costs_R[0], b.costs_R[0]),
        tau,
    )


def cascade_rows(choosing: Networks, judging: Networks, supernet: Table) -> list[dict[str, float]]:
    """`cascade` of separately trained networks, compared with the supernet's uniform routes."""
    return _rows(supernet, cascade(choosing, judging))
