import torch
from torch.nn import functional as F

from dynaslim.nn.functional import argmax_one_hot, gated_batch_norm, gumbel_one_hot


def test_gated_batch_norm_is_each_rows_own_and_ignores_junk_beyond():
    x = torch.randn(3, 4, 2, 2)
    mean, var = torch.randn(2, 4), torch.rand(2, 4) + 0.5
    weight, bias = torch.randn(4), torch.randn(4)
    mean[0, 2:] = float("nan")  # the narrow set's values beyond its width
    var[0, 2:] = float("inf")
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    out = gated_batch_norm(x, mean, var, weight, bias, gate, [2, 4], eps=1e-5)
    for row, (slot, channels) in enumerate([(0, 2), (1, 4), (0, 2)]):
        alone = F.batch_norm(
            x[row : row + 1, :channels],
            mean[slot, :channels],
            var[slot, :channels],
            weight[:channels],
            bias[:channels],
        )
        torch.testing.assert_close(out[row : row + 1, :channels], alone)
        assert torch.equal(out[row, channels:], torch.zeros_like(out[row, channels:]))


def test_argmax_one_hot_takes_the_cheaper_of_ties():
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [-1.0, -2.0, 5.0]])
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(argmax_one_hot(logits), expected)


def test_gumbel_one_hot_is_one_hot_and_samples_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(20_000, 1)
    gates = gumbel_one_hot(logits, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(gates.sum(1), torch.ones(len(gates)))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    # 4 standard deviations of a share over 20,000 draws are 0.014
    torch.testing.assert_close(gates.mean(0), logits[0].softmax(0), atol=0.014, rtol=0)


def test_gumbel_one_hot_has_the_soft_gradient():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, dtype=torch.float64)
    (gumbel_one_hot(logits, 0.7, torch.Generator().manual_seed(1)) @ values).sum().backward()

    noise = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(1))
    again = logits.detach().clone().requires_grad_()
    soft = ((again - noise.log()) / 0.7).softmax(1)
    (soft @ values).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)
