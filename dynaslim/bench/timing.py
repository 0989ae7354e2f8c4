"""Interleaved timing: each round runs every arm once, so that noise affects all arms alike."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from dynaslim.runtime.cache import processor_name, usable_cores
from dynaslim.version import __version__

Arm = Callable[[], object]


def interleave(
    arms: Mapping[str, Arm], rounds: int, on_round: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Time the arms in turn; returns milliseconds of every arm in every round.

    The order is reversed in every other round. Each arm first runs once untimed.
    """
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        order = list(arms.items())
        for name, arm in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            arm()
            times[name].append((time.perf_counter() - start) * 1e3)
        if on_round is not None:
            on_round()
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of a sample."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """`summary` of the ratios of two arms' times, each taken within one round."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def hardware() -> dict[str, Any]:
    """The machine's GPU (if any), processor, cores and system, and library versions."""
    versions = {}
    for library in ("torch", "onnxruntime", "openvino", "numpy"):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    # if torch has not been imported, nothing has run on a GPU
    torch = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_available()
    return {
        **({"gpu": torch.cuda.get_device_name()} if torch is not None and gpu else {}),
        "processor": processor_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "dynaslim": __version__,
        **versions,
    }
