"""Verbs that measure a network, or make it ready to be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from dynaslim.cli.output import class_table, evaluation_table, print_json, say, say_skipped

if TYPE_CHECKING:
    import torch

    from dynaslim.data.images import ImageDataset

MOST_CLASSES: Final = 20
"""More classes than these are in the JSON, not on the screen."""


def evaluate(
    checkpoint: Path,
    *,
    data: str,
    split: str | None = None,
    route: str | None = None,
    views: int = 1,
    table: Path | None = None,
    batch_size: int = 256,
    corrupt_limit: float = 0.01,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Measure every route and the dynamic mode on labelled images.

    Args:
        checkpoint: A checkpoint file, the folder of a run, or the name of a model that ships.
        data: A parquet file or a folder of them, a folder of images by class, or a hub name.
        split: Split of the data; "test" also takes one called validation. Default: test; of a set
            that is not divided, the images that the network was not trained on.
        route: Measure this route only, beside the dynamic mode, such as 12-24-48-80-160.
        views: Test-time augmentation: mean over so many views of each image, 1 to 10.
        table: Write a line for every image there (parquet): file, label, prediction, route,
            confidence, MAdds.
        batch_size: Images per batch.
        corrupt_limit: Share of images that may turn out not to decode; they are left out.
        device: cpu, cuda or mps.
        json: Print one JSON object.
    """
    from dynaslim._files import check_writable
    from dynaslim.data.layout import check_path
    from dynaslim.errors import UsageError
    from dynaslim.preprocessing import MAX_VIEWS
    from dynaslim.pretrained import checkpoint_file
    from dynaslim.spec import Route

    # what can be refused at once is, before torch is imported and a large set is opened
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: must be at least 1")
    if not 0 <= corrupt_limit <= 1:
        raise UsageError(f"--corrupt-limit {corrupt_limit}: must be between 0 and 1")
    if not 1 <= views <= MAX_VIEWS:
        raise UsageError(f"--views {views}: must be from 1 to {MAX_VIEWS}")
    if table is not None:
        check_writable(table)
    check_device(device)
    asked = None if route is None else Route.parse(route)
    file = checkpoint_file(checkpoint)
    check_path(data)

    from dynaslim import evaluation
    from dynaslim.checkpoint import read_prepared
    from dynaslim.data.images import open_images
    from dynaslim.progress import progress

    loaded, preprocessing = read_prepared(file)
    spec = loaded.net.spec
    routes = None if asked is None else (spec.coerce_route(asked),)
    images = open_images(loaded, data, split or "test", corrupt_limit=corrupt_limit)
    images, told = unseen(images, file, split)
    source = images.source
    assert source is not None
    with progress("evaluating", len(images)) as bar:
        result = evaluation.evaluate(
            loaded.net.to(to_device(device)),
            images,
            preprocessing,
            batch_size=batch_size,
            routes=routes,
            on_batch=bar.advance,
            views=views,
        )
    if table is not None:
        evaluation.write_table(table, result, images)
    if json:
        print_json(
            {
                "data": source.name,
                "split": source.split,
                "trained_on": told,
                "unreadable": list(images.skipped.lines),
                **result.to_dict(),
            }
        )
        return
    say(
        f"{checkpoint} on {source.name} [{source.split}]: {result.images} images, "
        f"{result.skipped} skipped"
    )
    say_skipped(images.skipped.lines)
    if told:
        say(told)
    say(evaluation_table(result))
    if len(result.per_class) <= MOST_CLASSES:
        say(class_table(result))
    if table is not None:
        say(f"{table}: a line for every image")


