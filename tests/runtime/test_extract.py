import pytest
import torch
from helpers import ZOO_NAMES, lively, micro_spec, noise
from torch import nn

from dynaslim.cost import params
from dynaslim.errors import UsageError
from dynaslim.runtime.extract import extract, extract_segment
from dynaslim.spec import TEACHER_INDEX
from dynaslim.zoo import get_spec


@pytest.fixture(scope="module", params=[*ZOO_NAMES, "micro"])
def net(request):
    spec = micro_spec() if request.param == "micro" else get_spec(request.param, num_classes=7)
    return lively(spec).double()


def _routes(spec):
    some = spec.routing_space[:: max(1, len(spec.routing_space) // 5)]
    return dict.fromkeys((*some, spec.routes[-1], spec.largest))


def test_extracted_routes_are_the_static_ones(net):
    x = noise(net.spec, 3).double()
    for route in _routes(net.spec):
        plain = extract(net, route)
        with torch.no_grad():
            torch.testing.assert_close(plain(x), net(x, route), atol=1e-8, rtol=1e-6)


def test_nothing_of_the_supernet_is_left(net):
    route = net.spec.routes[0]
    plain = extract(net, route)
    for module in plain.modules():
        assert not type(module).__module__.startswith("dynaslim.nn")
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
    own = {tensor.data_ptr() for tensor in net.state_dict().values()}
    for tensor in plain.state_dict().values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().data_ptr() not in own
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    # each BN has become the bias of its convolution: scale and shift counted, one of them stays
    convs = sum(len(t) for t in plain.state_dict().values() if t.ndim == 4)
    assert sum(t.numel() for t in plain.state_dict().values()) == params(net.spec, route) - convs


def test_extracted_segments_are_the_supernets(net):
    """Along several combinations: features, gate logits and class logits of every segment."""
    spec = net.spec
    x = noise(spec, 3).double()
    seen = set()
    for route in _routes(spec):
        indices = spec.segment_indices(route)
        features, before = x, 0
        for number, index in enumerate(indices):
            plain = extract_segment(net, number, before, index)
            with torch.no_grad():
                ours = plain(features)
                theirs = net.segment(number, features, index)
            if number < spec.num_segments - 1:
                torch.testing.assert_close(ours[0], theirs.features, atol=1e-8, rtol=1e-6)
                torch.testing.assert_close(ours[1], theirs.gate_logits, atol=1e-8, rtol=1e-6)
            else:
                torch.testing.assert_close(ours, theirs.features, atol=1e-8, rtol=1e-6)
            features, before = theirs.features, index
            seen.add((number, index))
    assert len(seen) >= spec.num_segments


def test_mistakes():
    net = lively(micro_spec())
    with pytest.raises(UsageError, match="segment 3: micro has 3"):
        extract_segment(net, 3, 0, 0)
    with pytest.raises(UsageError, match="width index 9"):
        extract_segment(net, 1, 0, 9)
    with pytest.raises(UsageError, match="route"):
        extract(net, [1, 2, 3])
    assert extract_segment(net, 0, 0, TEACHER_INDEX)
    with pytest.raises(RuntimeError, match=r"call net\.eval"):
        extract(net.train(), net.spec.routes[0])
