"""What linear mixers remember: a board of fixed size and the last inputs of a convolution, as a value or in a pool."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.layers.cost import Entries
from intarsia.layers.pools import Pool
from intarsia.layers.states import State
from intarsia.ops import Sequences, Slots, StatePool
from intarsia.ops.precision import compute_dtype

Step = Callable[[StatePool, Slots, StatePool], Tensor]
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

    def after(
        self, x: Tensor, seqs: Sequences | None, board: Tensor, conv: Tensor | None = None
    ) -> RecurrentState:
        """The state after the tokens of `x` `[B, T, ...]` (packed by `seqs`), whose content is `board` and `conv`."""
        raise NotImplementedError

    def through(self, lengths: tuple[int, ...], step: Step) -> tuple[Tensor, RecurrentState]:
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

    def through(self, lengths: tuple[int, ...], step: Step) -> tuple[Tensor, RecurrentState]:
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


class RecurrentSlots(RecurrentState):
    """Some slots of a pool as a state. What follows it is written to the slots; it is of the past then."""

    def __init__(self, pool: RecurrentPool, slots: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        self.pool, self.slots, self.tokens = pool, slots, tokens
        self._where = pool.places(slots)

    @property
    def board(self) -> Tensor:  # type: ignore[override]
        return self.pool.room.board[self._where]

    @property
    def conv(self) -> Tensor | None:  # type: ignore[override]
        conv = self.pool.room.conv
        return None if conv is None else conv[self._where]

    @property
    def held_by(self) -> tuple[Tensor, Tensor | None]:
        return self.pool.room.board, self.pool.room.conv

    def after(
        self, x: Tensor, seqs: Sequences | None, board: Tensor, conv: Tensor | None = None
    ) -> RecurrentState:
        following = self._go_on(self.tokens_after(x, seqs))
        room = self.pool.room
        room.board[self._where] = board.detach()
        if room.conv is not None and conv is not None:
            room.conv[self._where] = conv.detach()
        return following

    def through(self, lengths: tuple[int, ...], step: Step) -> tuple[Tensor, RecurrentState]:
        following = self._go_on(tuple(seen + n for seen, n in zip(self.tokens, lengths, strict=True)))
        return step(self.pool.room, _slots(self.slots, lengths), self.pool.room), following

    def _go_on(self, tokens: tuple[int, ...]) -> RecurrentSlots:
        self.pool.went_on(self.slots, self.tokens, tokens)
        return RecurrentSlots(self.pool, self.slots, tokens)

    def tensors(self) -> dict[str, Tensor]:
        # Copies: what is made of them are values, which the pool's going on must not change.
        return {name: t.clone() for name, t in super().tensors().items()}

    def recordable(self) -> RecurrentSlots:
        return self


class RecurrentPool(Pool[RecurrentState]):
    """The states of many sequences of a linear mixer, a slot each: `room` holds them as the operators take them."""

    def __init__(self, room: StatePool) -> None:
        super().__init__(room.slots)
        self.room = room

    @property
    def nbytes(self) -> int:
        return self.room.nbytes

    def places(self, slots: tuple[int, ...]) -> slice | Tensor:
        """What selects these slots from a tensor of all: where they follow each other a slice, which copies nothing."""
        if slots == tuple(range(slots[0], slots[0] + len(slots))):
            return slice(slots[0], slots[0] + len(slots))
        return torch.tensor(slots, device=self.room.board.device)

    @torch.no_grad()
    def _begin(self, slot: int) -> None:
        self.room.board[slot] = 0
        if self.room.conv is not None:
            self.room.conv[slot] = 0

    def _release(self, slot: int) -> None:
        pass

    @torch.no_grad()
    def _copy(self, source: int, target: int) -> None:
        self.room.board[target] = self.room.board[source]
        if self.room.conv is not None:
            self.room.conv[target] = self.room.conv[source]

    def _view(self, slots: tuple[int, ...]) -> RecurrentState:
        return RecurrentSlots(self, slots, self.tokens(slots))

    @torch.no_grad()
    def _write(self, slots: tuple[int, ...], state: RecurrentState) -> None:
        room, where = self.room, self.places(slots)
        form = StatePool(
            state.board.contiguous(), None if state.conv is None else state.conv.contiguous()
        ).form
        if form != room.form:
            raise ShapeError(f"the pool holds states of the form {room.form}; got {form}")
        room.board[where] = state.board
        if room.conv is not None and state.conv is not None:
            room.conv[where] = state.conv


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

    def new_pool(self, slots: int, tokens: int, like: Tensor) -> RecurrentPool:
        """A pool in which no sequence has begun. Its size does not depend on `tokens`."""
        return RecurrentPool(StatePool(*self._zeros(slots, like)))

    def _zeros(self, count: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        board = torch.zeros(count, *self.board, dtype=compute_dtype(like), device=like.device)
        return board, None if self.conv is None else board.new_zeros(count, *self.conv)


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
