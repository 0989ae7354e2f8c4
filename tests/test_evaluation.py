import json

import numpy as np
import pytest
import torch
from convertible import trained
from evaluation_workers import PRE, noise_images
from helpers import lively, micro_spec, toy_images

from dynaslim import Engine
from dynaslim.checkpoint import Checkpoint
from dynaslim.conversion import convert
from dynaslim.cost import madds
from dynaslim.data.images import ImageDataset, label_mapping
from dynaslim.data.transforms import normalise
from dynaslim.errors import DataError, UsageError
from dynaslim.evaluation import evaluate
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.calibrate_budget import answer_images
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.zoo import get_spec


def test_numbers_are_those_of_plain_loops():
    """Uneven last batch; top-5 of six classes; every image looked at alone."""
    spec = micro_spec(num_classes=6)
    net = lively(spec, image_size=16)
    images = noise_images(45, 6)
    result = evaluate(net, images, PRE, batch_size=16)
    x = normalise(images.images_NCSS, PRE)
    with torch.inference_mode():
        for metrics, route in zip(result.routes, spec.routes, strict=True):
            logits = net(x, route)
            ranks = (logits > logits.gather(1, images.labels_N[:, None])).sum(1)
            assert metrics.widths == route.widths
            assert metrics.madds == madds(spec, route, 16)
            assert metrics.top1 == pytest.approx((ranks == 0).float().mean().item())
            assert metrics.top5 == pytest.approx((ranks < 5).float().mean().item())
            loss = torch.nn.functional.cross_entropy(logits, images.labels_N).item()
            assert metrics.loss == pytest.approx(loss, rel=1e-5)
        easy = net(x, spec.smallest).argmax(1) == images.labels_N
    routed = Engine(net, backend="eager")(x)
    dynamic = result.dynamic
    right = routed.logits.argmax(1) == images.labels_N
    assert dynamic.top1 == pytest.approx(right.float().mean().item())
    assert dynamic.mean_madds == pytest.approx(routed.madds.mean().item())
    assert torch.equal(result.choices, routed.routes)
    assert torch.equal(result.predictions, routed.logits.argmax(1))
    target = torch.where(easy, 0, 2)
    agree = (routed.routes == target[:, None]).float().mean().item()
    assert dynamic.gate_accuracy == pytest.approx(agree)
    assert 0 < easy.float().mean() < 1, "the test needs easy and hard images"
    assert sum(share.share for share in dynamic.route_shares) == pytest.approx(1)


def test_one_gate_lists_unused_routes_too():
    spec = get_spec("ds_mbnet_tiny")
    net = lively(spec)
    for head in net.slimming_parameters():
        head.data.zero_()  # ties go to the cheapest
    pre = Preprocessing(16)
    shares = evaluate(net, noise_images(8, 10), pre).dynamic.route_shares
    assert [s.widths for s in shares] == [r.widths for r in spec.routing_space]
    assert [s.share for s in shares] == [1.0, 0.0, 0.0, 0.0]


def test_summary_is_plain_json():
    result = evaluate(lively(micro_spec(), image_size=16), noise_images(10), PRE)
    data = json.loads(json.dumps(result.to_dict()))
    assert set(data) == {"images", "skipped", "routes", "dynamic", "per_class"}
    assert set(data["routes"][0]) == {"widths", "madds", "top1", "top5", "loss"}
    assert set(data["dynamic"]) == {
        "top1",
        "top5",
        "loss",
        "mean_madds",
        "route_shares",
        "gate_accuracy",
    }


def test_classes_are_matched_by_name():
    assert label_mapping("x", ["a", "b"], ["a", "b"], 2) == [0, 1]
    assert label_mapping("x", ["a", "b"], None, 2) == [0, 1]
    assert label_mapping("x", ["b", "c", "a"], ["a", "b", "c"], 3) == [1, 2, 0]
    images = ImageDataset(torch.zeros(3, 1, 1, 1), torch.tensor([0, 1, 2]), ("b", "c", "a"))
    again = images.relabelled([1, 2, 0], ("a", "b", "c"))
    assert [again.class_names[c] for c in again.labels_N] == ["b", "c", "a"]
    with pytest.raises(DataError, match="x: class 'd' is none of the network's: a, b"):
        label_mapping("x", ["a", "d"], ["a", "b"], 2)
    with pytest.raises(DataError, match="x: has 1 classes, the network has 2"):
        label_mapping("x", ["a"], ["a", "b"], 2)


def test_easy_is_what_the_cheapest_choice_gets_right():
    """A routing space that leaves out the smallest width: no row can take that one."""
    spec = micro_spec().with_choices((1, 2))
    net = lively(spec, image_size=16)
    images = noise_images(40)
    result = evaluate(net, images, PRE)
    with torch.inference_mode():
        x = normalise(images.images_NCSS, PRE)
        easy = net(x, spec.routes[1]).argmax(1) == images.labels_N
    target = torch.where(easy, 1, 2)
    agree = (result.choices == target[:, None]).float().mean().item()
    assert result.dynamic.gate_accuracy == pytest.approx(agree)


def test_refusals():
    net = lively(micro_spec(), image_size=16)
    with pytest.raises(DataError, match="noise: has 7 classes, the network has 5"):
        evaluate(net, noise_images(8, 7), PRE)
    with pytest.raises(
        DataError, match=r"shape \(3, 16, 16\), the preprocessing says \(3, 32, 32\)"
    ):
        evaluate(net, noise_images(8), Preprocessing(32))
    images = noise_images(8)
    images.labels_N[3] = 5
    with pytest.raises(DataError, match="labels outside 0 to 4"):
        evaluate(net, images, PRE)
    with pytest.raises(DataError, match="noise: no images"):
        evaluate(net, noise_images(8).subset(torch.arange(0)), PRE)
    with pytest.raises(UsageError, match=r"net\.eval"):
        evaluate(net.train(), noise_images(8), PRE)


def test_many_large_images_are_run_by_onnx_runtime_with_the_same_results(monkeypatch):
    net = convert(trained("residual"), torch.zeros(2, 3, 16, 16))
    images, pre = toy_images(40), Preprocessing(16)

    def results():
        answers = answer_images(Checkpoint(net, preprocessing=pre), images, 16)
        return evaluate(net, images, pre, batch_size=16), answers

    expected, paths = results()
    monkeypatch.setattr("dynaslim.nn.net.LARGE", 1)  # bytes from which a feature map is large
    with monkeypatch.context() as patch:
        patch.setattr(NetworkSource, "onnx", _raise_usage_error)  # an operation without ONNX form
        assert torch.equal(results()[0].predictions, expected.predictions)
    monkeypatch.setattr(SlimNet, "run_segment", None)  # by PyTorch no segment can run
    monkeypatch.setattr(NetworkSource, "module", _only_for_export(NetworkSource.module))
    found, answers = results()
    assert torch.equal(found.predictions, expected.predictions)
    assert torch.equal(found.choices, expected.choices)
    for one, other in zip(found.routes, expected.routes, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    np.testing.assert_allclose(answers.margins_NP, paths.margins_NP, atol=1e-5)
    np.testing.assert_array_equal(answers.correct_NP, paths.correct_NP)


def _raise_usage_error(*_):
    raise UsageError("no ONNX form")


def _only_for_export(module):
    """Modules whose forward passes fail with images or features; an export traces two zeros."""

    def made(self, variant, dtype=torch.float32):
        one = module(self, variant, dtype)
        one.register_forward_pre_hook(_refuse_images)
        return one

    return made


def _refuse_images(_, args):
    assert not torch.count_nonzero(args[0]), "run by PyTorch"
