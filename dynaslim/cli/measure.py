"""Verbs that measure a network on labelled images, or calibrate it on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim._files import check_writable, write_atomic
from dynaslim.cli.output import (
    class_table,
    echo,
    evaluation_table,
    new_table,
    print_json,
    print_skipped,
)
from dynaslim.errors import DataError, UsageError, check
from dynaslim.graph import AnySpec
from dynaslim.model_names import (
    MANIFEST,
    checkpoint_file,
    find_model,
    is_hub_address,
    run_or_checkpoint,
)
from dynaslim.recipes import ReportOptions
from dynaslim.spec import Route

if TYPE_CHECKING:
    import torch

    from dynaslim.checkpoint import Checkpoint
    from dynaslim.cost import CostTable
    from dynaslim.data.images import ImageDataset
    from dynaslim.data.source import ImageSource
    from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
    from dynaslim.runtime.calibrate_budget import Outcome

MOST_CLASSES: Final = 20
"""With more classes, their table is only in the JSON."""
SHOWN: Final = 10
"""Number of budgets in the printed table; the checkpoint has more."""


@dataclass(frozen=True)
class ImageOptions:
    """Labelled images, and how a network runs on them; validated without importing torch."""

    data: str
    """A parquet file or a folder of such files, a folder of images by class, or a hub name."""
    batch_size: int = 256
    """Images per batch."""
    corrupt_limit: float = 0.01
    """Share of images that may fail to decode; such images are skipped."""
    device: str = "cpu"
    """cpu, cuda or mps."""

    def __post_init__(self) -> None:
        from dynaslim.data.layout import check_path

        check(self.batch_size >= 1, f"--batch-size {self.batch_size}: must be at least 1")
        check(
            0 <= self.corrupt_limit <= 1,
            f"--corrupt-limit {self.corrupt_limit}: must be between 0 and 1",
        )
        check_device(self.device)
        check_path(self.data)


@dataclass(frozen=True)
class CalibrateOptions(ImageOptions):
    """`ImageOptions` for the images that BN statistics are computed from."""

    batches: int = 100
    """Number of batches to average over, at most one pass over the data."""
    batch_size: int = 128
    """Images per batch."""
    corrupt_limit: float = 0.01
    """Share of images that may fail to decode; other images replace them."""
    seed: int = 0
    """Seed of the order of the images."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the main process."""

    def __post_init__(self) -> None:
        check(
            self.batches >= 1 and self.batch_size >= 2,
            "--batches must be at least 1 and --batch-size at least 2",
        )
        check(self.workers >= 0, f"--workers {self.workers}: must not be negative")
        super().__post_init__()


def evaluate(
    checkpoint: Path,
    *,
    images: ImageOptions,
    split: str | None = None,
    route: str | None = None,
    views: int = 1,
    table: Path | None = None,
    json: bool = False,
) -> None:
    """Measure every route and the dynamic mode on labelled images.

    Args:
        checkpoint: A checkpoint file, the folder of a run or of an exported package, or the name of
            a model that ships.
        images: The images, and how the network is run on them.
        split: Split of the data; "test" also accepts a split called validation. Default: test; in a
            set without splits, the images that the network was not trained on.
        route: Measure only this route, such as 12-24-48-80-160, besides the dynamic mode.
        views: Test-time augmentation: average over this many views of each image, 1 to 10.
        table: Parquet file to write with a row for every image: file, label, prediction, route,
            confidence, MAdds.
        json: Print one JSON object.
    """
    from dynaslim.preprocessing import MAX_VIEWS

    # errors are found before torch is imported and a large set is opened
    check(1 <= views <= MAX_VIEWS, f"--views {views}: must be from 1 to {MAX_VIEWS}")
    if table is not None:
        check_writable(table)
    parsed = None if route is None else Route.parse(route)
    find_model(checkpoint, ("checkpoint", "package"))

    from dynaslim import evaluation
    from dynaslim.data.images import open_images
    from dynaslim.progress import progress
    from dynaslim.runtime.program_net import read_model

    loaded, file = read_model(checkpoint)
    preprocessing = loaded.needed_preprocessing(file)
    loaded.net.to(to_device(images.device))
    routes = None if parsed is None else (loaded.net.spec.coerce_route(parsed),)
    opened = open_images(loaded, images.data, split or "test", corrupt_limit=images.corrupt_limit)
    opened, note = _without_trained_images(opened, file, split)
    source = opened.source
    assert source is not None
    with progress("evaluating", len(opened)) as bar:
        result = evaluation.evaluate(
            loaded,
            opened,
            preprocessing,
            batch_size=images.batch_size,
            routes=routes,
            on_batch=bar.advance,
            views=views,
        )
    if table is not None:
        evaluation.write_table(table, result, opened)
    if json:
        print_json(
            {
                "data": source.name,
                "split": source.split,
                "trained_on": note,
                "unreadable": list(opened.skipped.lines),
                **result.to_dict(),
            }
        )
        return
    echo(
        f"{checkpoint} on {source.name} [{source.split}]: {result.images} images, "
        f"{result.skipped} skipped"
    )
    print_skipped(opened.skipped.lines)
    if note:
        echo(note)
    echo(evaluation_table(result))
    if len(result.per_class) <= MOST_CLASSES:
        echo(class_table(result))
    if table is not None:
        echo(f"{table}: a line for every image")


