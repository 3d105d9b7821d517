"""Gated linear attention: a decay of each channel that the input decides (Yang et al. 2023, arXiv:2312.06635)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.gates import DecayBias
from intarsia.layers.norm import GatedNorm
from intarsia.layers.projections import low_rank
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import About, HeadsConfig, Mixer, NormedConfig, positive
from intarsia.ops import Sequences, linear_attention


@dataclass(frozen=True)
class GLAConfig(NormedConfig, HeadsConfig):
    """The options of gated linear attention: `num_heads` heads of `head_dim` (K) query-key and `head_v_dim` (V;
    twice K by default, as in the paper) value channels. The decay is `sigmoid(…) ** (1 / tau)` of a projection
    of rank `decay_rank` (None: full)."""

    type: ClassVar[str] = "gla"
    about = About(
        title="Gated linear attention",
        year=2023,
        source="arXiv:2312.06635",
        family="additive",
        equation="S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T,  g_t = logsigmoid(W x) / 16",
        brought="a decay of each channel that the input decides, still computed by products of matrices",
        operator="linear_attention",
        example={"num_heads": 4, "head_dim": 128},
        decay="channel",
    )
    decay_rank: int | None = 16
    tau: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(decay_rank=self.decay_rank, tau=self.tau)

    @property
    def value_dim(self) -> int:
        """V."""
        return 2 * self.head_dim if self.head_v_dim is None else self.head_v_dim

    def build(self, d_model: int, norm_eps: float = 1e-5) -> GatedLinearAttention:
        return GatedLinearAttention(d_model, self, norm_eps)


class GatedLinearAttention(Mixer[RecurrentState]):
    """Gated linear attention, sections 4.1 and 4.4 of the paper:

        g = log(sigmoid(W_2 W_1 x + b)) / tau [B, T, H, K]        S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ
        y = W_o (swish(W_g x) * norm_head(S_tᵀ q_t / sqrt(K)))

    Differences: as in the authors' code the norm is RMSNorm (the paper writes LayerNorm), queries are divided by
    `sqrt(K)` (which the norm undoes) and the output gate has no bias; `b` begins at zero.
    """

    def __init__(self, d_model: int, config: GLAConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * V, bias=False)
        self.decay_proj = low_rank(d_model, H * K, config.decay_rank)
        self.decay = DecayBias(H * K)
        self.output_gate_proj = nn.Linear(d_model, H * V, bias=False)
        self.norm = GatedNorm(V, config.own_eps(norm_eps), "swish")
        self.o_proj = nn.Linear(H * V, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        H, K, V = self.memory.board
        q, k = self.q_proj(x).unflatten(-1, (H, K)), self.k_proj(x).unflatten(-1, (H, K))
        v = self.v_proj(x).unflatten(-1, (H, V))
        g = F.logsigmoid(self.decay(self.decay_proj(x))) / self.config.tau
        o, board = linear_attention(q, k, v, g.unflatten(-1, (H, K)), **carried(state, seqs))
        y = self.o_proj(self.norm(o, self.output_gate_proj(x)).flatten(-2))
        return y, following(state, x, seqs, board)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)
