"""Makes a checkpoint in the format of the released DS-Net code from the fixture's parts of one."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

FIXTURE = Path(__file__).parent / "fixtures" / "official.npz"


def released_state(arrays):
    """A full-size released state dict, with random values for parts that the fixture lacks."""
    state = {}
    torch.manual_seed(0)
    for name, shape in json.loads(arrays["shapes"].tobytes()).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.ones(shape, dtype=torch.int64)
            continue
        full = torch.rand(shape) + 0.5 if name.endswith("running_var") else torch.randn(shape) / 16
        if f"weight/{name}" in arrays:
            kept = torch.from_numpy(arrays[f"weight/{name}"]).view(torch.bfloat16).float()
            full[tuple(slice(size) for size in kept.shape)] = kept
        state[name] = full
    return state


def write_released(path):
    """Write the file; returns the fixture's arrays, including the released network's outputs."""
    with np.load(FIXTURE) as file:
        arrays = dict(file)
    state = {f"module.{name}": value for name, value in released_state(arrays).items()}
    ema = dict(state)
    ema["module.classifier.bias"] = ema["module.classifier.bias"] + 0.25
    content = {
        "epoch": 1,
        "arch": "slimmable_mbnet_v1_bn_uniform",
        "state_dict": state,
        "state_dict_ema": ema,
        "args": argparse.Namespace(num_choice=14),
        "metric": 0.5,
    }
    torch.save(content, path)
    return arrays
