"""What a model remembers: the states of all its layers together, as values and in pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from intarsia.errors import ShapeError
from intarsia.layers.batch import arrival, batch_of
from intarsia.layers.books import Books
from intarsia.layers.pools import Pool
from intarsia.layers.states import State


@dataclass(frozen=True)
class ModelStates:
    """What all layers of a model remember of the same sequences: one state per layer, as a value."""

    layers: tuple[State, ...]

    def __post_init__(self) -> None:
        first = self.layers[0].tokens
        if any(state.tokens is not first and state.tokens != first for state in self.layers):
            seen = sorted({state.tokens for state in self.layers})
            raise ShapeError(f"the states of a model must have seen the same tokens; got counts {seen}")

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens each sequence has seen."""
        return self.layers[0].tokens

    @property
    def count(self) -> int:
        """The number of sequences."""
        return self.layers[0].count

    def select(self, indices: Sequence[int]) -> ModelStates:
        """The states of the sequences with these numbers, in this order; one may stand there several times."""
        return ModelStates(tuple(state.select(indices) for state in self.layers))

    @staticmethod
    def concatenate(states: Sequence[ModelStates]) -> ModelStates:
        """The sequences of all these states, which are of one model, in one."""
        layers = zip(*(each.layers for each in states), strict=True)
        return ModelStates(tuple(State.concatenate(of_layer) for of_layer in layers))

    def truncated(self, tokens: Sequence[int]) -> ModelStates:
        """The states as they were when each sequence had seen so many `tokens`; UnsupportedError where a layer's
        state keeps no tokens that it could drop. In pools all layers go back, or none."""
        for state in self.layers:
            state.check_truncated(tokens)
        return ModelStates(tuple(state.truncated(tokens) for state in self.layers))

    def check_room(self, lengths: Sequence[int]) -> None:
        """Raise PoolError where the next `lengths` tokens of the sequences have no room in a layer's pool."""
        if len(lengths) != self.count:
            raise ShapeError(f"the states are of {self.count} sequences and the input of {len(lengths)}")
        for state in {id(state.shared): state for state in self.layers}.values():
            state.check_room(lengths)

    def nbytes(self) -> int:
        """The size of all layers' content in bytes."""
        return sum(state.nbytes() for state in self.layers)

    def to(self, device: torch.device | str) -> ModelStates:
        """The states on another device; dtypes stay."""
        return ModelStates(tuple(state.to(device) for state in self.layers))

    def snapshot(self) -> ModelStates:
        """A copy that shares no memory with these states."""
        return ModelStates(tuple(state.snapshot() for state in self.layers))

    def detach(self) -> ModelStates:
        """The states cut off from the graph that computed them."""
        return ModelStates(tuple(state.detach() for state in self.layers))


class ModelPool:
    """Room for the states of many sequences of a model, which go on in place. A sequence has one slot, of the same
    number in the pools of all layers, which share their books. Not for several threads at once."""

    def __init__(self, books: Books, layers: tuple[Pool[Any], ...]) -> None:
        self.books, self.layers = books, layers

    @property
    def slots(self) -> int:
        """How many there are, taken or free."""
        return self.books.slots

    @property
    def free_slots(self) -> tuple[int, ...]:
        """The numbers of those that hold no sequence."""
        return self.books.free_slots

    @property
    def nbytes(self) -> int:
        """The size of all layers' memory, used or not."""
        return sum(pool.nbytes for pool in self.layers)

    def tokens(self, slots: Sequence[int]) -> tuple[int, ...]:
        """How many tokens the sequences in these slots have seen."""
        return self.books.tokens(slots)

    def take(self, slot: int | None = None) -> int:
        """Let a sequence begin in a free slot, by default the one with the lowest number, which is returned."""
        return self.books.take(slot)

    def free(self, slot: int) -> None:
        """Let the sequence of a slot go."""
        self.books.free(slot)

    def fork(self, source: int, target: int | None = None) -> int:
        """Let a second sequence go on from where that of `source` stands, in a free slot, whose number is returned; a
        snapshot, as long as nobody lets it go on. See `Pool.fork`."""
        return self.books.fork(source, target)

    def roll_back(self, slot: int, snapshot: int) -> None:
        """Let the sequence of `slot` stand where that of the slot `snapshot` does, a fork that was made of it before;
        the fork's slot is free then. Nothing is copied."""
        self.books.roll_back(slot, snapshot)

    def view(self, slots: Sequence[int]) -> ModelStates:
        """The sequences of these slots, in this order, as states for the model, which goes on in the slots. What it
        returns are their states after it; these are of the past then."""
        batch = batch_of(self.books, slots)
        return ModelStates(tuple(pool.view_of(batch) for pool in self.layers))

    def evict(self, slots: Sequence[int]) -> ModelStates:
        """The sequences of these slots as values, and the slots free."""
        values = self.view(slots).snapshot()
        for slot in slots:
            self.books.free(slot)
        return values

    def restore(self, states: ModelStates, slots: Sequence[int] | None = None) -> tuple[int, ...]:
        """Put the sequences of values into free slots, whose numbers are returned. Errors as `Pool.restore`."""
        if len(states.layers) != len(self.layers):
            raise ShapeError(
                f"the states are of {len(states.layers)} layers and the pool of {len(self.layers)}"
            )
        for pool, state in zip(self.layers, states.layers, strict=True):
            pool.check_form(state)
        step = arrival(self.books, slots, states.tokens)
        for pool, state in zip(self.layers, states.layers, strict=True):
            pool.put(step, state)
        return step.before.slots
