"""Which networks of timm and torchvision convert: `python benchmarks/conversion.py [NAME ...]`.

For each network: whether it converts and verifies, the share of the multiply-adds in layers with a
side that can be cut, the cost of the narrowest route, and the seconds of conversion on one core; or
the reason why it is refused. Weights are random, with BN statistics that fit them. Writes
results/conversion.json, and from it the table in docs/convert.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dynaslim._files import write_atomic
from dynaslim.bench.timing import hardware
from dynaslim.conversion import Conversion
from dynaslim.errors import DynaslimError

HERE = Path(__file__).parent
MODELS = HERE / "conversion_models.json"
"""Names by kind: cnn, hybrid, ref (attention and MLPs alone)."""
RESULTS = HERE / "results" / "conversion.json"
PAGE = HERE.parent / "docs" / "convert.md"
BEGIN, END = "<!-- coverage: written by benchmarks/conversion.py -->", "<!-- end of coverage -->"
KINDS = {"cnn": "CNNs", "hybrid": "CNNs with attention", "ref": "transformers and MLPs"}
MOST = 0.8
"""Least share of the multiply-adds that should be elastic."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as timm:resnet18; default: all of the list")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    known: dict[str, str] = json.loads(MODELS.read_text())
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    let_torchvision_load()
    rows: dict[str, Any] = {}
    if given.out.exists() and given.names:
        rows = json.loads(given.out.read_text())["models"]
    for name in given.names or known:
        rows[name] = {"kind": known.get(name, "cnn"), **tried(name)}
        sys.stdout.write(f"{name}: {rows[name]}\n")
        sys.stdout.flush()
        made = {"hardware": hardware(), "models": rows}
        write_atomic(given.out, (json.dumps(made, indent=1) + "\n").encode())
    if given.out == RESULTS:
        write_atomic(PAGE, with_coverage(PAGE.read_text(), rows).encode())
    return 0


def with_coverage(page: str, rows: dict[str, Any]) -> str:
    """The page with the results inserted between its two markers."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{coverage(rows)}\n{END}{rest.partition(END)[2]}"


def coverage(rows: dict[str, Any]) -> str:
    """Networks that convert, and those that do not, in Markdown."""
    lines = []
    for kind, name in KINDS.items():
        of_kind = [row for row in rows.values() if row["kind"] == kind]
        made = [row for row in of_kind if row["converts"]]
        most = sum(row["elastic"] >= MOST for row in made)
        lines.append(
            f"- {name}: {len(made)} of {len(of_kind)} convert, {most} with at least {MOST:.0%} of "
            f"the multiply-adds in layers that can be cut"
        )
    seconds = [row["seconds"] for row in rows.values() if row["converts"]]
    cnns = [row["seconds"] for row in rows.values() if row["converts"] and row["kind"] == "cnn"]
    lines += [
        f"- median time of a conversion on one core: {statistics.median(cnns):.1f} s for a CNN, "
        f"{statistics.median(seconds):.1f} s for all",
        "",
        "| network | kind | converts | elastic | narrowest route |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items()):
        if row["converts"]:
            found = f"yes | {row['elastic']:.0%} | {row['narrowest']:.0%}"
        else:
            found = f"no: {row['reason'].replace('|', '/')} | | "
        lines.append(f"| {name} | {row['kind']} | {found} |")
    return "\n".join(lines)


def let_torchvision_load() -> None:
    """Declare torchvision's compiled operations, which no model here uses.

    They do not load with every version of torch.
    """
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # already defined
            return
    globals()["_kept"] = library  # definitions are deleted together with this object


def model_of(name: str, side: int | None = None) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network in evaluation mode, with random weights and fitting BN statistics, and two images.

    The images have `side` pixels if the network accepts that, else the network's default size.
    """
    torch.manual_seed(0)
    kind, _, model_name = name.partition(":")
    if kind == "timm":
        import timm

        model = timm.create_model(model_name)
        size = model.default_cfg.get("input_size", (3, 224, 224))
    else:
        import torchvision

        model = torchvision.models.get_model(model_name, weights=None)
        size = (3, 299, 299) if model_name == "inception_v3" else (3, 224, 224)
    x = torch.randn(2, *size)
    if side is not None and _runs(model, small := torch.randn(2, 3, side, side)):
        x = small
    _leave_no_constants(model)
    _fit_statistics(model, x)
    return model.eval(), x


def _runs(model: torch.nn.Module, x: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model.eval()(x)
    except (AssertionError, IndexError, RuntimeError):
        return False
    return True


def tried(name: str) -> dict[str, Any]:
    model, x = model_of(name)
    started = time.process_time()
    try:
        conversion = Conversion(model, x, name=name.partition(":")[2])
        spec = conversion.net().spec
    except DynaslimError as error:
        return {"converts": False, "reason": str(error)}
    except Exception as error:  # a bug of ours; one network must not end the benchmark
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        return {"converts": False, "wrong": True, "reason": reason}
    seconds = time.process_time() - started
    costs = spec.costs
    trunk, widest = costs[0, 0, 0].madds, costs[1, 0, spec.num_widths - 1].madds
    return {
        "converts": True,
        "elastic": round(float(conversion.elastic_share), 3),
        "trunk": round(trunk / (trunk + widest), 3),
        "narrowest": round((trunk + costs[1, 0, 0].madds) / (trunk + widest), 3),
        "error": conversion.error,
        "masked": conversion.masked,
        "seconds": round(seconds, 1),
    }


def _leave_no_constants(model: torch.nn.Module) -> None:
    """Randomise constant parameters: a branch scaled by zero would hide errors in it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                noise = 0.1 * torch.randn_like(parameter)
                parameter.copy_(parameter * (1 + noise) if parameter.max() else noise)


def _fit_statistics(model: torch.nn.Module, x: torch.Tensor) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)


if __name__ == "__main__":
    sys.exit(main())
