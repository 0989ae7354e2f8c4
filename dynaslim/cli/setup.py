"""Verbs for set-up: a check of the installation, and shell completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from dynaslim.cli.output import echo, new_table, print_json
from dynaslim.errors import check
from dynaslim.shipped import names
from dynaslim.zoo import ZOO

if TYPE_CHECKING:
    from dynaslim.cli.parser import VerbParser


def doctor(*, quick: bool = False, timeout: float = 120.0, json: bool = False) -> int:
    """Check the installation: the libraries, and each backend by a small run.

    Exit code 1 means that something installed does not work, or that a library is missing that
    dynaslim requires.

    Args:
        quick: Skip the backend that compiles for half a minute (inductor), and look up libraries
            without loading them.
        timeout: Seconds that the run of a backend may take.
        json: Print one JSON object.
    """
    from dynaslim.doctor import examine

    check(timeout > 0, f"--timeout {timeout:g}: must be above 0")
    found = examine(quick=quick, timeout_s=timeout)
    if json:
        print_json(found)
        return 0 if found["ok"] else 1
    echo(f"dynaslim {found['dynaslim']}, Python {found['python']}, {found['system']}")
    table = new_table("library", "version", "", "extra")
    table.columns[2].justify = table.columns[3].justify = "left"
    for one in found["libraries"]:
        table.add_row(one["name"], one["version"] or "", one["status"], ", ".join(one["extras"]))
    echo(table)
    table = new_table("backend", "", "precisions", "ready in", "then")
    table.add_column("why not", overflow="fold")
    table.columns[1].justify = table.columns[2].justify = "left"
    for one in found["backends"]:
        table.add_row(
            one["name"],
            one["status"],
            " ".join(one["precisions"]),
            "" if one["ready_s"] is None else f"{one['ready_s']:.1f} s",
            "" if one["ms"] is None else f"{one['ms']:.1f} ms",
            ": ".join(part for part in (one["why"], one["install"]) if part),
        )
    echo(table)
    cache = found["cache"]
    state = "writable" if cache["writable"] else f"not writable: {cache['error']}"
    echo(f"cache      {cache['folder'] or 'nowhere'}: {state}")
    echo("machine    python -m torch.utils.collect_env\n")
    for line in found["hints"]:
        echo(f"could be better: {line}")
    for line in found["problems"]:
        echo(f"problem: {line}")
    if found["ok"]:
        echo("everything tried works" if quick else "everything installed works")
    return 0 if found["ok"] else 1


# -- completion ------------------------------------------------------------------------------------

VALUES: Final = {
    "backend": ("auto", "eager", "inductor", "onnxruntime", "openvino", "cudagraph"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("fp32", "bf16", "int8"),
}
"""Values to offer for flags that also accept other text, such as a list of these values."""

FILES: Final = {"cost_table", "data", "data.path", "init", "model", "paths", "supernet"}
"""Arguments whose type is text, since they may name other things, but that usually name a file or a
folder."""


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script that makes a shell complete dynaslim's verbs, flags, models and files.

    For bash, in ~/.bashrc:

        eval "$(dynaslim completion bash)"

    For zsh, in ~/.zshrc, after compinit:

        eval "$(dynaslim completion zsh)"

    For fish, in ~/.config/fish/config.fish:

        dynaslim completion fish | source

    A shell starts faster if the script is saved to a file once: for bash
    ~/.local/share/bash-completion/completions/dynaslim, for zsh a file _dynaslim in a folder of
    $fpath, for fish ~/.config/fish/completions/dynaslim.fish.

    Args:
        shell: The shell that will run the script.
    """
    echo(script(shell))


def script(shell: str) -> str:
    """The completion script for a shell. It is static: pressing Tab does not start Python.

    Raises:
        UsageError: if the installed shtab does not support the shell.
    """
    import shtab

    known = shell in shtab.SUPPORTED_SHELLS
    check(known, f"the installed shtab has no {shell}: pip install -U shtab")
    made: str = shtab.complete(_all_verbs(), shell)
    return made


def _all_verbs() -> VerbParser:
    """One parser with all verbs as subcommands."""
    from dynaslim.cli import VERBS
    from dynaslim.cli.parser import Help, VerbParser, make_parser

    root = VerbParser("dynaslim", formatter_class=Help)
    root.add_argument("--version", action="store_true", help="show the version and exit")
    groups = {"": root.add_subcommands()}
    for name, verb in VERBS.items():
        parser = make_parser(name, verb.run, verb.example)
        for action in parser._actions:
            _set_completion(action)
        group, _, last = name.rpartition(" ")
        if group not in groups:
            about = f"{group}: choose what"
            below = groups[""].add_subcommand(group, VerbParser(description=about), help=about)
            groups[group] = below.add_subcommands()
        parser.description = (parser.description or "").partition("\n")[0]
        groups[group].add_subcommand(last, parser, help=parser.description)
    return root


def _set_completion(action: Any) -> None:
    """Set what an argument is completed with: values, models or files."""
    import shtab

    from dynaslim.cli.parser import choices_of, takes_path

    models = _models_or_file(action.help or "")
    if choices := choices_of(action) or VALUES.get(action.dest, ()):
        action.choices = choices
    elif models is not None:
        action.complete = models
    elif takes_path(action) or action.dest in FILES:
        action.complete = shtab.FILE


def _models_or_file(help_text: str) -> dict[str, Any] | None:
    """How to complete a model's name or file, by the words "zoo" and "ships" in the help text."""
    models = {"zoo": tuple(ZOO), "ships": names()}
    kinds = [kind for kind in models if kind in help_text]
    if not kinds:
        return None
    listed = " ".join(name for kind in kinds for name in models[kind])
    # for functions with such names, shtab has bash treat the output as file names
    function = f"_dynaslim_{'_'.join(kinds)}_or_file"
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f'{function}() {{\n  compgen -W "{listed}" -- "$1"\n  compgen -f -- "$1"\n}}',
            "zsh": f"{function}() {{\n"
            f"  _alternative 'models:model:({listed})' 'files:file:_files'\n}}",
            "fish": f"function {function}\n  string split -n ' ' '{listed}'\n"
            f"  __fish_complete_path (commandline -ct)\nend",
        },
    }
