"""The states of a batch in a step that is recorded: which sequences they are of, and what these have seen, stands in
tensors that are filled anew before each time the step is played.

The host that records it knows the sizes of these tensors and nothing of what is in them. A mixer that asks for more
(the content of a state as a value, all entries rewritten, the sequences alone) cannot be recorded: that is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.layers.growing.form import GrowingForm
from intarsia.layers.growing.state import GrowingState, Growth
from intarsia.layers.recurrent import Decode, RecurrentState
from intarsia.layers.states import State
from intarsia.ops import Sequences, StatePool
from intarsia.ops.attention_recorded import Room
from intarsia.ops.keys import Keys


@dataclass(frozen=True)
class Places:
    """Where the next token of each sequence of a batch belongs; int64, `[N]` but for `table`."""

    positions: Tensor
    """How many tokens each sequence has seen before."""
    read: Tensor
    """The row in which its board is found; for a softmax layer not asked for."""
    write: Tensor
    """The row in which what follows belongs."""
    entry: Tensor | None = None
    """Where the token's entries go, in the pages laid end to end; of a softmax layer, as what follows."""
    lengths: Tensor | None = None
    """How many entries there are with it, counted from the first in the table."""
    table: Tensor | None = None
    """The pages of each sequence, `[N, columns]`."""


class Recorded(State):
    """What the states of a recorded step have in common."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.tokens = (0,) * len(places.positions)
        """Of the right length, and no more: nobody knows when the step is recorded."""

    def positions(self, x: Tensor, seqs: Sequences | None) -> Tensor:
        """The positions of the tokens, `[N, 1]`."""
        return self.places.positions[:, None]

    def recordable(self) -> Any:
        """Itself: nothing here is for autograd."""
        return self

    def check_room(self, lengths: Sequence[int]) -> None:
        """Whoever plays the step has seen to that."""


class RecordedBoards(Recorded, RecurrentState):
    """The boards of a linear layer, read from rows of a pool and written back there."""

    def __init__(self, room: StatePool, places: Places) -> None:
        super().__init__(places)
        self.room = room

    @property
    def board(self) -> Tensor:  # type: ignore[override]
        return self.room.board.index_select(0, self.places.read)

    @property
    def conv(self) -> Tensor | None:  # type: ignore[override]
        conv = self.room.conv
        return None if conv is None else conv.index_select(0, self.places.read)

    @property
    def held_by(self) -> tuple[Tensor, Tensor | None]:
        return self.room.board, self.room.conv

    def after(
        self, x: Tensor, seqs: Sequences | None, board: Tensor, conv: Tensor | None = None
    ) -> RecordedBoards:
        self.room.board.index_copy_(0, self.places.write, board.to(self.room.board.dtype))
        if self.room.conv is not None and conv is not None:
            self.room.conv.index_copy_(0, self.places.write, conv.to(self.room.conv.dtype))
        return self

    def through(self, lengths: tuple[int, ...], step: Decode) -> NoReturn:
        raise UnsupportedError(
            "a step that is recorded goes through the layer, not through one made for inference"
        )


class RecordedEntries(Recorded, GrowingState):
    """The entries of a softmax layer in the pages of a pool, to which those of one token are added."""

    def __init__(self, form: GrowingForm, pages: dict[str, Tensor], places: Places) -> None:
        super().__init__(places)
        self.form, self.pages = form, pages

    def grow(self, x: Tensor, seqs: Sequences | None) -> Growth:
        return _Growth(self)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.pages[name].dtype

    def value(self) -> NoReturn:
        self._refuse()

    def last(self, name: str) -> NoReturn:
        self._refuse()

    def fixed(self, name: str) -> NoReturn:
        self._refuse()

    def tensors(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(
            f"a layer that keeps {', '.join((*self.form.growing, *self.form.fixed))} cannot be recorded: it does more "
            "with its state than to add a token's entries"
        )


class _Growth(Growth):
    def __init__(self, state: RecordedEntries) -> None:
        self._state = state

    def append(self, **entries: Tensor) -> tuple[Keys, ...]:
        places = self._state.places
        assert places.entry is not None
        assert places.table is not None
        assert places.lengths is not None
        rooms = []
        for name, each in entries.items():
            pages = self._state.pages[name]
            pages.flatten(0, 1).index_copy_(0, places.entry, each.flatten(0, 1).to(pages.dtype))
            rooms.append(Room(pages, places.table, places.lengths))
        return cast("tuple[Keys, ...]", tuple(rooms))

    def add(self, name: str, rows: Tensor | Sequence[Tensor]) -> NoReturn:
        self._state._refuse()

    def before(self, name: str) -> NoReturn:
        self._state._refuse()

    def rewrite(self, name: str, rows: Sequence[Tensor | None]) -> NoReturn:
        self._state._refuse()

    def fix(self, name: str, content: Tensor) -> NoReturn:
        self._state._refuse()

    def end(self) -> GrowingState:
        return self._state
