"""The verb that measures what a gate gives over a range of costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim.cli.output import new_table, print_json, say, say_skipped

if TYPE_CHECKING:
    from dynaslim.data.source import ImageSource
    from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
    from dynaslim.runtime.calibrate_budget import Outcome
    from dynaslim.spec import NetSpec, Route

SHOWN: Final = 10
"""Budgets in the table for a person; the checkpoint has more."""


def calibrate_budget(
    checkpoint: Path,
    *,
    data: str,
    split: str | None = None,
    out: Path | None = None,
    table: Path | None = None,
    budget: str | None = None,
    batch_size: int = 256,
    corrupt_limit: float = 0.01,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Measure what a trained gate gives at every budget, and keep it in the checkpoint.

    Args:
        checkpoint: A checkpoint file with a trained gate, or the folder of a run.
        data: A parquet file or a folder of them, a folder of images by class, or a hub name.
        split: Split of the data. By default the images that training held back, as the
            checkpoint's recipe says.
        out: The checkpoint to write (.safetensors); by default the same.
        table: A cost table in ms for this network, for budgets such as 4.5ms.
        budget: Show what this budget gives too: 0.6 (of the widest route's cost), 250M, 4.5ms or
            drop=0.3 (points of top-1).
        batch_size: Images per batch.
        corrupt_limit: Share of images that may turn out not to decode; they are left out.
        device: cpu, cuda or mps.
        json: Print one JSON object.
    """
    from dataclasses import asdict, replace

    from dynaslim._files import check_writable
    from dynaslim.cli.measure import check_device, to_device, unseen
    from dynaslim.data.layout import check_path
    from dynaslim.errors import UsageError
    from dynaslim.pretrained import checkpoint_file, is_hub_address
    from dynaslim.runtime.budget import parse_budget

    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: must be at least 1")
    if not 0 <= corrupt_limit <= 1:
        raise UsageError(f"--corrupt-limit {corrupt_limit}: must be between 0 and 1")
    # what can be refused at once is, before torch is imported and a large set is opened
    kind = None if budget is None else parse_budget(budget)[0]
    if kind == "ms" and table is None:
        raise UsageError(f"--budget {budget}: give a cost table in ms with --table")
    if out is None and is_hub_address(checkpoint):
        raise UsageError(f"{checkpoint}: is on the hub; name the checkpoint to write with --out")
    check_device(device)
    file = checkpoint_file(checkpoint)
    out = check_writable(file if out is None else out)
    check_path(data)

    from dynaslim.checkpoint import read_prepared, save
    from dynaslim.cost_file import read_cost_table
    from dynaslim.data.images import open_images
    from dynaslim.data.transforms import readable_batches
    from dynaslim.progress import progress
    from dynaslim.runtime.budget_search import FEW_IMAGES, fit_curve, split_rows
    from dynaslim.runtime.calibrate_budget import answer_paths, count_paths, uniform_outcomes

    loaded, preprocessing = read_prepared(file)
    spec = loaded.net.spec
    count_paths(spec)
    latency = None
    if table is not None:
        latency = read_cost_table(table, spec, image_size=preprocessing.image_size_px)
        if latency.unit != "ms":
            raise UsageError(f"--table {table}: is in {latency.unit}, give one in ms")
    held_share, asked_split = None, split
    if split is None:
        split, held_share = _held_back(checkpoint, loaded.recipe)
    images = open_images(loaded, data, split, share=held_share, corrupt_limit=corrupt_limit)
    images, told = unseen(images, file, asked_split)
    source = images.source
    assert source is not None
    images.check_fits(preprocessing, spec.num_classes)
    _check_enough(source, len(images))
    net = loaded.net.to(to_device(device))
    with progress("running every path", len(images)) as bar:
        answers = answer_paths(
            net,
            readable_batches(images, preprocessing, batch_size),
            mirror=loaded.mirror,
            on_batch=bar.advance,
        )
    _check_enough(source, len(answers))
    curve = fit_curve(answers, latency=latency)
    curve.check_fits(spec, mirror=loaded.mirror)
    asked = None if budget is None else curve.at(budget)
    uniform = uniform_outcomes(answers, latency=latency, rows=split_rows(len(answers))[1])
    save(out, replace(loaded, net=net.cpu(), budget=curve.to_dict()))
    if json:
        print_json(
            {
                "data": source.name,
                "split": source.split,
                "held_back": held_share,
                "images": curve.images,
                "mirror": loaded.mirror,
                "unreadable": list(images.skipped.lines),
                "routes": [
                    {"widths": list(r.widths), "madds": o.madds, "ms": o.ms, "top1": o.top1}
                    for r, o in uniform
                ],
                "budget": None if asked is None else {"asked": budget, **asdict(asked)},
                "curve": curve.to_dict(),
            }
        )
        return
    held = "" if held_share is None else ", those that training held back"
    skipped = images.skipped
    say(
        f"{checkpoint} on {source.name} [{source.split}]: {curve.images} images{held}, "
        f"{skipped.count} skipped"
    )
    say_skipped(skipped.lines)
    if curve.images < FEW_IMAGES:
        say(
            f"few images: of less than {FEW_IMAGES:,} the points are hard to tell apart; "
            f"top-1 has its 95% interval"
        )
    if told:
        say(told)
    elif split == "train" and held_share is None:
        say("the gate was trained on this split: expect less than these numbers elsewhere")
    if not loaded.mirror:
        say("no second look: the recipe does not say that mirror images keep their class")
    say(_curve_table(curve, spec, uniform))
    if asked is not None:
        say(_points_table(f"budget {budget}", {"": asked}, spec, timed=latency is not None))
    say(f"top-1 is measured on {curve.reporting_images} images, the points picked by the others")
    say(f"{out}: {len(curve.points)} points of cost and accuracy")


