"""The curve of the `imagenet` cascade: python benchmarks/imagenet.py IMAGENETTE --out FILE.

Imagenette's test split has photographs of ten of the thousand classes; the networks were not
trained on these photographs. Answers are among all thousand classes. Writes the curve that ships
with the package, and each network's top-1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dynaslim._files import write_atomic
from dynaslim.data.images import ImageDataset
from dynaslim.data.source import open_source
from dynaslim.data.transforms import normalise
from dynaslim.imagenet import CURVE, make_cascade
from dynaslim.progress import progress
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import answer_paths, uniform_outcomes
from dynaslim.runtime.signals import SignalTable

CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
"""ImageNet's class numbers of Imagenette's classes, in Imagenette's order."""
BATCH = 32


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, help="so many, a fixed random choice")
    parser.add_argument("--out", type=Path, default=CURVE)
    given = parser.parse_args(argv)
    made = make_cascade()
    assert made.preprocessing is not None
    images = ImageDataset.of(open_source(given.data, "test"), made.preprocessing)
    if given.images is not None:
        images = images.sample(given.images)
    numbers = torch.tensor(CLASSES)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        assert made.preprocessing is not None
        for pixels, labels in images.batches(BATCH):
            yield normalise(pixels, made.preprocessing), numbers[labels]

    signals = SignalTable(len(made.net.spec.rungs))
    with progress("running the cascade", len(images)) as bar:
        answers = answer_paths(made.net, batches(), on_batch=bar.advance, on_answers=signals.add)
    rungs = zip(made.net.spec.rungs, uniform_outcomes(answers), strict=True)
    described = {
        "calibrated_on": "Imagenette at 128 px, test split: photographs of 10 of the 1,000 classes",
        "images": len(images),
        "rungs": [
            {
                "name": rung.name,
                "image_size_px": rung.image_size_px,
                "madds": out.madds,
                "top1": out.top1,
            }
            for rung, (_, out) in rungs
        ],
        "risk_coverage": signals.rows(),
        "curve": fit_curve(answers).to_dict(),
    }
    write_atomic(given.out, (json.dumps(described, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
