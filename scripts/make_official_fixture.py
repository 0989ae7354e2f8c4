"""Cut the test fixture out of a checkpoint in the released format and its reference outputs.

    python scripts/make_official_fixture.py CHECKPOINT OUTPUTS.npz OUT.npz

The fixture keeps the channels that the first four widths use, which is all that the released
routing space and its dynamic mode touch. The checkpoint's weights must be exact in bfloat16,
which halves the file; tests rebuild a file of the full released shape around them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from dynaslim.interop.official import read_official

WIDTHS = 4
KEPT = {24: 16, 88: 32, 168: 48, 264: 96, 640: 320, 1152: 832}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()

    state = read_official(arguments.checkpoint)
    outputs = np.load(arguments.outputs)
    arrays = {}
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        kept = value[tuple(slice(KEPT.get(size, size)) for size in value.shape)]
        exact = kept.bfloat16()
        if not torch.equal(exact.float(), kept):
            raise SystemExit(f"{name} is not exact in bfloat16")
        if name.endswith(("running_mean", "running_var")):
            slot = int(name.split("aux_bn.")[1].split(".")[0])
            if slot >= WIDTHS or (slot > 0 and value.shape[0] in KEPT and value.shape[0] < 640):
                continue  # statistics of widths that the fixture leaves out
        arrays[f"weight/{name}"] = exact.contiguous().view(torch.int16).numpy()
    shapes = {name: list(value.shape) for name, value in state.items()}
    arrays["shapes"] = np.frombuffer(json.dumps(shapes).encode(), dtype=np.uint8)
    arrays["x"] = outputs["x"]
    arrays["uniform"] = outputs["uniform"][:WIDTHS]
    arrays["route"] = outputs["route"]
    arrays["dynamic"] = outputs["dynamic"]
    np.savez_compressed(arguments.out, **arrays)


if __name__ == "__main__":
    main()
