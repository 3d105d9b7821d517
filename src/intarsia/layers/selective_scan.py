"""The recurrence of Mamba and its kin: a state of N numbers for each channel, and what sets its speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.layers.float32 import KeepsFloat32
from intarsia.layers.flops import CHUNK
from intarsia.layers.gates import fill_time_steps
from intarsia.layers.recurrent import RecurrentState
from intarsia.ops import Sequences, linear_attention
from intarsia.ops.pools import gathered

SEGMENT_ELEMENTS = {"cpu": 1 << 20}
"""How many decay factors `[B, T, inner, N]` are made at once, by kind of device: few enough for a CPU's cache. Of
longer texts the backward pass makes them again, segment by segment."""
DEFAULT_SEGMENT_ELEMENTS = 1 << 24

WriteAndDecay = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""How much of x is written, `[B, T, inner]`, and the log-decay g, `[B, T, inner, N]`, from the step `[B, T, inner]`
and k `[B, T, N]`."""


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


def selective_scan(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    step: Tensor,
    write_and_decay: WriteAndDecay,
    state: RecurrentState | None,
    seqs: Sequences | None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence of each channel, with a state of N numbers:

        S_t = exp(g_t) * S_{t-1} + write_t x_t k_t        o_t = q_t · S_t

    where `write` and `g` are made of `step` and k. Texts that are long are computed in segments of whole chunks, so
    that cutting changes no rounding of an unpacked text.

    Args:
        q, k: `[B, T, N]`, the same for all channels.
        x, step: `[B, T, inner]`.
        write_and_decay: see `WriteAndDecay`.
        state: with a board `[B, inner, N, 1]`: for the shared operator each channel is a value head with K = N and
            V = 1.

    Returns:
        `[B, T, inner]`, and the board after the tokens where there is a state before them.
    """
    B, T, inner = step.shape
    inputs = (q, k, x, step)
    board, keeps_board = None if state is None else state.board, state is not None
    elements = SEGMENT_ELEMENTS.get(step.device.type, DEFAULT_SEGMENT_ELEMENTS)
    size = max(1, elements // (B * inner * q.shape[-1] * CHUNK)) * CHUNK
    if size >= T:
        return _segment(write_and_decay, inputs, board, keeps_board, seqs)
    board = gathered(board)
    boards = None if seqs is None else _BoardsOfSequences(seqs, board)
    outputs = []
    for start, parts in zip(
        range(0, T, size), zip(*(t.split(size, dim=1) for t in inputs), strict=True), strict=True
    ):
        end = min(start + size, T)
        within, board = (None, board) if boards is None else boards.begin(start, end)
        arguments = (write_and_decay, parts, board, keeps_board or end < T, within)
        if torch.is_grad_enabled():
            o, board = checkpoint(_segment, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            o, board = _segment(*arguments)
        if boards is not None and board is not None:
            boards.end(board)
        outputs.append(o)
    if boards is not None and keeps_board:
        board = boards.all()
    return torch.cat(outputs, dim=1), board


def _segment(
    write_and_decay: WriteAndDecay,
    inputs: tuple[Tensor, ...],
    board: Tensor | None,
    keeps_board: bool,
    seqs: Sequences | None,
) -> tuple[Tensor, Tensor | None]:
    q, k, x, step = inputs
    write, g = write_and_decay(step, k)
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
