"""Gated DeltaNet-2: erasing and writing with gates of their own (Hatamizadeh, Choi, Kautz 2026, arXiv:2605.22791)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from intarsia.layers.convolution import convolve, inputs_kept, short_convolution_of
from intarsia.layers.flops import dplr_rule_flops
from intarsia.layers.gates import DecayGate
from intarsia.layers.norm import GatedNorm, OutputGate
from intarsia.layers.projections import linear, low_rank, split_heads
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import About, HeadsConfig, Mixer, NormedConfig, check_output_gate, positive
from intarsia.ops import Sequences, dplr_rule, l2norm
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class GatedDeltaNet2Config(NormedConfig, HeadsConfig):
    """The options of Gated DeltaNet-2.

    `num_heads` heads of `head_dim` (K) and `head_v_dim` (V; K by default). `rank` is that of the projections of decay
    and output gate, V by default. `negative_eigenvalues` lets the erase gate reach 2; the write gate stays in [0, 1].
    `output_gate` is `"swish"` as in Gated DeltaNet; flash-linear-attention's layer has `"sigmoid"`.
    """

    type: ClassVar[str] = "gdn2"
    about = About(
        title="Gated DeltaNet-2",
        year=2026,
        source="arXiv:2605.22791",
        family="delta",
        equation="S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T",
        brought="what to erase (of each key channel) and what to write (of each value channel) are two decisions",
        operator="dplr_rule",
        example={"num_heads": 8, "head_dim": 128},
        decay="channel",
    )
    conv_size: int | None = 4
    rank: int | None = None
    negative_eigenvalues: bool = False
    output_gate: OutputGate = field(default="swish", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(conv_size=self.conv_size, rank=self.rank)
        check_output_gate(self.output_gate)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> GatedDeltaNet2:
        return GatedDeltaNet2(d_model, self, norm_eps)


class GatedDeltaNet2(Mixer[RecurrentState]):
    """Gated DeltaNet-2: KDA with an erase gate of each key channel and a write gate of each value channel.

    b = sigmoid(W x) [B, T, H, K]    w = sigmoid(W x) [B, T, H, V]    g = -exp(A_log) softplus(f(x) + dt_bias)
    S_t = (I - k_t (b_t * k_t)ᵀ) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)ᵀ
    y = W_o (silu(G x) * rmsnorm_head(S_tᵀ q_t / sqrt(K)))

    q, k and v as in KDA: short convolution, SiLU, q and k of length one. f and G are of low rank, G with a bias. With
    one number for b and w this is KDA. For the operator the transition is `Diag(exp g) - k (exp(g) * b * k)ᵀ`.

    Unlike in the authors' code, and in flash-linear-attention's layer, there are as many value heads as key heads,
    and without a convolution there is no SiLU either (as in the other mixers here).
    """

    def __init__(self, d_model: int, config: GatedDeltaNet2Config, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        rank = V if config.rank is None else config.rank
        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, n) for n in (H * K, H * K, H * V))
        self.conv = short_convolution_of(2 * H * K + H * V, config.conv_size)
        self.erase_proj = linear(d_model, H * K)
        self.write_proj = linear(d_model, H * V)
        self.decay_proj = low_rank(d_model, H * K, rank)
        self.decay = DecayGate(H, K)
        gated = config.output_gate != "none"
        self.output_gate_proj = low_rank(d_model, H * V, rank, bias=True) if gated else None
        self.norm = GatedNorm(V, config.own_eps(norm_eps), config.output_gate)
        self.o_proj = linear(H * V, d_model)
        self.erase_max = 2 if config.negative_eigenvalues else 1

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        H, K, V = self.memory.board
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv, inputs = convolve(self.conv, qkv, state, seqs)
        q, k, v = split_heads(qkv, (H, K), (H, K), (H, V))
        k = l2norm(k)
        g = self.decay().log_decay(self.decay_proj(x).unflatten(-1, (H, K)))
        erase = self.erase_max * torch.sigmoid(widen(self.erase_proj(x).unflatten(-1, (H, K))))
        write = torch.sigmoid(widen(self.write_proj(x).unflatten(-1, (H, V))))
        o, board = dplr_rule(
            l2norm(q), k, (write * widen(v)).to(v.dtype), k, erase * g.exp() * k, g, **carried(state, seqs)
        )
        z = None if self.output_gate_proj is None else self.output_gate_proj(x)
        return self.o_proj(self.norm(o, z).flatten(-2)), following(state, x, seqs, board, inputs)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return dplr_rule_flops(*self.memory.board)
