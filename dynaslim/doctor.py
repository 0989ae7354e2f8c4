"""What is installed and whether it works, with the commands that install the rest.

Libraries are imported and backends run in other processes, because a library can crash its process
(built for other instructions) or never return. `python -m dynaslim.doctor TASK...` is such a
process: it runs its tasks in order and prints their results as lines of JSON.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

from dynaslim.errors import DynaslimError
from dynaslim.progress import progress
from dynaslim.runtime import cache
from dynaslim.runtime.backends import BACKENDS, SUPPORTED
from dynaslim.runtime.libraries import installed
from dynaslim.version import __version__

NEEDS: Final = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
"""Libraries of the backends besides torch."""
MODULES: Final = {"pillow": "PIL", "pyyaml": "yaml"}
"""Modules whose names differ from those of their libraries."""
LIBRARIES_S: Final = 180.0
"""Seconds that importing all libraries may take; a cold disk is slow."""
TOLERANCE: Final = 1e-3
"""Largest error of a backend that works, relative to the network's largest output."""

Values = dict[str, Any]


class Library(NamedTuple):
    name: str
    extras: tuple[str, ...] = ()
    """Extras of dynaslim that need it; none if it is required."""

    @property
    def module(self) -> str:
        return MODULES.get(self.name, self.name.replace("-", "_"))


def libraries(requirements: Iterable[str]) -> list[Library]:
    """The libraries in a package's metadata, without those for its development."""
    found: dict[str, tuple[str, ...]] = {}
    for line in requirements:
        name = re.split(r"[^\w.-]", line)[0]
        extras = tuple(re.findall(r"extra == ['\"]([\w-]+)", line))
        if name != "dynaslim" and not {"dev", "docs"}.intersection(extras):
            found[name] = found.get(name, ()) + extras
    return [Library(name, extras) for name, extras in found.items()]


try:
    LIBRARIES = libraries(metadata.requires("dynaslim") or [])
except metadata.PackageNotFoundError:  # source code that is not installed
    LIBRARIES = []


