"""Kernel attention: the additive rule, divided by the sum of its weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from intarsia.layers.recurrent import RecurrentState, carried
from intarsia.ops import Sequences, linear_attention
from intarsia.ops.precision import widen


def normalized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RecurrentState | None,
    seqs: Sequences | None,
    *,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """`sum_j (q_i · k_j) v_j / (eps + sum_j q_i · k_j)` over the tokens j up to i, with q and k not negative, in v's
    dtype; and the board `[N, H, K, V + 1]` after them, where there is a state before them.

    A column of ones behind v makes the rule sum the divisor along. All is in the compute dtype, since a quotient of
    rounded sums would lose what the sums were carried in float32 for.
    """
    wide = F.pad(widen(v), (0, 1), value=1.0)
    sums, board = linear_attention(widen(q), widen(k), wide, scale=scale, **carried(state, seqs))
    return (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype), board
