"""How sequences are cut into chunks that are worked on side by side.

Within a sequence the chunks depend on each other, one after the other; between sequences they do not. The
chunks are therefore ordered by step: first the first chunk of every sequence, then the second chunk of every
sequence that has one, and so on. With the sequences sorted by length, step `s` is a contiguous run of
chunks, and the states that go on are a prefix of the states before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.sequences import Sequences


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
        step = torch.repeat_interleave(torch.arange(len(self.active)), torch.tensor(self.active))
        rank = torch.cat([torch.arange(n) for n in self.active])
        offset = step[:, None] * self.size + torch.arange(self.size)
        index = first[rank, None] + offset
        return torch.where(offset < lengths[rank, None], index, sum(self.lengths)).to(device)

    def split(self, x: Tensor) -> Tensor:
        """`[B, T, heads, ...]` to `[chunks, heads, size, ...]`, ordered by step."""
        if self.packed:
            padded = F.pad(x[0], (0, 0) * (x.dim() - 2) + (0, 1))
            return padded[self.token_index(x.device)].transpose(1, 2)
        B, T = x.shape[:2]
        steps = len(self.active)
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, steps * self.size - T))
        x = x.view(B, steps, self.size, *x.shape[2:])
        return x.transpose(0, 1).reshape(steps * B, self.size, *x.shape[3:]).transpose(1, 2)

    def join(self, x: Tensor, length: int) -> Tensor:
        """The inverse of `split` without the padding: `[chunks, heads, size, ...]` to `[B, length, heads, ...]`."""
        x = x.transpose(1, 2)
        if self.packed:
            index = self.token_index(x.device).flatten()
            place = torch.empty(length + 1, dtype=torch.long, device=x.device)
            place[index] = torch.arange(index.numel(), device=x.device)
            return x.flatten(0, 1)[place[:length]][None]
        steps, B = len(self.active), len(self.lengths)
        x = x.reshape(steps, B, self.size, *x.shape[2:]).transpose(0, 1)
        return x.reshape(B, steps * self.size, *x.shape[3:])[:, :length]
