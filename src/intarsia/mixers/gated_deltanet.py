"""Gated DeltaNet: the delta rule with a decay of each head (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from intarsia.layers.gates import DecayGate
from intarsia.layers.norm import OutputGate
from intarsia.layers.projections import low_rank
from intarsia.mixers.base import About, NormedConfig, positive
from intarsia.mixers.delta import DeltaMixer
from intarsia.mixers.heads import GroupedHeadsConfig, check_output_gate


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


class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet: `DeltaMixer` with a decay of each head.

    g = -exp(A_log) softplus(W x + dt_bias) [B, T, HV]
    S_t = exp(g_t) (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ
    y = W_o (silu(W x) * rmsnorm_head(S_tᵀ q_t / sqrt(K)))

    Without a convolution there is no SiLU either; flash-linear-attention's layer keeps it on q, k and v.
    """

    def __init__(self, d_model: int, config: GatedDeltaNetConfig, norm_eps: float = 1e-5) -> None:
        norm_eps = config.own_eps(norm_eps)
        HV, V = config.value_heads, config.value_dim
        super().__init__(
            d_model,
            heads=config.num_heads,
            key_dim=config.head_dim,
            value_heads=HV,
            value_dim=V,
            conv_size=config.conv_size,
            decay_proj=low_rank(d_model, HV, None),
            decay=DecayGate(HV, 1),
            output_gate=config.output_gate,
            output_gate_proj=None if config.output_gate == "none" else low_rank(d_model, HV * V, None),
            negative_eigenvalues=config.negative_eigenvalues,
            norm_eps=norm_eps,
        )
        self.config = config
