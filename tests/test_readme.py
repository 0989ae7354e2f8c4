import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_commands_are_targets_and_verbs():
    from dynaslim.cli import VERBS

    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test", "docs"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    lines = re.findall(r"^    dynaslim (.*)", README, flags=re.MULTILINE)
    verbs = {next((verb for verb in VERBS if line.startswith(f"{verb} ")), line) for line in lines}
    assert verbs == set(VERBS) - {"demo"}


def test_the_demos_table_is_a_demos_table():
    """The numbers shown keep the demo's promise: not below the cheapest route."""
    rows = re.findall(r"^ +([\d-]+|dynamic \([a-z0-9. ]+\)) +([\d.]+) M +([\d.]+)%", README, re.M)
    assert len(rows) == 6
    tops = [float(top1) for _, _, top1 in rows]
    assert [name for name, _, _ in rows[4:]] == ["dynamic (gate)", "dynamic (budget 0.5)"]
    assert min(tops[4:]) >= tops[0]


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script
    assert "make check" in script


def test_local_links_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.parametrize(
    ("version", "message"),
    [("3.9", "Python 3.9, dynaslim needs 3.11 or newer"), (None, "no .*python found")],
)
def test_set_up_names_in_one_line_what_is_missing(tmp_path, version, message):
    """A stand-in interpreter that reports an old version, and one that is not there."""
    python = tmp_path / "python"
    if version:
        python.write_text(
            f'#!/bin/sh\ncase "$2" in *print*) echo {version};; *exit*) exit 1;; esac\n'
        )
        python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "setup"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(message, done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_the_tables_of_the_performance_page_are_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
