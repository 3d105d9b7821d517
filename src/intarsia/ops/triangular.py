"""Lower triangular matrices built from blocks by doubling.

A matrix of size C (a power of two) is its diagonal and, for each block size s = 1, 2, 4 … C/2, the corners:
the C / 2s square blocks of size s whose rows are the second half, and whose columns the first half, of a
block of 2s on the diagonal. The two functions here have hand-written gradients, because autograd would copy
the whole matrix once for every size; the transforms of `torch.func`, which cannot see those, get plain forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intarsia.ops.tracing import transform


def corners(matrix: Tensor, size: int) -> Tensor:
    """A view of the corners of the given size, `[..., C, C]` to `[..., C / 2 size, size, size]`."""
    pairs = matrix.unflatten(-2, (-1, 2, size)).unflatten(-1, (-1, 2, size))
    return pairs[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """A view of the blocks on the diagonal, `[..., C, C]` to `[..., C / size, size, size]`."""
    blocks = matrix.unflatten(-2, (-1, size)).unflatten(-1, (-1, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class _FromCorners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, *levels: Tensor) -> Tensor:
        matrix = torch.diag_embed(diagonal)
        for level, blocks in enumerate(levels):
            corners(matrix, 1 << level).copy_(blocks)
        return matrix

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        levels = range(len(ctx.needs_input_grad) - 1)
        return grad.diagonal(dim1=-2, dim2=-1), *(corners(grad, 1 << level) for level in levels)


def from_corners(diagonal: Tensor, levels: list[Tensor]) -> Tensor:
    """The matrix `[..., C, C]` from its diagonal `[..., C]` and its corners of sizes 1, 2, 4 …, zero above."""
    if transform() is None:
        return _FromCorners.apply(diagonal, *levels)
    blocks = diagonal[..., None, None]
    for corner in levels:
        first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        above = torch.cat([first, torch.zeros_like(corner)], dim=-1)
        blocks = torch.cat([above, torch.cat([corner, second], dim=-1)], dim=-2)
    return blocks.squeeze(-3)


class _UnitLowerInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: Tensor) -> Tensor:
        C = n.shape[-1]
        inverse = torch.diag_embed(torch.ones_like(n[..., 0]))
        size = 1
        while size < C:
            first, second = _blocks(inverse, size).unflatten(-3, (-1, 2)).unbind(-3)
            corner = corners(n, size)
            if size > 1:
                corner = second @ corner @ first
            corners(inverse, size).copy_(-corner)
            size *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def unit_lower_inverse(n: Tensor) -> Tensor:
    """`(I + n)^-1` `[..., C, C]`; of `n` only what lies below the diagonal counts. C is a power of two.

    By doubling: `[[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]`.
    """
    if transform() is None:
        return _UnitLowerInverse.apply(n)
    one = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device)
    return torch.linalg.solve_triangular(n.tril(-1), one.expand_as(n), upper=False, unitriangular=True)
