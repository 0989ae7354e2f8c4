"""A cascade of whole networks as frozen data: its rungs, and what each costs. No torch here.

A cascade is a network of one gate behind a trunk, which is empty unless rungs have layers in
common. The options of the gate are the *rungs*, the cheapest first. All images run on the first
one; those that are unsure escalate to another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dynaslim._files import NOT_IN_OLD_FILES, validated
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
class TrunkSpec:
    """Layers that the first rung has in common with others. They run once for every image."""

    rungs: tuple[int, ...]
    """Indices of those rungs."""
    madds: int
    params: int
    peak: int
    values: int
    """Of what leaves it for an image: its features, and the image itself for other rungs."""


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
    trunk: TrunkSpec | None = field(default=None, metadata=NOT_IN_OLD_FILES)
    """None where every rung runs whole."""

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
        if self.trunk is not None:
            among = set(self.trunk.rungs) <= set(range(len(self.rungs)))
            check(
                among and self.trunk.rungs[:1] == (0,) and self.trunk.madds < self.rungs[0].madds,
                f"{self.name}: its trunk is not one of the first rung's, or costs more than that",
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

    def route_at(self, indices: Sequence[int]) -> Route:
        """The route of a rung, given by its index."""
        self.check_indices(indices)
        return Route((int(indices[0]) + 1,))

    def segment_indices(self, route: Route) -> tuple[int, ...]:
        """0 for the trunk, and the index of the rung."""
        check(
            len(route.widths) == 1 and 1 <= route.widths[0] <= len(self.rungs),
            f"route {route}: {self.name} takes the number of a rung, 1 to {len(self.rungs)}",
        )
        return 0, route.widths[0] - 1

    def behind_trunk(self, number: int) -> tuple[int, int]:
        """Multiply-adds and parameters of a rung, of one that has the trunk behind it."""
        rung, trunk = self.rungs[number], self.trunk
        if trunk is None or number not in trunk.rungs:
            return rung.madds, rung.params
        return rung.madds - trunk.madds, rung.params - trunk.params

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
        """Rebuild a spec from `to_dict`."""
        return validated(data["cascade"], cls, "not a cascade")
