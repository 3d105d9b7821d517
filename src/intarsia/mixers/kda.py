"""Kimi Delta Attention: the delta rule with a decay of its own for each channel (Kimi Linear report, 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
    low_rank,
    recurrent_cost,
    widen,
)
from intarsia.mixers.state import RecurrentState
from intarsia.ops import Sequences, gated_delta_rule, l2norm


@dataclass(frozen=True)
class KDAConfig(MixerConfig):
    """The options of KDA; the defaults are Kimi Linear's, the others what its Table 1 ablates.

    `head_dim` is the key dimension K, `head_v_dim` the value dimension V (K by default). `conv_size` None
    leaves the convolution out. The decay is `"softplus"` (unbounded) or `"bounded"` below by
    `gate_lower_bound`. `decay_rank` and `output_gate_rank` are the ranks of those projections: an integer,
    `"head"` for K (decay) and V (output gate), or None for full rank. `negative_eigenvalues` lets beta
    reach 2.
    """

    type: ClassVar[str] = "kda"
    num_heads: int
    head_dim: int
    head_v_dim: int | None = None
    conv_size: int | None = 4
    gate: Literal["softplus", "bounded"] = "softplus"
    gate_lower_bound: float = -5.0
    output_gate: OutputGate = "sigmoid"
    decay_rank: int | Literal["head"] | None = "head"
    output_gate_rank: int | Literal["head"] | None = "head"
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        positive(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            head_v_dim=self.head_v_dim,
            conv_size=self.conv_size,
        )
        if self.gate not in ("softplus", "bounded"):
            raise ConfigError(f"gate must be 'softplus' or 'bounded'; got {self.gate!r}")
        if self.output_gate not in ("sigmoid", "swish", "none"):
            raise ConfigError(f"output_gate must be 'sigmoid', 'swish' or 'none'; got {self.output_gate!r}")
        if self.gate_lower_bound >= 0:
            raise ConfigError(f"gate_lower_bound must be negative; got {self.gate_lower_bound}")
        for name in ("decay_rank", "output_gate_rank"):
            rank = getattr(self, name)
            if not (rank is None or rank == "head" or (isinstance(rank, int) and rank > 0)):
                raise ConfigError(f"{name} must be a positive integer, 'head' or None; got {rank!r}")

    @property
    def value_dim(self) -> int:
        """V."""
        return self.head_dim if self.head_v_dim is None else self.head_v_dim

    def build(self, d_model: int, norm_eps: float = 1e-5) -> KimiDeltaAttention:
        return KimiDeltaAttention(d_model, self, norm_eps)


class KimiDeltaAttention(Mixer[RecurrentState]):
    """KDA, equations 1 and 10 of the Kimi Linear report:

    q, k = l2norm(silu(conv(W x)))    v = silu(conv(W x))    beta = sigmoid(W x)    g = decay gate(W x)
    S_t = (I - beta_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + beta_t k_t v_tᵀ
    y = W_o (sigmoid(W x) * rmsnorm_head(S_tᵀ q_t / sqrt(K)))
    """

    def __init__(self, d_model: int, config: KDAConfig, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * V, bias=False)
        self.conv = None if config.conv_size is None else ShortConvolution(H * (2 * K + V), config.conv_size)
        self.beta_proj = nn.Linear(d_model, H, bias=False)
        self.decay_proj = low_rank(d_model, H * K, K if config.decay_rank == "head" else config.decay_rank)
        self.decay = DecayGate(H, K, config.gate_lower_bound if config.gate == "bounded" else None)
        self.output_gate_proj = None
        if config.output_gate != "none":
            rank = V if config.output_gate_rank == "head" else config.output_gate_rank
            self.output_gate_proj = low_rank(d_model, H * V, rank)
        self.norm = GatedNorm(V, norm_eps, config.output_gate)
        self.o_proj = nn.Linear(H * V, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        H, K, V = self.config.num_heads, self.config.head_dim, self.config.value_dim
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        tail = None
        if self.conv is not None:
            qkv, tail = self.conv(qkv, None if state is None else state.conv, seqs)
        q, k, v = qkv.split([H * K, H * K, H * V], dim=-1)
        beta = torch.sigmoid(widen(self.beta_proj(x)))
        o, board = gated_delta_rule(
            l2norm(q.unflatten(-1, (H, K))),
            l2norm(k.unflatten(-1, (H, K))),
            v.unflatten(-1, (H, V)),
            self.decay(self.decay_proj(x)),
            2 * beta if self.config.negative_eigenvalues else beta,
            initial_state=None if state is None else state.board,
            output_final_state=state is not None,
            cu_seqlens=seqs,
        )
        z = None if self.output_gate_proj is None else self.output_gate_proj(x).unflatten(-1, (H, V))
        y = self.o_proj(self.norm(o, z).flatten(-2))
        if state is None or board is None:
            return y, None
        return y, RecurrentState(board, tail, state.tokens + x.shape[1])

    def init_state(self, batch_size: int) -> RecurrentState:
        H, K, V = self.config.num_heads, self.config.head_dim, self.config.value_dim
        return empty_recurrent_state(self.q_proj.weight, (batch_size, H, K, V), self.conv)

    def cost(self) -> Cost:
        H, K, V = self.config.num_heads, self.config.head_dim, self.config.value_dim
        return recurrent_cost(self, delta_rule_flops(H, K, V), self.init_state(1).nbytes())
