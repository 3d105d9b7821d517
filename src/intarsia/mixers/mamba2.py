"""Mamba-2: a selective state space with one decay a head (Dao and Gu 2024, arXiv:2405.21060)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.convolution import ShortConvolution, inputs_kept
from intarsia.layers.filling import FillsItself
from intarsia.layers.float32 import KeepsFloat32
from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.gates import fill_time_steps
from intarsia.layers.projections import linear, split_heads
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, carried, following
from intarsia.mixers.base import About, GeneratorOf, Mixer, NormedConfig, positive
from intarsia.ops import Sequences, linear_attention
from intarsia.ops.precision import widen

MambaNorm = Literal["after_gate", "before_gate", "none"]


@dataclass(frozen=True)
class Mamba2Config(NormedConfig):
    """The options of Mamba-2; the defaults are the paper's.

    `num_heads` value heads (HV) of `head_dim` (V); `num_groups` heads of queries and keys (H), each of `state_dim`
    (K) and shared by `num_heads / num_groups` value heads. The published size is `num_heads * head_dim` twice the
    model's width. The step size is kept in `[dt_min, dt_max]`; None is no upper limit. `bias` gives one to each
    projection, and `conv_bias` to the convolution. `input_scales` are factors of what the projections give: of the
    gate, x, k, q and dt (Falcon-H1). `norm` says where that of the output stands: after the gate, before it, or
    nowhere.
    """

    type: ClassVar[str] = "mamba2"
    about = About(
        title="Mamba-2",
        year=2024,
        source="arXiv:2405.21060",
        family="additive",
        equation="S_t = exp(dt_t A) S_{t-1} + k_t (dt_t x_t)^T",
        brought="one decay a head: the state space becomes linear attention, and matrix products compute it",
        operator="linear_attention",
        decay="head",
        example={"num_heads": 32, "head_dim": 64, "state_dim": 128},
    )
    num_heads: int
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    conv_size: int = 4
    dt_min: float = 0.0
    dt_max: float | None = None
    bias: bool = False
    conv_bias: bool = True
    input_scales: tuple[float, float, float, float, float] | None = None
    norm: MambaNorm = "after_gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            num_heads=self.num_heads, head_dim=self.head_dim, state_dim=self.state_dim,
            num_groups=self.num_groups, conv_size=self.conv_size, dt_max=self.dt_max,
        )  # fmt: skip
        for scale in self.input_scales or ():
            positive(input_scales=scale)
        if self.num_heads % self.num_groups:
            raise ConfigError(
                f"num_heads must be a multiple of num_groups={self.num_groups}; got {self.num_heads}"
            )
        if self.dt_min < 0 or (self.dt_max is not None and self.dt_min > self.dt_max):
            raise ConfigError(f"dt_min must be in [0, dt_max={self.dt_max}]; got {self.dt_min}")

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Mamba2:
        return Mamba2(d_model, self, norm_eps)


class GroupedNorm(FillsItself):
    """RMSNorm of each group of channels after a gate, `weight * rmsnorm_group(y silu(z))`, in float32; or before it,
    `weight * rmsnorm_group(y) * silu(z)`; or the gate alone."""

    def __init__(self, dim: int, groups: int, eps: float, norm: MambaNorm = "after_gate") -> None:
        super().__init__()
        self.groups, self.eps, self.norm = groups, eps, norm
        self.weight: nn.Parameter | None
        self.register_parameter("weight", None if norm == "none" else nn.Parameter(torch.empty(dim)))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """`y` in a wide dtype and the raw gate `z`, both `[B, T, dim]`; the result in z's dtype."""
        gate = F.silu(widen(z))
        if self.weight is None:
            return (y * gate).to(z.dtype)
        grouped = (y if self.norm == "before_gate" else y * gate).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], None, self.eps).flatten(-2) * self.weight
        return (normed * gate if self.norm == "before_gate" else normed).to(z.dtype)


class HeadRates(FillsItself, KeepsFloat32):
    """What sets the speed of each head, in float32: `A_log`, `dt_bias` and `D`, all `[heads]`."""

    float32_names = ("A_log", "dt_bias", "D")
    drawn_as_parent = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        self.A_log.uniform_(1, 16, generator=generator_of("A_log")).log_()
        fill_time_steps(self.dt_bias, generator_of("dt_bias"))
        self.D.fill_(1)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """`-exp(A_log)`, `dt_bias` and `D`."""
        return -self.A_log.exp(), self.dt_bias.clone(), self.D.clone()


class Mamba2(Mixer[RecurrentState]):
    """Mamba-2: the state space dual model in the block of the paper's section 7, with parallel projections.

    x, k, q = silu(conv(W u) + b)        dt = clamp(softplus(W u + dt_bias)) [B, T, HV]
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + k_t (dt_t x_t)ᵀ
    y = W_o rmsnorm_group((S_tᵀ q_t + D x_t) * silu(W u))

    k is the paper's B, q its C. The norm may stand before the gate or be left out, and each W u have a factor.
    Different from the authors' code: the parts of their `in_proj` are maps of their own, and initial weights follow the
    model's policy, but for those that are named there: `exp(A_log)` uniform in [1, 16], `softplus(dt_bias)` log-uniform
    in [0.001, 0.1] and D one.
    """

    def __init__(self, d_model: int, config: Mamba2Config, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model)
        self.config = config
        HV, K, V = config.num_heads, config.state_dim, config.head_dim
        inner, keys, bias = HV * V, config.num_groups * K, config.bias
        self.v_proj = linear(d_model, inner, bias)
        self.k_proj = linear(d_model, keys, bias)
        self.q_proj = linear(d_model, keys, bias)
        self.dt_proj = linear(d_model, HV, bias)
        self.output_gate_proj = linear(d_model, inner, bias)
        self.conv = ShortConvolution(inner + 2 * keys, config.conv_size, bias=config.conv_bias)
        self.decay = HeadRates(HV)
        self.norm = GroupedNorm(inner, config.num_groups, config.own_eps(norm_eps), config.norm)
        self.o_proj = linear(inner, d_model, bias)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        (HV, K, V), H = self.memory.board, self.config.num_groups
        z, v, k, q, dt = self._projected(x)
        vkq = torch.cat([v, k, q], dim=-1)
        vkq, inputs = self.conv(vkq, None if state is None else state.conv, seqs)
        v, k, q = split_heads(vkq, (HV, V), (H, K), (H, K))
        rates, dt_bias, skip = self.decay()
        dt = F.softplus(widen(dt) + dt_bias).clamp(self.config.dt_min, self.config.dt_max)
        o, board = linear_attention(
            q, k, (v * dt[..., None]).to(v.dtype), rates * dt, scale=1.0, **carried(state, seqs)
        )
        y = self.o_proj(self.norm((o + skip[:, None] * v).flatten(-2), z))
        return y, following(state, x, seqs, board, inputs)

    def _projected(self, x: Tensor) -> list[Tensor]:
        """The gate, x, k, q and dt, before convolution and softplus."""
        parts = (self.output_gate_proj, self.v_proj, self.k_proj, self.q_proj, self.dt_proj)
        if self.config.input_scales is None:
            return [part(x) for part in parts]
        return [scale * part(x) for scale, part in zip(self.config.input_scales, parts, strict=True)]

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.num_heads, c.state_dim, c.head_dim), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)
