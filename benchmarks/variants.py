"""Rejected ways to run a routed batch, compared with the one in use; and where the time goes.

    python benchmarks/variants.py --json benchmarks/results/variants.json

Every variant changes one thing and runs in turn with the others, on the same batch and decisions.
The ratio is its time over that of the unchanged engine (above 1: slower). `breakdown` divides the
engine's time for a batch into work on the cores, gathering, and the rest (waiting and deciding).
`floor` is the processor's limit (a roofline): every layer runs at the speed of a large matrix
product, or at the speed of memory if moving its features and weights once takes longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from onnx import helper
from torch import fx
from torch.nn import functional as F

from dynaslim import extract
from dynaslim.bench.models import random_network
from dynaslim.bench.routed import mixed
from dynaslim.bench.timing import hardware, interleave, ratio, summary
from dynaslim.nn import SlimNet
from dynaslim.runtime.backends import Resources
from dynaslim.runtime.backends.onnxruntime import OnnxRuntimeBackend
from dynaslim.runtime.backends.openvino import OpenVinoBackend
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.router import Router, SizedVariant, WorkItem
from dynaslim.runtime.schedule import MicroBatch
from dynaslim.runtime.variants import Variant, VariantShape

SIZES = (1, 2, 4, 8, 16, 32)


class CopiedOrt(OnnxRuntimeBackend):
    """Without IO binding: the runtime allocates the results, which are then copied."""

    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Any:
        session = self._open(variant, wide)

        def run(x: np.ndarray, outs: Any) -> None:
            for made, out in zip(session.run(None, {"x": x}), outs, strict=True):
                out[:] = made

        return run


class ConfiguredOpenVino(OpenVinoBackend):
    """Other settings of the runtime."""

    config: dict[str, Any] = {}  # noqa: RUF012
    fixed = False

    def compile(self, variant: Variant, shape: VariantShape, *, wide: bool) -> Any:
        source = self._source.onnx(variant)
        compiled: dict[int, Any] = {}

        def of(rows: int) -> Any:
            if rows not in compiled:
                model = self._core.read_model(source)
                model.reshape({0: [rows, *shape.row_in]})
                compiled[rows] = self._core.compile_model(model, "CPU", self.config)
            return compiled[rows]

        idle: dict[int, list[Any]] = {}

        def run(x: np.ndarray, outs: Any) -> None:
            rows = len(x) if self.fixed else -1
            waiting = idle.setdefault(rows, [])
            request = waiting.pop() if waiting else of(rows).create_infer_request()
            request.set_input_tensor(0, openvino.Tensor(x, shared_memory=True))
            for number, out in enumerate(outs):
                request.set_output_tensor(number, openvino.Tensor(out, shared_memory=True))
            request.infer()
            waiting.append(request)

        return run


class Hinted(ConfiguredOpenVino):
    """The throughput hint: the runtime chooses streams and threads."""

    config = {"PERFORMANCE_HINT": "THROUGHPUT"}  # noqa: RUF012


class Pinned(ConfiguredOpenVino):
    """The threads of every model are pinned to cores."""

    config = {"NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2, "ENABLE_CPU_PINNING": True}  # noqa: RUF012


class Fixed(ConfiguredOpenVino):
    """Programs of fixed shapes, one per number of rows; buckets are padded to these."""

    config = {"NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2, "ENABLE_CPU_PINNING": False}  # noqa: RUF012
    fixed = True
    sizes = SIZES


class FixedCapped(Router):
    """The engine's own piece sizes, so that padding is the only difference."""

    def _prepared(self, variant: Variant, size: tuple[int, int]) -> SizedVariant:
        return replace(super()._prepared(variant, size), most_rows=8)


class GatherInside(Router):
    """The gather is the first node of the segment's graph, instead of a copy before it."""

    def __init__(self, net: SlimNet, backend: OnnxRuntimeBackend) -> None:
        super().__init__(net.spec, backend)
        self._source = NetworkSource(net)
        self._sessions: dict[Variant, Any] = {}

    def _session(self, variant: Variant) -> Any:
        if variant not in self._sessions:
            import onnxruntime

            model = onnx.load_from_string(self._source.onnx(variant))
            for node in model.graph.node:
                node.input[:] = ["gathered" if name == "x" else name for name in node.input]
            model.graph.node.insert(
                0, helper.make_node("Gather", ["x", "rows"], ["gathered"], axis=0)
            )
            model.graph.input.append(
                helper.make_tensor_value_info("rows", onnx.TensorProto.INT64, ["some"])
            )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            self._sessions[variant] = onnxruntime.InferenceSession(
                model.SerializeToString(), options
            )
        return self._sessions[variant]

    def _piece(self, job: WorkItem, piece: MicroBatch, program: Any) -> None:
        if job.picked is None:
            super()._piece(job, piece, program)
            return
        session, rows = self._session(job.sized.variant), job.picked[piece.start : piece.stop]
        binding = session.io_binding()
        source = job.source
        binding.bind_input("x", "cpu", 0, np.float32, source.shape, source.ctypes.data)
        binding.bind_input("rows", "cpu", 0, np.int64, rows.shape, rows.ctypes.data)
        for output, out in zip(session.get_outputs(), job.outs, strict=True):
            part = out[piece.start : piece.stop]
            binding.bind_output(output.name, "cpu", 0, np.float32, part.shape, part.ctypes.data)
        session.run_with_iobinding(binding)


