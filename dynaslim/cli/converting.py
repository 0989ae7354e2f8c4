"""The verb that makes a dynamic slimmable network of a trained one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim._files import check_writable
from dynaslim.cli.output import errors_as_data, print_json, say
from dynaslim.errors import check
from dynaslim.recipes import parse_names, parse_shares

if TYPE_CHECKING:
    from torch import Tensor

    from dynaslim.preprocessing import Preprocessing

BATCHES: Final = 8
ROWS: Final = 32
"""Images that channels are sorted by: a few batches are enough."""


def convert(
    model: str,
    out: Path,
    *,
    weights: Path | None = None,
    data: str | None = None,
    split: str = "train",
    image_size: int | None = None,
    num_classes: int | None = None,
    widths: str = "0.25,0.5,0.75,1",
    gate_at: str = "",
    protect: str = "",
    other_sizes: str = "",
    importance: str | None = None,
    json: bool = False,
) -> None:
    """Make a dynamic slimmable network of a trained convolutional one.

    The channels behind the gate are sorted by importance, so that narrow routes keep the best. At
    full width the network answers as the model does; narrow routes are to be trained:
    dynaslim train supernet --init OUT.

    Args:
        model: timm:NAME, torchvision:NAME or module:FILE.py:FUNCTION, a function that returns a
            torch module. A file is run as it is.
        out: The checkpoint to write (.safetensors).
        weights: Weights of the model, .safetensors or .pth. Default: random ones.
        data: A few of these images sort the channels: an image folder, parquet files or a name on
            the hub. Default: the statistics of batch normalisation.
        split: Split of the data.
        image_size: Side of the image in pixels that the network is for. Default: the model's.
        num_classes: Classes of the model, where its library takes them.
        widths: Shares of the channels behind the gate, rising to 1.
        gate_at: Modules behind which gates are put, separated by commas. Default: one gate, where
            most multiply-adds can be saved.
        protect: Modules whose channels stay whole, separated by commas.
        other_sizes: Further sides in pixels of images that the network is for, such as 128,160.
        importance: What sorts the channels: activation (of the data), bn or weight. Default:
            activation with data, else bn.
        json: Print one JSON object.
    """
    with errors_as_data(json):
        check_writable(out)
        shown = _converted(
            model, out, weights, data, split, image_size, num_classes, widths, gate_at, protect,
            other_sizes, importance,
        )  # fmt: skip
    if json:
        print_json(shown)
        return
    say(
        f"{out}: {shown['model']}, {shown['params'] / 1e6:.2f} M parameters, "
        f"{shown['num_classes']} classes"
    )
    say(
        f"gate behind {', '.join(shown['gates_behind'])}; {shown['groups']} groups of channels, "
        f"sorted by {shown['sorted_by']}"
    )
    most = shown["routes"][-1]["madds"]
    for route in shown["routes"]:
        name, madds = "-".join(map(str, route["widths"])), route["madds"]
        say(f"route {name}: {madds / 1e6:.1f} M multiply-adds, {madds / most:.0%}")
    for place, reason in shown["whole"].items():
        say(f"whole: {place}: {reason}")
    for output in shown["outputs_left_out"]:
        say(f"left out: the model's output {output}")
    error = shown["relative_error"]
    say(f"at full width it answers as the model does, to {error:.0e} of the largest")


def _converted(
    model: str,
    out: Path,
    weights: Path | None,
    data: str | None,
    split: str,
    image_size: int | None,
    num_classes: int | None,
    widths: str,
    gate_at: str,
    protect: str,
    other_sizes: str,
    importance: Any,
) -> dict[str, Any]:
    """Convert and write a model; returns what was made of it."""
    shares = parse_shares(widths)
    sides = [int(part) if part.isdigit() else 0 for part in parse_names(other_sizes)]
    check(all(sides), f"--other-sizes {other_sizes}: expected sides in pixels such as 128,160")

    from dynaslim.checkpoint import Checkpoint, save
    from dynaslim.conversion.source import load_source
    from dynaslim.cost import madds, params

    source = load_source(model, weights=weights, num_classes=num_classes, image_size=image_size)
    pre = source.preprocessing
    side = pre.image_size_px
    conversion = source.conversion(shares, parse_names(gate_at), parse_names(protect))
    images = None if data is None else _images(data, split, pre)
    net = conversion.net(images, [(other, other) for other in sides], importance)
    spec = net.spec
    save(out, Checkpoint(net=net, preprocessing=pre))
    return {
        "out": str(out),
        "model": spec.name,
        "num_classes": spec.num_classes,
        "image_size_px": side,
        "other_sizes_px": sides,
        "params": params(spec),
        "gates_behind": list(spec.cuts),
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


def _images(data: str, split: str, pre: Preprocessing) -> Iterator[Tensor]:
    """Some batches of network inputs (B, C, H, W), drawn from all images."""
    from dynaslim.data import open_source
    from dynaslim.data.feed import ImageFeed
    from dynaslim.data.images import ImageDataset
    from dynaslim.data.transforms import normalise

    opened = ImageDataset.of(open_source(data, split), pre)
    check(len(opened) > 0, f"{data}: no images")
    feed = ImageFeed(opened, min(ROWS, len(opened)), 0)
    count = min(BATCHES, feed.steps_per_epoch)
    return (normalise(pixels, pre) for pixels, _ in feed.batches(0, count))
