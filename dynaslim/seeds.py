"""Random seeds as functions of (seed, step), so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import random


def step_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed for one purpose in one step; different purposes do not share a stream."""
    # random.Random hashes strings with SHA-512, which is stable across runs and platforms
    return random.Random(f"{seed}/{step}/{purpose}").getrandbits(63)
