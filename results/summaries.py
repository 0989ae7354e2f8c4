"""Summaries of cells: means and spreads over seeds, and whether the goals are met."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from results.cells import HERE, all_cells, digest
from results.plan import SGS, TEACHING, jobs_of, tried_rates
from results.policies import uniform_line

DYNAMIC: Final = ("both", "escalation", "gate")
"""The ways that the engine supports."""
MAIN: Final = "both"
"""The way that the engine uses for a budget; the goals are judged by it."""
GOALS: Final = {
    "drop": 0.3,
    "share": 0.5,
    "speed": 1.62,
    "over_uniform_madds": 0.5,
    "over_uniform_ms": 0.3,
}
"""In order: points of top-1 lost, share of the widest route's cost, ratio of times, and points
gained over the uniform routes by multiply-adds and by milliseconds."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (0 for a single value) and number of the seeds' values."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "n": len(values),
    }


def compared(name: str) -> tuple[str, dict[int, dict[str, Any]]]:
    """The split in use (test if all seeds were judged on it), and the comparisons by seed."""
    cells = {cell["seed"]: cell for cell in all_cells("compare") if cell["variant"] == name}
    split = "test" if cells and all("test" in cell for cell in cells.values()) else "held_out"
    return split, {seed: cell[split] for seed, cell in cells.items() if split in cell}


def _over_routes(cells: Mapping[int, Any], name: str) -> list[dict[str, float]]:
    """The spread over seeds of a value of every route."""
    rows = (cell[name] for cell in cells.values())
    return [spread(list(values)) for values in zip(*rows, strict=True)]


# -- supernets with their gates --------------------------------------------------------------------


def supernets(name: str) -> dict[str, Any]:
    """The summary of an experiment: routes, static networks, all ways, times and goals."""
    split, cells = compared(name)
    if not cells:
        return {}
    first = next(iter(cells.values()))
    times = {seed: run for seed, run in _times(name).items() if seed in cells}
    found: dict[str, Any] = {
        "split": split,
        "images": first["images"],
        "seeds": sorted(cells),
        "madds": first["madds"],
        "shares": first["shares"],
        "routes": _over_routes(cells, "top1"),
        **_oracle(cells),
        "ways": _ways(cells),
        "gates": _gates([c["gates"] for c in cells.values()]),
        "main": MAIN,
    }
    for other in ("static_top1", "distillation_top1"):
        some = {seed: c for seed, c in cells.items() if other in c}
        if some:
            found[other] = _over_routes(some, other)
            found[f"supernet_less_{other}"] = spread(
                [statistics.fmean(c["top1"]) - statistics.fmean(c[other]) for c in some.values()]
            )
    if times:
        found["ms"] = _ms(cells, times)
    found["goals"] = goals(found)
    return found


_ORACLE: Final = ("cost", "top1")


def _oracle(cells: Mapping[int, Any]) -> dict[str, Any]:
    """The oracle and its control, for which the widest route must be right in one of two looks.

    The control is left out if a cell lacks it, because its data set must not be mirrored or an
    earlier version judged it.
    """
    names = ["oracle"]
    if all(cell.get("seen_twice") for cell in cells.values()):
        names.append("seen_twice")
    return {
        name: {key: spread([cell[name][key] for cell in cells.values()]) for key in _ORACLE}
        for name in names
    }


def _ways(cells: Mapping[int, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["ways"]))
    found = {}
    for name in names:
        lists = [cell["ways"][name] for cell in cells.values() if name in cell["ways"]]
        found[name] = [
            {key: spread([row[key] for row in rows]) for key in rows[0]}
            for rows in zip(*lists, strict=True)
        ]
    return found


