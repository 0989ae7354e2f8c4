"""What the doctor tries in processes of their own, so that nothing there can take it along.

A library may end the process that loads it (a processor without the instructions that it was built
for) or never return. `Probe` starts such a process, `main` is what runs in it; they speak by lines
of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib import import_module
from typing import Any, Final

TOLERANCE: Final = 1e-3
"""Largest difference to the network, of its largest value, of a backend that works."""


class Probe:
    """A process that tries something."""

    def __init__(self, *task: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dynaslim.doctor.probe", *task],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a compiler that it starts ends with it
        )

    def wait(self, seconds: float) -> tuple[list[dict[str, Any]], str | None]:
        """What it said, and what went wrong if it did not come to its end."""
        try:
            out, err = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            out, _ = self._process.communicate()
            return _said(out), f"gave no answer within {seconds:g} s"
        code = self._process.returncode
        if code == 0:
            return _said(out), None
        if code < 0:
            return _said(out), f"ended its process by {_signal_name(-code)}"
        lines = err.strip().splitlines()
        return _said(out), lines[-1] if lines else f"ended its process with code {code}"

    def kill(self) -> None:
        """End it, and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _said(out: str) -> list[dict[str, Any]]:
    said = []
    for line in out.splitlines():
        try:
            said.append(json.loads(line))
        except ValueError:  # the last of one that was killed
            continue
    return said


# -- in the process -------------------------------------------------------------------------------

Say = Callable[[dict[str, Any]], None]


def main(task: str, *arguments: str) -> None:
    """Do a task; what libraries print goes to standard error."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(values: dict[str, Any]) -> None:
        lines.write(json.dumps(values) + "\n")
        lines.flush()

    tasks: dict[str, Callable[..., None]] = {
        "import": _import_all,
        "torch": _torch_facts,
        "backend": _run_backend,
        "together": _together,
    }
    tasks[task](say, *arguments)


def _import_all(say: Say, *modules: str) -> None:
    """Import modules one by one, each announced: the last one said is the one that ended us."""
    for module in modules:
        say({"module": module, "error": "does not load"})
        say({"module": module, "error": _error_of(partial(import_module, module))})


def _error_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except BaseException as error:  # a library may even ask to exit
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return None


def _torch_facts(say: Say) -> None:
    """What torch was built for and finds here."""
    import torch

    cuda = torch.version.cuda
    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda_build": cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mps": torch.backends.mps.is_available(),
        "devices": [],
        "error": None,
    }
    say(facts)  # asking for devices may end the process
    if cuda is not None or torch.version.hip is not None:
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            facts["devices"].append({"name": found.name, "memory_bytes": found.total_memory})
        if not facts["devices"]:
            facts["error"] = _error_of(torch.cuda.init)
    say(facts)


def _together(say: Say, *names: str) -> None:
    """Torch's facts and backends one after the other, each line with the name that it is of."""
    for name in names:

        def tagged(values: dict[str, Any], name: str = name) -> None:
            say({"of": name, **values})

        if name == "torch":
            _torch_facts(tagged)
        else:
            _run_backend(tagged, name)
        say({"of": name, "done": True})


def _run_backend(say: Say, name: str) -> None:
    """Route a few rows of a small network by a backend and compare them with the network's."""
    say({"error": _error_of(lambda: _route_rows(say, name))})


def _route_rows(say: Say, name: str) -> None:
    import torch

    from dynaslim.errors import DynaslimError
    from dynaslim.nn import SlimNet
    from dynaslim.runtime.engine import Engine
    from dynaslim.spec import GateSpec, NetSpec, StageSpec

    trunk = StageSpec((4,), block="conv", stride=2)
    # one choice: two forms, which is what a compiler takes long for
    spec = NetSpec("doctor", (trunk, StageSpec((8,), gate=GateSpec((0,)))), num_classes=3)
    torch.manual_seed(0)
    net = SlimNet(spec, device="cuda" if name == "cudagraph" else None).eval()
    x = torch.randn(4, 3, 16, 16).to(net.classifier.weight.device)
    start = time.perf_counter()
    with closing(Engine(net, backend=name, cache_dir=None)) as engine:
        logits = engine(x).logits
        ready = time.perf_counter()
        engine(x)
        say({"ready_s": ready - start, "ms": (time.perf_counter() - ready) * 1e3})
    with torch.inference_mode():
        expected = net(x, spec.smallest)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise DynaslimError(f"answers differ from the network's by {difference:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
