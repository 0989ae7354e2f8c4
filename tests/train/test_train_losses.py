import math

import pytest
import torch

from dynaslim.train.losses import (
    sgs_loss,
    sgs_target,
    sgs_weights,
)


def test_sgs_loss_takes_logits_once():
    """By hand: probabilities (1/4, 3/4); an easy row wants the first, a hard row the last."""
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)
    easy = torch.tensor([True, False])
    expected = (-math.log(0.25) - math.log(0.75)) / 2
    assert sgs_loss([logits], easy).item() == pytest.approx(expected)
    # the mean over gates, whatever their number of choices
    three = torch.zeros(2, 3)
    assert sgs_loss([logits, three], easy).item() == pytest.approx((expected + math.log(3)) / 2)


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
