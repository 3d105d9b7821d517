"""What a mixer remembers between calls, of several sequences that may have different lengths.

States are values: a mixer takes one and returns the next, and the one that it took stays what it was. So a fork is the
state itself, and to roll back is to go on from an older one. A recurrent state (`intarsia.layers.recurrent`) has a
fixed size; those of softmax mixers grow (`intarsia.layers.growing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.ops.compiler import all_same
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

    @property
    def shared(self) -> object:
        """What it has in common with the states of other layers, as a pool's books have it: room for tokens is asked
        for once in all layers that share the same."""
        return self

    @property
    def alike(self) -> bool:
        """Whether all sequences have seen the same number of tokens."""
        return all_same(self.tokens)

    def positions(self, x: Tensor, seqs: Sequences | None) -> Tensor:
        """Of the next tokens; see `layers.rope.positions_of`."""
        if seqs is not None:
            return seqs.positions(x.device) + seqs.per_token(self.tokens, x.device)
        if self.alike:
            return torch.arange(self.tokens[0], self.tokens[0] + x.shape[1], device=x.device)
        return torch.tensor(self.tokens, device=x.device)[:, None] + torch.arange(x.shape[1], device=x.device)

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
        self.check_numbers(indices)
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
        return states[0].joined(states)

    def joined(self: S, states: Sequence[S]) -> S:
        """`concatenate` of states of which this is the first."""
        forms = [
            {n: (t.shape[1:], t.dtype, t.device) for n, t in state.tensors().items()} for state in states
        ]
        strange = next((form for form in forms if form != forms[0]), None)
        if strange is not None:
            raise ShapeError(f"states of different forms cannot be concatenated: {forms[0]} and {strange}")
        tensors = {name: torch.cat([s.tensors()[name] for s in states]) for name in self.tensors()}
        return self.with_tensors(tensors, tuple(n for state in states for n in state.tokens))

    def truncated(self: S, tokens: Sequence[int]) -> S:
        """The state as it was when each sequence had seen so many `tokens`, for states that keep what they saw.

        Raises:
            UnsupportedError: this kind of state cannot.
            ShapeError: a sequence has not seen so many.
            PoolError: it stands in a pool that has let go of what it would need.
        """
        self.check_truncated(tokens)
        raise NotImplementedError

    def check_truncated(self, tokens: Sequence[int]) -> None:
        """Raise what `truncated` would raise."""
        raise UnsupportedError(
            f"a {self.kind} state keeps no tokens that it could drop: keep the state of the place to go back to, "
            "which is a value"
        )

    def check_room(self, lengths: Sequence[int]) -> None:
        """Raise PoolError where the next `lengths` tokens of the sequences have no room in the pool that holds them."""

    def check_numbers(self, indices: Sequence[int]) -> None:
        """Raise ShapeError unless these are numbers of sequences, one at least."""
        wrong = next((i for i in indices if not 0 <= i < self.count), None)
        if wrong is not None or not indices:
            wanted = "no sequence" if wrong is None else f"number {wrong}"
            raise ShapeError(f"{wanted} selected of a state of {self.count} sequences, counted from 0")

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
