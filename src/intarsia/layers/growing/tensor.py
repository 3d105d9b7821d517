"""A sequence of entries that grows, as a value."""

from __future__ import annotations

import torch
from torch import Tensor


class _Buffer:
    """Room for a growing sequence of entries, `[B, capacity, ...]`, of which each place is written once, by one thread.

    Whoever wants to write claims the places first. Of several threads that go on from one sequence one gets them; the
    others take a copy, as everybody does who comes later.
    """

    def __init__(self, storage: Tensor, filled: int) -> None:
        self.storage = storage
        # Dynamo cannot ask a tensor this; what it makes itself is never of that kind.
        self._of_inference = not torch.compiler.is_compiling() and storage.is_inference()
        # Where the free places begin; empty while a thread looks. `pop` gives an element to one thread alone.
        self._filled = [filled]

    def claim(self, start: int, end: int) -> bool:
        """Whether the places from `start` to `end` are there and were free. They are the caller's then."""
        if end > self.storage.shape[1]:
            return False
        # A tensor that was made in inference mode can only be written there.
        if self._of_inference and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()):
            return False
        try:
            filled = self._filled.pop()
        except IndexError:
            return False
        free = filled == start
        self._filled.append(end if free else filled)
        return free


class GrowingTensor:
    """A sequence `[B, n, ...]` to which entries are appended along dimension 1, as a value.

    Appending returns a new sequence; the old one stays valid. The newest holder of a buffer writes into its
    spare room; a holder that was overtaken (a fork, in this thread or another) copies first. With gradients the
    content is concatenated, since a buffer that is written in place cannot be part of a graph.

    With a `limit` the sequence holds its last `limit` entries. It moves through its buffer, and where that ends it is
    copied to the front of a new one: the entries before it are never overwritten, since others may hold them.
    """

    def __init__(self, content: Tensor, limit: int | None = None) -> None:
        kept = content if limit is None else content[:, max(content.shape[1] - limit, 0) :]
        self._hold(_Buffer(kept, kept.shape[1]), 0, kept.shape[1], limit)

    def _hold(self, buffer: _Buffer, start: int, end: int, limit: int | None) -> GrowingTensor:
        self._buffer, self._start, self._end, self._limit = buffer, start, end, limit
        return self

    def __len__(self) -> int:
        return self._end - self._start

    @property
    def content(self) -> Tensor:
        """The entries, `[B, n, ...]`: a view."""
        return self._buffer.storage[:, self._start : self._end]

    def extended(self, entries: Tensor) -> tuple[Tensor, GrowingTensor]:
        """What the tokens of `entries` `[B, m, ...]` look at, and the sequence with them behind it."""
        after = self.append(entries)
        if entries.shape[1] == 1 or len(after) == len(self) + entries.shape[1]:
            return after.content, after
        # The first of several tokens sees entries that the sequence has let go when the last has come.
        return torch.cat([self.content, entries], dim=1), after

    def row(self, n: int) -> GrowingTensor:
        """The sequence n of the batch alone: a view, that takes a copy when it goes on."""
        return GrowingTensor(self.content[n : n + 1], self._limit)

    def shortened(self, length: int) -> GrowingTensor:
        """The first `length` entries."""
        end = self._start + length
        return GrowingTensor.__new__(GrowingTensor)._hold(self._buffer, self._start, end, self._limit)

    def append(self, entries: Tensor) -> GrowingTensor:
        """The sequence with `entries` `[B, m, ...]` behind it."""
        limit, buffer = self._limit, self._buffer
        if entries.shape[1] == 0:
            return self
        if torch.is_grad_enabled() and (entries.requires_grad or buffer.storage.requires_grad):
            return GrowingTensor(torch.cat([self.content, entries], dim=1), limit)
        length = len(self) + entries.shape[1]
        dropped = 0 if limit is None else max(length - limit, 0)
        if dropped > len(self):
            entries = entries[:, dropped - len(self) :]
        start, end = self._start + min(dropped, len(self)), self._end
        if not buffer.claim(end, end + entries.shape[1]):
            # Half as much again: the copies add up to a constant number per entry, the spare room to a third.
            length -= dropped
            capacity = max(length + length // 2, 64)
            storage = entries.new_empty(entries.shape[0], capacity, *entries.shape[2:])
            storage[:, : end - start] = buffer.storage[:, start:end]
            start, end = 0, end - start
            buffer = _Buffer(storage, end + entries.shape[1])
        following = end + entries.shape[1]
        with torch.no_grad():
            buffer.storage[:, end:following] = entries
        return GrowingTensor.__new__(GrowingTensor)._hold(buffer, start, following, limit)
