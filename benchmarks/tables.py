"""Writes the tables of the pages in docs/ from the results beside this script.

    python benchmarks/tables.py           # --check compares the pages with the results

The text between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
WAYS = ("all cores", "own core")
POLICIES = ("side by side", "own core")


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(value: dict[str, float], digits: int, *, bold: bool = False) -> str:
    median = f"{value['median']:.{digits}f}"
    median = f"**{median}**" if bold else median
    return f"{median} ({value['q1']:.{digits}f} to {value['q3']:.{digits}f})"


def machine() -> str:
    found = results("routed")["hardware"]
    return (
        f"{found['cores']} cores of {found['processor']}, {found['system']}, "
        f"Python {found['python']}, torch {found['torch']}, ONNX Runtime {found['onnxruntime']}, "
        f"OpenVINO {found['openvino']}; n = {results('routed')['runs'][0]['rounds']} rounds."
    )


def routed() -> str:
    """Batches against the ideal."""
    rows = [
        [
            run["backend"],
            str(run["batch_size"]),
            spread(run["routed_ms"], 1),
            f"{run['ideal_ms']['median']:.1f}",
            spread(run["ratio_to_ideal"], 3, bold=True),
            f"{run['speedup_over_widest']['median']:.2f}x",
        ]
        for run in results("routed")["runs"]
        if run["batch_size"] > 1
    ]
    header = ["backend", "batch", "routed, ms", "ideal, ms", "ideal / routed"]
    return table([*header, "faster than the widest route"], rows)


def statics() -> str:
    """Static networks in their fastest configuration."""
    rows, header = [], ["backend"]
    for run in results("routed")["runs"]:
        if run["batch_size"] != 32:
            continue
        header = ["backend", *run["routes"]]
        cells = []
        for route in run["routes"]:
            best = run["best_static_ms"][route]
            how = ", side by side" if best["side_by_side"] else ""
            cells.append(f"{best['median'] / 32:.2f} ({best['rows_per_piece']}{how})")
        rows.append([run["backend"], *cells])
    return table(header, rows)


def single() -> str:
    """One image at a time."""
    rows = []
    for run in results("routed")["runs"]:
        if run["batch_size"] == 1:
            static = [f"{run['best_static_ms'][route]['median']:.1f}" for route in run["routes"]]
            ratios = [spread(run["routed_over_static"][route], 2) for route in run["routes"]]
            rows.append([run["backend"], *static, *ratios])
    names = ["0", "4", "9", "13"]
    header = ["backend", *(f"static {n}" for n in names), *(f"ratio {n}" for n in names)]
    return table(header, rows)


def starts() -> str:
    """Start-up of a second process."""
    rows = [
        [backend, str(len(found["compiled"])), str(found["cached"]), f"{found['ready_s']:.2f} s"]
        for backend, found in results("routed")["starts"].items()
    ]
    return table(["backend", "programs compiled", "read from disk", "until all are ready"], rows)


def masked() -> str:
    """Masked inference as in research code."""
    found = results("masked")
    names = {
        "masked": "masked: every layer at its full width, masks, statistics gathered for each row, "
        "as research code does it",
        "masked_plain_trunk": "masked, but with a plain trunk as narrow as on the routes",
        "gated": "this package's own masked mode, which training uses",
        "wide_eager": "the widest route alone, static: what masking was meant to beat",
    }
    rows = [
        [
            text,
            f"{found['ms'][name]['median']:.0f}",
            f"{found['routed_is_faster_by'][name]['median']:.1f}x",
        ]
        for name, text in names.items()
    ]
    rows.insert(0, [f"routed, {found['backend']}", f"{found['ms']['routed']['median']:.0f}", ""])
    return table(["eager PyTorch, where nothing else is said", "ms", "routed is faster"], rows)


def extracted() -> str:
    """Routes as plain networks."""
    rows = [
        [route, spread(one["extracted_over_by_hand"], 3)]
        for route, one in results("extracted")["routes"].items()
    ]
    return table(["route", "extracted / by hand"], rows)


def variants() -> str:
    """Variants that were tried."""
    rows = [
        [name, spread(one["over_the_engine"], 2)]
        for name, one in results("variants")["variants"].items()
        if "," in name
    ]
    return table(["variant", "time"], rows)


def breakdown() -> str:
    """Where the cores' time goes."""
    found = results("variants")["breakdown"]
    parts = list(next(iter(found.values())))
    rows = [[name, *(f"{shares[part]:.1%}" for part in parts)] for name, shares in found.items()]
    return table(["backend", *parts], rows)


