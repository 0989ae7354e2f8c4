"""The command line: a table of verbs. Each verb is a typed function, callable from a test.

Its signature makes its flags, its docstring the help; a verb that takes a recipe has a flag for
each of the recipe's fields too, and `--config` for a file of them. Bodies import what they need, so
that help needs no torch. Exit codes: 0 done, 1 failed, 2 bad usage; a user's mistake gets one line
and no traceback.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, get_type_hints

from dynaslim import __version__
from dynaslim.cli import budget, convert, deploy, look, measure, predicting, training
from dynaslim.cli.output import fail, say
from dynaslim.errors import DynaslimError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


class Verb(NamedTuple):
    """A verb's function, its group in the help, and one example."""

    run: Callable[..., int | None]
    group: str
    example: str


VERBS: Final = {
    "demo": Verb(training.demo, "start", "dynaslim demo"),
    "models": Verb(look.models, "look", "dynaslim models"),
    "info": Verb(look.info, "look", "dynaslim info ds_mbnet --image-size 224"),
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
        budget.calibrate_budget,
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
    "export": Verb(
        deploy.export,
        "convert",
        "dynaslim export runs/demo/checkpoint.safetensors package",
    ),
    "import-official": Verb(
        convert.import_official,
        "convert",
        "dynaslim import-official model_best.pth.tar ds_mbnet.safetensors",
    ),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `dynaslim` command."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
    except DynaslimError as error:
        return fail(str(error), error.exit_code)
    except BrokenPipeError:
        # the reader of our output has gone, as with `| head`; nothing is left to be told, and
        # what is still buffered must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(_help(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        say(f"dynaslim {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if rest and f"{name} {rest[0]}" in VERBS:  # verbs of two words
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in VERBS:
        return _no_such_verb(name, rest)
    parser = _parser(name)
    try:
        parsed = parser.parse_args(_as_spelled(name, rest))
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    return VERBS[name].run(**_arguments(name, parser, parsed)) or 0


def _no_such_verb(name: str, rest: list[str]) -> int:
    import difflib

    longer = [verb for verb in VERBS if verb.startswith(f"{name} ")]
    if longer and (not rest or rest[0] in ("-h", "--help")):
        if not rest:
            return fail(f"{name}: say what, as in dynaslim {' or dynaslim '.join(longer)}", 2)
        say(f"usage: dynaslim {' | '.join(longer)}")
        return 0
    given = f"{name} {rest[0]}" if longer else name
    close = difflib.get_close_matches(given, VERBS, n=1)
    hint = f" did you mean {close[0]}?" if close else ""
    return fail(f"{given!r} is not a verb;{hint} see dynaslim --help", 2)


def _recipe(name: str) -> type[Any] | None:
    """The class of a verb's recipe, if it takes one."""
    kind: type[Any] | None = get_type_hints(VERBS[name].run).get("recipe")
    return kind


def _parser(name: str) -> ArgumentParser:
    """A parser made of a verb's signature and docstring; flags are spelled with dashes."""
    import docstring_parser
    import jsonargparse

    function = VERBS[name].run
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}
    types = get_type_hints(function)
    parser = jsonargparse.ArgumentParser(
        prog=f"dynaslim {name}",
        description=doc.short_description,
        epilog=f"example: {VERBS[name].example}",
    )
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "recipe":
            continue
        help_text = helps[parameter.name]
        if parameter.kind is not parameter.KEYWORD_ONLY:
            if types[parameter.name] == list[str]:
                parser.add_argument(parameter.name, type=str, nargs="+", help=help_text)
            else:
                parser.add_argument(parameter.name, type=types[parameter.name], help=help_text)
            continue
        flag = f"--{parameter.name.replace('_', '-')}"
        if types[parameter.name] is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
        elif parameter.default is parameter.empty:
            parser.add_argument(flag, type=types[parameter.name], required=True, help=help_text)
        else:
            parser.add_argument(
                flag, type=types[parameter.name], default=parameter.default, help=help_text
            )
    kind = _recipe(name)
    if kind is not None:
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
        help_text = "File of the recipe's fields (YAML); flags that follow it change them."
        parser.add_argument("--config", action="config", help=help_text)
        parser.add_class_arguments(kind)
    return parser


def _as_spelled(name: str, argv: list[str]) -> list[str]:
    """A recipe's flags may be written with dashes too; its fields have underscores."""
    if _recipe(name) is None:
        return argv
    own = {
        f"--{parameter.replace('_', '-')}"
        for parameter in inspect.signature(VERBS[name].run).parameters
    }
    spelled = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and flag not in own:
            flag = f"--{flag[2:].replace('-', '_')}"
        spelled.append(flag + equals + value)
    return spelled


def _arguments(name: str, parser: ArgumentParser, parsed: Namespace) -> dict[str, Any]:
    """What the verb's function is called with."""
    kind = _recipe(name)
    if kind is None:
        return vars(parsed)
    import dataclasses

    parsed.pop("config", None)
    values = vars(parser.instantiate(parsed))
    fields = {field.name: values.pop(field.name) for field in dataclasses.fields(kind)}
    return {"recipe": kind(**fields), **values}


def _help() -> str:
    lines = ["usage: dynaslim VERB [options]", "", f"{_first_line(sys.modules['dynaslim'])}", ""]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines.append(f"{group}:")
        for name, verb in VERBS.items():
            if verb.group == group:
                lines.append(f"  {name:<16} {_first_line(verb.run)}")
                lines.append(f"  {'':<16}   {verb.example}")
        lines.append("")
    lines.append("dynaslim VERB --help shows a verb's options; dynaslim --version the version.")
    return "\n".join(lines) + "\n"


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").splitlines()[0]
