"""What a mixer remembers between calls, of several sequences that may have different lengths.

States are values: a mixer takes one and returns the next, and the one that it took stays what it was. So a fork is the
state itself, and to roll back is to go on from an older one. A recurrent state has a fixed size. A key-value state
grows; its tensors are slices of a buffer with spare room, so that appending a token costs one token's copy and not the
whole cache's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.ops.sequences import Sequences

S = TypeVar("S", bound="State")


class State:
    """The common face of all states. The first dimension of each tensor is the sequence."""

    kind: ClassVar[str]
    """What sort of memory this is, for instance `recurrent` or `key-value`."""

    tokens: tuple[int, ...]
    """How many tokens each sequence has seen."""

    @property
    def count(self) -> int:
        """The number of sequences."""
        return len(self.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """The content, by name."""
        raise NotImplementedError

    def with_tensors(self: S, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None) -> S:
        """The same state with other content, of sequences that have seen `tokens` (by default, as many as these)."""
        raise NotImplementedError

    def select(self: S, indices: Sequence[int]) -> S:
        """The state of the sequences with these numbers, in this order; one may stand there several times: a fork.

        Raises:
            ShapeError: there is no such sequence, or none is wanted.
        """
        wrong = next((i for i in indices if not 0 <= i < self.count), None)
        if wrong is not None or not indices:
            wanted = "no sequence" if wrong is None else f"number {wrong}"
            raise ShapeError(f"{wanted} selected of a state of {self.count} sequences, counted from 0")
        rows = {t.device: torch.tensor(list(indices), device=t.device) for t in self.tensors().values()}
        picked = {name: t.index_select(0, rows[t.device]) for name, t in self.tensors().items()}
        return self.with_tensors(picked, tuple(self.tokens[i] for i in indices))

    @staticmethod
    def concatenate(states: Sequence[S]) -> S:
        """The sequences of all these states, which are of one mixer, in one.

        Raises:
            ShapeError: states that do not belong together, or none.
        """
        if not states:
            raise ShapeError("there is no state to concatenate")
        first = states[0]
        forms = [
            {n: (t.shape[1:], t.dtype, t.device) for n, t in state.tensors().items()} for state in states
        ]
        strange = next((form for form in forms if form != forms[0]), None)
        if strange is not None:
            raise ShapeError(f"states of different forms cannot be concatenated: {forms[0]} and {strange}")
        tensors = {name: torch.cat([s.tensors()[name] for s in states]) for name in first.tensors()}
        return first.with_tensors(tensors, tuple(n for state in states for n in state.tokens))

    def truncated(self: S, tokens: Sequence[int]) -> S:
        """The state as it was when each sequence had seen so many `tokens`, for states that keep what they saw.

        Raises:
            UnsupportedError: this kind of state cannot.
        """
        raise UnsupportedError(
            f"a {self.kind} state keeps no tokens that it could drop: keep the state of the place to go back to, "
            "which is a value"
        )

    def tokens_after(self, x: Tensor, seqs: Sequences | None = None) -> tuple[int, ...]:
        """What each sequence has seen after the tokens of `x` `[B, T, ...]`, or of a row that `seqs` divides."""
        lengths = (x.shape[1],) * self.count if seqs is None else seqs.lengths
        return tuple(seen + n for seen, n in zip(self.tokens, lengths, strict=True))

    def nbytes(self) -> int:
        """The size of the content in bytes (spare room of growing buffers not counted)."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def snapshot(self: S) -> S:
        """A copy that shares no memory with this state."""
        return self.with_tensors({name: t.clone() for name, t in self.tensors().items()})

    def to(self: S, device: torch.device | str) -> S:
        """The state on another device; dtypes stay."""
        return self.with_tensors({name: t.to(device) for name, t in self.tensors().items()})

    def recordable(self: S) -> S:
        """The state as autograd can record what is computed from it: a copy where it was made in inference mode and
        gradients are recorded now, and otherwise itself."""
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if recorded and any(t.is_inference() for t in self.tensors().values()):
            return self.snapshot()
        return self

    def detach(self: S) -> S:
        """The state cut off from the graph that computed it."""
        return self.with_tensors({name: t.detach() for name, t in self.tensors().items()})


