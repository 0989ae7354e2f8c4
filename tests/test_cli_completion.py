"""Completion by the shells themselves: the script is run, and its completions are checked."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
from functools import cache

import pytest
from helpers import run_ok, run_python

from dynaslim import cli
from dynaslim.cli.parser import flags, make_parser
from dynaslim.cli.setup import VALUES, script
from dynaslim.errors import UsageError
from dynaslim.runtime.backends import BACKENDS
from dynaslim.runtime.variants import PRECISIONS
from dynaslim.zoo import ZOO

VERBS = {verb.partition(" ")[0] for verb in cli.VERBS}


@cache
def _script(shell):
    return script(shell)


@pytest.fixture
def files(tmp_path):
    """A folder with two files and a folder."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "my photo.png").touch()
    (tmp_path / "my folder").mkdir()
    return tmp_path


def _bash(folder, *lines):
    """What bash offers for each line, whose last word is being completed."""
    (folder / "completion.bash").write_text(_script("bash"))
    commands = []
    for line in lines:
        words = [shlex.quote(word) for word in line.split(" ")]
        commands.append(
            f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); "
            '_shtab_dynaslim; printf "%s\\n" "${COMPREPLY[@]}"; echo END'
        )
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(["source completion.bash", *commands])],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},  # no Python of ours, and no dynaslim
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (folder / "completion.bash").unlink()
    return [set(filter(None, part.split("\n"))) for part in done.stdout.split("END\n")[:-1]]


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@needs_bash
def test_bash(files):
    lines = [
        ("dynaslim ", VERBS),
        ("dynaslim tr", {"train"}),
        ("dynaslim train ", {"supernet", "gate"}),
        ("dynaslim train gate --objective ", {"expected", "sgs"}),
        ("dynaslim train gate --optim.nest", {"--optim.nesterov"}),
        ("dynaslim train gate --optim.nesterov ", {"true", "false"}),
        ("dynaslim train supernet --model ds_mbnet", {"ds_mbnet", "ds_mbnet_tiny"}),
        ("dynaslim info ds_resnet", {name for name in ZOO if name.startswith("ds_resnet")}),
        ("dynaslim info m", {"model.safetensors", "my photo.png", "my folder"}),
        ("dynaslim info ds_mbnet --im", {"--image-size"}),
        ("dynaslim predict --engine ", {"local", "ray"}),
        ("dynaslim predict model.safetensors my", {"my photo.png", "my folder"}),
        ("dynaslim predict model.safetensors a b my", {"my photo.png", "my folder"}),
        ("dynaslim predict --json model.safetensors x --backend o", {"onnxruntime", "openvino"}),
        ("dynaslim evaluate mod", {"model.safetensors"}),
        ("dynaslim evaluate model.safetensors --data my", {"my photo.png", "my folder"}),
        ("dynaslim train gate --config mod", {"model.safetensors"}),
        ("dynaslim train gate --supernet mod", {"model.safetensors"}),
        ("dynaslim completion ", {"bash", "zsh", "fish"}),
        ("dynaslim nonsense --j", set()),
    ]
    offered = _bash(files, *(line for line, _ in lines))
    for (line, expected), found in zip(lines, offered, strict=True):
        assert found == expected, line


@needs_bash
def test_bash_completes_every_flag_of_every_verb(files):
    offered = _bash(files, *(f"dynaslim {verb} --" for verb in cli.VERBS))
    for (name, verb), found in zip(cli.VERBS.items(), offered, strict=True):
        own = {f for a in flags(make_parser(name, verb.run, "")) for f in a.option_strings}
        assert found == {flag for flag in own if flag.startswith("--")}, name


def _in_terminal(argv, folder, ready, line, wanted):
    """What a shell writes to its terminal when `line` is typed and Tab pressed twice."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(TERM="dumb", ZDOTDIR=str(folder), PS1="> ")
        os.execvp(argv[0], argv)
    try:
        _until(terminal, ready, "READY")
        return _until(terminal, line.encode() + b"\t\t", *wanted)
    finally:
        os.close(terminal)
        os.kill(child, 9)
        os.waitpid(child, 0)


def _until(terminal, typed, *wanted, seconds=30):
    os.write(terminal, typed)
    seen, deadline = "", time.monotonic() + seconds
    while time.monotonic() < deadline and not all(one in seen for one in wanted):
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536).decode(errors="replace")
    return seen


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("dynaslim ", VERBS),
        ("dynaslim train ", {"supernet", "gate"}),
        ("dynaslim info ds_mbnet", {"ds_mbnet_tiny"}),
        ("dynaslim info mod", {"model.safetensors"}),
        ("dynaslim predict --engine ", {"local", "ray"}),
        ("dynaslim predict --eng", {"--engine"}),
    ],
)
def test_zsh(files, line, wanted):
    (files / "completion.zsh").write_text(_script("zsh"))
    ready = (
        b"autoload -Uz compinit; compinit -u -D; LISTMAX=1000; "
        b"eval \"$(<completion.zsh)\"; echo REA''DY\n"
    )
    seen = _in_terminal(["zsh", "-d", "-i"], files, ready, line, wanted)
    typed = line.split(" ")[-1]
    for word in wanted:
        # Tab writes only what is missing of a word that has been begun
        assert word in seen or word.removeprefix(typed) in seen.partition(line)[2], seen


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish(files):
    (files / "completion.fish").write_text(_script("fish"))
    lines = {
        "dynaslim ": VERBS,
        "dynaslim train ": {"supernet", "gate"},
        "dynaslim info ds_mbnet": {"ds_mbnet", "ds_mbnet_tiny"},
        "dynaslim info mod": {"model.safetensors"},
        "dynaslim predict --engine ": {"local", "ray"},
        "dynaslim predict --eng": {"--engine"},
    }
    commands = "; ".join(f"complete -C {shlex.quote(line)}; echo END" for line in lines)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source completion.fish; {commands}"],
        capture_output=True,
        text=True,
        cwd=files,
        env={**os.environ, "HOME": str(files)},
        timeout=60,
    )
    parts = done.stdout.split("END\n")[:-1]
    for (line, expected), part in zip(lines.items(), parts, strict=True):
        assert {row.partition("\t")[0] for row in part.splitlines()} == expected, (line, done)


def test_the_script_needs_no_torch(capsys):
    code = (
        "import sys; from dynaslim import cli; code = cli.run(['completion', 'bash']); "
        "assert not {'torch', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    assert run_python(code).stdout.rstrip().endswith("dynaslim")
    help_text = run_ok(capsys, "completion", "--help")
    assert '\n    eval "$(dynaslim completion bash)"\n' in help_text
    assert "\n    dynaslim completion fish | source\n" in help_text


def test_values_are_those_that_there_are():
    assert VALUES["backend"] == ("auto", *BACKENDS)
    assert VALUES["precision"] == PRECISIONS


def test_a_shell_that_shtab_does_not_know(monkeypatch):
    import shtab

    monkeypatch.setattr(shtab, "SUPPORTED_SHELLS", ["bash", "zsh", "tcsh"])
    with pytest.raises(UsageError, match="has no fish: pip install -U shtab"):
        script("fish")
    assert re.match(r"#compdef dynaslim\n", script("zsh"))
