"""Seeds of what is random: functions of (seed, step), so a resumed run repeats a straight one."""

from __future__ import annotations

import random


def step_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed for one purpose in one step; different purposes do not share a stream."""
    # random.Random hashes strings with SHA-512: stable between runs and platforms
    return random.Random(f"{seed}/{step}/{purpose}").getrandbits(63)
