"""Budgets chosen on few held-out images, on others: python benchmarks/held_out.py CIFAR10.

The shipped network `cifar10` answers the 10,000 test images along every route, once. Random subsets
of them select budgets, and the accuracy of these budgets is measured on the remaining images:
selected by expected accuracy (`dynaslim.runtime.opinion_pool`), by counting right answers, and by
counting those of one half of the subset, as earlier versions did. Writes results/held_out.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dynaslim._files import write_atomic
from dynaslim.data.images import open_images
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import PathAnswers, answer_images, simulate
from dynaslim.runtime.opinion_pool import OpinionPool
from dynaslim.runtime.program_net import read_model

HERE: Final = Path(__file__).parent
SIZES: Final = (200, 440, 1000, 2000)
BUDGETS: Final = ("0.3", "0.4", "0.5", "drop=1")
Logits = npt.NDArray[np.float32]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "held_out.json")
    given = parser.parse_args(argv)
    checkpoint, _ = read_model("cifar10")
    logits: list[list[Logits]] = [[] for _ in checkpoint.net.spec.routes]
    labels: list[npt.NDArray[np.int64]] = []

    def keep(path: int, logits_BC: Logits, labels_B: npt.NDArray[np.int64]) -> None:
        logits[path].append(logits_BC)
        if path == 0:
            labels.append(labels_B)

    images = open_images(checkpoint, given.data, "test")
    whole = answer_images(checkpoint, images, 250, on_answers=keep)
    # second looks answer where the others are unsure, which is not compared here
    whole = replace(whole, second_look_N=None, expected_look_N=None)
    logits_PNC = np.stack([np.concatenate(each) for each in logits])
    labels_N = np.concatenate(labels)
    rng, rows = np.random.default_rng(0), []
    for size in SIZES:
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for _ in range(given.subsets):
            order = rng.permutation(len(labels_N))
            others = _of(whole, logits_PNC, labels_N, order[size:])
            for way, chosen in _ways(whole, logits_PNC, labels_N, order[:size]):
                curve = fit_curve(chosen)
                for budget in BUDGETS:
                    point = curve.at(budget)
                    top1 = simulate(others, point.shift, point.escalations).top1
                    lost = float(others.correct_NP[:, -1].mean()) - top1
                    found.setdefault((way, budget), []).append((top1, lost, point.share))
        for (way, budget), values in found.items():
            tops, drops, shares = zip(*values, strict=True)
            rows.append(
                {
                    "images": size,
                    "way": way,
                    "budget": budget,
                    "top1": statistics.mean(tops),
                    "deviation": statistics.stdev(tops),
                    "least": min(tops),
                    "drop": statistics.mean(drops),
                    "share": statistics.mean(shares),
                }
            )
    made = {"command": sys.argv, "subsets": given.subsets, "rows": rows}
    write_atomic(given.out, (json.dumps(made, indent=1) + "\n").encode())
    return 0


def _of(
    whole: PathAnswers, logits_PNC: Logits, labels_N: npt.NDArray[np.int64], rows: Any
) -> PathAnswers:
    """The answers for some of the images, judged by these images alone."""
    pool = OpinionPool()
    pool.add(logits_PNC[:, rows].argmax(2).T, logits_PNC[:, rows], labels_N[rows])
    return replace(
        whole,
        gate_logits=tuple(logits[:, rows] for logits in whole.gate_logits),
        correct_NP=whole.correct_NP[rows],
        margins_NP=whole.margins_NP[rows],
        expected_NP=pool.probabilities(),
    )


def _ways(
    whole: PathAnswers, logits_PNC: Logits, labels_N: npt.NDArray[np.int64], rows: Any
) -> Iterator[tuple[str, PathAnswers]]:
    for name, some in (("expected", rows), ("counted", rows), ("counted on a half", rows[::2])):
        answers = _of(whole, logits_PNC, labels_N, some)
        if name != "expected":
            answers = replace(answers, expected_NP=answers.correct_NP.astype(np.float64))
        yield name, answers


if __name__ == "__main__":
    sys.exit(main())
