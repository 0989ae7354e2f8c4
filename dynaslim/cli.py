"""The command line: a table of verbs. Each verb is a typed function, callable from a test.

Its signature makes its flags, its docstring the help. Bodies import what they need, so that help
needs no torch. Exit codes: 0 done, 1 failed, 2 bad usage; a user's mistake gets one line and no
traceback.
"""

from __future__ import annotations

import inspect
import json as json_module
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, get_type_hints

from dynaslim import __version__
from dynaslim.errors import DynaslimError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from dynaslim.evaluation import Evaluation
    from dynaslim.spec import NetSpec, Route


def models(*, json: bool = False) -> None:
    """List the models of the zoo.

    Args:
        json: Print one JSON object.
    """
    from dynaslim.cost import params
    from dynaslim.zoo import ZOO

    rows = [
        {
            "model": name,
            "params": params(spec),
            "routes": len(spec.routes),
            "gates": len(spec.gates),
        }
        for name, spec in ZOO.items()
    ]
    if json:
        _print_json({"models": rows})
        return
    table = _table("model", "parameters", "widths", "gates", "gated routes")
    for row in rows:
        spec = ZOO[str(row["model"])]
        table.add_row(
            spec.name,
            f"{params(spec) / 1e6:.2f} M",
            str(len(spec.routes)),
            str(len(spec.gates)),
            str(len(spec.routing_space)),
        )
    _print(table)


def info(model: str, *, image_size: int | None = None, json: bool = False) -> None:
    """Show what a model's routes cost: widths, multiply-adds, parameters.

    Args:
        model: A name of the zoo, or a checkpoint file.
        image_size: Side of the image in pixels. Default: the checkpoint's, else 224, or 32 for
            models made for small images.
        json: Print one JSON object.
    """
    from dynaslim.cost import madds, params

    spec, size = _spec_and_size(model, image_size)

    def describe(route: Route) -> dict[str, Any]:
        return {
            "widths": list(route.widths),
            "madds": madds(spec, route, size),
            "params": params(spec, route),
        }

    result = {
        "model": spec.name,
        "params": params(spec),
        "image_size_px": size,
        "routes": [describe(route) for route in spec.routes],
        "largest": describe(spec.largest),
    }
    if json:
        _print_json(result)
        return
    _print(
        f"{spec.name}: {params(spec) / 1e6:.2f} M parameters, {spec.num_classes} classes, "
        f"{len(spec.gates)} gate(s) with choices "
        f"{', '.join(str(gate.choices) for gate in spec.gates)}, at {size}x{size} px"
    )
    table = _table("route", "widths", "MAdds", "parameters")
    for number, route in enumerate(spec.routes):
        table.add_row(str(number), *_describe_cells(describe(route)))
    table.add_row("largest", *_describe_cells(describe(spec.largest)))
    _print(table)


def import_official(file: Path, out: Path, *, ema: bool = False) -> None:
    """Convert a checkpoint of the released DS-Net code, without running anything from it.

    Args:
        file: The released file (.pth.tar).
        out: The checkpoint to write (.safetensors).
        ema: Take the averaged weights.
    """
    from dynaslim._files import check_writable
    from dynaslim.checkpoint import save
    from dynaslim.interop.official import import_official as convert

    check_writable(out)
    checkpoint = convert(file, ema=ema)
    save(out, checkpoint)
    spec = checkpoint.net.spec
    choices = spec.gates[0].choices
    _print(f"{out}: {spec.name}, {spec.num_classes} classes, gate choices {choices}")


def evaluate(
    checkpoint: Path,
    *,
    data: str,
    split: str = "test",
    route: str | None = None,
    batch_size: int = 256,
    json: bool = False,
) -> None:
    """Measure every route and the dynamic mode on labelled images.

    Args:
        checkpoint: A checkpoint file.
        data: A parquet file or a folder of them, a folder of images by class, or a hub name.
        split: Split of the data; "test" also takes one called validation.
        route: Measure this route only, beside the dynamic mode, such as 12-24-48-80-160.
        batch_size: Images per batch.
        json: Print one JSON object.
    """
    from dynaslim import evaluation
    from dynaslim.checkpoint import read
    from dynaslim.data import load_images, open_source
    from dynaslim.errors import UsageError
    from dynaslim.progress import progress
    from dynaslim.spec import Route

    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: must be at least 1")
    loaded = read(checkpoint)
    if loaded.preprocessing is None:
        raise DynaslimError(f"{checkpoint}: does not say how images are prepared (preprocessing)")
    spec = loaded.net.spec
    routes = None if route is None else (spec.coerce_route(Route.parse(route)),)
    source = open_source(data, split)
    order = evaluation.match_classes(
        source.name, source.class_names, spec.num_classes, loaded.class_names
    )
    with progress("reading images", len(source)) as bar:
        images = load_images(source, loaded.preprocessing, on_image=bar.advance)
    if order is not None:
        images = images.relabelled(order, loaded.class_names or ())
    with progress("evaluating", len(images)) as bar:
        result = evaluation.evaluate(
            loaded.net,
            images,
            loaded.preprocessing,
            batch_size=batch_size,
            routes=routes,
            on_batch=bar.advance,
        )
    if json:
        _print_json({"data": source.name, "split": source.split, **result.to_dict()})
        return
    _print(f"{checkpoint} on {source.name} [{source.split}]: {len(images)} images")
    _print(evaluation_table(result))


