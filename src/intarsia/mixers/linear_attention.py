"""Linear attention (Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv:2006.16236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.normalized import normalized_attention
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, following
from intarsia.mixers.base import About, HeadsConfig, Mixer, positive
from intarsia.ops import Sequences
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class LinearAttentionConfig(HeadsConfig):
    """The options of linear attention: `num_heads` heads of `head_dim` (K) query-key and `head_v_dim` (V; K by
    default) value channels. `eps` is added to the divisor, as in the authors' code."""

    type: ClassVar[str] = "linear"
    about = About(
        title="Linear attention",
        year=2020,
        source="arXiv:2006.16236",
        family="additive",
        equation="S_t = S_{t-1} + f(k_t) v_t^T,  o_t = S_t^T f(q_t) / z_t^T f(q_t)",
        brought="attention without softmax is a recurrence: constant memory, time linear in the length",
        operator="linear_attention",
        example={"num_heads": 8, "head_dim": 128},
    )
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(eps=self.eps)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> LinearAttention:
        return LinearAttention(d_model, self)


class LinearAttention(Mixer[RecurrentState]):
    """Linear attention, equations 9 and 18 to 20 of the paper:

        f(x) = elu(x) + 1        S_t = S_{t-1} + f(k_t) v_tᵀ        z_t = z_{t-1} + f(k_t)
        y = W_o (S_tᵀ f(q_t) / (z_t · f(q_t) + eps))

    Differences: projections without biases; positions are left to the model, as they are in the paper.
    """

    def __init__(self, d_model: int, config: LinearAttentionConfig) -> None:
        super().__init__(d_model)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * V, bias=False)
        self.o_proj = nn.Linear(H * V, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        heads = (self.config.num_heads, -1)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        o, board = normalized_attention(
            elu_plus_one(q), elu_plus_one(k), v, state, seqs, scale=1.0, eps=self.config.eps
        )
        return self.o_proj(o.flatten(-2)), following(state, x, seqs, board)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim + 1))  # z is the last column

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1` in the compute dtype: `x + 1` above zero, else `exp(x)`, which subtracts no one to add it."""
    x = widen(x)
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
