"""What a model is and what it costs, as plain values: what `info` prints. No torch here."""

from __future__ import annotations

import math
from typing import Any, Final

from dynaslim.cost import layer_costs, madds, params
from dynaslim.runtime.forms import Form, form_madds, route_through
from dynaslim.spec import GATE_AT_ENTRANCE, LARGEST, NetSpec, Route

MOST_ROUTES: Final = 256
"""Routes of a routing space that are told one by one."""


def describe_spec(spec: NetSpec, image_size_px: int) -> dict[str, Any]:
    """An architecture and the costs of its parts for one size of image, as JSON values.

    Costs of segments include what their gates' heads cost, which a route alone does without.

    Raises:
        UsageError: if the images are too small for the network.
    """
    return {
        "model": spec.name,
        "params": params(spec),
        "image_size_px": image_size_px,
        "in_channels": spec.in_channels,
        "num_classes": spec.num_classes,
        "activation": spec.activation,
        "attention": spec.attention,
        "attention_at": spec.attention_at,
        "stages": [_stage(spec, number) for number in range(len(spec.stages))],
        "gates": [_gate(spec, number) for number in range(len(spec.gates))],
        "segments": [_segment(spec, number, image_size_px) for number in range(spec.num_segments)],
        "routes": [describe_route(spec, route, image_size_px) for route in spec.routes],
        "largest": describe_route(spec, spec.largest, image_size_px),
        "routing_space": _routing_space(spec, image_size_px),
    }


def describe_route(spec: NetSpec, route: Route, image_size_px: int) -> dict[str, Any]:
    """Widths, multiply-adds and parameters of the sub-network along a route."""
    return {
        "widths": list(route.widths),
        "madds": madds(spec, route, image_size_px),
        "params": params(spec, route),
    }


def _stage(spec: NetSpec, number: int) -> dict[str, Any]:
    stage = spec.stages[number]
    governing = spec.gate_of(number)
    routed = range(spec.num_widths) if governing is not None else range(1)
    return {
        "block": stage.block,
        "blocks": stage.blocks,
        "kernel": stage.kernel,
        "stride": stage.stride,
        "expansion": stage.expansion,
        "max_pool": stage.max_pool,
        "widths": sorted({spec.width(number, index).channels for index in routed}),
        "largest_width": spec.width(number, LARGEST).channels,
        "gate": governing if stage.gate is not None else None,
        "governed_by": governing,
    }


def _gate(spec: NetSpec, number: int) -> dict[str, Any]:
    at = spec.gated_stages[number]
    return {
        "stage": at,
        "at": "entrance" if GATE_AT_ENTRANCE[spec.stages[at].block] else "behind the depthwise",
        "choices": list(spec.gates[number].choices),
        "widths": [spec.stages[at].widths[index] for index in spec.gates[number].choices],
    }


def _segment(spec: NetSpec, number: int, image_size_px: int) -> dict[str, Any]:
    """The forms of a segment: rows are choices of the gate before it, columns of its own."""
    before = spec.gates[number - 2].choices if number > 1 else (0,)
    own = spec.gates[number - 1].choices if number > 0 else (0,)
    forms = [[Form(number, a, b) for b in own] for a in before]
    size = (image_size_px, image_size_px)
    return {
        "in_choices": list(before),
        "out_choices": list(own),
        "madds": [[round(form_madds(spec, form, size)) for form in row] for row in forms],
        "params": [[_form_params(spec, form, image_size_px) for form in row] for row in forms],
    }


def _form_params(spec: NetSpec, form: Form, image_size_px: int) -> int:
    layers = layer_costs(spec, route_through(spec, form), image_size_px)
    return sum(layer.params for layer in layers if layer.segment == form.segment)


def _routing_space(spec: NetSpec, image_size_px: int) -> dict[str, Any]:
    """The routes that the gates can take; of very many, only how many they are."""
    size = math.prod(len(gate.choices) for gate in spec.gates)
    routes = spec.routing_space if size <= MOST_ROUTES else None
    return {
        "size": size,
        "cheapest": describe_route(spec, spec.cheapest_choice, image_size_px),
        "widest": describe_route(spec, spec.widest_choice, image_size_px),
        "routes": None
        if routes is None
        else [describe_route(spec, route, image_size_px) for route in routes],
    }
