"""Checks which libraries and backends work, and gives the commands that install missing ones.

Libraries are imported and backends run (`python -m dynaslim.doctor BACKEND...`) in subprocesses,
because a library can crash its process (for example, if built for another instruction set) or hang.
For a description of the machine, use `python -m torch.utils.collect_env`.
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
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from importlib import metadata
from typing import Any, Final, NamedTuple

from dynaslim.errors import DynaslimError
from dynaslim.progress import progress
from dynaslim.runtime import cache
from dynaslim.runtime.backends import BACKENDS, SUPPORTED
from dynaslim.runtime.libraries import installed
from dynaslim.version import __version__

NEEDS: Final = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
"""Libraries that a backend needs besides torch."""
MODULES: Final = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "opentelemetry-distro": "opentelemetry.distro",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry-instrumentation-fastapi": "opentelemetry.instrumentation.fastapi",
}
"""Names of modules that differ from the names of their libraries."""
LIBRARY_S: Final = 120.0
"""Time limit in seconds for importing a library; the first read from a slow disk takes long."""
TOLERANCE: Final = 1e-3
"""Largest error of a working backend, relative to the network's largest output."""

Values = dict[str, Any]


class Library(NamedTuple):
    name: str
    extras: tuple[str, ...] = ()
    """Extras of dynaslim that need it; empty for a required library."""

    @property
    def module(self) -> str:
        return MODULES.get(self.name, self.name.replace("-", "_"))


def libraries(requirements: Iterable[str]) -> list[Library]:
    """The libraries in a package's requirements, except those of the extras dev and docs."""
    found: dict[str, tuple[str, ...]] = {}
    for line in requirements:
        name = re.split(r"[^\w.-]", line)[0]
        extras = tuple(re.findall(r"extra == ['\"]([\w-]+)", line))
        if name != "dynaslim" and not {"dev", "docs"}.intersection(extras):
            found[name] = found.get(name, ()) + extras
    return [Library(name, extras) for name, extras in found.items()]


try:
    LIBRARIES = libraries(metadata.requires("dynaslim") or [])
except metadata.PackageNotFoundError:  # dynaslim is run from source, not installed
    LIBRARIES = []


def examine(*, quick: bool = False, timeout_s: float = 120.0) -> Values:
    """Check the installation; returns JSON values. `ok` is False if there are `problems`.

    `quick` skips inductor, which compiles for half a minute, looks libraries up without importing
    them, and runs the other backends in one process. `timeout_s` limits each process that runs
    backends.
    """
    libraries = []
    results = {name: left_out for name in BACKENDS if (left_out := _left_out(name, quick))}
    tried = [name for name in BACKENDS if name not in results]
    runs = [tried] if quick else [[name] for name in tried]
    with progress("examining", len(LIBRARIES) + len(runs)) as bar:
        for library in LIBRARIES:
            libraries.append(_library(library, quick))
            bar.advance(note=library.name)
        for names in runs:
            results |= run_backends(names, timeout_s)
            bar.advance(note=" ".join(names))
    found = {
        "dynaslim": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": libraries,
        "backends": [_backend(name, results[name]) for name in BACKENDS],
        "cache": describe_cache(),
    }
    problems = list(_problems(found))
    return {"ok": not problems, "problems": problems, "hints": list(_hints(found)), **found}


# -- in subprocesses -------------------------------------------------------------------------------


