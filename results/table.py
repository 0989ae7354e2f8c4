"""Makes docs/results.md and its pictures: `python -m results.table`; `--check` only compares.

It reads `cells/` and `ms/`; the text is in the template `page.md.j2`.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2

from dynaslim._files import write_atomic
from results import plan, summaries
from results.cells import HERE
from results.summaries import GOALS

DOCS = HERE.parent / "docs"
BLUE, ORANGE, GREEN, GREY, PINK = "#0072B2", "#D55E00", "#009E73", "0.5", "#CC79A7"
WAYS: Final = {
    "both": "gate and escalation",
    "gate": "gate alone",
    "escalation": "escalation alone",
    "ladder": "escalation in two steps",
    "seen_once": "gate and escalation without a second look",
    "random": "random routing, the gate's shares",
    "cascade": "cascade of two static networks",
    "cascade_one_network": "cascade of two routes, trunk run twice",
}
PICTURES: Final = {"cifar10": "results", "cifar10_labels": "results_labels"}
"""Summaries to draw, and the prefixes of the pictures' file names."""
Summary = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m results.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    given = parser.parse_args(argv)
    files = make()
    stale = [path for path, content in files.items() if _read(path) != content]
    for path in stale:
        if not given.check:
            write_atomic(path, files[path])
        sys.stdout.write(f"{path.relative_to(HERE.parent)}: {'stale' if given.check else 'made'}\n")
    return 1 if given.check and stale else 0


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def make() -> dict[Path, bytes]:
    """Every output file and its content, from the existing cells."""
    found: dict[str, Any] = {
        "cifar10": summaries.supernets("headline"),
        "cifar10_labels": summaries.supernets("labels"),
        "cifar10_ensemble": summaries.supernets("ensemble"),
        "cifar10_longer": summaries.supernets("longer"),
        "cifar10_longer_labels": summaries.supernets("longer_labels"),
        "sgs": summaries.sgs(),
        "imagenette": summaries.supernets("imagenette"),
        "gates": summaries.gates(),
        "rates": summaries.rates(),
        "quick": summaries.targets(),
    }
    notes = HERE / "notes.md"
    text = page(found, notes.read_text(encoding="utf-8") if notes.exists() else "")
    files = {DOCS / "results.md": text.encode()}
    for name, pictures in PICTURES.items():
        if main := found[name]:
            for unit in ("madds", "ms") if "ms" in main else ("madds",):
                files[DOCS / "img" / f"{pictures}_{unit}.svg"] = picture(main, unit)
    return files


# -- the page --------------------------------------------------------------------------------------


def page(found: Summary, notes: str) -> str:
    """The template with the summaries filled in; parts without numbers are left out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "g": "{:g}".format,
        "target": "target {:g}".format,
        "rate": "lr {}".format,
        "percent": percent,
        "points": points,
        "signed": signed,
    }
    environment.globals |= {
        "GOALS": GOALS,
        "WAYS": WAYS,
        "WIDTHS": [f"width {k}" for k in range(4)],
        "PICTURES": PICTURES,
        "TRAINED_FOR": plan.TARGETS,
        "behind": behind,
    }
    template = environment.get_template("page.md.j2")
    return template.render(found, summaries=found, notes=notes.strip())


def percent(value: Mapping[str, float]) -> str:
    """Mean and standard deviation of shares, in percent."""
    spread = f" ± {100 * value['sd']:.2f}" if value["n"] > 1 else ""
    return f"{100 * value['mean']:.2f}{spread}"


def points(value: Mapping[str, float]) -> str:
    """Mean and standard deviation of a difference, in percentage points."""
    spread = f" ± {100 * value['sd']:.2f}" if value["n"] > 1 else ""
    return f"{signed(100 * value['mean'])}{spread}"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def behind(found: Summary, way: str | None) -> list[float]:
    """The budgets at which the main way is behind another way or, for None, the uniform line."""
    ours = [row["over_uniform"]["mean"] for row in found["ways"][found["main"]]]
    if way is None:
        return [share for share, a in zip(found["shares"], ours, strict=True) if a < 0]
    theirs = [row["over_uniform"]["mean"] for row in found["ways"].get(way, ())]
    pairs = zip(found["shares"], ours, theirs, strict=False)
    return [share for share, a, b in pairs if b > a + 5e-4]


def picture(main: Mapping[str, Any], unit: str) -> bytes:
    """An SVG plot of top-1 against cost: routes, static networks and ways at every budget."""
    import matplotlib
    from matplotlib.figure import Figure

    def at(arm: str, madds: float) -> float:
        return madds / 1e6 if unit == "madds" else main["ms"]["per_image"][arm]["mean"]

    with matplotlib.rc_context({"svg.hashsalt": "results", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        costs = main["madds"]

        def line(name: str, x: list[float], rows: Sequence[Any], **style: Any) -> None:
            y, sd = ([100 * row[key] for row in rows] for key in ("mean", "sd"))
            axes.errorbar(x, y, yerr=sd, label=name, capsize=2, **style)

        routes = [at(f"route{k}", c) for k, c in enumerate(costs)]
        line("uniform routes", routes, main["routes"], color=BLUE, marker="o")
        if "static_top1" in main:
            line("static networks", routes, main["static_top1"], color=GREY, marker="s", ls=":")
        styles = {"both": (ORANGE, "*"), "gate": (GREEN, "^"), "escalation": (PINK, "v")}
        for way, (colour, marker) in styles.items():
            rows = main["ways"][way]
            x = [
                at(f"{way}@{share:g}", row["madds"]["mean"])
                for share, row in zip(main["shares"], rows, strict=True)
            ]
            top1 = [row["top1"] for row in rows]
            line(WAYS[way], x, top1, color=colour, marker=marker, lw=1)
        unit_name = "million multiply-adds" if unit == "madds" else "milliseconds"
        axes.set_xlabel(f"{unit_name} per image")
        axes.set_ylabel("top-1, %")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
