"""Lightning Attention: linear attention with a fixed decay of each head (Qin et al. 2024, arXiv:2401.04658), as
MiniMax-01 has it (2025, arXiv:2501.08313), and Ling and Ring (2025, arXiv:2510.19338)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.norm import GatedNorm, RMSNorm
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.layers.rope import Yarn, positions_of, rotate_first
from intarsia.mixers.base import About, HeadsConfig, Mixer, NormedConfig, positive
from intarsia.ops import Sequences, linear_attention
from intarsia.ops.precision import compute_dtype


@dataclass(frozen=True)
class LightningConfig(NormedConfig, HeadsConfig):
    """The options of Lightning Attention; the defaults are MiniMax-01's.

    `head_dim` is the key dimension K, `head_v_dim` the value dimension V (K by default). All decay rates are
    multiplied with `decay_factor`: by default one that falls with the layer, from 1 in layer `decay_from` to nearly 0
    as many layers behind it as there are, less one, so that late layers forget least.

    `silu` says whether queries, keys and values go through one. `qk_norm` gives each head's queries and keys an
    RMSNorm, before `rope`, a share of their channels, is rotated with `rope_theta` and `yarn`. `scale` is a factor of
    the queries. The norm of the output is over `norm_groups` groups of heads (Ling: False, True, 0.5, `K ** -0.5`, 4).
    """

    type: ClassVar[str] = "lightning"
    about = About(
        title="Lightning Attention",
        year=2024,
        source="arXiv:2401.04658",
        family="additive",
        equation="S_t = exp(-s_h) S_{t-1} + k_t v_t^T    s_h = 2^(-8h/H) f(layer)",
        brought="linear attention in tiles that keeps its speed at any length; the first at frontier scale",
        operator="linear_attention",
        decay="fixed",
        example={"num_heads": 8, "head_dim": 128},
    )
    decay_factor: float | None = None
    decay_from: int = 0
    silu: bool = True
    qk_norm: bool = False
    rope: float = 0.0
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    scale: float = 1.0
    norm_groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(rope_theta=self.rope_theta, scale=self.scale, norm_groups=self.norm_groups)
        if not 0 <= self.rope <= 1 or self.rotated % 2:
            raise ConfigError(
                f"rope is a share of the head's channels, in [0, 1], and of {self.head_dim} an even number; got "
                f"{self.rope}"
            )
        if self.yarn is not None and not self.rotated:
            raise ConfigError("yarn stretches a rotation, and rope=0 has none")
        if self.num_heads % self.norm_groups:
            raise ConfigError(f"{self.num_heads} heads do not divide into norm_groups={self.norm_groups}")
        if self.decay_from < 0:
            raise ConfigError(f"decay_from is the number of a layer; got {self.decay_from}")
        if self.decay_factor is not None and self.decay_factor < 0:
            raise ConfigError(f"decay_factor must not be negative; got {self.decay_factor}")

    def at_layer(self, layer: int, depth: int) -> LightningConfig:
        if self.decay_factor is not None:
            return self
        fallen = 0.0 if depth == 1 else (layer - self.decay_from) / (depth - 1 + 1e-5)
        return replace(self, decay_factor=1 - fallen + 1e-5)

    @property
    def rotated(self) -> int:
        """How many channels of each head are rotated."""
        return round(self.head_dim * self.rope)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> LightningAttention:
        return LightningAttention(d_model, self, norm_eps)


class LightningAttention(Mixer[RecurrentState]):
    """Lightning Attention as in MiniMax-01's linear layers.

    q, k, v = silu(W x)
    S_t = exp(-s_h) S_{t-1} + k_t v_tᵀ        s_h = decay_factor 2^(-8 h / H), h = 1 … H
    y = W_o (sigmoid(W x) * rmsnorm(S_tᵀ q_t))

    The norm is over all heads together; nothing scales the queries, which it would undo. There is no position
    encoding and no convolution. "Lightning" is how it is computed, in tiles, and that is the operator's business.

    Ling's has norms of groups of heads, and another beginning: `q = scale rope(rmsnorm_head(W x))`,
    `k = rope(rmsnorm_head(W x))`, `v = W x`.
    """

    def __init__(self, d_model: int, config: LightningConfig, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.decay_factor = 1.0 if config.decay_factor is None else config.decay_factor
        self.q_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * V, bias=False)
        self.output_gate_proj = nn.Linear(d_model, H * V, bias=False)
        eps = config.own_eps(norm_eps)
        self.q_norm = RMSNorm(K, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(K, eps) if config.qk_norm else None
        self.norm = GatedNorm(H * V, eps, "sigmoid", config.norm_groups)
        self.o_proj = nn.Linear(H * V, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        c, heads = self.config, (self.config.num_heads, -1)
        made = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = ((F.silu(each) if c.silu else each).unflatten(-1, heads) for each in made)
        positions = positions_of(x, state, seqs) if c.rotated else None
        q, k = self._placed(q, self.q_norm, positions), self._placed(k, self.k_norm, positions)
        o, board = linear_attention(q, k, v, -self.rates(x), scale=c.scale, **carried(state, seqs))
        y = self.o_proj(self.norm(o.flatten(-2), self.output_gate_proj(x)))
        return y, following(state, x, seqs, board)

    def _placed(self, x: Tensor, norm: RMSNorm | None, positions: Tensor | None) -> Tensor:
        """Queries or keys `[B, T, H, K]`, normed and rotated."""
        c = self.config
        if norm is not None:
            x = norm(x)
        return x if positions is None else rotate_first(x, positions, c.rotated, c.rope_theta, c.yarn)

    def rates(self, x: Tensor) -> Tensor:
        """The decay rates of the heads, `[H]`, on the device of x."""
        H = self.config.num_heads
        exponents = torch.arange(1, H + 1, device=x.device, dtype=compute_dtype(x)) * (-8 / H)
        return self.decay_factor * exponents.exp2()

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)