def _gates(lists: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Gates as trained, one entry for each target."""
    return [
        {
            "target": rows[0]["target"],
            **{
                key: spread([row[key] for row in rows])
                for key in ("madds", "share", "top1", "over_uniform")
                if key in rows[0]
            },
            "most_taken": max(max(row["shares"]) for row in rows),
        }
        for rows in zip(*lists, strict=True)
    ]


def _times(name: str) -> dict[int, dict[str, Any]]:
    """Measured times by seed; only those of networks with the plan's current settings."""
    found = {}
    for file in sorted((HERE / "ms").glob(f"{name}_s*.json")):
        seed, run = int(file.stem.removeprefix(f"{name}_s")), json.loads(file.read_text())
        if run["settings_sha256"] == digest(jobs_of(name, None, [seed])[0].settings()):
            found[seed] = run
    return found


def fastest(times: Mapping[int, Mapping[str, Any]]) -> str:
    """The backend that routes fastest over all budgets, which "auto" would choose."""

    def routed(backend: str) -> float:
        runs = [run["ms_per_image"][backend] for run in times.values()]
        return float(sum(arm["median"] for run in runs for name, arm in run.items() if "@" in name))

    return min(_backends(times), key=routed)


def _backends(times: Mapping[int, Mapping[str, Any]]) -> list[str]:
    return list(next(iter(times.values()))["ms_per_image"])


def _widest(times: Mapping[int, Mapping[str, Any]], backend: str) -> float:
    """Mean milliseconds of the widest route as a static program, without a gate."""
    runs = [run["ms_per_image"][backend] for run in times.values()]
    last = max(name for name in runs[0] if name.startswith("route"))
    return statistics.fmean(run[last]["median"] for run in runs)


def _ms(cells: Mapping[int, Any], times: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of every arm on the fastest backend, and gains over routes at equal time."""
    backend = fastest(times)
    runs = {seed: run["ms_per_image"][backend] for seed, run in times.items()}
    arms = list(next(iter(runs.values())))
    first = next(iter(times.values()))
    found: dict[str, Any] = {
        "backend": backend,
        "hardware": first["hardware"],
        "batch": first["batch"],
        "rounds": first["rounds"],
        "widest_by_backend": {name: _widest(times, name) for name in _backends(times)},
        "per_image": {
            arm: spread([run[arm]["median"] for run in runs.values() if arm in run]) for arm in arms
        },
        "faster_than_widest": {
            arm: spread(
                [run[arm]["faster_than_widest"]["median"] for run in runs.values() if arm in run]
            )
            for arm in arms
        },
        "over_uniform": {},
    }
    if all("large_batch" in run for run in times.values()):
        large = {seed: run["ms_per_image_large"][backend] for seed, run in times.items()}
        found["large_batch"] = first["large_batch"]
        found["faster_than_widest_large"] = {
            arm: spread([run[arm]["faster_than_widest"]["median"] for run in large.values()])
            for arm in next(iter(large.values()))
        }
    for way in DYNAMIC:
        rows = []
        for number, share in enumerate(first["shares"]):
            gains = []
            for seed, run in runs.items():
                cell, arm = cells[seed], run[f"{way}@{share:g}"]["median"]
                routes = [run[f"route{k}"]["median"] for k in range(len(cell["top1"]))]
                top1 = cell["ways"][way][number]["top1"]
                gains.append(top1 - uniform_line(routes, cell["top1"], arm))
            rows.append(spread(gains))
        found["over_uniform"][way] = rows
    return found


def goals(found: Mapping[str, Any]) -> dict[str, Any]:
    """The quantities that have goals, for every budget of the main way, and the goals met."""
    widest, main = found["routes"][-1]["mean"], found["main"]
    rows = []
    for number, share in enumerate(found["shares"]):
        row = found["ways"][main][number]
        arm = f"{main}@{share:g}"
        ms = found.get("ms")
        large = {} if ms is None else ms.get("faster_than_widest_large", {})
        rows.append(
            {
                "budget": share,
                "share": row["share"]["mean"],
                "drop": 100 * (widest - row["top1"]["mean"]),
                "speed": None if ms is None else ms["faster_than_widest"][arm]["mean"],
                "speed_large": large[arm]["mean"] if arm in large else None,
                "over_uniform_madds": 100 * row["over_uniform"]["mean"],
                "over_uniform_ms": None
                if ms is None
                else 100 * ms["over_uniform"][main][number]["mean"],
            }
        )
    static = found.get("supernet_less_static_top1")
    return {
        "budgets": rows,
        "near_the_widest": [r["budget"] for r in rows if _is_near(r)],
        "over_uniform": [r["budget"] for r in rows if _is_over(r)],
        "not_below_statics": None if static is None else static["mean"] >= 0,
    }


def _is_near(row: Mapping[str, Any]) -> bool:
    """Whether at most 0.3 points are lost at half the cost or less, and it is fast enough."""
    return (
        row["drop"] <= GOALS["drop"]
        and row["share"] <= GOALS["share"]
        and row["speed"] is not None
        and row["speed"] >= GOALS["speed"]
    )


def _is_over(row: Mapping[str, Any]) -> bool:
    """Whether it is far enough above the uniform line, by multiply-adds and by milliseconds."""
    return (
        row["over_uniform_madds"] >= GOALS["over_uniform_madds"]
        and row["over_uniform_ms"] is not None
        and row["over_uniform_ms"] >= GOALS["over_uniform_ms"]
    )


# -- ablations -------------------------------------------------------------------------------------


def targets() -> dict[str, Any]:
    """Top-1 by training target on the images that ship: of each route, and as a mean."""
    split, cells = compared("quick")
    found: dict[str, Any] = {"split": split, "seeds": sorted(cells), "top1": {}, "mean": {}}
    for target in TEACHING:
        runs = [cell["top1"][target] for cell in cells.values() if target in cell["top1"]]
        if runs:
            found["top1"][target] = [spread(values) for values in zip(*runs, strict=True)]
            found["mean"][target] = spread([statistics.fmean(run) for run in runs])
    return found if found["top1"] else {}


def gates() -> dict[str, Any]:
    """Possible input features of a gate; gates trained on multiply-adds and on milliseconds."""
    split, cells = compared("gates")
    if not cells:
        return {}
    first = next(iter(cells.values()))
    found: dict[str, Any] = {"split": split, "seeds": sorted(cells)}
    for part in ("features", "trained_on"):
        found[part] = {n: _gates([cell[part][n] for cell in cells.values()]) for n in first[part]}
    return found


def sgs() -> dict[str, Any]:
    """Gates trained by SGS in two ways, without budgets."""
    split, cells = compared("sgs")
    if not cells:
        return {}
    ways = {variant: _gates([cell[variant] for cell in cells.values()])[0] for variant in SGS}
    return {"split": split, "seeds": sorted(cells), "ways": ways}


def rates() -> dict[str, Any]:
    """Held-out top-1 (mean over the routes) of every way of teaching at every learning rate."""
    return {
        name: {
            way: {f"{rate:g}": spread(top1) for rate, top1 in sorted(values.items())}
            for way, values in tried.items()
        }
        for name in ("cifar10", "quick")
        if (tried := tried_rates(name))
    }


# -- repeating -------------------------------------------------------------------------------------


def within(value: float, committed: Mapping[str, float]) -> bool:
    """Whether a repeated number is within three standard deviations, or one point, of the mean.

    With few images, seeds differ by a point anyway.
    """
    return math.fabs(value - committed["mean"]) <= max(3 * committed["sd"], 0.01)
