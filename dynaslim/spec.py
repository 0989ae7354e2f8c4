"""The description of a dynamic slimmable network as frozen data: stages, widths, gates and routes.

This module does not import torch. A `NetSpec` is the only description of an architecture: modules
(`dynaslim.nn`), costs (`dynaslim.cost`) and checkpoints are all derived from it.

Terms: a *width* is how many leading channels a layer uses; a *stage* is a run of blocks that share
one width; a *route* is one width per stage; a *segment* is the part of a network between two gates.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

from dynaslim._files import validated
from dynaslim.errors import UsageError

BlockKind = Literal["conv", "depthwise_separable", "inverted_residual", "basic", "bottleneck"]
Activation = Literal["relu", "relu6", "silu"]
Attention = Literal["sigmoid", "one_plus_tanh"]

TEACHER_INDEX: Final = -1
"""Width index of the teacher: the last width of every stage, trunk included."""

_MOST: Final = 1 << 20
"""Upper bound of any size in a spec: ten times that of real networks, but still harmless."""

# A gate is behind the depthwise convolution of the first block of its stage, or at the entrance of
# that block if otherwise two tensors would have to cross the gate (residual blocks).
GATE_AT_ENTRANCE: Final[Mapping[str, bool]] = {
    "depthwise_separable": False,
    "inverted_residual": False,
    "basic": True,
    "bottleneck": True,
}


class Width(NamedTuple):
    """A width in use: the number of leading channels, and the `slot` of its BN statistics."""

    channels: int
    slot: int


@dataclass(frozen=True, order=True)
class Route:
    """One width (a number of channels) per stage. A hashable, comparable and sortable value."""

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))

    def __str__(self) -> str:
        return "-".join(map(str, self.widths))

    @classmethod
    def parse(cls, text: str | Sequence[int]) -> Route:
        """Parse the output of `str(route)`, such as `16-32-48-96-224-736`, or channel counts."""
        try:
            parts = list(map(int, text.split("-"))) if isinstance(text, str) else text
            return cls(tuple(map(operator.index, parts)))
        except (TypeError, ValueError):
            raise UsageError(
                f"route {text!r:.60}: expected channel counts joined by '-', such as 16-32-48"
            ) from None


@dataclass(frozen=True)
class GateSpec:
    """A gate; `choices` are the width indices it chooses from, in rising order."""

    choices: tuple[int, ...]


@dataclass(frozen=True)
class StageSpec:
    """A run of blocks with one width. The first block has the stride, the others have stride 1.

    `widths` are output channels in rising order. `expansion` is the ratio of inner to input
    channels in an `inverted_residual` block, and of output to inner channels in a `bottleneck`.
    `max_pool` adds a 3x3 max pool of stride 2 behind a `conv` stage (as in the ResNet stem).
    """

    widths: tuple[int, ...]
    block: BlockKind = "depthwise_separable"
    blocks: int = 1
    kernel: int = 3
    stride: int = 1
    expansion: int = 1
    max_pool: bool = False
    gate: GateSpec | None = None


class Routed:
    """Base of all specs: the routes of a network, from its gates and widths.

    A subclass provides `name`, `gates`, `num_widths`, `route_at` and `segment_indices`.
    """

    if TYPE_CHECKING:
        name: str

        @property
        def gates(self) -> tuple[GateSpec, ...]: ...
        @property
        def num_widths(self) -> int: ...
        def route_at(self, indices: Sequence[int]) -> Route: ...
        def segment_indices(self, route: Route) -> tuple[int, ...]: ...

    @property
    def num_segments(self) -> int:
        """Number of segments: the trunk and one behind each gate."""
        return len(self.gates) + 1

    @property
    def has_separate_teacher(self) -> bool:
        """Whether the largest sub-network is on no route; False if it is the widest route."""
        return False

    def check_indices(self, indices: Sequence[int]) -> None:
        """Raise `UsageError` unless there is one width index for each gate, each in range."""
        if len(indices) != len(self.gates):
            raise UsageError(
                f"indices {tuple(indices)}: {self.name} has {len(self.gates)} gates, "
                f"give one width index for each"
            )
        if not all(0 <= index < self.num_widths for index in indices):
            raise UsageError(
                f"indices {tuple(indices)}: width indices of {self.name} "
                f"are 0 to {self.num_widths - 1}"
            )

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        """The uniform routes, cheapest first: width index k behind every gate."""
        return tuple(self.route_at((k,) * len(self.gates)) for k in range(self.num_widths))

    @cached_property
    def routing_space(self) -> tuple[Route, ...]:
        """Every route that the gates can take: all combinations of their choices."""
        combos = itertools.product(*(gate.choices for gate in self.gates))
        return tuple(self.route_at(combo) for combo in combos)

    def route_along(self, path: Sequence[int]) -> Route:
        """The route of a path, which has one option (position in `GateSpec.choices`) per gate."""
        gates = zip(self.gates, path, strict=True)
        return self.route_at([gate.choices[option] for gate, option in gates])

    def path_at(self, indices: Sequence[int]) -> tuple[int, ...]:
        """The path that takes width index `indices[g]` behind gate g.

        Raises:
            UsageError: for a width index that is not among a gate's choices.
        """
        pairs = list(zip(self.gates, indices, strict=True))
        for number, (gate, index) in enumerate(pairs):
            if index not in gate.choices:
                raise UsageError(
                    f"gate {number} of {self.name}: chooses among width indices "
                    f"{', '.join(map(str, gate.choices))}, not {index}"
                )
        return tuple(gate.choices.index(index) for gate, index in pairs)

    def path_of(self, route: Route) -> tuple[int, ...]:
        """The path of a route.

        Raises:
            UsageError: if the network has no such route, or its gates cannot take it.
        """
        return self.path_at(self.segment_indices(route)[1:])

    def _gates_of(self, choices: Sequence[Sequence[int]]) -> tuple[GateSpec, ...]:
        """The network's gates with other choices: one set for each gate, or one set for all."""
        if len(choices) == 1:
            choices = [choices[0]] * len(self.gates)
        if len(choices) != len(self.gates):
            raise UsageError(
                f"{self.name}: {len(self.gates)} gates, but {len(choices)} sets of choices"
            )
        return tuple(GateSpec(tuple(own)) for own in choices)

    @property
    def smallest(self) -> Route:
        """The cheapest route."""
        return self.routes[0]

    @cached_property
    def cheapest_choice(self) -> Route:
        """The cheapest route that the gates can take: the first choice of each."""
        return self.route_at([gate.choices[0] for gate in self.gates])

    @cached_property
    def widest_choice(self) -> Route:
        """The widest route that the gates can take: the last choice of each."""
        return self.route_at([gate.choices[-1] for gate in self.gates])

    def coerce_route(self, route: Route | str | Sequence[int]) -> Route:
        """Convert a route, its text or its widths to a `Route`, and check it.

        Raises:
            UsageError: if the text is not a route, or the network has no such route.
        """
        checked = route if isinstance(route, Route) else Route.parse(route)
        self.segment_indices(checked)
        return checked


