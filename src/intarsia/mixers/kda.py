"""Kimi Delta Attention: the delta rule with a decay of its own for each channel (Kimi Linear report, 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.convolution import convolve, inputs_kept, short_convolution_of
from intarsia.layers.decoding import Projected, Projections, fused_step
from intarsia.layers.flops import delta_rule_flops
from intarsia.layers.gates import DecayGate
from intarsia.layers.norm import GatedNorm, OutputGate
from intarsia.layers.projections import linear, low_rank, split_heads
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import (
    About,
    HeadsConfig,
    Layer,
    Mixer,
    NormedConfig,
    check_output_gate,
    check_value_heads,
    positive,
)
from intarsia.ops import Sequences, gated_delta_rule


@dataclass(frozen=True)
class KDAConfig(NormedConfig, HeadsConfig):
    """The options of KDA; the defaults are Kimi Linear's, the others what its Table 1 ablates.

    `head_dim` is the key dimension K, `head_v_dim` the value dimension V (K by default). `conv_size` None
    leaves the convolution out. The decay is `"softplus"` (unbounded) or `"bounded"` below by
    `gate_lower_bound`. `decay_rank` and `output_gate_rank` are the ranks of those projections: an integer,
    `"head"` for K (decay) and V (output gate), or None for full rank. `negative_eigenvalues` lets beta
    reach 2.

    `num_v_heads` value heads (HV, a multiple of `num_heads`; the same number by default) have decays and write
    strengths of their own, and share queries and keys (flash-linear-attention; no published model does it).
    `output_gate_bias` gives the output gate a bias, as flash-linear-attention's layer has it; the report's equation
    10 and the released weights have none.
    """

    type: ClassVar[str] = "kda"
    about = About(
        title="Kimi Delta Attention",
        year=2025,
        source="arXiv:2510.26692",
        family="delta",
        equation="S_t = (I - b_t k_t k_t^T) Diag(exp g_t) S_{t-1} + b_t k_t v_t^T",
        brought="a decay of each channel together with the delta rule, at the cost of the decay of each head",
        operator="gated_delta_rule",
        example={"num_heads": 8, "head_dim": 128},
        decay="channel",
    )
    conv_size: int | None = 4
    gate: Literal["softplus", "bounded"] = "softplus"
    gate_lower_bound: float = -5.0
    output_gate: OutputGate = "sigmoid"
    decay_rank: int | Literal["head"] | None = "head"
    output_gate_rank: int | Literal["head"] | None = "head"
    negative_eigenvalues: bool = False
    num_v_heads: int | None = field(default=None, kw_only=True)
    output_gate_bias: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(conv_size=self.conv_size, num_v_heads=self.num_v_heads)
        check_value_heads(self.value_heads, self.num_heads)
        if self.output_gate_bias and self.output_gate == "none":
            raise ConfigError("output_gate_bias needs an output gate; output_gate is 'none'")
        if self.gate not in ("softplus", "bounded"):
            raise ConfigError(f"gate must be 'softplus' or 'bounded'; got {self.gate!r}")
        check_output_gate(self.output_gate)
        if self.gate_lower_bound >= 0:
            raise ConfigError(f"gate_lower_bound must be negative; got {self.gate_lower_bound}")
        for name in ("decay_rank", "output_gate_rank"):
            rank = getattr(self, name)
            if not (rank is None or rank == "head" or (isinstance(rank, int) and rank > 0)):
                raise ConfigError(f"{name} must be a positive integer, 'head' or None; got {rank!r}")

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    def build(self, d_model: int, norm_eps: float = 1e-5) -> KimiDeltaAttention:
        return KimiDeltaAttention(d_model, self, norm_eps)


class KimiDeltaAttention(Mixer[RecurrentState]):
    """KDA, equations 1 and 10 of the Kimi Linear report: the delta rule with a decay of each channel.

    q, k = l2norm(silu(conv(W x)))    v = silu(conv(W x))
    beta = sigmoid(W x) [B, T, HV]    g = decay gate(W x) [B, T, HV, K]
    S_t = (I - beta_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + beta_t k_t v_tᵀ
    y = W_o (sigmoid(W x) * rmsnorm_head(S_tᵀ q_t / sqrt(K)))

    Differences from flash-linear-attention's layer that are no options: without a convolution there
    is no SiLU either, which it keeps on q, k and v; where K and V differ, the rank `"head"` of the decay is K, and V
    there; its convolution may have a bias.
    """

    def __init__(self, d_model: int, config: KDAConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, HV, K, V = config.num_heads, config.value_heads, config.head_dim, config.value_dim
        decay_rank = K if config.decay_rank == "head" else config.decay_rank
        gate_rank = V if config.output_gate_rank == "head" else config.output_gate_rank
        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, n) for n in (H * K, H * K, HV * V))
        self.conv = short_convolution_of(2 * H * K + HV * V, config.conv_size)
        self.beta_proj = linear(d_model, HV)
        self.decay_proj = low_rank(d_model, HV * K, decay_rank)
        self.decay = DecayGate(HV, K, config.gate_lower_bound if config.gate == "bounded" else None)
        self.output_gate_proj = (
            None
            if config.output_gate == "none"
            else low_rank(d_model, HV * V, gate_rank, config.output_gate_bias)
        )
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
        assert g is not None
        qkv, inputs = convolve(self.conv, qkv, state, seqs)
        q, k, v = split_heads(qkv, (H, K), (H, K), (HV, V))
        o, board = gated_delta_rule(
            q, k, v, g.unflatten(-1, (HV, K)), beta, normalize=True, gate=self.decay(), beta_max=self.beta_max,
            **carried(state, seqs),
        )  # fmt: skip
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
        step = fused_step(self, heads=H, decay="channel", gate=gate, beta_max=self.beta_max, projections=maps)
        return step or self

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.value_heads, c.head_dim, c.value_dim), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return delta_rule_flops(*self.memory.board)
