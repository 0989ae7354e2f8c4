"""Verbs that list the zoo's models, and describe a network and its costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from dynaslim.cascade_spec import CascadeSpec
from dynaslim.cli.output import echo, new_table, print_json, printable
from dynaslim.cost import madds, params, segment_cost
from dynaslim.graph import AnySpec, GraphSpec
from dynaslim.model_names import MANIFEST, find_model
from dynaslim.shipped import IMAGENET, PICTURES, PRETRAINED, names
from dynaslim.spec import GATE_AT_ENTRANCE, TEACHER_INDEX, NetSpec, Route
from dynaslim.zoo import ZOO, get_spec

if TYPE_CHECKING:
    from dynaslim.checkpoint import Checkpoint
    from dynaslim.preprocessing import Preprocessing
    from dynaslim.runtime.package import Package

FEW: Final = 24
"""Up to this number, segment variants are shown one by one; otherwise as a range per segment."""
MOST_ROUTES: Final = 256
"""Up to this number, the routes of a routing space are listed in the JSON."""
SHOWN: Final = 6
"""Most items of a list that are shown."""


def models(*, json: bool = False) -> None:
    """List the models of the zoo: size, input, and the costs of their cheapest and widest routes.

    Args:
        json: Print one JSON object.
    """
    rows: list[dict[str, Any]] = []
    for name, spec in ZOO.items():
        size = spec.usual_image_size
        rows.append(
            {
                "model": name,
                "params": params(spec),
                "image_size_px": size,
                "cheapest_madds": madds(spec, spec.smallest, size),
                "widest_madds": madds(spec, spec.routes[-1], size),
                "routes": len(spec.routes),
                "gates": len(spec.gates),
                "gated_routes": len(spec.routing_space),
            }
        )
    extra = [IMAGENET, *PRETRAINED]
    if json:
        print_json({"models": rows, "shipped": list(names()), "extra_imagenet": extra})
        return
    table = new_table(
        "model", "parameters", "input px", "cheapest", "widest", "widths", "gates", "gated routes"
    )
    for row in rows:
        table.add_row(
            row["model"],
            _millions(row["params"]),
            str(row["image_size_px"]),
            _millions(row["cheapest_madds"]),
            _millions(row["widest_madds"]),
            str(row["routes"]),
            str(row["gates"]),
            str(row["gated_routes"]),
        )
    echo(table)
    echo("cheapest, widest: multiply-adds along a route; dynaslim info MODEL shows more")
    echo(f"networks that ship: {', '.join(names())}; to try it: dynaslim predict {PICTURES}")
    echo(f"with pip install 'dynaslim[imagenet]': {', '.join(extra)}")


def info(model: str, *, image_size: int | None = None, json: bool = False) -> None:
    """Describe a model: its stages, gates, segments, routes and costs, and what its file holds.

    Args:
        model: The name of a model in the zoo or of one that ships, a spec file (.yaml), a
            checkpoint file, or the folder of a run or of an exported package.
        image_size: Side of the image in pixels. Default: the checkpoint's, else 224, or 32 for
            models designed for small images.
        json: Print one JSON object.
    """
    spec, pre, contents = _open(model)
    usual = spec.usual_image_size if pre is None else pre.image_size_px
    size = usual if image_size is None else image_size
    if isinstance(spec, GraphSpec):
        summary = _describe_converted(spec, size)
    elif isinstance(spec, CascadeSpec):
        rungs = list(map(asdict, spec.rungs))
        trunk = None if spec.trunk is None else asdict(spec.trunk)
        summary = {**_describe_size(spec, spec.image_size_px), "rungs": rungs, "trunk": trunk}
    else:
        summary = _describe_spec(spec, size)
    if json:
        print_json({**summary, **contents})
        return
    for kind, holds in contents.items():
        echo("\n".join(_contents_lines(kind, holds)))
        echo("" if holds["budget"] is None else _budget_table(holds["budget"]))
    if isinstance(spec, GraphSpec):
        _print_converted(summary)
    elif isinstance(spec, CascadeSpec):
        _print_cascade(summary)
    else:
        _print_architecture(summary)


def _open(model: str) -> tuple[AnySpec, Preprocessing | None, dict[str, Any]]:
    """A model's spec, its preprocessing, and the other content of its file or folder."""
    found = find_model(model)
    if found.kind == "architecture":
        return get_spec(model), None, {}
    from dynaslim.runtime.package import file_digest, open_package

    held: Checkpoint | Package
    if found.kind == "package":
        held = open_package(found.path)
        spec, manifest = held.spec, held.manifest
        own = {
            "folder": str(found.path),
            "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
            "sha256": held.source.key,
            "precision": held.source.precision,
            "metrics": dict(manifest.get("metrics") or {}),
            "notes": dict(manifest.get("notes") or {}),
            "versions": dict(manifest.get("versions") or {}),
            "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
        }
    else:
        from dynaslim.checkpoint import read

        held = read(found.path)
        spec = held.net.spec
        own = {
            "file": str(found.path),
            "bytes": found.path.stat().st_size,
            "sha256": file_digest(found.path),
            "metrics": dict(held.metrics),
            "recipe": dict(held.recipe),
        }
    shared = {
        "class_names": None if held.class_names is None else list(held.class_names),
        "preprocessing": held.preprocessing and held.preprocessing.to_dict(),
        "budget": held.budget and dict(held.budget),
    }
    return spec, held.preprocessing, {found.kind: {**own, **shared}}