def floor() -> str:
    """The processor's limits compared with the best static network."""
    found = results("variants")
    best: dict[str, float] = {}
    for run in results("routed")["runs"]:
        if run["batch_size"] == 32:
            for route, one in run["best_static_ms"].items():
                best[route] = min(best.get(route, 1e9), one["median"] / 32)
    routes = list(found["floor_ms_per_image"])
    speed = found["machine"]
    limits = f"{speed['gflops']:.0f} GFLOP/s, {speed['gbytes_per_s']:.0f} GB/s"
    return table(
        [limits, *routes],
        [
            ["floor", *(f"{found['floor_ms_per_image'][route]:.2f}" for route in routes)],
            ["measured", *(f"{best[route]:.2f}" for route in routes)],
        ],
    )


def int8() -> str:
    """int8 compared with fp32."""
    rows = [
        [
            run["what"],
            run["backend"],
            str(run["batch_size"]),
            f"{run['fp32_ms']['median']:.1f}",
            f"{run['int8_ms']['median']:.1f}",
            spread(run["int8_over_fp32"], 2),
        ]
        for run in results("int8")["runs"]
    ]
    return table(["what", "backend", "batch", "fp32, ms", "int8, ms", "int8 / fp32"], rows)


def callers() -> str:
    """Callers against the ideal."""
    rows = []
    for run in results("callers")["measured"]:
        others = run["faster_than_the_engine"]
        rows.append(
            [
                run["backend"],
                str(run["callers"]),
                str(run["batch_size"]),
                f"{run['images_per_s']['median']:.0f}",
                spread(run["ratio_to_ideal"], 2, bold=True),
                *(spread(others[way], 2) if way in others else "" for way in WAYS),
            ]
        )
    header = ["backend", "callers", "batch", "images/s", "ideal / routed"]
    return table([*header, *(f"{way}: faster" for way in WAYS)], rows)


def cores() -> str:
    """Simulated many cores: with a single caller, and with one caller per core."""
    rows = []
    for backend, paper in results("callers")["simulated"].items():
        found = {(r["cores"], r["callers"], r["batch_size"]): r for r in paper["runs"]}
        for count in (4, 16, 64):
            for callers in (1, count):
                shown = [
                    f"{found[count, callers, batch][way]['ratio_to_ideal']:.2f}"
                    for batch in (8, 32)
                    for way in POLICIES
                ]
                rows.append([backend, str(count), str(callers), *shown])
    columns = [f"batch {batch}, {way}" for batch in (8, 32) for way in POLICIES]
    return table(["backend", "cores", "callers", *columns], rows)


