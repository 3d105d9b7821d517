"""Room for the states of many sequences of one mixer, which go on in place.

A pool has slots, one for each sequence, whose numbers the caller chooses or lets the pool choose; a model's sequence
has one number in every layer. `Pool.view` gives the sequences of some slots the face of a state, which a mixer takes as
it takes a value: what it returns is the view after the tokens, and the pool holds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from intarsia.errors import ConfigError, ShapeError
from intarsia.layers.states import State

S = TypeVar("S", bound=State)


class Pool(ABC, Generic[S]):
    """Slots for the sequences of one mixer. Not for several threads at once."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ConfigError(f"a pool needs a slot at least; got {slots}")
        self._tokens: list[int | None] = [None] * slots

    @property
    def slots(self) -> int:
        """How many there are, taken or free."""
        return len(self._tokens)

    @property
    def free_slots(self) -> tuple[int, ...]:
        """The numbers of those that hold no sequence."""
        return tuple(slot for slot, seen in enumerate(self._tokens) if seen is None)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The size of all of the pool's memory, used or not."""

    def tokens(self, slots: Sequence[int]) -> tuple[int, ...]:
        """How many tokens the sequences in these slots have seen.

        Raises:
            ConfigError: there is no such slot, or it holds no sequence.
        """
        return tuple(self._taken(slot) for slot in slots)

    def take(self, slot: int | None = None) -> int:
        """Let a sequence begin in a free slot, by default the one with the lowest number, which is returned.

        Raises:
            ConfigError: the slot is taken or does not exist, or none is free.
        """
        slot = self._free(slot)
        self._begin(slot)
        self._tokens[slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """Let the sequence of a slot go."""
        self._taken(slot)
        self._release(slot)
        self._tokens[slot] = None

    def fork(self, source: int, target: int | None = None) -> int:
        """Let a second sequence go on from where that of `source` stands, in a free slot, whose number is returned."""
        seen, target = self._taken(source), self._free(target)
        self._copy(source, target)
        self._tokens[target] = seen
        return target

    def view(self, slots: Sequence[int]) -> S:
        """The sequences of these slots, in this order, as a state for the mixer."""
        self.tokens(slots)
        if not slots or len(set(slots)) < len(slots):
            raise ConfigError(f"a batch is of different slots, one at least; got {list(slots)}")
        return self._view(tuple(slots))

    def evict(self, slots: Sequence[int]) -> S:
        """The sequences of these slots as a value, and the slots free."""
        value = self.view(slots).snapshot()
        for slot in slots:
            self.free(slot)
        return value

    def restore(self, state: S, slots: Sequence[int] | None = None) -> tuple[int, ...]:
        """Put the sequences of a value into free slots, whose numbers are returned.

        Raises:
            ConfigError: a slot is taken, or too few are free.
            ShapeError: the value is of another mixer, or not of as many sequences.
        """
        slots = self.free_slots[: state.count] if slots is None else tuple(slots)
        if len(slots) != state.count:
            raise ShapeError(
                f"the state is of {state.count} sequences; {len(slots)} slots are there for them"
            )
        if len(set(slots)) < len(slots):
            raise ConfigError(f"each sequence has a slot of its own; got {list(slots)}")
        for slot in slots:
            self._free(slot)
        self._write(slots, state)
        for slot, seen in zip(slots, state.tokens, strict=True):
            self._tokens[slot] = seen
        return slots

    def went_on(self, slots: Sequence[int], before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Note that sequences which had seen `before` tokens have now seen `after`: for views, before they write.

        Raises:
            ConfigError: the sequences have gone on since, so that the view is one of the past.
        """
        if tuple(self._tokens[slot] for slot in slots) != before:
            raise ConfigError("the view is of sequences that have gone on since: take a new one of the pool")
        for slot, seen in zip(slots, after, strict=True):
            self._tokens[slot] = seen

    @abstractmethod
    def _begin(self, slot: int) -> None:
        """Make the slot that of a sequence that has seen nothing."""

    @abstractmethod
    def _release(self, slot: int) -> None:
        """Give back what the slot holds."""

    @abstractmethod
    def _copy(self, source: int, target: int) -> None:
        """Give the free slot `target` what `source` holds."""

    @abstractmethod
    def _view(self, slots: tuple[int, ...]) -> S:
        """The state of taken slots."""

    @abstractmethod
    def _write(self, slots: tuple[int, ...], state: S) -> None:
        """Put a value of as many sequences into free slots."""

    def _taken(self, slot: int) -> int:
        self._check(slot)
        seen = self._tokens[slot]
        if seen is None:
            raise ConfigError(f"slot {slot} holds no sequence")
        return seen

    def _free(self, slot: int | None) -> int:
        if slot is None:
            if not self.free_slots:
                raise ConfigError(f"all {self.slots} slots are taken")
            return self.free_slots[0]
        self._check(slot)
        if self._tokens[slot] is not None:
            raise ConfigError(f"slot {slot} is taken")
        return slot

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ConfigError(f"there is no slot {slot}: the pool has {self.slots}, counted from 0")
