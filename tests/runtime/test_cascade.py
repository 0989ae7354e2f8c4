"""Cascades of whole networks: answers, costs, thresholds, packages, and what is refused."""

import copy
import json
import math
import re
from dataclasses import replace

import httpx
import numpy as np
import onnx
import pytest
import torch
from helpers import (
    assert_rows_close,
    encoded,
    fails,
    for_backends,
    form,
    lively_net,
    run_ok,
    running,
    write_parquet,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dynaslim import Checkpoint, Engine, Preprocessing, Rung, cascade, evaluate, madds, params
from dynaslim._memory import LARGE
from dynaslim.cascade_spec import CascadeSpec
from dynaslim.checkpoint import save
from dynaslim.cost import segment_cost
from dynaslim.data import open_source
from dynaslim.data.images import ImageDataset
from dynaslim.errors import CheckpointError, DynaslimWarning, UsageError
from dynaslim.runtime.calibrate_budget import answer_paths
from dynaslim.runtime.cascade_source import resize_madds
from dynaslim.runtime.escalation import margins
from dynaslim.runtime.export import export_package
from dynaslim.runtime.package import open_package, write_budget
from dynaslim.runtime.program_net import ProgramNet, read_model
from dynaslim.runtime.signals import SignalTable, aurc
from dynaslim.runtime.variants import RouteVariant

NAMES = ("a", "b", "c", "d", "e")
GIVEN = Preprocessing(40, (0.3, 0.4, 0.5), (0.2, 0.3, 0.2), crop_fraction=0.9)


class Small(nn.Module):
    def __init__(self, width=4, classes=5):
        super().__init__()
        self.one = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=3.0)

    def forward(self, x):
        return self.head(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))


def _module(width, seed=0, **changes):
    torch.manual_seed(seed)
    return Small(width, **changes).eval()


def _rungs():
    """A module, a network of the zoo and a larger module: sizes, normalisation, orders differ."""
    half = (0.5, 0.5, 0.5)
    net = copy.deepcopy(lively_net("micro"))
    with torch.no_grad():
        net.classifier.weight.mul_(200)
    zoo = Checkpoint(net, class_names=NAMES, preprocessing=Preprocessing(24))
    return [
        Rung(_module(4), Preprocessing(16, half, half), NAMES[::-1], "small"),
        zoo,
        Rung(_module(24, 1), GIVEN, ("c", "a", "b", "e", "d"), "large"),
    ]


def _by_hand(rungs, x, names):
    """Every rung's logits for the cascade's images, in the order of the cascade's classes."""
    answers = []
    for rung in rungs:
        pre, given = rung.preprocessing, GIVEN
        raw = x * torch.tensor(given.std).view(3, 1, 1) + torch.tensor(given.mean).view(3, 1, 1)
        side = (pre.image_size_px,) * 2
        raw = F.interpolate(raw, side, mode="bilinear", antialias=True)
        own = (raw - torch.tensor(pre.mean).view(3, 1, 1)) / torch.tensor(pre.std).view(3, 1, 1)
        with torch.no_grad():
            if isinstance(rung, Checkpoint):
                logits = rung.net(own, rung.net.spec.widest_choice)
            else:
                logits = rung.model(own)
        answers.append(logits[:, [rung.class_names.index(name) for name in names]])
    return answers


@pytest.fixture(scope="module")
def made():
    return cascade(_rungs())


