"""CUDA graphs: on a GPU the answers of every row's own network; without one a one-line error."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_rows_close, at_once, lively_net, noise, row_by_row

from dynaslim import Engine
from dynaslim.bench.models import open_engine
from dynaslim.checkpoint import Checkpoint, save
from dynaslim.errors import UsageError
from dynaslim.runtime.backends import default_device

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def _engine():
    return Engine(copy.deepcopy(lively_net("micro")).to("cuda"), backend="cudagraph")


def _assert_routed(x, out):
    net = lively_net("micro")
    routes = [net.spec.route_at(row) for row in np.asarray(out.routes).tolist()]
    # a GPU's convolutions keep ten bits of a float32's fraction (TF32)
    assert_rows_close(out.logits, row_by_row(net, x, routes), 0.01)


@gpu
@pytest.mark.parametrize("rows", [1, 3, 8, 33, 130])
def test_rows_are_those_of_their_own_network(rows):
    engine = _engine()
    x = noise(engine.spec, rows)
    for _ in range(2):  # recorded, then replayed
        out = engine(x)
    assert engine.backend == "cudagraph"
    _assert_routed(x, out)


@gpu
def test_callers_side_by_side():
    engine = _engine()
    batches = [noise(engine.spec, rows) for rows in (5, 9, 17, 32)]
    outs = at_once(len(batches), lambda n: [engine(batches[n]) for _ in range(5)][-1])
    for x, out in zip(batches, outs, strict=True):
        _assert_routed(x, out)


@gpu
def test_checkpoints_and_zoo_entries_go_to_the_gpu(tmp_path):
    save(tmp_path / "net.safetensors", Checkpoint(lively_net("micro")))
    engine = Engine.from_checkpoint(tmp_path / "net.safetensors", backend="cudagraph")
    assert engine.source.device.type == "cuda"
    engine, side = open_engine("ds_resnet8_cifar", "cudagraph", None, "fp32", 4)
    assert engine(np.zeros((4, 3, side, side), np.float32)).logits.shape == (4, 10)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_is_one_line():
    assert default_device("cudagraph") == "cpu"
    with pytest.raises(UsageError, match="torch sees none here"):
        open_engine("ds_resnet8_cifar", "cudagraph", None, "fp32", 4)
    with pytest.raises(UsageError, match="torch sees none here"):
        Engine(lively_net("micro"), backend="cudagraph")
