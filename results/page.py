"""The page docs/results.md, as text made of the summaries alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from results.summaries import GOALS

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
TARGETS: Final = {
    "labels": "the labels",
    "distillation": "the live largest (in-place distillation)",
    "bootstrap": "the averaged largest (bootstrapping)",
    "ensemble": "the averaged ensemble (in-place ensemble bootstrapping)",
    "both": "that and the labels",
    "handover": "the labels, going over to that in the first half",
}
OBJECTIVES: Final = {
    "expected": "expected loss",
    "sgs_paper": "SGS as in the paper, no target",
    "sgs_try_best": "SGS, try best",
    "sgs_give_up": "SGS, give up",
    "sgs_no_gumbel": "SGS without Gumbel noise",
    "sgs_balanced": "SGS, easy and hard images weighed alike, cost weight 0.1",
    "both": "expected loss and SGS labels (weight 0.2)",
}
HEAD: Final = """# Results

<!-- made by `python -m results.table` from results/*.json; changes here are lost -->

What the networks of this package give, measured: accuracy against multiply-adds and milliseconds,
beside what one would build instead, and what each part of the method is worth. Numbers are means
over seeds ± their standard deviation. Choices (thresholds, budgets, gates) were made on images held
out of the training split.
"""
BEFORE: Final = frozenset({"imagenette", "targets", "gates", "gates_ms"})
"""Summaries of networks that were trained before stage I was repaired; to be trained again."""
OLD: Final = (
    "*Networks of before the repair of stage I ([what changed](#what-changed)); they stand here "
    "until they are trained again.*\n"
)
REMEDIES: Final = {
    "cifar10_labels": "## CIFAR-10, all routes taught by the labels\n\nThe same recipe with "
    "`target: labels`: no route learns from a teacher.",
    "cifar10_ensemble": "## CIFAR-10, in-place ensemble bootstrapping\n\nThe same recipe with "
    "`target: ensemble` alone, the paper's way: no route but the largest learns from labels.",
    "cifar10_longer": "## CIFAR-10, trained three times as long\n\nThe recipe in full: 24 "
    "epochs, as the network that ships.",
    "cifar10_longer_labels": "## CIFAR-10, trained three times as long by the labels\n\nThe recipe "
    "in full with `target: labels`.",
}
PICTURES: Final = {"cifar10": "results", "cifar10_labels": "results_labels"}
"""Summaries that are drawn, and how the files' names begin."""
SUPERNETS: Final = {
    "cifar10": "the recipe, 8 epochs",
    "cifar10_labels": "labels, 8 epochs",
    "cifar10_ensemble": "in-place ensemble bootstrapping, 8 epochs",
    "cifar10_longer": "the recipe, 24 epochs",
    "cifar10_longer_labels": "labels, 24 epochs",
}
NEAR: Final = (
    f"at most {GOALS['drop']} points below the widest route at {GOALS['share']:g} of its "
    f"multiply-adds and {GOALS['speed']}x faster"
)
OVER: Final = (
    f"{GOALS['over_uniform_madds']} points over the uniform routes at equal multiply-adds, "
    f"{GOALS['over_uniform_ms']} at equal ms"
)
Summary = Mapping[str, Any]


def page(summaries: Summary, notes: str) -> str:
    """All of it; parts whose numbers are missing are left out."""
    parts = [HEAD]
    if main := summaries["cifar10"]:
        parts += [_goals(summaries), _headline(main), _equal_cost(main, "CIFAR-10")]
    if notes:
        parts.append(notes.strip() + "\n")
    parts += [
        _remedy(key, told, summaries[key]) for key, told in REMEDIES.items() if summaries[key]
    ]
    if photographs := summaries["imagenette"]:
        parts.append(_imagenette(photographs))
    parts += [*_ablations(summaries), _repeat(summaries)]
    return "\n".join(parts)


def _age(name: str) -> str:
    return f"{OLD}\n" if name in BEFORE else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


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


def _split(found: Summary, images: int | None = None) -> str:
    count = "" if images is None else f"{images:,} "
    if found["split"] == "test":
        return f"the {count}images of the test split"
    return f"{count}held-out images (the test split has not been opened yet)"


# -- CIFAR-10 --------------------------------------------------------------------------------------


def _remedy(name: str, told: str, found: Summary) -> str:
    seeds = ", ".join(map(str, found["seeds"]))
    parts = [f"{told} Seeds: {seeds}.\n\n{_age(name)}", _rows_of_networks(found)]
    parts += _drawn(name, found)
    parts.append(_budgets(found, "CIFAR-10"))
    if "cascade" in found["ways"]:
        parts.append(_equal_cost(found, told.partition("\n")[0].removeprefix("## ")))
    return "\n".join(parts)


def _goals(summaries: Summary) -> str:
    """All supernets beside what the goals ask for; then the first budget by budget."""
    found = {told: summaries[name] for name, told in SUPERNETS.items() if summaries[name]}
    rows = []
    for told, summary in found.items():
        goals, timed = summary["goals"], "ms" in summary
        static = summary.get("supernet_less_static_top1")
        rows.append(
            [
                f"{told}, {_seeds(summary)}",
                _met(goals["near_the_widest"], timed),
                _met(goals["over_uniform"], timed),
                "" if static is None else f"{_judged(goals)} ({points(static)})",
            ]
        )
    header = ["supernet", NEAR, OVER, "routes not below networks trained alone, points"]
    return (
        f"## Against the goals\n\n{_age('cifar10')}"
        "Budgets at which each is met, on CIFAR-10; what the supernets "
        f"are stands below.\n\n{table(header, rows)}\n{_budgets(summaries['cifar10'], 'CIFAR-10')}"
    )


def _seeds(found: Summary) -> str:
    return "1 seed" if len(found["seeds"]) == 1 else f"{len(found['seeds'])} seeds"


def _judged(goals: Mapping[str, Any]) -> str:
    return "met" if goals["not_below_statics"] else "**missed**"


def _met(budgets: Sequence[float], timed: bool) -> str:
    if not timed:
        return "not timed"
    return ", ".join(f"{b:g}" for b in budgets) or "**missed**"


def _budgets(main: Summary, name: str) -> str:
    """Every budget of the main way beside what the goals ask for."""
    goals, large_batch = main["goals"], main.get("ms", {}).get("large_batch")
    rows = []
    for row in goals["budgets"]:
        speed, ms = row["speed"], row["over_uniform_ms"]
        rows.append(
            [
                f"{row['budget']:g}",
                f"{row['share']:.3f}",
                signed(-row["drop"]),
                "" if speed is None else f"{speed:.2f}x",
                *([f"{row['speed_large']:.2f}x"] if large_batch else []),
                signed(row["over_uniform_madds"]),
                "" if ms is None else signed(ms),
            ]
        )
    lines = [
        f"{name}, {WAYS[main['main']]}, on {_split(main)}; points of top-1.\n",
        table(
            [
                "budget",
                "of the widest's MAdds",
                "to the widest route",
                "faster than it",
                *([f"in batches of {large_batch}"] if large_batch else []),
                "over uniform, equal MAdds",
                "over uniform, equal ms",
            ],
            rows,
        ),
    ]
    return "\n".join(lines)


def _rows_of_networks(main: Summary) -> str:
    """Networks, ways and routes: cost, top-1, time."""
    ms = main.get("ms")
    rows = []

    def row(name: str, madds: float, top1: Mapping[str, float], arm: str) -> None:
        timed = "" if ms is None or arm not in ms["per_image"] else _ms(ms["per_image"][arm])
        rows.append([name, f"{madds / 1e6:.2f}", percent(top1), timed])

    for k, madds in enumerate(main["madds"]):
        row(f"supernet, width {k}", madds, main["routes"][k], f"route{k}")
    for gate in main["gates"]:
        name = f"gate as trained, target {gate['target']:g}"
        row(name, gate["madds"]["mean"], gate["top1"], f"trained@{gate['target']:.2f}")
    for way in ("escalation", "both"):
        for number, share in enumerate(main["shares"]):
            if share in (0.35, 0.5, 0.7):
                found = main["ways"][way][number]
                row(
                    f"{WAYS[way]}, budget {share:g}",
                    found["madds"]["mean"],
                    found["top1"],
                    f"{way}@{share:g}",
                )
    for k, madds in enumerate(main["madds"]):
        if "static_top1" in main:
            row(f"static, width {k} alone", madds, main["static_top1"][k], f"static{k}")
    for k, madds in enumerate(main["madds"]):
        if "distillation_top1" in main:
            row(f"in-place distillation, width {k}", madds, main["distillation_top1"][k], "")
    oracle = main["oracle"]
    row("oracle: the cheapest route that is right", oracle["cost"]["mean"], oracle["top1"], "")
    if twice := main.get("seen_twice"):
        name = "its control: the widest route, image and mirror image, right at least once"
        row(name, twice["cost"]["mean"], twice["top1"], "")
    return table(["network", "M MAdds", "top-1, %", "ms per image"], rows)


def _imagenette(found: Summary) -> str:
    ms = found.get("ms")
    told = (
        f"## Imagenette\n\n{_age('imagenette')}"
        f"`ds_mbnet` on photographs of 128 px, {_seeds(found)}, on "
        f"{_split(found, found['images'])}; recipe `recipes/imagenette_ds_mbnet_supernet.yaml`, "
        f"trained on a GPU from scratch; the four widths of its routing space."
    )
    timed = "" if ms is None else f" {_timed(ms)}"
    return "\n".join(
        [
            f"{told}{timed}\n",
            _rows_of_networks(found),
            _budgets(found, "Imagenette"),
            _equal_cost(found, "Imagenette"),
        ]
    )


def _timed(ms: Summary) -> str:
    hardware = ms["hardware"]
    widest = ", ".join(f"{value:.3f} by {name}" for name, value in ms["widest_by_backend"].items())
    return (
        f"Milliseconds per image: {ms['backend']}, batches of {ms['batch']}, "
        f"{hardware['cores']} cores of {hardware['processor']}, medians of {ms['rounds']} "
        f"interleaved rounds; the backend is the one that routes fastest (the widest route alone: "
        f"{widest})."
    )


def _headline(main: Summary) -> str:
    ms = main.get("ms")
    lines = [
        f"## CIFAR-10\n\n{_age('cifar10')}",
        f"`ds_resnet8_cifar`, {len(main['seeds'])} seeds, on {_split(main, main['images'])}; "
        f"recipe `recipes/cifar10_resnet8_supernet.yaml` (the averaged ensemble and the labels "
        f"teach) in 8 of its 24 epochs. Static networks: as many epochs, one width alone, labels. "
        f"Each at its own learning rate.",
    ]
    if ms is not None:
        lines.append(_timed(ms))
    lines.append("")
    lines.append(_rows_of_networks(main))
    return "\n".join([*lines, *_drawn("cifar10", main)])


def _drawn(name: str, found: Summary) -> Iterator[str]:
    pictures = PICTURES.get(name)
    if pictures is not None:
        yield f"![Accuracy against multiply-adds](img/{pictures}_madds.svg)\n"
        if "ms" in found:
            yield f"![Accuracy against milliseconds](img/{pictures}_ms.svg)\n"


def _ms(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f}"


def _equal_cost(found: Summary, name: str) -> str:
    shares = found["shares"]
    rows = []
    for way, told in WAYS.items():
        if way in found["ways"]:
            rows.append([told, *(points(row["over_uniform"]) for row in found["ways"][way])])
    ms = found.get("ms")
    lines = [
        f"### {name}: top-1 over the uniform routes at equal cost\n",
        "Points above the best that uniform routes, or a random choice among them, give at the "
        "same multiply-adds; columns are budgets, as parts of the widest route's cost.\n",
        table(["way", *(f"{share:g}" for share in shares)], rows),
    ]
    if ms is not None:
        rows = [
            [WAYS[way], *(points(value) for value in values)]
            for way, values in ms["over_uniform"].items()
        ]
        lines += [
            "The same at equal measured milliseconds:\n",
            table(["way", *(f"{share:g}" for share in shares)], rows),
        ]
    lines += [*_losses(found)]
    return "\n".join(lines)


def _losses(found: Summary) -> Iterator[str]:
    """Where the main way does not win, in words."""
    ours, main = found["ways"][found["main"]], WAYS[found["main"]].capitalize()
    for way, told in WAYS.items():
        if way == found["main"] or way not in found["ways"]:
            continue
        behind = [
            f"{share:g}"
            for share, a, b in zip(found["shares"], ours, found["ways"][way], strict=True)
            if b["over_uniform"]["mean"] > a["over_uniform"]["mean"] + 5e-4
        ]
        if behind:
            yield f"- {main} is behind {told} at budget {', '.join(behind)}."
    below = [
        f"{share:g}"
        for share, row in zip(found["shares"], ours, strict=True)
        if row["over_uniform"]["mean"] < 0
    ]
    if below:
        yield f"- {main} is below the uniform routes at budget {', '.join(below)}."
    oracle = found["oracle"]
    best = max(row["top1"]["mean"] for row in ours)
    told = (
        f"- The oracle gives {percent(oracle['top1'])} at {oracle['cost']['mean'] / 1e6:.2f} M "
        f"MAdds: {100 * (oracle['top1']['mean'] - best):.2f} points above the best budget."
    )
    if twice := found.get("seen_twice"):
        told += (
            f" That is not all headroom: the widest route alone, shown image and mirror image, is "
            f"right at least once for {percent(twice['top1'])}."
        )
    yield told + "\n"


# -- ablations -------------------------------------------------------------------------------------


def _ablations(summaries: Summary) -> Iterator[str]:
    yield "## Ablations\n"
    if found := summaries["sgs"]:
        (row,) = found["gates"]
        yield (
            "### Gates by SGS, as in the paper\n\nCIFAR-10, the supernets taught by the ensemble, "
            f"{len(found['seeds'])} seeds, on {_split(found)}: the gate alone, with the paper's "
            f"weights, takes {row['share']['mean']:.2f} of the widest route's multiply-adds and is "
            f"{points(row['over_uniform'])} points over the uniform routes at equal multiply-adds; "
            f"the route that most images take has {row['most_taken']:.0%} of them.\n"
        )
    found = summaries["targets"]
    if found:
        yield (
            f"### What the sub-networks learn\n\n{_age('targets')}Fashion-MNIST, `resnet8_small`, "
            f"{len(found['seeds'])} seeds, top-1 (%) on {_split(found)}.\n"
        )
        yield _targets(found)
    found = summaries["gates"]
    if found:
        yield _equal_cost(found, "Fashion-MNIST")
        yield (
            f"### What the gate minimises\n\n{_age('gates')}"
            "Fashion-MNIST, gates as they were trained for the "
            "targets: points over the uniform routes at equal multiply-adds, the part of the "
            "widest route's cost, and the largest share of images that one route took.\n"
        )
        yield _by_target(found["objectives"], OBJECTIVES)
        yield (
            "### What the gate reads\n\nSmall heads fitted beside the network on stored features "
            "of the trunk, expected loss, the same images. `hidden`: what the network's own gate "
            "reads; a hidden layer has 32 units.\n"
        )
        yield _by_target(found["features"], {})
    found = summaries["gates_ms"]
    if found:
        rows = [
            [
                f"{name}, target {row['target']:g}",
                f"{row['share']['mean']:.3f}",
                percent(row["top1"]),
                points(row["over_uniform"]),
            ]
            for name, rows in found["trained_on"].items()
            for row in rows
        ]
        yield (
            f"### Trained on multiply-adds against milliseconds\n\n{_age('gates_ms')}"
            "Both judged by a table of "
            "measured milliseconds.\n"
        )
        header = ["trained on", "of the widest's ms", "top-1, %", "over uniform, equal ms"]
        yield table(header, rows)
    if found := summaries["rates"]:
        yield _rates(found)


def _targets(found: Summary) -> str:
    widths = len(next(iter(found["top1"].values())))
    rows = [
        [TARGETS[name], *map(percent, values), percent(found["mean"][name])]
        for name, values in found["top1"].items()
    ]
    return table(["targets", *(f"width {k}" for k in range(widths)), "mean"], rows)


def _by_target(found: Summary, names: Mapping[str, str]) -> str:
    if not found:
        return ""
    targets = list(
        dict.fromkeys(row["target"] for rows in found.values() for row in rows if row["target"])
    )
    rows = []
    for name, values in found.items():
        told = {
            r["target"]: f"{points(r['over_uniform'])} at {r['share']['mean']:.2f} "
            f"({r['most_taken']:.0%})"
            for r in values
        }
        cells = [told.get(target, "") for target in targets]
        if None in told:  # its weights alone say what compute is worth
            cells[0] = told[None]
        rows.append([names.get(name, name), *cells])
    return table(["", *(f"target {target:g}" for target in targets)], rows)


RATED: Final = {
    "cifar10": "CIFAR-10, 8 epochs",
    "targets": "Fashion-MNIST",
    "quick": "the images that ship",
}


def _rates(found: Summary) -> str:
    parts = [
        "### Learning rates\n\nEvery way of teaching is compared at the rate that the held-out "
        "images chose, and so are networks trained alone: top-1 (%) there, mean over the routes, "
        "one seed.\n"
    ]
    for name, told in RATED.items():
        if name in found:
            rates = sorted({rate for rows in found[name].values() for rate in rows}, key=float)
            rows = [
                [way, *(f"{100 * values[r]:.2f}" if r in values else "" for r in rates)]
                for way, values in found[name].items()
            ]
            parts.append(table([told, *(f"lr {rate}" for rate in rates)], rows))
    return "\n".join(parts)


def _repeat(summaries: Summary) -> str:
    text = (
        "## Repeating it\n\n`make results-quick` trains one ablation again on the images that ship "
        "with the package and compares with these numbers (about ten minutes on two cores):\n\n"
    )
    found = summaries["quick"]
    text += _targets(found) + "\n" if found else ""
    return text + (
        "`make results` runs all of it, and `make results-gpu` Imagenette on a machine with a GPU; "
        "every network and comparison is a file in `results/cells/`, with its recipe and the "
        "machine.\n"
    )
