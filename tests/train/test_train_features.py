"""Features behind the trunk: computed once, and trained on as if the images were there."""

from itertools import islice

import pytest
import torch
from convertible import trained
from helpers import noise, toy_images

from dynaslim.conversion import convert
from dynaslim.data.feed import ImageFeed
from dynaslim.data.transforms import Augment
from dynaslim.errors import TrainingError
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe, OptimRecipe, SupernetRecipe
from dynaslim.train.features import trunk_features
from dynaslim.train.fit import augmented_views
from dynaslim.train.loop import SupernetTraining

PLAIN = AugmentRecipe(crop="none", mirror=False)
PREPARED = Preprocessing(16, mean=(0.5,) * 3, std=(0.25,) * 3)


def _net():
    """A converted network: its largest route has the trunk of all others."""
    return convert(trained("residual"), torch.zeros(2, 3, 16, 16))


def _recipe(**changes):
    given = {
        "epochs": 2, "batch_size": 16, "dropout": 0.0, "target": "labels", "trunk_views": 1,
        "augment": PLAIN, "optim": OptimRecipe(lr=0.1, warmup_share=0.0),
    }  # fmt: skip
    return SupernetRecipe(**(given | changes))


def _parts(views=1, outside=None):
    net = _net()
    feed = ImageFeed(toy_images(48), 16, 0)
    augment = Augment(PLAIN, PREPARED)
    batches = augmented_views(feed, augment, torch.device("cpu"), views, 0)
    made = trunk_features(net, batches, (views, 3), 0, outside=outside)
    return net, feed, augment, made


def test_what_lies_behind_the_trunk_gives_the_same_answers():
    net = _net()
    x = noise(net.spec, 6, image_size=16)
    routes = net.spec.routes
    with torch.no_grad():
        features = net.segment(0, x, 0, decide=False).features
        behind = net.forward_many(features, routes, after_trunk=True)
        for made, expected in zip(behind, net.forward_many(x, routes), strict=True):
            torch.testing.assert_close(made, expected)


def test_a_step_on_features_moves_what_lies_behind_as_one_on_images():
    """The trunk of the other training is frozen by hand: evaluation mode, and no gradient."""
    net, feed, augment, made = _parts()
    trunk = {name: value.clone() for name, value in net.state_dict().items()}
    behind = SupernetTraining(net, feed, augment, _recipe(), features=made)
    batch = next(iter(behind.features.batches(0, 1, 16)))
    losses = next(iter(behind))
    other = _net()
    with torch.no_grad():
        logits = other.train().forward_many(batch.x, [other.spec.largest], after_trunk=True)[0]
    smoothed = torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    assert losses.largest == pytest.approx(float(smoothed), rel=1e-4)
    after = net.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, trunk[name])}
    assert moved
    read = [str((n.args, n.kwargs)) for n in net.graph.nodes if n.segment == 0]
    in_trunk = {name for name in net.graph.tensors if any(repr(name) in text for text in read)}
    assert in_trunk
    assert not moved & in_trunk
    behind.recalibrate(net, 2)
    assert all(torch.equal(net.state_dict()[name], trunk[name]) for name in in_trunk)


def test_views_take_turns_and_an_order_is_taken_up_again():
    _, _, _, made = _parts(views=2, outside=lambda x: x.mean((2, 3)))
    straight = list(made.batches(0, 12, 16))
    again = list(made.batches(5, 12, 16))
    for one, other in zip(straight[5:], again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    epochs = [straight[3 * n : 3 * n + 3] for n in range(4)]
    seen = [torch.cat([b.labels for b in epoch]).sort().values for epoch in epochs]
    assert all(torch.equal(seen[0], one) for one in seen)
    assert not torch.equal(epochs[0][0].x, epochs[2][0].x)  # the same view in another order
    first = {tuple(row.flatten()[:4].tolist()) for b in epochs[0] for row in b.x}
    third = {tuple(row.flatten()[:4].tolist()) for b in epochs[2] for row in b.x}
    assert first == third
    assert all(len(b.outside) == 16 for b in islice(straight, 3))


def test_features_that_float16_cannot_hold_are_refused():
    net = _net()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.startswith("stem"):
                value.mul_(1e6)
    feed = ImageFeed(toy_images(48), 16, 0)
    batches = augmented_views(feed, Augment(PLAIN, PREPARED), torch.device("cpu"), 1, 0)
    with pytest.raises(TrainingError, match="not finite in float16"):
        trunk_features(net, batches, (1, 3), 0)


def test_the_largest_alone_is_trained_as_any_network():
    net, feed, augment, _ = _parts()
    recipe = _recipe(trunk_views=0, routes="largest", epochs=1)
    spec = net.spec
    x, labels = next(iter(feed.batches(0, 1)))
    with torch.no_grad():
        logits = _net().train()(augment(x, 0), spec.largest)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    losses = next(iter(SupernetTraining(net, feed, augment, recipe)))
    assert losses.largest == pytest.approx(float(expected), rel=1e-4)
    assert losses.randoms == ()
    assert losses.smallest == losses.largest
