"""A recurrence whose whole transition matrix is read from the token: what `published_results.py` tracks A5 with.

IDS4, the input-dependent S4 of Merrill et al. 2024 (arXiv:2404.08819), as a mixer of one file (docs/new-mixer.md).
Nothing is chunked and nothing is fast: a layer for short sequences, to see what such a state can express.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from intarsia.layers.projections import linear
from intarsia.layers.recurrent import RecurrentMemory, RecurrentState, following
from intarsia.mixers import About, Mixer, MixerConfig
from intarsia.mixers.base import positive
from intarsia.ops import Sequences


@dataclass(frozen=True)
class DenseRecurrenceConfig(MixerConfig):
    """`width` numbers are remembered (N)."""

    type: ClassVar[str] = "dense-recurrence"
    about = About(
        title="Recurrence with a dense transition from the input (IDS4)",
        year=2024,
        source="arXiv:2404.08819",
        family="additive",
        equation="h_t = (I + A(x_t)) h_{t-1} + B x_t",
        brought="any matrix at every step, so that any group of permutations can be tracked",
        operator="a loop over tokens",
        example={"width": 64},
        decay="none",
    )
    width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(width=self.width)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> DenseRecurrence:
        return DenseRecurrence(d_model, self)


class DenseRecurrence(Mixer[RecurrentState]):
    """`h_t = (I + A(x_t)) h_{t-1} + B x_t`, `y = W_o h_t`, with A(x) an N x N matrix of linear functions of x.

    The paper has no I: with it, a layer begins as one that remembers everything.
    """

    def __init__(self, d_model: int, config: DenseRecurrenceConfig) -> None:
        super().__init__(d_model)
        self.config = config
        self.transition_proj = linear(d_model, config.width**2)
        self.in_proj = linear(d_model, config.width)
        self.o_proj = linear(config.width, d_model)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, seqs: Sequences | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x, state, seqs)
        rows = list(x) if seqs is None else list(x[0].split(seqs.lengths))
        h = x.new_zeros(len(rows), self.config.width) if state is None else state.board[:, 0, :, 0].to(x)
        if len({len(row) for row in rows}) == 1:
            read, last = self._read(torch.stack(rows), h)
            y = read if seqs is None else read.flatten(0, 1).unsqueeze(0)
        else:
            each = [self._read(row.unsqueeze(0), h[n : n + 1]) for n, row in enumerate(rows)]
            y = torch.cat([read for read, _ in each], dim=1)
            last = torch.cat([end for _, end in each])
        return self.o_proj(y), following(state, x, seqs, last[:, None, :, None].float())

    def _read(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """All states `[B, T, N]` and the last `[B, N]`, from tokens `[B, T, D]` and the state before `[B, N]`."""
        N = self.config.width
        transitions = self.transition_proj(x).unflatten(-1, (N, N))
        inputs, states = self.in_proj(x), []
        for t in range(x.shape[1]):
            h = h + (transitions[:, t] @ h.unsqueeze(-1)).squeeze(-1) + inputs[:, t]
            states.append(h)
        return torch.stack(states, dim=1), h

    @property
    def memory(self) -> RecurrentMemory:
        return RecurrentMemory(board=(1, self.config.width, 1))

    def mixing_flops(self, length: int) -> float:
        return 2.0 * self.config.width**2
