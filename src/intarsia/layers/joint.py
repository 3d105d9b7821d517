"""What a layer of several mixers remembers: the states of all of them, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.layers.batch import Batch, Step
from intarsia.layers.books import Books
from intarsia.layers.cost import Entries
from intarsia.layers.pools import Pool
from intarsia.layers.states import State
from intarsia.ops import Sequences


@dataclass(frozen=True)
class JointState(State):
    """The states of several mixers that are given the same tokens, as values or in slots of pools."""

    kind: ClassVar[str] = "joint"
    parts: tuple[State, ...]
    tokens: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        seen = {part.tokens for part in self.parts}
        if len(seen) != 1:
            raise ShapeError(f"states of one layer must have seen the same tokens; got counts {sorted(seen)}")
        object.__setattr__(self, "tokens", self.parts[0].tokens)

    @property
    def shared(self) -> object:
        return self.parts[0].shared

    def positions(self, x: Tensor, seqs: Sequences | None) -> Tensor:
        return self.parts[0].positions(x, seqs)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{n}.{name}": x for n, part in enumerate(self.parts) for name, x in part.tensors().items()}

    def with_tensors(self, tensors: dict[str, Tensor], tokens: tuple[int, ...] | None = None) -> JointState:
        """Content by the names of `tensors`."""
        return JointState(
            tuple(
                part.with_tensors({name: tensors[f"{n}.{name}"] for name in part.tensors()}, tokens)
                for n, part in enumerate(self.parts)
            )
        )

    def select(self, indices: Sequence[int]) -> JointState:
        return JointState(tuple(part.select(indices) for part in self.parts))

    def joined(self, states: Sequence[JointState]) -> JointState:
        of_parts = zip(*(state.parts for state in states), strict=True)
        return JointState(tuple(State.concatenate(of_part) for of_part in of_parts))

    def truncated(self, tokens: Sequence[int]) -> JointState:
        self.check_truncated(tokens)
        return JointState(tuple(part.truncated(tokens) for part in self.parts))

    def check_truncated(self, tokens: Sequence[int]) -> None:
        for part in self.parts:
            part.check_truncated(tokens)

    def check_room(self, lengths: Sequence[int]) -> None:
        for part in self.parts:
            part.check_room(lengths)

    def snapshot(self) -> JointState:
        return JointState(tuple(part.snapshot() for part in self.parts))

    def to(self, device: torch.device | str) -> JointState:
        return JointState(tuple(part.to(device) for part in self.parts))

    def recordable(self) -> JointState:
        return JointState(tuple(part.recordable() for part in self.parts))

    def detach(self) -> JointState:
        return JointState(tuple(part.detach() for part in self.parts))


class JointPool(Pool[JointState]):
    """Slots for the sequences of a layer of several mixers, in the pools of all of them, which keep the same books."""

    def __init__(self, books: Books, parts: tuple[Pool[Any], ...]) -> None:
        # The books know the parts: to them this is none.
        self.books, self.parts = books, parts

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def view_of(self, batch: Batch) -> JointState:
        return JointState(tuple(part.view_of(batch) for part in self.parts))

    def check_current(self, batch: Batch) -> None:
        for part in self.parts:
            part.check_current(batch)

    def put(self, step: Step, state: JointState) -> None:
        for part, of_part in zip(self.parts, state.parts, strict=True):
            part.put(step, of_part)

    def check_form(self, state: JointState) -> None:
        if not isinstance(state, JointState) or len(state.parts) != len(self.parts):
            raise ShapeError(f"this pool holds the states of {len(self.parts)} mixers in each layer")
        for part, of_part in zip(self.parts, state.parts, strict=True):
            part.check_form(of_part)

    def clear_row(self, row: int) -> None:
        for part in self.parts:
            part.clear_row(row)

    def _write(self, step: Step, state: JointState) -> None:
        raise NotImplementedError("each part writes its own")

    def _check_alone(self) -> None:
        if self.books.pools > len(self.parts):
            raise ConfigError(
                "the sequences are those of several layers: evict and restore them in the model's pool"
            )


@dataclass(frozen=True)
class JointMemory:
    """What several mixers remember of one sequence."""

    parts: tuple[Any, ...]

    def entries(self, like: Tensor) -> tuple[Entries, ...]:
        """What they keep of the tokens, all of them together."""
        return tuple(entry for part in self.parts for entry in part.entries(like))

    def new_state(self, count: int, like: Tensor) -> JointState:
        """The state of `count` sequences that have not begun."""
        return JointState(tuple(part.new_state(count, like) for part in self.parts))

    def new_pool(self, books: Books, tokens: int, like: Tensor) -> JointPool:
        """A pool in which no sequence has begun."""
        return JointPool(books, tuple(part.new_pool(books, tokens, like) for part in self.parts))
