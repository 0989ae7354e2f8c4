"""The command line: a table of verbs. Each verb is a typed function, callable from a test.

A verb's flags come from the function's signature and its help from the docstring. A verb with a
recipe also has a flag for each field of the recipe, and `--config` for a file with these fields.
Function bodies import what they need, so that help needs no torch. Exit codes: 0 done, 1 failed, 2
bad usage, 130 and 143 stopped by a signal. Users' mistakes are reported in one line, without a
traceback.
"""

from __future__ import annotations

import inspect
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from dynaslim.cli import (
    cascading,
    converting,
    deploy,
    look,
    measure,
    predicting,
    serving,
    setup,
    training,
)
from dynaslim.cli.output import echo, fail, help_columns, shell_lines
from dynaslim.errors import DynaslimError, DynaslimWarning
from dynaslim.model_names import MADE_ON_FIRST_USE
from dynaslim.shipped import IMAGENET
from dynaslim.version import __version__


class Verb(NamedTuple):
    """A verb's function, its group in the help, and one example."""

    run: Callable[..., int | None]
    group: str
    example: str


VERBS: Final = {
    "demo": Verb(training.demo, "start", "dynaslim demo"),
    "models": Verb(look.models, "look", "dynaslim models"),
    "info": Verb(look.info, "look", "dynaslim info ds_mbnet --image-size 224"),
    "report": Verb(measure.report, "look", "dynaslim report runs/demo -o report.html"),
    "adapt": Verb(
        training.adapt,
        "start",
        "dynaslim adapt timm:resnet50 --weights resnet50.pth --data PATH --out runs/adapted",
    ),
    "convert": Verb(
        converting.convert,
        "train",
        "dynaslim convert timm:resnet50 resnet50.safetensors --weights resnet50.pth --data PATH",
    ),
    "cascade": Verb(
        cascading.cascade,
        "train",
        "dynaslim cascade small.safetensors large.safetensors OUT --data PATH",
    ),
    "train supernet": Verb(
        training.train_supernet,
        "train",
        "dynaslim train supernet --config recipes/cifar10_supernet.yaml --data.path PATH "
        "--out runs/cifar10",
    ),
    "train gate": Verb(
        training.train_gate,
        "train",
        "dynaslim train gate --config recipes/cifar10_gate.yaml --data.path PATH "
        "--supernet runs/cifar10/last.safetensors --out runs/cifar10_gate",
    ),
    "calibrate": Verb(
        measure.calibrate,
        "train",
        "dynaslim calibrate runs/cifar10/last.safetensors OUT --data PATH",
    ),
    "calibrate-budget": Verb(
        measure.calibrate_budget,
        "train",
        "dynaslim calibrate-budget runs/cifar10_gate/gate_0.60.safetensors --data PATH",
    ),
    "evaluate": Verb(
        measure.evaluate,
        "measure",
        "dynaslim evaluate runs/demo/checkpoint.safetensors --data PATH",
    ),
    "profile": Verb(
        deploy.profile,
        "measure",
        "dynaslim profile runs/demo/checkpoint.safetensors latency.json --batch-size 32",
    ),
    "bench": Verb(
        deploy.bench,
        "measure",
        "dynaslim bench ds_mbnet --backend openvino,onnxruntime --batch-size 32",
    ),
    "predict": Verb(
        predicting.predict,
        "use",
        "dynaslim predict runs/demo/checkpoint.safetensors photos --json",
    ),
    "serve": Verb(serving.serve, "use", "dynaslim serve runs/demo/checkpoint.safetensors"),
    "export": Verb(
        deploy.export,
        "convert",
        "dynaslim export runs/demo/checkpoint.safetensors package",
    ),
    "import-official": Verb(
        deploy.import_official,
        "convert",
        "dynaslim import-official model_best.pth.tar ds_mbnet.safetensors",
    ),
    "doctor": Verb(setup.doctor, "set up", "dynaslim doctor"),
    "completion": Verb(setup.completion, "set up", "dynaslim completion bash"),
}


