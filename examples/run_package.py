"""Run a package without torch or dynaslim; prints row, width indices behind the gates, and class.

    python examples/run_package.py PACKAGE IMAGES

IMAGES is a picture, a folder of them, or an .npy file of normalised float32 images (N, C, H, W).
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime


def read(images: str, wanted: dict) -> np.ndarray:
    if images.endswith(".npy"):
        return np.load(images)
    from PIL import Image, ImageOps

    files = sorted(Path(images).iterdir()) if Path(images).is_dir() else [images]
    mode, size = "RGB" if len(wanted["mean"]) == 3 else "L", (wanted["image_size_px"],) * 2
    how = {"method": Image.Resampling.BICUBIC, "bleed": (1 - wanted["crop_fraction"]) / 2}
    rows = [ImageOps.exif_transpose(Image.open(file)).convert(mode) for file in files]
    pixels = np.stack([np.atleast_3d(ImageOps.fit(row, size, **how)) for row in rows])
    return np.float32((pixels / 255 - wanted["mean"]) / wanted["std"]).transpose(0, 3, 1, 2)


def main(folder: Path, x: np.ndarray) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    gates = [stage["gate"]["choices"] for stage in manifest["spec"]["stages"] if stage["gate"]]
    session = cache(lambda form: onnxruntime.InferenceSession(folder / manifest["forms"][form]))
    choices = np.zeros((len(x), len(gates)), int)
    logits = np.empty((len(x), manifest["spec"]["num_classes"]), np.float32)
    # a bucket: its rows, their last choice, their features, the logits of their next gate
    buckets = [(np.arange(len(x)), 0, *session("segment0_0_0").run(None, {"x": x}))]
    for number, options in enumerate(gates, start=1):
        arriving = []
        for members, before, features, gate_logits in buckets:
            picked = np.array(options)[gate_logits.argmax(1)]
            choices[members, number - 1] = picked
            for choice in np.unique(picked):
                among, form = picked == choice, f"segment{number}_{before}_{choice}"
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
        sys.exit("usage: run_package.py PACKAGE IMAGES")
    if not (found := Path(sys.argv[1], "manifest.json")).is_file():
        sys.exit(f"{sys.argv[1]}: is no exported package, it has no manifest.json")
    main(found.parent, read(sys.argv[2], json.loads(found.read_text())["preprocessing"]))
