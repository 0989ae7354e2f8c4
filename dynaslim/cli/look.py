"""Verbs that look at the zoo, and at what a network costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaslim.cli.output import new_table, print_json, say

if TYPE_CHECKING:
    from dynaslim.spec import NetSpec, Route


def models(*, json: bool = False) -> None:
    """List the models of the zoo.

    Args:
        json: Print one JSON object.
    """
    from dynaslim.cost import params
    from dynaslim.zoo import ZOO

    rows = [
        {
            "model": name,
            "params": params(spec),
            "routes": len(spec.routes),
            "gates": len(spec.gates),
        }
        for name, spec in ZOO.items()
    ]
    if json:
        print_json({"models": rows})
        return
    table = new_table("model", "parameters", "widths", "gates", "gated routes")
    for row in rows:
        spec = ZOO[str(row["model"])]
        table.add_row(
            spec.name,
            f"{params(spec) / 1e6:.2f} M",
            str(len(spec.routes)),
            str(len(spec.gates)),
            str(len(spec.routing_space)),
        )
    say(table)


def info(model: str, *, image_size: int | None = None, json: bool = False) -> None:
    """Show what a model's routes cost: widths, multiply-adds, parameters.

    Args:
        model: A name of the zoo, or a checkpoint file.
        image_size: Side of the image in pixels. Default: the checkpoint's, else 224, or 32 for
            models made for small images.
        json: Print one JSON object.
    """
    from dynaslim.cost import madds, params

    spec, size = _spec_and_size(model, image_size)

    def describe(route: Route) -> dict[str, Any]:
        return {
            "widths": list(route.widths),
            "madds": madds(spec, route, size),
            "params": params(spec, route),
        }

    result = {
        "model": spec.name,
        "params": params(spec),
        "image_size_px": size,
        "routes": [describe(route) for route in spec.routes],
        "largest": describe(spec.largest),
    }
    if json:
        print_json(result)
        return
    say(
        f"{spec.name}: {params(spec) / 1e6:.2f} M parameters, {spec.num_classes} classes, "
        f"{len(spec.gates)} gate(s) with choices "
        f"{', '.join(str(gate.choices) for gate in spec.gates)}, at {size}x{size} px"
    )
    table = new_table("route", "widths", "MAdds", "parameters")
    for number, route in enumerate(spec.routes):
        table.add_row(str(number), *_describe_cells(describe(route)))
    table.add_row("largest", *_describe_cells(describe(spec.largest)))
    say(table)


def _describe_cells(description: dict[str, Any]) -> tuple[str, str, str]:
    return (
        "-".join(map(str, description["widths"])),
        f"{description['madds'] / 1e6:.2f} M",
        f"{description['params'] / 1e6:.3f} M",
    )


def _spec_and_size(model: str, image_size: int | None) -> tuple[NetSpec, int]:
    """A zoo entry's or a checkpoint's spec, with the image size to count at."""
    from dynaslim.zoo import ZOO, get_spec

    path = Path(model)
    if model in ZOO or not (path.exists() or path.suffix or len(path.parts) > 1):
        spec = get_spec(model)
        default = 224 if spec.total_stride >= 32 else 32
    else:
        from dynaslim.checkpoint import read

        checkpoint = read(model)
        spec, pre = checkpoint.net.spec, checkpoint.preprocessing
        default = 224 if pre is None else pre.image_size_px
    return spec, default if image_size is None else image_size
