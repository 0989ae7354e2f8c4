"""The double-headed gate: an attention head on the channels and a slimming head over widths.

Suffixes: B rows, C channels in use, R hidden width, K choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynaslim.spec import Attention


class Gate(nn.Module):
    """Global average pool, hidden layer, then up to two heads (arXiv 2103.13258, section 3.3).

    The attention head scales the features channel by channel, either by a sigmoid or by `1 + tanh`
    with zero-initialised weights, which starts as the identity. With `attention` None there is no
    attention head. The slimming head exists if `choices` is not 0: it gives one logit per choice,
    has no bias and reads the hidden layer, as in the released code. Both heads are linear layers
    on pooled features, which equal the paper's 1x1 convolutions.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        choices: int,
        attention: Attention | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = attention

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.reduce_weight = parameter(hidden, channels)
        self.reduce_bias = parameter(hidden)
        self.expand_weight = None if attention is None else parameter(channels, hidden)
        self.expand_bias = None if attention is None else parameter(channels)
        self.slimming_weight = parameter(choices, hidden) if choices else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights; the slimming head starts with hardly any preference."""
        hidden, channels = self.reduce_weight.shape
        nn.init.uniform_(self.reduce_weight, -1 / math.sqrt(channels), 1 / math.sqrt(channels))
        nn.init.zeros_(self.reduce_bias)
        if self.expand_weight is not None and self.expand_bias is not None:
            reach = 0.0 if self.attention == "one_plus_tanh" else 1 / math.sqrt(hidden)
            nn.init.uniform_(self.expand_weight, -reach, reach)
            nn.init.zeros_(self.expand_bias)
        if self.slimming_weight is not None:
            nn.init.normal_(self.slimming_weight, std=0.01)

    def hidden(self, pooled_BC: Tensor) -> Tensor:
        """The hidden features (B, R), never negative, that both heads read."""
        weight_RC = self.reduce_weight[:, : pooled_BC.shape[1]]
        return torch.relu(F.linear(pooled_BC, weight_RC, self.reduce_bias))

    def decide(self, hidden_BR: Tensor) -> Tensor:
        """The slimming logits (B, K)."""
        assert self.slimming_weight is not None, "this block has no slimming head"
        return F.linear(hidden_BR, self.slimming_weight)

    def attend(self, x_BCHW: Tensor, hidden_BR: Tensor) -> Tensor:
        """The features scaled by the attention head, or unchanged if there is none."""
        if self.expand_weight is None or self.expand_bias is None:
            return x_BCHW
        channels = x_BCHW.shape[1]
        scale_BC = F.linear(hidden_BR, self.expand_weight[:channels], self.expand_bias[:channels])
        if self.attention == "sigmoid":
            scale_BC = torch.sigmoid(scale_BC)
        else:
            scale_BC = 1.0 + torch.tanh(scale_BC)
        return x_BCHW * scale_BC[:, :, None, None]

    def forward(
        self, x_BCHW: Tensor, seen_BCHW: Tensor | None = None, *, decide: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The scaled features, and the slimming logits (B, K) if `decide`, else None.

        The hidden layer reads `seen_BCHW`, or `x_BCHW` if that is None.
        """
        if self.expand_weight is None and not decide:
            return x_BCHW, None
        hidden_BR = self.hidden((x_BCHW if seen_BCHW is None else seen_BCHW).mean((2, 3)))
        return self.attend(x_BCHW, hidden_BR), self.decide(hidden_BR) if decide else None
