"""Every backend's routed inference against its ideal, for docs/performance.md.

    python benchmarks/routed.py --json benchmarks/results/routed.json

Runs `dynaslim bench` in a separate process for each backend and batch size, which interleaves the
routed batch with every static network; see `dynaslim/bench/routed.py` for the ideal. The first run
compiles (inductor: minutes); `starts` then times a second process, which uses the compiled programs
on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START = """
import json, sys, time
begin = time.perf_counter()
import numpy as np
from dynaslim.bench.models import random_network
from dynaslim.runtime.engine import Engine
net = random_network("ds_mbnet", 224)
loaded = time.perf_counter()
engine = Engine(net, backend=sys.argv[1], image_size=224)
engine.warm_up(224)
ready = time.perf_counter()
engine(np.zeros((8, 3, 224, 224), np.float32))
print(json.dumps({
    "compiled": engine.counts.compiled,
    "cached": len(engine.counts.cached),
    "ready_s": ready - loaded,
}))
"""


def bench(backend: str, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "dynaslim", "bench", options.model, "--backend", backend,
        "--batch-size", str(batch_size), "--mix", options.mix, "--rounds", str(options.rounds),
        "--json",
    ]  # fmt: skip
    if options.image_size is not None:
        command += ["--image-size", str(options.image_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ds_mbnet")
    parser.add_argument("--backends", default="openvino,onnxruntime,inductor,eager")
    parser.add_argument("--batch-sizes", default="32,8,1")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--mix", default="0.55,0.2,0.1,0.15")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-starts", action="store_true", help="leave the second starts out")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {"model": options.model, "mix": options.mix, "runs": runs}
    for batch_size in map(int, options.batch_sizes.split(",")):
        for backend in options.backends.split(","):
            found = bench(backend, batch_size, options)
            result["hardware"] = found["hardware"]
            run = found["backends"][backend]
            runs.append(run)
            ratio, speedup = run["ratio_to_ideal"], run["speedup_over_widest"]
            print(
                f"{backend:<12} batch {batch_size:>3}: "
                f"routed {run['routed_ms']['median']:7.1f} ms, "
                f"ideal {run['ideal_ms']['median']:7.1f}, ratio {ratio['median']:.3f} "
                f"({ratio['q1']:.3f} to {ratio['q3']:.3f}), {speedup['median']:.2f}x the widest",
                flush=True,
            )
            if options.json is not None:  # save intermediate results
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    if not options.no_starts:
        result["starts"] = {}
        for backend in options.backends.split(","):
            start = time.perf_counter()
            for _ in range(2):  # twice: the first may still compile another kind of program
                done = subprocess.run(
                    [sys.executable, "-c", START, backend],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
            result["starts"][backend] = json.loads(done.stdout)
            print(backend, "second start", result["starts"][backend], time.perf_counter() - start)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
