"""The pieces of a network that are compiled alone: forms of segments, and whole routes. No torch.

Where their programs come from is a `FormSource`: a network in memory (`network_forms`) or an
exported package (`package`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, get_args

from dynaslim.cost import CostTable, madds, segment_shapes
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
    image = (spec.in_channels, *image_size)
    if form.route is not None:
        shapes = segment_shapes(spec, form.route, image_size)
        return FormShape(image, ((spec.num_classes,),), max(s.peak for s in shapes), True)
    shapes = segment_shapes(spec, route_through(spec, form), image_size)
    here = shapes[form.segment]
    row_in = image if form.segment == 0 else shapes[form.segment - 1].out
    if form.segment == spec.num_segments - 1:
        return FormShape(row_in, ((spec.num_classes,),), here.peak, form.segment == 0)
    options = (len(spec.gates[form.segment].choices),)
    return FormShape(row_in, (here.out, options), here.peak, form.segment == 0)


def form_madds(spec: AnySpec, form: Form, size: tuple[int, int]) -> float:
    """Multiply-adds of a form per row, for images of (height, width)."""
    if form.route is not None:
        return float(madds(spec, form.route, size))
    table = CostTable.from_madds(spec, size)
    if form.segment == 0:
        return table.segments[0][0][0]
    before = spec.gates[form.segment - 2].choices.index(form.before) if form.segment > 1 else 0
    after = spec.gates[form.segment - 1].choices.index(form.choice)
    return table.segments[form.segment][before][after]


def route_through(spec: AnySpec, form: Form) -> Route:
    """A route on which a segment has this form."""
    at = form.segment - 1  # the gate before it
    return spec.route_at(
        [form.before] * max(0, at) + [form.choice] * (len(spec.gates) - max(0, at))
    )


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
