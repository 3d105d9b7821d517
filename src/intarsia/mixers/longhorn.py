"""Longhorn: each token solves a small regression exactly (Liu et al. 2024, arXiv:2407.14207)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.convolution import ShortConvolution, inputs_kept
from intarsia.layers.flops import additive_rule_flops
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, begun, following
from intarsia.layers.selective_scan import ChannelRates, StepProjection, selective_scan
from intarsia.mixers.base import About, Mixer, MixerConfig, positive
from intarsia.ops import Sequences
from intarsia.ops.precision import widen


@dataclass(frozen=True)
class LonghornConfig(MixerConfig):
    """The options of Longhorn, as those of Mamba; the defaults are the authors' code's, which are Mamba's."""

    type: ClassVar[str] = "longhorn"
    about = About(
        title="Longhorn",
        year=2024,
        source="arXiv:2407.14207",
        family="delta",
        equation="S_t = (1 - D_t k_t^2) * S_{t-1} + D_t x_t k_t    D_t = b_t / (1 + b_t k_t.k_t)",
        brought="a decay that follows from what is written: no forget gate to parametrise",
        operator="linear_attention",
        decay="channel",
        example={"expand": 2, "state_dim": 16},
    )

    expand: int = 2
    state_dim: int = 16
    conv_size: int = 4
    dt_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(expand=self.expand, state_dim=self.state_dim, conv_size=self.conv_size, dt_rank=self.dt_rank)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Longhorn:
        return Longhorn(d_model, self)


class Longhorn(Mixer[RecurrentState]):
    """Longhorn's recurrence in Mamba's block.

        x = silu(conv(W u) + b)            beta = sigmoid(W W x + dt_bias)      [B, T, inner]
        k, q = W x, W x                                                         [B, T, N], the same for all channels
        y = W ((q_t · s_t + D x_t) * silu(W u))

    Each channel's state s `[N]` solves, for every token,

        min_s  ||s - s_{t-1}||² + beta_t (s · k_t - x_t)²

    whose solution is the delta rule with the strength `Delta = beta / (1 + beta k·k)`; the erased `Delta k kᵀ` is
    then taken by its diagonal, as in the paper, so that a token is a decay of each channel and state and a write:

        s_t = (1 - Delta_t k_t²) * s_{t-1} + Delta_t x_t k_t

    Different from the authors' code: fused maps stand apart, as in `Mamba`, and initial weights follow the model's
    policy but for D, one, `dt_bias`, zero, and the projection of the step. There is no norm.
    """

    def __init__(self, d_model: int, config: LonghornConfig) -> None:
        super().__init__(d_model)
        self.config = config
        inner, N = config.expand * d_model, config.state_dim
        rank = math.ceil(d_model / 16) if config.dt_rank is None else config.dt_rank
        self.v_proj = nn.Linear(d_model, inner, bias=False)
        self.output_gate_proj = nn.Linear(d_model, inner, bias=False)
        self.conv = ShortConvolution(inner, config.conv_size, bias=True)
        self.q_proj = nn.Linear(inner, N, bias=False)
        self.k_proj = nn.Linear(inner, N, bias=False)
        self.dt_proj = nn.Sequential(
            nn.Linear(inner, rank, bias=False), StepProjection(rank, inner, bias=False)
        )
        self.decay = ChannelRates(inner, None)
        self.o_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        z = self.output_gate_proj(x)
        v, inputs = self.conv(self.v_proj(x), None if state is None else state.conv, seqs)
        # The recurrence works in float32: next to its decay factors, these are small.
        _, dt_bias, skip = self.decay()
        step = widen(self.dt_proj(v)) + dt_bias
        q, k, wide = widen(self.q_proj(v)), widen(self.k_proj(v)), widen(v)
        o, board = selective_scan(q, k, wide, step, write_and_decay, state, seqs)
        y = self.o_proj(((o + skip * wide) * F.silu(widen(z))).to(z.dtype))
        return y, following(state, x, seqs, board, inputs)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.expand * self.d_model, c.state_dim, 1), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)


def write_and_decay(step: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Delta `[B, T, inner]` and the log-decay `[B, T, inner, N]`, from the raw beta and k `[B, T, N]`."""
    beta = torch.sigmoid(step)
    squares = k.square()
    norm = squares.sum(-1, keepdim=True)
    whole = beta * norm
    # 1 - Delta k² = (1 + beta (k·k - k²)) / (1 + beta k·k): positive also where rounding makes Delta k² one.
    others = (norm - squares).clamp(min=0)
    g = (beta[..., None] * others[:, :, None]).log1p() - whole.log1p()[..., None]
    return beta / (1 + whole), g
