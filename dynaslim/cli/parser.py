"""Builds a verb's parser from its function's signature and docstring, with plain help and errors.

A parameter whose type is a dataclass gets a flag for each field, and the field's docstring is the
flag's help. The flags of a recipe are nested, and `--config` reads them from a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from dynaslim.cli.output import help_columns, shell_lines
from dynaslim.errors import UsageError

EXAMPLE: Final = "example:"
SHORT: Final = {"out": ("-o",)}
"""Short flags by parameter name."""

_PLAIN: Final = {
    int: "a whole number",
    float: "a number",
    Path: "a path",
    str: "a text",
    tuple[float, ...]: "numbers such as [0.5,0.5,0.5]",
}
_METAVARS: Final = {int: "N", float: "X", Path: "PATH"}


class VerbParser(jsonargparse.ArgumentParser):
    """A parser with one-line errors, whose flags may have dashes or underscores."""

    # jsonargparse calls this method for every error in the arguments
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report an error in one line.

        Raises:
            UsageError: always.
        """
        verb = self.prog.removeprefix("dynaslim ")
        raise UsageError(f"{verb}: {_in_plain_words(self, message)}; see {self.prog} --help")


class Help(argparse.HelpFormatter):
    """Help with short placeholders for values; defaults that are None or empty are not shown."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, width=help_columns() - 1, **options)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        silent = action.required or action.nargs == 0 or not action.option_strings
        if silent or default is None or default in ("", (), argparse.SUPPRESS):
            return text
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(EXAMPLE):
            return "\n".join([EXAMPLE, *shell_lines(text.removeprefix(EXAMPLE), width)])
        # wrap each paragraph separately; indented paragraphs are code
        return "\n\n".join(
            part if part.startswith(" ") else super(Help, self)._fill_text(part, width, indent)
            for part in text.split("\n\n")
        )

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        def metavar(size: int) -> tuple[str, ...]:
            return (metavar_of(action),) * size

        return metavar


def make_parser(verb: str, function: Callable[..., Any], example: str) -> VerbParser:
    """Build the parser of a verb's function."""
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    parser = VerbParser(
        prog=f"dynaslim {verb}",
        description=doc.description,
        epilog=f"{EXAMPLE}{example}",
        formatter_class=Help,
    )
    hints, helps = _types(function), _helps(doc)
    for parameter in inspect.signature(function).parameters.values():
        name, hint = parameter.name, hints[parameter.name]
        if _has_fields(hint):
            if name != "recipe":
                _add_options(parser, hint)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            _add_flag(parser, name, hint, parameter.default, helps[name])
        elif hint in (list[str], tuple[str, ...]):
            nargs = "+" if parameter.default is parameter.empty else "*"
            parser.add_argument(name, type=str, nargs=nargs, help=helps[name])
        elif parameter.default is not parameter.empty:
            parser.add_argument(
                name, type=hint, nargs="?", default=parameter.default, help=helps[name]
            )
        else:
            parser.add_argument(name, type=hint, help=helps[name])
    kind = hints.get("recipe")
    if kind is not None:
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
        text = "File of the recipe's fields (YAML); flags that follow it change them."
        parser.add_argument("--config", action="config", help=text)
        parser.add_class_arguments(kind)
        _tidy(parser, kind)
        _spell_with_dashes(parser)
    parser.usage = _usage(parser)
    return parser


