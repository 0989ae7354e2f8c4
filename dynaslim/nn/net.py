"""The network: one set of weights, run along a route, by gates, or segment by segment.

Suffixes: B rows, C channels in use, H W pixels, K choices of a gate, N classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynaslim.cost import gate_hidden
from dynaslim.nn.blocks import Block, LayerFactory, make_block
from dynaslim.nn.functional import AnyWidth, SoftWidth, slim_linear
from dynaslim.nn.gate import Gate
from dynaslim.spec import GATE_AT_ENTRANCE, LARGEST, NetSpec, Route

Choose = Callable[[Tensor, int], Tensor]
"""Makes a gate of slimming logits: (logits_BK, gate number) -> one-hot (or soft) gate_BK."""


class GatedOutput(NamedTuple):
    """What a gated forward computed and decided; one entry per gate in the two tuples."""

    logits: Tensor
    gate_logits: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]


class SegmentOutput(NamedTuple):
    """What leaves a segment: features and the next gate's logits, or class logits at the end."""

    features: Tensor
    gate_logits: Tensor | None


RunSegment = Callable[[int, Tensor, int, Tensor | None], Tensor]
"""(segment number, x, width index, dropout mask) -> features, as `SlimNet.segment` computes."""

F = TypeVar("F", bound=Callable[..., Any])


def _left_to_python(function: F) -> F:
    """What `torch.compiler.disable(recursive=False)` does, without importing the compiler for it.

    That import takes as long as all the rest of torch, and most processes compile nothing.
    """
    try:
        from torch._C._dynamo import eval_frame

        skip: Any = eval_frame._FrameAction.SKIP
        then: Any = eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(
            function.__code__, eval_frame._FrameExecStrategy(skip, then)
        )
    except (ImportError, AttributeError):  # another version of torch
        return cast(F, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


_disabled = cache(torch.compiler.disable)
"""`torch.compiler.disable` of a function: neither it nor what it calls is traced."""

Program = Callable[["ElasticNet", Tensor, Tensor | None], Tensor]


# beside the networks, not on them: functions made at run time cannot be pickled or copied
_PROGRAMS: WeakKeyDictionary[ElasticNet, dict[tuple[int, ...], Program]] = WeakKeyDictionary()


def _program(net: ElasticNet, indices: tuple[int, ...]) -> Program:
    """A network's program for given width indices, made at first use."""
    programs = _PROGRAMS.setdefault(net, {})
    if indices not in programs:
        programs[indices] = _make_program(indices)
    return programs[indices]


def _make_program(indices: tuple[int, ...]) -> Program:
    """The static forward for given width indices, as a function with a code object of its own."""

    def run(net: ElasticNet, x: Tensor, dropout_mask: Tensor | None) -> Tensor:
        for number, index in enumerate(indices):
            x = net.segment(number, x, index, decide=False, dropout_mask=dropout_mask).features
        return x

    name = "route_" + "_".join(map(str, indices)).replace("-", "minus")
    code = run.__code__.replace(co_name=name)
    return FunctionType(code, run.__globals__, name, None, run.__closure__)


class ElasticNet(nn.Module):
    """What all networks have in common: segments that are run along a route.

    A network has a `spec`, and `segment` and `segment_hidden`, one piece of it.
    """

    # added by `dynaslim.interop.hub`
    save_pretrained: ClassVar[Callable[..., Path]]
    push_to_hub: ClassVar[Callable[..., str]]
    from_pretrained: ClassVar[Callable[..., ElasticNet]]

    spec: Any
    has_weights: ClassVar[bool] = True
    """Whether there are weights to train and to write to a checkpoint."""

    @property
    def plain_backend(self) -> str:
        """The engine's backend that runs it without compiling anything."""
        return "eager"

    def segment(
        self,
        number: int,
        x: Tensor,
        choice: int | Tensor,
        *,
        decide: bool = True,
        dropout_mask: Tensor | None = None,
    ) -> SegmentOutput:
        """Run segment `number` on what the one before it returned (segment 0: on images)."""
        raise NotImplementedError

    def segment_hidden(self, number: int, x: Tensor, choice: int | Tensor) -> tuple[Tensor, Tensor]:
        """As `segment`, with the next gate's hidden features (B, R) in place of its logits."""
        raise NotImplementedError

    def forward_gated(self, x: Tensor, choose: Choose) -> GatedOutput:
        """Every row along the widths that its gates choose, differentiable through them."""
        raise NotImplementedError

    def _run_segment(
        self, number: int, x: Tensor, index: int, dropout_mask: Tensor | None
    ) -> Tensor:
        return self.segment(number, x, index, decide=False, dropout_mask=dropout_mask).features

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def _check_gated(self, x: Tensor) -> None:
        if self.training:
            raise RuntimeError("forward_gated uses running statistics: call net.eval() first")
        self.check_input(x)

    def check_input(self, x: Tensor) -> None:
        """Raise `ValueError` unless x is a batch of images that the network takes."""
        if x.ndim != 4 or x.shape[1] != self.spec.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: {self.spec.name} takes "
                f"(rows, {self.spec.in_channels}, height, width)"
            )
        self.spec.check_image_size(x.shape[2], x.shape[3])

    def _resolve(self, x: Tensor, route: Route | str | Sequence[int]) -> Program:
        self.check_input(x)
        checked = route if isinstance(route, Route) else Route.parse(route)
        return _program(self, self.spec.segment_indices(checked))

    # Each route's program has a code object of its own and this dispatcher is left to Python:
    # torch.compile gives up on a code object after 8 shapes or constants, silently.
    @_left_to_python
    def forward(
        self, x: Tensor, route: Route | str | Sequence[int], *, dropout_mask: Tensor | None = None
    ) -> Tensor:
        """Static forward: images (B, in_channels, H, W) along one route -> logits (B, classes).

        `route` is a `Route`, its text or its widths. `dropout_mask` multiplies the pooled features
        (the caller draws it, so that randomness is an argument).

        Raises:
            UsageError: if the route is not one of the network's, or the image is too small.
            ValueError: if x is not a batch of images with the spec's channels.
        """
        resolve = ElasticNet._resolve
        if "torch._dynamo" in sys.modules:  # else nothing is being compiled
            resolve = _disabled(resolve)
        return resolve(self, x, route)(self, x, dropout_mask)

    def forward_many(
        self,
        x: Tensor,
        routes: Sequence[Route | str | Sequence[int]],
        *,
        dropout_mask: Tensor | None = None,
        run_segment: RunSegment | None = None,
        after_trunk: bool = False,
    ) -> list[Tensor]:
        """Static forward along several routes -> logits (B, classes) of each, in order.

        Segments that routes share from the images on (the trunk above all) run once, with equal
        results and gradients. In training mode BN's running statistics there take one update.
        `run_segment` stands in for this network's own `segment`, compiled say. With `after_trunk`,
        x is what segment 0 gives for the images, (B, C, H, W), and segment 0 does not run.

        Raises:
            As `forward`.
        """
        if not after_trunk:
            self.check_input(x)
        run = run_segment or self._run_segment
        paths = [self.spec.segment_indices(self.spec.coerce_route(route)) for route in routes]
        done: dict[tuple[int, ...], Tensor] = {(0,) if after_trunk else (): x}
        for path in paths:
            for number, index in enumerate(path):
                here = path[: number + 1]
                if here not in done:
                    done[here] = run(number, done[path[:number]], index, dropout_mask)
        return [done[path] for path in paths]

    def slimming_parameters(self) -> list[nn.Parameter]:
        """The weights of the slimming heads: all that stage II trains."""
        weights = (m.slimming_weight for m in self.modules() if isinstance(m, Gate))
        return [weight for weight in weights if weight is not None]