def demo(
    *,
    out: Path = Path("runs/demo"),
    epochs: int = 6,
    gate_epochs: int = 3,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Train a small network in both stages on real images, evaluate it and show what was saved.

    Args:
        out: Folder for the checkpoint, the results and the picture.
        epochs: Passes over the 10,000 images in stage I (the supernet).
        gate_epochs: Passes in stage II (the gate).
        seed: Of everything random: the same seed gives the same numbers.
        json: Print one JSON object.
    """
    from dynaslim.demo import run_demo

    done = run_demo(out, epochs=epochs, gate_epochs=gate_epochs, seed=seed)
    if json:
        _print_json(done.to_dict())
        return
    _print(evaluation_table(done.evaluation))
    for label, path in done.files.items():
        _print(f"{label:<11} {path}")


# -- the table and how it runs ----------------------------------------------------------------


class Verb(NamedTuple):
    """A verb's function, its group in the help, and one example."""

    run: Callable[..., None]
    group: str
    example: str


VERBS: Final = {
    "demo": Verb(demo, "start", "dynaslim demo"),
    "models": Verb(models, "look", "dynaslim models"),
    "info": Verb(info, "look", "dynaslim info ds_mbnet --image-size 224"),
    "evaluate": Verb(
        evaluate, "measure", "dynaslim evaluate runs/demo/checkpoint.safetensors --data PATH"
    ),
    "import-official": Verb(
        import_official,
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
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # the reader of our output has gone, as with `| head`; nothing is left to be told, and
        # what is still buffered must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        _print(_help(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        _print(f"dynaslim {__version__}")
        return 0
    name, *rest = argv
    if name not in VERBS:
        import difflib

        close = difflib.get_close_matches(name, VERBS, n=1)
        hint = f" did you mean {close[0]}?" if close else ""
        return _fail(f"{name!r} is not a verb;{hint} see dynaslim --help", 2)
    try:
        arguments = _parser(name).parse_args(rest)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    VERBS[name].run(**vars(arguments))
    return 0


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
        help_text = helps[parameter.name]
        if parameter.kind is not parameter.KEYWORD_ONLY:
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
    return parser


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


# -- printing ---------------------------------------------------------------------------------


def evaluation_table(result: Evaluation) -> Any:
    """The result as a table for a person: routes by cost, then the dynamic mode."""
    shares = {}
    if result.dynamic is not None:
        shares = {share.widths: share.share for share in result.dynamic.route_shares}
    table = _table("route", "MAdds", "top-1", "share of images")
    uniform = {route.widths for route in result.routes}
    for route in result.routes:
        share = shares.get(route.widths)
        table.add_row(
            "-".join(map(str, route.widths)),
            f"{route.madds / 1e6:.2f} M",
            f"{route.top1:.2%}",
            "" if share is None else f"{share:.1%}",
        )
    others = sum(share for widths, share in shares.items() if widths not in uniform)
    if others:
        table.add_row("other combinations", "", "", f"{others:.1%}")
    if result.dynamic is not None:
        table.add_section()
        table.add_row(
            "dynamic (gate)",
            f"{result.dynamic.mean_madds / 1e6:.2f} M",
            f"{result.dynamic.top1:.2%}",
            "100.0%",
        )
    return table


def _describe_cells(description: dict[str, Any]) -> tuple[str, str, str]:
    return (
        "-".join(map(str, description["widths"])),
        f"{description['madds'] / 1e6:.2f} M",
        f"{description['params'] / 1e6:.3f} M",
    )


def _spec_and_size(model: str, image_size: int | None) -> tuple[NetSpec, int]:
    """A zoo entry's or a checkpoint's spec, with the image size to count at."""
    from dynaslim.zoo import ZOO, get_spec

    path = Path(model)
    if model in ZOO or not (path.exists() or path.suffix or len(path.parts) > 1):
        spec = get_spec(model)
        default = 224 if spec.total_stride >= 32 else 32
    else:
        from dynaslim.checkpoint import read

        checkpoint = read(model)
        spec, pre = checkpoint.net.spec, checkpoint.preprocessing
        default = 224 if pre is None else pre.image_size_px
    return spec, default if image_size is None else image_size


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _print(what: Any, end: str = "\n") -> None:
    if isinstance(what, str):
        sys.stdout.write(what + end)
        return
    from rich.console import Console

    # a pipe has no width of its own: do not fold what a script or a log will read
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(what)


def _print_json(value: object) -> None:
    sys.stdout.write(json_module.dumps(value, indent=2, allow_nan=False) + "\n")


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"dynaslim: {message}\n")
    return code
