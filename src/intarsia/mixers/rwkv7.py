"""RWKV-7: a delta rule whose erased and written key and decay are chosen apart (Peng et al. 2025, arXiv:2503.14456)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.convolution import last_tokens, token_before
from intarsia.layers.filling import FillsItself
from intarsia.layers.flops import dplr_rule_flops
from intarsia.layers.gates import DecayBias
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import (
    About,
    GeneratorOf,
    HandedOn,
    HeadsConfig,
    Mixer,
    MixerOutput,
    NormedConfig,
    positive,
)
from intarsia.ops import Sequences, dplr_rule
from intarsia.ops.pools import gathered
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class RWKV7Config(NormedConfig, HeadsConfig):
    """The options of RWKV-7's time mixing.

    `num_heads` heads of `head_dim` (K; the published models have 64) and `head_v_dim` (V; K by default). The ranks
    are those of the small networks of the decay, of the in-context learning rate and of the output gate; the
    defaults are the authors' for a width of 1024. The norm's epsilon is `norm_eps` (or the model's) times K.
    `depth_fraction`, the layer's number over the depth, shapes the initial values; the model sets it.

    With a `value_rank` (32 in the authors' models of that width) the values are mixed with those of the first layer of
    the model, which must be one of these layers then; it is the rank of the network that says how much.
    """

    type: ClassVar[str] = "rwkv7"
    about = About(
        title="RWKV-7",
        year=2025,
        source="arXiv:2503.14456",
        family="delta",
        equation="S_t = (Diag(exp g_t) - (a_t * e_t) e_t^T) S_{t-1} + k_t v_t^T",
        brought="what is erased, what is written and how fast each channel learns are three decisions of a token",
        operator="dplr_rule",
        example={"num_heads": 8, "head_dim": 128},
        decay="channel",
    )
    decay_rank: int = 64
    rate_rank: int = 64
    gate_rank: int = 128
    depth_fraction: float | None = None
    value_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(decay_rank=self.decay_rank, rate_rank=self.rate_rank, gate_rank=self.gate_rank)
        positive(value_rank=self.value_rank)
        if self.depth_fraction is not None and not 0 <= self.depth_fraction < 1:
            raise ConfigError(f"depth_fraction must be in [0, 1); got {self.depth_fraction}")

    def at_layer(self, layer: int, depth: int) -> RWKV7Config:
        return self if self.depth_fraction is not None else replace(self, depth_fraction=layer / depth)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> RWKV7:
        return RWKV7(d_model, self, norm_eps)


class HeadLayerNorm(FillsItself):
    """LayerNorm of each head with weights and biases of each channel of all heads, in float32."""

    def __init__(self, heads: int, dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.empty(heads * dim))
        self.bias = nn.Parameter(torch.empty(heads * dim))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, o: Tensor) -> Tensor:
        """`[B, T, H, V]` to the same, float32 (float64 for float64)."""
        wide = widen(o).flatten(0, 1).flatten(1)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.group_norm(wide, self.heads, weight, bias, self.eps).view(o.shape)


class GradedDecayBias(DecayBias):
    """The bias of the decay, which spreads from slow to fast over the channels, more so in deeper layers."""

    def __init__(self, heads: int, dim: int, depth_fraction: float) -> None:
        self.heads, self.dim, self.depth_fraction = heads, dim, depth_fraction
        super().__init__(heads * dim)

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        exponent = 1 + self.depth_fraction**0.3
        self.bias.copy_(
            -5.5 + 6 * _ramp(self.heads * self.dim) ** exponent + 2.5 * _zigzag(self.heads, self.dim)
        )


class RWKV7(Mixer[RecurrentState]):
    """RWKV-7's time mixing (the paper's section 4; its states are our transposed).

    Each projection sees a mixture of the token and the one before it: `x_c = x_t + mu_c (x_{t-1} - x_t)`.

    r, k, v = W x_r, W x_k, W x_v
    g = -exp(-1/2) sigmoid(W tanh(W x_d) + b)            the log-decay, so that no factor is below 0.545
    a = sigmoid(W W x_a + b)                             the in-context learning rate of each channel
    κ = k * xi / |k * xi|        k~ = k * (1 + (a - 1) * alpha)        what is erased, and what is written
    v <- v + sigmoid(W W x_v + b) (v_first - v)          in layers behind the first, with `value_rank`
    S_t = (Diag(exp g_t) - (a_t * κ_t) κ_tᵀ) S_{t-1} + k~_t v_tᵀ
    y = W_o ((layernorm_head(S_tᵀ r_t) + (r_t · (rho * k~_t)) v_t) * W sigmoid(W x_g))

    The state's `conv` is the last token `[B, 1, D]`. Initial values along channels and layers are the authors', but
    for matrices and the norm, which begin as everywhere in this package.

    Left out: the orthogonal initial matrices. The channel mixing is a mixer of its own, `channel-mix`.
    """

    def __init__(self, d_model: int, config: RWKV7Config, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        H, K, V = config.num_heads, config.head_dim, config.value_dim
        self.shift = nn.Parameter(torch.empty(6, d_model))  # of r, d, k, v, a, g
        self.r_proj = nn.Linear(d_model, H * K, bias=False)
        self.k_proj = nn.Linear(d_model, H * K, bias=False)
        self.v_proj = nn.Linear(d_model, H * V, bias=False)
        self.decay_proj = _network(d_model, config.decay_rank, nn.Tanh(), H * K)
        self.decay = GradedDecayBias(H, K, config.depth_fraction or 0.0)
        self.rate_proj = _network(d_model, config.rate_rank, nn.Identity(), H * K)
        self.rate_bias = nn.Parameter(torch.empty(H * K))
        self.output_gate_proj = _network(d_model, config.gate_rank, nn.Sigmoid(), H * V)
        self.hands_on = self.takes_handed = config.value_rank is not None
        self.value_mix_proj: nn.Sequential | None = None
        self.value_mix_bias: nn.Parameter | None = None
        if config.value_rank is not None and config.depth_fraction:
            self.value_mix_proj = _network(d_model, config.value_rank, nn.Identity(), H * V)
            self.value_mix_bias = nn.Parameter(torch.empty(H * V))
        self.removal = nn.Parameter(torch.empty(H, K))  # xi
        self.replacement = nn.Parameter(torch.empty(H, K))  # alpha
        self.bonus = nn.Parameter(torch.empty(H, K))  # rho
        self.norm = HeadLayerNorm(H, V, config.own_eps(norm_eps) * K)  # 64e-5 in the published models
        self.o_proj = nn.Linear(H * V, d_model, bias=False)
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        H, K, D = self.config.num_heads, self.config.head_dim, self.d_model
        fraction = self.config.depth_fraction or 0.0
        # Deeper layers look less at the token before.
        exponents = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None] * (1 - fraction)
        self.shift.copy_(1 - (torch.arange(D) / D) ** exponents)
        ramp = _ramp(H * K)
        self.rate_bias.copy_(-0.19 + 0.3 * _zigzag(H, K) + 0.4 * (ramp - 0.5))
        if self.value_mix_bias is not None:
            self.value_mix_bias.copy_(0.73 - 0.4 * (_ramp(self.value_mix_bias.numel()) - 0.5))
        self.removal.copy_((0.71 - 0.1 * (ramp - 0.5)).view(H, K))
        self.replacement.fill_(1.02)
        self.bonus.fill_(-0.04)

    def forward(
        self,
        x: Tensor,
        state: RecurrentState | None = None,
        seqs: Sequences | None = None,
        handed: HandedOn | None = None,
    ) -> MixerOutput[RecurrentState]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        H, K, V = self.memory.board
        first = None if state is None else gathered(state.conv)
        before = token_before(x, first, seqs) - x
        x_r, x_d, x_k, x_v, x_a, x_g = (x + before * share.to(x.dtype) for share in self.shift)
        r, k = self.r_proj(x_r).unflatten(-1, (H, K)), self.k_proj(x_k).unflatten(-1, (H, K))
        v = self._mixed(self.v_proj(x_v).unflatten(-1, (H, V)), x_v, handed)
        decay = self.decay(self.decay_proj(x_d))
        g = -math.exp(-0.5) * torch.sigmoid(decay).unflatten(-1, (H, K))
        rate = torch.sigmoid(widen(self.rate_proj(x_a)) + self.rate_bias).unflatten(-1, (H, K))
        wide = widen(k)
        removed = F.normalize(wide * self.removal, dim=-1)
        written = (wide * (1 + (rate - 1) * self.replacement)).to(k.dtype)
        o, board = dplr_rule(
            r,
            written,
            v,
            rate * removed,
            removed,
            g,
            scale=1.0,
            **carried(state, seqs),
        )
        bonus = (widen(r) * self.bonus * written).sum(-1, keepdim=True) * v
        gated = (self.norm(o) + bonus) * self.output_gate_proj(x_g).unflatten(-1, (H, V))
        y = self.o_proj(gated.flatten(-2).to(o.dtype))
        last = None if first is None else last_tokens(x, first, seqs)
        state = following(state, x, seqs, board, last)
        if handed is None:
            return y, state
        own = HandedOn(v, handed.indexed, handed.picked)
        return y, state, own if handed.values is None else handed

    def _mixed(self, v: Tensor, x_v: Tensor, first: HandedOn | None) -> Tensor:
        """The values, mixed with those of the first layer where this is a later one."""
        if self.value_mix_proj is None or self.value_mix_bias is None:
            return v
        if first is None or first.values is None:
            raise ConfigError(
                "value_rank mixes values with those of the model's first layer, which must be of the same mixer"
            )
        share = torch.sigmoid(widen(self.value_mix_proj(x_v)) + self.value_mix_bias).unflatten(
            -1, v.shape[2:]
        )
        return (v + share * (first.values - v)).to(v.dtype)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.head_dim, c.value_dim), (1, self.d_model))

    def mixing_flops(self, length: int) -> float:
        return dplr_rule_flops(*self.memory.board)


def _ramp(channels: int) -> Tensor:
    """From 0 to 1 over all channels."""
    return torch.linspace(0, 1, channels) if channels > 1 else torch.zeros(1)


def _zigzag(heads: int, dim: int) -> Tensor:
    """From -1 to 1 over the channels of each head, steeper at both ends."""
    line = torch.linspace(-1, 1, dim) if dim > 1 else torch.zeros(1)
    return (line * line.abs()).repeat(heads)


def _network(d_in: int, rank: int, activation: nn.Module, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, rank, bias=False), activation, nn.Linear(rank, d_out, bias=False))
