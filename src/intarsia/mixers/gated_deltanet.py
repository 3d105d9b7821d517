"""Gated DeltaNet: the delta rule with a decay of each head (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.mixers.base import Cost, Mixer, MixerConfig, positive
from intarsia.mixers.delta import (
    DecayGate,
    GatedNorm,
    OutputGate,
    ShortConvolution,
    delta_rule_flops,
    empty_recurrent_state,
    recurrent_cost,
    widen,
)
from intarsia.mixers.state import RecurrentState
from intarsia.ops import Sequences, gated_delta_rule, l2norm


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """The options of Gated DeltaNet; the defaults are Qwen3-Next's.

    `num_heads` query and key heads of `head_dim` (K), `num_v_heads` value heads (a multiple; the same number
    by default) of `head_v_dim` (V; K by default). `negative_eigenvalues` lets beta reach 2 (OLMo-Hybrid).
    """

    type: ClassVar[str] = "gdn"
    num_heads: int
    head_dim: int
    num_v_heads: int | None = None
    head_v_dim: int | None = None
    conv_size: int | None = 4
    output_gate: OutputGate = "swish"
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        positive(
            num_heads=self.num_heads, head_dim=self.head_dim, num_v_heads=self.num_v_heads,
            head_v_dim=self.head_v_dim, conv_size=self.conv_size,
        )  # fmt: skip
        if self.value_heads % self.num_heads:
            raise ConfigError(
                f"num_v_heads must be a multiple of num_heads={self.num_heads}; got {self.num_v_heads}"
            )
        if self.output_gate not in ("sigmoid", "swish", "none"):
            raise ConfigError(f"output_gate must be 'sigmoid', 'swish' or 'none'; got {self.output_gate!r}")

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def value_dim(self) -> int:
        """V."""
        return self.head_dim if self.head_v_dim is None else self.head_v_dim

    def build(self, d_model: int, norm_eps: float = 1e-5) -> GatedDeltaNet:
        return GatedDeltaNet(d_model, self, norm_eps)


class GatedDeltaNet(Mixer[RecurrentState]):
    """Gated DeltaNet:

    q, k = l2norm(silu(conv(W x)))    v = silu(conv(W x))    beta = sigmoid(W x)
    g = -exp(A_log) softplus(W x + dt_bias)                        one number a head
    S_t = exp(g_t) (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ
    y = W_o (silu(W x) * rmsnorm_head(S_tᵀ q_t / sqrt(K)))
    """

    def __init__(self, d_model: int, config: GatedDeltaNetConfig, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config
        H, K, HV, V = config.num_heads, config.head_dim, config.value_heads, config.value_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, HV * V, bias=False)
        self.conv = (
            None if config.conv_size is None else ShortConvolution(2 * H * K + HV * V, config.conv_size)
        )
        self.beta_proj = nn.Linear(d_model, HV, bias=False)
        self.decay_proj = nn.Linear(d_model, HV, bias=False)
        self.decay = DecayGate(HV, 1)
        self.output_gate_proj = None
        if config.output_gate != "none":
            self.output_gate_proj = nn.Linear(d_model, HV * V, bias=False)
        self.norm = GatedNorm(V, norm_eps, config.output_gate)
        self.o_proj = nn.Linear(HV * V, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        H, K = self.config.num_heads, self.config.head_dim
        HV, V = self.config.value_heads, self.config.value_dim
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        tail = None
        if self.conv is not None:
            qkv, tail = self.conv(qkv, None if state is None else state.conv, seqs)
        q, k, v = qkv.split([H * K, H * K, HV * V], dim=-1)
        beta = torch.sigmoid(widen(self.beta_proj(x)))
        o, board = gated_delta_rule(
            l2norm(q.unflatten(-1, (H, K))),
            l2norm(k.unflatten(-1, (H, K))),
            v.unflatten(-1, (HV, V)),
            self.decay(self.decay_proj(x)).squeeze(-1),
            2 * beta if self.config.negative_eigenvalues else beta,
            initial_state=None if state is None else state.board,
            output_final_state=state is not None,
            cu_seqlens=seqs,
        )
        z = None if self.output_gate_proj is None else self.output_gate_proj(x).unflatten(-1, (HV, V))
        y = self.o_proj(self.norm(o, z).flatten(-2))
        if state is None or board is None:
            return y, None
        return y, RecurrentState(board, tail, state.tokens + x.shape[1])

    def init_state(self, batch_size: int) -> RecurrentState:
        c = self.config
        return empty_recurrent_state(
            self.q_proj.weight, (batch_size, c.value_heads, c.head_dim, c.value_dim), self.conv
        )

    def cost(self) -> Cost:
        c = self.config
        flops = delta_rule_flops(c.value_heads, c.head_dim, c.value_dim)
        return recurrent_cost(self, flops, self.init_state(1).nbytes())
