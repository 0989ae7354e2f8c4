"""Extracts commands and Python code from the documents and runs them as a reader would.

A block is a fence or, in README.md, lines that are indented by four spaces and begin with a
command. To exclude a block, the source has a comment right before it:

    <!-- not run: why -->

Placeholders for the reader's files (DATA, CKPT, photos) exist in the folder under these very names.
The tables below have the few words that need a replacement, and the flags that shorten commands.
"""

import contextlib
import functools
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from helpers import free_port, start_dynaslim

from dynaslim import cli
from dynaslim.recipes import GateRecipe, SupernetRecipe, recipe_from_dict
from dynaslim.spec import NetSpec

ROOT = Path(__file__).parents[1]

COMMANDS = ("dynaslim", "make", "python", "pip", "export", "torchrun", "curl", "docker", "cd")
"""First words of shell commands."""
DATA_LANGUAGES = ("text", "yaml", "json", "ini", "nginx", "html", "diff")

SHORTENING_FLAGS = {
    "train supernet": "--epochs 1 --batch-size 16 --calibration-batches 1 "
    "--val-calibration-batches 1 --workers 0",
    "train gate": "--batch-size 16 --expected.iterations 5 --expected.bisections 2 --workers 0",
    "calibrate": "--batches 1 --batch-size 8 --workers 0",
    "profile": "--batch-size 2 --rounds 2",
    "bench": "--image-size 32 --batch-size 4 --rounds 2",
    "report": "--rounds 2 --backend eager",
    "adapt": "--image-size 32 --epochs 1 --views 1 --batch-size 16 --val-share 0.8 --backend eager",
    "convert": "--image-size 32",
    "export": "",  # an int8 one is made shorter below
    "examples/finetune_folder.py": "1",
}
"""Flags added to commands so that they take seconds: fewer epochs, images and rounds."""
ACCEPTED_EXIT_CODES = {"doctor": (0, 1)}
"""Accepted exit codes; doctor's is 1 if something on this machine does not work."""
SHORTER_INT8 = "--calibration-images 8 --report-images 8"

OPTIONAL = ("tritonclient", "litserve")
"""Modules whose blocks are skipped if they are not installed."""

RECIPES = {
    "train supernet": "recipes/cifar10_supernet.yaml",
    "train gate": "recipes/cifar10_gate.yaml",
}
_numbers = itertools.count()


def short_recipe(path: Path) -> str:
    """A recipe of the repository with one epoch of small batches."""
    return re.sub(r"(?m)^(epochs|batch_size): \d+", _few, path.read_text())


def _few(line: re.Match[str]) -> str:
    return f"{line[1]}: {1 if line[1] == 'epochs' else 16}"


@dataclass(frozen=True)
class Block:
    """A block of a page that a reader might copy."""

    page: str
    line: int
    """Number of its first line of content, from 1."""
    language: str
    text: str
    title: str | None
    """The file that a fence shows."""
    reason_not_run: str | None
    """The reason why it is not run; None if it is."""

    @property
    def where(self):
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """All blocks of a page in order."""
    lines = path.read_text().split("\n")
    found, number, reason_not_run = [], 0, None
    while number < len(lines):
        line = lines[number]
        if marker := re.fullmatch(r"<!-- not run: (.*\S) -->", line.strip()):
            reason_not_run = marker[1]
        elif opened := re.fullmatch(r"```(\w*)(.*)", line):
            end = lines.index("```", number + 1)
            title = re.search(r'title="(.+?)"', opened[2])
            body = "\n".join(lines[number + 1 : end])
            found.append(
                Block(path.name, number + 2, opened[1], body, title and title[1], reason_not_run)
            )
            number, reason_not_run = end, None
        elif line.startswith("    ") and line.split()[0] in COMMANDS:
            end = number
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            body = "\n".join(text[4:] for text in lines[number:end])
            found.append(Block(path.name, number + 1, "bash", body, None, reason_not_run))
            number, reason_not_run = end - 1, None
        elif line.strip():
            reason_not_run = None  # a marker is only valid for the block right after it
        number += 1
    return found


def commands_of(block: Block) -> list[str]:
    """Every command of a block as one line, without lines that are only comments."""
    lines = block.text.replace("\\\n", " ").split("\n")
    return [line for line in lines if words_of(line)]


def words_of(line: str) -> list[str]:
    """The words of a command, without the comment behind it."""
    return shlex.split(line, comments=True)


