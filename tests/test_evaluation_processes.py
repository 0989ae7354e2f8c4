"""Two processes share the batches and get exactly what one gets."""

import dataclasses

import evaluation_workers
import pytest
import torch
from helpers import free_port, spawn_two
from torch import Tensor


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes measured: alone, together, the batches it ran, the errors."""
    folder = tmp_path_factory.mktemp("processes")
    spawn_two(evaluation_workers.worker, free_port(), str(folder), seconds=300)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", evaluation_workers.cases())
def test_exactly_what_one_process_measures(results, case):
    expected = results[0][0][case]
    assert len(expected.predictions.unique()) > 1, "the test needs images that differ"
    for alone, together, _, _ in results:
        for field in dataclasses.fields(expected):
            a, b = (getattr(one[case], field.name) for one in (alone, together))
            if isinstance(a, Tensor):
                assert a.dtype == b.dtype, field.name
                assert torch.equal(a, b), field.name
            else:
                assert a == b, field.name
        assert together[case].to_dict() == expected.to_dict()


def test_work_is_shared(results):
    """45, 10, 35, 35, 45 and 45 images in batches of 16, taken in turn."""
    first, second = (done for _, _, done, _ in results)
    assert first == [16, 13, 10, 16, 3, 16, 3, 16, 13, 16, 13]
    assert second == [16, 16, 16, 16, 16]


def test_all_hear_of_what_one_met(results):
    first, second = (raised for _, _, _, raised in results)
    name, message = first["not finite"]
    assert name == "DynaslimError"
    assert "route 4-4-6: the network's output is not finite" in message
    assert second["not finite"] == first["not finite"]
    assert second["disk"] == ("RuntimeError", "the disk is gone")
    assert first["disk"] == ("DynaslimError", "process 1: RuntimeError: the disk is gone")
    nothing = ("DataError", "noise: none of its 3 images can be read")
    assert first["nothing"] == second["nothing"] == nothing
