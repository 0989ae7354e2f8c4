"""The networks that a user would build instead: one width, alone."""

from __future__ import annotations

from dataclasses import replace

from dynaslim.spec import GateSpec, NetSpec


def static_spec(spec: NetSpec, width: int) -> NetSpec:
    """The network along one uniform route, alone: the same layers, one width everywhere."""
    stages = tuple(
        replace(
            stage,
            widths=(spec.routes[width].widths[number],),
            gate=None if stage.gate is None else GateSpec((0,)),
        )
        for number, stage in enumerate(spec.stages)
    )
    return spec.replace(name=f"{spec.name}_width{width}", stages=stages)