def _without_trained_images(
    images: ImageDataset, checkpoint: Path, split: str | None
) -> tuple[ImageDataset, str]:
    """The images to measure, and a note if the network was trained on some of them.

    Those are left out if the set has no splits and no split was given.
    """
    from dynaslim.data.layout import WHOLE

    known = trained_rows(images, checkpoint)
    count, total = int(known.sum()), len(images)
    if not count:
        return images, ""
    whole = images.source is not None and images.source.split == WHOLE
    if split is None and whole and count < total:
        return images.subset((~known).nonzero().flatten()), (
            f"{total - count} of {total} images, which training held out; it was trained on the "
            f"others (--split {WHOLE} measures all)"
        )
    return images, (
        f"the network was trained on {count} of these {total} images: expect less elsewhere"
    )


def trained_rows(images: ImageDataset, *files: Path) -> torch.Tensor:
    """(N,) bool: whether any network in these files was trained on each image, as runs record."""
    import torch

    from dynaslim.runs.folder import trained_on

    seen = frozenset[str]().union(*map(trained_on, files))
    if not seen:
        return torch.zeros(len(images), dtype=torch.bool)
    return torch.tensor([digest in seen for digest in images.digests()], dtype=torch.bool)


def calibrate(
    checkpoint: Path,
    out: Path,
    *,
    images: CalibrateOptions,
    split: str = "train",
    json: bool = False,
) -> None:
    """Recompute a network's BN statistics for every route, as after training.

    Args:
        checkpoint: A checkpoint file, the folder of a run, or the name of a model that ships.
        out: The checkpoint to write (.safetensors); may be the same file.
        images: The images, and how the network is run on them.
        split: Split of the data.
        json: Print one JSON object.
    """
    check_writable(out)
    file = checkpoint_file(checkpoint)

    from dynaslim.checkpoint import read, save
    from dynaslim.data import open_source
    from dynaslim.data.feed import ImageFeed
    from dynaslim.data.images import ImageDataset
    from dynaslim.data.transforms import normalise
    from dynaslim.progress import progress
    from dynaslim.train import recalibrate

    loaded = read(file)
    preprocessing = loaded.needed_preprocessing(file)
    source = open_source(images.data, split)
    opened = ImageDataset.of(source, preprocessing, corrupt_limit=images.corrupt_limit)
    size = min(images.batch_size, len(opened))
    feed = ImageFeed(opened, size, images.seed, workers=images.workers)
    count = min(images.batches, feed.steps_per_epoch)
    target = to_device(images.device)
    loaded.net.to(target)
    drawn = (normalise(pixels.to(target), preprocessing) for pixels, _ in feed.batches(0, count))
    with progress("recalibrating", count) as bar:
        recalibrate(loaded.net, drawn, on_batch=bar.advance)
    # earlier measurements were made with other statistics
    save(out, replace(loaded, metrics={}, budget=None))
    if json:
        left_out = list(feed.skipped.lines)
        print_json(
            {"out": str(out), "batches": count, "batch_size": feed.batch_size, "left_out": left_out}
        )
        return
    echo(
        f"{out}: BN statistics of every route from {count} batches of {feed.batch_size} images, "
        f"{feed.skipped.count} skipped"
    )
    print_skipped(feed.skipped.lines)