@for_backends("eager", "onnxruntime", "openvino")
def test_answers_are_those_of_the_rungs_that_rows_went_through(backend, made):
    x = torch.randn(33, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    spec, rungs = made.net.spec, _by_hand(_rungs(), x, made.class_names)
    engine = Engine(made, backend=backend, workers=2, cache_dir=None)
    for number, logits in enumerate(rungs, start=1):
        assert_rows_close(engine.static(str(number))(x), logits)
    tau = float(np.median(margins(rungs[0].numpy())))
    out = engine(x, escalate=tau)
    expected, route = rungs[0].clone(), torch.zeros(33, dtype=torch.int64)
    cost, still = torch.full((33,), float(spec.rungs[0].madds)), torch.ones(33, dtype=torch.bool)
    for number in (1, 2):
        still &= torch.from_numpy(margins(expected.numpy()) < tau)
        expected[still], route[still] = rungs[number][still], number
        cost[still] += spec.rungs[number].madds
    assert set(route.tolist()) == {0, 1, 2}  # some stop at each
    assert_rows_close(out.logits, expected)
    assert out.routes.flatten().tolist() == route.tolist()
    assert out.madds.tolist() == cost.tolist()
    assert torch.equal(out.escalated, route > 0)
    assert [str(engine.route_of(row)) for row in out.routes] == [str(n + 1) for n in route.tolist()]
    alone = torch.cat([engine(x[n : n + 1], escalate=tau).logits for n in range(5)])
    assert_rows_close(alone, expected[:5])
    assert not engine(x).escalated.any()  # without a curve or a margin all stay
    assert_rows_close(engine(x, escalate=1.0, max_route="2").logits[still], rungs[1][still])


def test_images_are_not_copied_by_an_empty_trunk(made):
    engine, compiled = Engine(made, backend="onnxruntime"), []
    program = engine._router.backend.program
    engine._router.backend.program = lambda variant, *shape, **options: (
        compiled.append(variant) or program(variant, *shape, **options)
    )
    x = np.random.default_rng(3).standard_normal((5, 3, 40, 40), np.float32)
    engine(x)
    x[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        engine(x)
    engine.close()
    assert {variant.segment for variant in compiled} == {1}


def test_costs_are_those_of_the_networks_and_of_resizing(made):
    spec, (small, zoo, large) = made.net.spec, _rungs()
    for rung, given, side in ((spec.rungs[0], small, 16), (spec.rungs[2], large, 40)):
        with FlopCounterMode(display=False) as counter:
            given.model(torch.zeros(1, 3, side, side))
        own = rung.madds - resize_madds(3, 40, side)
        assert own == counter.get_total_flops() / 2
        assert rung.params == sum(p.numel() for p in given.model.parameters())
    assert spec.rungs[2].peak == 24 * 20 * 20
    assert spec.rungs[1].madds - resize_madds(3, 40, 24) == madds(
        zoo.net.spec, zoo.net.spec.widest_choice, 24
    )
    with FlopCounterMode(display=False) as counter:
        made.net(torch.zeros(1, 3, 40, 40), "1")
    assert counter.get_total_flops() / 2 == spec.rungs[0].madds == madds(spec, "1", 40)
    assert params(spec) == sum(rung.params for rung in spec.rungs)
    assert CascadeSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


class Brightness(nn.Module):
    """Its class is the mean brightness of some pixels; fewer of them, more mistakes."""

    def __init__(self, pixels, channels):
        super().__init__()
        self.pixels = pixels
        self.conv = nn.Conv2d(3, channels, 1)
        nn.init.constant_(self.conv.weight, 1 / 3)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        bright = self.conv(x[:, :, : self.pixels, : self.pixels]).mean((1, 2, 3))
        return -40 * (bright[:, None] - torch.arange(5) / 5 - 0.1).square()


def _bright(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    x = (labels / 5 + 0.1)[:, None, None, None]
    return x + 0.5 * torch.randn(count, 3, 16, 16, generator=generator), labels


PLAIN = Preprocessing(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _bright_cascade():
    sizes = ((3, 1), (5, 6), (16, 2))
    return cascade(
        [Rung(Brightness(*size).eval(), PLAIN, NAMES, f"of {size[0]} px") for size in sizes]
    )


def test_thresholds_of_all_rungs_are_found_together():
    held_out, others = _bright(2000, 0), _bright(2000, 1)
    engine = Engine(_bright_cascade(), backend="eager", workers=1)
    curve = engine.calibrate([held_out])
    first, second, last = (
        (engine.static(r)(others[0]).argmax(1) == others[1]).float().mean() for r in ("1", "2", "3")
    )
    assert first + 0.05 < second < last - 0.02
    assert any(len(point.escalations) == 2 for point in curve.points)  # via the second rung
    point = curve.at("drop=0.5")
    out = engine(others[0])  # a cascade's default
    again = engine(others[0], budget="drop=0.5")
    assert torch.equal(out.logits, again.logits)
    assert out.escalated.any()
    assert set(out.routes.flatten().tolist()) == {1, 2}  # this budget begins at the second rung
    right = (out.logits.argmax(1) == others[1]).float().mean()
    assert right > last - 0.02
    assert out.madds.mean() < 0.8 * curve.widest_madds
    assert out.madds.mean() == pytest.approx(point.madds, rel=0.1)
    assert engine(others[0], escalate=None).routes.max() == 0
    tight = engine(others[0], budget=0.3, hold=True)
    assert tight.madds.mean() <= 0.3 * curve.widest_madds
    costs = {point.madds for point in curve.gate_points}
    assert costs == {float(rung.madds) for rung in engine.spec.rungs}


def test_a_cascade_is_evaluated_by_its_budget():
    checkpoint = _bright_cascade()
    engine = Engine(checkpoint, backend="eager", workers=1)
    curve = engine.calibrate([_bright(500, 0)])
    x, labels = _bright(300, 1)
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    images = ImageDataset(pixels, labels, NAMES, "bright")
    found = evaluate(replace(checkpoint, budget=curve.to_dict()), images, PLAIN)
    out = engine(pixels.float() / 255)
    assert found.predictions.tolist() == out.logits.argmax(1).tolist()
    assert found.dynamic.mean_madds == pytest.approx(float(out.madds.mean()))
    assert [route.widths for route in found.routes] == [(1,), (2,), (3,)]
    assert evaluate(checkpoint, images, PLAIN).choices.max() == 0


def test_two_sizes_of_one_network_in_the_order_of_their_cost():
    net = lively_net("micro")
    small, large = (Checkpoint(net, preprocessing=Preprocessing(side)) for side in (16, 32))
    with pytest.warns(DynaslimWarning, match="not in the order of their multiply-adds"):
        made = cascade([large, small])
    assert [rung.image_size_px for rung in made.net.spec.rungs] == [16, 32]
    assert made.preprocessing == large.preprocessing
    assert made.class_names is None
    assert not made.mirror
    narrow = cascade([(small, net.spec.smallest), small, (large, str(net.spec.widest_choice))])
    x = torch.randn(3, 3, 16, 16)
    _, network, _ = narrow.net.source.module(RouteVariant(narrow.net.spec.route_at([0])))
    assert_rows_close(network(x), net(x, net.spec.smallest))
    recipe = {"gate": {"augment": {"mirror": True}}}
    assert cascade([replace(one, recipe=recipe) for one in (small, large)]).mirror


@for_backends("eager", "onnxruntime", "openvino")
@pytest.mark.parametrize("with_others", [False, True])
def test_routes_of_one_network_share_their_trunk(backend, with_others, tmp_path, capsys):
    _, zoo, large = _rungs()
    spec = zoo.net.spec
    routes = (spec.smallest, spec.routes[1], spec.widest_choice)
    made = cascade([*((zoo, route) for route in routes), *([large] if with_others else [])])
    trunk, side = made.net.spec.trunk, made.preprocessing.image_size_px
    features = segment_cost(spec, 0, 0, 0, (24, 24))
    assert trunk.rungs == (0, 1, 2)
    assert trunk.madds == features.madds + features.pool_adds + resize_madds(3, side, 24)
    assert trunk.values == math.prod(features.out) + with_others * 3 * 40 * 40
    costs = [madds(made.net.spec, str(n + 1), side) for n in range(len(made.net.spec.rungs))]
    own = resize_madds(3, side, 24)
    assert costs[:3] == [madds(spec, route, 24) + own for route in routes]
    x = torch.randn(33, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = [made.net.source.module(RouteVariant(route))(x) for route in made.net.spec.routes]
    if with_others:
        zoo_alone, large_alone = _by_hand([zoo, large], x, made.class_names)
        assert_rows_close(expected[3], large_alone)
        assert_rows_close(expected[2], zoo_alone)
    export_package(made, tmp_path / "package")
    shown = run_ok(capsys, "info", tmp_path / "package")
    assert "rungs 1, 2, 3 share a trunk of " in shown
    taus = [float(np.median(margins(logits.detach().numpy()))) for logits in expected[:2]]
    engines = [Engine(made, backend=backend, workers=1, cache_dir=None)]
    if backend != "eager":
        options = {"backend": backend, "workers": 1, "cache_dir": None}
        engines.append(Engine.from_package(tmp_path / "package", **options))
    # the trunk once, and all rungs on the way behind it
    behind = np.cumsum([made.net.spec.behind_trunk(n)[0] for n in range(len(costs))])
    for engine in engines:
        for number, logits in enumerate(expected):
            assert_rows_close(engine.static(str(number + 1))(x), logits)
        reached = set()
        for tau in taus:
            out = engine(x, escalate=tau)
            went = out.routes.flatten()
            reached |= set(went.tolist())
            rows = torch.stack([expected[number][row] for row, number in enumerate(went.tolist())])
            assert_rows_close(out.logits, rows)
            assert out.madds.tolist() == [trunk.madds + behind[n] for n in went.tolist()]
        assert {0, 1, 2} <= reached


def test_a_trunk_is_that_of_the_rungs_whatever_becomes_of_their_network():
    _, zoo, _ = _rungs()
    made, x = cascade([(zoo, zoo.net.spec.smallest), zoo]), torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        expected = zoo.net(x, zoo.net.spec.widest_choice)
        for weight in zoo.net.train().parameters():
            weight.zero_()
    assert_rows_close(made.net(x, "2"), expected)  # by segments


def test_a_trunk_is_shared_only_where_it_saves():
    _, zoo, large = _rungs()
    twin = replace(zoo, preprocessing=Preprocessing(32))
    assert cascade([(zoo, zoo.net.spec.smallest), twin]).net.spec.trunk is None  # another size
    assert cascade([zoo, large]).net.spec.trunk is None
    other = copy.deepcopy(zoo.net)
    with torch.no_grad():
        other.classifier.weight.mul_(2)
    one = replace(zoo, net=other)
    assert cascade([(zoo, zoo.net.spec.smallest), one]).net.spec.trunk is None


# -- packages and ONNX ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascades") / "three"
    _, errors = export_package(made, folder)
    assert max(errors.values()) < 1e-5
    return folder


def _onnx(module, path, *, side=40, batch="rows", free=False, rows=2, opset=13):
    axes = {0: batch, 2: "h", 3: "w"} if free else {0: batch}
    torch.onnx.export(
        module, (torch.zeros(rows, 3, side, side),), path, input_names=["pixels"],
        output_names=["scores"], dynamic_axes={"pixels": axes} if batch else None,
        opset_version=opset, dynamo=False,
    )  # fmt: skip
    return path


@for_backends("onnxruntime", "openvino")
def test_a_package_answers_as_the_cascade(backend, made, package):
    x = torch.randn(17, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    ours = Engine(made, backend="eager", workers=1)(x, escalate=0.3)
    engine = Engine.from_package(package, backend=backend, workers=1, cache_dir=None)
    assert engine.spec == made.net.spec
    theirs = engine(x, escalate=0.3)
    assert_rows_close(theirs.logits, ours.logits)
    assert torch.equal(theirs.routes, ours.routes)
    assert_rows_close(engine.static("2")(x), made.net(x, "2"))


def test_runs_of_a_package_are_small_enough_for_memory(package):
    net = read_model(package)[0].net
    largest = max(rung.peak for rung in net.spec.rungs)
    assert net.rows_at_once(40, 10**9) == LARGE // (4 * largest)
    assert net.rows_at_once(40, 7) == 7


@for_backends("onnxruntime", "openvino")
def test_rungs_of_packages_and_onnx_files(backend, made, package, tmp_path):
    """One route of a package, another in a changed order of classes, and probabilities in ONNX."""
    large = nn.Sequential(_module(24, 1), nn.Softmax(1)).eval()
    file = _onnx(large, tmp_path / "large.onnx", free=True)
    pre = replace(GIVEN, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    first, second = f"{package}@1", f"{package}@2"
    mixed = cascade([first, second, Rung(file, pre, ("c", "a", "b", "e", "d"))])
    assert not mixed.net.source.has_modules
    assert [rung.madds for rung in mixed.net.spec.rungs] == [
        rung.madds for rung in made.net.spec.rungs
    ]
    assert mixed.preprocessing == pre
    x = torch.randn(9, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    engine = Engine(mixed, backend=backend, workers=1, cache_dir=None)
    scale, shift = (torch.tensor(v).view(3, 1, 1) for v in (pre.std, pre.mean))
    own = (x * scale + shift - torch.tensor(GIVEN.mean).view(3, 1, 1)) / torch.tensor(
        GIVEN.std
    ).view(3, 1, 1)
    for route in ("1", "2"):
        assert_rows_close(engine.static(route)(x), made.net(own, route), 1e-4)
    order = [("c", "a", "b", "e", "d").index(name) for name in made.class_names]
    expected = large(x)[:, order]
    made_up = torch.as_tensor(engine.static("3")(x)).softmax(1)
    torch.testing.assert_close(made_up, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="choose from auto, onnxruntime, openvino"):
        Engine(mixed, backend="eager")
    unnamed = cascade([f"{package}@1", f"{file}@40"])
    assert unnamed.class_names == made.class_names
    assert len(list(export_package(mixed, tmp_path / "mixed")[1])) == 4


@pytest.mark.parametrize("opset", [11, 18])
def test_an_onnx_file_of_another_version_behind_a_shared_trunk(opset, tmp_path):
    _, zoo, large = _rungs()
    file = _onnx(large.model, tmp_path / "large.onnx", opset=opset)
    routes = [(zoo, route) for route in (zoo.net.spec.smallest, zoo.net.spec.widest_choice)]
    made = cascade([*routes, Rung(file, GIVEN, large.class_names)])
    assert made.net.spec.trunk.rungs == (0, 1)
    x = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    engine = Engine(made, backend="onnxruntime", workers=1, cache_dir=None)
    (expected,) = _by_hand([large], x, made.class_names)
    assert_rows_close(engine.static("3")(x), expected)
    out = engine(x, escalate=1.0)
    behind_trunk = np.flatnonzero(out.routes.flatten() == 2)
    assert len(behind_trunk)
    assert_rows_close(out.logits[behind_trunk], expected[behind_trunk])


def test_a_package_is_calibrated_in_place(made, package, tmp_path):
    export_package(made, tmp_path / "copy")
    engine = Engine(made, backend="eager", workers=1)
    x = torch.randn(120, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    curve = engine.calibrate([(x, torch.arange(120) % 5)])
    write_budget(tmp_path / "copy", curve.to_dict())
    assert open_package(tmp_path / "copy").budget == curve.to_dict()
    again = Engine.from_package(tmp_path / "copy", backend="onnxruntime", workers=1)
    assert again.curve == curve


def test_any_package_answers_along_every_path_as_its_network(tmp_path):
    """What evaluation and calibration need; programs depend on the choice before, too."""
    net = lively_net("micro")
    checkpoint = Checkpoint(net, preprocessing=Preprocessing(32))
    export_package(checkpoint, tmp_path / "micro")
    opened, _ = read_model(tmp_path / "micro")
    assert isinstance(opened.net, ProgramNet)
    x, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 5
    ours, theirs = (answer_paths(one, [(x, labels)], mirror=True) for one in (net, opened.net))
    np.testing.assert_allclose(theirs.margins_NP, ours.margins_NP, atol=1e-5)
    for one, other in zip(ours.gate_logits, theirs.gate_logits, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)
    assert (ours.second_look_N == theirs.second_look_N).all()


def test_a_cascade_is_no_checkpoint_file(made, tmp_path):
    with pytest.raises(CheckpointError, match="not saved, cascade is a cascade or a package"):
        save(tmp_path / "x.safetensors", made)
    with pytest.raises(UsageError, match="int8: a cascade has fp32 and bf16 only"):
        Engine(made, backend="onnxruntime", precision="int8", calibration=[torch.zeros(1)])


# -- signals --------------------------------------------------------------------------------------


def test_area_under_the_risk_coverage_curve():
    right = np.array([True, True, False, True])
    assert aurc(np.array([4, 3, 1, 2]), right) == pytest.approx((0 + 0 + 0 + 1 / 4) / 4)
    assert aurc(np.array([1, 2, 4, 3]), right) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert aurc(np.zeros(4), right) == pytest.approx(1 / 4)  # a constant signal: the error rate
    table = SignalTable(2)
    logits = np.array([[2, 0, 0], [0, 1, 0.5], [0.2, 0, 0.1]], np.float32)
    for rung in (0, 1):
        table.add(rung, logits, np.array([0, 1, 1]))
    first, second = table.rows()
    assert first["errors"] == pytest.approx(1 / 3)
    assert first["margin"] == first["entropy"] == first["probability"] == pytest.approx(1 / 9)
    assert second["agreement"] == first["margin"]


# -- what is refused ------------------------------------------------------------------------------


def _refused(*rungs):
    with pytest.raises(UsageError) as found:
        cascade(list(rungs))
    message = str(found.value)
    assert message.isprintable()
    return message


def test_networks_that_make_no_cascade(tmp_path):
    small, _, large = _rungs()
    other = Rung(_module(24), GIVEN, ("x", "b", "c", "d", "e"), "other")
    grey = Preprocessing(40, (0.5,), (0.5,))
    tiny = Rung(nn.Sequential(nn.Conv2d(3, 8, 9), nn.Flatten(), nn.LazyLinear(5)).eval(), GIVEN)
    tiny.model(torch.zeros(1, 3, 40, 40))
    tiny = replace(tiny, preprocessing=Preprocessing(8))
    for message, *rungs in (
        ("at least two networks", small),
        ("other: has no class 'a', which another rung has", small, other),
        ("7 classes, small 5", small, Rung(_module(24, classes=7), GIVEN)),
        ("costs as much as the rung before it", large, large),
        ("training mode; call model.eval() first", small, Rung(Small(8), GIVEN)),
        ("rung of type Small", small, _module(24)),
        ("4 class names do not fit 5", small, Rung(_module(8), GIVEN, NAMES[:4])),
        ("does not run on 2 images of 40x40", small, Rung(_module(8), grey)),
        ("does not run on 2 images of 8x8 px", large, tiny),
        ("not scores (rows, classes)", small, Rung(nn.Conv2d(3, 8, 3).eval(), GIVEN)),
        ("does not say how images are prepared", small, Checkpoint(lively_net("micro"))),
    ):
        assert message in _refused(*rungs)
    engine = Engine(cascade([small, large]), backend="eager", workers=1)
    with pytest.raises(UsageError, match="image size 16x16 px: cascade takes 40x40 px"):
        engine(torch.zeros(1, 3, 16, 16))
    with pytest.raises(UsageError, match="route 3: cascade takes the number of a rung, 1 to 2"):
        engine.static("3")
    with pytest.raises(UsageError, match="99 images are too few"):
        engine.calibrate([(torch.zeros(99, 3, 40, 40), torch.zeros(99, dtype=torch.int64))])


def test_onnx_files_that_make_no_rung(tmp_path):
    small = _rungs()[0]
    file = _onnx(_module(24), tmp_path / "fixed.onnx", batch=None)
    assert "takes batches of 2 alone; export it with a dynamic batch" in _refused(small, file)
    free = _onnx(_module(24), tmp_path / "free.onnx", free=True)
    assert f"name the one that it runs at, as in {free}@224" in _refused(small, free)
    assert "no such file" in _refused(small, tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    assert "not readable as ONNX" in _refused(small, tmp_path / "text.onnx")
    good = _onnx(_module(24), tmp_path / "good.onnx")
    assert "takes images of 3x40x40, not 3x32x32" in _refused(
        small, Rung(good, replace(GIVEN, image_size_px=32))
    )
    model = onnx.load(good)
    model.graph.input.append(onnx.helper.make_tensor_value_info("mask", 1, ["rows"]))
    onnx.save(model, tmp_path / "two.onnx")
    assert "has 2 inputs (pixels, mask), a rung has one" in _refused(small, tmp_path / "two.onnx")


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two ONNX classifiers of brightness, a checkpoint of five classes, and pictures for them."""
    folder = tmp_path_factory.mktemp("ladder")
    for name, size in (("small", (2, 1)), ("large", (16, 2))):
        _onnx(Brightness(*size).eval(), folder / f"{name}.onnx", side=16)
    net = lively_net("micro")
    names = tuple(f"class {n}" for n in range(5))
    save(folder / "run" / "net.safetensors", Checkpoint(net, names, PLAIN))
    pixels = (_bright(200, 5)[0].permute(0, 2, 3, 1).clamp(0, 1) * 255).byte().numpy()
    pictures = list(map(encoded, pixels))
    return folder, write_parquet(folder / "data", pictures, 5), pictures


def test_from_the_command_line_to_the_server(capsys, files, tmp_path):
    folder, data, pictures = files
    out, plain = tmp_path / "ladder", ("--mean", "[0,0,0]", "--std", "[1,1,1]")
    rungs = (folder / "small.onnx", folder / "large.onnx")
    printed = json.loads(run_ok(capsys, "cascade", *rungs, out, "--data", data, *plain, "--json"))
    assert [rung["name"] for rung in printed["rungs"]] == ["small.onnx", "large.onnx"]
    assert printed["rungs"][0]["top1"] < printed["rungs"][1]["top1"] - 0.1
    assert printed["images"] == 200
    assert set(printed["risk_coverage"][1]) == {
        "errors", "margin", "probability", "entropy", "agreement",
    }  # fmt: skip
    assert printed["default"]["budget"] == "drop=0.5"
    assert open_package(out).manifest["notes"]["risk_coverage"] == printed["risk_coverage"]
    shown = run_ok(capsys, "cascade", *rungs, out, "--data", data, *plain)
    assert re.search(r"1 +small.onnx +16 +", shown)
    assert "by default drop=0.5" in shown
    assert "a cascade of 2 networks, 5 classes" in run_ok(capsys, "info", out)
    assert json.loads(run_ok(capsys, "info", out, "--json"))["rungs"][0]["image_size_px"] == 16

    (tmp_path / "x.png").write_bytes(pictures[3])
    row = json.loads(run_ok(capsys, "predict", out, tmp_path / "x.png", "--json"))["images"][0]
    assert row["route"] in ("1", "2")
    assert row["class_name"] == "class 3" or row["route"] == "1"
    found = json.loads(run_ok(capsys, "evaluate", out, "--data", data, "--json"))
    assert found["dynamic"]["mean_madds"] == pytest.approx(printed["default"]["madds"])
    args = ("calibrate-budget", out, "--data", data, "--split", "test", "--json")
    again = json.loads(run_ok(capsys, *args))
    assert again["curve"] == printed["curve"]
    refused = [*args, "--out", tmp_path / "x"]
    fails(capsys, refused, 2, "a package gets the curve itself")
    page = tmp_path / "r.html"
    run_ok(capsys, "report", out, "-o", page, "--data", data, "--rounds", "2", "--no-cache")
    text = page.read_text()
    assert "Route 1 is small.onnx, for 16 px." in text
    assert "Risk-coverage areas on the images of its budget curve: errors" in text

    with running(out) as (_, url):
        served = httpx.post(f"{url}/v1/predict", files=form(pictures[3]), timeout=30).json()
        (answer,) = served["results"]
        assert (answer["route"], answer["top"][0]["class"]) == (row["route"], row["class_name"])
        models = httpx.get(f"{url}/v1/models", timeout=30).json()
    assert [route["route"] for route in models["models"][0]["routes"]] == ["1", "2"]


def test_mistakes_on_the_command_line(capsys, files, tmp_path):
    folder, data, _ = files
    net, large = folder / "run" / "net.safetensors", folder / "large.onnx"
    data_flags = ("--data", data)
    for message, *argv in (
        ("a cascade needs at least two networks", net, tmp_path / "x"),
        ("a cascade is measured on the CPU", net, large, tmp_path, "--device", "cuda"),
        ("is there and no package", net, large, folder),
        ("stage 0 allows", f"{net}@1-2-3", large, tmp_path / "x"),
    ):
        fails(capsys, ["cascade", *argv, *data_flags], 2, message)
    # held-out images must not be ones that a network learned from
    opened = ImageDataset.of(open_source(str(data), "test"), PLAIN)
    seen = list(opened.digests())[:7]
    (net.parent / "trained_on.txt").write_text("\n".join(seen))
    argv = ["cascade", large, net, tmp_path / "x", *data_flags]
    fails(capsys, argv, 1, "7 of these 200 images are ones that a network was trained on")
    assert json.loads(run_ok(capsys, *argv, "--force", "--json"))["trained_on"] == 7
    (net.parent / "trained_on.txt").unlink()
