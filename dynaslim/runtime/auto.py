"""Backend "auto": measures the installed backends for a few seconds and takes the fastest."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np

from dynaslim.errors import DynaslimError
from dynaslim.runtime.backends import FROM_PACKAGE, Backend, Resources, available, make_backend
from dynaslim.runtime.cache import Cache
from dynaslim.runtime.package import PackageError
from dynaslim.runtime.router import Router
from dynaslim.runtime.variants import VariantSource

ROUNDS: Final = 5
QUARTERS: Final = 4
"""Parts into which half of the measured batches are divided. The backend that is fastest for whole
batches may be slow for small ones, where changing shapes and waiting for threads cost most."""
FILE: Final = "auto.json"


def candidates(source: VariantSource, resources: Resources) -> list[str]:
    """Backends worth measuring for a source; the usually fast ones come first.

    inductor compiles for minutes, so it is included only if its programs are in the cache.

    Raises:
        UsageError: if none is installed; the message says how to install one.
    """
    installed = available(source.precision)
    if not source.has_modules:
        found: list[str] = [name for name in FROM_PACKAGE if name in installed]
        if not found:
            make_backend(FROM_PACKAGE[0], source, resources)  # raises; says what to install
        return found
    device = getattr(source, "device", None)
    if device is not None and device.type != "cpu":
        order = ["cudagraph", "eager"] if device.type == "cuda" else ["eager"]
    else:
        order = ["openvino", "onnxruntime", "eager"]
        if resources.cache is not None and resources.cache.names(".pt2"):
            order.insert(2, "inductor")
    return [name for name in order if name in installed]


def fastest(
    source: VariantSource, resources: Resources, size: tuple[int, int], rows: int
) -> tuple[Backend, dict[str, float]]:
    """The backend that routes a batch of `rows` images of `size` (height, width) fastest.

    Also returns the milliseconds of each backend measured (`measure`). The result is stored beside
    the cached programs.
    """
    names = candidates(source, resources)
    if len(names) == 1:
        return make_backend(names[0], source, resources), {}
    what = f"{'+'.join(names)} {size[0]}x{size[1]} rows {rows} and quarters"
    key = f"{what} threads {resources.threads}"
    known = _read_note(resources.cache)
    found = known.get(key)
    if found and set(found) <= set(names):
        name = min(found, key=lambda one: found[one])
        return make_backend(name, source, resources), found
    backends = {name: make_backend(name, source, resources) for name in names}
    measured = measure(list(backends.values()), source, size, rows)
    if not measured:
        raise DynaslimError(f"none of the backends {', '.join(names)} runs this network")
    if resources.cache is not None:
        resources.cache.write(FILE, json.dumps({**known, key: measured}, indent=1).encode())
    return backends[min(measured, key=lambda name: measured[name])], measured


def _read_note(cache: Cache | None) -> dict[str, dict[str, float]]:
    """Stored measurements; the file of an older version or a damaged one is ignored."""
    note = None if cache is None else cache.find(FILE)
    if note is None:
        return {}
    try:
        return msgspec.json.decode(note.read_bytes(), type=dict[str, dict[str, float]])
    except (OSError, ValueError):
        return {}


def measure(
    backends: Sequence[Backend], source: VariantSource, size: tuple[int, int], rows: int
) -> dict[str, float]:
    """Milliseconds of a routed batch on each backend that can run it.

    This is the mean of two medians over interleaved rounds: of the batch as one call, and as
    `QUARTERS` calls. Rows take all options of a gate in turn.
    """
    spec = source.spec
    x = np.random.default_rng(0).standard_normal((rows, spec.in_channels, *size), np.float32)
    arms: dict[tuple[str, int], Callable[[], None]] = {}
    for backend in backends:
        router = Router(spec, backend)
        images = backend.arrays.images(x)

        def run(parts: int, router: Router = router, images: Any = images) -> None:
            bounds = [rows * part // parts for part in range(parts + 1)]
            for start, stop in pairwise(bounds):

                def decide(gate: int, _: Any, members: Any, start: int = start) -> Any:
                    return (start + members) % len(spec.gates[gate].choices)

                router.routed(images[start:stop], decide, None)

        counts = (1, QUARTERS) if rows >= QUARTERS else (1,)
        try:
            for parts in counts:
                run(parts)  # compiles
        except PackageError:  # a file has gone: other backends need it too
            raise
        except DynaslimError:
            continue
        arms |= {(backend.name, parts): partial(run, parts) for parts in counts}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in arms}
    for _ in range(ROUNDS):
        for key, arm in arms.items():
            start = time.perf_counter()
            arm()
            times[key].append((time.perf_counter() - start) * 1e3)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        name: statistics.mean(ms for (other, _), ms in medians.items() if other == name)
        for name in dict.fromkeys(name for name, _ in medians)
    }
