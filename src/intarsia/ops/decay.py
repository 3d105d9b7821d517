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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.tracing import differentiable_gradients, sizes, transform
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


Moment = Literal["before", "decayed", "written"]


@dataclass(frozen=True)
class Row:
    """What reads the board at each token, `x` `[..., C, K]`, and when: `"before"` the token touches it, after it
    `"decayed"`, or after it was also `"written"`."""

    x: Tensor
    moment: Moment


@dataclass(frozen=True)
class Scores:
    """What the rows of a chunk find of its columns, and of the board at the chunk's start.

    `between[r][c]` `[..., C, C]`: row i times column j decayed from j to i. Of a row `"written"` it is lower
    triangular; of the others only what lies below the diagonal counts, and of a row `"before"` the rest is zero.
    `starts[r]`: the rows decayed from the chunk's start; `ends[c]`: the columns decayed to its end, `[..., C, K]`.
    `total`: the decay of the whole chunk, broadcastable to `[..., K, 1]`, or None without decay.
    """

    between: list[list[Tensor]]
    starts: list[Tensor]
    ends: list[Tensor]
    total: Tensor | None


def scores(rows: Sequence[Row], columns: Sequence[Tensor], alpha: Tensor | None) -> Scores:
    """The scores of chunks of C tokens, a power of two; rows and columns are `[..., C, K]`.

    `alpha` holds decay factors in [0, 1]: None, one of each token `[..., C]`, or of each channel `[..., C, K]`.
    """
    # The upper triangle is cleared and not only multiplied by a decay of 0: later columns can make it infinite.
    diagonals = {"written": 0, "decayed": -1, "before": -1}
    if alpha is None:
        between = [[(row.x @ c.mT).tril(diagonals[row.moment]) for c in columns] for row in rows]
        return Scores(between, [row.x for row in rows], list(columns), None)
    if alpha.dim() == columns[0].dim():
        return channel_scores(rows, columns, alpha)
    from_start, to_end, matrix = decay_matrix(alpha)
    # Before its own decay a token sees what the token before it saw after its own.
    decays = {"written": (matrix, from_start), "decayed": (matrix, from_start)}
    if any(row.moment == "before" for row in rows):
        decays["before"] = (
            F.pad(matrix[..., :-1, :], (0, 0, 1, 0)),
            F.pad(from_start[..., :-1], (1, 0), value=1),
        )
    return Scores(
        [
            [(row.x @ c.mT * decays[row.moment][0]).tril(diagonals[row.moment]) for c in columns]
            for row in rows
        ],
        [row.x * decays[row.moment][1][..., None] for row in rows],
        [c * to_end[..., None] for c in columns],
        from_start[..., -1, None, None],
    )


def channel_scores(rows: Sequence[Row], columns: Sequence[Tensor], alpha: Tensor) -> Scores:
    """`scores` with factors of each channel, `[..., C, K]`."""
    moments = tuple(row.moment for row in rows)
    if transform() is not None:
        flat = _plain_channel_scores(moments, alpha, [row.x for row in rows], columns)
        between, starts, ends = _unflatten(flat[:-1], len(rows), len(columns))
        return Scores(between, starts, ends, flat[-1][..., None])
    # Views, because torch.compile takes no tensor twice, and the delta rule's keys are rows and columns.
    views = (c.view_as(c) for c in columns)
    flat = _ChannelScores.apply(moments, alpha, *(row.x for row in rows), *views)
    between, starts, ends = _unflatten(flat[:-1], len(rows), len(columns))
    return Scores(between, starts, ends, flat[-1][..., None])


