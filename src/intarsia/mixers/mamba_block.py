"""What Mamba and Longhorn share: the block, and a state of N numbers for each channel."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.filling import FillsItself
from intarsia.layers.float32 import KeepsFloat32
from intarsia.layers.gates import fill_time_steps
from intarsia.layers.states import RecurrentState
from intarsia.mixers.base import GeneratorOf, MixerConfig, positive
from intarsia.mixers.recurrent import CHUNK, RecurrentMixer, additive_rule_flops
from intarsia.ops import Sequences, linear_attention
from intarsia.ops.precision import widen

SEGMENT_ELEMENTS = {"cpu": 1 << 20}
"""How many decay factors `[B, T, inner, N]` are made at once, by kind of device: few enough for a CPU's cache. Of
longer texts the backward pass makes them again, segment by segment."""
DEFAULT_SEGMENT_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class MambaBlockConfig(MixerConfig):
    """The options of the block; the defaults are those of both papers.

    `expand` times the model's width are the `inner` channels, each with a state of `state_dim` (N) numbers. The
    step size comes through `dt_rank` dimensions: by default a sixteenth of the model's width, rounded up.
    """

    expand: int = 2
    state_dim: int = 16
    conv_size: int = 4
    dt_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(expand=self.expand, state_dim=self.state_dim, conv_size=self.conv_size, dt_rank=self.dt_rank)


class StepProjection(FillsItself, nn.Linear):
    """The projection of the step sizes from their rank to the channels, which begins as Mamba's does: uniform in
    ±1/sqrt(rank), so that the step's variance is that of its input."""

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator_of("weight"))