# -- as plain values ------------------------------------------------------------------------------


def _describe_spec(spec: NetSpec, image_size_px: int) -> dict[str, Any]:
    """An architecture and the costs of its parts for one image size, as JSON values.

    Costs of segments include the slimming heads of their gates; costs of routes do not.
    """
    return {
        **_describe_size(spec, image_size_px),
        "activation": spec.activation,
        "attention": spec.attention,
        "attention_at": spec.attention_at,
        "stages": [_stage(spec, number) for number in range(len(spec.stages))],
        "gates": [_gate(spec, number) for number in range(len(spec.gates))],
        "segments": [_segment(spec, number, image_size_px) for number in range(spec.num_segments)],
        "routes": [_describe_route(spec, route, image_size_px) for route in spec.routes],
        "largest": _describe_route(spec, spec.largest, image_size_px),
        "routing_space": _routing_space(spec, image_size_px),
    }


def _describe_size(spec: AnySpec, image_size_px: int) -> dict[str, Any]:
    return {
        "model": spec.name,
        "params": params(spec),
        "image_size_px": image_size_px,
        "in_channels": spec.in_channels,
        "num_classes": spec.num_classes,
    }


def _describe_converted(spec: GraphSpec, image_size_px: int) -> dict[str, Any]:
    """A converted network and its costs, as JSON values."""
    routes = [_describe_route(spec, route, image_size_px) for route in spec.routes]
    least, whole = (
        madds(spec, route, image_size_px, slimming_heads=True)
        for route in (spec.smallest, spec.largest)
    )
    return {
        **_describe_size(spec, image_size_px),
        "operations": len(spec.nodes),
        "sorted_by": spec.sorted_by,
        "gates": [
            {"behind": place, "choices": list(gate.choices)}
            for place, gate in zip(spec.places, spec.gates, strict=True)
        ],
        "groups": [
            {"units": group.units, "segment": group.segment, "widths": list(group.widths)}
            for group in spec.groups
        ],
        "elastic_share": 1 - least / whole,
        "routes": routes,
        "largest": routes[-1],
        "routing_space": {"routes": None},
    }


def _print_converted(summary: Mapping[str, Any]) -> None:
    size = summary["image_size_px"]
    echo(
        f"{summary['model']}, converted: {_millions(summary['params'])} parameters, "
        f"{summary['num_classes']} classes; costs at {size}x{size} px"
    )
    for number, gate in enumerate(summary["gates"]):
        echo(f"gate {number}, behind {gate['behind']}: width indices {_few(gate['choices'], 12)}")
    echo(
        f"{len(summary['groups'])} groups of channels, sorted by {summary['sorted_by']}; the "
        f"narrowest route saves {summary['elastic_share']:.0%} of the multiply-adds"
    )
    echo(_routes_table(summary))


def _print_cascade(summary: Mapping[str, Any]) -> None:
    size = summary["image_size_px"]
    echo(
        f"{summary['model']}: a cascade of {len(summary['rungs'])} networks, "
        f"{summary['num_classes']} classes, images of {size}x{size} px"
    )
    table = new_table("rung", "network", "px", "MAdds", "parameters", "of the last")
    for number, rung in enumerate(summary["rungs"], start=1):
        table.add_row(
            str(number),
            printable(rung["name"]),
            str(rung["image_size_px"]),
            _millions(rung["madds"]),
            _millions(rung["params"]),
            f"{rung['madds'] / summary['rungs'][-1]['madds']:.3f}",
        )
    echo(table)
    if summary["trunk"] is not None:
        shared = ", ".join(str(number + 1) for number in summary["trunk"]["rungs"])
        echo(
            f"rungs {shared} share a trunk of {_millions(summary['trunk']['madds'])} multiply-adds"
        )


