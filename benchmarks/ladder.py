"""A cascade of pretrained networks, on photographs: python benchmarks/ladder.py IMAGENETTE.

EfficientNet-Lite0 at 128 and 224 px and -Lite2 at 260 px choose among the classes of the images;
of their classifiers, trained on a thousand classes, only those rows are kept. Budgets are measured
on the test split. All are timed in one interleaved run. Needs `dynaslim[imagenet]`. Writes
results/ladder.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from adaptation import TimedRow, measured, timed_images
from imagenet import CLASSES

from dynaslim._files import write_atomic
from dynaslim.bench.timing import hardware
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.checkpoint import Checkpoint
from dynaslim.conversion.efficientnet_lite import EfficientNetLite, preprocessing, pretrained
from dynaslim.data.images import ImageDataset
from dynaslim.data.source import open_source
from dynaslim.runtime.budget import cascade_logits
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import PathAnswers, answer_images, uniform_outcomes
from dynaslim.runtime.cascade import Rung, cascade
from dynaslim.runtime.engine import Engine

HERE: Final = Path(__file__).parent
RUNGS: Final = (
    ("efficientnet_lite0", 128),
    ("efficientnet_lite0", 224),
    ("efficientnet_lite2", 260),
)
CASCADES: Final = {
    "three rungs": (0, 1, 2),
    "two rungs, from 224 px": (1, 2),
    "two rungs, from 128 px": (0, 2),
}
"""Positions of their rungs in `RUNGS`."""
BUDGETS: Final = ("drop=0.5", "0.4", "0.5", "0.6")
"""The first is the default of a cascade."""
BACKENDS: Final = ("onnxruntime", "openvino")
TIMED: Final = 192
"""The number of images that are timed."""
Ladders = Mapping[str, tuple[Checkpoint, PathAnswers]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, help="so many, a fixed random choice")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ladder.json")
    given = parser.parse_args(argv)
    names = open_source(given.data, "test").class_names
    whole = cascade([_rung(*rung, names) for rung in RUNGS])
    assert whole.preprocessing is not None
    images = ImageDataset.of(open_source(given.data, "test"), whole.preprocessing)
    if given.images is not None:
        images = images.sample(given.images)
    answers = answer_images(whole, images, 32)
    ladders = {name: _part(answers, names, kept) for name, kept in CASCADES.items()}
    made: dict[str, Any] = {
        "hardware": hardware(),
        "command": sys.argv,
        "classes": names,
        "images": len(answers),
        "rows": _rows(ladders),
        "times": _times(ladders, images, given.rounds),
    }
    write_atomic(given.out, (json.dumps(made, indent=1) + "\n").encode())
    return 0


def _rung(name: str, side: int, names: Sequence[str]) -> Rung:
    """A pretrained network that chooses among `names`, the classes of `CLASSES`."""
    model: EfficientNetLite = pretrained(name)
    whole = model._fc
    model._fc = torch.nn.Linear(whole.in_features, len(CLASSES))
    with torch.no_grad():
        model._fc.weight.copy_(whole.weight[list(CLASSES)])
        model._fc.bias.copy_(whole.bias[list(CLASSES)])
    pre = replace(preprocessing(name), image_size_px=side)
    return Rung(model.eval(), pre, tuple(names), f"{name}@{side}")


def _part(
    answers: PathAnswers, names: Sequence[str], kept: Sequence[int]
) -> tuple[Checkpoint, PathAnswers]:
    """A cascade of some of the rungs, and its answers: those of the same rungs."""
    part = cascade([_rung(*RUNGS[k], names) for k in kept])
    spec = part.net.spec
    assert isinstance(spec, CascadeSpec)
    shape = (*answers.gate_logits[0].shape[:-1], len(kept))
    return part, replace(
        answers,
        spec=spec,
        gate_logits=(np.broadcast_to(cascade_logits(spec), shape),),
        correct_NP=answers.correct_NP[:, kept],
        margins_NP=answers.margins_NP[:, kept],
        expected_NP=answers.expected_NP[:, kept],
    )


def _rows(ladders: Ladders) -> dict[str, dict[str, float]]:
    """Top-1 and cost, as a share of the last rung's, of the rungs and of budgets."""
    whole, answers = ladders["three rungs"]
    widest = answers.table.widest_cost
    outcomes = uniform_outcomes(answers)
    rows = {
        rung.name: {"top1": out.top1, "share": out.madds / widest}
        for rung, (_, out) in zip(whole.net.spec.rungs, outcomes, strict=True)
    }
    for name, (_, answers) in ladders.items():
        curve = fit_curve(answers)
        for budget in BUDGETS:
            point = curve.at(budget)
            rows[f"{name}, budget {budget}"] = {"top1": point.top1, "share": point.share}
    return rows


def _times(ladders: Ladders, images: ImageDataset, rounds: int) -> dict[str, Any]:
    """Milliseconds per image of every row and backend, interleaved."""
    whole, _ = ladders["three rungs"]
    pre = whole.preprocessing
    assert pre is not None
    x = timed_images(images, pre, TIMED)
    runs: list[TimedRow] = []
    timed_share = {}
    for name, (checkpoint, answers) in ladders.items():
        curve = fit_curve(answers)
        for backend in BACKENDS:
            engine = Engine(checkpoint, backend=backend)
            if checkpoint is whole:
                outcomes = uniform_outcomes(answers)
                for rung, (route, _) in zip(whole.net.spec.rungs, outcomes, strict=True):
                    runs.append((f"{rung.name} by {backend}", x, engine.static(route)))
            for budget in BUDGETS:
                row, point = f"{name}, budget {budget}", curve.at(budget)
                runs.append((f"{row} by {backend}", x, partial(engine, budget=point)))
                cost = float(np.mean(engine(x, budget=point).madds))
                timed_share[row] = cost / answers.table.widest_cost
    # the cost of the images that are timed, which differs a little from the mean over all
    return {"timed_share": timed_share, **measured(runs, rounds)}


if __name__ == "__main__":
    sys.exit(main())
