"""Memory of large tensors is kept for the next ones."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from dynaslim import _memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
available = _memory.available_bytes()
_memory.available_bytes = lambda: 1 << 28
short = _memory.FreedMemory()
short.after_step()
_memory.available_bytes = lambda: available
memory = _memory.FreedMemory()
memory.after_step()
faults()
print(before, faults(), short.limit, memory.limit)
big = torch.ones(memory.limit // 4 + (1 << 26))
del big
above = _memory.process_bytes("resident")
memory.after_step()
print(above, _memory.process_bytes("resident"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_large_tensors_take_memory_that_is_there():
    run = [sys.executable, "-c", STEPS]
    printed = subprocess.run(run, capture_output=True, check=True, text=True).stdout.split()
    before, after, short, limit, above, trimmed = map(int, printed)
    assert after < before / 10
    assert short == 0  # nothing changes where memory is short
    assert above > limit > trimmed
