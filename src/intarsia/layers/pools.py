"""Room for the states of many sequences of one mixer, which go on in place.

A pool has slots, one for each sequence, whose numbers the caller chooses or lets the pool choose; a model's sequence
has one number in every layer, since the pools of its layers share their books. `Pool.view` gives the sequences of some
slots the face of a state, which a mixer takes as it takes a value: what it returns is the view after the tokens, and
the pool holds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.layers.batch import Batch, Step, arrival, batch_of
from intarsia.layers.books import Books
from intarsia.layers.states import State
from intarsia.ops import Sequences

S = TypeVar("S", bound=State)
P = TypeVar("P", bound="PooledState")


class Pool(ABC, Generic[S]):
    """Slots for the sequences of one mixer. Not for several threads at once.

    What is done with a slot is done in all pools that share the books.
    """

    def __init__(self, books: Books) -> None:
        self.books = books
        books.join(self)

    @property
    def slots(self) -> int:
        """How many there are, taken or free."""
        return self.books.slots

    @property
    def free_slots(self) -> tuple[int, ...]:
        """The numbers of those that hold no sequence."""
        return self.books.free_slots

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The size of all of the pool's memory, used or not."""

    def tokens(self, slots: Sequence[int]) -> tuple[int, ...]:
        """How many tokens the sequences in these slots have seen.

        Raises:
            ConfigError: there is no such slot, or it holds no sequence.
        """
        return self.books.tokens(slots)

    def take(self, slot: int | None = None) -> int:
        """Let a sequence begin in a free slot, by default the one with the lowest number, which is returned.

        Raises:
            ConfigError: the slot is taken or does not exist, or none is free.
        """
        return self.books.take(slot)

    def free(self, slot: int) -> None:
        """Let the sequence of a slot go."""
        self.books.free(slot)

    def fork(self, source: int, target: int | None = None) -> int:
        """Let a second sequence go on from where that of `source` stands, in a free slot, whose number is returned.

        They share all that they have until one of them goes on: nothing is copied but, then, the last page if it is not
        full. So a fork that nobody lets go on is a snapshot.
        """
        return self.books.fork(source, target)

    def roll_back(self, slot: int, snapshot: int) -> None:
        """Let the sequence of `slot` stand where that of the slot `snapshot` does, a fork that was made of it before;
        the fork's slot is free then. Nothing is copied."""
        self.books.roll_back(slot, snapshot)

    def view(self, slots: Sequence[int]) -> S:
        """The sequences of these slots, in this order, as a state for the mixer."""
        return self.view_of(batch_of(self.books, slots))

    @abstractmethod
    def view_of(self, batch: Batch) -> S:
        """The state of a batch."""

    def evict(self, slots: Sequence[int]) -> S:
        """The sequences of these slots as a value, and the slots free."""
        self._check_alone()
        value = self.view(slots).snapshot()
        for slot in slots:
            self.free(slot)
        return value

    def restore(self, state: S, slots: Sequence[int] | None = None) -> tuple[int, ...]:
        """Put the sequences of a value into free slots, whose numbers are returned.

        Raises:
            ConfigError: a slot is taken, or too few are free.
            PoolError: too few pages are free.
            ShapeError: the value is of another mixer, or not of as many sequences.
        """
        self._check_alone()
        self.check_form(state)
        step = arrival(self.books, slots, state.tokens)
        self.put(step, state)
        return step.before.slots

    def check_current(self, batch: Batch) -> None:
        """Raise ConfigError where the batch is of the past in this layer."""
        if batch.followed is None:
            batch.check_current()
        elif batch.followed.is_done(self):
            raise ConfigError("the view is of sequences that have gone on since: take a new one of the pool")

    def begin(self, batch: Batch, lengths: tuple[int, ...]) -> Step:
        """Go on by `lengths` tokens of each sequence, which this layer is about to write.

        Raises:
            ConfigError: the sequences have gone on since, or have not gone on in all layers before.
            PoolError: too few pages are free.
        """
        self.check_current(batch)
        step = batch.step(lengths)
        step.begin(self)
        return step

    def put(self, step: Step, state: S) -> None:
        """Write a value, whose form has been checked, to the slots that were taken for it by `step`."""
        step.begin(self)
        with torch.no_grad():
            self._write(step, state)

    @abstractmethod
    def check_form(self, state: S) -> None:
        """Raise ShapeError unless this is a value that the pool could hold."""

    @abstractmethod
    def clear_row(self, row: int) -> None:
        """Make the row that of a sequence that has seen nothing."""

    @abstractmethod
    def _write(self, step: Step, state: S) -> None:
        """Put a value of as many sequences where the step says."""

    def _check_alone(self) -> None:
        if self.books.pools > 1:
            raise ConfigError(
                "the sequences are those of several layers: evict and restore them in the model's pool"
            )


class PooledState(State):
    """Some slots of a pool as a state. What follows it is written to the pool; it is of the past then, and says so."""

    def __init__(self, pool: Pool[Any], batch: Batch) -> None:
        self.batch, self.tokens = batch, batch.tokens
        self._pool = pool

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots of the sequences."""
        return self.batch.slots

    @property
    def shared(self) -> object:
        return self.batch

    def check_current(self) -> None:
        """Raise ConfigError where the sequences have gone on since."""
        self._pool.check_current(self.batch)

    def check_room(self, lengths: Sequence[int]) -> None:
        self.batch.check_room(lengths)

    def positions(self, x: Tensor, seqs: Sequences | None) -> Tensor:
        if seqs is None and self.alike:
            return super().positions(x, seqs)
        lengths = (x.shape[1],) * self.count if seqs is None else seqs.lengths
        return self.batch.positions(lengths, seqs is not None, x.device)

    def select(self: P, indices: Sequence[int]) -> P:
        self.check_numbers(indices)
        selected: P = self._pool.view_of(self.batch.select(indices))
        return selected

    def recordable(self: P) -> P:
        return self

    def detach(self: P) -> P:
        return self