def adapted(name: str) -> str:
    """An adapted network compared with pruned ones: means over seeds, and times."""
    found = results(name)
    rows, times = found["rows"], found["times"]
    routes = [name for name in times["batch 32"] if name.startswith("route ")]
    widest = max(routes, key=lambda name: float(times["batch 32"][name]["median"]))

    def line(name: str, timed: str) -> list[str]:
        row = rows[name]
        madds = statistics.mean(row["madds"]) / 1e6
        accuracy = f"{row['mean_top1']:.1%}"
        if row["deviation"] is not None:
            accuracy += f" ± {100 * row['deviation']:.1f}"
        speed = [
            f"{times[batch][timed]['median']:.2f} "
            f"({times[batch][widest]['median'] / times[batch][timed]['median']:.2f}x)"
            for batch in ("batch 32", "batch 1")
        ]
        return [name, f"{madds:.1f} M", accuracy, *speed]

    lines = [line("the original", widest)]
    # with few budgets on a curve, several limits select the same ones
    limits = {str(rows[name]["madds"]): name for name in reversed(found["timed_as"])}
    lines += [line(name, found["timed_as"][name]) for name in reversed(limits.values())]
    lines += [line(name, f"route {name}") for name in rows if f"route {name}" in times["batch 1"]]
    lines += [line(name, name) for name in rows if name.startswith("pruned")]
    header = ["", "multiply-adds", "top-1", "ms per image, batches of 32", "one image"]
    return table(header, lines)


def held_out() -> str:
    """Budgets chosen on few images, measured on others."""
    rows: dict[int, list[str]] = {}
    for row in results("held_out")["rows"]:
        if row["budget"] == "0.5":
            cells = rows.setdefault(row["images"], [f"{row['images']:,}"])
            cells.append(f"{row['top1']:.2%} ± {100 * row['deviation']:.2f}")
    header = ["held-out images", "by expected accuracy", "by counting right answers"]
    return table([*header, "by counting on one half"], list(rows.values()))


def compared(name: str) -> str:
    """Accuracy, cost and times next to those of the most expensive network.

    Each at the backend that is fastest for it.
    """
    found = results(name)

    def fastest(row: str, batch: str) -> float:
        times = found["times"][batch].items()
        own = [value["median"] for name, value in times if name.startswith(f"{row} by ")]
        return float(min(own))

    last = max(found["rows"], key=lambda row: found["rows"][row]["share"])
    rows = []
    for name, row in found["rows"].items():
        cells = [name, f"{row['top1']:.1%}", f"{row['share']:.2f}"]
        for batch in ("batch 32", "batch 1"):
            ms = fastest(name, batch)
            cells.append(f"{ms:.2f} ({ms / fastest(last, batch):.2f})")
        rows.append(cells)
    header = ["", "top-1", "multiply-adds", "ms per image, batches of 32", "one image"]
    return table(header, rows)


def named(made: Callable[[str], str], *names: str) -> dict[str, Callable[[], str]]:
    """Tables that are named after their results."""
    return {name: partial(made, name) for name in names}


SPEED = (
    machine,
    routed,
    statics,
    single,
    starts,
    masked,
    extracted,
    variants,
    breakdown,
    floor,
    int8,
    callers,
    cores,
)
ADAPTED = (
    "adaptation",
    "adaptation_224",
    "adaptation_lite2",
    "adaptation_sizes",
    "adaptation_imagenette",
    "adaptation_imagenette_lite2",
)
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "performance.md": {made.__name__: made for made in SPEED},
    "adapt.md": named(adapted, *ADAPTED) | named(compared, "alternatives"),
    "cascades.md": named(compared, "ladder"),
    "budgets.md": {"held_out": held_out},
}


def filled(name: str) -> str:
    """A page with every table filled in from the results."""
    page = (DOCS / name).read_text()
    made = PAGES[name]
    places = re.findall(r"<!-- table: (\w+) -->", page)
    if sorted(places) != sorted(made):
        sys.exit(f"{name} has places for {sorted(places)}, not for {sorted(made)}")
    for place in places:
        start = f"<!-- table: {place} -->\n"
        before, _, behind = page.partition(start)
        rest = behind[behind.index("<!-- end -->") :]
        page = f"{before}{start}\n{made[place]()}\n\n{rest}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if stale")
    options = parser.parse_args()
    made = {name: filled(name) for name in PAGES}
    if options.check:
        sys.exit(any(page != (DOCS / name).read_text() for name, page in made.items()))
    for name, page in made.items():
        (DOCS / name).write_text(page)


if __name__ == "__main__":
    main()
