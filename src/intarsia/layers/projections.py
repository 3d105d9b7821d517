"""Linear maps as layers use them."""

from __future__ import annotations

from torch import nn


def linear(d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
    """A linear map with PyTorch's initial weights and, where it has one, a bias that begins at zero."""
    module = nn.Linear(d_in, d_out, bias=bias)
    if bias:
        nn.init.zeros_(module.bias)
    return module


def low_rank(d_in: int, d_out: int, rank: int | None, bias: bool = False) -> nn.Module:
    """A projection through `rank` dimensions, or a plain one where the rank is None; the bias is that of the output."""
    if rank is None:
        return linear(d_in, d_out, bias)
    return nn.Sequential(linear(d_in, rank), linear(rank, d_out, bias))
