"""What linear mixers remember: a board of fixed size and the last inputs of a convolution, as a value or in a pool."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.layers.batch import Batch, Step
from intarsia.layers.books import Books
from intarsia.layers.cost import Entries
from intarsia.layers.pools import Pool, PooledState
from intarsia.layers.states import State
from intarsia.ops import InSlots, Sequences, Slots, StatePool
from intarsia.ops.precision import compute_dtype

Decode = Callable[[StatePool, Slots, StatePool], Tensor]
"""Computes tokens of the sequences in the slots of a pool, and writes their states to those of another or the same."""


class RecurrentState(State):
    """The states of N sequences in a linear mixer: a value, or some slots of a pool."""

    kind: ClassVar[str] = "recurrent"

    board: Tensor
    """`[N, HV, K, V]`, float32 (float64 for float64 inputs)."""
    conv: Tensor | None
    """The last `W - 1` inputs of the short convolution, the oldest first, `[N, W - 1, channels]` in the dtype of the
    board; None for a mixer without one."""

    @property
    def held_by(self) -> tuple[Tensor, Tensor | None]:
        """The tensors in which board and inputs are, of these sequences alone or of a whole pool."""
        return self.board, self.conv

    def begun(self, x: Tensor, seqs: Sequences | None) -> RecurrentState:
        """The state while the tokens of `x` `[B, T, ...]` (packed by `seqs`) are computed. In a pool, its `board` and
        `conv` are `InSlots` then, which operators take and return in the place of tensors."""
        return self

    def after(
        self, x: Tensor, seqs: Sequences | None, board: Tensor, conv: Tensor | None = None
    ) -> RecurrentState:
        """The state after the tokens of `x` `[B, T, ...]` (packed by `seqs`), whose content is `board` and `conv`."""
        raise NotImplementedError

    def through(self, lengths: tuple[int, ...], step: Decode) -> tuple[Tensor, RecurrentState]:
        """What `step` gives for the next `lengths` tokens of each sequence, and the state that it wrote."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return {"board": self.board} if self.conv is None else {"board": self.board, "conv": self.conv}

    def with_tensors(
        self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None
    ) -> RecurrentState:
        return RecurrentValue(
            tensors["board"], tensors.get("conv"), self.tokens if tokens is None else tokens
        )


@dataclass(frozen=True)
class RecurrentValue(RecurrentState):
    """The state as a value. Fields as in `RecurrentState`."""

    board: Tensor
    conv: Tensor | None
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != self.board.shape[0]:
            raise ShapeError(
                f"a state of {self.board.shape[0]} sequences counts the tokens of each; got {self.tokens}"
            )

    def after(
        self, x: Tensor, seqs: Sequences | None, board: Tensor, conv: Tensor | None = None
    ) -> RecurrentState:
        return RecurrentValue(board, conv, self.tokens_after(x, seqs))

    def through(self, lengths: tuple[int, ...], step: Decode) -> tuple[Tensor, RecurrentState]:
        pool = StatePool(self.board.contiguous(), None if self.conv is None else self.conv.contiguous())
        following = pool.new_like()
        idle = [n for n, length in enumerate(lengths) if not length]
        if idle:
            following.board[idle] = pool.board[idle]
            if following.conv is not None and pool.conv is not None:
                following.conv[idle] = pool.conv[idle]
        o = step(pool, _slots(tuple(range(self.count)), lengths), following)
        tokens = tuple(seen + n for seen, n in zip(self.tokens, lengths, strict=True))
        return o, RecurrentValue(following.board, following.conv, tokens)


class RecurrentSlots(PooledState, RecurrentState):
    """Some slots of a pool as a state."""

    def __init__(self, pool: RecurrentPool, batch: Batch) -> None:
        super().__init__(pool, batch)
        self.pool = pool

    @property
    def board(self) -> Tensor:  # type: ignore[override]
        return self._read(self.pool.room.board)

    @property
    def conv(self) -> Tensor | None:  # type: ignore[override]
        conv = self.pool.room.conv
        return None if conv is None else self._read(conv)

    @property
    def held_by(self) -> tuple[Tensor, Tensor | None]:
        return self.pool.room.board, self.pool.room.conv

    def begun(self, x: Tensor, seqs: Sequences | None) -> RecurrentState:
        lengths = (x.shape[1],) * self.count if seqs is None else seqs.lengths
        return _GoingOn(self.pool, self.pool.begin(self.batch, lengths))

    def after(
        self, x: Tensor, seqs: Sequences | None, board: Tensor, conv: Tensor | None = None
    ) -> RecurrentState:
        return self.begun(x, seqs).after(x, seqs, board, conv)

    def through(self, lengths: tuple[int, ...], step: Decode) -> tuple[Tensor, RecurrentState]:
        going = self.pool.begin(self.batch, lengths)
        return step(self.pool.room, going.slots(lengths), self.pool.room), RecurrentSlots(
            self.pool, going.after
        )

    def tensors(self) -> dict[str, Tensor]:
        # Copies: what is made of them are values, which the pool's going on must not change.
        return {name: t.clone() for name, t in super().tensors().items()}

    def joined(self, states: Sequence[State]) -> RecurrentState:  # type: ignore[override]
        there = [state for state in states if isinstance(state, RecurrentSlots) and state.pool is self.pool]
        batch = self.batch.joined([state.batch for state in there]) if len(there) == len(states) else None
        if batch is not None:
            return RecurrentSlots(self.pool, batch)
        values: list[RecurrentState] = [
            state.snapshot() if isinstance(state, RecurrentSlots) else cast(RecurrentState, state)
            for state in states
        ]
        return values[0].joined(values)

    def _read(self, room: Tensor) -> Tensor:
        self.check_current()
        return room[self.batch.where(room.device)]


