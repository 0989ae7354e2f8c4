"""What of a network is compiled alone: variants of its segments, and whole routes. No torch.

Where their programs come from is a `VariantSource`: a network in memory (`network_source`) or an
exported package (`package`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, get_args

from dynaslim.cost import madds, route_costs, segment_choices, segment_cost
from dynaslim.errors import check
from dynaslim.graph import AnySpec
from dynaslim.spec import Route

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)


@dataclass(frozen=True)
class VariantShape:
    """Sizes of a variant for one size of image, per row."""

    row_in: tuple[int, int, int]
    """Channels, height, width."""
    rows_out: tuple[tuple[int, ...], ...]
    """Of features and gate logits, or of class logits."""
    peak: int
    """Values of the largest feature map."""
    madds: int
    """Multiply-adds, those of the gate behind it included."""


class SegmentVariant(NamedTuple):
    """A segment at width index `choice` behind one at `before`; the trunk is segment 0, both 0."""

    segment: int
    before: int = 0
    choice: int = 0

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"segment{self.segment}_{self.before}_{self.choice}"

    @property
    def takes_images(self) -> bool:
        """Whether its input is images, not the features of the segment before."""
        return self.segment == 0

    def shape(self, spec: AnySpec, size: tuple[int, int]) -> VariantShape:
        """Sizes for images of (height, width) in pixels.

        Raises:
            UsageError: if the images are too small for the network.
        """
        cost = segment_cost(spec, *self, size)
        row_in = (spec.in_channels, *size)
        if self.segment > 0:
            behind = self.before if self.segment > 2 else 0
            row_in = segment_cost(spec, self.segment - 1, behind, self.before, size).out
        rows_out: tuple[tuple[int, ...], ...] = ((spec.num_classes,),)
        if self.segment < len(spec.gates):
            rows_out = (cost.out, (len(spec.gates[self.segment].choices),))
        madds = cost.madds + cost.pool_adds + cost.head_madds
        return VariantShape(row_in, rows_out, cost.peak, madds)


class RouteVariant(NamedTuple):
    """All segments along a route as one program, without the gates' decisions."""

    route: Route

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"route_{self.route}"

    @property
    def takes_images(self) -> bool:
        return True

    def shape(self, spec: AnySpec, size: tuple[int, int]) -> VariantShape:
        """As `SegmentVariant.shape`."""
        peak = max(cost.peak for cost in route_costs(spec, self.route, size))
        whole = madds(spec, self.route, size)
        return VariantShape((spec.in_channels, *size), ((spec.num_classes,),), peak, whole)


Variant = SegmentVariant | RouteVariant
VariantTable = tuple[tuple[tuple[SegmentVariant, ...], ...], ...]
"""Variants of every segment, by the options before and behind it."""


def variant_table(spec: AnySpec) -> VariantTable:
    """All variants, laid out as `CostTable.segments`.

    Here alone the options of gates become width indices of segments.
    """
    return tuple(
        tuple(tuple(SegmentVariant(number, a, b) for b in behind) for a in before)
        for number, (before, behind) in enumerate(segment_choices(spec))
    )


def segment_variants(spec: AnySpec) -> Iterator[SegmentVariant]:
    """Every variant of every segment, one by one."""
    for number, (before, behind) in enumerate(segment_choices(spec)):
        for a in before:
            for b in behind:
                yield SegmentVariant(number, a, b)


class VariantSource(Protocol):
    """Where the programs of a network's variants come from."""

    @property
    def spec(self) -> AnySpec:
        """The network's."""

    @property
    def precision(self) -> Precision:
        """What its numbers are stored and computed in."""

    @property
    def key(self) -> str:
        """Digest of all that its programs depend on: what caches are filed under."""

    @property
    def has_modules(self) -> bool:
        """Whether it has torch modules, and programs of whole routes; a package has neither."""

    def module(self, variant: Variant, dtype: torch.dtype) -> nn.Module:
        """The variant as a plain torch module; layers are shared, so only their layout may change.

        Raises:
            UsageError: if this source has none.
        """

    def onnx(self, variant: Variant) -> Path | bytes:
        """The variant as an ONNX file or its content.

        Raises:
            UsageError: if this source has none.
        """


def check_precision(precision: str) -> Precision:
    """The precision, if it is one."""
    check(precision in PRECISIONS, f"precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    found: Any = precision
    return found  # type: ignore[no-any-return]
