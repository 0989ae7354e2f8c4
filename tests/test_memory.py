"""Memory of large tensors is kept for the next ones."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from dynaslim._memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_large_tensors_take_memory_that_is_there():
    run = [sys.executable, "-c", FAULTS]
    before, after = map(int, subprocess.run(run, capture_output=True, check=True).stdout.split())
    assert after < before / 10
