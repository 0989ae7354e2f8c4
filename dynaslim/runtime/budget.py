"""Budgets at run time: one gate serves a range of costs, along a measured curve of accuracy.

A *shift* moves every gate's decision towards cheaper options (positive) or wider ones (negative).
A `BudgetPoint` is a setting of shift and escalation (`runtime.escalation`) with its cost and
accuracy; a `BudgetCurve` is a set of points measured on held-out images (`runtime.budget_search`).
No torch here.

Suffixes: B rows, K options of a gate.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from dynaslim._files import validated
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.cost import CostTable
from dynaslim.errors import UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.runtime.escalation import Bools, Escalation, Floats, Ints, Path, escalation_cost

Logits = npt.NDArray[np.floating[Any]]
Kind = Literal["share", "madds", "ms", "drop"]
# the ranges of values in files
_Amount = Annotated[float, msgspec.Meta(ge=0)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Options = tuple[Annotated[int, msgspec.Meta(ge=0)], ...]

FORMS: Final = (
    "a share of the widest route's cost above 0 and up to 1 (0.6; up to 2 where unsure images are "
    "looked at twice), mean multiply-adds ('250M'), mean milliseconds ('4.5ms') or points of top-1 "
    "given up ('drop=0.3')"
)
MOST_SHARE: Final = 2.0
"""Largest budget as a share: every image and its mirror image along the widest route."""
_NUMBER: Final = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
_PATTERNS: Final[Mapping[Kind, re.Pattern[str]]] = {
    "share": re.compile(rf"(?P<value>{_NUMBER})"),
    "madds": re.compile(rf"(?P<value>{_NUMBER}) ?M"),
    "ms": re.compile(rf"(?P<value>{_NUMBER}) ?ms"),
    "drop": re.compile(rf"drop ?= ?(?P<value>{_NUMBER})"),
}
SHOWN: Final = 2.0
"""Standard errors by which a cheaper point must be more accurate to replace the widest route."""
NEAR: Final = 0.9
"""Fraction of a budget below which a point's use of it deserves a message."""
ROUNDING: Final = 1e-9
"""Relative tolerance: a budget equal to a point's cost affords that point despite rounding."""


# -- decisions ------------------------------------------------------------------------------------


def option_costs(table: CostTable) -> tuple[Floats, ...]:
    """For every gate (K,), the cost of a route with each option and otherwise the cheapest ones.

    Costs are shares of the widest route's cost.
    """
    options = [len(segment[0]) for segment in table.segments[1:]]
    costs = []
    for gate, count in enumerate(options):
        paths = [[0] * gate + [k] + [0] * (len(options) - gate - 1) for k in range(count)]
        costs.append(np.array([table.route_cost(path) for path in paths]) / table.widest_cost)
    return tuple(costs)


def cascade_logits(spec: CascadeSpec) -> Logits:
    """The gate logits (K,) float32 of every image of a cascade.

    The gate chooses the first rung; shifts from -k - 1 to -k choose rung k (`choose`).
    """
    (costs_K,) = option_costs(CostTable.from_madds(spec, spec.image_size_px))
    steps = np.arange(1, len(costs_K)) * np.diff(costs_K)
    return np.concatenate([[0.0], -np.cumsum(steps)]).astype(np.float32)


class _Target(NamedTuple):
    path_G: Ints
    cost: float
    """Cost of the whole path."""
    extra: float
    """Cost that it adds to a row that escalates to it; a second look adds `cost` instead."""