@dataclass(frozen=True)
class RecurrentState(State):
    """The board of a linear mixer and the tail of its short convolution.

    `board`: `[B, HV, K, V]`, float32 (float64 for float64 inputs).
    `conv`: the last `W - 1` inputs of the short convolution, the oldest first, `[B, W - 1, channels]` in the same dtype
    as the board, or None for a mixer without convolution.
    """

    board: Tensor
    conv: Tensor | None
    tokens: tuple[int, ...]
    kind: ClassVar[str] = "recurrent"

    def __post_init__(self) -> None:
        if len(self.tokens) != self.board.shape[0]:
            raise ShapeError(
                f"a state of {self.board.shape[0]} sequences counts the tokens of each; got {self.tokens}"
            )

    def tensors(self) -> dict[str, Tensor]:
        return {"board": self.board} if self.conv is None else {"board": self.board, "conv": self.conv}

    def with_tensors(
        self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None
    ) -> RecurrentState:
        return RecurrentState(
            tensors["board"], tensors.get("conv"), self.tokens if tokens is None else tokens
        )

    def after(
        self, x: Tensor, seqs: Sequences | None, board: Tensor, conv: Tensor | None = None
    ) -> RecurrentState:
        """The state after the tokens of `x`, whose content is `board` and `conv`."""
        return RecurrentState(board, conv, self.tokens_after(x, seqs))


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

    def append(self, entries: Tensor) -> GrowingTensor:
        """The sequence with `entries` `[B, m, ...]` behind it."""
        limit, buffer = self._limit, self._buffer
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


@dataclass(frozen=True)
class KeyValueState(State):
    """The keys and values of softmax attention: `[B, n, HKV, K]` and `[B, n, HKV, V]` in the model's dtype."""

    keys: GrowingTensor
    values: GrowingTensor
    kind: ClassVar[str] = "key-value"

    @property
    def tokens(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.keys),) * self.keys.content.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys.content, "values": self.values.content}

    def with_tensors(
        self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None
    ) -> KeyValueState:
        return KeyValueState(GrowingTensor(tensors["keys"]), GrowingTensor(tensors["values"]))

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, KeyValueState]:
        """The keys and values that queries for `k` and `v` may look at, and the state after them."""
        state = KeyValueState(self.keys.append(k), self.values.append(v))
        return state.keys.content, state.values.content, state


@dataclass(frozen=True)
class WindowState(State):
    """The keys and values of the last `window` tokens, as in `KeyValueState`; the keys are rotated already, so that
    it does not matter where in the sequence they stood."""

    keys: GrowingTensor
    values: GrowingTensor
    window: int
    tokens: tuple[int, ...]
    kind: ClassVar[str] = "window"

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, window: int, tokens: tuple[int, ...]) -> WindowState:
        """The state that holds the last `window` of these."""
        return cls(GrowingTensor(keys, window), GrowingTensor(values, window), window, tokens)

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys.content, "values": self.values.content}

    def with_tensors(self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None) -> WindowState:
        tokens = self.tokens if tokens is None else tokens
        return WindowState.of(tensors["keys"], tensors["values"], self.window, tokens)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, WindowState]:
        """The keys and values that queries for `k` and `v` may look at, and the state after them."""
        keys, values = self.keys.append(k), self.values.append(v)
        state = WindowState(keys, values, self.window, self.tokens_after(k))
        if k.shape[1] == 1:
            return keys.content, values.content, state
        # The first of several queries sees keys that the state has let go when the last has come.
        return torch.cat([self.keys.content, k], dim=1), torch.cat([self.values.content, v], dim=1), state


@dataclass(frozen=True)
class LatentState(State):
    """The latents of MLA, `[B, n, kv_rank + rope_dim]` in the model's dtype: the compressed keys-and-values
    after their norm, then the key part that all heads share (rotated already, where it is rotated)."""

    latents: GrowingTensor
    kind: ClassVar[str] = "latent"

    @property
    def tokens(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.latents),) * self.latents.content.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"latents": self.latents.content}

    def with_tensors(self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None) -> LatentState:
        return LatentState(GrowingTensor(tensors["latents"]))


@dataclass(frozen=True)
class GrowingState(State):
    """Named sequences that grow with the tokens, `[B, n, ...]`, and named tensors of a fixed size, `[B, ...]`.

    The mixer that makes it says which names there are, and their shapes and dtypes.
    """

    growing: dict[str, GrowingTensor]
    fixed: dict[str, Tensor]
    tokens: tuple[int, ...]
    kind: ClassVar[str] = "growing"

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self.growing[name].content if name in self.growing else self.fixed[name]

    def tensors(self) -> dict[str, Tensor]:
        return {name: entries.content for name, entries in self.growing.items()} | self.fixed

    def with_tensors(self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None) -> GrowingState:
        growing = {name: GrowingTensor(tensors[name]) for name in self.growing}
        fixed = {name: tensors[name] for name in self.fixed}
        return replace(self, growing=growing, fixed=fixed, tokens=self.tokens if tokens is None else tokens)