@dataclass(frozen=True)
class NetSpec(Routed):
    """A whole network: stages in order (the first is the stem), pooling and a linear classifier.

    Stages before the first gate are the *trunk*; they keep their first width on every route. Stages
    from a gate to the next are governed by that gate: they share its width index, unless they have
    only one width. `attention_at` selects which blocks have an attention head: all, or only the
    gated ones. The hidden width of a gate is `round(reduction * largest input width of its block)`.

    Raises:
        UsageError: if the parts do not fit together.
    """

    name: str
    stages: tuple[StageSpec, ...]
    num_classes: int = 1000
    in_channels: int = 3
    activation: Activation = "silu"
    attention: Attention = "sigmoid"
    attention_at: Literal["all", "gated"] = "all"
    reduction: float = 0.25

    def __post_init__(self) -> None:
        self._check(bool(self.stages), "a network needs at least one stage")
        self._check(
            type(self.num_classes) is int and 1 <= self.num_classes <= _MOST,
            f"num_classes {self.num_classes}: must be at least 1, at most {_MOST:,}",
        )
        self._check(
            1 <= self.in_channels <= _MOST,
            f"in_channels {self.in_channels}: must be at least 1, at most {_MOST:,}",
        )
        self._check(
            0 < self.reduction <= 100, f"reduction {self.reduction}: must be above 0, at most 100"
        )
        for field, kind in (("activation", Activation), ("attention", Attention)):
            value = getattr(self, field)
            self._check(value in get_args(kind), f"{field} {value!r}: choose from {get_args(kind)}")
        self._check(
            self.attention_at in ("all", "gated"),
            f"attention_at {self.attention_at!r}: choose from ('all', 'gated')",
        )
        residual = any(GATE_AT_ENTRANCE.get(stage.block, False) for stage in self.stages)
        self._check(
            self.attention_at == "gated" or not residual,
            "attention_at 'all' would scale every shortcut of its residual blocks; take 'gated'",
        )
        for number, stage in enumerate(self.stages):
            self._check_stage(number, stage)

    def _check(self, fine: bool, message: str) -> None:
        if not fine:
            raise UsageError(f"spec {self.name!r}: {message}")

    def _check_stage(self, number: int, stage: StageSpec) -> None:
        at = f"stage {number}"
        widths = stage.widths
        sizes = (*widths, stage.blocks, stage.kernel, stage.stride, stage.expansion)
        self._check(
            all(type(value) is int and value <= _MOST for value in sizes),
            f"{at}: widths, blocks, kernel, stride and expansion must be whole numbers of at most "
            f"{_MOST:,}: {sizes}",
        )
        self._check(bool(widths) and widths[0] >= 1, f"{at}: needs positive widths, got {widths}")
        self._check(_rising(widths), f"{at}: widths {widths} must rise")
        self._check(stage.block in get_args(BlockKind), f"{at}: unknown block {stage.block!r}")
        self._check(number > 0 or stage.block == "conv", f"{at}: the stem must be a 'conv'")
        self._check(stage.blocks >= 1, f"{at}: needs at least one block")
        self._check(
            stage.kernel >= 1 and stage.kernel % 2 == 1,
            f"{at}: kernel {stage.kernel} must be odd and positive",
        )
        self._check(stage.stride >= 1, f"{at}: stride {stage.stride} must be at least 1")
        self._check(stage.expansion >= 1, f"{at}: expansion {stage.expansion} must be at least 1")
        self._check(
            stage.block != "bottleneck" or all(w % stage.expansion == 0 for w in widths),
            f"{at}: bottleneck widths {widths} must be multiples of {stage.expansion}",
        )
        self._check(
            not stage.max_pool or (stage.block == "conv" and stage.blocks == 1),
            f"{at}: only a 'conv' stage of one block has a max pool",
        )
        if stage.gate is not None:
            choices = stage.gate.choices
            self._check(stage.block in GATE_AT_ENTRANCE, f"{at}: a {stage.block!r} has no gate")
            self._check(
                bool(choices) and _rising(choices) and choices[0] >= 0,
                f"{at}: gate choices {choices} must be rising width indices",
            )
            self._check(
                choices[-1] < len(widths),
                f"{at}: gate choice {choices[-1]} is out of range, the stage has "
                f"{len(widths)} widths (0 to {len(widths) - 1})",
            )
        if self.gate_of(number) is not None and len(widths) > 1:
            self._check(
                len(widths) == self.num_widths,
                f"{at}: has {len(widths)} widths, but the gated stages have {self.num_widths}",
            )
        self._check(
            stage.gate is None or len(widths) == self.num_widths,
            f"{at}: gated stages need the same number of widths",
        )

    # -- gates and segments -------------------------------------------------------------------

    @cached_property
    def gated_stages(self) -> tuple[int, ...]:
        """Numbers of the stages with a gate, in order."""
        return tuple(s for s, stage in enumerate(self.stages) if stage.gate is not None)

    @cached_property
    def gates(self) -> tuple[GateSpec, ...]:
        """The gates in order."""
        return tuple(stage.gate for stage in self.stages if stage.gate is not None)

    @property
    def num_widths(self) -> int:
        """Number of widths of a gated stage; 1 for a network without gates."""
        return len(self.stages[self.gated_stages[0]].widths) if self.gated_stages else 1

    def gate_of(self, stage: int) -> int | None:
        """Number of the gate that governs a stage, or None in the trunk."""
        before = sum(1 for s in self.gated_stages if s <= stage)
        return before - 1 if before else None

    # -- widths -------------------------------------------------------------------------------

    @cached_property
    def has_separate_teacher(self) -> bool:
        """Whether the largest sub-network is on no route, because its trunk is wider."""
        return any(
            self.gate_of(s) is None and len(stage.widths) > 1 for s, stage in enumerate(self.stages)
        )

    def num_slots(self, stage: int) -> int:
        """How many sets of BN statistics the layers of a stage have.

        One per width, as in the released code, and one more for the teacher if it would share a set
        with a route: its wider trunk gives the features another distribution.
        """
        governed = self.gate_of(stage) is not None
        # a stage of one width behind a gate still has inputs of all the gate's widths
        slots = self.num_widths if governed else len(self.stages[stage].widths)
        shared = governed or slots == 1
        return slots + (1 if self.has_separate_teacher and shared else 0)

    def width(self, stage: int, index: int) -> Width:
        """The width of a stage for a width index of its gate (`TEACHER_INDEX` for the teacher)."""
        widths = self.stages[stage].widths
        if index == TEACHER_INDEX:
            return Width(widths[-1], self.num_slots(stage) - 1)
        if self.gate_of(stage) is None:
            index = 0
        return Width(widths[min(index, len(widths) - 1)], index)

    def slot_widths(self, stage: int) -> tuple[int, ...]:
        """Channels behind each BN slot of a stage."""
        widths = self.stages[stage].widths
        return tuple(widths[min(slot, len(widths) - 1)] for slot in range(self.num_slots(stage)))

    # -- routes -------------------------------------------------------------------------------

    def route_at(self, indices: Sequence[int]) -> Route:
        """The route that takes width index `indices[g]` behind gate g.

        Raises:
            UsageError: for a wrong number of indices or one out of range.
        """
        self.check_indices(indices)
        widths = []
        for number in range(len(self.stages)):
            gate = self.gate_of(number)
            widths.append(self.width(number, 0 if gate is None else indices[gate]).channels)
        return Route(tuple(widths))

    @cached_property
    def largest(self) -> Route:
        """The last width in every stage: the teacher of stage I, which may be on no route."""
        return Route(tuple(stage.widths[-1] for stage in self.stages))

    def segment_indices(self, route: Route) -> tuple[int, ...]:
        """Width index of each segment on a route: the trunk's, then one behind each gate.

        The trunk has index 0 on every route. A separate teacher has `TEACHER_INDEX` in all
        segments.

        Raises:
            UsageError: if the network has no such route; the message names the stage.
        """
        if self.has_separate_teacher and route == self.largest:
            return (TEACHER_INDEX,) * self.num_segments
        label = f"route {route.widths}"
        if len(route.widths) != len(self.stages):
            raise UsageError(
                f"{label}: {self.name} has {len(self.stages)} stages, "
                f"a route has one width for each, such as {self.smallest.widths}"
            )
        indices = [0]
        for number, (stage, channels) in enumerate(zip(self.stages, route.widths, strict=True)):
            if stage.gate is not None:
                if channels in stage.widths:
                    indices.append(stage.widths.index(channels))
                    continue
                allowed, why = stage.widths, ""
            else:
                allowed = (self.width(number, indices[-1]).channels,)
                why = " on a route" if self.gate_of(number) is None else " behind that gate"
            if channels not in allowed:
                which = ", ".join(map(str, allowed))
                raise UsageError(f"{label}: stage {number} allows {which}{why}, not {channels}")
        return tuple(indices)

    # -- sizes and changes --------------------------------------------------------------------

    @cached_property
    def total_stride(self) -> int:
        """Ratio of input side to the side of the last feature map; the smallest image side."""
        return math.prod(stage.stride * (2 if stage.max_pool else 1) for stage in self.stages)

    @property
    def classifier(self) -> str:
        """Name of the linear layer that computes the logits."""
        return "classifier"

    @property
    def features(self) -> int:
        """Channels of the classifier's input at full width."""
        return self.stages[-1].widths[-1]

    @property
    def usual_image_size(self) -> int:
        """The default image side in pixels of this architecture."""
        return 224 if self.total_stride >= 32 else 32

    def check_image_size(self, height: int, width: int) -> None:
        """Raise `UsageError` for an image that is smaller than the network's total stride."""
        if min(height, width) < self.total_stride:
            raise UsageError(
                f"image size {height}x{width} px: {self.name} divides it by {self.total_stride}, "
                f"so each side must be at least {self.total_stride} px"
            )

    def replace(self, **changes: Any) -> NetSpec:
        """A copy with fields replaced, for example `spec.replace(num_classes=10)`."""
        return dataclasses.replace(self, **changes)

    def with_choices(self, *choices: Sequence[int]) -> NetSpec:
        """A copy with another routing space: one sequence of width indices per gate.

        A single sequence applies to every gate.
        """
        new = iter(self._gates_of(choices))
        stages = tuple(
            stage if stage.gate is None else dataclasses.replace(stage, gate=next(new))
            for stage in self.stages
        )
        return self.replace(stages=stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` rebuilds an equal spec from them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NetSpec:
        """Rebuild a spec from `to_dict`.

        Raises:
            UsageError: for unknown or missing fields, or values of another type.
        """
        return validated(data, cls, "not a network spec")


def _rising(values: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))
