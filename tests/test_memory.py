"""Memory is used again: that of large tensors, and that of programs."""

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


PROGRAMS = """
import numpy
import dynaslim
from dynaslim._memory import process_bytes

net = dynaslim.create_model("ds_mbnet").eval()
engine = dynaslim.Engine(net, backend="onnxruntime", cache_dir=None)
x = numpy.zeros((1, 3, 768, 768), numpy.float32)
for route in net.spec.routes[:4]:
    before = process_bytes("resident")
    run = engine.static(route)
    run(x)
    run(x)
    print(process_bytes("resident") - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_large_tensors_take_memory_that_is_there():
    run = [sys.executable, "-c", STEPS]
    printed = subprocess.run(run, capture_output=True, check=True, text=True).stdout.split()
    before, after, short, limit, above, trimmed = map(int, printed)
    assert after < before / 10
    assert short == 0  # nothing changes where memory is short
    assert above > limit > trimmed


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_programs_on_all_cores_share_memory():
    pytest.importorskip("onnxruntime")
    run = [sys.executable, "-c", PROGRAMS]
    printed = subprocess.run(run, capture_output=True, check=True, text=True).stdout
    first, *later = map(int, printed.split())
    assert max(later) < first / 2  # their weights alone
