"""What is installed, what works, and what to do about what does not.

Nothing here needs torch or anything optional: what could fail is tried in processes of its own.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Final, TypeVar

from dynaslim.doctor.libraries import LIBRARIES, describe, is_installed, pip_line
from dynaslim.doctor.machine import (
    cxx_compiler,
    describe_cache,
    describe_gpu,
    describe_memory,
    describe_processor,
)
from dynaslim.doctor.probe import Probe
from dynaslim.runtime.backends import BACKENDS, SUPPORTED
from dynaslim.version import __version__

NEEDS: Final = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
"""Libraries of the backends beside torch."""
GPU_BACKEND: Final = "cudagraph"
LIBRARIES_S: Final = 180.0
"""Seconds that importing all libraries may take; a cold disk is slow."""

T = TypeVar("T")
_ALWAYS: Final = ("libraries", "torch")
Said = tuple[list[dict[str, Any]], str | None]


def steps(*, quick: bool = False) -> list[str]:
    """What `examine` tells of as done; a backend for GPUs it tries untold, where there is one."""
    tried = (name for name in BACKENDS if _why_not_tried(name, quick) is None)
    always = _ALWAYS[1:] if quick else _ALWAYS
    return [*always, *(name for name in tried if name != GPU_BACKEND)]


def examine(
    *, quick: bool = False, timeout_s: float = 120.0, on_done: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Look at everything; JSON values. `ok` says whether all works that is installed.

    `quick` leaves out the backend that compiles for half a minute, looks libraries up without
    loading them, and tries all that is left in one process. `timeout_s` is what a backend may take.
    `on_done` is told what has been tried.
    """
    with _Probes(on_done) as probes:
        modules = [one.module for one in LIBRARIES if is_installed(one.module) and not quick]
        has_torch = is_installed("torch")
        tasks = [name for name in steps(quick=quick) if name != _ALWAYS[0]]
        if not has_torch:
            tasks.remove("torch")
        done = _together(probes, timeout_s, tasks) if quick else {}
        imports = probes.call(None if quick else "libraries", lambda: _import_all(probes, modules))
        runs = {
            name: probes.call(name, partial(done.__getitem__, name))
            if name in done
            else probes.start(name, timeout_s, *_task(name))
            for name in tasks
        }
        errors = _result(imports)
        facts = runs.pop("torch", None)
        torch = None if facts is None else _last(_result(facts))
        if torch and torch["devices"]:
            runs[GPU_BACKEND] = probes.start(None, timeout_s, *_task(GPU_BACKEND))
        gpu = describe_gpu(torch)
        backends = [
            _describe_backend(name, _result(runs[name]) if name in runs else None, gpu, quick)
            for name in BACKENDS
        ]
    libraries = [describe(one, errors.get(one.module), loaded=not quick) for one in LIBRARIES]
    found = {
        "dynaslim": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": libraries,
        "backends": backends,
        "processor": describe_processor(),
        "threads": {
            "torch": torch and torch["threads"],
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "memory": describe_memory(),
        "gpu": gpu,
        "cache": describe_cache(),
    }
    problems = list(_problems(found))
    return {"ok": not problems, "problems": problems, "hints": list(_hints(found)), **found}


class _Probes:
    """Probes that run side by side, none of which outlives the examination."""

    def __init__(self, on_done: Callable[[str], None] | None) -> None:
        self._on_done = on_done
        self._running: list[Probe] = []
        self._lock = threading.Lock()
        self._ended = False
        self._pool = ThreadPoolExecutor(max_workers=min(4, max(2, (os.cpu_count() or 2) // 2)))

    def __enter__(self) -> _Probes:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for probe in self._running:
                probe.kill()
        self._pool.shutdown(cancel_futures=True)

    def run(self, seconds: float, *task: str) -> Said:
        """Try something, here and now."""
        with self._lock:
            if self._ended:  # Ctrl-C
                raise RuntimeError("the examination has ended")
            probe = Probe(*task)
            self._running.append(probe)
        return probe.wait(seconds)

    def call(self, label: str | None, action: Callable[[], T]) -> Future[T]:
        """Do something beside the rest, and tell when it is done."""
        return self._pool.submit(self._told, label, action)

    def start(self, label: str | None, seconds: float, *task: str) -> Future[Said]:
        """Try something beside the rest."""
        return self.call(label, lambda: self.run(seconds, *task))

    def _told(self, label: str | None, action: Callable[[], T]) -> T:
        result = action()
        if self._on_done is not None and label is not None:
            self._on_done(label)
        return result


def _result(future: Future[T]) -> T:
    """What it gives. Ctrl-C that comes just before a wait does not end it: look now and then."""
    while not future.done():
        wait([future], timeout=0.5)
    return future.result()


def _import_all(probes: _Probes, modules: list[str]) -> dict[str, str | None]:
    """Why each module does not load; None for those that do."""
    errors: dict[str, str | None] = {}
    left = modules
    while left:
        said, ending = probes.run(LIBRARIES_S, "import", *left)
        errors.update({one["module"]: one["error"] for one in said})
        if ending is None:
            break
        culprit = said[-1]["module"] if said else left[0]
        errors[culprit] = ending
        left = left[left.index(culprit) + 1 :]
    return errors


def _task(name: str) -> tuple[str, ...]:
    """What a probe is told to do for a backend, or for torch's own facts."""
    return ("torch",) if name == "torch" else ("backend", name)


def _together(probes: _Probes, seconds: float, names: list[str]) -> dict[str, Said]:
    """Try everything in one process, which imports torch once.

    What it did not come to the end of is not in the result: that is tried alone, where an end of
    the process or a wait without end can be told of the one that it is due to.
    """
    lines, _ = probes.run(seconds, "together", *names)
    done = {line["of"] for line in lines if line.get("done")}
    own = {name: [line for line in lines if line["of"] == name] for name in done}
    return {name: ([one for one in said if "done" not in one], None) for name, said in own.items()}


def _last(said: Said) -> dict[str, Any] | None:
    """The last that a probe said, with how it ended if that was before its time."""
    lines, ending = said
    if not lines:
        return None
    return {**lines[-1], "error": ending or lines[-1].get("error")}


# -- backends -------------------------------------------------------------------------------------


def _why_not_tried(name: str, quick: bool) -> tuple[str, str, str | None] | None:
    """Status, reason, and what installs it, of a backend that cannot be tried; None if it can."""
    missing = [library for library in ("torch", *NEEDS.get(name, ())) if not is_installed(library)]
    if missing:
        return "missing", f"{' and '.join(missing)} not installed", pip_line(missing)
    if name == "inductor" and cxx_compiler() is None:
        return "missing", "no C++ compiler", "apt-get install g++ (or set CXX)"
    if name == "inductor" and quick:
        return "not tried", "it compiles for half a minute, and --quick was given", None
    return None


def _describe_backend(
    name: str, said: Said | None, gpu: Mapping[str, Any], quick: bool
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": name,
        "status": "works",
        "precisions": list(SUPPORTED[name]),
        "ready_s": None,
        "ms": None,
        "why": None,
        "install": None,
    }
    if said is None:
        no_gpu = ("unusable", gpu["why_not"] or "needs an NVIDIA GPU", None)
        status, why, install = _why_not_tried(name, quick) or no_gpu
        return {**told, "status": status, "why": why, "install": install}
    lines, ending = said
    for line in lines:
        told.update({key: line[key] for key in ("ready_s", "ms") if key in line})
    why = ending or (lines[-1]["error"] if lines else "said nothing")
    return {**told, "status": "works" if why is None else "broken", "why": why}


# -- what it comes to -----------------------------------------------------------------------------


def _problems(found: Mapping[str, Any]) -> list[str]:
    """What does not work though it is installed, or has to be; one line each."""
    lines = []
    for one in found["libraries"]:
        if one["status"] == "broken":
            lines.append(f"{one['name']} does not load: {one['error']}; {one['install']}")
        elif one["status"] == "missing" and one["required"]:
            lines.append(f"{one['name']} is missing: {one['install']}")
    lines += [
        f"backend {one['name']} does not work: {one['why']}"
        for one in found["backends"]
        if one["status"] == "broken"
    ]
    return lines


def _hints(found: Mapping[str, Any]) -> list[str]:
    """What could be better; one line each."""
    lines = []
    optional = [one["name"] for one in found["libraries"] if not one["required"]]
    missing = [one["name"] for one in found["libraries"] if one["status"] == "missing"]
    wanted = [name for name in optional if name in missing]
    if wanted:
        lines.append(f"optional libraries are missing: {pip_line(wanted)}")
    cores = found["processor"]
    limit = cores["cgroup_cores"]
    if limit is not None and limit < cores["usable_cores"]:
        lines.append(
            f"a limit allows {limit:g} cores of {cores['usable_cores']}, which threads do not see: "
            f"start programs with taskset -c 0-{max(0, round(limit) - 1)}"
        )
    if not found["cache"]["writable"]:
        lines.append(
            f"compiled programs cannot be kept in {found['cache']['folder'] or 'any folder'} "
            f"({found['cache']['error']}), so each start compiles anew: set DYNASLIM_CACHE to "
            f"another folder"
        )
    gpu = found["gpu"]
    if gpu["driver"] and gpu["cuda"] is None:
        lines.append("there is an NVIDIA driver, but torch is a build for CPUs: install a CUDA one")
    return lines
