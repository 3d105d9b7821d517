"""Residuals that attend to earlier layers: each part of a block is given a mixture of what has come to be below it
(Kimi K3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.ops.precision import widen


class Grown(NamedTuple):
    """What a part's output is added to."""

    sources: Tensor
    """`[B, T, N, D]`, of which the last goes on."""
    begins: bool
    """Whether the part begins a new group of layers: its output is then a source of its own."""

    def with_output(self, y: Tensor) -> Tensor:
        """The sources after the output `[B, T, D]` of the part, `[B, T, N, D]` or one more."""
        y = y.unsqueeze(-2)
        if self.begins:
            return torch.cat([self.sources, y], dim=-2)
        done, last = self.sources[..., :-1, :], self.sources[..., -1:, :]
        return torch.cat([done, last + y], dim=-2)


class AttentionResidual(FillsItself):
    """How one part of a block reads N sources `x`: the embedding, then of each group of layers that has ended the sum
    of what its parts gave, and last the same of the group that goes on:

        p = softmax_n(u · (w * rmsnorm(x_n)))        h = sum_n p_n x_n

    The first mixer of a group still reads what the group before has given as one that goes on, and begins a sum anew.
    Parameters: `weight` `[D]` (w) and `query` `[D]` (u). It computes in float32.
    """

    def __init__(self, d_model: int, norm_eps: float, begins: bool = False) -> None:
        super().__init__()
        self.norm_eps, self.begins = norm_eps, begins
        self.weight = nn.Parameter(torch.empty(d_model))
        self.query = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        """All sources count alike in the beginning."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.query)

    def forward(self, x: Tensor) -> tuple[Tensor, Grown]:
        """From the sources `[B, T, N, D]` to what the part is given, `[B, T, D]`, and what its output is added to."""
        wide = widen(x)
        asked = self.weight.to(wide.dtype) * self.query.to(wide.dtype)
        size = torch.rsqrt(wide.square().mean(-1) + self.norm_eps)
        shares = ((wide * asked).sum(-1) * size).softmax(-1)
        h = (shares.unsqueeze(-1) * wide).sum(-2)
        return h.to(x.dtype), Grown(x, self.begins)

    @staticmethod
    def parameters_of(d_model: int) -> int:
        """How many parameters one has."""
        return 2 * d_model

    @staticmethod
    def flops_of(d_model: int, sources: int) -> int:
        """FLOPs per token: scores and their mixture."""
        return 4 * sources * d_model
