"""What a layer costs, from its dimensions alone: parameters, FLOPs, what it remembers and what it reads of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entries:
    """One kind of what is kept of the tokens: keys and values, compressed keys, an indexer's keys."""

    nbytes: int
    """Of one entry, all heads of the layer together."""
    stride: int = 1
    """Tokens to an entry: 1 where every token leaves one, 16 where each 16 are compressed to one."""
    window: int | None = None
    """Of how many tokens, the last ones, entries are kept. None: of all."""
    reads: int | None = None
    """The most entries that a token reads. None: all that are kept."""
    every: int | None = None
    """Of those beyond `reads` a token reads one in so many, too. None: none."""

    def kept(self, length: int) -> int:
        """How many there are after `length` tokens of a sequence."""
        return (length if self.window is None else min(length, self.window)) // self.stride

    def pool_entries(self, length: int, page_size: int) -> int:
        """For how many there is room in a pool, in pages of `page_size` tokens, each with one entry at least. The
        oldest tokens of a window need not begin a page."""
        kept = length if self.window is None else min(length, self.window)
        pages = -(-length // page_size) - (length - kept) // page_size
        return pages * max(page_size // self.stride, 1)

    def read(self, length: int) -> int:
        """How many the last of `length` tokens reads."""
        kept = self.kept(length)
        if self.reads is None or kept <= self.reads:
            return kept
        return self.reads + (0 if self.every is None else -(-(kept - self.reads) // self.every))


@dataclass(frozen=True)
class Cost:
    """What a mixer costs, from its dimensions alone.

    FLOPs count a multiplication and an addition as two. They are those of one forward pass; a training step
    costs three times as much (one forward, two products per product backward).
    """

    parameters: int
    projection_flops: int
    """Per token: every product with a weight, the short convolution included."""
    mixing_flops: Callable[[int], float]
    """Per token, averaged over a sequence of the given length: the exchange between tokens."""
    fixed_state_bytes: int
    """Per sequence, whatever its length."""
    entries: tuple[Entries, ...] = ()
    """What is kept of the tokens besides, by kind."""

    def forward_flops_per_token(self, length: int) -> float:
        """FLOPs of a forward pass per token of a sequence of `length` tokens."""
        return self.projection_flops + self.mixing_flops(length)

    def last_token_flops(self, length: int) -> float:
        """FLOPs of the last token alone of a sequence of `length` tokens, as decoding computes it."""
        before = (length - 1) * self.mixing_flops(length - 1) if length > 1 else 0
        return self.projection_flops + length * self.mixing_flops(length) - before

    def state_bytes(self, length: int, batch: int = 1) -> int:
        """Bytes of state after `length` tokens of `batch` sequences."""
        growing = sum(kind.nbytes * kind.kept(length) for kind in self.entries)
        return batch * (self.fixed_state_bytes + growing)

    def keys_read(self, length: int) -> int:
        """Entries of all kinds that the last of `length` tokens reads; none where the state has a fixed size."""
        return sum(kind.read(length) for kind in self.entries)

    def bytes_read(self, length: int) -> int:
        """Bytes of state that the last of `length` tokens reads."""
        return self.fixed_state_bytes + sum(kind.nbytes * kind.read(length) for kind in self.entries)

    def bytes_written(self) -> float:
        """Bytes of state that a token writes, on average: what has a fixed size, and its entries."""
        return self.fixed_state_bytes + sum(kind.nbytes / kind.stride for kind in self.entries)

    def pool_bytes(self, lengths: Iterable[int], page_size: int = 1) -> int:
        """Bytes of a pool that holds sequences of these lengths and nothing more: a slot each for what has a fixed
        size, and whole pages of `page_size` tokens."""
        sizes = list(lengths)
        growing = sum(kind.nbytes * kind.pool_entries(n, page_size) for kind in self.entries for n in sizes)
        return len(sizes) * self.fixed_state_bytes + growing