class SlimNet(ElasticNet):
    """A dynamic slimmable network built from a spec.

    `net(x, route)` runs one sub-network; `net.forward_gated(x, choose)` masks every row by its
    gates and is differentiable through them; `net.segment(j, x, index)` is one piece of either,
    which `dynaslim.Engine` runs on buckets of rows. All three agree to float tolerance.
    The route is an argument: nothing is stored on the module between calls.

    A static forward does not use the slimming heads: freeze them (stage I) before wrapping it in
    `DistributedDataParallel`. `torch.compile(net, fullgraph=True)` works;
    inside another module that is compiled, leave `fullgraph` off.
    """

    def __init__(
        self,
        spec: NetSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        make = LayerFactory(spec.activation, device, dtype)
        stages = []
        ins: Sequence[int] = (spec.in_channels,)
        max_in = spec.in_channels
        for number, stage in enumerate(spec.stages):
            outs = spec.slot_widths(number)
            blocks = []
            for index in range(stage.blocks):
                block = make_block(make, stage, index, ins, outs)
                gated = stage.gate is not None and index == 0
                has_heads = stage.block in GATE_AT_ENTRANCE
                if has_heads and (gated or spec.attention_at == "all"):
                    inner = stage.expansion if stage.block == "inverted_residual" else 1
                    block.gate = Gate(
                        max_in * inner,
                        gate_hidden(spec, max_in),
                        len(stage.gate.choices) if gated and stage.gate is not None else 0,
                        spec.attention,
                        device=device,
                        dtype=dtype,
                    )
                blocks.append(block)
                ins, max_in = outs, stage.widths[-1]
            stages.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(max_in, spec.num_classes, device=device, dtype=dtype)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

        # the spec as plain tables, so that a compiler traces only list look-ups
        self._choices = ((0,), *(gate.choices for gate in spec.gates))
        self._starts = (0, *spec.gated_stages, len(spec.stages))
        self._slots = [
            # the teacher last: `LARGEST` is -1
            [spec.width(number, index).slot for index in (*range(spec.num_widths), LARGEST)]
            for number in range(len(spec.stages))
        ]

    # -- one piece ----------------------------------------------------------------------------

    def _block(self, stage: int, index: int) -> Block:
        blocks = self.stages[stage]
        assert isinstance(blocks, nn.ModuleList)
        block = blocks[index]
        assert isinstance(block, Block)
        return block

    def _width(self, segment: int, stage: int, choice: int | Tensor) -> AnyWidth:
        """The width that a stage's layers run at: a BN slot, or one for every row."""
        if isinstance(choice, int):
            return self._slots[stage][choice]
        slots = tuple(self._slots[stage][index] for index in self._choices[segment])
        return slots[0] if len(set(slots)) == 1 else SoftWidth(choice, slots)

    def segment(
        self,
        number: int,
        x: Tensor,
        choice: int | Tensor,
        *,
        decide: bool = True,
        dropout_mask: Tensor | None = None,
    ) -> SegmentOutput:
        """Run segment `number` on what the one before it returned (segment 0: on images).

        `choice` is the width index of the segment (0 for the trunk, `LARGEST` for the teacher's),
        or a one-hot gate (B, K). `decide` asks for the next gate's logits; `dropout_mask`
        multiplies the pooled features of the last segment, (B, C) or broadcastable.
        """
        x, gate = self._before_gate(number, x, choice)
        if gate is not None:
            scaled, gate_logits = gate(x, decide=decide)
            return SegmentOutput(scaled, gate_logits)
        pooled_BC = x.mean((2, 3))
        if dropout_mask is not None:
            pooled_BC = pooled_BC * dropout_mask
        weight, bias = self.classifier.weight, self.classifier.bias
        return SegmentOutput(slim_linear(pooled_BC, weight, len(bias), bias), None)

    def segment_hidden(self, number: int, x: Tensor, choice: int | Tensor) -> tuple[Tensor, Tensor]:
        """As `segment`, with the next gate's hidden features (B, R) in place of its logits.

        The logits of any slimming head (K, R) are a linear function of them. The last segment has
        no gate behind it.
        """
        x, gate = self._before_gate(number, x, choice)
        assert gate is not None, "no gate behind the last segment"
        hidden_BR = gate.hidden(x)
        return gate.attend(x, hidden_BR), hidden_BR

    def _before_gate(
        self, number: int, x: Tensor, choice: int | Tensor
    ) -> tuple[Tensor, Gate | None]:
        """A segment's layers up to the next gate, and that gate; None behind the last segment."""
        start, stop = self._starts[number], self._starts[number + 1]
        width_before: AnyWidth = 0  # of the input images, which no BN normalises
        for stage in range(start, stop):
            width = self._width(number, stage, choice)
            for index in range(self.spec.stages[stage].blocks):
                block = self._block(stage, index)
                if number > 0 and stage == start and index == 0:
                    x = block.back(x, width)  # its front and gate ended the segment before
                else:
                    x = block(x, width_before, width)
                width_before = width
        if stop == len(self.stages):
            return x, None
        gated = self._block(stop, 0)
        assert gated.gate is not None
        return gated.front(x, width_before), gated.gate

    def forward_gated(self, x: Tensor, choose: Choose) -> GatedOutput:
        """Gated forward: every row masked to the widths its gates choose, differentiable.

        images (B, in_channels, H, W) -> logits (B, classes), gate logits and gates (B, K) each.
        Costs what the widest choices cost; for speed use `Engine`.

        Raises:
            RuntimeError: in training mode. Rows of one batch differ in width, so there are no
                batch statistics to use; where gates are trained the supernet is frozen.
        """
        self._check_gated(x)
        gate_logits: list[Tensor] = []
        gates: list[Tensor] = []
        choice: int | Tensor = 0
        for number in range(self.spec.num_segments):
            x, logits_BK = self.segment(number, x, choice)
            if logits_BK is not None:
                choice = choose(logits_BK, number)
                gate_logits.append(logits_BK)
                gates.append(choice)
        return GatedOutput(x, tuple(gate_logits), tuple(gates))
