"""A cascade of whole networks as frozen data: its rungs and their costs. Does not import torch.

A cascade is treated as a network with one gate behind a trunk. The trunk is empty unless rungs have
layers in common. The options of the gate are the *rungs*, cheapest first. All images run on the
first rung; those with an uncertain answer escalate to another.
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
    """Side of its square input in pixels; the cascade's images are resized to it."""
    madds: int
    """Multiply-adds of one image, including its resizing."""
    params: int
    peak: int
    """Number of values in its largest feature map."""


@dataclass(frozen=True)
class TrunkSpec:
    """Layers that the first rung shares with others. They run once for every image."""

    rungs: tuple[int, ...]
    """Indices of the rungs that share the trunk, the first rung included."""
    madds: int
    params: int
    peak: int
    values: int
    """Number of output values per image: its features, and the image itself for other rungs."""


@dataclass(frozen=True)
class CascadeSpec(Routed):
    """The spec of a cascade, with the same interface as `NetSpec`.

    A route is the number of a rung, from 1: route `2` is the second network alone.
    """

    name: str
    num_classes: int
    in_channels: int
    image_size_px: int
    """Side of the input images in pixels: the largest `image_size_px` of its rungs."""
    rungs: tuple[RungSpec, ...]
    trunk: TrunkSpec | None = field(default=None, metadata=NOT_IN_OLD_FILES)
    """None if the rungs share no layers."""

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
        return len(self.rungs)

    @property
    def largest(self) -> Route:
        return self.routes[-1]

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
            UsageError: if the cascade has no such route.
        """
        check(
            len(route.widths) == 1 and 1 <= route.widths[0] <= len(self.rungs),
            f"route {route}: {self.name} takes the number of a rung, 1 to {len(self.rungs)}",
        )
        return 0, route.widths[0] - 1

    def behind_trunk(self, number: int) -> tuple[int, int]:
        """Multiply-adds and parameters of a rung, without the trunk's if the rung shares it."""
        rung, trunk = self.rungs[number], self.trunk
        if trunk is None or number not in trunk.rungs:
            return rung.madds, rung.params
        return rung.madds - trunk.madds, rung.params - trunk.params

    @property
    def usual_image_size(self) -> int:
        """The side of its images in pixels."""
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
