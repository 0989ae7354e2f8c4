"""The verb `cascade`, which combines several networks into one model."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim.cli.measure import (
    ImageOptions,
    curve_table,
    measure_curve,
    points_table,
    print_measured,
    trained_rows,
)
from dynaslim.cli.output import echo, new_table, print_json, printable
from dynaslim.errors import DataError, check
from dynaslim.model_names import find_model

if TYPE_CHECKING:
    from dynaslim.cascade_spec import CascadeSpec

BUDGET: Final = "drop=0.5"


def cascade(
    models: list[str],
    out: Path,
    *,
    images: ImageOptions,
    split: str = "test",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Combine several networks: uncertain images continue from small networks to larger ones.

    All images run on the first network. Thresholds of the margin, for any budget, are measured on
    held-out images; nothing is trained. OUT is a package that predict, serve, evaluate and report
    accept.

    Args:
        models: Two or more networks, the cheapest first: checkpoints (FILE@ROUTE for a route other
            than the widest), packages, or ONNX files (FILE.onnx@SIZE if the image size is not
            fixed).
        out: The package's folder.
        images: Held-out images, and how the networks are run on them.
        split: Split of the data; "test" also accepts a split called validation.
        mean: Mean of each channel of pixels in 0..1, for ONNX files. Default: ImageNet's.
        std: Standard deviation of each channel, like mean.
        force: Accept images that a network was trained on.
        json: Print one JSON object.
    """
    check(images.device == "cpu", f"--device {images.device}: a cascade is measured on the CPU")
    check(len(models) >= 2, f"{models[0]}: a cascade needs at least two networks, and OUT")

    from dynaslim.runtime.cascade import cascade as make
    from dynaslim.runtime.cascade import onnx_rung, split_name
    from dynaslim.runtime.export import export_package, free_folder
    from dynaslim.runtime.signals import SignalTable

    free_folder(out)
    names = [split_name(model)[0] for model in models]
    files = [
        find_model(name, ("checkpoint", "package")).path
        for name in names
        if Path(name).suffix != ".onnx"
    ]
    rungs: list[Any] = [
        onnx_rung(model, mean, std) if Path(name).suffix == ".onnx" else model
        for model, name in zip(models, names, strict=True)
    ]
    loaded = make(rungs, name=out.name)
    spec: CascadeSpec = loaded.net.spec

    from dynaslim.data.images import open_images

    opened = open_images(loaded, images.data, split, corrupt_limit=images.corrupt_limit)
    source = opened.source
    assert source is not None
    if loaded.class_names is None:
        loaded = replace(loaded, class_names=source.class_names)
    seen = int(trained_rows(opened, *files).sum())
    if seen:
        overlap = f"{seen} of these {len(opened)} images are ones that a network was trained on"
        if not force:
            raise DataError(f"{source.name} [{source.split}]: {overlap}; name others, or --force")
    signals = SignalTable(len(spec.rungs))
    curve, uniform = measure_curve(loaded, opened, images.batch_size, on_answers=signals.add)
    ranked = signals.rows()
    measured = {"data": source.name, "split": source.split, "images": curve.images}
    export_package(
        replace(loaded, budget=curve.to_dict()),
        out,
        notes={"calibrated_on": {"images": curve.images}, "risk_coverage": ranked},
    )
    point = curve.at(BUDGET)
    if json:
        print_json(
            {
                "out": str(out),
                **measured,
                "trained_on": seen,
                "rungs": [
                    {**asdict(rung), "top1": outcome.top1}
                    for rung, (_, outcome) in zip(spec.rungs, uniform, strict=True)
                ],
                "risk_coverage": ranked,
                "default": {"budget": BUDGET, **asdict(point)},
                "curve": curve.to_dict(),
            }
        )
        return
    print_measured(str(out), opened, curve)
    if seen:
        echo(f"{overlap}: expect less than these numbers elsewhere")
    echo(_rungs_table(spec, ranked))
    echo("signals: area under the risk-coverage curve, lower is better; the margin is used")
    echo(curve_table(curve, spec, uniform))
    echo(points_table(f"by default {BUDGET}", {"": point}, spec, timed=False))
    echo(f"{out}: a package of {len(spec.rungs)} networks for {spec.image_size_px} px images")


def _rungs_table(spec: CascadeSpec, ranked: list[dict[str, float]]) -> Any:
    names = [name for name in ranked[-1] if name != "errors"]
    table = new_table("rung", "network", "px", "MAdds", "errors", *names)
    for number, (rung, row) in enumerate(zip(spec.rungs, ranked, strict=True), start=1):
        table.add_row(
            str(number),
            printable(rung.name),
            str(rung.image_size_px),
            f"{rung.madds / 1e6:.2f} M",
            f"{row['errors']:.2%}",
            *(f"{row[name]:.4f}" if name in row else "" for name in names),
        )
    return table
