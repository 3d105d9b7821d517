"""Retention: a fixed decay of each head (RetNet: Sun et al. 2023, arXiv:2307.08621)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.layers.rope import positions_of, rotate
from intarsia.mixers.base import About, HeadsConfig, Mixer, NormedConfig, positive
from intarsia.ops import Sequences, gated_rms_norm, linear_attention
from intarsia.ops.precision import compute_dtype


@dataclass(frozen=True)
class RetNetConfig(NormedConfig, HeadsConfig):
    """The options of retention: `num_heads` heads of `head_dim` (K, even) query-key and `head_v_dim` (V; twice K
    by default, as in the paper) value channels."""

    type: ClassVar[str] = "retnet"
    about = About(
        title="RetNet",
        year=2023,
        source="arXiv:2307.08621",
        family="additive",
        equation="S_t = c_h S_{t-1} + k_t v_t^T,  c_h = 1 - 2^(-5-h)",
        brought="a fixed decay of each head: old tokens fade, and no normaliser is needed",
        operator="linear_attention",
        example={"num_heads": 8, "head_dim": 128},
        decay="fixed",
    )
    theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(theta=self.theta)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, for pairs are rotated; got {self.head_dim}")

    @property
    def value_dim(self) -> int:
        """V."""
        return 2 * self.head_dim if self.head_v_dim is None else self.head_v_dim

    @property
    def rotation_theta(self) -> float:
        """The base for `rotate` with which pair i turns by `theta ** (-i / (K / 2 - 1))` a token: the authors' code
        spaces the angles from 1 to 1 / theta inclusive, RoPE stops short of it."""
        K = self.head_dim
        return self.theta ** (K / (K - 2)) if K > 2 else self.theta

    def build(self, d_model: int, norm_eps: float = 1e-5) -> RetNet:
        return RetNet(d_model, self, norm_eps)


class RetNet(Mixer[RecurrentState]):
    """Multi-scale retention, equations 6 and 8 of the paper:

        q, k = rotate(W x)        S_t = gamma_h S_{t-1} + k_t v_tᵀ        gamma_h = 1 - 2^(-5-h), h = 0, 1, …
        y = W_o (swish(W_g x) * norm_head(S_tᵀ q_t / sqrt(K)))

    The rotation is what remains of xPos once its decay is the head's gamma. Differences:
    * The norm of each head is the authors' code's, RMSNorm without weights (the paper writes GroupNorm).
    * Their code also divides scores by row sums, "invariant after normalization"; that is left out.
    * flash-linear-attention's layer gives the norm weights and rotates by RoPE's angles, which stop short of 1 / theta.
    * Channel i is rotated with channel i + K / 2 and not with its neighbour: weights are permuted on loading.
    """

    def __init__(self, d_model: int, config: RetNetConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config, self.norm_eps = config, config.own_eps(norm_eps)
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * V, bias=False)
        self.output_gate_proj = nn.Linear(d_model, H * V, bias=False)
        self.o_proj = nn.Linear(H * V, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        H, K, V = self.memory.board
        positions, theta = positions_of(x, state, seqs), self.config.rotation_theta
        q, k = (rotate(p(x).unflatten(-1, (H, K)), positions, theta) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (H, V))
        o, board = linear_attention(q, k, v, self._log_decay(q), **carried(state, seqs))
        z = self.output_gate_proj(x).unflatten(-1, (H, V))
        o = gated_rms_norm(o, z, z.new_ones(V), eps=self.norm_eps, gate="swish")
        return self.o_proj(o.flatten(-2)), following(state, x, seqs, board)

    def _log_decay(self, like: Tensor) -> Tensor:
        """`log(gamma_h)`, `[H]`, on the device of `like`. Computed rather than kept: no cast can round it."""
        h = torch.arange(self.config.num_heads, device=like.device, dtype=compute_dtype(like))
        return torch.log1p(-torch.exp2(-5 - h))

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)
