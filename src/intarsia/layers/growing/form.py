"""What softmax mixers remember of a sequence, in shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from intarsia.layers.cost import Entries
from intarsia.ops.precision import compute_dtype


@dataclass(frozen=True)
class Entry:
    """A tensor that is kept of each token, or of each sequence: its shape, and its dtype, which is the weights' (None),
    what is computed in (`"wide"`: float32, or float64 for float64), or one of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype | Literal["wide"] | None = None
    reads: int | None = None
    """How many of them the last token reads, at most. None: all."""
    stride: int = 1
    """Of how many tokens one is kept."""
    every: int | None = None
    """Of those beyond `reads` one in so many is read too. None: none."""

    def dtype_beside(self, weight: Tensor) -> torch.dtype:
        """The dtype in a mixer with such weights."""
        if self.dtype is None:
            return weight.dtype
        return compute_dtype(weight) if self.dtype == "wide" else self.dtype

    def new_empty(self, like: Tensor, *leading: int) -> Tensor:
        """The same with whatever stands in memory, which takes none before something is written."""
        return torch.empty(*leading, *self.shape, dtype=self.dtype_beside(like), device=like.device)

    def new_zeros(self, like: Tensor, *leading: int) -> Tensor:
        """Zeros `[*leading, *shape]` beside a weight: an ordinary tensor also where the weight is divided among
        processes."""
        return torch.zeros(*leading, *self.shape, dtype=self.dtype_beside(like), device=like.device)


@dataclass(frozen=True)
class GrowingForm:
    """What a softmax mixer remembers of one sequence, in shapes."""

    kind: str
    """What sort of memory this is: `key-value`, `window`, `latent` or `growing`."""
    growing: Mapping[str, Entry]
    """What is kept of each token, or of each `stride` of them."""
    fixed: Mapping[str, Entry] = field(default_factory=dict)
    """What is kept of the sequence."""
    window: int | None = None
    """Of how many tokens entries are kept: those that the last one sees, itself among them. None: all."""
    rewritten: tuple[str, ...] = ()
    """The growing ones of which every token changes all entries."""

    def entries(self, like: Tensor) -> tuple[Entries, ...]:
        """What is kept of the tokens, for a mixer with a weight like this: one kind of what is read of as many."""
        kinds: dict[tuple[int, int | None, int | None], dict[str, Entry]] = {}
        for name, entry in self.growing.items():
            kinds.setdefault((entry.stride, entry.reads, entry.every), {})[name] = entry
        return tuple(
            Entries(_size(each, like), stride, self.window, reads, every)
            for (stride, reads, every), each in kinds.items()
        )

    def nbytes(self, tokens: int, like: Tensor) -> int:
        """The size of the state of one sequence of `tokens` tokens."""
        return _size(self.fixed, like) + sum(kind.nbytes * kind.kept(tokens) for kind in self.entries(like))


def _size(entries: Mapping[str, Entry], like: Tensor) -> int:
    return sum(
        entry.dtype_beside(like).itemsize * torch.Size(entry.shape).numel() for entry in entries.values()
    )