def calibrate_budget(
    checkpoint: Path,
    *,
    images: ImageOptions,
    split: str | None = None,
    out: Path | None = None,
    table: Path | None = None,
    budget: str | None = None,
    json: bool = False,
) -> None:
    """Measure a trained gate at every budget, and store the results in the checkpoint.

    Args:
        checkpoint: A checkpoint file with a trained gate, or the folder of a run or of a package.
        images: The images, and how the network is run on them.
        split: Split of the data. Default: the images that training held out, as recorded in the
            checkpoint's recipe.
        out: The checkpoint to write (.safetensors). Default: the same file. A package stores the
            curve in its manifest.
        table: A cost table in ms for this network, for budgets such as 4.5ms.
        budget: Also show the result of this budget: 0.6 (of the widest route's cost), 250M, 4.5ms
            or drop=0.3 (points of top-1).
        json: Print one JSON object.
    """
    from dynaslim.runtime.budget import parse_budget

    # errors are found before torch is imported and a large set is opened
    kind = None if budget is None else parse_budget(budget)[0]
    if kind == "ms" and table is None:
        raise UsageError(f"--budget {budget}: give a cost table in ms with --table")
    if out is None and is_hub_address(checkpoint):
        raise UsageError(f"{checkpoint}: is on the hub; name the checkpoint to write with --out")
    found = find_model(checkpoint, ("checkpoint", "package"))
    if found.kind == "package":
        check(out is None, f"--out {out}: a package gets the curve itself; copy its folder first")
        check_writable(found.path / MANIFEST)
    else:
        out = check_writable(found.path if out is None else out)

    from dynaslim.checkpoint import save
    from dynaslim.cost_file import read_cost_table
    from dynaslim.data.images import open_images
    from dynaslim.runtime.calibrate_budget import count_paths
    from dynaslim.runtime.package import write_budget
    from dynaslim.runtime.program_net import read_model

    loaded, file = read_model(checkpoint)
    preprocessing = loaded.needed_preprocessing(file)
    spec = loaded.net.spec
    count_paths(spec)
    latency = None
    if table is not None:
        latency = read_cost_table(table, spec, image_size=preprocessing.image_size_px)
        if latency.unit != "ms":
            raise UsageError(f"--table {table}: is in {latency.unit}, give one in ms")
    held_share, given_split = None, split
    if split is None:
        split, held_share = _held_out_split(checkpoint, loaded.recipe)
    opened = open_images(
        loaded, images.data, split, share=held_share, corrupt_limit=images.corrupt_limit
    )
    opened, note = _without_trained_images(opened, file, given_split)
    source = opened.source
    assert source is not None
    net = loaded.net.to(to_device(images.device))
    curve, uniform = measure_curve(loaded, opened, images.batch_size, latency)
    point = None if budget is None else curve.at(budget)
    if out is None:
        write_budget(file, curve.to_dict())
    else:
        save(out, replace(loaded, net=net.cpu(), budget=curve.to_dict()))
    if json:
        print_json(
            {
                "data": source.name,
                "split": source.split,
                "held_back": held_share,
                "images": curve.images,
                "mirror": loaded.mirror,
                "unreadable": list(opened.skipped.lines),
                "routes": [
                    {"widths": list(r.widths), "madds": o.madds, "ms": o.ms, "top1": o.top1}
                    for r, o in uniform
                ],
                "budget": None if point is None else {"asked": budget, **asdict(point)},
                "curve": curve.to_dict(),
            }
        )
        return
    held = "" if held_share is None else ", those that training held out"
    print_measured(f"{checkpoint}", opened, curve, held)
    if note:
        echo(note)
    elif split == "train" and held_share is None:
        echo("the gate was trained on this split: expect less than these numbers elsewhere")
    if not loaded.mirror:
        echo("no mirror images: the recipe does not state that they keep their class")
    echo(curve_table(curve, spec, uniform))
    if point is not None:
        echo(points_table(f"budget {budget}", {"": point}, spec, timed=latency is not None))
    echo(f"{file if out is None else out}: {len(curve.points)} points of cost and accuracy")


def measure_curve(
    loaded: Checkpoint,
    opened: ImageDataset,
    batch_size: int,
    latency: CostTable | None = None,
    on_answers: Callable[..., None] | None = None,
) -> tuple[BudgetCurve, list[tuple[Route, Outcome]]]:
    """Measure the budget curve of a network on images, and the uniform routes for comparison.

    Raises:
        DataError: if the images do not fit the network, or are too few to distinguish settings.
    """
    from dynaslim.runtime.budget_search import fit_curve
    from dynaslim.runtime.calibrate_budget import answer_images, uniform_outcomes

    preprocessing, spec = loaded.preprocessing, loaded.net.spec
    assert preprocessing is not None
    assert opened.source is not None
    opened.check_fits(preprocessing, spec.num_classes)
    _check_enough(opened.source, len(opened))
    answers = answer_images(loaded, opened, batch_size, on_answers=on_answers)
    _check_enough(opened.source, len(answers))
    curve = fit_curve(answers, latency=latency)
    curve.check_fits(spec, mirror=loaded.mirror)
    return curve, uniform_outcomes(answers, latency=latency)


