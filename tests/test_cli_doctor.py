"""The doctor, with sound installations and with all that can be wrong with one."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from helpers import start_dynaslim

from dynaslim import cli, doctor
from dynaslim.doctor import machine
from dynaslim.doctor.libraries import LIBRARIES, Library
from dynaslim.doctor.probe import Probe
from dynaslim.runtime.backends import BACKENDS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """A folder whose modules come before those that are installed, in all processes."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def _only(monkeypatch, *libraries, backends=()):
    """Let the doctor know no more than these."""
    monkeypatch.setattr(doctor, "LIBRARIES", libraries)
    monkeypatch.setattr(doctor, "BACKENDS", {name: BACKENDS[name] for name in backends})


NUMPY = next(one for one in LIBRARIES if one.name == "numpy")


def test_the_libraries_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return [r.split(">")[0].split("[")[0] for r in requirements if not r.startswith("dynaslim")]

    extras = project["optional-dependencies"]
    used = {n for extra, r in extras.items() if extra not in ("dev", "docs") for n in names(r)}
    assert [one.name for one in LIBRARIES if one.required] == names(project["dependencies"])
    assert {one.name for one in LIBRARIES if not one.required} == used


def test_backends_run_and_the_machine_is_told(monkeypatch, capsys):
    """Real runs of two backends, through the verb."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    _only(monkeypatch, NUMPY, backends=("eager", "inductor", "onnxruntime", "cudagraph"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.run(["doctor", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["problems"] == []
    backends = {one["name"]: one for one in found["backends"]}
    for name in ("eager", "onnxruntime"):
        assert backends[name]["status"] == "works", backends[name]
        assert 0 < backends[name]["ms"] < 60_000
    assert backends["inductor"]["status"] in ("not tried", "missing")
    assert found["processor"]["usable_cores"] >= 1
    assert found["memory"]["total_bytes"] > 2**28
    assert found["threads"] == {"torch": 1, "OMP_NUM_THREADS": "1"}
    assert found["gpu"]["devices"] or found["gpu"]["why_not"]
    assert found["cache"]["folder"] == os.environ["DYNASLIM_CACHE"]
    assert found["cache"]["set_by"] == "DYNASLIM_CACHE"


def test_a_library_that_fails_strangely_is_named_and_the_rest_goes_on(fakes, monkeypatch, capsys):
    (fakes / "sharedlib.py").write_text(
        "raise OSError('libopen.so.7: cannot open shared object file: No such file')"
    )
    (fakes / "illegal.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    (fakes / "leaves.py").write_text("import sys; sys.exit('no licence')")
    (fakes / "loud.py").write_text('print(\'{"module": "numpy", "error": "none"}\')')
    (fakes / "stuck.py").write_text("import time; time.sleep(600)")
    names = ("sharedlib", "illegal", "leaves", "loud", "stuck")
    monkeypatch.setattr(doctor, "LIBRARIES_S", 3.0)
    _only(monkeypatch, *(Library(n, n, "tests", required=False) for n in names), NUMPY)
    assert cli.run(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert [line.split()[1] for line in problems] == ["sharedlib", "illegal", "leaves", "stuck"]
    assert "OSError: libopen.so.7: cannot open shared object file" in problems[0]
    assert "pip install sharedlib --force-reinstall" in problems[0]
    assert "SIGILL" in problems[1]
    assert "no licence" in problems[2]
    assert "no answer within 3 s" in problems[3]
    assert "all that is installed works" not in out


def test_a_backend_whose_library_does_not_load_is_broken(fakes, monkeypatch):
    package = fakes / "openvino"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libopenvino.so: undefined symbol')")
    openvino = next(one for one in LIBRARIES if one.name == "openvino")
    _only(monkeypatch, openvino, backends=("openvino",))
    monkeypatch.setitem(doctor.NEEDS, "openvino", ("openvino",))
    found = doctor.examine()
    [library], [backend] = found["libraries"], found["backends"]
    assert library["status"] == backend["status"] == "broken"
    assert "undefined symbol" in library["error"]
    assert "undefined symbol" in backend["why"]
    assert found["ok"] is False
    assert len(found["problems"]) == 2


def test_without_anything_optional(fakes):
    """In a process that cannot see the extras: no crash, exit code 0, and what installs them."""
    extras = [one.module for one in LIBRARIES if not one.required]
    (fakes / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        hidden = name.partition('.')[0] in {extras}\n"
        "        return None if hidden else super().find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Finder\n"
    )
    script = (
        "from dynaslim import cli, doctor\n"
        "keep = ('numpy', 'safetensors')  # the others take their time\n"
        "doctor.LIBRARIES = [o for o in doctor.LIBRARIES if not o.required or o.name in keep]\n"
        "cli.main(['doctor', '--quick', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    libraries = {one["name"]: one for one in found["libraries"]}
    assert libraries["numpy"]["status"] == "installed", "looked up, not loaded"
    assert libraries["openvino"] == {
        "name": "openvino",
        "status": "missing",
        "version": None,
        "use": "backend openvino",
        "required": False,
        "error": None,
        "install": "pip install openvino",
    }
    backends = {one["name"]: one for one in found["backends"]}
    assert backends["eager"]["status"] == "works"
    assert backends["onnxruntime"]["status"] == "missing"
    assert backends["onnxruntime"]["install"] == "pip install onnx onnxruntime"
    assert any("pip install onnx onnxruntime openvino ray" in hint for hint in found["hints"])


def test_a_library_that_it_cannot_do_without(monkeypatch):
    _only(monkeypatch, Library("not-there", "not_there", "all"), backends=("eager",))
    monkeypatch.setattr(doctor, "is_installed", lambda module: module == "numpy")
    found = doctor.examine()
    assert found["problems"] == ["not-there is missing: pip install not-there"]
    assert found["backends"][0]["status"] == "missing"
    assert found["backends"][0]["install"] == "pip install torch"
    assert found["gpu"]["why_not"] == "torch does not load"


def test_what_ends_the_process_of_all_is_tried_alone(fakes, monkeypatch):
    """--quick: one process for everything; where it ends, each that is left gets its own."""
    package = fakes / "openvino"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    _only(monkeypatch, NUMPY, backends=("eager", "openvino"))
    monkeypatch.setitem(doctor.NEEDS, "openvino", ("openvino",))
    started, tasks = Probe.__init__, []

    def start(self, *task):
        tasks.append(task)
        started(self, *task)

    monkeypatch.setattr(Probe, "__init__", start)
    found = doctor.examine(quick=True)
    assert tasks == [("together", "torch", "eager", "openvino"), ("backend", "openvino")]
    eager, openvino = found["backends"]
    assert (eager["status"], openvino["status"]) == ("works", "broken")
    assert "SIGILL" in openvino["why"]
    assert found["libraries"][0]["status"] == "installed"


def test_a_backend_that_gives_no_answer(monkeypatch):
    _only(monkeypatch, NUMPY, backends=("eager",))
    found = doctor.examine(timeout_s=0.05)
    assert found["backends"][0]["status"] == "broken"
    assert found["problems"] == ["backend eager does not work: gave no answer within 0.05 s"]


def test_a_probe_that_is_killed_takes_its_children_along(fakes, tmp_path):
    note = tmp_path / "pid"
    (fakes / "parent.py").write_text(
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    probe = Probe("import", "parent")
    deadline = time.monotonic() + 30
    while not note.exists() or not note.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    probe.kill()
    probe.wait(10)
    child = int(note.read_text())
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_ctrl_c_ends_all_of_it(fakes, tmp_path):
    note = tmp_path / "started"
    (fakes / "torch.py").write_text(
        f"import time; open({str(note)!r}, 'w').close(); time.sleep(600)"
    )
    started = start_dynaslim(["doctor"], stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=20)
    assert started.returncode == 130
    assert err.strip().splitlines()[-1] == "dynaslim: interrupted"
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("torch", "driver", "message"),
    [
        (None, None, "torch does not load"),
        ({"cuda_build": None}, None, "torch is a build for CPUs"),
        ({"cuda_build": None}, "550.1", "torch is a build for CPUs, though there is a driver"),
        ({"cuda_build": "12.8"}, None, "no NVIDIA driver"),
        ({"cuda_build": "12.8", "error": "RuntimeError: too old"}, "450.1", "too old"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, torch, driver, message):
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: driver)
    facts = torch and {"devices": [], "mps": False, "error": None, **torch}
    found = machine.describe_gpu(facts)
    assert found["devices"] == []
    assert message in found["why_not"]


def test_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: "550.1")
    device = {"name": "H100", "memory_bytes": 80 * 2**30}
    facts = {"devices": [device], "mps": False, "error": None, "cuda_build": "12.8"}
    found = machine.describe_gpu(facts)
    assert found == {"devices": [device], "driver": "550.1", "cuda": "12.8", "why_not": None}


def test_limits_of_a_container(tmp_path, monkeypatch):
    assert machine._cgroup_cores(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._cgroup_cores(tmp_path) is None
    assert machine.describe_memory(tmp_path)["cgroup_limit_bytes"] is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("104857600\n")
    assert machine._cgroup_cores(tmp_path) == 1.5
    assert machine.describe_memory(tmp_path)["cgroup_limit_bytes"] == 104857600
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("200000")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert machine._cgroup_cores(tmp_path) == 2


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DYNASLIM_CACHE", str(tmp_path / "file" / "cache"))
    found = machine.describe_cache()
    assert found["writable"] is False
    assert found["error"]
    monkeypatch.setenv("DYNASLIM_CACHE", str(tmp_path / "cache"))
    assert machine.describe_cache()["writable"] is True
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache" / "network").mkdir(parents=True)
    (tmp_path / "cache" / "network" / "program").write_bytes(b"x" * 100)
    found = machine.describe_cache()
    assert (found["networks"], found["bytes"]) == (1, 100)


def test_bad_flags(capsys):
    assert cli.run(["doctor", "--timeout", "0"]) == 2
    assert "--timeout 0: must be above 0" in capsys.readouterr().err
