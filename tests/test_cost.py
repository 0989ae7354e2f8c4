import dataclasses
import itertools
import json
import random

import pytest
import torch
from helpers import SHARED, ZOO_NAMES, altered, lively_net, micro_spec, needs_shared
from torch.utils.flop_counter import FlopCounterMode

from dynaslim.cost import CostTable, madds, params, program_params
from dynaslim.cost_file import read_cost_table, write_cost_table
from dynaslim.errors import UsageError
from dynaslim.nn import SlimNet
from dynaslim.runtime.extract import extract_segment
from dynaslim.runtime.variants import segment_variants
from dynaslim.spec import NetSpec
from dynaslim.zoo import ZOO, get_spec

# counted by the released code at 224 px, in millions
RELEASED_MADDS = [
    132.89, 152.92, 175.15, 199.59, 226.24, 255.10, 286.17,
    319.44, 354.92, 392.61, 432.51, 474.61, 518.93, 565.45,
]  # fmt: skip


def test_ds_mbnet_costs_what_the_release_counts():
    spec = get_spec("ds_mbnet")
    ours = [madds(spec, route, 224) / 1e6 for route in spec.routes]
    assert ours == pytest.approx(RELEASED_MADDS, abs=0.01)
    assert madds(spec, spec.largest, 224) / 1e6 == pytest.approx(819.88, abs=0.01)
    assert params(spec) / 1e6 == pytest.approx(7.68, abs=0.005)


@needs_shared
def test_reference_file_agrees_with_the_numbers_above():
    import numpy as np

    with np.load(SHARED / "reference" / "official_outputs.npz") as outputs:
        assert list(outputs["madds_224"]) == pytest.approx(RELEASED_MADDS, abs=0.006)


def _routes(spec):
    combinations = random.Random(0).sample(spec.routing_space, min(3, len(spec.routing_space)))
    return dict.fromkeys((*spec.routes, *combinations, spec.largest))


@pytest.mark.parametrize("image_size", [32, 33, 224, (48, 65)])
@pytest.mark.parametrize("name", ZOO_NAMES)
def test_madds_equal_torchs_own_count(name, image_size):
    spec = ZOO[name]
    # on meta tensors nothing is computed, but every operation is counted
    net = SlimNet(spec, device="meta").eval()
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    x = torch.empty(1, 3, height, width, device="meta")
    for route in _routes(spec):
        with FlopCounterMode(display=False) as counter:
            net(x, route)
        assert madds(spec, route, image_size, pooling=False) * 2 == counter.get_total_flops()


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_gated_forward_costs_the_slimming_heads_too(name):
    """At one choice per gate the gated forward computes that route and the heads, no more."""
    spec = ZOO[name].with_choices((1,))
    net = SlimNet(spec, device="meta").eval()
    x = torch.empty(1, 3, 64, 64, device="meta")
    with FlopCounterMode(display=False) as counter:
        net.forward_gated(x, lambda logits, _: torch.ones_like(logits))
    expected = madds(spec, spec.routes[1], 64, pooling=False, slimming_heads=True)
    assert expected * 2 == counter.get_total_flops()
    assert expected > madds(spec, spec.routes[1], 64, pooling=False)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_params_equal_the_modules(name):
    spec = ZOO[name]
    net = SlimNet(spec, device="meta")
    assert params(spec) == sum(p.numel() for p in net.parameters())
    costs = [params(spec, route) for route in spec.routes]
    assert costs == sorted(set(costs))
    assert costs[-1] <= params(spec, spec.largest) < params(spec)


def test_params_of_a_route_are_those_its_forward_reads():
    """Independent of the walk: count the weight elements that receive a gradient."""
    spec = micro_spec(reduction=0.25)  # few enough features that no sigmoid saturates
    net = SlimNet(spec)
    for p in net.parameters():
        torch.nn.init.uniform_(p, 0.1, 1.0)
    for route in (*spec.routes, spec.largest):
        net.zero_grad()
        net(torch.rand(8, 3, 16, 16), route).square().sum().backward()
        touched = sum(int((p.grad != 0).sum()) for p in net.parameters() if p.grad is not None)
        assert touched == params(spec, route)


def test_params_of_all_programs_are_those_of_the_modules():
    """But for the scales of normalisation, which are folded into the weights before them."""
    net = lively_net("ds_mbnet_tiny")
    programs = [extract_segment(net, *variant) for variant in segment_variants(net.spec)]
    held = sum(p.numel() for module in programs for p in module.state_dict().values())
    assert 0.95 * program_params(net.spec) < held < program_params(net.spec)


@pytest.mark.parametrize("spec", [micro_spec(), get_spec("ds_mobilenet_v2")], ids=lambda s: s.name)
def test_table_holds_every_combination(spec):
    table = CostTable.from_madds(spec, 64)
    options = [range(len(gate.choices)) for gate in spec.gates]
    for picks in itertools.product(*options):
        indices = [g.choices[p] for g, p in zip(spec.gates, picks, strict=True)]
        exact = madds(spec, spec.route_at(indices), 64, slimming_heads=True)
        assert table.route_cost(picks) == exact
        one_hot = [
            torch.nn.functional.one_hot(torch.tensor([p]), len(o)).double()
            for p, o in zip(picks, options, strict=True)
        ]
        assert table.expected(one_hot).item() == exact