def _describe_route(spec: AnySpec, route: Route, image_size_px: int) -> dict[str, Any]:
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
        "largest_width": spec.width(number, TEACHER_INDEX).channels,
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
    """A segment's variants: rows are choices of the previous gate, columns of the segment's own."""
    before = spec.gates[number - 2].choices if number > 1 else (0,)
    own = spec.gates[number - 1].choices if number > 0 else (0,)
    size = (image_size_px, image_size_px)
    costs = [[segment_cost(spec, number, a, b, size) for b in own] for a in before]
    return {
        "in_choices": list(before),
        "out_choices": list(own),
        "madds": [[cost.madds + cost.pool_adds + cost.head_madds for cost in row] for row in costs],
        "params": [[cost.params + cost.head_params for cost in row] for row in costs],
    }


def _routing_space(spec: NetSpec, image_size_px: int) -> dict[str, Any]:
    """The routes that the gates can choose; if there are too many, their number and extremes."""
    size = math.prod(len(gate.choices) for gate in spec.gates)
    routes = spec.routing_space if size <= MOST_ROUTES else None
    return {
        "size": size,
        "cheapest": _describe_route(spec, spec.cheapest_choice, image_size_px),
        "widest": _describe_route(spec, spec.widest_choice, image_size_px),
        "routes": None
        if routes is None
        else [_describe_route(spec, route, image_size_px) for route in routes],
    }


# -- for a person ---------------------------------------------------------------------------------


def _contents_lines(kind: str, holds: Mapping[str, Any]) -> Iterator[str]:
    """What a checkpoint or package holds besides its network, line by line."""
    from dynaslim.interop.card import measured

    def line(label: str, summary: str) -> str:
        return f"{label:<11}{summary}"

    size = f"{holds['bytes'] / 1e6:.2f} MB"
    if kind == "package":
        files = len(holds["files"])
        yield line(kind, f"{holds['folder']}: {files} files, {size}, {holds['precision']}")
        yield line("sha256", f"{holds['sha256']} ({MANIFEST})")
        made_by = ", ".join(f"{name} {version}" for name, version in holds["versions"].items())
        yield line("made by", made_by)
    else:
        yield line(kind, f"{holds['file']}: {size}")
        yield line("sha256", holds["sha256"])
    names = holds["class_names"]
    yield line("classes", "not named" if names is None else f"{len(names)}: {_few(names)}")
    pre = holds["preprocessing"]
    if pre is None:
        yield line("images", "no preprocessing is stored")
    else:
        side, crop = pre["image_size_px"], pre["crop_fraction"]
        mean, std = (", ".join(f"{v:.3f}" for v in pre[name]) for name in ("mean", "std"))
        cropped = "" if crop == 1 else f", the centre {crop:g} of the shorter side"
        yield line("images", f"{side}x{side} px{cropped}; mean {mean}; std {std}")
    results = list(measured(holds["metrics"]))
    for result in results:
        yield line("measured", result.line())
    if not results:
        yield line("measured", "nothing")
    if holds.get("recipe"):
        yield line("recipe", ", ".join(holds["recipe"]) + " (--json shows it)")
    budget = holds["budget"]
    if budget is None:
        yield line("budget", "not calibrated: dynaslim calibrate-budget")
    else:
        share = budget["cheapest_madds"] / budget["widest_madds"]
        yield line(
            "budget",
            f"{share:.2f} to 1 of the widest route's cost, {len(budget['points'])} points, top-1 "
            f"{budget['cheapest_top1']:.2%} to {budget['widest_top1']:.2%} on {budget['images']} "
            f"images",
        )


def _budget_table(budget: Mapping[str, Any]) -> Any:
    """A table of evenly spaced points of a budget curve, from the cheapest to the widest."""
    points = budget["points"]
    last = max(1, min(SHOWN, len(points)) - 1)
    numbers = sorted({round(n * (len(points) - 1) / last) for n in range(last + 1)})
    table = new_table("budget", "MAdds", "top-1", "escalated")
    for point in (points[number] for number in numbers):
        table.add_row(
            f"{point['share']:.3f}",
            _millions(point["madds"]),
            f"{point['top1']:.2%}",
            f"{point['escalated']:.1%}",
        )
    return table