def _unflatten(
    flat: Sequence[Tensor], rows: int, columns: int
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """`between`, `starts` and `ends` from one after the other."""
    cells = rows * columns
    between = [list(flat[i : i + columns]) for i in range(0, cells, columns)]
    return between, list(flat[cells : cells + rows]), list(flat[cells + rows :])


def _pairs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Views of the first and the second of each pair of blocks: `[..., C, K]` to two `[..., n, size, K]`."""
    first, second = x.unflatten(-2, (-1, 2, size)).unbind(-3)
    return first, second


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.mT`; for blocks of one token without the overhead of a product of matrices."""
    if rows.shape[-2] == 1:
        return (rows * columns).sum(-1, keepdim=True)
    return rows @ columns.mT


def _sizes(x: Tensor) -> Iterator[int]:
    """1, 2, 4 … C / 2 for `[..., C, K]`."""
    return (1 << level for level in range(sizes(x)[-2].bit_length() - 1))


class _Doubling:
    """The blocks of a chunk while neighbours become one: rows decayed from their block's start, columns to its
    end, and each block's total. All of them are changed in place."""

    def __init__(
        self, moments: tuple[Moment, ...], rows: Sequence[Tensor], columns: Sequence[Tensor], alpha: Tensor
    ) -> None:
        self.starts = [
            x.clone() if moment == "before" else x * alpha for moment, x in zip(moments, rows, strict=True)
        ]
        self.ends = [x.clone() for x in columns]
        self.total = alpha

    def level(self, size: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """What meets when blocks of `size` tokens are paired: the rows of the second, the columns of the first
        (views, `[..., n, size, K]`), and both totals `[..., n, 1, K]`."""
        first_total, second_total = _pairs(self.total, 1)
        second_rows = [_pairs(x, size)[1] for x in self.starts]
        first_columns = [_pairs(x, size)[0] for x in self.ends]
        return second_rows, first_columns, first_total, second_total

    def merge(self, rows: list[Tensor], columns: list[Tensor], total_1: Tensor, total_2: Tensor) -> None:
        """Make one block of each pair, from what `level` gave."""
        for row in rows:
            row.mul_(total_1)
        for column in columns:
            column.mul_(total_2)
        self.total = (total_1 * total_2).squeeze(-2)


class _ChannelScores(torch.autograd.Function):
    """Keeps only its inputs and computes the levels again in backward: memory O(C K) a chunk, once. A backward pass
    that is itself to be differentiated is that of the plain form."""

    @staticmethod
    def forward(
        ctx: Any, moments: tuple[Moment, ...], alpha: Tensor, *rows_and_columns: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.moments = moments
        ctx.save_for_backward(alpha, *rows_and_columns)
        rows, columns = rows_and_columns[: len(moments)], rows_and_columns[len(moments) :]
        between = [
            [torch.diag_embed((x * c).sum(-1)) if moment == "written" else _zero_matrix(x) for c in columns]
            for moment, x in zip(moments, rows, strict=True)
        ]
        blocks = _Doubling(moments, rows, columns, alpha)
        for size in _sizes(alpha):
            level = second_rows, first_columns, _, _ = blocks.level(size)
            for row, matrices in zip(second_rows, between, strict=True):
                for column, matrix in zip(first_columns, matrices, strict=True):
                    corners(matrix, size).copy_(_product(row, column))
            blocks.merge(*level)
        return (
            *(matrix for row in between for matrix in row),
            *blocks.starts,
            *blocks.ends,
            blocks.total.squeeze(-2),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: activation checkpointing gives them once
        alpha, *rows_and_columns = saved
        moments = ctx.moments
        rows, columns = rows_and_columns[: len(moments)], rows_and_columns[len(moments) :]
        if torch.is_grad_enabled():

            def plain(alpha: Tensor, *both: Tensor) -> tuple[Tensor, ...]:
                return _plain_channel_scores(moments, alpha, both[: len(moments)], both[len(moments) :])

            return None, *differentiable_gradients(plain, saved, grads)
        # Forward once more, keeping what each level reads.
        blocks = _Doubling(moments, rows, columns, alpha)
        levels = []
        for size in _sizes(alpha):
            level = second_rows, first_columns, total_1, total_2 = blocks.level(size)
            kept = [x.clone() for x in second_rows], [x.clone() for x in first_columns]
            levels.append((size, *kept, total_1, total_2))
            blocks.merge(*level)
        # Then down again, from the whole chunk to single tokens.
        d_between, d_starts, d_ends = _unflatten(grads[:-1], len(rows), len(columns))
        d_rows, d_columns = [d.clone() for d in d_starts], [d.clone() for d in d_ends]
        d_total = grads[-1].unsqueeze(-2).clone()
        for size, second_rows, first_columns, total_1, total_2 in reversed(levels):
            d_second_rows = [_pairs(d, size)[1] for d in d_rows]
            d_first_columns = [_pairs(d, size)[0] for d in d_columns]
            d_total = d_total.unsqueeze(-2)
            d_total_1 = d_total * total_2 + _dot(d_second_rows, second_rows)
            d_total_2 = d_total * total_1 + _dot(d_first_columns, first_columns)
            d_total = torch.cat([d_total_1, d_total_2], dim=-2).flatten(-3, -2)
            for d_column in d_first_columns:
                d_column.mul_(total_2)
            for row, d_row, d_matrices in zip(second_rows, d_second_rows, d_between, strict=True):
                d_row.mul_(total_1)
                for column, d_column, d_matrix in zip(
                    first_columns, d_first_columns, d_matrices, strict=True
                ):
                    d_corner = corners(d_matrix, size)
                    d_row.add_(d_corner @ column)
                    d_column.add_(d_corner.mT @ row)
        for moment, row, d_row, d_matrices in zip(moments, rows, d_rows, d_between, strict=True):
            if moment != "before":
                d_total.addcmul_(d_row, row)
                d_row.mul_(alpha)
            if moment == "written":
                for column, d_column, d_matrix in zip(columns, d_columns, d_matrices, strict=True):
                    d_diagonal = d_matrix.diagonal(dim1=-2, dim2=-1)[..., None]
                    d_row.addcmul_(d_diagonal, column)
                    d_column.addcmul_(d_diagonal, row)
        return None, d_total, *d_rows, *d_columns


def _plain_channel_scores(
    moments: tuple[Moment, ...], alpha: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """What `_ChannelScores` gives, with nothing changed in place."""
    starts = [x if moment == "before" else x * alpha for moment, x in zip(moments, rows, strict=True)]
    ends, total = list(columns), alpha
    levels: list[list[list[Tensor]]] = [[[] for _ in columns] for _ in rows]
    for size in _sizes(alpha):
        total_1, total_2 = _pairs(total, 1)
        row_pairs, column_pairs = [_pairs(x, size) for x in starts], [_pairs(x, size) for x in ends]
        for (_, second), found in zip(row_pairs, levels, strict=True):
            for (first, _), corner in zip(column_pairs, found, strict=True):
                corner.append(second @ first.mT)
        starts = [torch.cat([a, b * total_1], dim=-2).flatten(-3, -2) for a, b in row_pairs]
        ends = [torch.cat([a * total_2, b], dim=-2).flatten(-3, -2) for a, b in column_pairs]
        total = (total_1 * total_2).squeeze(-2)
    between = [
        from_corners((x * c).sum(-1) if moment == "written" else torch.zeros_like(x[..., 0]), corner)
        for moment, x, found in zip(moments, rows, levels, strict=True)
        for c, corner in zip(columns, found, strict=True)
    ]
    return *between, *starts, *ends, total.squeeze(-2)


def _zero_matrix(x: Tensor) -> Tensor:
    """`[..., C, K]` to zeros `[..., C, C]`."""
    return x.new_zeros(*x.shape[:-1], x.shape[-2])


def _dot(gradients: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The sum over the tokens of each block of all products, `[..., n, size, K]` to `[..., n, 1, K]`."""
    products = gradients[0] * values[0]
    for gradient, value in zip(gradients[1:], values[1:], strict=True):
        products.addcmul_(gradient, value)
    return products.sum(-2, keepdim=True)
