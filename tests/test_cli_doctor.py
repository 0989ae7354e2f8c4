"""The doctor, with sound installations and with all that can be wrong with one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import run_ok, start_dynaslim, until

from dynaslim import cli, doctor
from dynaslim.doctor import Library
from dynaslim.runtime.backends import BACKENDS

NUMPY = Library("numpy")


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """A folder whose modules come before those that are installed, in all processes."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def _only(monkeypatch, *libraries, backends=()):
    """Limit the doctor to these."""
    monkeypatch.setattr(doctor, "LIBRARIES", libraries)
    monkeypatch.setattr(doctor, "BACKENDS", {name: BACKENDS[name] for name in backends})


def test_libraries_are_those_of_the_metadata():
    lines = [
        "torch>=2.6",
        "jsonargparse[signatures]>=4.49",
        "pillow>=10",
        'onnx>=1.16; extra == "onnxruntime"',
        "onnx>=1.16; extra == 'openvino'",
        'ray[data]<2.64,>=2.50; extra == "ray"',
        'python-multipart>=0.0.18; extra == "serve"',
        'dynaslim[onnxruntime]; extra == "serve"',
        'mkdocs-material>=9.5; extra == "docs"',
        'pytest>=8; extra == "dev"',
    ]
    assert doctor.libraries(lines) == [
        Library("torch"),
        Library("jsonargparse"),
        Library("pillow"),
        Library("onnx", ("onnxruntime", "openvino")),
        Library("ray", ("ray",)),
        Library("python-multipart", ("serve",)),
    ]
    found = doctor.LIBRARIES
    assert {"torch": (), "openvino": ("openvino",)}.items() <= dict(found).items()
    assert all(doctor.installed(one.module) for one in found if not one.extras)


def test_source_code_that_is_not_installed(monkeypatch):
    _only(monkeypatch)
    found = doctor.examine(quick=True)
    assert found["ok"] is True
    assert any("pip install -e ." in hint for hint in found["hints"])


