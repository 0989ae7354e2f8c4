"""The verb `convert`, which turns a trained network into a dynamic slimmable one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dynaslim._files import check_writable
from dynaslim.cli.output import echo, errors_as_data, print_json
from dynaslim.errors import check
from dynaslim.recipes import parse_names, parse_shares

IMAGES: Final = 256
"""Number of images that the channels are sorted by."""


@dataclass(frozen=True)
class ConvertOptions:
    """How a trained network is converted."""

    weights: Path | None = None
    """Weights of the model, .safetensors or .pth. Default: random weights."""
    data: str | None = None
    """Images, of which a few are used to sort the channels: an image folder, parquet files or a hub
    name. Default: sort by the statistics of batch normalisation."""
    split: str = "train"
    """Split of the data."""
    image_size: int | None = None
    """Side in pixels of the images that the network will run on. Default: the model's."""
    num_classes: int | None = None
    """Number of classes of the model, if its library accepts one."""
    widths: str = "0.25,0.5,0.75,1"
    """Shares of the channels to use behind the gate, rising to 1."""
    gate_at: str = ""
    """Modules behind which gates are put, separated by commas. Default: one gate, where the most
    multiply-adds can be saved."""
    protect: str = ""
    """Modules that keep all channels, separated by commas."""
    other_sizes: str = ""
    """Further sides in pixels of images that the network will run on, such as 128,160."""
    importance: str | None = None
    """What the channels are sorted by: activation (on the data), bn or weight. Default: activation
    with data, else bn."""


def convert(model: str, out: Path, *, options: ConvertOptions, json: bool = False) -> None:
    """Turn a trained convolutional network into a dynamic slimmable one.

    The channels behind the gate are sorted by importance, so that narrow routes keep the best. At
    full width the network gives the model's outputs; narrow routes must be trained next:
    dynaslim train supernet --init OUT.

    Args:
        model: efficientnet_lite0 (or 1, 2), timm:NAME, torchvision:NAME or
            module:FILE.py:FUNCTION, a function that returns a torch module, alone or with its
            Preprocessing. The file is executed.
        out: The checkpoint to write (.safetensors).
        options: How the network is converted.
        json: Print one JSON object.
    """
    with errors_as_data(json):
        check_writable(out)
        shown = _converted(model, out, options)
    if json:
        print_json(shown)
        return
    echo(
        f"{out}: {shown['model']}, {shown['params'] / 1e6:.2f} M parameters, "
        f"{shown['num_classes']} classes"
    )
    echo(
        f"gate behind {', '.join(shown['gates_behind'])}; {shown['groups']} groups of channels, "
        f"sorted by {shown['sorted_by']}"
    )
    most = shown["routes"][-1]["madds"]
    for route in shown["routes"]:
        name, madds = "-".join(map(str, route["widths"])), route["madds"]
        echo(f"route {name}: {madds / 1e6:.1f} M multiply-adds, {madds / most:.0%}")
    for place, reason in shown["whole"].items():
        echo(f"whole: {place}: {reason}")
    for output in shown["outputs_left_out"]:
        echo(f"left out: the model's output {output}")
    error = shown["relative_error"]
    echo(f"at full width it answers as the model does, to {error:.0e} of the largest")


def _converted(model: str, out: Path, options: ConvertOptions) -> dict[str, Any]:
    """Convert and write a model; returns a summary of the network."""
    shares = parse_shares(options.widths)
    sides = [int(part) if part.isdigit() else 0 for part in parse_names(options.other_sizes)]
    check(
        all(sides), f"--other-sizes {options.other_sizes}: expected sides in pixels such as 128,160"
    )

    from dynaslim.checkpoint import Checkpoint, save
    from dynaslim.conversion.source import load_source
    from dynaslim.cost import madds, params
    from dynaslim.data import open_source
    from dynaslim.data.images import ImageDataset
    from dynaslim.data.transforms import sample_batches

    source = load_source(
        model,
        weights=options.weights,
        num_classes=options.num_classes,
        image_size=options.image_size,
    )
    pre = source.preprocessing
    side = pre.image_size_px
    gates, protected = parse_names(options.gate_at), parse_names(options.protect)
    conversion = source.conversion(shares, gates, protected)
    batches = None
    if options.data is not None:
        images = ImageDataset.of(open_source(options.data, options.split), pre)
        check(len(images) > 0, f"{options.data}: no images")
        batches = sample_batches(images, pre, 32, IMAGES)
    importance: Any = options.importance  # checked there, so that --json reports the error
    net = conversion.net(batches, [(other, other) for other in sides], importance)
    spec = net.spec
    save(out, Checkpoint(net=net, preprocessing=pre))
    return {
        "out": str(out),
        "model": spec.name,
        "num_classes": spec.num_classes,
        "image_size_px": side,
        "other_sizes_px": sides,
        "params": params(spec),
        "gates_behind": list(spec.places),
        "groups": len(spec.groups),
        "sorted_by": spec.sorted_by,
        "routes": [
            {"widths": list(route.widths), "madds": madds(spec, route, side)}
            for route in spec.routes
        ],
        "elastic_share": round(float(conversion.elastic_share), 3),
        "whole": conversion.whole(),
        "outputs_left_out": conversion.captured.outputs.others,
        "relative_error": conversion.error,
    }