def test_expected_cost_has_the_gradient_of_switching():
    spec = micro_spec()
    table = CostTable.from_madds(spec, 16)
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    table.expected([first, second]).sum().backward()
    by_first = [table.route_cost((p, 1)) for p in (0, 1)]
    assert (first.grad[0, 1] - first.grad[0, 0]).item() == by_first[1] - by_first[0]
    by_second = [table.route_cost((0, p)) for p in (0, 1, 2)]
    assert (second.grad[0, 2] - second.grad[0, 0]).item() == by_second[2] - by_second[0]


# -- tables in files -------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["madds", "ms"])
@pytest.mark.parametrize("spec", [micro_spec(), get_spec("ds_mbnet")], ids=lambda s: s.name)
def test_a_table_file_is_read_back(spec, unit, tmp_path):
    counted = CostTable.from_madds(spec, 64)
    table = dataclasses.replace(counted, unit=unit)
    assert CostTable.from_dict(table.to_dict(), spec) == table
    note = {"hardware": "2 cores", "batch_size": 8}
    path = write_cost_table(tmp_path / "sub" / "table.json", table, spec, (64, 96), note=note)
    assert read_cost_table(path, spec) == table
    assert read_cost_table(path, spec, image_size=(64, 96)) == table
    assert json.loads(path.read_text())["note"] == note
    with pytest.raises(UsageError, match="is for images of 64x96 px, not 64x64"):
        read_cost_table(path, spec, image_size=64)


NOT_A_COST = "must be a finite number of at least 0"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (altered("format", value="else"), "not a cost table"),
        (altered("version", value=2), "version 2, this dynaslim reads 1"),
        (altered("model", value="ds_mbnet"), "is for model 'ds_mbnet', not 'micro'"),
        (altered("choices", value=[[0, 1], [0, 1, 2]]), "is for gate choices"),
        (altered("image_size_px", value=32), r"image_size_px 32: expected array"),
        (altered("image_size_px", value=[32, 0]), r"expected \[height, width\]"),
        (altered("note", value="fast"), "note 'fast': expected object"),
        (altered("more", value=1), "unknown key 'more'"),
        (lambda data: data.pop("model"), "has no 'model'"),
        (lambda data: data.pop("segments"), "has no 'segments'"),
        (altered("unit", value="s"), "unit.*'s'"),
        (altered("segments", value=None), "segments None: expected array"),
        (lambda data: data["segments"].pop(), "segments: micro has 3"),
        (altered("segments", 0, value=3.0), r"segments\[0\] 3.0: expected array"),
        (altered("segments", 1, value=[[1.0]]), "segment 1: expected 1 rows of 2 costs"),
        (altered("segments", 2, 1, value=[1.0, 2.0]), "segment 2: expected 2 rows of 3 costs"),
        (altered("segments", 2, 1, 2, value=-1.0), f"segment 2: cost -1.0 {NOT_A_COST}"),
        (altered("segments", 2, 1, 2, value=float("nan")), f"cost nan {NOT_A_COST}"),
        (altered("segments", 2, 1, 2, value=float("inf")), f"cost inf {NOT_A_COST}"),
        (altered("segments", 2, 1, 2, value="3"), r"segments\[2\]\[1\]\[2\] '3': expected float"),
        (altered("segments", 2, 1, 2, value=True), "True: expected float"),
        (altered("segments", 2, 1, 2, value=None), "None: expected float"),
    ],
)
def test_a_table_file_that_does_not_fit_is_refused(change, complaint, tmp_path):
    spec = micro_spec()
    table = CostTable.from_madds(spec, 32)
    path = write_cost_table(tmp_path / "table.json", table, spec, 32)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=complaint) as caught:
        read_cost_table(path, spec)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_no_table_is_refused(tmp_path):
    spec = micro_spec()
    path = tmp_path / "table.json"
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_cost_table(path, spec)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_cost_table(tmp_path, spec)
    for content in (b"\xff\xfe", b"{", b""):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"table\.json: not a cost table, not JSON"):
            read_cost_table(path, spec)
    path.write_text("[1]")
    with pytest.raises(UsageError, match=r"table\.json: not a cost table"):
        read_cost_table(path, spec)


def test_what_could_not_be_read_is_not_written(tmp_path):
    spec, path = micro_spec(), tmp_path / "table.json"
    table = CostTable.from_madds(spec, 32)
    other = NetSpec("one-gate", spec.stages[:2], num_classes=5)
    with pytest.raises(UsageError, match="not written, segments: one-gate has 2"):
        write_cost_table(path, table, other, 32)
    for note in ({"when": object()}, {"ms": float("nan")}):
        with pytest.raises(UsageError, match=r"table\.json: not written"):
            write_cost_table(path, table, spec, 32, note=note)
    with pytest.raises(UsageError, match="image size 1x1"):
        write_cost_table(path, table, spec, 1)
    assert not path.exists()
