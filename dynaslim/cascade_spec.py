"""A cascade of whole networks as frozen data: its rungs, and what each costs. No torch here.

A cascade is a network of one gate behind an empty trunk. The options of the gate are the *rungs*,
the cheapest first. All images run on the first one; those that are unsure escalate to another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dynaslim._files import validated
from dynaslim.errors import check
from dynaslim.spec import GateSpec, Route, Routed


@dataclass(frozen=True)
class RungSpec:
    """One network of a cascade."""

    name: str
    image_size_px: int
    """Side of the square that it sees; the cascade's images are resized to it."""
    madds: int
    """Multiply-adds of one image, its resizing included."""
    params: int
    peak: int
    """Values of its largest feature map."""


@dataclass(frozen=True)
class CascadeSpec(Routed):
    """A cascade: what `NetSpec` is for a network of the zoo.

    A route is the number of a rung, from 1: route `2` is the second network alone.
    """

    name: str
    num_classes: int
    in_channels: int
    image_size_px: int
    """Side of the images that it takes: that of the rung with the largest."""
    rungs: tuple[RungSpec, ...]

    def __post_init__(self) -> None:
        check(len(self.rungs) >= 2, f"{self.name}: a cascade needs at least two networks")
        check(min(self.num_classes, self.in_channels) >= 1, f"{self.name}: no classes or channels")
        for rung in self.rungs:
            check(
                1 <= rung.image_size_px <= self.image_size_px and rung.madds >= 1 <= rung.peak,
                f"{self.name}: the sizes of {rung.name} cannot be right",
            )
        for one, other in itertools.pairwise(self.rungs):
            check(
                one.madds < other.madds,
                f"{self.name}: {other.name} must cost more than {one.name}, which comes before it",
            )

    @cached_property
    def gates(self) -> tuple[GateSpec, ...]:
        """The one gate, whose options are the rungs."""
        return (GateSpec(tuple(range(len(self.rungs)))),)

    @property
    def num_widths(self) -> int:
        """Number of rungs."""
        return len(self.rungs)

    @property
    def largest(self) -> Route:
        """The last rung."""
        return self.routes[-1]

    @property
    def teacher_apart(self) -> bool:
        """Always False."""
        return False

    def route_at(self, indices: Sequence[int]) -> Route:
        """The route of a rung, given by its index.

        Raises:
            UsageError: for a wrong number of indices or one out of range.
        """
        self.check_indices(indices)
        return Route((int(indices[0]) + 1,))

    def segment_indices(self, route: Route) -> tuple[int, ...]:
        """0 for the trunk, and the index of the rung.

        Raises:
            UsageError: if the route is none of this cascade's.
        """
        check(
            len(route.widths) == 1 and 1 <= route.widths[0] <= len(self.rungs),
            f"route {route}: {self.name} takes the number of a rung, 1 to {len(self.rungs)}",
        )
        return 0, route.widths[0] - 1

    def rung(self, route: Route) -> RungSpec:
        """The rung of a route."""
        return self.rungs[self.segment_indices(route)[1]]

    @property
    def usual_image_size(self) -> int:
        """The side in pixels of its images."""
        return self.image_size_px

    def check_image_size(self, height: int, width: int) -> None:
        """Raise `UsageError` for images of another size."""
        check(
            height == width == self.image_size_px,
            f"image size {height}x{width} px: {self.name} takes {self.image_size_px}x"
            f"{self.image_size_px} px, the largest that one of its networks sees",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {"cascade": dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CascadeSpec:
        """Rebuild a spec from `to_dict`.

        Raises:
            UsageError: for unknown or missing fields, or values of another type.
        """
        return validated(data["cascade"], cls, "not a cascade")
