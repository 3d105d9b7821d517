"""Products of decay factors inside a chunk, built by doubling.

`x_j decayed from j to i` is x_j times the product of the factors `exp(g)` of the tokens j + 1 … i. Two
neighbouring blocks of tokens that know the decay from their own start and to their own end become one block
with one multiplication each, and the rows of the second times the columns of the first give all scores
between the two: `(q_i decayed from the middle) · (k_j decayed to the middle)`.

Only factors in [0, 1] are ever multiplied; no logarithms are subtracted and nothing is divided. So there is
no overflow, `g = -inf` is a plain zero, gradients are finite, no `[C, C, K]` tensor appears, the error is a
few roundings however strong the decay, and nothing depends on a later token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from intarsia.ops.triangular import corners, from_corners


def decay_matrix(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The products of factors `alpha` `[..., C]` from the start through each token, `[..., C]`; after each
    token to the end, `[..., C]`; and after j through i, `[..., C, C]` (row i, column j; one on the diagonal,
    zero above)."""
    from_start = alpha[..., None]
    to_end = torch.ones_like(from_start)
    levels = []
    while from_start.shape[-2] > 1:
        start_1, start_2 = from_start.unflatten(-2, (-1, 2)).unbind(-2)
        end_1, end_2 = to_end.unflatten(-2, (-1, 2)).unbind(-2)
        levels.append(start_2[..., :, None] * end_1[..., None, :])
        from_start = torch.cat([start_1, start_2 * start_1[..., -1:]], dim=-1)
        to_end = torch.cat([end_1 * start_2[..., -1:], end_2], dim=-1)
    return from_start.squeeze(-2), to_end.squeeze(-2), from_corners(torch.ones_like(alpha), levels)


def channel_scores(
    q: Tensor, k: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores with factors of each channel; all arguments `[..., C, K]`, C a power of two.

    Returns:
        `qk` and `kk` `[..., C, C]`: `q_i · k_j` and `k_i · k_j` with k decayed from j to i; zero above the
        diagonal, and `kk` on it; then q and k decayed from the start, k decayed to the end, `[..., C, K]`, and
        the decay of the whole chunk `[..., K]`.
    """
    return _ChannelScores.apply(q, k, alpha)


def _pairs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Views of the first and the second of each pair of blocks: `[..., C, K]` to two `[..., n, size, K]`."""
    first, second = x.unflatten(-2, (-1, 2, size)).unbind(-3)
    return first, second


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.mT`; for blocks of one token without the overhead of a product of matrices."""
    if rows.shape[-2] == 1:
        return (rows * columns).sum(-1, keepdim=True)
    return rows @ columns.mT


def _sizes(chunk: int) -> Iterator[int]:
    """1, 2, 4 … chunk / 2."""
    return (1 << level for level in range(chunk.bit_length() - 1))


class _ChannelScores(torch.autograd.Function):
    """Keeps only its inputs and computes the levels again in backward: memory O(C K) a chunk, once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, alpha)
        qk = torch.diag_embed((q * k).sum(-1))
        kk = torch.zeros_like(qk)
        q_start, k_start, k_end, total = q * alpha, k * alpha, k.clone(), alpha
        for size in _sizes(q.shape[-2]):
            (_, q_2), (_, k_2), (end_1, _) = (_pairs(x, size) for x in (q_start, k_start, k_end))
            corners(qk, size).copy_(_product(q_2, end_1))
            corners(kk, size).copy_(_product(k_2, end_1))
            total_1, total_2 = _pairs(total, 1)
            q_2.mul_(total_1)
            k_2.mul_(total_1)
            end_1.mul_(total_2)
            total = (total_1 * total_2).squeeze(-2)
        return qk, kk, q_start, k_start, k_end, total.squeeze(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, alpha = ctx.saved_tensors
        d_qk, d_kk, d_q_start, d_k_start, d_k_end, d_total = grads
        # Forward once more, keeping what each level reads: the second rows, the first columns, the totals.
        q_start, k_start, k_end, total = q * alpha, k * alpha, k.clone(), alpha
        levels = []
        for size in _sizes(q.shape[-2]):
            (_, q_2), (_, k_2), (end_1, _) = (_pairs(x, size) for x in (q_start, k_start, k_end))
            total_1, total_2 = _pairs(total, 1)
            levels.append((size, q_2.clone(), k_2.clone(), end_1.clone(), total_1, total_2))
            q_2.mul_(total_1)
            k_2.mul_(total_1)
            end_1.mul_(total_2)
            total = (total_1 * total_2).squeeze(-2)
        # Then down again, from the whole chunk to single tokens.
        d_q, d_k, d_end = d_q_start.clone(), d_k_start.clone(), d_k_end.clone()
        d_total = d_total.unsqueeze(-2)
        for size, q_2, k_2, end_1, total_1, total_2 in reversed(levels):
            (_, d_q_2), (_, d_k_2), (d_end_1, _) = (_pairs(x, size) for x in (d_q, d_k, d_end))
            d_total = d_total.unsqueeze(-2)
            d_total_1 = d_total * total_2 + (d_q_2 * q_2 + d_k_2 * k_2).sum(-2, keepdim=True)
            d_total_2 = d_total * total_1 + (d_end_1 * end_1).sum(-2, keepdim=True)
            d_total = torch.cat([d_total_1, d_total_2], dim=-2).flatten(-3, -2)
            d_corner_q, d_corner_k = corners(d_qk, size), corners(d_kk, size)
            d_q_2.mul_(total_1).add_(d_corner_q @ end_1)
            d_k_2.mul_(total_1).add_(d_corner_k @ end_1)
            d_end_1.mul_(total_2).add_(d_corner_q.mT @ q_2).add_(d_corner_k.mT @ k_2)
        d_diagonal = d_qk.diagonal(dim1=-2, dim2=-1)[..., None]
        d_alpha = d_total.addcmul_(d_q, q).addcmul_(d_k, k)
        d_k = d_k.mul_(alpha).add_(d_end).addcmul_(d_diagonal, q)
        return d_q.mul_(alpha).addcmul_(d_diagonal, k), d_k, d_alpha