def _print_architecture(summary: Mapping[str, Any]) -> None:
    size = summary["image_size_px"]
    echo(
        f"{summary['model']}: {_millions(summary['params'])} parameters, "
        f"{summary['num_classes']} classes, {summary['in_channels']} input channels; "
        f"costs at {size}x{size} px"
    )
    echo(_stages_table(summary))
    for number, gate in enumerate(summary["gates"]):
        place = gate["at"] + ("" if gate["at"] == "entrance" else " convolution")
        echo(
            f"gate {number}, stage {gate['stage']}, {place}: picks {_few(gate['widths'], 12)} "
            f"(width indices {_few(gate['choices'], 12)})"
        )
    echo(_segments_table(summary))
    echo(_routes_table(summary))
    space = summary["routing_space"]
    if summary["gates"]:
        echo(
            f"the gates choose among {space['size']} routes, "
            f"{_millions(space['cheapest']['madds'])} to {_millions(space['widest']['madds'])} "
            f"MAdds; segments include the heads of their gates, routes do not"
        )


def _stages_table(summary: Mapping[str, Any]) -> Any:
    table = new_table("stage", "block", "blocks", "kernel", "stride", "widths", "gate")
    table.columns[1].justify = table.columns[5].justify = table.columns[6].justify = "left"
    for number, stage in enumerate(summary["stages"]):
        widths = stage["widths"]
        shown = _few(widths) if len(widths) <= SHOWN else _span(widths)
        if stage["largest_width"] > widths[-1]:
            shown += f" (largest {stage['largest_width']})"
        governing = stage["governed_by"]
        gate = "" if governing is None else f"by gate {governing}"
        block = stage["block"].replace("_", " ") + (", max pool" if stage["max_pool"] else "")
        if stage["expansion"] > 1:
            block += f" x{stage['expansion']}"
        table.add_row(
            str(number),
            block,
            str(stage["blocks"]),
            str(stage["kernel"]),
            str(stage["stride"]),
            shown,
            gate if stage["gate"] is None else f"gate {governing}",
        )
    return table


def _segments_table(summary: Mapping[str, Any]) -> Any:
    """A table of MAdds and parameters of every variant, or of their ranges for each segment."""
    table = new_table("segment", "variant", "MAdds", "parameters")
    table.columns[1].justify = "left"
    variants = list(_variants(summary))
    if len(variants) <= FEW:
        for number, before, own, cost, size in variants:
            name = "trunk" if own is None else f"{own}" if before is None else f"{before} → {own}"
            table.add_row(str(number), name, _millions(cost), _millions(size))
        return table
    for number in range(len(summary["segments"])):
        costs, sizes = zip(
            *(variant[3:] for variant in variants if variant[0] == number), strict=True
        )
        table.add_row(
            str(number),
            "trunk" if number == 0 else f"{len(costs)} variants",
            _span([_millions(min(costs)), _millions(max(costs))]),
            _span([_millions(min(sizes)), _millions(max(sizes))]),
        )
    return table


def _variants(
    summary: Mapping[str, Any],
) -> Iterator[tuple[int, int | None, int | None, int, int]]:
    """Yield segment, width coming in, own width, MAdds and parameters of every variant."""
    for number, segment in enumerate(summary["segments"]):
        own = summary["gates"][number - 1]["widths"] if number > 0 else [None]
        before = summary["gates"][number - 2]["widths"] if number > 1 else [None]
        for a, costs, sizes in zip(before, segment["madds"], segment["params"], strict=True):
            yield from ((number, a, b, c, s) for b, c, s in zip(own, costs, sizes, strict=True))


def _routes_table(summary: Mapping[str, Any]) -> Any:
    table = new_table("route", "widths", "MAdds", "parameters", "of the widest", "gates pick")
    widest = summary["routes"][-1]["madds"]
    listed = summary["routing_space"]["routes"]
    chosen = None if listed is None else [route["widths"] for route in listed]
    rows = [(str(number), route) for number, route in enumerate(summary["routes"])]
    if summary["largest"] != summary["routes"][-1]:
        rows.append(("largest", summary["largest"]))
    for name, route in rows:
        can = (
            "" if chosen is None or not summary["gates"] or route["widths"] not in chosen else "yes"
        )
        table.add_row(
            name,
            "-".join(map(str, route["widths"])),
            _millions(route["madds"]),
            _millions(route["params"]),
            f"{route['madds'] / widest:.3f}",
            can,
        )
    return table


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.2f} k"


def _few(items: Any, most: int = SHOWN) -> str:
    """The first items of a list, and how many more there are."""
    more = len(items) - most
    return ", ".join(printable(str(item)) for item in items[:most]) + (
        f", and {more} more" if more > 0 else ""
    )


def _span(rising: Any) -> str:
    first, last = str(rising[0]), str(rising[-1])
    many = f" ({len(rising)})" if len(rising) > 2 else ""
    return first if first == last else f"{first} to {last}{many}"
