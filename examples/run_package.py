"""Run an exported package with onnxruntime and numpy alone: no torch, no dynaslim.

    python examples/run_package.py PACKAGE IMAGES.npy

IMAGES.npy holds normalised images, float32 (rows, channels, height, width). Prints, for each, its
row, the width index that each gate chose, and its class. `dynaslim.Engine.from_package` does the
same side by side on all cores, with budgets; this shows all there is to a package.
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime


def main(folder: Path, x: np.ndarray) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    gates = [stage["gate"]["choices"] for stage in manifest["spec"]["stages"] if stage["gate"]]

    @cache
    def session(form: str) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(folder / manifest["forms"][form])

    rows = np.arange(len(x))
    choices = np.zeros((len(x), len(gates)), int)
    logits = np.empty((len(x), manifest["spec"]["num_classes"]), np.float32)

    # a bucket: which rows, what they chose last, their features, their next gate's logits
    buckets = [(rows, 0, *session("segment0_0_0").run(None, {"x": x}))]
    for number, options in enumerate(gates, start=1):
        arriving = []
        for members, before, features, gate_logits in buckets:
            picked = np.array(options)[gate_logits.argmax(1)]
            choices[members, number - 1] = picked
            for choice in np.unique(picked):
                among = picked == choice
                form = f"segment{number}_{before}_{choice}"
                made = session(form).run(None, {"x": features[among]})
                arriving.append((members[among], choice, made[0], made[-1]))
        buckets = arriving
    for members, _, result, _ in buckets:
        logits[members] = result

    names = manifest["class_names"] or [str(n) for n in range(logits.shape[1])]
    for row, (route, best) in enumerate(zip(choices, logits.argmax(1), strict=True)):
        print(row, "-".join(map(str, route)), names[best])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: run_package.py PACKAGE IMAGES.npy")
    main(Path(sys.argv[1]), np.load(sys.argv[2]))
