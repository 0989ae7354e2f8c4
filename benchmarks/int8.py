"""int8 compared with fp32, static and routed, on the backends that support both.

    python benchmarks/int8.py --json benchmarks/results/int8.json

`ds_mbnet` with random weights at 224 px, quantised with noise as calibration images; every round
runs all programs in turn. With `--checkpoint` and `--data`, also the effect of quantisation on a
trained network's answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynaslim import Engine, read
from dynaslim.bench.models import calibration_batches, compare_precisions, random_network
from dynaslim.bench.routed import mixed
from dynaslim.bench.timing import hardware, interleave, ratio, summary
from dynaslim.runtime.quantise import QuantisedSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="onnxruntime,openvino")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--static-batch", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--mix", default="0.55,0.2,0.1,0.15")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--checkpoint", type=Path, help="a trained network")
    parser.add_argument("--data", help="labelled images for it")
    parser.add_argument("--split", default="test")
    parser.add_argument("--calibration-split", default="train")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    side = options.image_size
    net = random_network("ds_mbnet", side)
    spec = net.spec
    generator = torch.Generator().manual_seed(1)
    seen = [torch.randn(8, spec.in_channels, side, side, generator=generator) for _ in range(4)]
    x = np.random.default_rng(0).standard_normal((options.batch_size, 3, side, side), np.float32)
    traffic = mixed(spec, [float(share) for share in options.mix.split(",")], options.batch_size)
    picked = np.array(traffic.rows)

    def routed(engine: Engine) -> Callable[[], object]:
        return lambda: engine.router.routed(x, lambda gate, _, rows: picked[rows], None)

    def static(engine: Engine, route: Any) -> Callable[[], object]:
        run = engine.static(route)
        return lambda: run(x[: options.static_batch])

    ends = (spec.cheapest_choice, spec.widest_choice)
    arms: dict[str, Callable[[], object]] = {}
    for backend in options.backends.split(","):
        for precision in ("fp32", "int8"):
            more: dict[str, Any] = {"calibration": seen} if precision == "int8" else {}
            engine = Engine(net, backend=backend, precision=precision, cache_dir=None, **more)
            for route in ends:
                arms[f"{backend} {precision} {route}"] = static(engine, route)
            arms[f"{backend} {precision} routed"] = routed(engine)
    for _ in range(3):  # warm-up: programs are compiled and pieces timed
        for run in arms.values():
            run()
    times = interleave(arms, options.rounds)
    runs = []
    for backend in options.backends.split(","):
        for what in (*map(str, ends), "routed"):
            fp32, int8 = (times[f"{backend} {precision} {what}"] for precision in ("fp32", "int8"))
            over = ratio(int8, fp32)
            runs.append(
                {
                    "backend": backend,
                    "what": what,
                    "batch_size": options.batch_size if what == "routed" else options.static_batch,
                    "fp32_ms": summary(fp32),
                    "int8_ms": summary(int8),
                    "int8_over_fp32": over,
                }
            )
            print(
                f"{backend:<12} {what:<28} {runs[-1]['fp32_ms']['median']:7.1f} ms "
                f"-> {runs[-1]['int8_ms']['median']:7.1f}, x{over['median']:.2f}",
                flush=True,
            )
    result: dict[str, Any] = {
        "model": "ds_mbnet",
        "image_size_px": side,
        "mix": options.mix,
        "rounds": options.rounds,
        "hardware": hardware(),
        "runs": runs,
    }
    if options.checkpoint is not None:
        checkpoint = read(options.checkpoint)
        batches = calibration_batches(checkpoint, options.data, options.calibration_split, 256)
        source = QuantisedSource(checkpoint.net, batches, backend="onnxruntime", cache_dir=None)
        result["accuracy"] = compare_precisions(
            checkpoint, source, options.data, options.split, options.images
        )
        result["accuracy"]["model"] = checkpoint.net.spec.name
        print(json.dumps(result["accuracy"], indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