class ChannelRates(FillsItself, KeepsFloat32):
    """What sets the speed of each channel, in float32: `dt_bias` and `D` `[inner]`, and with a `state_dim` (N)
    `A_log` `[inner, N]`.

    Initial values as in Mamba: `A = -(1 … N)`, `softplus(dt_bias)` log-uniform in [0.001, 0.1], D one. Without a
    `state_dim`, as in Longhorn, `dt_bias` is zero.
    """

    float32_names = ("A_log", "dt_bias", "D")
    drawn_as_parent = True

    def __init__(self, inner: int, state_dim: int | None) -> None:
        super().__init__()
        self.A_log = None if state_dim is None else nn.Parameter(torch.empty(inner, state_dim))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.D = nn.Parameter(torch.empty(inner))
        self.reset_parameters()

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        if self.A_log is None:
            self.dt_bias.zero_()
        else:
            self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1).log())
            fill_time_steps(self.dt_bias, generator_of("dt_bias"))
        self.D.fill_(1)

    def forward(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """`-exp(A_log)` or None, `dt_bias` and `D`."""
        return None if self.A_log is None else -self.A_log.exp(), self.dt_bias.clone(), self.D.clone()


class MambaBlock(RecurrentMixer):
    """The block of Mamba (Gu and Dao 2023, arXiv:2312.00752, figure 3) around a recurrence of each channel:

        x = silu(conv(W u) + b)                      [B, T, inner]
        step = W W x + dt_bias                       [B, T, inner], low-rank
        k, q = W x, W x                              [B, T, N], the same for all channels
        S_t = exp(g_t) * S_{t-1} + write_t x_t k_t   [N] for each channel
        y = W ((q_t · S_t + D x_t) * silu(W u))

    `g` and `write` are made of the step, as a subclass says; `decay` holds A_log, dt_bias and D. For the shared
    operator each channel is a value head with K = N and V = 1. The board is `[B, inner, N, 1]`.
    """

    has_rates: ClassVar[bool]
    """Whether the decays of a channel have rates of their own, `A_log`."""

    def __init__(self, d_model: int, config: MambaBlockConfig) -> None:
        super().__init__(d_model)
        self.config = config
        self.inner, self.state_dim = config.expand * d_model, config.state_dim
        rank = math.ceil(d_model / 16) if config.dt_rank is None else config.dt_rank
        self.v_proj = nn.Linear(d_model, self.inner, bias=False)
        self.output_gate_proj = nn.Linear(d_model, self.inner, bias=False)
        self.conv: ShortConvolution = ShortConvolution(self.inner, config.conv_size, bias=True)
        self.q_proj = nn.Linear(self.inner, self.state_dim, bias=False)
        self.k_proj = nn.Linear(self.inner, self.state_dim, bias=False)
        self.dt_proj = nn.Sequential(
            nn.Linear(self.inner, rank, bias=False), StepProjection(rank, self.inner, bias=False)
        )
        self.decay = ChannelRates(self.inner, self.state_dim if self.has_rates else None)
        self.o_proj = nn.Linear(self.inner, d_model, bias=False)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        z = self.output_gate_proj(x)
        v, tail = self.conv(self.v_proj(x), None if state is None else state.conv, seqs)
        # The recurrence works in float32: next to its decay factors, these are small.
        rates, dt_bias, skip = self.decay()
        step = widen(self.dt_proj(v)) + dt_bias
        q, k, wide = widen(self.q_proj(v)), widen(self.k_proj(v)), widen(v)
        o, board = self._scan(
            (q, k, wide, step), rates, None if state is None else state.board, state is not None, seqs
        )
        y = self.o_proj(((o + skip * wide) * F.silu(widen(z))).to(z.dtype))
        if state is None or board is None:
            return y, None
        return y, state.after(x, seqs, board, tail)

    def _scan(
        self,
        inputs: tuple[Tensor, ...],
        rates: Tensor | None,
        board: Tensor | None,
        keeps_board: bool,
        seqs: Sequences | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The recurrence over q, k `[B, T, N]`, x and the step `[B, T, inner]`, in segments where it is long.

        A segment is whole chunks, so that cutting changes no rounding of an unpacked text.
        """
        B, T, inner = inputs[-1].shape
        elements = SEGMENT_ELEMENTS.get(inputs[-1].device.type, DEFAULT_SEGMENT_ELEMENTS)
        size = max(1, elements // (B * inner * self.state_dim * CHUNK)) * CHUNK
        if size >= T:
            return self._segment(inputs, rates, board, keeps_board, seqs)
        boards = None if seqs is None else _BoardsOfSequences(seqs, board)
        outputs = []
        for start, parts in zip(
            range(0, T, size), zip(*(x.split(size, dim=1) for x in inputs), strict=True), strict=True
        ):
            end = min(start + size, T)
            within, board = (None, board) if boards is None else boards.begin(start, end)
            arguments = (parts, rates, board, keeps_board or end < T, within)
            if torch.is_grad_enabled():
                o, board = checkpoint(
                    self._segment, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                o, board = self._segment(*arguments)
            if boards is not None and board is not None:
                boards.end(board)
            outputs.append(o)
        if boards is not None and keeps_board:
            board = boards.all()
        return torch.cat(outputs, dim=1), board

    def _segment(
        self,
        inputs: tuple[Tensor, ...],
        rates: Tensor | None,
        board: Tensor | None,
        keeps_board: bool,
        seqs: Sequences | None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, x, step = inputs
        write, g = self.write_and_decay(step, k, rates)
        o, board = linear_attention(
            q[:, :, None],
            k[:, :, None],
            (write * x)[..., None],
            g,
            scale=1.0,
            initial_state=board,
            output_final_state=keeps_board,
            cu_seqlens=seqs,
        )
        return o.squeeze(-1), board

    @staticmethod
    @abstractmethod
    def write_and_decay(step: Tensor, k: Tensor, rates: Tensor | None) -> tuple[Tensor, Tensor]:
        """How much of x is written, `[B, T, inner]`, and the log-decay g, `[B, T, inner, N]`, from the step
        `[B, T, inner]` and k `[B, T, N]`."""

    @property
    def board_shape(self) -> tuple[int, int, int]:
        return self.inner, self.state_dim, 1

    def mixing_flops(self) -> int:
        return additive_rule_flops(*self.board_shape)


class _BoardsOfSequences:
    """The boards of packed sequences while a row is computed in segments."""

    def __init__(self, seqs: Sequences, initial: Tensor | None) -> None:
        self._seqs = seqs
        self._latest = {} if initial is None else dict(enumerate(initial.split(1)))
        self._here: list[int] = []

    def begin(self, start: int, end: int) -> tuple[Sequences, Tensor | None]:
        """The sequences with tokens from `start` to `end`, and their boards before (None: zero)."""
        spans = [(first, first + n) for first, n in zip(self._seqs.starts, self._seqs.lengths, strict=True)]
        lengths = [max(min(last, end) - max(first, start), 0) for first, last in spans]
        self._here = [n for n, length in enumerate(lengths) if length]
        boards = [self._latest.get(n) for n in self._here]
        known = next((board for board in boards if board is not None), None)
        within = Sequences(tuple(lengths[n] for n in self._here))
        if known is None:
            return within, None
        zero = torch.zeros_like(known)
        return within, torch.cat([zero if board is None else board for board in boards])

    def end(self, boards: Tensor) -> None:
        """Take the boards after the segment that was begun."""
        self._latest.update(zip(self._here, boards.split(1), strict=True))

    def all(self) -> Tensor:
        """The boards after the last token of each sequence."""
        zero = torch.zeros_like(next(iter(self._latest.values())))
        return torch.cat([self._latest.get(n, zero) for n in range(self._seqs.count)])