def test_backends_run(monkeypatch, capsys):
    """Real runs of two backends, through the verb."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    _only(monkeypatch, NUMPY, backends=("eager", "inductor", "onnxruntime", "cudagraph"))
    found = json.loads(run_ok(capsys, "doctor", "--quick", "--json"))
    assert found["ok"] is True
    assert found["problems"] == []
    backends = {one["name"]: one for one in found["backends"]}
    for name in ("eager", "onnxruntime"):
        assert backends[name]["status"] == "works", backends[name]
        assert 0 < backends[name]["ms"] < 60_000
    assert backends["inductor"]["status"] in ("not tried", "missing")
    assert backends["cudagraph"]["status"] in ("works", "unusable")
    assert found["cache"]["folder"] == os.environ["DYNASLIM_CACHE"]


def test_a_library_that_fails_strangely_is_named_and_the_rest_goes_on(fakes, monkeypatch, capsys):
    (fakes / "sharedlib.py").write_text(
        "raise OSError('libopen.so.7: cannot open shared object file: No such file')"
    )
    (fakes / "illegal.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    (fakes / "leaves.py").write_text("import sys; sys.exit('no licence')")
    (fakes / "loud.py").write_text('print(\'{"module": "numpy", "error": "none"}\')')
    child = _stuck(fakes / "stuck.py")
    names = ("sharedlib", "illegal", "leaves", "loud", "stuck")
    monkeypatch.setattr(doctor, "LIBRARY_S", 6.0)
    _only(monkeypatch, *(Library(n, ("tests",)) for n in names), NUMPY)
    assert cli.run(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert [line.split()[1] for line in problems] == ["sharedlib", "illegal", "leaves", "stuck"]
    assert "OSError: libopen.so.7: cannot open shared object file" in problems[0]
    assert "pip install sharedlib --force-reinstall" in problems[0]
    assert "SIGILL" in problems[1]
    assert "no licence" in problems[2]
    assert "no answer within 6 s" in problems[3]
    _assert_ends(child)
    assert "everything installed works" not in out


def test_a_backend_whose_library_does_not_load_is_broken(fakes, monkeypatch):
    package = fakes / "openvino"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libopenvino.so: undefined symbol')")
    _only(monkeypatch, Library("openvino", ("openvino",)), backends=("openvino",))
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
    extras = [one.module for one in doctor.LIBRARIES if one.extras]
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
    command = [sys.executable, "-m", "dynaslim", "doctor", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    libraries = {one["name"]: one for one in found["libraries"]}
    assert libraries["numpy"]["status"] == "installed", "looked up, not loaded"
    assert libraries["openvino"] == {
        "name": "openvino",
        "status": "missing",
        "version": None,
        "extras": ["openvino"],
        "required": False,
        "error": None,
        "install": "pip install openvino",
    }
    backends = {one["name"]: one for one in found["backends"]}
    assert backends["eager"]["status"] == "works"
    assert backends["onnxruntime"]["status"] == "missing"
    assert backends["onnxruntime"]["install"] == "pip install onnx onnxruntime"
    assert any("pip install onnx onnxruntime openvino ray" in hint for hint in found["hints"])


def test_a_damaged_library_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "damaged", ModuleType("damaged"))  # its __spec__ is None
    assert not doctor.installed("damaged")


def test_a_library_that_it_cannot_do_without(monkeypatch):
    _only(monkeypatch, Library("not-there"), backends=("eager",))
    monkeypatch.setattr(doctor, "installed", lambda module: module == "numpy")
    found = doctor.examine()
    assert found["problems"] == ["not-there is missing: pip install not-there"]
    assert found["backends"][0]["status"] == "missing"
    assert found["backends"][0]["install"] == "pip install torch"


def test_what_ends_the_process_of_all_is_tried_alone(fakes, monkeypatch):
    """--quick: one process for all backends; if it ends, each gets one of its own."""
    package = fakes / "openvino"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    _only(monkeypatch, NUMPY, backends=("eager", "openvino"))
    monkeypatch.setitem(doctor.NEEDS, "openvino", ("openvino",))
    run_process, processes = doctor.run_process, []

    def run(*arguments, seconds):
        processes.append(arguments[2:])
        return run_process(*arguments, seconds=seconds)

    monkeypatch.setattr(doctor, "run_process", run)
    found = doctor.examine(quick=True)
    assert processes == [("eager", "openvino"), ("eager",), ("openvino",)]
    eager, openvino = found["backends"]
    assert (eager["status"], openvino["status"]) == ("works", "broken")
    assert "SIGILL" in openvino["why"]
    assert found["libraries"][0]["status"] == "installed"


def test_a_backend_that_gives_no_answer(monkeypatch):
    _only(monkeypatch, NUMPY, backends=("eager",))
    found = doctor.examine(timeout_s=0.05)
    assert found["backends"][0]["status"] == "broken"
    assert found["problems"] == ["backend eager does not work: gave no answer within 0.05 s"]


def test_ctrl_c_ends_all_of_it(fakes):
    child = _stuck(fakes / "torch.py")
    started = start_dynaslim(["doctor"], stdin=subprocess.DEVNULL)
    until(child.exists, 60)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert err.strip().splitlines()[-1] == "dynaslim: interrupted"
    assert "Traceback" not in err
    _assert_ends(child)


def _stuck(module):
    """Make a module that starts a process and never loads; the path of that process's number."""
    pid = module.with_suffix(".pid")
    module.write_text(
        "import os, subprocess, time\n"
        "quiet = subprocess.DEVNULL\n"
        "child = subprocess.Popen(['sleep', '600'], stdout=quiet, stderr=quiet)\n"
        f"open({str(pid)!r} + '_', 'w').write(str(child.pid))\n"
        f"os.replace({str(pid)!r} + '_', {str(pid)!r})\n"
        "time.sleep(600)\n"
    )
    return pid


def _assert_ends(pid):
    stat = Path("/proc", pid.read_text(), "stat")
    until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z", 30)


def test_why_there_is_no_gpu(monkeypatch):
    _only(monkeypatch, NUMPY, backends=("cudagraph",))
    why = "Torch not compiled with CUDA enabled"
    result = {"status": "unusable", "why": why}
    monkeypatch.setattr(doctor, "run_backends", lambda *_: {"cudagraph": result})
    found = doctor.examine()
    [backend] = found["backends"]
    assert (backend["status"], backend["why"], backend["ms"]) == ("unusable", why, None)
    assert found["ok"] is True


def test_bad_flags(capsys):
    assert cli.run(["doctor", "--timeout", "0"]) == 2
    assert "--timeout 0: must be above 0" in capsys.readouterr().err
