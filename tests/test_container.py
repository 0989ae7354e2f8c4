"""The Dockerfile: linted, built where Docker runs, and where not its steps done as it has them."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
from docs_blocks import ROOT
from helpers import free_port, lively, micro_spec, png
from packaging.requirements import Requirement

from dynaslim.checkpoint import Checkpoint
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.export import export_package

TEXT = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
STEPS = [tuple(line.split(maxsplit=1)) for line in TEXT.splitlines() if line.strip()]


def words_of(kind):
    """The arguments of all instructions of a kind, each as a list of words."""
    return [shlex.split(rest) for step, rest in STEPS if step == kind]


def ignored(name):
    """Whether .dockerignore keeps a file or folder of the root out of the build."""
    found = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            keeps = pattern.startswith("!")
            if fnmatch.fnmatch(name, pattern.lstrip("!")):
                found = not keeps
    return found


def test_it_has_no_findings():
    hadolint = shutil.which("hadolint") or Path(sys.executable).with_name("hadolint")
    if not Path(hadolint).exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_is_there_and_nothing_else_is_sent():
    copied = {source.rstrip("/") for words in words_of("COPY") for source in words[:-1]}
    copied = {source for source in copied if not source.startswith(("--from", "/"))}
    assert copied == {path.name for path in ROOT.iterdir() if not ignored(path.name)}
    assert "**/__pycache__" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_user_is_not_root():
    assert words_of("USER")[-1] == ["10001"]
    assert "useradd --system --uid 10001" in TEXT


def closure(names):
    """Distributions with all that they need, of those that are installed here."""
    found, left = {}, list(names)
    while left:
        wanted = Requirement(left.pop())
        extras = wanted.extras or {""}
        made = distribution(wanted.name)
        if found.get(wanted.name, set()) >= extras:
            continue
        found[wanted.name] = found.get(wanted.name, set()) | extras
        for text in made.requires or ():
            needed = Requirement(text)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                left.append(str(Requirement(text.partition(";")[0])))
    return sorted(found)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """What the last stage has of Python: the wheel and what is installed beside it."""
    context, site = (tmp_path_factory.mktemp(name) for name in ("context", "site"))
    build = [words for words in words_of("COPY") if not words[0].startswith("--")]
    for *sources, _ in build:
        for source in sources:
            there, here = ROOT / source, context / source
            shutil.copytree(there, here) if there.is_dir() else shutil.copy(there, here)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    wheel, install = words_of("RUN")
    assert wheel == shlex.split("pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .")
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", context / "wheels", context],
        check=True,
    )
    wheels = (context / "wheels").glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", site, *wheels], check=True)
    first = install[install.index("--constraint") + 2 : install.index("&&")]
    names = closure(first)
    assert "torch" not in names
    for name in names:
        made = distribution(name)
        for top in {file.parts[0] for file in made.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(made.locate_file(top))
    return site


def in_image(site, script, *argv, **options):
    """A command of the container: Python without any other library."""
    code = f"import sys; sys.path.insert(1, {str(site)!r}); {script}"
    return [sys.executable, "-I", "-S", "-c", code, *argv]


def test_it_serves_a_package_and_checks_its_health(image, tmp_path):
    checkpoint = Checkpoint(lively(micro_spec(), image_size=16), None, Preprocessing(16))
    export_package(checkpoint, tmp_path / "package")
    port = str(free_port())
    ((entry,),) = [json.loads(rest) for step, rest in STEPS if step == "ENTRYPOINT"]
    ((*argv,),) = [json.loads(rest) for step, rest in STEPS if step == "CMD"]
    assert (entry, argv[:2]) == ("dynaslim", ["serve", "/package"])
    (health,) = (rest for step, rest in STEPS if step == "HEALTHCHECK")
    python, flag, check = json.loads(health[health.index("[") :])
    assert (python, flag) == ("python", "-c")
    probe = [sys.executable, "-I", "-S", "-c", check.replace("8000", port)]
    assert subprocess.run(probe, capture_output=True).returncode != 0, "nothing is served yet"
    server = subprocess.Popen(
        in_image(
            image, "from dynaslim import cli; cli.main()", "serve", tmp_path / "package", *argv[2:],
            "--port", port, "--workers", "1",
        ),
        env={"DYNASLIM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        assert f"http://0.0.0.0:{port}/" in line, server.stderr.read()
        assert subprocess.run(probe, capture_output=True).returncode == 0
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v2/models/micro/infer", content=png(0, (20, 20), "RGB"),
            headers={"inference-header-content-length": "0"}, timeout=20,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert server.returncode == 0


def test_docker_builds_it(tmp_path):
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode != 0:
        pytest.skip("Docker does not run here")
    tag = f"dynaslim-test:{time.time_ns()}"
    subprocess.run([docker, "build", "--tag", tag, ROOT], check=True)
    try:
        done = subprocess.run(
            [docker, "run", "--rm", tag, "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("dynaslim ")
    finally:
        subprocess.run([docker, "rmi", tag], check=True)
