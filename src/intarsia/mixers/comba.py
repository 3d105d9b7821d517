"""Comba: the delta rule as closed-loop control, which corrects its output too (Hu et al. 2025, arXiv:2506.02475)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.layers.convolution import convolve, inputs_kept, short_convolution_of
from intarsia.layers.flops import dplr_rule_flops
from intarsia.layers.gates import DecayGate
from intarsia.layers.norm import GatedNorm, OutputGate
from intarsia.layers.projections import linear, split_heads
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import (
    About,
    GeneratorOf,
    GroupedHeadsConfig,
    Mixer,
    NormedConfig,
    check_output_gate,
    positive,
)
from intarsia.ops import Sequences, dplr_rule, l2norm
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class CombaConfig(NormedConfig, GroupedHeadsConfig):
    """The options of Comba.

    `num_heads` query and key heads of `head_dim` (K), `num_v_heads` value heads (a multiple; the same number by
    default) of `head_v_dim` (V; K by default). `correction` is what d begins with in the query `q - d k`: 1 in the
    authors' code; for small models they found 0.02 better. None leaves the correction out.
    """

    type: ClassVar[str] = "comba"
    about = About(
        title="Comba",
        year=2025,
        source="arXiv:2506.02475",
        family="delta",
        equation="S_t = (exp(g_t) - c b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, reads q - d k",
        brought="the feedback of closed-loop control: its strength is learnt, and the output is corrected as well",
        operator="dplr_rule",
        example={"num_heads": 8, "head_dim": 128},
        decay="head",
    )
    conv_size: int | None = 4
    correction: float | None = 1.0
    output_gate: OutputGate = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(conv_size=self.conv_size)
        check_output_gate(self.output_gate)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Comba:
        return Comba(d_model, self, norm_eps)


class Comba(Mixer[RecurrentState]):
    """Comba: a decay of each head, and an erasure of what the board held before it decayed.

    beta = sigmoid(W x)    g = -exp(A_log) softplus(W x + dt_bias)    both [B, T, HV]
    S_t = (exp(g_t) - c beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ        c = sigmoid(feedback), one number a head
    y = W_o (sigmoid(W x) * rmsnorm_head(S_tᵀ (q_t - d k_t) / sqrt(K)))        d = correction, one number a head

    q, k and v as in Gated DeltaNet: short convolution, SiLU, q and k of length one. Gated DeltaNet's transition is
    this one with c = exp(g_t). The gated delta rule could compute it only with the strength `c beta exp(-g)`, which
    is infinite where everything is forgotten; hence the general rule.

    The paper's form. flash-linear-attention corrects q before its length is made one, by `d c k`, and makes the
    length of `c k` one too, whereby c cancels. Without a convolution there is no SiLU either (as in the other mixers
    here).
    """

    def __init__(self, d_model: int, config: CombaConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, HV, K, V = config.num_heads, config.value_heads, config.head_dim, config.value_dim
        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, n) for n in (H * K, H * K, HV * V))
        self.conv = short_convolution_of(2 * H * K + HV * V, config.conv_size)
        self.beta_proj = linear(d_model, HV)
        self.decay_proj = linear(d_model, HV)
        self.decay = DecayGate(HV, 1)
        self.feedback = nn.Parameter(torch.empty(H))
        if config.correction is not None:
            self.correction = nn.Parameter(torch.empty(H))
        self.output_gate_proj = None if config.output_gate == "none" else linear(d_model, HV * V)
        self.norm = GatedNorm(V, config.own_eps(norm_eps), config.output_gate)
        self.o_proj = linear(HV * V, d_model)
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        self.feedback.fill_(1)  # c = 0.73
        if self.config.correction is not None:
            self.correction.fill_(self.config.correction)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        (HV, K, V), H = self.memory.board, self.config.num_heads
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv, inputs = convolve(self.conv, qkv, state, seqs)
        q, k, v = split_heads(qkv, (H, K), (H, K), (HV, V))
        q, k = l2norm(q), l2norm(k)
        if self.config.correction is not None:
            q = (widen(q) - self.correction[:, None] * widen(k)).to(q.dtype)
        beta = torch.sigmoid(widen(self.beta_proj(x)))[..., None]
        fed_back = torch.sigmoid(widen(self.feedback))[:, None] * widen(k)
        o, board = dplr_rule(
            q,
            k,
            (beta * widen(v)).to(v.dtype),
            beta * fed_back.repeat_interleave(HV // H, dim=2),
            k,
            self.decay().log_decay(self.decay_proj(x)),
            **carried(state, seqs),
        )
        z = None if self.output_gate_proj is None else self.output_gate_proj(x)
        return self.o_proj(self.norm(o, z).flatten(-2)), following(state, x, seqs, board, inputs)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.value_heads, c.head_dim, c.value_dim), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return dplr_rule_flops(*self.memory.board)