def examine(*, quick: bool = False, timeout_s: float = 120.0) -> Values:
    """Check the installation and the machine; JSON values. `ok` is False if there are `problems`.

    `quick` leaves out the backend that compiles for half a minute, looks libraries up without
    importing them, and runs the other backends in one process. `timeout_s` limits each process in
    which backends run.
    """
    imports = [f"import:{one.module}" for one in LIBRARIES if installed(one.module)]
    tasks = ["torch"] if installed("torch") else []
    tasks += [f"backend:{name}" for name in BACKENDS if _why_not_tried(name, quick) is None]
    runs = [tasks] if quick else [imports, *([task] for task in tasks)]
    results: dict[str, Values] = {}
    with progress("examining", len(runs)) as bar:
        for run in runs:
            results |= _run(run, LIBRARIES_S if run is imports else timeout_s)
            note = "libraries" if run is imports else " ".join(run).replace("backend:", "")
            bar.advance(note=note)
    torch = results.get("torch", {})
    gpu = {key: torch.get(key) for key in ("driver", "cuda")}
    gpu |= {"devices": torch.get("devices", []), "why_not": torch.get("error")}
    if "cuda" not in torch:
        gpu["why_not"] = "torch does not load"
    found = {
        "dynaslim": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": [_library(one, results, quick) for one in LIBRARIES],
        "backends": [_backend(name, results, gpu, quick) for name in BACKENDS],
        "processor": {
            "name": cache.processor_name(),
            "cores": os.cpu_count(),
            "usable_cores": cache.usable_cores(),
            "cgroup_cores": container_cores(),
        },
        "threads": {
            "torch": torch.get("threads"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "gpu": gpu,
        "cache": describe_cache(),
    }
    problems = list(_problems(found))
    return {"ok": not problems, "problems": problems, "hints": list(_hints(found)), **found}


# -- running tasks in other processes --------------------------------------------------------------


def _run(tasks: list[str], seconds: float) -> dict[str, Values]:
    """Results by task.

    A task that is running when its process crashes or times out is repeated as the first of a new
    process: only a failure there is certainly due to that task.
    """
    results: dict[str, Values] = {task: {} for task in tasks}
    while tasks:
        lines, ending = run_process(tasks, seconds)
        for line in lines:
            results[line.pop("task")].update(line)
        if ending is None:
            break
        current = min(sum("error" in line for line in lines), len(tasks) - 1)
        if current == 0:
            results[tasks[0]]["error"] = ending
        tasks = tasks[max(current, 1) :]
    return results


def run_process(tasks: list[str], seconds: float) -> tuple[list[Values], str | None]:
    """Run tasks in a process: what it printed, and how it ended if it crashed or timed out."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dynaslim.doctor", *tasks],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # to end a compiler that it starts, too
    )
    try:
        out, errors = process.communicate(timeout=seconds)
        last = errors.strip().splitlines()[-1:]
        ending = last[0] if last else f"ended its process with code {process.returncode}"
        if process.returncode < 0:
            number = -process.returncode
            name = next((s.name for s in signal.Signals if s == number), f"signal {number}")
            ending = f"ended its process by {name}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        ending = f"gave no answer within {seconds:g} s"
    except BaseException:  # Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = []
    for line in out.splitlines():
        with suppress(ValueError):  # the last line of a process that was killed
            lines.append(json.loads(line))
    return lines, ending if process.returncode else None


def main(*tasks: str) -> None:
    """Run tasks in this process; what libraries print goes to standard error."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for task in tasks:

        def report(task: str = task, **values: object) -> None:
            lines.write(json.dumps({"task": task, **values}) + "\n")
            lines.flush()

        part, _, name = task.partition(":")
        why = None
        try:
            if part == "import":
                import_module(name)
            elif part == "torch":
                _examine_torch(report)
            else:
                _run_backend(report, name)
        except BaseException as error:  # a library can even raise SystemExit
            kind = [] if isinstance(error, DynaslimError) else [type(error).__name__]
            why = ": ".join([*kind, *str(error).strip().splitlines()[:1]])
        report(error=why)


def _examine_torch(report: Callable[..., None]) -> None:
    import torch
    from torch.utils import collect_env

    report(cuda=torch.version.cuda, threads=torch.get_num_threads())
    driver = collect_env.get_nvidia_driver_version(collect_env.run)  # type: ignore[no-untyped-call]
    report(driver=driver)
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    devices = [{"name": one.name, "memory_bytes": one.total_memory} for one in found]
    if torch.backends.mps.is_available():
        devices = [{"name": "Apple GPU (mps)", "memory_bytes": None}]
    report(devices=devices)
    if not devices:
        _start_cuda()  # raises the reason


def _start_cuda() -> None:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise DynaslimError("torch is a build for CPUs")
    torch.cuda.init()  # type: ignore[no-untyped-call]


def _run_backend(report: Callable[..., None], name: str) -> None:
    """Route a few rows of a small network by a backend and compare them with the network's."""
    import torch

    if name == "cudagraph":
        _start_cuda()  # raises before the slower imports

    from dynaslim.nn import SlimNet
    from dynaslim.runtime.engine import Engine
    from dynaslim.spec import GateSpec, NetSpec, StageSpec

    trunk = StageSpec((4,), block="conv", stride=2)
    # one choice: two forms, because compilers take long for each
    spec = NetSpec("doctor", (trunk, StageSpec((8,), gate=GateSpec((0,)))), num_classes=3)
    torch.manual_seed(0)
    net = SlimNet(spec, device="cuda" if name == "cudagraph" else None).eval()
    x = torch.randn(4, 3, 16, 16).to(net.classifier.weight.device)
    start = time.perf_counter()
    with closing(Engine(net, backend=name, cache_dir=None)) as engine:
        logits = engine(x).logits
        ready = time.perf_counter()
        engine(x)
        report(ready_s=ready - start, ms=(time.perf_counter() - ready) * 1e3)
    with torch.inference_mode():
        expected = net(x, spec.smallest)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"outputs differ from the network's by {difference:.1e}")


# -- the parts of the result -----------------------------------------------------------------------


def _library(library: Library, results: Mapping[str, Values], quick: bool) -> Values:
    status, version, error = "missing", None, None
    install: str | None = f"pip install {library.name}"
    if installed(library.module):
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(library.name)
        error = results.get(f"import:{library.module}", {}).get("error")
        status = "broken" if error else "installed" if quick else "works"
        # the same version again: its files are damaged, or do not fit this machine
        install = f"{install}{f'=={version}' if version else ''} --force-reinstall"
    return {
        "name": library.name,
        "status": status,
        "version": version,
        "extras": list(library.extras),
        "required": not library.extras,
        "error": error,
        "install": install if status in ("missing", "broken") else None,
    }


def _why_not_tried(name: str, quick: bool) -> tuple[str, str, str | None] | None:
    """Status, reason and installing command of a backend that cannot be tried; None if it can."""
    missing = [library for library in ("torch", *NEEDS.get(name, ())) if not installed(library)]
    if missing:
        line = f"pip install {' '.join(missing)}"
        return "missing", f"{' and '.join(missing)} not installed", line
    if name == "inductor":
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            return "missing", "no C++ compiler", "apt-get install g++ (or set CXX)"
        if quick:
            return "not tried", "it compiles for half a minute, and --quick was given", None
    return None


def _backend(name: str, results: Mapping[str, Values], gpu: Values, quick: bool) -> Values:
    result = results.get(f"backend:{name}", {})
    why, install = result.get("error"), None
    status = "works" if why is None else "broken"
    left_out = _why_not_tried(name, quick)
    if left_out is None and name == "cudagraph" and not (gpu["devices"] and gpu["cuda"]):
        left_out = "unusable", gpu["why_not"] or "needs an NVIDIA GPU", None
    if left_out is not None:
        result, (status, why, install) = {}, left_out
    return {
        "name": name,
        "status": status,
        "precisions": list(SUPPORTED[name]),
        "ready_s": result.get("ready_s"),
        "ms": result.get("ms"),
        "why": why,
        "install": install,
    }


def container_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that a container is limited to, not part of `usable_cores`; None without a limit."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # "max": no limit
            quota, period = (int(w) for f in files for w in (root / f).read_text().split())
            return quota / period if quota > 0 else None
    return None


def describe_cache() -> Values:
    """The folder of compiled programs, its size, and why it cannot be written, if so."""
    variable = cache.VARIABLE if os.environ.get(cache.VARIABLE) else None
    found: Values = {"folder": None, "set_by": variable, "networks": 0, "bytes": 0}
    try:
        folder = cache.cache_folder("").parent
    except RuntimeError as error:
        return {**found, "writable": False, "error": str(error)}
    with suppress(OSError):  # of folders that may not be read
        found["networks"] = sum(entry.is_dir() for entry in folder.iterdir())
        found["bytes"] = sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file())
    why = cache.why_not_writable(folder)
    return {**found, "folder": str(folder), "writable": why is None, "error": why}