def _imagenet() -> Path:
    from dynaslim.imagenet import package

    return package()


MADE_ON_FIRST_USE[IMAGENET] = _imagenet


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `dynaslim` command."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            code = _dispatch(argv)
        sys.stdout.flush()
    except DynaslimError as error:
        return fail(str(error), error.exit_code)
    except BrokenPipeError:
        # the reader has closed the pipe, as with `| head`: print nothing more, and discard
        # buffered output, which would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        what = "is a file, not a folder" if isinstance(error, FileExistsError) else error.strerror
        return fail(f"{where}{what or error}", 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return code


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, kind: type[Warning], *where: Any
) -> None:
    """Print a dynaslim warning in one line; warnings of libraries are shown as usual."""
    if not issubclass(kind, DynaslimWarning):
        return otherwise(message, kind, *where)
    sys.stderr.write(f"dynaslim: warning: {message}\n")


def _dispatch(argv: list[str]) -> int:
    if len(argv) > 1 and argv[0] == "help":
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        echo(_help(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        echo(f"dynaslim {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if rest and f"{name} {rest[0]}" in VERBS:  # a verb of two words
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in VERBS:
        return _no_such_verb(name, rest)
    from dynaslim.cli.parser import arguments, make_parser

    verb = VERBS[name]
    parser = make_parser(name, verb.run, verb.example)
    try:
        parsed = parser.parse_args(rest)
    except SystemExit as stop:  # help was printed
        return int(stop.code or 0)
    except UnicodeDecodeError:  # not handled by jsonargparse
        parser.error("--config: not a text file; name one of the recipe's fields (YAML)")
    except RecursionError:
        parser.error("--config: refers to itself, or is nested too deeply; write its values out")
    return verb.run(**arguments(verb.run, parser, parsed)) or 0


def _no_such_verb(name: str, rest: list[str]) -> int:
    import difflib

    longer = [verb for verb in VERBS if verb.startswith(f"{name} ")]
    if longer and (not rest or rest[0] in ("-h", "--help")):
        if not rest:
            return fail(f"{name}: name a stage, as in dynaslim {' or dynaslim '.join(longer)}", 2)
        echo("\n\n".join(_verb_help(verb) for verb in longer))
        return 0
    if name.startswith("-"):
        return fail(f"{name}: flags follow the verb, as in dynaslim models --json", 2)
    given = f"{name} {rest[0]}" if longer else name
    close = difflib.get_close_matches(given, VERBS, n=1)
    hint = f" did you mean {close[0]}?" if close else ""
    return fail(f"{given!r} is not a verb;{hint} see dynaslim --help", 2)


def _help() -> str:
    documented = inspect.getdoc(sys.modules["dynaslim"]) or ""
    title, _, purpose = documented.partition("\n\n")
    about = f"{title} {purpose.splitlines()[0]}"
    lines = ["usage: dynaslim VERB [options]", "", *textwrap.wrap(about, help_columns()), ""]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines.append(f"{group}:")
        lines += [_verb_help(name) for name, verb in VERBS.items() if verb.group == group]
        lines.append("")
    lines.append("dynaslim VERB --help shows a verb's options; dynaslim --version the version.")
    lines.append("Exit codes: 0 done, 1 failed, 2 bad usage; 130 and 143: interrupted, terminated.")
    return "\n".join(lines) + "\n"


def _verb_help(name: str) -> str:
    """A verb's entry in the list of verbs: summary and example."""
    verb, column = VERBS[name], " " * 20
    columns = help_columns() - len(column)
    summary = (inspect.getdoc(verb.run) or "").splitlines()[0]
    below = textwrap.wrap(summary, columns)
    first, *others = shell_lines(verb.example, columns - 2)
    below += [f"$ {first}", *(f"  {line}" for line in others)]
    return f"  {name:<18}" + f"\n{column}".join(below)
