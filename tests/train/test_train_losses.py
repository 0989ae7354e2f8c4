import math

import pytest
import torch

from dynaslim.train.losses import (
    cost_loss,
    ensemble_target,
    sgs_loss,
    sgs_target,
    sgs_weights,
    supernet_loss,
)


def _against_probabilities(logits, target):
    labels = torch.zeros(len(logits), dtype=torch.int64)
    weights = {"soft_weight": 1.0, "label_weight": 0.0, "label_smoothing": 0.0}
    return supernet_loss(logits, target, labels=labels, **weights)


def test_loss_against_probabilities_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4 and 3/4
    target = torch.tensor([[0.5, 0.5]])
    expected = -0.5 * math.log(0.25) - 0.5 * math.log(0.75)
    assert _against_probabilities(logits, target).item() == pytest.approx(expected)


def test_loss_against_probabilities_has_their_distance_as_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    target = torch.randn(3, 4).softmax(1)
    _against_probabilities(logits, target).backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - target) / 3)


def test_ensemble_target_is_the_mean_of_probabilities():
    a = torch.tensor([[0.0, math.log(3.0)]])
    b = torch.tensor([[0.0, 0.0]])
    torch.testing.assert_close(ensemble_target([a, b]), torch.tensor([[0.375, 0.625]]))


def test_sgs_loss_takes_logits_once():
    """By hand: probabilities (1/4, 3/4); an easy row wants the first, a hard row the last."""
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)
    easy = torch.tensor([True, False])
    expected = (-math.log(0.25) - math.log(0.75)) / 2
    assert sgs_loss([logits], easy).item() == pytest.approx(expected)
    # the mean over gates, whatever their number of choices
    three = torch.zeros(2, 3)
    assert sgs_loss([logits, three], easy).item() == pytest.approx((expected + math.log(3)) / 2)


def test_sgs_loss_with_a_share_for_easy_images():
    logits = torch.tensor([[0.0, math.log(3.0)]] * 4)
    easy = torch.tensor([True, True, True, False])
    easy_term, hard_term = -math.log(0.25), -math.log(0.75)
    plain = (3 * easy_term + hard_term) / 4
    assert sgs_loss([logits], easy).item() == pytest.approx(plain)
    balanced = sgs_loss([logits], easy, easy_share=0.5).item()
    assert balanced == pytest.approx((easy_term + hard_term) / 2)
    everyone = torch.ones(4, dtype=torch.bool)
    assert sgs_loss([logits], everyone, easy_share=0.5).item() == pytest.approx(easy_term)


def test_cost_loss_by_hand():
    assert cost_loss(torch.tensor([1.0, 3.0]), 4.0).item() == 0.25


@pytest.mark.parametrize(
    ("easy", "hopeless", "target"),
    [(True, False, 0), (False, False, 1), (False, True, 0), (True, True, 0)],
    ids=["easy", "hard", "given up", "right on the narrowest alone"],
)
def test_giving_up_by_hand(easy, hopeless, target):
    """Probabilities (1/4, 3/4): the loss shows which end was the target."""
    logits, three = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0, math.log(2.0)]])
    easy_B, hopeless_B = torch.tensor([easy]), torch.tensor([hopeless])
    assert sgs_target(easy_B, 4, hopeless_B).tolist() == [3 * target]
    two_end, three_end = -math.log([0.25, 0.75][target]), -math.log([0.25, 0.5][target])
    loss = sgs_loss([logits], easy_B, hopeless_B=hopeless_B).item()
    assert loss == pytest.approx(two_end)
    loss = sgs_loss([logits, three], easy_B, hopeless_B=hopeless_B).item()
    assert loss == pytest.approx((two_end + three_end) / 2)
    # without giving up, who is not easy tries its best
    assert sgs_target(easy_B, 4).tolist() == [0 if easy else 3]


def test_weights_of_the_images():
    easy = torch.tensor([True, False, False, False])
    hopeless = torch.tensor([False, True, False, False])
    assert sgs_weights(easy, None).tolist() == [0.25] * 4
    assert sgs_weights(easy, None, hopeless).tolist() == [0.25] * 4
    assert sgs_weights(easy, 0.4).tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2])
    # the share is that of all images labelled with the first choice
    assert sgs_weights(easy, 0.4, hopeless).tolist() == pytest.approx([0.2, 0.2, 0.3, 0.3])
    assert sgs_weights(easy, 0.4, ~easy).tolist() == [0.25] * 4
