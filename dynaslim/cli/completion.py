"""The verb that teaches a shell to complete verbs, flags, their values, models and files.

The script is static: pressing Tab starts no Python. shtab writes it, from plain copies of the
parsers that the verbs have anyway.
"""

from __future__ import annotations

import argparse
from typing import Any, Final, Literal

from dynaslim.cli.output import say

VALUES: Final = {
    "backend": ("auto", "eager", "inductor", "onnxruntime", "openvino", "cudagraph"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("fp32", "bf16", "int8"),
}
"""Values of flags that take other texts too, such as a list of them."""

FILES: Final = {"cost_table", "data", "data.path", "init", "model", "paths", "supernet"}
"""Arguments that are typed as text, since they may be the name of something else, but that mostly
name a file or a folder."""


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script that makes a shell complete dynaslim's verbs, flags, models and files.

    For bash, in ~/.bashrc:

        eval "$(dynaslim completion bash)"

    For zsh, in ~/.zshrc, behind compinit:

        eval "$(dynaslim completion zsh)"

    For fish, in ~/.config/fish/config.fish:

        dynaslim completion fish | source

    A shell starts faster with a script that was printed into a file once: for bash
    ~/.local/share/bash-completion/completions/dynaslim, for zsh a file _dynaslim in a folder of
    $fpath, for fish ~/.config/fish/completions/dynaslim.fish.

    Args:
        shell: The shell that is to run the script.
    """
    say(script(shell))


def script(shell: str) -> str:
    """The script for a shell.

    Raises:
        UsageError: if the installed shtab has no scripts for it.
    """
    import shtab

    from dynaslim.errors import UsageError

    if shell not in shtab.SUPPORTED_SHELLS:
        raise UsageError(f"the installed shtab has no {shell}: pip install -U shtab")
    made: str = shtab.complete(_root(shtab.FILE), shell)
    return made


def _models_or_file(told: str) -> dict[str, Any] | None:
    """How a model is completed: by the names that the argument's help speaks of, or as a file."""
    from dynaslim.shipped import names
    from dynaslim.zoo import ZOO

    models = {"zoo": tuple(ZOO), "ships": names()}
    kinds = [kind for kind in models if kind in told]
    if not kinds:
        return None
    listed = " ".join(name for kind in kinds for name in models[kind])
    # shtab has bash treat what a function of such a name says as names of files
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


def _root(file: Any) -> argparse.ArgumentParser:
    """All verbs below one parser, as plain argparse: what shtab can walk through."""
    from dynaslim.cli import VERBS
    from dynaslim.cli.parser import make_parser

    root = argparse.ArgumentParser("dynaslim")
    root.add_argument("--version", action="store_true", help="show the version and exit")
    verbs = root.add_subparsers(dest="verb")
    groups: dict[str, Any] = {}
    for name, verb in VERBS.items():
        parser = make_parser(name, verb.run, verb.example)
        first, _, second = name.partition(" ")
        below = verbs
        if second:
            if first not in groups:
                about = f"{first}: choose what"
                group = verbs.add_parser(first, help=about, description=about)
                groups[first] = group.add_subparsers(dest="what")
            below = groups[first]
        about = (parser.description or "").partition("\n")[0]
        _copy(parser, below.add_parser(second or first, help=about, description=about), file)
    return root


def _copy(parser: argparse.ArgumentParser, plain: argparse.ArgumentParser, file: Any) -> None:
    from dynaslim.cli.parser import choices_of, takes_path

    for action in parser._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        names = action.option_strings or [action.dest]
        if action.nargs == 0 or "--print_config" in names:
            plain.add_argument(*names, action="store_true", help=action.help)
            continue
        copy: Any = plain.add_argument(*names, nargs=action.nargs, help=action.help)
        choices = choices_of(action) or VALUES.get(action.dest, ())
        models = _models_or_file(action.help or "")
        if choices:
            copy.choices = choices
        elif models is not None:
            copy.complete = models
        elif takes_path(action) or action.dest in FILES:
            copy.complete = file
