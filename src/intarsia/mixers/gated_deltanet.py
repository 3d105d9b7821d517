"""Gated DeltaNet: the delta rule with a decay of each head (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from intarsia.layers.convolution import convolve, inputs_kept, short_convolution_of
from intarsia.layers.decoding import Projected, Projections, fused_step
from intarsia.layers.flops import delta_rule_flops
from intarsia.layers.gates import DecayGate
from intarsia.layers.norm import GatedNorm, OutputGate
from intarsia.layers.projections import linear, split_heads
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import (
    About,
    GroupedHeadsConfig,
    Layer,
    Mixer,
    NormedConfig,
    check_output_gate,
    positive,
)
from intarsia.ops import Sequences, gated_delta_rule


@dataclass(frozen=True)
class GatedDeltaNetConfig(NormedConfig, GroupedHeadsConfig):
    """The options of Gated DeltaNet; the defaults are Qwen3-Next's.

    `num_heads` query and key heads of `head_dim` (K), `num_v_heads` value heads (a multiple; the same number
    by default) of `head_v_dim` (V; K by default). `negative_eigenvalues` lets beta reach 2 (OLMo-Hybrid).
    """

    type: ClassVar[str] = "gdn"
    about = About(
        title="Gated DeltaNet",
        year=2024,
        source="arXiv:2412.06464",
        family="delta",
        equation="S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T",
        brought="forgets all at once (decay) and one thing at a time (erasure) in one rule",
        operator="gated_delta_rule",
        example={"num_heads": 8, "head_dim": 128},
        decay="head",
    )
    conv_size: int | None = 4
    output_gate: OutputGate = "swish"
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(conv_size=self.conv_size)
        check_output_gate(self.output_gate)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> GatedDeltaNet:
        return GatedDeltaNet(d_model, self, norm_eps)


class GatedDeltaNet(Mixer[RecurrentState]):
    """Gated DeltaNet: the delta rule with a decay of each head.

    q, k = l2norm(silu(conv(W x)))    v = silu(conv(W x))
    beta = sigmoid(W x)    g = -exp(A_log) softplus(W x + dt_bias)    both [B, T, HV]
    S_t = exp(g_t) (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ
    y = W_o (silu(W x) * rmsnorm_head(S_tᵀ q_t / sqrt(K)))

    Without a convolution there is no SiLU either; flash-linear-attention's layer keeps it on q, k and v.
    """

    def __init__(self, d_model: int, config: GatedDeltaNetConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, HV, K, V = config.num_heads, config.value_heads, config.head_dim, config.value_dim
        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, n) for n in (H * K, H * K, HV * V))
        self.conv = short_convolution_of(2 * H * K + HV * V, config.conv_size)
        self.beta_proj = linear(d_model, HV)
        self.decay_proj = linear(d_model, HV)
        self.decay = DecayGate(HV, 1)
        self.output_gate_proj = None if config.output_gate == "none" else linear(d_model, HV * V)
        self.norm = GatedNorm(V, config.own_eps(norm_eps), config.output_gate)
        self.o_proj = linear(HV * V, d_model)
        self.beta_max = 2 if config.negative_eigenvalues else 1

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        (HV, K, V), H = self.memory.board, self.config.num_heads
        qkv, g, beta, z = self.project(x)
        qkv, inputs = convolve(self.conv, qkv, state, seqs)
        q, k, v = split_heads(qkv, (H, K), (H, K), (HV, V))
        o, board = gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            normalize=True,
            gate=self.decay(),
            beta_max=self.beta_max,
            **carried(state, seqs),
        )
        return self.o_proj(self.norm(o, z).flatten(-2)), following(state, x, seqs, board, inputs)

    def project(self, x: Tensor) -> Projected:
        """All that is made of each token alone, `[..., D]`."""
        return Projected(
            qkv=torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1),
            g=self.decay_proj(x),
            beta=self.beta_proj(x),
            z=None if self.output_gate_proj is None else self.output_gate_proj(x),
        )

    def for_inference(self) -> Layer[RecurrentState]:
        H, gate = self.config.num_heads, self.decay.gate()
        qkv = (self.q_proj, self.k_proj, self.v_proj)
        maps = Projections(qkv, self.decay_proj, self.beta_proj, self.output_gate_proj)
        step = fused_step(self, heads=H, decay="head", gate=gate, beta_max=self.beta_max, projections=maps)
        return step or self

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.value_heads, c.head_dim, c.value_dim), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return delta_rule_flops(*self.memory.board)