class Servers:
    """A page's server, which runs until the page starts another or ends."""

    def __init__(self):
        self._process, self._port = None, 0

    def start(self, argv: list[str]) -> None:
        """Start `dynaslim serve` on a free port and wait until it accepts."""
        self.stop()
        self._port = free_port()
        self._process = start_dynaslim([*shortened(argv), "--port", str(self._port)])
        line = self._process.stdout.readline()  # printed when ready; empty if the process ended
        if f":{self._port}" not in line:
            process, self._process = self._process, None
            process.kill()
            raise AssertionError(f"{line}{process.communicate()[1]}")

    def here(self, text: str) -> str:
        """A page's text with the default port replaced by the server's port."""
        return text.replace("8000", str(self._port)) if self._process is not None else text

    def request(self, line: str) -> None:
        """Run a command line with curl; fails if the server's answer is an error."""
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        line = re.sub(r"\bcurl ", "curl --fail-with-body ", self.here(line))
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True)
        assert done.returncode == 0, f"{line}: {done.stdout} {done.stderr}"

    def stop(self) -> None:
        """Stop the server by SIGINT, as a reader does with Ctrl-C."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors


def run_command(line: str, servers: Servers) -> None:
    """Run one command, in this process if possible; AssertionError if it fails or is unknown."""
    match words_of(line):
        case ["dynaslim", "serve", *argv]:
            servers.start(["serve", *argv])
        case ["curl", *_]:
            servers.request(line)
        case ["dynaslim", *argv]:
            argv = shortened(argv)
            code = cli.run(argv)
            fine = ACCEPTED_EXIT_CODES.get(verb_of(argv), (0,))
            assert code in fine, f"dynaslim {shlex.join(argv)} ended with {code}"
        case ["make", target]:
            # other tests run the targets; here it only has to exist
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
        case ["python", script, *argv] if script.startswith("examples/"):
            # documents assume the project's folder, but commands run in a temporary one
            there = [str(ROOT / word) if word.startswith("docs/") else word for word in argv]
            run_script(script, [*there, *SHORTENING_FLAGS.get(script, "").split()])
        case _:
            raise AssertionError(
                f"{line}: not a command that this test can run; if it is right as it is, put "
                f"<!-- not run: why --> before its block"
            )


def shortened(argv: list[str]) -> list[str]:
    """A document's command line with placeholders replaced and shortening flags added."""
    verb = verb_of(argv)
    words = {
        "R": RECIPES.get(verb, "R"),
        "[--json]": "--json",
        "[CKPT]": "CKPT",
        "PATHS...": "photos",
        **{word: f"{word.lower()}{next(_numbers)}" for word in ("RUN", "OUT")},
    }
    if verb == "report":
        words["RUN"] = "runs/demo"  # an existing run
    extra = SHORTENING_FLAGS.get(verb, "").split()
    if "int8" in argv:
        extra = SHORTER_INT8.split()
    return [*(words.get(word, word) for word in argv), *extra]


def verb_of(argv: list[str]) -> str:
    """The verb that a command line names, of one word or two."""
    return next((verb for verb in cli.VERBS if argv[: verb.count(" ") + 1] == verb.split()), "")


def run_script(script: str, argv: list[str]) -> None:
    """Run a Python file as a program."""
    before = sys.argv
    sys.argv = [script, *argv]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before


def check_flags(line: str, monkeypatch) -> None:
    """Check that dynaslim accepts the flags of a command that is not run."""
    words = words_of(line)
    if "dynaslim" not in words:
        return
    argv = words[words.index("dynaslim") + 1 :]
    verb = verb_of(argv)
    assert verb, f"{line}: no such verb"
    real = cli.VERBS[verb]

    @functools.wraps(real.run)  # flags are derived from the signature
    def run(*_, **__):
        return None

    monkeypatch.setitem(cli.VERBS, verb, real._replace(run=run))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = cli.run([{"R": RECIPES.get(verb, "R")}.get(word, word) for word in argv])
    monkeypatch.setitem(cli.VERBS, verb, real)
    assert code == 0, f"{line}: {errors.getvalue()}"


def run_python(block: Block, namespace: dict[str, object], servers: Servers) -> str:
    """Run a block in a page's namespace; returns what it prints."""
    printed = io.StringIO()
    # preceding newlines make the line numbers of a traceback equal to the page's
    code = compile("\n" * (block.line - 1) + servers.here(block.text), block.page, "exec")
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, namespace)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            warnings.warn(f"{block.where}: not run, {error.name} is not installed", stacklevel=1)
    return printed.getvalue()


def check_data(block: Block) -> None:
    """Check that JSON is valid, and that YAML is a valid recipe or spec."""
    if block.language == "json":
        json.loads(block.text)
    if block.language != "yaml":
        return
    data = yaml.safe_load(block.text)
    if "stages" in data:
        NetSpec.from_dict(data)
    else:
        kind = GateRecipe if {"targets", "supernet", "objective"} & set(data) else SupernetRecipe
        recipe_from_dict(kind, data)