class _GoingOn(RecurrentState):
    """Some slots of a pool while tokens are written to it. Board and inputs are said by their place: the operators that
    can, read and write them there."""

    def __init__(self, pool: RecurrentPool, step: Step) -> None:
        self.pool, self.step, self.tokens = pool, step, step.before.tokens

    @property
    def board(self) -> InSlots:  # type: ignore[override]
        return InSlots(self.pool.room.board, self.step, self.count, self.pool.boards)

    @property
    def conv(self) -> InSlots | None:  # type: ignore[override]
        conv = self.pool.room.conv
        return None if conv is None else InSlots(conv, self.step, self.count)

    def after(
        self,
        x: Tensor,
        seqs: Sequences | None,
        board: Tensor | InSlots,
        conv: Tensor | InSlots | None = None,
    ) -> RecurrentState:
        room = self.pool.room
        for to, what in ((room.board, board), (room.conv, conv)):
            if to is not None and isinstance(what, Tensor):
                InSlots(to, self.step, self.count).write(what)
        return RecurrentSlots(self.pool, self.step.after)


class RecurrentPool(Pool[RecurrentState]):
    """The states of many sequences of a linear mixer: `room` holds them as the operators take them, in the rows of the
    books."""

    def __init__(self, books: Books, room: StatePool) -> None:
        super().__init__(books)
        self.room = room
        self.boards = room if room.conv is None else StatePool(room.board)
        """The same without the inputs of the convolution."""

    @property
    def nbytes(self) -> int:
        return self.room.nbytes

    def view_of(self, batch: Batch) -> RecurrentState:
        return RecurrentSlots(self, batch)

    def begin(self, batch: Batch, lengths: tuple[int, ...]) -> Step:
        step = super().begin(batch, lengths)
        with torch.no_grad():
            for source, target in step.copies:
                for x in self._tensors():
                    x[target] = x[source]
        return step

    @torch.no_grad()
    def clear_row(self, row: int) -> None:
        for x in self._tensors():
            x[row] = 0

    def check_form(self, state: RecurrentState) -> None:
        if not isinstance(state, RecurrentState):
            raise ShapeError(f"the pool holds states of a linear mixer; got one of kind {state.kind!r}")
        board, conv = state.board, state.conv
        form = StatePool(board.contiguous(), None if conv is None else conv.contiguous()).form
        if form != self.room.form:
            raise ShapeError(f"the pool holds states of the form {self.room.form}; got {form}")

    def _write(self, step: Step, state: RecurrentState) -> None:
        for to, what in ((self.room.board, state.board), (self.room.conv, state.conv)):
            if to is not None and what is not None:
                to[step.where(to.device)[1]] = what

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.room.board,) if self.room.conv is None else (self.room.board, self.room.conv)


NO_BOARD = (0, 0, 0)
"""The board of a mixer that remembers the inputs of its convolution alone: its state has a board of no numbers."""


@dataclass(frozen=True)
class RecurrentMemory:
    """What a linear mixer remembers of one sequence, in shapes: the board `(HV, K, V)` and, with a short convolution
    (or a token shift), its last inputs `(W - 1, channels)`."""

    board: tuple[int, int, int]
    conv: tuple[int, int] | None = None

    def entries(self, like: Tensor) -> tuple[Entries, ...]:
        """Of no token something of its own is kept."""
        return ()

    def new_state(self, count: int, like: Tensor) -> RecurrentState:
        """The state of `count` sequences that have not begun, where the weight `like` is: float32, or float64 as it."""
        return RecurrentValue(*self._zeros(count, like), (0,) * count)

    def new_pool(self, books: Books, tokens: int, like: Tensor) -> RecurrentPool:
        """A pool in which no sequence has begun. Its size does not depend on `tokens`."""
        return RecurrentPool(books, StatePool(*self._zeros(books.slots, like)))

    def _zeros(self, count: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        board = torch.zeros(count, *self.board, dtype=compute_dtype(like), device=like.device)
        return board, None if self.conv is None else board.new_zeros(count, *self.conv)


def begun(state: RecurrentState | None, x: Tensor, seqs: Sequences | None) -> RecurrentState | None:
    """The state while the tokens of `x` `[B, T, ...]` are computed (`RecurrentState.begun`); None without one."""
    return None if state is None else state.begun(x, seqs)


def carried(state: RecurrentState | None, seqs: Sequences | None) -> dict[str, Any]:
    """The state before the tokens and the sequences that they belong to, as the linear operators take them."""
    return {
        "initial_state": None if state is None else state.board,
        "output_final_state": state is not None,
        "cu_seqlens": seqs,
    }


def following(
    state: RecurrentState | None,
    x: Tensor,
    seqs: Sequences | None,
    board: Tensor | None,
    conv: Tensor | None = None,
) -> RecurrentState | None:
    """The state after `state` and the tokens of `x` `[B, T, ...]`, which is `board` and `conv`; None without one."""
    return None if state is None or board is None else state.after(x, seqs, board, conv)


@functools.lru_cache(maxsize=64)
def _slots(numbers: tuple[int, ...], lengths: tuple[int, ...]) -> Slots:
    """The slots of those sequences that bring tokens."""
    occupied = [n for n, length in enumerate(lengths) if length]
    return Slots([numbers[n] for n in occupied], lengths=[lengths[n] for n in occupied])
