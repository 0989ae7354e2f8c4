"""Exported graphs give what the modules give."""

import pytest
import torch
from helpers import ZOO_NAMES, assert_rows_close, lively, lively_net, micro_spec

from dynaslim.errors import UsageError
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.onnx_graph import OPSET, to_onnx
from dynaslim.runtime.variants import RouteVariant, SegmentVariant, segment_variants
from dynaslim.zoo import ZOO

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")


def _session(content):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # as written: whether the optimiser is right is not tested here
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _check(net, variant, module, session, x):
    with torch.inference_mode():
        expected = module(x)
    expected = (expected,) if isinstance(expected, torch.Tensor) else expected
    made = session.run(None, {"x": x.numpy()})
    assert len(made) == len(expected)
    for one, other in zip(made, expected, strict=True):
        assert one.shape == tuple(other.shape)
        assert other.abs().max() > 0
    assert_rows_close(made[0].reshape(len(x), -1), expected[0].flatten(1), 1e-5)
    if len(made) == 2:  # small differences of large terms, in lively networks
        with torch.inference_mode():
            _, hidden = net.segment_hidden(variant.segment, x, variant.choice)
        head = net.get_submodule(net.graph.gates[variant.segment]).slimming_weight
        terms = hidden @ head.detach().abs().T
        assert ((torch.from_numpy(made[1]) - expected[1]).abs() <= 2e-6 * terms).all()
        assert (terms > 0).all()


@pytest.mark.parametrize("name", ["micro", *ZOO_NAMES])
def test_every_variant_as_its_module(name):
    net = lively_net(name, most_blocks=2)
    spec, source = net.spec, NetworkSource(net)
    side = max(32, spec.total_stride)
    torch.manual_seed(0)
    for variant in segment_variants(spec):
        module, session = source.module(variant), _session(source.onnx(variant))
        # other rows, and images that no stride divides, through the same graph
        for rows, size in ((1, (side, side)), (3, (side + 13, side + 1))):
            shape = variant.shape(spec, size)
            x = torch.randn(rows, *shape.row_in)
            _check(net, variant, module, session, x)
            made = session.run(None, {"x": x.numpy()})
            assert [one.shape[1:] for one in made] == list(shape.output_rows), variant


@pytest.mark.parametrize("name", ["micro", *ZOO_NAMES])
def test_whole_routes_as_the_network(name):
    net = lively_net(name)
    spec, source = net.spec, NetworkSource(net)
    x = torch.randn(2, spec.in_channels, 37, 45)
    for route in (spec.cheapest_choice, spec.largest):
        session = _session(source.onnx(RouteVariant(route)))
        (made,) = session.run(None, {"x": x.numpy()})
        with torch.inference_mode():
            assert_rows_close(made, net(x, route), 5e-5)


def test_the_metadata_of_a_graph():
    source = NetworkSource(lively_net("micro"))
    names = {
        SegmentVariant(0): ["features", "gate_logits"],
        SegmentVariant(1, 0, 2): ["features", "gate_logits"],
        SegmentVariant(2, 2, 1): ["logits"],
        RouteVariant(source.spec.largest): ["logits"],
    }
    for variant, outputs in names.items():
        model = onnx.load_from_string(source.onnx(variant))
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version == OPSET
        assert model.graph.name == variant.name
        assert [value.name for value in model.graph.input] == ["x"]
        assert [value.name for value in model.graph.output] == outputs
        dims = model.graph.input[0].type.tensor_type.shape.dim
        assert [dim.dim_param for dim in dims] == ["batch", "", "height", "width"]
        assert dims[1].dim_value == variant.shape(source.spec, (32, 32)).row_in[0]


def test_what_no_graph_is_made_of():
    source = NetworkSource(lively_net("micro"))
    half = source.module(SegmentVariant(0), torch.bfloat16)
    with pytest.raises(UsageError, match=r"trunk: weights of torch\.bfloat16, not float32"):
        to_onnx(half, torch.zeros(2, 3, 8, 8), ["features"], "trunk", any_size=True)

    class Airy(torch.nn.Module):
        def forward(self, x):
            return torch.ops.aten.special_airy_ai(x)

    with pytest.raises(UsageError, match=r"airy: no ONNX form: .*special_airy_ai"):
        to_onnx(Airy(), torch.zeros(2, 3, 8, 8), ["features"], "airy", any_size=True)


def test_all_activations_and_attentions_of_the_zoo_take_part():
    assert {spec.activation for spec in ZOO.values()} == {"silu", "relu", "relu6"}
    assert {spec.attention for spec in ZOO.values()} == {"sigmoid", "one_plus_tanh"}
    net = lively(micro_spec(activation="relu6", attention="one_plus_tanh"))
    with torch.no_grad():  # far enough from 0 for the bound at 6 to matter
        net.stages[0][0].body.bn.bias += 8
    source = NetworkSource(net)
    x = torch.randn(3, 3, 32, 32) * 10
    for variant in (SegmentVariant(0), RouteVariant(net.spec.largest)):
        _check(net, variant, source.module(variant), _session(source.onnx(variant)), x)
