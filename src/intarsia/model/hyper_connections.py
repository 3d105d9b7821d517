"""Manifold-constrained hyper-connections: several residual streams, which each part of a block reads and writes (Xie et
al. 2025, arXiv:2512.24880; GLM-5.3-Flash)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.layers.float32 import KeepsFloat32
from intarsia.model.config import HyperConnectionsConfig
from intarsia.ops.precision import without_autocast


class Joined(NamedTuple):
    """What a part's output is joined to."""

    mixed: Tensor
    """The streams among each other, `[B, T, N, D]`."""
    writing: Tensor
    """How much of the output each stream takes, `[B, T, N]`."""

    def with_output(self, y: Tensor) -> Tensor:
        """The streams after the output `[B, T, D]` of the part."""
        return self.mixed + self.writing.to(y.dtype).unsqueeze(-1) * y.unsqueeze(-2)


class HyperConnection(FillsItself, KeepsFloat32):
    """How one part of a block reads N streams `x` and is written to them, for each token anew:

        a, b, M = split(W rms(x))                                        x as one vector of N D
        h = sum_n (sigmoid(s_1 a_n + c_n) + eps) x_n                     what the part is given
        x <- C^T x + 2 sigmoid(s_2 b + c) f(h)                           with C = sinkhorn(softmax(s_3 M + c) + eps)

    `sinkhorn` divides columns and then, `iterations - 1` times, rows and columns by their sums (plus eps), so that C
    is nearly doubly stochastic and no stream grows. Parameters, in float32: `weight` `[(2 + N) N, N D]`, `base`
    `[(2 + N) N]` (the c) and `scale` `[3]` (the s).
    """

    float32_names: ClassVar[tuple[str, ...]] = ("weight", "base", "scale")

    def __init__(self, d_model: int, config: HyperConnectionsConfig, norm_eps: float) -> None:
        super().__init__()
        self.config, self.norm_eps = config, norm_eps
        N = config.streams
        self.weight = nn.Parameter(torch.empty((2 + N) * N, N * d_model, dtype=torch.float32))
        self.base = nn.Parameter(torch.empty((2 + N) * N, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(3, dtype=torch.float32))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        self.weight.normal_(0, std, generator=generator_of("weight"))
        nn.init.zeros_(self.base)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Joined]:
        """From the streams `[B, T, N, D]` to what the part is given, `[B, T, D]`, and what its output is joined to."""
        N, eps = self.config.streams, self.config.eps
        with without_autocast(x):
            wide = x.to(self.weight.dtype)
            flat = wide.flatten(-2)
            flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.norm_eps)
            raw = F.linear(flat, self.weight).split([N, N, N * N], dim=-1)
            reading, writing, mixing = (
                part * scale + base
                for part, scale, base in zip(raw, self.scale, self.base.split([N, N, N * N]), strict=True)
            )
            h = ((torch.sigmoid(reading) + eps).unsqueeze(-1) * wide).sum(-2)
            shares = mixing.unflatten(-1, (N, N)).softmax(-1) + eps
            shares = shares / (shares.sum(-2, keepdim=True) + eps)
            for _ in range(self.config.iterations - 1):
                shares = shares / (shares.sum(-1, keepdim=True) + eps)
                shares = shares / (shares.sum(-2, keepdim=True) + eps)
            mixed = shares.mT @ wide
        return h.to(x.dtype), Joined(mixed.to(x.dtype), 2 * torch.sigmoid(writing))

    @staticmethod
    def parameters_of(d_model: int, config: HyperConnectionsConfig) -> int:
        """How many parameters one has."""
        N = config.streams
        return (2 + N) * N * (N * d_model + 1) + 3

    @staticmethod
    def flops_of(d_model: int, config: HyperConnectionsConfig) -> int:
        """FLOPs per token: the product with the weight, and the streams read, mixed and written."""
        N = config.streams
        return 2 * (2 + N) * N * N * d_model + 2 * d_model * (2 * N + N * N)
