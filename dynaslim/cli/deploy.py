"""Verbs that convert networks from and to other formats, or time them on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dynaslim._files import check_writable
from dynaslim.cli.output import echo, new_table, print_json
from dynaslim.errors import CheckpointError, UsageError, check
from dynaslim.model_names import checkpoint_file, find_model, is_package
from dynaslim.spec import Route

if TYPE_CHECKING:
    from dynaslim.checkpoint import Checkpoint

MIX: Final = "0.55,0.2,0.1,0.15"


def profile(
    model: str,
    out: Path,
    *,
    backend: str = "auto",
    batch_size: int = 32,
    image_size: int | None = None,
    precision: str = "fp32",
    rounds: int = 9,
    no_cache: bool = False,
    json: bool = False,
) -> None:
    """Time every segment; write a cost table for training gates, budgets and merging buckets.

    Args:
        model: A checkpoint file, a package, a name of the zoo, or a spec file (.yaml).
        out: The table to write (.json).
        backend: auto, eager, inductor, onnxruntime, openvino or cudagraph.
        batch_size: Largest batch. Batches of 1, 2, 4, ... rows are timed too; the costs are the
            times per image of the largest.
        image_size: Side of the image in pixels. Default: the model's.
        precision: fp32 or bf16.
        rounds: How often each segment is timed.
        no_cache: Do not use the on-disk cache of compiled programs.
        json: Print one JSON object.
    """
    check(rounds >= 1, f"--rounds {rounds}: must be at least 1")
    check_writable(out)
    _check_named(model, backend)

    from dynaslim.bench.models import open_engine
    from dynaslim.bench.timing import hardware
    from dynaslim.progress import progress
    from dynaslim.runtime.latency import profile as measure
    from dynaslim.runtime.variants import segment_variants

    engine, side = open_engine(
        model, backend, image_size, precision, batch_size, cache=not no_cache
    )
    variants = list(segment_variants(engine.spec))
    note = {"backend": engine.backend, "precision": engine.source.precision, **hardware()}
    with progress("measuring", len(variants)) as bar:
        table = measure(
            engine.router,
            side,
            batch_size,
            rounds=rounds,
            note=note,
            on_variant=lambda: bar.advance(),
        )
    table.write(out, engine.spec)
    if json:
        print_json({"file": str(out), "rows": list(table.rows), "ms": table.ms, "note": note})
        return
    rows = new_table("segment variant", *[f"{n} rows" for n in table.rows], "ms per image")
    for variant in variants:
        times = table.ms[variant.name]
        rows.add_row(
            variant.name, *[f"{t:.2f}" for t in times], f"{times[-1] / table.rows[-1]:.3f}"
        )
    echo(f"{engine.spec.name} at {side} px on {engine.backend}: milliseconds by rows")
    echo(rows)
    echo(f"{out}: use it with train gate --cost-table, calibrate-budget --table")


def bench(
    model: str,
    *,
    backend: str = "auto",
    image_size: int | None = None,
    batch_size: int = 32,
    mix: str = MIX,
    data: str | None = None,
    split: str = "test",
    precision: str = "fp32",
    rounds: int = 15,
    seed: int = 0,
    no_cache: bool = False,
    json: bool = False,
) -> None:
    """Time routed batches, interleaved with static networks and compared with the ideal time.

    Args:
        model: A checkpoint file, or a name of the zoo or a spec file (with random weights).
        backend: One or more, separated by commas: auto, eager, inductor, onnxruntime, openvino,
            cudagraph.
        image_size: Side of the image in pixels. Default: the model's.
        batch_size: Images per batch.
        mix: Share of the images that takes each option of the gates, or "real": as the gates
            choose for the images of --data.
        data: Images for --mix real, given as for evaluate.
        split: Split of the data.
        precision: fp32 or bf16.
        rounds: How often each network is timed.
        seed: Seed of the order of the rows.
        no_cache: Do not use the on-disk cache of compiled programs.
        json: Print one JSON object.
    """
    from dynaslim.data.layout import check_path

    # the ideal needs one program per whole route, and a package has only segments
    check(
        not is_package(model),
        f"{model}: a package has no programs of whole routes to compare with; "
        f"bench the checkpoint that it was exported from",
    )
    check(batch_size >= 1, f"--batch-size {batch_size}: must be at least 1")
    check(rounds >= 2, f"--rounds {rounds}: must be at least 2")
    check(seed >= 0, f"--seed {seed}: must not be negative")
    check((mix == "real") == (data is not None), "--mix real and --data go together")
    shares = None
    if mix != "real":
        try:
            shares = [float(part) for part in mix.split(",")]
        except ValueError:
            raise UsageError(f"--mix {mix!r}: give shares such as {MIX}, or real") from None
    _check_named(model, *backend.split(","))
    if data is not None:
        check_path(data)

    from dynaslim.bench.models import open_engine, some_images
    from dynaslim.bench.routed import bench_routed, mixed, observed
    from dynaslim.bench.timing import hardware
    from dynaslim.progress import progress

    results = []
    side = 0
    for name in backend.split(","):
        engine, side = open_engine(
            model, name, image_size, precision, batch_size, cache=not no_cache
        )
        x = some_images(engine, side, batch_size, data, split, seed)
        if shares is None:
            traffic = observed(engine.spec, engine(x).routes, batch_size)
        else:
            traffic = mixed(engine.spec, shares, batch_size, seed)
        with progress(f"timing {engine.backend}", rounds) as bar:
            results.append(
                bench_routed(
                    engine,
                    x[:batch_size],
                    traffic,
                    rounds=rounds,
                    on_round=lambda bar=bar: bar.advance(),  # type: ignore[misc]
                )
            )
        engine.close()
    if json:
        print_json(
            {
                "model": model,
                "mix": mix,
                "data": data,
                "hardware": hardware(),
                "backends": {result["backend"]: result for result in results},
            }
        )
        return
    echo(f"{model} at {side} px, batch {batch_size}: medians of {rounds} interleaved rounds, ms")
    for result in results:
        echo(_bench_table(result))
        ratio = result["ratio_to_ideal"]
        echo(
            f"{result['backend']}: routed {result['routed_ms']['median']:.1f} ms, ideal "
            f"{result['ideal_ms']['median']:.1f} ms, ratio {ratio['median']:.3f} "
            f"({ratio['q1']:.3f} to {ratio['q3']:.3f}); "
            f"{result['speedup_over_widest']['median']:.2f}x the widest route's speed, with "
            f"{result['madds_ratio']:.2f}x fewer multiply-adds"
        )


def _check_named(model: str, *backends: str) -> None:
    """Raise `DynaslimError` for an unknown model or backend, without importing torch."""
    from dynaslim.runtime.backends import check_backend

    for name in backends:
        check_backend(name)
    find_model(model)


def _bench_table(result: dict[str, Any]) -> Any:
    table = new_table("route", "MAdds", "share", "static", "best static", "in pieces of")
    for route, cost, share in zip(result["routes"], result["madds"], result["shares"], strict=True):
        best = result["best_static_ms"][route]
        table.add_row(
            route,
            f"{cost / 1e6:.2f} M",
            f"{share:.1%}",
            f"{result['static_ms'][route]['median']:.1f}",
            f"{best['median']:.1f}",
            f"{best['rows_per_piece']}" + (" side by side" if best["side_by_side"] else ""),
        )
    return table


def export(
    checkpoint: Path,
    out: Path,
    *,
    precision: str = "fp32",
    calibration: str | None = None,
    calibration_split: str = "train",
    calibration_images: int = 256,
    report_split: str = "test",
    report_images: int = 2000,
    single_file: bool = False,
    static_route: str | None = None,
    triton: bool = False,
    ovms: bool = False,
    name: str | None = None,
    no_cache: bool = False,
    json: bool = False,
) -> None:
    """Export a network for deployment: as a package that needs no torch, or as one ONNX file.

    Args:
        checkpoint: A checkpoint file, the folder of a run, or the name of a model that ships.
        out: The package's folder, the ONNX file, or the model server's folder of models.
        precision: fp32, or int8 by post-training quantisation (packages only).
        calibration: Images for int8, given as for evaluate.
        calibration_split: Split of these images to calibrate on.
        calibration_images: Number of images to calibrate on.
        report_split: Split of these images to compare int8 and fp32 on.
        report_images: Most images to compare on.
        single_file: Write one ONNX file that routes one image at a time.
        static_route: Write the sub-network along a route, such as 12-24-48-80-160, as plain ONNX.
        triton: Write models for Triton: one that routes batches, and one ONNX file.
        ovms: Write a model for OpenVINO Model Server, and its config.json.
        name: The model's name in a model server. Default: the network's.
        no_cache: Do not use the on-disk cache of calibrated programs (int8).
        json: Print one JSON object.
    """
    from dynaslim.data.layout import check_path

    kinds = {
        "--single-file": single_file,
        "--static-route": static_route is not None,
        "--triton": triton,
        "--ovms": ovms,
    }
    chosen = [flag for flag, given in kinds.items() if given]
    check(len(chosen) < 2, f"{' and '.join(chosen)}: choose one")
    whole = triton or not chosen
    check(name is None or triton or ovms, "--name is for --triton and --ovms")
    check(precision in ("fp32", "int8"), f"--precision {precision}: choose fp32 or int8")
    check(whole or precision == "fp32", "--precision int8 is for packages")
    check(
        (precision == "int8") == (calibration is not None),
        "--precision int8 and --calibration go together",
    )
    parsed = None if static_route is None else Route.parse(static_route)
    file = checkpoint_file(checkpoint)
    if calibration is not None:
        check_path(calibration)

    from dynaslim.checkpoint import read
    from dynaslim.runtime.export import export_package, export_route, export_single_file
    from dynaslim.runtime.model_servers import export_ovms, export_triton

    loaded = read(file)
    source, notes = None, dict[str, Any]()
    if calibration is not None:
        source, notes = _quantised(
            loaded,
            calibration,
            (calibration_split, calibration_images),
            (report_split, report_images),
            cache=not no_cache,
        )
    if parsed is not None:
        route = loaded.net.spec.coerce_route(parsed)
        result: dict[str, Any] = {"parity": export_route(loaded, out, route)}
        line = f"{out}: the route {route} as plain ONNX"
    elif single_file:
        result = {"parity": export_single_file(loaded, out)}
        line = f"{out}: one ONNX file that routes one image at a time"
    elif ovms:
        result = {"parity": export_ovms(loaded, out, name)}
        line = f"{out}: for OpenVINO Model Server, one image at a time"
    elif triton:
        result = {"parity": export_triton(loaded, out, name, source=source, notes=notes), **notes}
        line = f"{out}: for Triton, a model that routes batches and one of one file"
    else:
        manifest, errors = export_package(loaded, out, source=source, notes=notes)
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        result = {
            "parity": max(errors.values()),
            "forms": len(manifest["forms"]),
            "bytes": size,
            "precision": manifest["precision"],
            **notes,
        }
        line = f"{out}: {len(manifest['forms'])} segment variants, {size / 1e6:.1f} MB"
    if json:
        print_json({"out": str(out), **result})
        return
    echo(f"{line}; largest difference to the network {result['parity']:.1e} of its largest value")
    if "accuracy" in result:
        report = result["accuracy"]
        echo(
            f"int8 on {report['images']} images: top-1 {report['quantised']['top1']:.2%}, in fp32 "
            f"{report['reference']['top1']:.2%}; the same route for {report['same_route']:.1%}"
        )


def _quantised(
    loaded: Checkpoint,
    data: str,
    calibration: tuple[str, int],
    report: tuple[str, int],
    *,
    cache: bool,
) -> tuple[Any, dict[str, Any]]:
    """int8 segment variants calibrated on some images, and their accuracy on others."""
    from dynaslim.bench.models import calibration_batches, compare_precisions
    from dynaslim.runtime.quantise import QuantisedSource

    batches = calibration_batches(loaded, data, *calibration)
    source = QuantisedSource(
        loaded.net, batches, images=calibration[1], cache_dir="auto" if cache else None
    )
    return source, {"accuracy": compare_precisions(loaded, source, data, *report)}


def import_official(file: Path, out: Path, *, ema: bool = False, json: bool = False) -> None:
    """Convert a checkpoint of the released DS-Net code, without executing code from it.

    Args:
        file: The released file (.pth.tar).
        out: The checkpoint to write (.safetensors).
        ema: Load the averaged weights.
        json: Print one JSON object.
    """
    check_writable(out)
    if not file.exists():
        raise CheckpointError(f"{file}: no such file")

    from dynaslim.checkpoint import save
    from dynaslim.interop.official import import_official as convert

    checkpoint = convert(file, ema=ema)
    save(out, checkpoint)
    spec = checkpoint.net.spec
    choices = spec.gates[0].choices
    if json:
        result = {"out": str(out), "model": spec.name, "num_classes": spec.num_classes}
        print_json({**result, "choices": list(choices)})
        return
    echo(f"{out}: {spec.name}, {spec.num_classes} classes, gate choices {choices}")