def print_measured(what: str, opened: ImageDataset, curve: BudgetCurve, held: str = "") -> None:
    """Print the images that a curve was measured on."""
    from dynaslim.runtime.budget_search import FEW_IMAGES

    source, skipped = opened.source, opened.skipped
    assert source is not None
    echo(
        f"{what} on {source.name} [{source.split}]: {curve.images} images{held}, "
        f"{skipped.count} skipped"
    )
    print_skipped(skipped.lines)
    if curve.images < FEW_IMAGES:
        echo(
            f"few images: of less than {FEW_IMAGES:,} the points are hard to tell apart; "
            f"top-1 has its 95% interval"
        )


def _held_out_split(checkpoint: Path, recipe: Mapping[str, Any]) -> tuple[str, float | None]:
    """The validation split of training, or the training split and the share held out of it."""
    from dynaslim.data.images import held_out

    hint = "name a split of images that it was not trained on with --split"
    kept = {found and (found.split, found.share) for found in held_out(recipe)}
    if not kept:
        raise UsageError(f"{checkpoint}: does not record which images training held out; {hint}")
    if len(kept) > 1:
        raise UsageError(f"{checkpoint}: its two stages held out different images; {hint}")
    found = kept.pop()
    if found is None:
        raise UsageError(f"{checkpoint}: training held out no images; {hint}")
    return found


def _check_enough(source: ImageSource, images: int) -> None:
    from dynaslim.runtime.budget_search import FEW_IMAGES, LEAST_IMAGES

    if images < LEAST_IMAGES:
        raise DataError(
            f"{source.name} [{source.split}]: has {images} images to measure budgets on, too few "
            f"to tell settings apart; give at least {LEAST_IMAGES}, better {FEW_IMAGES:,}"
        )


def curve_table(curve: BudgetCurve, spec: AnySpec, uniform: list[tuple[Route, Outcome]]) -> Any:
    """A table of about `SHOWN` evenly spaced budgets, and the uniform routes."""
    lowest = curve.cheapest_madds / curve.widest_madds
    shares = [lowest + (1 - lowest) * n / (SHOWN - 1) for n in range(SHOWN)]
    shown = {f"{share:.2f}": curve.at(min(share, 1.0)) for share in shares}
    if curve.points[-1].share > 1:  # if a second run of unsure images pays off
        dearest = f"{math.ceil(100 * curve.points[-1].share) / 100:.2f}"
        shown[dearest] = curve.at(dearest)
    table = points_table("budget", shown, spec, timed=curve.widest_ms is not None)
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


def points_table(
    title: str, points: Mapping[str, BudgetPoint], spec: AnySpec, *, timed: bool
) -> Any:
    """A table of points of the budget curve, by name."""
    ms_column = ["ms"] if timed else []
    table = new_table(title, "MAdds", *ms_column, "top-1", "escalated", "to", "tau", "shift")
    for name, point in points.items():
        targets = [
            "mirror" if mirror else str(spec.route_along(path))
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


def report(
    run: Path, *, out: Path = Path("report.html"), options: ReportOptions, json: bool = False
) -> None:
    """Write an HTML page about a run: accuracy, cost, time, routes, images, training.

    Args:
        run: The folder of a run, of the demo or of a package, a checkpoint file, a folder of
            save_pretrained, an hf:// address, or the name of a model that ships.
        out: The page to write (.html); a single file that needs no others.
        options: How the report is made.
        json: Print one JSON object.
    """
    from dynaslim.data.layout import check_path

    run_or_checkpoint(run)
    check_writable(out)
    check_device(options.device)
    if options.data is not None:
        check_path(options.data)

    from dynaslim.report import build_report

    to_device(options.device)
    made = build_report(run, options)
    write_atomic(out, made.html.encode())
    if json:
        print_json({"out": str(out), **made.summary})
        return
    for note in made.summary["notes"]:
        echo(note)
    echo(f"{out}: {made.summary['headline']}")


def check_device(name: str) -> None:
    """Raise `UsageError` for an unknown kind of device, without importing torch."""
    known = name.partition(":")[0] in ("cpu", "cuda", "mps")
    check(known, f"--device {name}: choose cpu, cuda or mps")


def to_device(name: str) -> torch.device:
    """A device by name; raises `UsageError` if this machine does not have it."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
