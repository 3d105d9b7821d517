"""Several residual streams, read through gates of low rank and written to one by one (Qwen3.8-Flash-Next, 2026)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.norm import RMSNorm
from intarsia.ops.precision import widen


class StreamNorm(RMSNorm):
    """RMSNorm of each of N streams `[..., N, D]`, with weights of its own: `[N D]` in all."""

    def __init__(self, streams: int, d_model: int, eps: float = 1e-5, zero_centered: bool = False) -> None:
        super().__init__(streams * d_model, eps, zero_centered)

    def forward(self, x: Tensor) -> Tensor:
        """In float32, and in the dtype of x again."""
        wide = widen(x)
        weight = self.weight.to(wide.dtype).view(x.shape[-2:])
        y = F.rms_norm(wide, x.shape[-1:], None, self.eps)
        return (y * (1 + weight if self.zero_centered else weight)).to(x.dtype)


class Written(NamedTuple):
    """What a part's output is joined to."""

    x: Tensor
    """The streams before the part, `[B, T, N, D]`."""
    writing: Tensor
    """How much of the output each stream takes, `[B, T, N]`."""

    def with_output(self, y: Tensor) -> Tensor:
        """The streams after the output `[B, T, D]` of the part."""
        return self.x + self.writing.to(y.dtype).unsqueeze(-1) * y.unsqueeze(-2)


class GatedStreams(nn.Module):
    """How one part of a block reads N streams, of which n are the normed ones, and is written to them:

        h = 1/N sum_n sigmoid(U_n silu(L n / N)) * n_n           n as one vector of N D, L of `rank` rows
        x_n <- x_n + 2 sigmoid(w_n · n / N) f(h)

    Behind the last block there is nothing to write.
    """

    def __init__(self, d_model: int, streams: int, rank: int, writes: bool = True) -> None:
        super().__init__()
        self.streams = streams
        self.read_down = nn.Linear(streams * d_model, rank, bias=False)
        self.read_up = nn.Linear(rank, streams * d_model, bias=False)
        self.write_proj = nn.Linear(streams * d_model, streams, bias=False) if writes else None

    def forward(self, normed: Tensor) -> Tensor:
        """What the part is given of the normed streams `[B, T, N, D]`: `[B, T, D]`."""
        gate = self.read_up(F.silu(self.read_down(normed.flatten(-2)) / self.streams))
        return (torch.sigmoid(gate).view(normed.shape) * normed).mean(-2)

    def enter(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Written]:
        """The same, and what its output is joined to, of the streams `x` and the normed ones."""
        assert self.write_proj is not None
        writing = 2 * torch.sigmoid(self.write_proj(normed.flatten(-2)) / self.streams)
        return self(normed), Written(x, writing)

    @staticmethod
    def parameters_of(d_model: int, streams: int, rank: int, writes: bool = True) -> int:
        """How many parameters one has."""
        return streams * d_model * (2 * rank + (streams if writes else 0))

    @staticmethod
    def flops_of(d_model: int, streams: int, rank: int, writes: bool = True) -> int:
        """FLOPs per token: the products with the weights, and the streams read and written."""
        products = 2 * GatedStreams.parameters_of(d_model, streams, rank, writes)
        return products + 2 * streams * d_model * (2 if writes else 1)