def _problems(found: Values) -> Iterator[str]:
    """What is installed or required and does not work, in one line each."""
    for one in found["libraries"]:
        if one["status"] == "broken":
            yield f"{one['name']} does not load: {one['error']}; {one['install']}"
        elif one["status"] == "missing" and one["required"]:
            yield f"{one['name']} is missing: {one['install']}"
    for one in found["backends"]:
        if one["status"] == "broken":
            yield f"backend {one['name']} does not work: {one['why']}"


def _hints(found: Values) -> Iterator[str]:
    """What could be better, in one line each."""
    rest = [o["name"] for o in found["libraries"] if not o["required"] and o["status"] == "missing"]
    if rest:
        yield f"optional libraries are missing: pip install {' '.join(rest)}"
    if not found["libraries"]:
        yield "dynaslim is not installed, so its libraries are unknown: pip install -e ."
    limit, usable = found["processor"]["cgroup_cores"], found["processor"]["usable_cores"]
    if limit is not None and limit < usable:
        yield (
            f"a limit allows {limit:g} cores of {usable}, which threads do not see: "
            f"start programs with taskset -c 0-{max(0, round(limit) - 1)}"
        )
    kept = found["cache"]
    if not kept["writable"]:
        yield (
            f"compiled programs cannot be kept in {kept['folder'] or 'any folder'} "
            f"({kept['error']}), so each start compiles anew: set {cache.VARIABLE} to another "
            f"folder"
        )
    if found["gpu"]["driver"] and found["gpu"]["cuda"] is None:
        yield "there is an NVIDIA driver, but torch is a build for CPUs: install a CUDA one"


if __name__ == "__main__":
    main(*sys.argv[1:])
