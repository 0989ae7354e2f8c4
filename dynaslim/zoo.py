"""The zoo of architectures: one explicit dict of specs by name. New entries are tested too.

A network of your own needs no entry: `write_spec` writes its spec to a file, whose name can be used
wherever a name of the zoo can.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from dynaslim._files import read_yaml, write_atomic
from dynaslim.errors import UsageError
from dynaslim.shipped import names
from dynaslim.spec import GateSpec, NetSpec, StageSpec

SPEC_SUFFIXES: Final = (".yaml", ".yml")
"""Suffixes of spec files."""


def _conv(*widths: int, kernel: int = 3, stride: int = 1, max_pool: bool = False) -> StageSpec:
    return StageSpec(widths, block="conv", kernel=kernel, stride=stride, max_pool=max_pool)


def _ds_mbnet() -> NetSpec:
    """DS-MBNet exactly as released (arXiv 2103.13258): a slimmable MobileNetV1, 7.68 M parameters.

    The released code restricts the gate to widths (0, 1, 2, 3); here its choices span all 14.
    """
    return NetSpec(
        name="ds_mbnet",
        stages=(
            _conv(16, 24, stride=2),
            StageSpec((32, 88)),
            StageSpec((48, 168), blocks=2, stride=2),
            StageSpec((96, 264), blocks=2, stride=2),
            StageSpec(tuple(range(224, 641, 32)), blocks=6, stride=2, gate=GateSpec((0, 4, 9, 13))),
            StageSpec(tuple(range(736, 1153, 32)), blocks=2, stride=2),
        ),
    )


def _ds_mbnet_tiny() -> NetSpec:
    """The shape of DS-MBNet for 32x32 input, 0.7 to 2.9 M MAdds: trains in minutes on a CPU."""
    return NetSpec(
        name="ds_mbnet_tiny",
        stages=(
            _conv(12, 16, stride=2),
            StageSpec((24, 32)),
            StageSpec((48, 64), stride=2),
            StageSpec((48, 80, 112, 144), blocks=2, gate=GateSpec((0, 1, 2, 3))),
            StageSpec((96, 160, 224, 288), stride=2),
        ),
        num_classes=10,
    )


def _ds_resnet50() -> NetSpec:
    """DS-ResNet-50 (arXiv 2103.13258, section 4; not released): ratios 1/4 to 1, four gates.

    The paper does not specify the place of a gate. Here it is at the entrance of its stage, where
    only one tensor crosses. The routes are all 4^4 combinations.
    """

    def stage(width: int, blocks: int, stride: int) -> StageSpec:
        widths = tuple(width * quarter // 4 for quarter in (1, 2, 3, 4))
        gate = GateSpec((0, 1, 2, 3))
        return StageSpec(widths, "bottleneck", blocks, stride=stride, expansion=4, gate=gate)

    return NetSpec(
        name="ds_resnet50",
        stages=(
            _conv(64, kernel=7, stride=2, max_pool=True),
            stage(256, 3, 1),
            stage(512, 4, 2),
            stage(1024, 6, 2),
            stage(2048, 3, 2),
        ),
        activation="relu",
        attention="one_plus_tanh",
        attention_at="gated",
        reduction=1 / 16,
    )


def _ds_mobilenet_v2() -> NetSpec:
    """A dynamic slimmable MobileNetV2 (arXiv 1801.04381): inverted residuals, two gates.

    The first block of a stage has no shortcut, so only one tensor crosses the gate behind its
    depthwise convolution. The widest route is MobileNetV2 1.0 except for its narrower trunk.
    """

    def stage(
        *widths: int, blocks: int, stride: int = 1, expansion: int = 6, gated: bool = False
    ) -> StageSpec:
        gate = GateSpec(tuple(range(len(widths)))) if gated else None
        return StageSpec(
            widths, "inverted_residual", blocks, stride=stride, expansion=expansion, gate=gate
        )

    return NetSpec(
        name="ds_mobilenet_v2",
        stages=(
            _conv(16, 32, stride=2),
            stage(8, 16, blocks=1, expansion=1),
            stage(16, 24, blocks=2, stride=2),
            stage(24, 32, blocks=3, stride=2),
            stage(32, 40, 48, 64, blocks=4, stride=2, gated=True),
            stage(48, 64, 80, 96, blocks=3),
            stage(80, 104, 128, 160, blocks=3, stride=2, gated=True),
            stage(160, 208, 256, 320, blocks=1),
            _conv(640, 832, 1024, 1280, kernel=1),
        ),
        activation="relu6",
    )


def _ds_resnet_cifar() -> NetSpec:
    """A residual network of basic blocks for 32x32 input (ResNet-20's shape), two gates."""

    def stage(*widths: int, stride: int) -> StageSpec:
        return StageSpec(widths, "basic", 3, stride=stride, gate=GateSpec((0, 1, 2, 3)))

    return NetSpec(
        name="ds_resnet_cifar",
        stages=(
            _conv(16),
            StageSpec((16,), "basic", 3),
            stage(16, 32, 48, 64, stride=2),
            stage(32, 64, 96, 128, stride=2),
        ),
        num_classes=10,
        activation="relu",
        attention="one_plus_tanh",
        attention_at="gated",
    )


def _ds_resnet8_cifar() -> NetSpec:
    """A minimal residual network of basic blocks for 32x32 input (ResNet-8's depth), one gate.

    It is small enough to train on a CPU. The trunk is cheap and the last stages are wide, so the
    widest route costs about seven times the cheapest. The gate is behind the first block.
    """

    def stage(*widths: int, gated: bool = False) -> StageSpec:
        gate = GateSpec(tuple(range(len(widths)))) if gated else None
        return StageSpec(widths, "basic", 1, stride=2, gate=gate)

    return NetSpec(
        name="ds_resnet8_cifar",
        stages=(
            _conv(16),
            stage(24),
            stage(24, 48, 80, 128, gated=True),
            stage(48, 96, 160, 256),
        ),
        num_classes=10,
        activation="relu",
        attention="one_plus_tanh",
        attention_at="gated",
        reduction=2.0,  # large, because the gate's only input is the trunk's few channels
    )


_ENTRIES = (
    _ds_mbnet,
    _ds_mbnet_tiny,
    _ds_mobilenet_v2,
    _ds_resnet50,
    _ds_resnet_cifar,
    _ds_resnet8_cifar,
)

ZOO: Final = MappingProxyType({spec.name: spec for spec in (entry() for entry in _ENTRIES)})
"""The spec of every built-in architecture, by name."""


def get_spec(name: str, *, num_classes: int | None = None) -> NetSpec:
    """The spec of a zoo entry or of a spec file; `num_classes` replaces its number of classes.

    Raises:
        UsageError: for an unknown name (the message lists the known ones), a file that is not a
            spec, or a class count below 1.
    """
    if is_spec_file(name):
        spec = _read_spec(name)
    elif name in ZOO:
        spec = ZOO[name]
    else:
        close = difflib.get_close_matches(name, ZOO, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(
            f"model {name!r} is unknown: {hint}choose from {', '.join(ZOO)}, or name a file of a "
            f"spec ({', '.join(SPEC_SUFFIXES)}); trained networks that ship: {', '.join(names())}"
        )
    return spec if num_classes is None else spec.replace(num_classes=num_classes)


def is_spec_file(name: str) -> bool:
    """Whether a model's name is the name of a spec file."""
    return name.lower().endswith(SPEC_SUFFIXES)


def write_spec(path: str | Path, spec: NetSpec) -> Path:
    """Write a spec as YAML for `get_spec` to read; fields with default values are left out.

    Raises:
        UsageError: if the name does not have the suffix of a spec file.
        OSError: if the file cannot be written.
    """
    import yaml

    if not is_spec_file(str(path)):
        raise UsageError(f"{path}: a spec file is called {' or '.join(SPEC_SUFFIXES)}")
    # flow style None puts the innermost lists (the widths) on one line
    text = yaml.safe_dump(_non_defaults(spec), sort_keys=False, default_flow_style=None, width=100)
    return write_atomic(path, text.encode())


def _non_defaults(part: Any) -> Any:
    """Plain values of a spec or a part of it, without fields that have default values."""
    if dataclasses.is_dataclass(part):
        fields = ((f, getattr(part, f.name)) for f in dataclasses.fields(part))
        return {f.name: _non_defaults(value) for f, value in fields if value != f.default}
    return [_non_defaults(item) for item in part] if isinstance(part, tuple) else part


def _read_spec(path: str) -> NetSpec:
    data = read_yaml(path)
    if not isinstance(data, dict) or "stages" not in data:
        raise UsageError(f"{path}: expected the spec of a network: name, stages, ...")
    try:
        return NetSpec.from_dict(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
