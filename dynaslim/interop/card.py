"""The model card of a checkpoint: its network, measured accuracy and cost. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from dynaslim.cost import params
from dynaslim.model_names import WEIGHTS
from dynaslim.runtime.budget import BudgetCurve

if TYPE_CHECKING:
    from dynaslim.checkpoint import Checkpoint


@dataclass(frozen=True)
class Measured:
    """An evaluation stored in a checkpoint's metrics (`Evaluation.to_dict`), validated."""

    split: str
    """The images measured on: "held-out" (the checkpoint was selected by them) or "test"."""
    images: int
    routes: tuple[tuple[str, float, float], ...]
    """Name, MAdds and top-1 (0..1) of each route, in the stored order."""
    dynamic: tuple[float, float] | None
    """Mean MAdds and top-1 (0..1) when the gates choose; None if that was not measured."""

    def line(self) -> str:
        """A summary in one line."""
        parts = []
        if self.dynamic is not None:
            parts.append(f"dynamic {self.dynamic[1]:.2%} at {self.dynamic[0] / 1e6:.2f} M MAdds")
        if self.routes:
            tops = [top1 for _, _, top1 in self.routes]
            parts.append(f"routes {min(tops):.2%} to {max(tops):.2%}")
        return f"top-1 on {self.images} {self.split} images: {'; '.join(parts)}"


_SPLITS: Final = {"": "test", "val": "held-out"}


def measured(metrics: Mapping[str, Any]) -> Iterator[Measured]:
    """Yield the evaluations among a checkpoint's metrics; other entries are skipped."""
    candidates = {"": metrics, **metrics}
    for name, value in candidates.items():
        if not isinstance(value, Mapping) or "images" not in value or "routes" not in value:
            continue
        try:
            found = _evaluation(_SPLITS.get(name, name), value)
        except (TypeError, KeyError, ValueError):
            continue
        if found.routes or found.dynamic is not None:
            yield found


def _evaluation(split: str, value: Mapping[str, Any]) -> Measured:
    dynamic = value.get("dynamic")
    return Measured(
        split,
        int(value["images"]),
        tuple(
            ("-".join(map(str, route["widths"])), float(route["madds"]), float(route["top1"]))
            for route in value["routes"]
        ),
        None if dynamic is None else (float(dynamic["mean_madds"]), float(dynamic["top1"])),
    )


# -- the card -------------------------------------------------------------------------------------

CLASSES: Final = 20
"""Largest number of class names in a card; `config.json` lists all of them."""
SHARES: Final = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Budgets listed in a card, as shares of the widest route's cost."""


def dataset_of(recipe: Mapping[str, Any]) -> str | None:
    """The data set named in a recipe: a hub name or the last part of a path; None if none is."""
    for stage in ("supernet", "gate"):
        data = (recipe.get(stage) or {}).get("data") or {}
        if data.get("path"):
            return str(_without_folders(data["path"]))
    return None


def card_text(checkpoint: Checkpoint, *, repo: str) -> str:
    """The body of a model card in Markdown: the network's accuracy, cost and usage."""
    spec, pre = checkpoint.net.spec, checkpoint.preprocessing
    size = "" if pre is None else f", for images of {pre.image_size_px}x{pre.image_size_px} px"
    parts = [
        f"# {spec.name}",
        f"A dynamic slimmable network of {spec.num_classes} classes{size}: one set of weights, "
        f"{params(spec) / 1e6:.2f} M parameters. A gate looks at each image after the first "
        f"layers and picks how many channels the rest uses. The method is DS-Net "
        f"([arXiv 2103.13258](https://arxiv.org/abs/2103.13258)); the Python package `dynaslim` "
        f"runs it.",
        *_results(checkpoint),
        *_budgets(checkpoint.budget),
        "## Use",
        _USE.replace("REPO", repo).replace("FILE", f"hf://{repo}" if "/" in repo else WEIGHTS),
        *_images(checkpoint),
        *_recipe(checkpoint.recipe),
    ]
    return "\n\n".join(parts) + "\n"


_USE = """```python
import dynaslim

checkpoint = dynaslim.Checkpoint.from_pretrained("REPO")
engine = dynaslim.Engine(checkpoint)
logits, routes, madds = engine(x)  # x: normalised images (rows, channels, height, width)
```

On the command line:

    dynaslim info FILE
    dynaslim predict FILE photos --json
    dynaslim serve FILE"""


def _results(checkpoint: Checkpoint) -> Iterator[str]:
    for result in measured(checkpoint.metrics):
        rows = ["| | multiply-adds | top-1 |", "| --- | ---: | ---: |"]
        for route, cost, top1 in result.routes:
            rows.append(f"| route {route} | {cost / 1e6:.2f} M | {top1:.2%} |")
        if result.dynamic is not None:
            cost, top1 = result.dynamic
            rows.append(f"| **dynamic** (by the gates) | {cost / 1e6:.2f} M | {top1:.2%} |")
        yield "## Results"
        yield (
            f"Top-1 on {result.images} {result.split} images. A route is the width of each stage; "
            f"without the gate one route serves all images."
        )
        yield "\n".join(rows)


def _budgets(budget: Mapping[str, Any] | None) -> Iterator[str]:
    if budget is None:
        return
    curve = BudgetCurve.from_dict(budget)
    rows = ["| budget | multiply-adds | top-1 |", "| ---: | ---: | ---: |"]
    lowest = curve.cheapest_madds / curve.widest_madds
    for share in (share for share in SHARES if share >= lowest):
        point = curve.at(share)
        rows.append(f"| {share:g} | {point.madds / 1e6:.2f} M | {point.top1:.2%} |")
    yield "## Budgets"
    yield (
        f"`engine(x, budget=0.6)` keeps the mean cost within 0.6 of the widest route's. Measured "
        f"on {curve.measured_images} held-out images:"
    )
    yield "\n".join(rows)


def _images(checkpoint: Checkpoint) -> Iterator[str]:
    pre, names = checkpoint.preprocessing, checkpoint.class_names
    yield "## Images and classes"
    if pre is not None:
        colour = "grey" if pre.channels == 1 else "RGB"
        side = round(pre.image_size_px / pre.crop_fraction)
        mean, std = (", ".join(f"{v:.4f}" for v in values) for values in (pre.mean, pre.std))
        yield (
            f"{colour}; the shorter side resized to {side} px, the centre cropped to "
            f"{pre.image_size_px}x{pre.image_size_px} px, scaled to 0..1, normalised by mean "
            f"({mean}) and deviation ({std}). The command line and the server do it themselves."
        )
    if names is not None:
        more = f", and {len(names) - CLASSES} more (`config.json`)" if len(names) > CLASSES else ""
        yield f"{len(names)} classes: {', '.join(names[:CLASSES])}{more}."
    if pre is None and names is None:
        yield "The checkpoint has neither preprocessing nor names of classes."


def _recipe(recipe: Mapping[str, Any]) -> Iterator[str]:
    if not recipe:
        return
    import yaml

    text = yaml.safe_dump(_without_folders(recipe), sort_keys=False, default_flow_style=None)
    yield "## Training"
    yield f"```yaml\n{text.rstrip()}\n```"


def _without_folders(value: Any) -> Any:
    """A copy of a nested value in which each path is reduced to its last part."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", ".")):
        return PurePath(value).name
    return value