def breakdown(router: Router, run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Parts of a batch's time as shares of wall time x cores (medians)."""
    spent = {"work": 0.0, "gather": 0.0}
    arrays, piece, take = router.backend.arrays, router._piece, router.backend.arrays.take

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[what] += time.perf_counter() - start

        return call

    router._piece = timed("work", piece)  # type: ignore[method-assign]
    arrays.take = timed("gather", take)  # type: ignore[method-assign]
    shares: dict[str, list[float]] = {"programs": [], "gather": [], "waiting and deciding": []}
    for _ in range(rounds):
        spent.update(work=0.0, gather=0.0)
        start = time.perf_counter()
        run()
        total = (time.perf_counter() - start) * router.backend.workers
        shares["programs"].append((spent["work"] - spent["gather"]) / total)
        shares["gather"].append(spent["gather"] / total)
        shares["waiting and deciding"].append(1 - spent["work"] / total)
    router._piece, arrays.take = piece, take  # type: ignore[method-assign]
    return {name: statistics.median(values) for name, values in shares.items()}


def machine() -> dict[str, float]:
    """GFLOP/s of a matrix product and GB/s of a copy on all cores, each the best of many."""
    a = torch.randn(2048, 2048)
    big, other = torch.empty(64_000_000), torch.empty(64_000_000)
    flops = min(_time(lambda: a @ a) for _ in range(15))
    copy = min(_time(lambda: other.copy_(big)) for _ in range(9))
    return {"gflops": 2 * 2048**3 / flops / 1e9, "gbytes_per_s": 2 * 4 * len(big) / copy / 1e9}


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def floor_ms(net: SlimNet, route: Any, side: int, speed: dict[str, float]) -> float:
    """Milliseconds of one image along a route, at the processor's limits."""
    total = 0.0

    class Counter(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            nonlocal total
            out = super().call_function(target, args, kwargs)
            if target in (torch.conv2d, F.linear):
                x, weight = args[:2]
                macs = out.numel() * weight[0].numel()
                moved = 4 * (x.numel() + out.numel())  # weights stay in the cache from row to row
                arithmetic = 2 * macs / speed["gflops"] / 1e9
                total += max(arithmetic, moved / speed["gbytes_per_s"] / 1e9) * 1e3
            return out

    with torch.inference_mode():
        Counter(extract(net, route)).run(torch.zeros(1, 3, side, side))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--mix", default="0.55,0.2,0.1,0.15")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    side = options.image_size
    net = random_network("ds_mbnet", side)
    traffic = mixed(net.spec, [float(s) for s in options.mix.split(",")], options.batch_size)
    picked = np.array(traffic.rows)
    x = np.random.default_rng(0).standard_normal((options.batch_size, 3, side, side), np.float32)
    source, resources = NetworkSource(net), Resources(2, None)

    def serial(kind: type[Any]) -> Router:
        backend = kind(source, resources)
        backend.workers = 1  # so that every program uses all cores, one piece at a time
        return Router(net.spec, backend)

    ort, ov = OnnxRuntimeBackend, OpenVinoBackend
    routers = {
        "onnxruntime": Router(net.spec, ort(source, resources)),
        "onnxruntime, one piece at a time by all cores": serial(ort),
        "onnxruntime, whole buckets": Router(net.spec, ort(source, resources), rows_per_piece=999),
        "onnxruntime, no IO binding": Router(net.spec, CopiedOrt(source, resources)),
        "onnxruntime, gather inside the segment": GatherInside(net, ort(source, resources)),
        "openvino": Router(net.spec, ov(source, resources)),
        "openvino, one piece at a time by all cores": serial(ov),
        "openvino, whole buckets": Router(net.spec, ov(source, resources), rows_per_piece=999),
        "openvino, pinned threads": Router(net.spec, Pinned(source, resources)),
        "openvino, throughput hint": Router(net.spec, Hinted(source, resources)),
        "openvino, fixed shapes": FixedCapped(net.spec, Fixed(source, resources)),
    }

    def arm(router: Router) -> Callable[[], object]:
        return lambda: router.routed(x, lambda gate, _, rows: picked[rows], None)

    arms = {name: arm(router) for name, router in routers.items()}
    for _ in range(3):  # warm-up: programs are compiled and pieces timed
        for run in arms.values():
            run()
    times = interleave(arms, options.rounds)
    variants = {}
    for name, values in times.items():
        own = times[name.split(",")[0]]
        over = ratio(values, own)
        variants[name] = {"ms": summary(values), "over_the_engine": over}
        print(f"{name:<48} {variants[name]['ms']['median']:7.1f} ms  x{over['median']:.3f}")
    parts = {
        name: breakdown(routers[name], arms[name], options.rounds)
        for name in ("onnxruntime", "openvino")
    }
    speed = machine()
    floors = {str(route): floor_ms(net, route, side, speed) for route in net.spec.routing_space}
    print(
        json.dumps({"breakdown": parts, "machine": speed, "floor_ms_per_image": floors}, indent=1)
    )
    result = {
        "model": "ds_mbnet",
        "batch_size": options.batch_size,
        "image_size_px": side,
        "mix": options.mix,
        "rounds": options.rounds,
        "hardware": hardware(),
        "variants": variants,
        "breakdown": parts,
        "machine": speed,
        "floor_ms_per_image": floors,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
