"""`dynaslim report`: an HTML page on a run."""

from __future__ import annotations

from pathlib import Path

from dynaslim.cli.output import print_json, say


def report(
    run: Path,
    *,
    out: Path = Path("report.html"),
    data: str | None = None,
    split: str | None = None,
    target: float | None = None,
    images: int | None = None,
    baselines: Path | None = None,
    title: str | None = None,
    backend: str = "auto",
    rounds: int | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    no_cache: bool = False,
    json: bool = False,
) -> None:
    """Make a page (HTML) that shows a run: accuracy, cost, time, routes, images, training.

    Args:
        run: The folder of a run or of the demo, a checkpoint file, a folder of save_pretrained, an
            hf:// address, or the name of a model that ships.
        out: The page to write (.html); one file that needs nothing else.
        data: Images to evaluate on: a parquet file or a folder of them, a folder of images by
            class, or a hub name. By default those that training held back, if they still exist.
        split: Split of the data; by default test, or what training held back.
        target: The gate to show in detail, of a run with several; by default the middle one.
        images: Number of images to evaluate on, a fixed random choice; by default all.
        baselines: JSON file of static networks to compare with,
            [{"name", "top1", "madds", "ms"}, ...]; by default baselines.json of the run.
        title: Title of the page.
        backend: Backend to time: auto, eager, inductor, onnxruntime, openvino or cudagraph.
        rounds: Rounds of timing; 0 leaves milliseconds out. By default as many as take ten
            seconds.
        batch_size: Images per batch of the evaluation.
        device: cpu, cuda or mps.
        no_cache: Keep no compiled programs on disk, and read none.
        json: Print one JSON object.
    """
    from dynaslim._files import check_writable, write_atomic
    from dynaslim.cli.measure import check_device, to_device
    from dynaslim.data.layout import check_path
    from dynaslim.model_names import run_or_checkpoint

    run_or_checkpoint(run)
    check_writable(out)
    check_device(device)
    if data is not None:
        check_path(data)

    from dynaslim.report import ReportOptions, build_report

    options = ReportOptions(
        run,
        data=data,
        split=split,
        target=target,
        images=images,
        baselines=baselines,
        backend=backend,
        rounds=rounds,
        batch_size=batch_size,
        device=to_device(device),
        cache_dir=None if no_cache else "auto",
    )
    made = build_report(options, title=title)
    write_atomic(out, made.html.encode())
    if json:
        print_json({"out": str(out), **made.summary})
        return
    for note in made.summary["notes"]:
        say(note)
    say(f"{out}: {made.summary['headline']}")
