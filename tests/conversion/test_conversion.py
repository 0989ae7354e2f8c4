"""Conversion: answers at full width, the same network by every way of running it, refusals."""

from dataclasses import replace
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from convertible import (
    NETWORKS,
    Branches,
    Plain,
    _conv,
    assert_segments_agree,
    routed_alone,
    trained,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynaslim
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.conversion import Conversion, convert
from dynaslim.cost import CostTable, madds, params
from dynaslim.data import ImageDataset
from dynaslim.errors import UsageError
from dynaslim.graph import GraphSpec
from dynaslim.nn.sorting import sort_channels
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import GateRecipe, OptimRecipe, SupernetRecipe
from dynaslim.runtime.export import export_package, export_route, export_single_file
from dynaslim.runtime.quantise import QuantisedSource
from dynaslim.runtime.variants import RouteVariant
from dynaslim.train import train_supernet

PRE = Preprocessing(image_size_px=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def images(count=4, seed=0, side=16):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def decisive(net):
    """Gates that send images different ways."""
    with torch.no_grad():
        for gate in net.gates:
            nn.init.normal_(gate.slimming_weight, generator=torch.Generator().manual_seed(3))
            hidden = net.segment_hidden(0, images(64, seed=9), 0)[1].mean(0)
            gate.slimming_weight -= (
                (gate.slimming_weight @ hidden)[:, None] * hidden / hidden.dot(hidden)
            )
    return net


def _branches():
    """Two tensors cross its gate, for images of three sizes."""
    sizes = [(20, 20), (8, 32)]
    return convert(trained("branches"), images(), other_sizes=sizes, gate_at=["stems"])


@cache
def converted(name):
    """A model and its conversion; tests leave both as they are."""
    model = trained(name)
    return model, convert(model, images())


@pytest.mark.parametrize("name", NETWORKS)
def test_at_full_width_the_answers_are_the_models(name):
    model, net = converted(name)
    x = images(5, seed=1)
    with torch.no_grad():
        expected, got = model(x), net(x, net.spec.largest)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_every_width_is_the_same_network_by_every_way(name):
    """Elastic, extracted, as ONNX and chosen by a gate."""
    (_, net), x = converted(name), images(3, seed=2)
    assert_segments_agree(net, x)
    with torch.no_grad():
        for k, route in enumerate(net.spec.routes):
            gates = torch.eye(4)[[k] * 3]
            gated = net.forward_gated(x, lambda logits, _, gates=gates: gates).logits
            assert torch.allclose(gated, net(x, route), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_narrow_routes_cost_less(name):
    _, net = converted(name)
    costs = [madds(net.spec, route, 16) for route in net.spec.routes]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    assert params(net.spec, net.spec.smallest) < params(net.spec, net.spec.largest)
    assert params(net.spec) == sum(p.numel() for p in net.parameters())
    gate = net.gates[0]
    head = sum(weight.numel() for weight in (gate.reduce_weight, gate.slimming_weight))
    assert params(net.spec) - params(net.spec, net.spec.largest) == head + len(gate.reduce_bias)
    assert CostTable.from_madds(net.spec, 16).route_cost((3,)) == costs[-1] + head


def test_multiply_adds_are_those_of_torch():
    for name in ("residual", "dense", "grouped", "scaled", "flattened"):
        _, net = converted(name)
        for route in net.spec.routes:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(images(1), route)
            assert madds(net.spec, route, 16) == counter.get_total_flops() // 2, name


@pytest.mark.parametrize("make", [lambda: convert(trained("residual"), images()), _branches])
def test_the_engine_routes_it(make, tmp_path):
    net, x = decisive(make()), images(40, seed=4)
    chosen, expected = routed_alone(net, x)
    assert len(set(chosen)) > 1
    file = save(tmp_path / "net.safetensors", Checkpoint(net=net, preprocessing=PRE))
    assert read(file).net.spec == net.spec
    package = tmp_path / "package"
    export_package(read(file), package)
    engines = [dynaslim.Engine.from_checkpoint(file, backend=b) for b in ("eager", "onnxruntime")]
    engines += [
        dynaslim.Engine.from_package(package, backend=b) for b in ("onnxruntime", "openvino")
    ]
    for engine in engines:
        got = torch.as_tensor(engine(x.numpy()).logits)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_it_leaves_as_other_networks_do(tmp_path):
    """One file, one route, 8 bits."""
    _, net = converted("residual")
    checkpoint, route = Checkpoint(net=net, preprocessing=PRE), net.spec.routes[1]
    assert export_single_file(checkpoint, tmp_path / "one.onnx") < 1e-4
    assert export_route(checkpoint, tmp_path / "route.onnx", route) < 1e-4
    x = images(3, seed=6)
    with torch.no_grad():
        expected = net(x, route)
    assert torch.allclose(dynaslim.extract(net, route)(x), expected, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "route.onnx")
    (got,) = session.run(None, {"x": x.numpy()})
    assert np.allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
    rounded = QuantisedSource(net, [images(64)], images=64, cache_dir=None)
    whole = onnxruntime.InferenceSession(rounded.onnx(RouteVariant(route)))
    (near,) = whole.run(None, {"x": x.numpy()})
    assert np.abs(near - expected.numpy()).max() < 0.3 * np.abs(expected.numpy()).max()


def test_it_is_trained_like_any_other():
    pixels = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(64) % 5
    pixels[labels == 0] //= 4
    data = ImageDataset(pixels, labels, tuple("abcde"))
    net = convert(trained("residual"), images())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    recipe = SupernetRecipe(
        epochs=2, batch_size=16, calibration_batches=2, optim=OptimRecipe(lr=0.05)
    )
    losses = []
    made = train_supernet(net, data, PRE, recipe, on_step=losses.append)
    assert isinstance(made.spec, GraphSpec)
    assert losses[-1].largest < losses[0].largest
    assert not torch.equal(before["head.weight"], made.state_dict()["head.weight"])
    recipe = GateRecipe(epochs=1, batch_size=16, objective="sgs", targets=())
    heads = [p.clone() for p in made.slimming_parameters()]
    dynaslim.train.train_gate(made, data, PRE, recipe)
    assert any(
        not torch.equal(a, b) for a, b in zip(heads, made.slimming_parameters(), strict=True)
    )


def test_statistics_are_kept_by_width():
    net = convert(trained("residual"), images())
    x = images(32, seed=5)
    dynaslim.train.recalibrate(net, [x])
    for route in net.spec.routes:
        net.eval()
        with torch.no_grad():
            own = net(x, route)
        net.train()
        with torch.no_grad():
            batch = net(x, route)
        net.eval()
        assert torch.allclose(own, batch, rtol=0.2, atol=0.05)


def test_channels_are_sorted_by_importance():
    """Channels that are never active come last, wherever they were."""
    model = trained("residual")
    dead = [0, 5, 17]
    one = model.body[2].one
    with torch.no_grad():
        one[1].weight[dead], one[1].bias[dead] = 0.0, 0.0
    for batches, rule in ((None, None), ([images(8)], None), ([images(8)], "bn")):
        net = convert(model, images(), images=batches, importance=rule)
        assert net.spec.sorted_by == ("activation" if batches and rule is None else "statistics")
        scales = net.tensor("body.2.one.1.weight")
        assert (scales[-3:] == 0).all()
        assert (scales[:-3] != 0).all()


def test_gates_are_put_where_they_are_requested():
    model = trained("residual")
    net = convert(model, images(), gate_at=["body.0", "body.1"])
    assert net.spec.num_segments == 3
    decisive_choices = net.spec.routing_space
    assert len(decisive_choices) == 16
    x = images(2, seed=7)
    with torch.no_grad():
        whole = net(x, net.spec.largest)
        for route in decisive_choices:
            assert torch.isfinite(net(x, route)).all()
        expected = model(x)
    assert torch.allclose(whole, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"gate at 'body.7': there is no .*; .* body.0.0, "):
        convert(model, images(), gate_at=["body.7"])
    with pytest.raises(UsageError, match=r"gate_at \['body.0', 'body.0'\]: two gates at one place"):
        convert(model, images(), gate_at=["body.0", "body.0"])


class Skipping(nn.Module):
    """What is made behind one gate is read by a layer behind the next but one."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = _conv(3, 16), _conv(16, 24), _conv(24, 24)
        self.three, self.last, self.head = _conv(24, 24), _conv(24, 24), nn.Linear(48, 5)

    def forward(self, x):
        one = self.one(self.stem(x))
        three = self.three(self.two(one))
        return self.head(torch.cat([self.last(one), three], 1).mean((2, 3)))


def test_channels_that_cross_two_gates_stay_whole():
    net = convert(Skipping().eval(), images(), gate_at=["stem", "one", "two", "three"])
    assert all(run[0] == -1 for run in net.spec.tensors["one.0.weight"].axes[0])
    assert any(run[0] != -1 for run in net.spec.tensors["two.0.weight"].axes[0])
    with torch.no_grad():
        for route in (net.spec.smallest, "100-25-100-25-100", net.spec.largest):
            assert torch.isfinite(net(images(2), route)).all()


def test_what_is_protected_stays_whole():
    model = trained("residual")
    free = Conversion(model, images(), protect=["body.1.one"]).net()
    name = "body.1.one.0.weight"
    assert all(run[0] == -1 for run in free.spec.tensors[name].axes[0])
    with pytest.raises(UsageError, match="protect 'nobody': the model has no such module"):
        Conversion(model, images(), protect=["nobody"])


class Unknown(nn.Module):
    def forward(self, x):
        return torch.cummax(x, 1).values


class Conditional(nn.Module):
    """A convolution whose weight depends on the image."""

    def __init__(self):
        super().__init__()
        self.experts, self.route = nn.Parameter(torch.randn(4, 48 * 16 * 9)), nn.Linear(16, 4)

    def forward(self, x):
        w = (self.route(x.mean((2, 3)))[:1].softmax(1) @ self.experts).view(48, 16, 3, 3)
        return nn.functional.conv2d(x, w)


class Branching(nn.Module):
    def forward(self, x):
        return x.repeat(1, 3, 1, 1) if float(x.mean()) > 0 else x


class Twice(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class Reordered(nn.Module):
    def forward(self, x):
        y = x.transpose(0, 1).reshape(-1, *x.shape[1:]) + 1
        return y.reshape(x.shape[1], -1, *x.shape[2:]).transpose(0, 1)


@pytest.mark.parametrize(
    ("body", "operation", "reason"),
    [
        (Unknown(), "cummax", "not an operation that can be converted"),
        (Conditional(), "conv2d", "its weight is computed from the image"),
        (Branching(), "", "which operations run depends on values of the image; it cannot be"),
        (Twice(), "conv2d", "shares its weight with body.0.one: tied weights"),
        (Reordered(), "reshape", "puts the rows of the batch in another order"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(body, operation, reason):
    features = 48 if isinstance(body, Conditional | Branching) else 16
    with pytest.raises(UsageError) as refused:
        convert(Plain(body, features=features).eval(), images())
    where = "body.0.two" if isinstance(body, Twice) else "body.0"
    found = refused.value.details
    assert (found["module"], found["operation"]) == (where, operation)
    assert found["reason"].startswith(reason)
    assert len(str(refused.value).splitlines()) == 1


def test_models_that_are_not_ready_are_refused():
    model = trained("residual")
    model.body[1].train()
    with pytest.raises(UsageError, match=r"body.1: in training mode; call model.eval\(\) first"):
        convert(model, images())
    model.eval()
    with pytest.raises(UsageError, match=r"stem.0: does not run on an example of shape"):
        convert(model, torch.randn(1, 4, 16, 16))
    with pytest.raises(UsageError, match="expected"):
        convert(model, torch.randn(3, 16, 16))
    with pytest.raises(UsageError, match=r"widths .*expected shares that rise to 1"):
        convert(model, images(), widths=(0.5, 0.25, 1.0))
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"head.weight: has values that are not finite"):
        convert(model, images())


class Mixed(nn.Module):
    """Channels and pixels in one axis, and back."""

    def forward(self, x):
        return x.flatten(1).reshape(len(x), 24, -1).roll(1, 1).reshape(x.shape)


def test_a_view_that_mixes_channels_and_pixels_keeps_them_whole():
    made = Conversion(Plain(_conv(16, 36, stride=2), Mixed(), _conv(36, 48)).eval(), images())
    spec = made.net().spec
    assert madds(spec, spec.smallest, spec.image_size) < madds(spec, spec.largest, spec.image_size)
    assert made.whole()["body.1"] == "reshape mixes channels with other positions"


def broken(monkeypatch, what):
    """A mistake in one of the programs that are compared."""
    name = "body.2.two.0.weight"
    if what in ("order", "slices"):

        def other(net, *given):
            sort_channels(net, *given)
            if what == "order":
                net.tensor(name).data = net.tensor(name).roll(1, 1)
                return
            tensors = dict(net.spec.tensors)
            rows, (run,), *rest = tensors[name].axes
            first = (run[0], 1, run[2] - 1, 1), (run[0], 0, 1, 1)
            tensors[name] = replace(tensors[name], axes=(rows, first, *rest))
            net.spec = replace(net.spec, tensors=tensors)

        monkeypatch.setattr("dynaslim.conversion.build.sort_channels", other)
    else:
        from dynaslim.runtime.extract import _Builder

        affine = _Builder._affine
        monkeypatch.setattr(
            _Builder,
            "_affine",
            lambda self, step: (affine(self, step)[0] * 1.1, affine(self, step)[1]),
        )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("order", r"body.2.two.0: conv2d: .* differs from the model at full width"),
        (
            "slices",
            r"body.2.two.0: conv2d: at \d+ % of the channels the network differs from the wh",
        ),
        ("extraction", r"stem.1: batch_norm: before the gate the extracted network differs"),
    ],
)
def test_a_conversion_that_is_wrong_is_an_error(monkeypatch, what, message):
    broken(monkeypatch, what)
    with pytest.raises(UsageError, match=message):
        convert(trained("residual"), images())


def test_a_network_for_images_of_several_sizes(tmp_path):
    model, sides = trained("sized"), (16, 22, 32)
    made = convert(model, images(), other_sizes=[(22, 22), (32, 32)])
    net = read(save(tmp_path / "net.safetensors", Checkpoint(net=made, preprocessing=PRE))).net
    assert net.spec == made.spec
    for side in sides:
        other, x = net.at_size(side, side), images(3, seed=8, side=side)
        with torch.no_grad():
            assert torch.allclose(other(x, other.spec.largest), model(x), rtol=1e-4, atol=1e-5)
        for route in net.spec.routes:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                other(x[:1], route)
            counted = counter.get_total_flops() // 2
            assert madds(net.spec, route, side) == madds(other.spec, route, side) == counted
        for back in sides:
            assert other.spec.at_size(back, back).forms == net.spec.at_size(back, back).forms
    assert other.head.weight is net.head.weight
    dynaslim.train.recalibrate(other, [images(16, side=32)])
    names = [n for n, buffer in net.named_buffers() if n.startswith("body.0.1.running_mean")]
    assert not any(torch.equal(net.get_buffer(n), other.get_buffer(n)) for n in names)
    with pytest.raises(UsageError, match="at_size gives it for 22x22, 32x32 px"):
        net(images(side=22), net.spec.largest)
    with pytest.raises(UsageError, match="does not run on an example of shape"):
        convert(trained("mixer"), images(), other_sizes=[(32, 32)])


def test_images_of_another_size_are_refused():
    _, net = converted("residual")
    with pytest.raises(UsageError, match="converted for 16x16 px"):
        net(images(side=32), net.spec.largest)


class Answering(nn.Module):
    """A classifier that also returns its features."""

    def __init__(self, answer):
        super().__init__()
        self.net, self.answer = trained("residual"), answer

    def forward(self, x):
        features = self.net.body(self.net.stem(x))
        return self.answer(self.net.head(features.mean((2, 3))), features)


def test_of_several_outputs_the_one_named_logits_is_decided_on():
    model = Answering(lambda logits, features: {"features": features, "logits": logits}).eval()
    conversion = Conversion(model, images())
    net, x = conversion.net(), images(3, seed=9)
    with torch.no_grad():
        expected = model(x)["logits"]
        assert torch.allclose(net(x, net.spec.largest), expected, rtol=1e-4, atol=1e-5)
    assert conversion.captured.outputs.others == ["['features'] (1, 48, 8, 8)"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda logits, features: (logits, features),
            r"the model returns \[0\] \(1, 5\), \[1\] \(1, 48, 8, 8\): expected class logits alone",
        ),
        (
            lambda *both: dict(zip(("aux", "out"), both, strict=True)),
            r"returns \['aux'\] \(1, 5\),",
        ),
        (lambda _, features: features, r"gives \(48, 8, 8\) for an image, expected class logits"),
    ],
)
def test_outputs_that_are_no_class_logits_are_refused(answer, message):
    with pytest.raises(UsageError, match=message):
        convert(Answering(answer).eval(), images())


def test_several_tensors_cross_a_gate():
    """For images of several sizes."""
    model, net, x = trained("branches"), _branches(), images(40, seed=4)
    assert net.spec.cut_axes[0] == ((-1, 0, 16 * 16 * 16, 1), (-1, 0, 16 * 8 * 8, 1))
    with torch.no_grad():
        twin, large = net.at_size(20, 20), images(3, seed=8, side=20)
        assert torch.allclose(twin(large, net.spec.largest), model(large), rtol=1e-4, atol=1e-5)
        back = twin.at_size(8, 32).at_size(16, 16)
        assert torch.allclose(back(x, net.spec.largest), model(x), rtol=1e-4, atol=1e-5)


def test_a_gate_reads_the_channels_of_tokens():
    model, x = trained("tokens"), images(2, seed=5)
    net = convert(model, x, gate_at=["layers.0"])
    assert net.spec.gate_input(0).axis == ((-1, 0, 48, 1),)
    with torch.no_grad():
        hidden = net.segment_hidden(0, x, 0)[1]
        tokens = model.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([model.token.expand(len(x), -1, -1), tokens], 1)
        expected = net.gates[0].hidden(model.layers[0](tokens).mean(1))
    assert torch.allclose(hidden, expected, rtol=1e-4, atol=1e-5)


def test_a_gate_where_too_many_tensors_cross_is_refused():
    with pytest.raises(UsageError, match="at no place are 8 tensors or fewer all that is needed"):
        convert(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).eval(), images())
    with pytest.raises(UsageError, match=r"gate at 'bodies': there is no .* 8 tensors or fewer"):
        convert(Branches(9).eval(), images(), gate_at=["bodies"])