def run_process(*arguments: str, seconds: float) -> tuple[str, str | None]:
    """Run Python with arguments; returns its output, and an error message if it failed."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that killpg also ends a compiler that it starts
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except BaseException as error:  # Ctrl-C too
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return "", f"gave no answer within {seconds:g} s"
        raise
    if process.returncode < 0:
        return out, f"ended its process by {signal.Signals(-process.returncode).name}"
    last = errors.strip().splitlines()[-1:] or [f"ended its process with {process.returncode}"]
    return out, last[0] if process.returncode else None


def run_backends(names: list[str], seconds: float) -> dict[str, Values]:
    """Results by backend, from one process for all; if that fails, from one process for each."""
    out, why = run_process("-m", "dynaslim.doctor", *names, seconds=seconds)
    if why is None:
        return dict(json.loads(out.splitlines()[-1]))
    if len(names) == 1:
        return {names[0]: {"status": "broken", "why": why}}
    return {name: run_backends([name], seconds)[name] for name in names}


def _run_backend(name: str) -> Values:
    """Route a few rows through a small network by a backend and compare with the network itself."""
    import torch

    if name == "cudagraph":
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:  # no GPU, no driver, or a build for CPUs
            return {"status": "unusable", "why": str(error).strip().splitlines()[0]}

    from dynaslim.nn import SlimNet
    from dynaslim.runtime.engine import Engine
    from dynaslim.spec import GateSpec, NetSpec, StageSpec

    trunk = StageSpec((4,), block="conv", stride=2)
    # one choice, so that only two variants are compiled: compilers take long for each
    spec = NetSpec("doctor", (trunk, StageSpec((8,), gate=GateSpec((0,)))), num_classes=3)
    torch.manual_seed(0)
    net = SlimNet(spec, device="cuda" if name == "cudagraph" else None).eval()
    x = torch.randn(4, 3, 16, 16).to(net.device)
    start = time.perf_counter()
    with closing(Engine(net, backend=name, cache_dir=None)) as engine:
        logits = engine(x).logits
        ready = time.perf_counter()
        engine(x)
        times = {"ready_s": ready - start, "ms": (time.perf_counter() - ready) * 1e3}
    with torch.inference_mode():
        expected = net(x, spec.smallest)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"outputs differ from the network's by {difference:.1e}")
    return times


# -- the parts of the result -----------------------------------------------------------------------


def _library(library: Library, quick: bool) -> Values:
    status, version, error = "missing", None, None
    install = f"pip install {library.name}"
    if installed(library.module):
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(library.name)
        if not quick:  # -P: a module in the working folder may have a library's name
            _, error = run_process("-P", "-c", f"import {library.module}", seconds=LIBRARY_S)
        status = "broken" if error else "installed" if quick else "works"
        # if broken, install the same version again: its files are damaged or for another machine
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


def _left_out(name: str, quick: bool) -> Values:
    """The result for a backend that cannot be tried; empty if it can."""
    missing = [library for library in ("torch", *NEEDS.get(name, ())) if not installed(library)]
    if missing:
        why, install = f"{' and '.join(missing)} not installed", f"pip install {' '.join(missing)}"
        return {"status": "missing", "why": why, "install": install}
    if name == "inductor":
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            install = "apt-get install g++ (or set CXX)"
            return {"status": "missing", "why": "no C++ compiler", "install": install}
        if quick:
            why = "it compiles for half a minute, and --quick was given"
            return {"status": "not tried", "why": why}
    return {}


def _backend(name: str, result: Values) -> Values:
    unknown = dict.fromkeys(("ready_s", "ms", "why", "install"))
    precisions = list(SUPPORTED[name])
    return {"name": name, "status": "works", "precisions": precisions, **unknown, **result}


def describe_cache() -> Values:
    """The folder of compiled programs, and the reason if it is not writable."""
    try:
        folder = cache.cache_folder("").parent
    except RuntimeError as error:
        return {"folder": None, "writable": False, "error": str(error)}
    why = cache.why_not_writable(folder)
    return {"folder": str(folder), "writable": why is None, "error": why}


def _problems(found: Values) -> Iterator[str]:
    """One line for each broken part and each missing required library."""
    for one in found["libraries"]:
        if one["status"] == "broken":
            yield f"{one['name']} does not load: {one['error']}; {one['install']}"
        elif one["status"] == "missing" and one["required"]:
            yield f"{one['name']} is missing: {one['install']}"
    for one in found["backends"]:
        if one["status"] == "broken":
            yield f"backend {one['name']} does not work: {one['why']}"


def _hints(found: Values) -> Iterator[str]:
    """One line for each optional improvement."""
    rest = [o["name"] for o in found["libraries"] if not o["required"] and o["status"] == "missing"]
    if rest:
        yield f"optional libraries are missing: pip install {' '.join(rest)}"
    if not found["libraries"]:
        yield "dynaslim is not installed, so its libraries are unknown: pip install -e ."
    kept = found["cache"]
    if not kept["writable"]:
        yield (
            f"compiled programs cannot be kept in {kept['folder'] or 'any folder'} "
            f"({kept['error']}), so each start compiles anew: set {cache.VARIABLE} to another "
            f"folder"
        )


if __name__ == "__main__":
    try:
        found = {name: _run_backend(name) for name in sys.argv[1:]}
        sys.stdout.write(f"\n{json.dumps(found)}\n")  # on a new line after libraries' own output
    except DynaslimError as error:  # without the type; other errors end with "Type: message"
        sys.exit(str(error))
