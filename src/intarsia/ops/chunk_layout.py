"""How sequences are cut into chunks that are worked on side by side.

Within a sequence the chunks depend on each other, one after the other; between sequences they do not. The
chunks are therefore ordered by step: first the first chunk of every sequence, then the second chunk of every
sequence that has one, and so on. With the sequences sorted by length, step `s` is a contiguous run of
chunks, and the states that go on are a prefix of the states before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.sequences import Sequences, placed
from intarsia.ops.tracing import transform


@dataclass(frozen=True)
class ChunkLayout:
    """The chunks, each of `size` tokens, of sequences of the given lengths.

    `packed` sequences lie in one row `[1, total]`; others are the rows of a batch and have one length.
    Chunks are padded with zeros: a token with zero key, value, beta and log-decay changes nothing.
    """

    lengths: tuple[int, ...]
    size: int
    packed: bool
    order: tuple[int, ...]
    """The sequences, longest first."""
    active: tuple[int, ...]
    """How many sequences have a chunk at each step."""

    @classmethod
    def of(cls, batch: int, length: int, seqs: Sequences | None, max_size: int) -> ChunkLayout:
        """The layout of a batch, with chunks no longer than the next power of two of its longest sequence."""
        lengths = seqs.lengths if seqs is not None else (length,) * batch
        size = min(max_size, 1 << (max(lengths) - 1).bit_length())
        order = tuple(sorted(range(len(lengths)), key=lambda n: -lengths[n]))
        chunks = [-(-n // size) for n in lengths]
        active = tuple(sum(c > step for c in chunks) for step in range(max(chunks)))
        return cls(lengths, size, seqs is not None, order, active)

    def token_index(self, device: torch.device) -> Tensor:
        """For each chunk, the place of its tokens in the packed row, `[chunks, size]`; `total` is padding."""
        starts = Sequences(self.lengths).starts
        lengths = torch.tensor([self.lengths[n] for n in self.order])
        first = torch.tensor([starts[n] for n in self.order])
        active = torch.tensor(self.active)
        step = torch.repeat_interleave(torch.arange(len(active)), active, output_size=sum(self.active))
        rank = torch.cat([torch.arange(n) for n in self.active])
        offset = step[:, None] * self.size + torch.arange(self.size)
        index = first[rank, None] + offset
        return placed(torch.where(offset < lengths[rank, None], index, sum(self.lengths)), device)

    def split(self, x: Tensor, segments: Sequence[slice]) -> list[Tensor]:
        """`[B, T, heads, ...]` to `[chunks, heads, size, ...]` for each run of steps."""
        counts = self._counts(segments)
        if self.packed:
            padded = F.pad(x[0], (0, 0) * (x.dim() - 2) + (0, 1))
            index, inverse = self._token_places(x.device)
            tokens = _reordered(padded, index.flatten(), inverse).unflatten(0, index.shape)
            return [part.transpose(1, 2) for part in tokens.split(counts)]
        B, T = x.shape[:2]
        steps = len(self.active)
        if steps * self.size > T:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, steps * self.size - T))
        parts = x.unflatten(1, (steps, self.size)).split([count // B for count in counts], dim=1)
        return [part.transpose(0, 1).flatten(0, 1).transpose(1, 2).contiguous() for part in parts]

    def join(self, parts: Sequence[Tensor], segments: Sequence[slice], length: int) -> Tensor:
        """The inverse of `split` without the padding: `[chunks, heads, size, ...]` of each run of steps to
        `[B, length, heads, ...]`."""
        if self.packed:
            tokens = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
            index, inverse = self._token_places(tokens.device)
            return _reordered(tokens, inverse, index.flatten())[None, :length]
        B = len(self.lengths)
        rows = (part.transpose(1, 2).unflatten(0, (-1, B)).transpose(0, 1).flatten(1, 2) for part in parts)
        return torch.cat(list(rows), dim=1)[:, :length]

    def _counts(self, segments: Sequence[slice]) -> list[int]:
        """The number of chunks in each run of steps."""
        return [sum(self.active[steps]) for steps in segments]

    def _token_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`token_index` and its inverse: the place in the chunks of each token of the row and of padding."""
        index = self.token_index(device)
        inverse = torch.zeros(sum(self.lengths) + 1, dtype=torch.long, device=device)
        inverse[index.flatten()] = torch.arange(index.numel(), device=device)
        return index, inverse


class _Reorder(torch.autograd.Function):
    """`x[index]` with the gradient `grad[inverse]`: every row but padding is used once, and the gradient of
    padding is zero or not read. (The gradient of plain indexing adds up row by row, many times slower.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _reordered(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`_Reorder`, or what the transforms of `torch.func` can see of it."""
    return _Reorder.apply(x, index, inverse) if transform() is None else x.index_select(0, index)
