"""Linear maps as layers use them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def weight_of(module: nn.Module, d_in: int) -> Tensor:
    """The matrix `[d_out, d_in]` of a linear map without bias. Where another library has put something else in its
    place, as adapters do, that is what it does to unit vectors."""
    if type(module) is nn.Linear:
        return module.weight
    known = next(module.parameters())
    transposed: Tensor = module(torch.eye(d_in, dtype=known.dtype, device=known.device))
    return transposed.mT


def split_heads(x: Tensor, *shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    """The parts of `x` `[..., channels]`, each with the shape `(heads, channels of a head)`: `[..., heads, dim]`."""
    parts = x.split([heads * dim for heads, dim in shapes], dim=-1)
    return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))
