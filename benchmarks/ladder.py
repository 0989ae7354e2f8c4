"""A cascade of pretrained networks, on photographs: python benchmarks/ladder.py IMAGENETTE.

EfficientNet-Lite0 at 128 and 224 px and -Lite2 at 260 px choose among the classes of the images;
of their classifiers, trained on a thousand classes, only those rows are kept. Budgets are chosen on
one half of the test split and evaluated on the other, both ways. All are timed in one interleaved
run. Needs `dynaslim[imagenet]`. Writes results/ladder.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from imagenet import CLASSES

from dynaslim._files import write_atomic
from dynaslim.bench.timing import hardware, interleave, ratio, summary
from dynaslim.checkpoint import Checkpoint
from dynaslim.conversion.efficientnet_lite import EfficientNetLite, preprocessing, pretrained
from dynaslim.data.images import ImageDataset
from dynaslim.data.source import open_source
from dynaslim.data.transforms import normalise
from dynaslim.runtime.budget_search import fit_curve, split_rows
from dynaslim.runtime.calibrate_budget import PathAnswers, answer_images, simulate, uniform_outcomes
from dynaslim.runtime.cascade import Rung, cascade
from dynaslim.runtime.engine import Engine

HERE: Final = Path(__file__).parent
RUNGS: Final = (
    ("efficientnet_lite0", 128),
    ("efficientnet_lite0", 224),
    ("efficientnet_lite2", 260),
)
"""All three make one cascade, the last two another."""
SHARES: Final = (0.3, 0.4, 0.5, 0.55, 0.6, 0.7)
BATCHES: Final = (1, 32)
TIMED: Final = 64
"""Images that are timed, as many of each class as there are in the split."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, help="so many, a fixed random choice")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ladder.json")
    given = parser.parse_args(argv)
    names = open_source(given.data, "test").class_names
    made: dict[str, Any] = {"hardware": hardware(), "command": sys.argv, "classes": names}
    whole = cascade([_rung(*rung, names) for rung in RUNGS])
    assert whole.preprocessing is not None
    images = ImageDataset.of(open_source(given.data, "test"), whole.preprocessing)
    if given.images is not None:
        images = images.sample(given.images)
    answers = answer_images(whole, images, 32)
    made["images"] = len(answers)
    made["three rungs"] = _measured(whole, answers, images, given)
    # the answers of the last two are the same without the first
    two = cascade([_rung(*rung, names) for rung in RUNGS[1:]])
    answers = replace(
        answers,
        spec=two.net.spec,
        gate_logits=tuple(logits[..., 1:] for logits in answers.gate_logits),
        correct_NP=answers.correct_NP[:, 1:],
        margins_NP=answers.margins_NP[:, 1:],
    )
    made["two rungs"] = _measured(two, answers, images, given)
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


def _measured(
    checkpoint: Checkpoint, answers: PathAnswers, images: ImageDataset, given: Any
) -> dict[str, Any]:
    widest = answers.table.widest_cost
    halves = split_rows(len(answers))
    rows = {
        f"rung {rung.name}": {"top1": out.top1, "share": out.madds / widest}
        for rung, (_, out) in zip(checkpoint.net.spec.rungs, uniform_outcomes(answers), strict=True)
    }
    for share in SHARES:
        found = []
        for chosen_on, judged_on in (halves, halves[::-1]):
            point = fit_curve(_of(answers, chosen_on), split=False).at(share)
            found.append(simulate(answers, point.shift, point.escalations, rows=judged_on))
        top1 = float(np.mean([out.top1 for out in found]))
        cost = float(np.mean([out.madds for out in found])) / widest
        rows[f"budget {share:g}"] = {"top1": top1, "share": cost}
    return {"rows": rows, "times": _times(checkpoint, answers, images, given)}


def _of(answers: PathAnswers, rows: Any) -> PathAnswers:
    """The answers for some of the images."""
    return replace(
        answers,
        gate_logits=tuple(logits[:, rows] for logits in answers.gate_logits),
        correct_NP=answers.correct_NP[rows],
        margins_NP=answers.margins_NP[rows],
    )


def _times(
    checkpoint: Checkpoint, answers: PathAnswers, images: ImageDataset, given: Any
) -> dict[str, Any]:
    """Milliseconds per image of each rung and budget, interleaved; budgets are of all images."""
    pre = checkpoint.preprocessing
    assert pre is not None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:TIMED]
    x = np.concatenate([normalise(pixels, pre).numpy() for pixels, _ in images.batches(32, order)])
    curve = fit_curve(answers)
    engine = Engine(checkpoint, backend=given.backend)
    runs: dict[str, Callable[[np.ndarray], Any]] = {}
    for rung, (route, _) in zip(checkpoint.net.spec.rungs, uniform_outcomes(answers), strict=True):
        runs[f"rung {rung.name}"] = engine.static(route)
    for share in SHARES:
        point = curve.at(share)
        runs[f"budget {share:g}"] = lambda batch, point=point: engine(batch, budget=point)
    found: dict[str, Any] = {"backend": engine.backend, "rounds": given.rounds}
    last = f"rung {checkpoint.net.spec.rungs[-1].name}"
    for size in BATCHES:
        batches = np.split(x, len(x) // size)

        def arm(run: Callable[[np.ndarray], Any], batches: list[np.ndarray]) -> Callable[[], Any]:
            return lambda: [run(batch) for batch in batches]

        times = interleave({name: arm(run, batches) for name, run in runs.items()}, given.rounds)
        found[f"batch {size}"] = {
            name: {
                "ms": summary([value / len(x) for value in values]),
                "share_of_last": ratio(values, times[last]),
            }
            for name, values in times.items()
        }
    # what the timed images cost, which differs a little from the mean over all
    found["timed_share"] = {
        name: float(np.mean(run(x).madds)) / answers.table.widest_cost
        for name, run in runs.items()
        if name.startswith("budget")
    }
    engine.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
