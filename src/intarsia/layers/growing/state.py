"""What a softmax mixer takes and returns: entries of every token, or of the last ones, and what has a fixed size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.layers.growing.form import GrowingForm
from intarsia.layers.states import State
from intarsia.ops.keys import Keys, row_of
from intarsia.ops.sequences import Sequences

R = TypeVar("R")


class GrowingState(State):
    """The states of N sequences in a softmax mixer: a value, or some slots of a pool of pages.

    A mixer continues it by `grow`:

        grown = state.grow(x, seqs)
        k, v = grown.append(keys=k, values=v)       # what the tokens look at: of all sequences, as operators take it
        state = grown.end()
    """

    form: GrowingForm

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.form.kind

    @abstractmethod
    def grow(self, x: Tensor, seqs: Sequences | None) -> Growth:
        """Begin to go on by the tokens of `x` `[B, T, ...]`, or of a row that `seqs` divides."""

    @abstractmethod
    def value(self) -> GrowingState:
        """The same as a value."""

    @abstractmethod
    def last(self, name: str) -> Tensor:
        """The last entry of each sequence, `[N, ...]`; zero where there is none."""

    @abstractmethod
    def fixed(self, name: str) -> Tensor:
        """What is kept of each sequence, `[N, ...]`."""

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """Of the entries of that name."""

    def check_input(self, x: Tensor) -> None:
        """Raise ShapeError where the entries that a mixer makes of `x` would be rounded to be kept. Autocast may want
        that."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return
        for name, entry in self.form.growing.items():
            held = self.dtype_of(name)
            if entry.dtype is None and held != x.dtype:
                raise ShapeError(
                    f"the state holds {name} in {held} and the input is {x.dtype}: begin with a state of a layer whose "
                    "weights have that dtype"
                )

    def check_truncated(self, tokens: Sequence[int]) -> None:
        if len(tokens) != self.count:
            raise ShapeError(f"the state is of {self.count} sequences; got {len(tokens)} numbers of tokens")
        for n, (wanted, seen) in enumerate(zip(tokens, self.tokens, strict=True)):
            if not 0 <= wanted <= seen:
                raise ShapeError(f"sequence {n} has seen {seen} tokens and cannot go back to {wanted}")
        kept = [*self.form.fixed, *self.form.rewritten]
        if kept and tuple(tokens) != self.tokens:
            raise UnsupportedError(
                f"this state keeps {kept[0]} as the last token left it: keep the state of the place to go back to"
            )


class Growth:
    """A growing state while tokens are written to it."""

    @abstractmethod
    def append(self, **entries: Tensor) -> tuple[Keys, ...]:
        """Add the new tokens' entries `[B, T, ...]`, by name, and return for each what its tokens look at."""

    @abstractmethod
    def add(self, name: str, rows: Tensor | Sequence[Tensor]) -> Keys:
        """Add the entries of the strides of tokens that are complete now, and return all of them: `[B, m, ...]` where
        all sequences have had as many tokens, or `[1, m_n, ...]` of each; some may have none."""

    @abstractmethod
    def before(self, name: str) -> Keys:
        """The entries of the tokens before, of a name that has not been written yet."""

    @abstractmethod
    def rewrite(self, name: str, rows: Sequence[Tensor | None]) -> None:
        """Put others in the place of all entries: `[B, S, ...]` of all sequences, or `[1, S_n, ...]` of each; None
        leaves those of a sequence."""

    @abstractmethod
    def fix(self, name: str, content: Tensor) -> None:
        """What is kept of each sequence from now on, `[N, ...]`."""

    @abstractmethod
    def end(self) -> GrowingState:
        """The state after the tokens."""


def each_sequence(
    function: Callable[..., R],
    seqs: Sequences | None,
    tokens: Sequence[Tensor | None],
    held: Sequence[Keys | None],
) -> list[R | None]:
    """`function(*tokens, *held)` of all sequences together where they stand in tensors `[B, ...]`, and else of each
    sequence that brings a token (None of the others), for functions that no vectorised form serves.

    Args:
        tokens: `[B, T, ...]`, of the new tokens, packed by `seqs` where that is given.
        held: what they look at.
    """
    if all(x is None or isinstance(x, Tensor) for x in held) and (seqs is None or seqs.count == 1):
        return [function(*tokens, *held)]
    first = next(x for x in tokens if x is not None)
    lengths = (first.shape[1],) * first.shape[0] if seqs is None else seqs.lengths

    def parts(x: Tensor | None) -> Sequence[Tensor | None]:
        if x is None:
            return [None] * len(lengths)
        return x.split(1) if seqs is None else x.split(lengths, dim=1)

    rows = list(zip(*map(parts, tokens), strict=True))
    return [
        function(*rows[n], *(None if x is None else row_of(x, n) for x in held)) if length else None
        for n, length in enumerate(lengths)
    ]


def laid_out(parts: Sequence[Tensor | None], seqs: Sequences | None) -> Tensor:
    """What `each_sequence` gave, in the layout of the tokens."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, dim=0 if seqs is None else 1) if len(there) > 1 else there[0]
