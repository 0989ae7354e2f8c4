"""A trained network as the supernet's teacher, and labels beside teachers in a training."""

import pytest
import torch
from helpers import lively, micro_spec, toy_images

from dynaslim.checkpoint import Checkpoint, save
from dynaslim.data.feed import ImageFeed
from dynaslim.data.transforms import Augment, normalise
from dynaslim.errors import UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe, OptimRecipe, SupernetRecipe
from dynaslim.train.loop import SupernetTraining
from dynaslim.train.teacher import OutsideTeacher

PRE = Preprocessing(16, mean=(0.5,) * 3, std=(0.25,) * 3)
NAMES = ("a", "b", "c", "d", "e")


def _saved(folder, *, names=NAMES, pre=PRE, net=None):
    net = lively(micro_spec(num_classes=len(names)), image_size=16) if net is None else net
    return str(save(folder / "teacher.safetensors", Checkpoint(net, names, pre)))


def test_its_prediction_is_the_networks_own_whatever_normalisation_and_order(tmp_path):
    other = Preprocessing(16, mean=(0.2, 0.4, 0.6), std=(0.3, 0.5, 0.7))
    names = ("e", "c", "a", "b", "d")
    net = lively(micro_spec(), image_size=16)
    path = _saved(tmp_path, names=names, pre=other, net=net)
    teacher = OutsideTeacher(path, NAMES, PRE, net.spec)
    pixels = toy_images(8).images_NCSS
    theirs = net(normalise(pixels, other), net.spec.largest).softmax(1)
    wanted = theirs[:, [names.index(name) for name in NAMES]]
    torch.testing.assert_close(teacher(normalise(pixels, PRE)), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ruined", [False, True])
def test_it_runs_on_the_statistics_that_make_it_better(tmp_path, ruined):
    net = lively(micro_spec(), image_size=16)
    images = toy_images(32)
    x = normalise(images.images_NCSS, PRE)
    with torch.no_grad():
        net.classifier.weight.mul_(1000)  # sure of its own answers
        labels = net(x, net.spec.largest).argmax(1)
        if ruined:
            for name, buffer in net.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(3.0)
    teacher = OutsideTeacher(_saved(tmp_path, net=net), NAMES, PRE, net.spec)
    chosen = teacher.choose([(x, labels)])
    assert chosen["statistics"] == ("batch" if ruined else "own")
    assert chosen["route"] == str(net.spec.largest)
    before = {name: buffer.clone() for name, buffer in teacher.net.named_buffers()}
    teacher(x)
    for name, buffer in teacher.net.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, before[name])


@pytest.mark.parametrize(
    ("options", "pre", "error"),
    [
        ({"names": ("a", "b", "x", "d", "e")}, PRE, "classes are not the images' 5: a, b, x, d, e"),
        ({"names": NAMES[:4]}, PRE, "its 4 classes are not the images' 5"),
        ({}, Preprocessing(24, mean=PRE.mean, std=PRE.std), "takes images of 16 px, here they"),
    ],
)
def test_another_teacher_is_refused_in_one_line(tmp_path, options, pre, error):
    path = _saved(tmp_path, **options)
    with pytest.raises(UsageError, match=error) as caught:
        OutsideTeacher(path, NAMES, pre, micro_spec())
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def _training(**fields):
    recipe = SupernetRecipe(
        model="unused", epochs=2, batch_size=16, optim=OptimRecipe(lr=0.1), **fields
    )
    torch.manual_seed(0)
    net = lively(micro_spec(), image_size=16)
    feed = ImageFeed(toy_images(48), 16, 0)
    return SupernetTraining(net, feed, Augment(AugmentRecipe(), PRE), recipe)


def test_the_labels_hand_over_to_the_teacher():
    labels = list(_training(target="labels"))
    ensemble = list(_training(target="ensemble"))
    handover = list(_training(target="ensemble", label_warmup=0.5))
    assert handover[0] == labels[0]
    assert handover[0] != ensemble[0]
    assert handover[3].smallest != labels[3].smallest
