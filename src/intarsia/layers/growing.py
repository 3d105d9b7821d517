"""What softmax mixers remember: entries of every token, or of the last ones, and what has a fixed size beside them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.layers.growing_tensor import GrowingTensor
from intarsia.layers.pools import Pool
from intarsia.layers.states import State
from intarsia.ops.keys import Keys, row_of
from intarsia.ops.precision import compute_dtype
from intarsia.ops.sequences import Sequences

R = TypeVar("R")


@dataclass(frozen=True)
class Entry:
    """A tensor that is kept of each token, or of each sequence: its shape, and its dtype, which is the weights' (None),
    what is computed in (`"wide"`: float32, or float64 for float64), or one of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype | Literal["wide"] | None = None

    def dtype_beside(self, weight: Tensor) -> torch.dtype:
        """The dtype in a mixer with such weights."""
        if self.dtype is None:
            return weight.dtype
        return compute_dtype(weight) if self.dtype == "wide" else self.dtype

    def new_zeros(self, like: Tensor, *leading: int) -> Tensor:
        """Zeros `[*leading, *shape]` beside a weight: an ordinary tensor also where the weight is divided among
        processes."""
        return torch.zeros(*leading, *self.shape, dtype=self.dtype_beside(like), device=like.device)


@dataclass(frozen=True)
class GrowingMemory:
    """What a softmax mixer remembers of one sequence, in shapes."""

    kind: str
    """What sort of memory this is: `key-value`, `window`, `latent` or `growing`."""
    growing: Mapping[str, Entry]
    """What is kept of each token."""
    fixed: Mapping[str, Entry] = field(default_factory=dict)
    """What is kept of the sequence."""
    window: int | None = None
    """Of how many tokens entries are kept: those that the last one sees, itself among them. None: all."""
    rewritten: tuple[str, ...] = ()
    """The growing ones of which every token changes all entries."""

    def new_state(self, count: int, like: Tensor) -> GrowingState:
        """The state of `count` sequences that have not begun, where the weight `like` is."""
        growing: dict[str, Rows] = {
            name: (GrowingTensor(entry.new_zeros(like, count, 0), self.window),)
            for name, entry in self.growing.items()
        }
        fixed = {name: entry.new_zeros(like, count) for name, entry in self.fixed.items()}
        return GrowingValue(self, growing, fixed, (0,) * count)

    def new_pool(self, slots: int, tokens: int, like: Tensor) -> Pool[GrowingState]:
        """Room for `slots` sequences and `tokens` tokens of all of them together."""
        raise UnsupportedError(f"there is no pool for a {self.kind} state: hold its values")

    def nbytes(self, tokens: int, like: Tensor) -> int:
        """The size of the state of one sequence of `tokens` tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return kept * _size(self.growing, like) + _size(self.fixed, like)


def _size(entries: Mapping[str, Entry], like: Tensor) -> int:
    return sum(
        entry.dtype_beside(like).itemsize * torch.Size(entry.shape).numel() for entry in entries.values()
    )


class GrowingState(State):
    """The states of N sequences in a softmax mixer: a value, or some slots of a pool of pages.

    A mixer continues it by `grow`:

        grown = state.grow(x, seqs)
        k, v = grown.append(keys=k, values=v)       # what the tokens look at: of all sequences, as operators take it
        state = grown.end()
    """

    memory: GrowingMemory

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.memory.kind

    @abstractmethod
    def grow(self, x: Tensor, seqs: Sequences | None) -> Growth:
        """Begin to go on by the tokens of `x` `[B, T, ...]`, or of a row that `seqs` divides."""

    @abstractmethod
    def last(self, name: str) -> Tensor:
        """The last entry of each sequence, `[N, ...]`; zero where there is none."""

    @abstractmethod
    def fixed(self, name: str) -> Tensor:
        """What is kept of each sequence, `[N, ...]`."""

    def check_room_to_go_back(self, tokens: Sequence[int]) -> None:
        """Raise unless the state can be that of `tokens` of its tokens."""
        if len(tokens) != self.count:
            raise ShapeError(f"the state is of {self.count} sequences; got {len(tokens)} numbers of tokens")
        for n, (wanted, seen) in enumerate(zip(tokens, self.tokens, strict=True)):
            if not 0 <= wanted <= seen:
                raise ShapeError(f"sequence {n} has seen {seen} tokens and cannot go back to {wanted}")
        kept = [*self.memory.fixed, *self.memory.rewritten]
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


Rows = tuple[GrowingTensor, ...]
"""The entries of N sequences: of one length in one tensor, or of each sequence in a tensor of its own."""


@dataclass(frozen=True)
class GrowingValue(GrowingState):
    """The state as a value. Sequences of different lengths have tensors of their own, so that selecting, concatenating
    and shortening them copies nothing; their tensors' names end in their number, `keys.0`."""

    memory: GrowingMemory
    growing: dict[str, Rows]
    of_sequence: dict[str, Tensor]
    """What has a fixed size, `[N, ...]`."""
    tokens: tuple[int, ...]

    @property
    def together(self) -> bool:
        """Whether all sequences stand in one tensor."""
        return all(len(rows) == 1 for rows in self.growing.values())

    def tensors(self) -> dict[str, Tensor]:
        if self.together:
            return {name: rows[0].content for name, rows in self.growing.items()} | self.of_sequence
        growing = {
            f"{name}.{n}": row.content for name, rows in self.growing.items() for n, row in enumerate(rows)
        }
        return growing | self.of_sequence

    def with_tensors(self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None) -> GrowingValue:
        tokens = self.tokens if tokens is None else tokens
        growing = {}
        for name in self.growing:
            of_each = (
                [tensors[name]] if name in tensors else [tensors[f"{name}.{n}"] for n in range(len(tokens))]
            )
            growing[name] = tuple(GrowingTensor(x, self.memory.window) for x in of_each)
        fixed = {name: tensors[name] for name in self.of_sequence}
        return GrowingValue(self.memory, growing, fixed, tokens)

    def grow(self, x: Tensor, seqs: Sequences | None) -> Growth:
        return _ValueGrowth(self, x, seqs)

    def last(self, name: str) -> Tensor:
        def of(row: GrowingTensor) -> Tensor:
            content = row.content
            return content[:, -1] if len(row) else content.new_zeros(content.shape[0], *content.shape[2:])

        return torch.cat([of(row) for row in self.growing[name]])

    def fixed(self, name: str) -> Tensor:
        return self.of_sequence[name]

    def select(self, indices: Sequence[int]) -> GrowingValue:
        self.check_numbers(indices)
        if self.together and (len(indices) > 1 or self.count == 1):
            return self if list(indices) == list(range(self.count)) else super().select(indices)
        growing = {name: tuple(apart(rows)[i] for i in indices) for name, rows in self.growing.items()}
        fixed = {name: x[list(indices)] for name, x in self.of_sequence.items()}
        return GrowingValue(self.memory, growing, fixed, tuple(self.tokens[i] for i in indices))

    def joined(self, states: Sequence[State]) -> GrowingValue:
        values = [state for state in states if isinstance(state, GrowingValue)]
        forms = [state._form() if isinstance(state, GrowingValue) else type(state) for state in states]
        strange = next((form for form in forms if form != forms[0]), None)
        if strange is not None:
            raise ShapeError(f"states of different forms cannot be concatenated: {forms[0]} and {strange}")
        tokens = tuple(n for value in values for n in value.tokens)
        fixed = {name: torch.cat([v.of_sequence[name] for v in values]) for name in self.of_sequence}
        growing = {}
        for name in self.growing:
            rows = [row for value in values for row in value.growing[name]]
            if all(value.together for value in values) and len({len(row) for row in rows}) == 1:
                rows = [GrowingTensor(torch.cat([row.content for row in rows]), self.memory.window)]
            else:
                rows = [row for value in values for row in apart(value.growing[name])]
            growing[name] = tuple(rows)
        return GrowingValue(self.memory, growing, fixed, tokens)

    def truncated(self, tokens: Sequence[int]) -> GrowingValue:
        self.check_room_to_go_back(tokens)
        window = self.memory.window
        if tuple(tokens) == self.tokens:
            return self
        if window is not None and max(self.tokens) > window:
            raise UnsupportedError(
                f"of {max(self.tokens)} tokens this state keeps the last {window}: keep the state of the place to "
                "go back to"
            )
        together = self.together and len(set(tokens)) == 1
        growing = {
            name: (rows[0].shortened(tokens[0]),)
            if together
            else tuple(row.shortened(n) for row, n in zip(apart(rows), tokens, strict=True))
            for name, rows in self.growing.items()
        }
        return replace(self, growing=growing, tokens=tuple(tokens))

    def _form(self) -> object:
        content = {name: rows[0].content for name, rows in self.growing.items()}
        return (
            self.memory.kind,
            self.memory.window,
            {name: (x.shape[2:], x.dtype, x.device) for name, x in content.items()},
            {name: (x.shape[1:], x.dtype, x.device) for name, x in self.of_sequence.items()},
        )


