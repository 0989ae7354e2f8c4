"""The pieces of a network that are compiled alone: forms of segments, and whole routes. No torch.

Where their programs come from is a `FormSource`: a network in memory (`network_forms`) or an
exported package (`package`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, get_args

from dynaslim.cost import SegmentCost, madds, route_costs, segment_cost
from dynaslim.errors import check
from dynaslim.graph import AnySpec
from dynaslim.spec import Route

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)


class Form(NamedTuple):  # a tuple: it is looked up some forty times a call
    """A segment at width index `choice` behind one at `before`; or, with a route, all of it.

    The trunk is segment 0 with both 0.
    """

    segment: int
    before: int = 0
    choice: int = 0
    route: Route | None = None

    @classmethod
    def whole(cls, route: Route) -> Form:
        """The sub-network along a route, with no gate to ask."""
        return cls(0, route=route)

    @property
    def name(self) -> str:
        """What its files are called."""
        if self.route is not None:
            return f"route_{self.route}"
        return f"segment{self.segment}_{self.before}_{self.choice}"


@dataclass(frozen=True)
class FormShape:
    """Sizes of a form for one size of image, per row."""

    row_in: tuple[int, int, int]
    """Channels, height, width."""
    rows_out: tuple[tuple[int, ...], ...]
    """Of features and gate logits, or of class logits."""
    peak: int
    """Values of the largest feature map."""
    images: bool
    """Whether it takes images, not the features of the segment before."""


def segment_forms(spec: AnySpec) -> Iterator[Form]:
    """Every form of every segment that the gates can ask for."""
    yield Form(0)
    before: tuple[int, ...] = (0,)
    for number, gate in enumerate(spec.gates, start=1):
        for a in before:
            for b in gate.choices:
                yield Form(number, a, b)
        before = gate.choices


def form_shape(spec: AnySpec, form: Form, image_size: tuple[int, int]) -> FormShape:
    """What a form takes and gives for images of (height, width) in pixels.

    Raises:
        UsageError: if the images are too small for the network.
    """
    row_in, images = (spec.in_channels, *image_size), form.route is not None or form.segment == 0
    costs = _costs(spec, form, image_size)
    peak = max(cost.peak for cost in costs)
    if not images:
        behind = form.before if form.segment > 2 else 0
        row_in = segment_cost(spec, form.segment - 1, behind, form.before, image_size).out
    if form.route is not None or form.segment == spec.num_segments - 1:
        return FormShape(row_in, ((spec.num_classes,),), peak, images)
    options = (len(spec.gates[form.segment].choices),)
    return FormShape(row_in, (costs[-1].out, options), peak, images)


def form_madds(spec: AnySpec, form: Form, size: tuple[int, int]) -> float:
    """Multiply-adds of a form per row, for images of (height, width)."""
    if form.route is not None:
        return float(madds(spec, form.route, size))
    (cost,) = _costs(spec, form, size)
    return float(cost.madds + cost.pool_adds + cost.head_madds)


def _costs(spec: AnySpec, form: Form, size: tuple[int, int]) -> list[SegmentCost]:
    """Of the form's segments."""
    if form.route is not None:
        return route_costs(spec, form.route, size)
    return [segment_cost(spec, *form[:3], size)]


class FormSource(Protocol):
    """Where the programs of a network's forms come from."""

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

    def module(self, form: Form, dtype: torch.dtype) -> nn.Module:
        """The form as a plain torch module; forms share layers, so only their layout may change.

        Raises:
            UsageError: if this source has none.
        """

    def onnx(self, form: Form) -> Path | bytes:
        """The form as an ONNX file or its content.

        Raises:
            UsageError: if this source has none.
        """


def check_precision(precision: str) -> Precision:
    """The precision, if it is one."""
    check(precision in PRECISIONS, f"precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    found: Any = precision
    return found  # type: ignore[no-any-return]