def _held_back(checkpoint: Path, recipe: Mapping[str, Any]) -> tuple[str, float | None]:
    """The split that training chose by, or its training split and the share held back of it."""
    from dynaslim.data.images import held_out
    from dynaslim.errors import UsageError

    ask = "name a split of images that it was not trained on with --split"
    kept = {found and (found.split, found.share) for found in held_out(recipe)}
    if not kept:
        raise UsageError(f"{checkpoint}: does not say which images training held back; {ask}")
    if len(kept) > 1:
        raise UsageError(f"{checkpoint}: its two stages held back different images; {ask}")
    found = kept.pop()
    if found is None:
        raise UsageError(f"{checkpoint}: training held no images back; {ask}")
    return found


def _check_enough(source: ImageSource, images: int) -> None:
    from dynaslim.errors import DataError
    from dynaslim.runtime.budget_search import FEW_IMAGES, LEAST_IMAGES

    if images < LEAST_IMAGES:
        raise DataError(
            f"{source.name} [{source.split}]: has {images} images to measure budgets on, too few "
            f"to tell settings apart; give at least {LEAST_IMAGES}, better {FEW_IMAGES:,}"
        )


def _curve_table(curve: BudgetCurve, spec: NetSpec, uniform: list[tuple[Route, Outcome]]) -> Any:
    """About `SHOWN` budgets, evenly spaced, and the uniform routes."""
    lowest = curve.cheapest_madds / curve.widest_madds
    shares = [lowest + (1 - lowest) * n / (SHOWN - 1) for n in range(SHOWN)]
    shown = {f"{share:.2f}": curve.at(min(share, 1.0)) for share in shares}
    if curve.points[-1].share > 1:  # where a second look is worth it
        dearest = f"{math.ceil(100 * curve.points[-1].share) / 100:.2f}"
        shown[dearest] = curve.at(dearest)
    table = _points_table("budget", shown, spec, timed=curve.widest_ms is not None)
    table.add_section()
    for route, outcome in uniform:
        ms = [] if outcome.ms is None else [f"{outcome.ms:.3f}"]
        table.add_row(
            str(route), f"{outcome.madds / 1e6:.2f} M", *ms, f"{outcome.top1:.2%}", "", "", "", ""
        )
    return table


def _accuracy(point: BudgetPoint) -> str:
    if point.top1_interval is None:
        return f"{point.top1:.2%}"
    low, high = point.top1_interval
    return f"{point.top1:.2%} ±{50 * (high - low):.1f}"


def _points_table(
    title: str, points: Mapping[str, BudgetPoint], spec: NetSpec, *, timed: bool
) -> Any:
    ms_column = ["ms"] if timed else []
    table = new_table(title, "MAdds", *ms_column, "top-1", "escalated", "to", "tau", "shift")
    for name, point in points.items():
        targets = [
            "mirror"
            if mirror
            else str(
                spec.route_at([gate.choices[n] for gate, n in zip(spec.gates, path, strict=True)])
            )
            for _, path, mirror in point.escalations
        ]
        table.add_row(
            name or f"{point.share:.3f} of the widest",
            f"{point.madds / 1e6:.2f} M",
            *([] if point.ms is None else [f"{point.ms:.3f}"]),
            _accuracy(point),
            f"{point.escalated:.1%}",
            " > ".join(targets),
            " > ".join(f"{tau:.3f}" for tau, *_ in point.escalations),
            f"{point.shift:.3g}",
        )
    return table