class _ValueGrowth(Growth):
    """A value while the next one is made."""

    def __init__(self, state: GrowingValue, x: Tensor, seqs: Sequences | None) -> None:
        self._state, self._seqs = state, seqs
        self._tokens = state.tokens_after(x, seqs)
        self._growing, self._fixed = dict(state.growing), dict(state.of_sequence)
        # A row of one sequence is a batch of one.
        self._whole = state.together and (seqs is None or seqs.count == 1)

    def append(self, **entries: Tensor) -> tuple[Keys, ...]:
        return tuple(self._append(name, each) for name, each in entries.items())

    def _append(self, name: str, entries: Tensor) -> Keys:
        if self._whole:
            read, after = self._growing[name][0].extended(entries)
            self._growing[name] = (after,)
            return read
        parts = entries.split(1) if self._seqs is None else entries.split(self._seqs.lengths, dim=1)
        both = [row.extended(part) for row, part in zip(apart(self._growing[name]), parts, strict=True)]
        self._growing[name] = tuple(after for _, after in both)
        return tuple(read for read, _ in both)

    def before(self, name: str) -> Keys:
        rows = self._growing[name]
        return rows[0].content if self._whole else tuple(row.content for row in apart(rows))

    def rewrite(self, name: str, rows: Sequence[Tensor | None]) -> None:
        old = self._growing[name] if self._whole else apart(self._growing[name])
        self._growing[name] = tuple(
            kept if row is None else GrowingTensor(row) for kept, row in zip(old, rows, strict=True)
        )

    def fix(self, name: str, content: Tensor) -> None:
        self._fixed[name] = content

    def end(self) -> GrowingState:
        return GrowingValue(self._state.memory, self._growing, self._fixed, self._tokens)


def apart(rows: Rows) -> Rows:
    """The entries of each sequence in a tensor of its own."""
    if len(rows) > 1:
        return rows
    return tuple(rows[0].row(n) for n in range(rows[0].content.shape[0]))


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
