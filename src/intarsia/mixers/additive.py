"""What the mixers of the additive rule share: the call of the operator, and the normaliser of kernel attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from intarsia.layers.states import RecurrentState
from intarsia.mixers.recurrent import RecurrentMixer, additive_rule_flops
from intarsia.ops import Sequences, linear_attention
from intarsia.ops.precision import widen


class AdditiveMixer(RecurrentMixer):
    """A mixer with a board `[heads, key_dim, value_dim]` that is decayed and written, and never erased:

        S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t · scale

    A normalised one keeps a last column more, the sum of the keys.
    """

    def __init__(
        self, d_model: int, heads: int, key_dim: int, value_dim: int, normalized: bool = False
    ) -> None:
        super().__init__(d_model)
        self.heads, self.key_dim, self.value_dim, self.normalized = heads, key_dim, value_dim, normalized

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        state: RecurrentState | None,
        seqs: Sequences | None,
        *,
        scale: float | None = None,
        tail: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """Run the rule after `state`; `tail` goes into the state that follows. Shapes as `linear_attention`."""
        o, board = linear_attention(
            q, k, v, g, scale=scale, initial_state=None if state is None else state.board,
            output_final_state=state is not None, cu_seqlens=seqs,
        )  # fmt: skip
        if state is None or board is None:
            return o, None
        return o, state.after(v, seqs, board, tail)

    def mix_normalized(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: RecurrentState | None,
        seqs: Sequences | None,
        *,
        scale: float,
        eps: float,
    ) -> tuple[Tensor, RecurrentState | None]:
        """`sum_j (q_i · k_j) v_j / (eps + sum_j q_i · k_j)` over the tokens j up to i, with q and k not negative.

        A column of ones behind v makes the rule sum the divisor along. All is in the compute dtype, since a
        quotient of rounded sums would lose what the sums were carried in float32 for; the result is in v's.
        """
        wide = F.pad(widen(v), (0, 1), value=1.0)
        sums, state = self.mix(widen(q), widen(k), wide, None, state, seqs, scale=scale)
        return (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype), state

    @property
    def board_shape(self) -> tuple[int, int, int]:
        return self.heads, self.key_dim, self.value_dim + self.normalized

    def mixing_flops(self) -> int:
        return additive_rule_flops(*self.board_shape)