def _types(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters.

    Types of options may be given by their full names (`dynaslim.serve.options.ServeOptions`); their
    modules are imported only here, so that the list of verbs does not need them.
    """
    for annotation in inspect.get_annotations(function).values():
        if annotation.startswith("dynaslim."):
            import_module(annotation.rpartition(".")[0])
    return get_type_hints(function, localns={"dynaslim": sys.modules["dynaslim"]})


def _helps(doc: docstring_parser.Docstring) -> dict[str, str]:
    return {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}


def _has_fields(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _add_options(parser: VerbParser, kind: type[Any]) -> None:
    hints, helps = get_type_hints(kind), dict[str, str]()
    for base in filter(_has_fields, reversed(kind.__mro__)):
        helps |= _helps(docstring_parser.parse_from_object(base))
    for field in dataclasses.fields(kind):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        _add_flag(parser, field.name, hints[field.name], default, helps[field.name])


def _add_flag(parser: VerbParser, name: str, hint: Any, default: Any, text: str) -> None:
    # the long form comes last: messages and help use it as the flag's name
    spelled = [*SHORT.get(name, ()), f"--{name.replace('_', '-')}"]
    text = text.replace("`", "")
    if hint is bool:
        parser.add_argument(*spelled, action="store_true", help=text)
    elif default is inspect.Parameter.empty:
        parser.add_argument(*spelled, type=hint, required=True, help=text)
    else:
        parser.add_argument(*spelled, type=hint, default=default, help=text)


def arguments(
    function: Callable[..., Any], parser: VerbParser, parsed: jsonargparse.Namespace
) -> dict[str, Any]:
    """The arguments to call the verb's function with."""
    parsed.pop("config", None)
    values: dict[str, Any] = vars(parser.instantiate(parsed))
    for name, kind in _types(function).items():
        if _has_fields(kind):
            fields = {field.name: values.pop(field.name) for field in dataclasses.fields(kind)}
            values[name] = kind(**fields)
    return values


def flags(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """The flags of a parser that its help shows."""
    return (a for a in parser._actions if a.option_strings and a.help != argparse.SUPPRESS)


def flag_of(action: argparse.Action) -> str:
    """The long form of a flag, or the name of a positional argument."""
    return action.option_strings[-1] if action.option_strings else action.dest


def choices_of(action: argparse.Action) -> tuple[str, ...]:
    """The possible values of an argument, if they can be listed."""
    if action.choices:
        return tuple(map(str, action.choices))
    hints = _hints(action)
    if hints == {bool}:
        return ("true", "false")
    literals = [get_args(hint) for hint in hints if get_origin(hint) is Literal]
    return tuple(str(value) for values in literals for value in values)


def takes_path(action: argparse.Action) -> bool:
    """Whether an argument's type is a path."""
    return Path in _hints(action) or "--config" in action.option_strings


def metavar_of(action: argparse.Action) -> str:
    """The placeholder of an argument's value in help."""
    choices = choices_of(action)
    if isinstance(action.metavar, str):
        return action.metavar
    if choices:
        return "{" + ",".join(choices) + "}"
    name = action.dest.rpartition(".")[2]
    if not action.option_strings:
        return name.upper().removesuffix("S") if action.nargs in ("+", "*") else name.upper()
    if takes_path(action):
        return _METAVARS[Path]
    found = [_METAVARS[hint] for hint in _hints(action) if hint in _METAVARS]
    return found[0] if found else name.upper()


def _usage(parser: VerbParser) -> str:
    """The usage line with only the required arguments; help lists all flags below it."""
    shapes = {"?": "[{}]", "*": "[{} ...]", "+": "{} ..."}
    given = [
        shapes.get(str(action.nargs), "{}").format(metavar_of(action))
        for action in parser._actions
        if not action.option_strings
    ]
    needed = [_placeholder(action) for action in flags(parser) if action.required]
    return " ".join([parser.prog, *given, *needed, "[options]"])


def _hints(action: argparse.Action) -> set[Any]:
    """The types that an argument's value may have, without None."""
    hint = getattr(action, "_typehint", action.type)
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return set(parts) - {None, types.NoneType}


def _spell_with_dashes(parser: VerbParser) -> None:
    """Show the flags of a recipe's fields with dashes, and accept dashes or underscores."""
    known = parser._option_string_actions
    for action in parser._actions:
        if action.dest == argparse.SUPPRESS:
            continue  # --help and --print_config are not fields
        spelled = [flag.replace("_", "-") for flag in action.option_strings]
        known.update(dict.fromkeys(spelled, action))
        action.option_strings = spelled


def _tidy(parser: VerbParser, recipe: type[Any]) -> None:
    """Shorten or hide the help of the flags that jsonargparse adds."""
    groups = {field.name for field in dataclasses.fields(recipe)}
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.help = "Print the recipe as YAML, with all that was given, and stop."
            action.metavar = ""
        elif action.help == "Path to a configuration file." and action.dest in groups:
            action.help = argparse.SUPPRESS


# -- errors in one line ---------------------------------------------------------------------------


def _in_plain_words(parser: VerbParser, message: str) -> str:
    message = " ".join(message.split())
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        return _unknown(parser, found[1])
    if found := re.match(r"the following arguments are required: (.+)", message):
        missing = [_action(parser, key) for key in found[1].split(", ")]
        return f"give {' and '.join(_placeholder(action) for action in missing if action)}"
    if found := re.match(r"argument (\S+): expected (one|at least one) argument", message):
        return f"{found[1]}: needs a value"
    if found := re.match(r"argument (\S+): ignored explicit argument", message):
        return f"{found[1]}: takes no value"
    if found := re.match(r'Parser key "([^"]+)": (.+)', message):
        return _wrong_value(parser, found[1], found[2])
    if message.startswith("Unexpected config"):
        return "--config: holds no keys and values of a recipe"
    if message.startswith("Problems parsing config"):
        return f"--config: not YAML: {message.partition(': ')[2]}"
    if found := re.match(r"(?:Group '([^']+)' does not accept o|O)ption '([^']+)'", message):
        return f"--config: a recipe has no {f'{found[1]}.' if found[1] else ''}{found[2]}"
    return message.rstrip(".")


def _unknown(parser: VerbParser, given: str) -> str:
    if not given.startswith("-"):
        return f"{given!r} is one argument too many"
    name = given.partition("=")[0]
    known = [flag for action in flags(parser) for flag in action.option_strings]
    close = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    return f"there is no {name}" + (f", did you mean {close[0]}?" if close else "")


def _action(parser: VerbParser, key: str) -> argparse.Action | None:
    return next((a for a in parser._actions if key in (a.dest, *a.option_strings)), None)


def _placeholder(action: argparse.Action) -> str:
    """A required argument as shown in the usage line."""
    metavar = metavar_of(action)
    return f"{flag_of(action)} {metavar}" if action.option_strings else metavar


def _wrong_value(parser: VerbParser, key: str, why: str) -> str:
    """A one-line reason why a value was refused; jsonargparse's messages have several lines."""
    action = _action(parser, key)
    name = key
    if action is not None:
        name = flag_of(action) if action.option_strings else action.dest.upper()
    value = re.search(r"(?:Got value|Given value): (.*)$", why)
    if action is None or value is None:
        return f"{name}: {why[0].lower()}{why[1:].rstrip('.')}"
    choices = choices_of(action)
    plain = [_PLAIN[hint] for hint in _hints(action) if hint in _PLAIN]
    if choices:
        return f"{name} {value[1]}: choose from {', '.join(choices)}"
    if plain:
        return f"{name} {value[1]}: must be {' or '.join(sorted(plain))}"
    return f"{name} {value[1]}: {why.partition('. Got value')[0].partition(' Given value')[0]}"
