"""The units of compilation: variants of a network's segments, and whole routes. No torch.

A `VariantSource` provides the models of variants, from a network in memory (`network_source`), its
int8 version (`quantise`), a cascade (`cascade_source`) or an exported package (`package`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, get_args

from dynaslim.cost import madds, route_costs, segment_choices, segment_cost
from dynaslim.errors import check
from dynaslim.graph import AnySpec
from dynaslim.preprocessing import Preprocessing
from dynaslim.spec import Route

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)


@dataclass(frozen=True)
class VariantShape:
    """Sizes and cost of a variant per row, for one image size."""

    row_in: tuple[int, int, int]
    """Channels, height and width of the input."""
    output_rows: tuple[tuple[int, ...], ...]
    """Shapes of the outputs: features and gate logits, or class logits alone."""
    peak: int
    """Number of values in the largest feature map."""
    madds: int
    """Multiply-adds, including those of the gate behind it."""


class SegmentVariant(NamedTuple):
    """A segment at width index `choice` that follows one at `before`; 0, 0, 0 is the trunk."""

    segment: int
    before: int = 0
    choice: int = 0

    @property
    def name(self) -> str:
        """Name used for its files."""
        return f"segment{self.segment}_{self.before}_{self.choice}"

    @property
    def takes_images(self) -> bool:
        """Whether its input is images rather than the previous segment's features."""
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
        output_rows: tuple[tuple[int, ...], ...] = ((spec.num_classes,),)
        if self.segment < len(spec.gates):
            output_rows = (cost.out, (len(spec.gates[self.segment].choices),))
        madds = cost.madds + cost.pool_adds + cost.head_madds
        return VariantShape(row_in, output_rows, cost.peak, madds)


class RouteVariant(NamedTuple):
    """All segments of a route as one program, without the gates' decisions."""

    route: Route

    @property
    def name(self) -> str:
        """Name used for its files."""
        return f"route_{self.route}"

    @property
    def takes_images(self) -> bool:
        return True

    def shape(self, spec: AnySpec, size: tuple[int, int]) -> VariantShape:
        """Like `SegmentVariant.shape`."""
        peak = max(cost.peak for cost in route_costs(spec, self.route, size))
        whole = madds(spec, self.route, size)
        return VariantShape((spec.in_channels, *size), ((spec.num_classes,),), peak, whole)


Variant = SegmentVariant | RouteVariant
VariantTable = tuple[tuple[tuple[SegmentVariant, ...], ...], ...]
"""Variants by segment, option of the previous segment's gate, and option of its own gate."""


def variant_table(spec: AnySpec) -> VariantTable:
    """All variants, laid out like `CostTable.segments`.

    This is the only place where gate options are converted to width indices of segments.
    """
    return tuple(
        tuple(tuple(SegmentVariant(number, a, b) for b in behind) for a in before)
        for number, (before, behind) in enumerate(segment_choices(spec))
    )


def segment_variants(spec: AnySpec) -> Iterator[SegmentVariant]:
    """Iterate over every variant of every segment."""
    for number, (before, behind) in enumerate(segment_choices(spec)):
        for a in before:
            for b in behind:
                yield SegmentVariant(number, a, b)


class VariantSource(Protocol):
    """Provides a network's variants as torch modules or ONNX models."""

    @property
    def spec(self) -> AnySpec:
        """The network's specification."""

    @property
    def precision(self) -> Precision:
        """Number format in which it is stored and computed."""

    @property
    def key(self) -> str:
        """Digest of everything that its programs depend on; names the cache folder."""

    @property
    def has_modules(self) -> bool:
        """Whether it has torch modules (none in int8) and whole routes; a package has neither."""

    def module(self, variant: Variant, dtype: torch.dtype) -> nn.Module:
        """The variant as a plain torch module; it shares layers, so change only their layout.

        Raises:
            UsageError: if this source has no such module.
        """

    def onnx(self, variant: Variant) -> Path | bytes:
        """The variant as an ONNX file (its path) or as the content of one.

        Raises:
            UsageError: if this source has no such variant.
        """


@dataclass(frozen=True)
class OpenModel:
    """A model read from disk, with all that an engine needs of it."""

    source: VariantSource
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    budget: Mapping[str, Any] | None
    mirror: bool
    """Whether images may also be run mirrored."""

    @property
    def spec(self) -> AnySpec:
        """The network's specification."""
        return self.source.spec


def check_precision(precision: str) -> Precision:
    """Return a precision's name; raise `UsageError` if it is unknown."""
    check(precision in PRECISIONS, f"precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    found: Any = precision
    return found  # type: ignore[no-any-return]