def unseen(images: ImageDataset, checkpoint: Path, split: str | None) -> tuple[ImageDataset, str]:
    """The images to measure, and what there is to say if the network was trained on some of them.

    Of a set that is not divided, and of which no split was asked for, those are left out.
    """
    import torch

    from dynaslim.data.layout import WHOLE
    from dynaslim.runs.folder import trained_on

    seen = trained_on(checkpoint)
    if not seen:
        return images, ""
    known = torch.tensor([digest in seen for digest in images.digests()], dtype=torch.bool)
    count, total = int(known.sum()), len(images)
    if not count:
        return images, ""
    whole = images.source is not None and images.source.split == WHOLE
    if split is None and whole and count < total:
        return images.subset((~known).nonzero().flatten()), (
            f"{total - count} of {total} images, which training held back; it was trained on the "
            f"others (--split {WHOLE} measures all)"
        )
    return images, (
        f"the network was trained on {count} of these {total} images: expect less elsewhere"
    )


def calibrate(
    checkpoint: Path,
    out: Path,
    *,
    data: str,
    split: str = "train",
    batches: int = 100,
    batch_size: int = 128,
    seed: int = 0,
    workers: int = 2,
    corrupt_limit: float = 0.01,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Take a network's BN statistics anew for every route, as after training.

    Args:
        checkpoint: A checkpoint file, the folder of a run, or the name of a model that ships.
        out: The checkpoint to write (.safetensors); may be the same.
        data: A parquet file or a folder of them, a folder of images by class, or a hub name.
        split: Split of the data.
        batches: Batches to average over, at most one pass over the data.
        batch_size: Images per batch.
        seed: Of the order of the images.
        workers: Processes that decode images; 0 decodes in this one.
        corrupt_limit: Share of images that may turn out not to decode; others take their place.
        device: cpu, cuda or mps.
        json: Print one JSON object.
    """
    from dataclasses import replace

    from dynaslim._files import check_writable
    from dynaslim.data.layout import check_path
    from dynaslim.errors import UsageError
    from dynaslim.pretrained import checkpoint_file

    if batches < 1 or batch_size < 2:
        raise UsageError("--batches must be at least 1 and --batch-size at least 2")
    if workers < 0:
        raise UsageError(f"--workers {workers}: must not be negative")
    if not 0 <= corrupt_limit <= 1:
        raise UsageError(f"--corrupt-limit {corrupt_limit}: must be between 0 and 1")
    check_device(device)
    check_writable(out)
    file = checkpoint_file(checkpoint)
    check_path(data)

    from dynaslim.checkpoint import read_prepared, save
    from dynaslim.data import open_source
    from dynaslim.data.feed import ImageFeed
    from dynaslim.data.images import ImageDataset
    from dynaslim.data.transforms import normalise
    from dynaslim.progress import progress
    from dynaslim.train import recalibrate

    loaded, preprocessing = read_prepared(file)
    source = open_source(data, split)
    images = ImageDataset.of(source, preprocessing, corrupt_limit=corrupt_limit)
    feed = ImageFeed(images, min(batch_size, len(images)), seed, workers=workers)
    count = min(batches, feed.steps_per_epoch)
    target = to_device(device)
    loaded.net.to(target)
    drawn = (normalise(pixels.to(target), preprocessing) for pixels, _ in feed.batches(0, count))
    with progress("recalibrating", count) as bar:
        recalibrate(loaded.net, drawn, on_batch=bar.advance)
    # what was measured before holds no more
    save(out, replace(loaded, metrics={}, budget=None))
    if json:
        left_out = list(feed.skipped.lines)
        told = {"out": str(out), "batches": count, "batch_size": feed.batch_size}
        print_json({**told, "left_out": left_out})
        return
    say(
        f"{out}: BN statistics of every route from {count} batches of {feed.batch_size} images, "
        f"{feed.skipped.count} skipped"
    )
    say_skipped(feed.skipped.lines)


def check_device(name: str) -> None:
    """Raise `UsageError` for a name that no device has, here or elsewhere; no torch."""
    from dynaslim.errors import check

    known = name.partition(":")[0] in ("cpu", "cuda", "mps")
    check(known, f"--device {name}: choose cpu, cuda or mps")


def to_device(name: str) -> torch.device:
    """A device by its name; raises `UsageError` if there is none here."""
    check_device(name)
    import torch

    from dynaslim.errors import UsageError

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
