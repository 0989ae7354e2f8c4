"""Probabilities that answers are right, judged by several routes together."""

import numpy as np
import pytest

from dynaslim.runtime.opinion_pool import RIDGE, OpinionPool


def _pool(logits_MNC, labels, parts=1, answers=None):
    """Probabilities of the members' own answers, or of others."""
    classes_NA = logits_MNC.argmax(2).T if answers is None else answers
    pool = OpinionPool()
    for rows in np.array_split(np.arange(len(labels)), parts):
        pool.add(classes_NA[rows], logits_MNC[:, rows], labels[rows])
    return pool.probabilities()


def _members(images, seed=0, members=3, classes=6, sure=1.0):
    """Logits of members that see the same truth through noise of their own, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    truth = 2 * np.eye(classes)[labels]
    noise = rng.normal(0, 1, (members, images, classes))
    return (sure * (truth + noise)).astype(np.float32), labels


@pytest.mark.parametrize("sure", [0.3, 1.0, 4.0])
def test_truth_is_recovered(sure):
    """The noise is normal, so the posterior is the softmax of a sum of logits.

    However sure the members are of themselves, the weights make up for it.
    """
    logits, labels = _members(20_000, sure=sure)
    summed = 2 * logits.astype(np.float64).sum(0) / sure
    posterior = np.exp(summed - summed.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    expected = np.take_along_axis(posterior, logits.argmax(2).T, 1)
    # classes that are no answer count as one, so that it is not exactly the same
    assert np.abs(_pool(logits, labels) - expected).mean() < 0.03


def test_expectations_are_right_on_average():
    """As many images without any right answer are expected as there are, but for the ridge."""
    logits, labels = _members(3000, sure=5.0)
    classes = logits.argmax(2).T
    chances = _pool(logits, labels)
    first = np.array(
        [[row.index(one) == at for at, one in enumerate(row)] for row in classes.tolist()]
    )
    missed = 1 - (chances * first).sum(1)
    assert missed.sum() == pytest.approx((classes != labels[:, None]).all(1).sum(), abs=3 * RIDGE)
    assert chances.mean(0) == pytest.approx((classes == labels[:, None]).mean(0), abs=0.02)


def test_members_that_are_never_sure():
    """Logits so small that all probabilities are about the same, as those of an untrained net."""
    logits, labels = _members(300, sure=1e-3)
    right, chances = labels[:, None] == logits.argmax(2).T, _pool(logits, labels)
    assert chances[right].mean() > chances[~right].mean() + 0.3


def test_equal_answers_are_equally_probable():
    logits, labels = _members(500)
    classes = logits.argmax(2).T
    chances = _pool(logits, labels)
    same = classes[:, 0] == classes[:, 2]
    assert 50 < same.sum() < 450
    assert (chances[same, 0] == chances[same, 2]).all()
    assert (chances[~same, 0] != chances[~same, 2]).all()


def test_answers_of_others_than_the_members_are_judged_too():
    logits, labels = _members(500)
    answers = np.concatenate([logits.argmax(2).T, logits.sum(0).argmax(1)[:, None]], 1)
    chances = _pool(logits, labels, answers=answers)
    assert chances.shape == (500, 4)
    assert chances[:, 3].mean() > chances[:, :3].mean(0).max()


def test_batches_do_not_matter():
    # more images than are summed at once
    logits, labels = _members(9000)
    whole = _pool(logits, labels)
    np.testing.assert_allclose(_pool(logits, labels, parts=7), whole, atol=1e-6)
    assert whole.shape == (9000, 3)


@pytest.mark.parametrize("classes", [1, 2, 6])
@pytest.mark.parametrize("images", [1, 40])
@pytest.mark.parametrize("kind", ["right", "wrong", "far", "flat"])
def test_extremes(classes, images, kind):
    logits, labels = _members(images, classes=classes)
    if kind == "right":
        labels = logits[0].argmax(1)
    elif kind == "wrong":
        labels = logits[0].argmin(1)
    elif kind == "far":
        logits = logits * 1e5
    else:
        logits = np.zeros_like(logits)
    chances = _pool(logits, labels)
    assert ((chances >= 0) & (chances <= 1)).all()
    if images > 1 and classes > 2:
        mean = chances[:, 0].mean()
        assert mean == pytest.approx((logits[0].argmax(1) == labels).mean(), abs=0.15)
