"""Mamba: a linear recurrence whose step size, input and output depend on the token (Gu and Dao 2023,
arXiv:2312.00752)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
class MambaConfig(MixerConfig):
    """The options of Mamba; the defaults are the paper's.

    `expand` times the model's width are the `inner` channels, each with a state of `state_dim` (N) numbers. The
    step size comes through `dt_rank` dimensions: by default a sixteenth of the model's width, rounded up.
    """

    type: ClassVar[str] = "mamba"
    about = About(
        title="Mamba (selective state space)",
        year=2023,
        source="arXiv:2312.00752",
        family="additive",
        equation="S_t = exp(dt_t A) * S_{t-1} + dt_t x_t k_t    (each channel a state)",
        brought="state space models whose step, input and output depend on the token: they choose what to keep",
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

    def build(self, d_model: int, norm_eps: float = 1e-5) -> Mamba:
        return Mamba(d_model, self)


class Mamba(Mixer[RecurrentState]):
    """Mamba: the block of the paper's figure 3 around the selective scan (algorithm 2, S6).

        x = silu(conv(W u) + b)                                   [B, T, inner]
        dt = softplus(W W x + dt_bias)                            [B, T, inner], low-rank
        k, q = W x, W x                                           [B, T, N], the same for all channels
        S_t = exp(dt_t A) * S_{t-1} + dt_t x_t k_t                [N] for each channel, A = -exp(A_log)
        y = W ((q_t · S_t + D x_t) * silu(W u))

    k is the paper's B and q its C. That `dt` also scales what is written is the authors' simplification of the
    zero-order hold, which the paper's equation 4 has exactly.

    Different from the authors' code: the two halves of their `in_proj`, and the three parts of `x_proj`, are maps of
    their own, and initial weights follow the model's policy, but for those that the paper names: `A = -(1 … N)`,
    `softplus(dt_bias)` log-uniform in [0.001, 0.1], D one and the projection of the step. There is no norm.
    """

    def __init__(self, d_model: int, config: MambaConfig) -> None:
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
        self.decay = ChannelRates(inner, N)
        self.o_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        state = begun(state, x, seqs)
        z = self.output_gate_proj(x)
        v, inputs = self.conv(self.v_proj(x), None if state is None else state.conv, seqs)
        # The recurrence works in float32: next to its decay factors, these are small.
        rates, dt_bias, skip = self.decay()
        step = widen(self.dt_proj(v)) + dt_bias
        q, k, wide = widen(self.q_proj(v)), widen(self.k_proj(v)), widen(v)

        def write_and_decay(step: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            dt = F.softplus(step)
            return dt, dt[..., None] * rates

        o, board = selective_scan(q, k, wide, step, write_and_decay, state, seqs)
        y = self.o_proj(((o + skip * wide) * F.silu(widen(z))).to(z.dtype))
        return y, following(state, x, seqs, board, inputs)

    @property
    def memory(self) -> RecurrentMemory:
        c = self.config
        return RecurrentMemory((c.expand * self.d_model, c.state_dim, 1), inputs_kept(self.conv))

    def mixing_flops(self, length: int) -> float:
        return additive_rule_flops(*self.memory.board)
