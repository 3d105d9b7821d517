"""Several sequences laid end to end in one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.ops.tracing import observed


@dataclass(frozen=True)
class Sequences:
    """The lengths of the sequences that are packed into one row (batch size 1). A sequence may be empty: its final
    state is its initial state.

    The lengths are kept on the host, where loops and allocations need them; the tensors that kernels take
    are made from them on request.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ShapeError("a packed row must hold at least one sequence; got no lengths")
        bad = [n for n in self.lengths if n < 0]
        if bad:
            raise ShapeError(f"no packed sequence can have fewer than no tokens; got a length of {bad[0]}")

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Sequence[int] | Sequences) -> Sequences:
        """From cumulative lengths `[0, n1, n1 + n2, …]`, as FlashAttention has them; a `Sequences` is returned
        as it is."""
        if isinstance(cu_seqlens, Sequences):
            return cu_seqlens
        edges = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        if len(edges) < 2 or edges[0] != 0:
            raise ShapeError(
                f"cu_seqlens must begin with 0 and hold one more entry than sequences; got {edges[:8]}"
            )
        return cls(tuple(b - a for a, b in pairwise(edges)))

    @property
    def count(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    @property
    def occupied(self) -> tuple[int, ...]:
        """The lengths of the sequences that hold a token."""
        return tuple(n for n in self.lengths if n)

    def filled_up(self) -> Sequences:
        """The same with empty ones behind them, as many as make the count a power of two.

        A compiled graph is one of a number of sequences: so those of all batches need a handful of graphs.
        """
        room = 1 << (self.count - 1).bit_length()
        return Sequences(self.lengths + (0,) * (room - self.count))

    @property
    def starts(self) -> tuple[int, ...]:
        """The first token of each sequence."""
        return tuple(accumulate(self.lengths[:-1], initial=0))

    @property
    def total(self) -> int:
        """The number of tokens of all sequences together."""
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest sequence."""
        return max(self.lengths)

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """Cumulative lengths, `[count + 1]`, int32."""
        return placed(torch.tensor([*self.starts, self.total], dtype=torch.int32), device)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Each token's place in its own sequence, `[total]`, int64."""
        return torch.arange(self.total, device=device) - self.per_token(self.starts, device)

    def indices(self, device: torch.device | str = "cpu") -> Tensor:
        """The number of each token's sequence, `[total]`, int64."""
        return self.per_token(range(self.count), device)

    def per_token(self, values: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The value of each token's sequence, `[total]`, int64."""
        lengths = placed(torch.tensor(self.lengths), device)
        return torch.repeat_interleave(placed(torch.tensor(values), device), lengths, output_size=self.total)


def placed(values: Tensor, device: torch.device | str) -> Tensor:
    """Values of the host on a device, which nobody waits for."""
    if torch.device(device).type != "cuda" or observed():
        return values.to(device)
    # From ordinary memory a copy would wait until the GPU has done all before it.
    return values.pin_memory().to(device, non_blocking=True)