class PathCosts:
    """Costs of paths from a table, arranged for fast use in every call."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self.options = option_costs(table)
        trunk, *segments = table.segments
        # cost up to the end of the segment behind the first gate, by that gate's option
        self._first_K = trunk[0][0] + np.array(segments[0][0])
        self._segments = [np.array(segment) for segment in segments[1:]]
        self._targets: dict[Path, _Target] = {}
        self.cheapest = float(self._first_K[0] + sum(segment[0, 0] for segment in self._segments))
        """Cost of the path that takes the first option of every gate."""

    @cached_property
    def extra(self) -> list[Floats]:
        """For every gate, (previous gate's K, K): extra cost of an option over the first option, if
        all later gates take their first options. For the first gate, (1, K).
        """
        own = [self._first_K[None, :], *self._segments]
        behind = [segment[:, 0] for segment in self._segments] + [np.zeros(len(own[-1][0]))]
        totals = [segment + rest_K for segment, rest_K in zip(own, behind, strict=True)]
        return [total - total[:, :1] for total in totals]

    def of(self, options_BG: Ints) -> Floats:
        """Costs (B,) of whole paths, given by their options (B, G)."""
        total_B: Floats = self._first_K.take(options_BG[:, 0])
        for number, segment in enumerate(self._segments, start=1):
            total_B += segment[options_BG[:, number - 1], options_BG[:, number]]
        return total_B

    def target(self, path: Path) -> _Target:
        """The costs of escalating to a path."""
        known = self._targets.get(path)
        if known is None:
            known = self._targets[path] = _Target(
                np.array(path), self.table.route_cost(path), escalation_cost(self.table, path)
            )
        return known

    def may_escalate(self, options_BG: Ints, target: Path, *, mirror: bool = False) -> Bools:
        """Rows (B,) that may escalate to a target, given the paths of their answers.

        These are rows whose path is cheaper and is narrower behind some gate. With `mirror`, for a
        second look, they are the rows on the target path.
        """
        path_G, cost, _ = self.target(target)
        if mirror:
            stands_B: Bools = (options_BG == path_G).all(1)
            return stands_B
        wider_B: Bools = np.any(options_BG < path_G, axis=1)
        return wider_B & (self.of(options_BG) < cost)


def choose(gate_logits_BK: Logits, shift: float, costs_K: Floats, limit: int | None = None) -> Ints:
    """The option (B,) with the highest `logits - shift * costs`; the cheaper one if equal.

    Positive shifts choose cheaper options, negative ones wider options; 0 is the gate's own
    decision. `costs_K` are ascending (`option_costs`); options above `limit` are excluded. A row's
    option never increases with the shift, even by rounding.
    """
    return choose_by_prices(gate_logits_BK, prices(shift, costs_K, limit))


def prices(shift: float, costs_K: Floats, limit: int | None = None) -> Floats:
    """(K, K): how much higher an option's logit (column) must be to beat an earlier option (row).

    Infinite on and below the diagonal. Independent of the images, so reusable over calls.
    """
    costs_K = np.asarray(costs_K, np.float64)[: None if limit is None else limit + 1]
    price_KK = shift * (costs_K[None, :] - costs_K[:, None])
    price_KK[np.tri(len(costs_K), dtype=bool)] = np.inf
    return price_KK


def choose_by_prices(gate_logits_BK: Logits, price_KK: Floats) -> Ints:
    """Like `choose`, with the result of `prices`."""
    logits_BK = np.asarray(gate_logits_BK, np.float64)[:, : len(price_KK)]
    # pairwise rather than by argmax, which rounding could make non-monotonic in the shift. The
    # choice is the first option that no later one beats; the last is never beaten.
    gain_BKK = logits_BK[:, None, :] - logits_BK[:, :, None]
    option_B: Ints = (gain_BKK > price_KK).any(2).argmin(1)
    return option_B


# -- budgets --------------------------------------------------------------------------------------


def parse_budget(budget: float | str) -> tuple[Kind, float]:
    """The kind of a budget and its value: a share, MAdds per image, ms per image or points.

    Raises:
        UsageError: if it has none of the forms in `FORMS`.
    """
    if isinstance(budget, str):
        text = budget.strip()
        for kind, pattern in _PATTERNS.items():
            if match := pattern.fullmatch(text):
                value = float(match["value"]) * (1e6 if kind == "madds" else 1)
                break
        else:
            raise UsageError(f"budget {budget!r}: give {FORMS}")
    elif isinstance(budget, Real) and not isinstance(budget, bool):
        kind, value = "share", float(budget)
    else:
        raise UsageError(f"budget {budget!r}: give {FORMS}")
    check(
        math.isfinite(value)
        and (value >= 0 if kind == "drop" else value > 0)
        and (value <= MOST_SHARE or kind != "share"),
        f"budget {budget!r}: give {FORMS}",
    )
    return kind, value


_STEPS: Final = (
    ("tau", "escalate_to"),
    ("tau_then", "escalate_then"),
    ("tau_mirror", "mirror_along"),
)
"""For every step of escalation, the fields of a point with its threshold and its path."""


@dataclass(frozen=True)
class BudgetPoint:
    """One setting of shift and escalation, with its results on the held-out images.

    Costs and shares are means over all images and do not depend on labels.
    """

    shift: float
    tau: _Amount | None
    """Rows with a smaller margin escalate; None for the gate alone."""
    escalate_to: _Options | None
    """The option of every gate on the target path; None for the gate alone."""
    madds: _Amount
    """Multiply-adds per image, including slimming heads and escalation."""
    share: _Amount
    """`madds` as a share of the widest route's."""
    ms: _Amount | None
    """Milliseconds per image according to the latency table; None without one."""
    top1: _Share
    escalated: _Share
    """Share of the images that escalated, 0..1."""
    top1_selecting: _Share | None = None
    """The accuracy by which points are selected and compared: that expected from the answers of
    several routes together (`runtime.opinion_pool`), which varies less than `top1`. None means that
    it is equal to `top1`."""
    tau_then: _Amount | None = None
    """Like `tau`, for the second step of escalation; None if there is no second step."""
    escalate_then: _Options | None = None
    """Like `escalate_to`, for the second step."""
    tau_mirror: _Amount | None = None
    """Rows with a smaller margin whose answer is from `mirror_along` get a second look; None for
    no second look."""
    mirror_along: _Options | None = None
    """The widest path, which the mirror image takes; None for no second look."""
    top1_interval: tuple[_Share, _Share] | None = None
    """Bounds of the 95% confidence interval of `top1`; None if it was not measured."""

    @property
    def escalations(self) -> tuple[Escalation, ...]:
        """The steps of escalation, empty for the gate alone; a second look comes last."""
        steps = ((getattr(self, tau), getattr(self, path), path) for tau, path in _STEPS)
        return tuple(
            Escalation(tau, target, path == "mirror_along")
            for tau, target, path in steps
            if tau is not None and target is not None
        )

    def check_steps(self, at: str) -> None:
        """Raise `UsageError` unless every step of escalation has a threshold and a path."""
        for tau, name in _STEPS:
            both = (getattr(self, tau) is None) == (getattr(self, name) is None)
            check(both, f"{at}: {tau} and {name} must be given both or neither")
        orphan = self.escalate_then is not None and self.escalate_to is None
        check(not orphan, f"{at}: escalate_then without escalate_to")

    @property
    def merit(self) -> float:
        """The accuracy by which points are compared with each other."""
        return self.top1 if self.top1_selecting is None else self.top1_selecting

    def check_fits(self, spec: AnySpec, *, mirror: bool = False) -> None:
        """Raise `UsageError` unless the point is valid for this network.

        `mirror` says whether the network may be given mirror images.
        """
        options = [len(gate.choices) for gate in spec.gates]
        for _, name in _STEPS:
            target = getattr(self, name)
            fits = target is None or (
                len(target) == len(options)
                and all(0 <= t < count for t, count in zip(target, options, strict=True))
            )
            check(
                fits,
                f"budget: {name} {target} does not fit the gates of {spec.name}, which have "
                f"{options} options",
            )
        if self.mirror_along is None:
            return
        widest = tuple(count - 1 for count in options)
        check(
            self.mirror_along == widest,
            f"budget: mirror_along {self.mirror_along}: a second look is along the widest path, "
            f"{widest}",
        )
        check(
            mirror,
            f"budget: tau_mirror {self.tau_mirror}: {spec.name} must not be shown mirror images; "
            f"its recipe would have to say that they keep their class (augment.mirror: true)",
        )


@dataclass(frozen=True)
class BudgetCurve:
    """Accuracy of a network over a range of costs, measured on held-out images.

    Points are in order of cost. Each is expected to be more accurate than the one before, except
    that the widest route is always included. Only points with a second look cost more than
    that route. `gate_points` have no escalation. With a latency table, `ms_points` and
    `ms_gate_points` are the same in order of milliseconds; if empty, the other two are used.
    """

    image_size_px: _Count
    images: _Count
    """Number of held-out images."""
    widest_madds: _Amount
    widest_ms: _Amount | None
    widest_top1: _Share
    cheapest_madds: _Amount
    cheapest_ms: _Amount | None
    cheapest_top1: _Share
    points: tuple[BudgetPoint, ...]
    gate_points: tuple[BudgetPoint, ...]
    ms_points: tuple[BudgetPoint, ...] = ()
    ms_gate_points: tuple[BudgetPoint, ...] = ()
    reporting_images: _Count | None = None
    """In older curves: number of the images on which every `top1` is measured; the others selected
    the points. None if `top1` is of all images."""

    @property
    def measured_images(self) -> int:
        """Number of the images on which every `top1` is measured."""
        return self.reporting_images or self.images

    def at(self, budget: float | str | BudgetPoint, *, escalate: bool = True) -> BudgetPoint:
        """The best point for a budget; without `escalate`, among those of the gate alone.

        A number or numeric string in (0, 1] is a share of the widest route's MAdds (up to 2 if the
        curve has points with a second look); "250M" and "4.5ms" are means per image. These give
        the most accurate point of at most that cost, or the cheapest if there is none. If the
        widest route is affordable, a cheaper point replaces it only if it is shown to be more
        accurate: 1 means the best available. "drop=0.3" gives the cheapest point whose top-1 is at
        most 0.3 percentage points below the widest route's. A `BudgetPoint` is returned as it is.

        Raises:
            UsageError: if the budget has none of these forms, is in ms and there is no latency
                table, is a drop that no point achieves, or is a point that escalates without
                `escalate`.
        """
        if isinstance(budget, BudgetPoint):
            check(
                escalate or not budget.escalations,
                f"budget {budget}: escalates; take a point of gate_points or allow escalation",
            )
            return budget
        kind, value = parse_budget(budget)
        if kind == "ms":
            check(
                self.widest_ms is not None,
                f"budget {budget!r}: the curve has no milliseconds; calibrate it with a latency "
                f"table (calibrate-budget --table), or give a share such as 0.6",
            )
            points = self.ms_points if escalate else self.ms_gate_points
            points = points or (self.points if escalate else self.gate_points)
        else:
            points = self.points if escalate else self.gate_points
        check(
            kind != "share" or value <= 1 or self.points[-1].share > 1 + ROUNDING,
            f"budget {budget!r}: above 1 are points with a second look alone, and this curve has "
            f"none; give {FORMS}",
        )
        if kind == "drop":
            return self._within(points, value, budget)
        limit = value * (1 + ROUNDING)
        afforded = [point for point in points if _cost(point, kind) <= limit]
        if not afforded:
            return points[0]
        # the cheapest of the most accurate: points are in order of cost
        best = max(afforded, key=lambda point: point.merit)
        widest = next((point for point in afforded if self._is_widest(point)), best)
        # points with a second look are on the curve only if they were shown to be worth it
        shown = best.tau_mirror is not None or self._shown(best, widest)
        return best if shown or best.share >= widest.share else widest

    def _is_widest(self, point: BudgetPoint) -> bool:
        return point.share >= 1 - ROUNDING and not point.escalations

    def _shown(self, best: BudgetPoint, other: BudgetPoint) -> bool:
        """Whether the images that selected the points show that one is better than another."""
        images = self.images - (self.reporting_images or 0)
        variance = sum(point.merit * (1 - point.merit) for point in (best, other)) / max(1, images)
        return best.merit - other.merit > SHOWN * math.sqrt(variance)

    def share_of(self, budget: float | str) -> float:
        """Mean cost that a budget allows, as a share of the widest route's multiply-adds.

        For budgets in ms and drop=, this is the cost of their point. Raises `UsageError` like `at`.
        """
        kind, value = parse_budget(budget)
        if kind in ("share", "madds"):
            return value if kind == "share" else value / self.widest_madds
        return self.at(budget).share

    def out_of_reach(self, budget: float | str | BudgetPoint) -> str | None:
        """A message saying what is reachable, if a share or MAdds are not; otherwise None."""
        if isinstance(budget, BudgetPoint) or parse_budget(budget)[0] not in ("share", "madds"):
            return None
        share, used, dearest = self.share_of(budget), self.at(budget), self.points[-1]
        if share < used.share * (1 - ROUNDING):
            return (
                f"budget {budget}: the curve reaches from {used.share:.3f} to {dearest.share:.3g} "
                f"of the widest route's cost; its cheapest point is taken"
            )
        better = [p.share for p in self.reachable if p.share > used.share]
        if used.share > NEAR * share or not better or share == 1:
            return None
        return (
            f"budget {budget}: between {used.share:.3f} and {better[0]:.3g} of the widest route's "
            f"cost the curve has nothing that is better; that of {used.share:.3f} is taken"
        )

    @cached_property
    def reachable(self) -> tuple[BudgetPoint, ...]:
        """The points that can be selected by a share, cheapest first."""
        shares = [1.0 if self._is_widest(point) else point.share for point in self.points]
        return tuple(dict.fromkeys(map(self.at, shares)))

    def _within(
        self, points: Sequence[BudgetPoint], drop: float, budget: float | str
    ) -> BudgetPoint:
        """The cheapest point that loses at most `drop` percentage points."""
        for point in points:
            if point.top1 >= self.widest_top1 - drop / 100 - ROUNDING:
                return point
        nearest = 100 * (self.widest_top1 - max(point.top1 for point in points))
        reachable = math.ceil(nearest * 100 - 1e-6) / 100
        raise UsageError(
            f"budget {budget!r}: no point is so near the widest route's "
            f"{100 * self.widest_top1:.2f}%; the nearest is drop={reachable:g}"
        )

    def check_fits(self, spec: AnySpec, *, mirror: bool = False) -> None:
        """Raise `UsageError` unless the curve is valid for this network.

        `mirror` says whether the network may be given mirror images.
        """
        spec.check_image_size(self.image_size_px, self.image_size_px)
        widest = CostTable.from_madds(spec, self.image_size_px).widest_cost
        check(
            math.isclose(widest, self.widest_madds, rel_tol=ROUNDING),
            f"budget curve: its widest route costs {self.widest_madds:.0f} MAdds, that of "
            f"{spec.name} {widest:.0f}",
        )
        for points in (self.points, self.gate_points, self.ms_points, self.ms_gate_points):
            for point in points:
                point.check_fits(spec, mirror=mirror)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values, from which `from_dict` restores an equal curve."""
        # through JSON, which converts tuples to lists
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BudgetCurve:
        """Rebuild a curve from `to_dict`.

        Raises:
            UsageError: for missing or unknown keys, values of a wrong type or out of range, or
                points that are not in order of cost; the message names the value.
        """
        curve = validated(data, cls, "budget curve")
        curve._check_points()
        return curve

    def _check_points(self) -> None:
        _check_finite(self, "budget curve")
        timed = self.widest_ms is not None
        check(self.widest_madds > 0, "budget curve: widest_madds must be above 0")
        check((self.cheapest_ms is not None) == timed, "budget curve: has ms for one end only")
        for name in _LISTS:
            points: tuple[BudgetPoint, ...] = getattr(self, name)
            by_ms = name.startswith("ms_")
            check(bool(points) or by_ms, f"budget curve: {name} has no point")
            check(timed or not by_ms or not points, f"budget curve: {name} without any ms")
            for number, point in enumerate(points):
                at = f"budget curve: {name} {number}"
                _check_finite(point, at)
                point.check_steps(at)
                check((point.ms is not None) == timed, f"{at}: ms {point.ms!r}, unlike the ends")
                share = point.madds / self.widest_madds
                check(
                    math.isclose(point.share, share, rel_tol=1e-6),
                    f"{at}: share {point.share} must be its part of widest_madds, {share:.6g}",
                )
                check(
                    "gate" not in name or not point.escalations,
                    f"{at}: escalates, which a point of the gate alone cannot",
                )
            costs = [_cost(point, "ms" if by_ms else "madds") for point in points]
            check(costs == sorted(costs), f"budget curve: {name} must stand in order of their cost")


_LISTS: Final = ("points", "gate_points", "ms_points", "ms_gate_points")


def needed_curve(curve: BudgetCurve | None, setting: str) -> BudgetCurve:
    """Return a network's curve; if there is none, raise a `UsageError` that names `setting`."""
    if curve is None:
        raise UsageError(
            f"{setting}: the network has no budget curve; measure one with: "
            f"dynaslim calibrate-budget CHECKPOINT --data HELD_OUT"
        )
    return curve


def _cost(point: BudgetPoint, kind: Kind) -> float:
    if kind == "ms":
        assert point.ms is not None, "a timed curve has ms at every point"
        return point.ms
    return point.share if kind == "share" else point.madds


def _check_finite(held: BudgetCurve | BudgetPoint, at: str) -> None:
    for name, value in vars(held).items():
        fine = not isinstance(value, float) or math.isfinite(value)
        check(fine, f"{at}: {name} {value!r} must be a finite number")
