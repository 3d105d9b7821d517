"""Stacks: what was pushed last and not yet popped (Kimi Linear report, arXiv:2510.26692, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import ConfigError
from intarsia.tasks.base import Integers, Task, at_least, below, ignored, numbered


@dataclass(frozen=True)
class Stack(Task):
    """Operations on independent stacks; each pop asks for the element that it takes from its stack.

        input    <push> 1 G <push> 0 E <pop> 1 G <pop> 0 E
        target   .      . . .      . . .     G . .     E .

    As in the report, there are 64 stacks, `<push> 1 G` puts G on stack 1, and `<pop> 0 E` takes E, which was
    put last, from stack 0. The element is asked at the stack's number, as the token that comes next; so it is in
    the input after the answer was given.

    The report does not say, and here it is so:

    * Each operation concerns a stack that is drawn uniformly, and is a push or a pop with equal chance. An empty
      stack is never popped: it is pushed. So each stack's height is a random walk of its own, and pops become
      more frequent, and reach deeper, the more operations there are for each stack (`length / 3 / stacks`).
    * Elements are drawn uniformly, with repetition, from `elements` of them.
    * The sequence is cut after `length` tokens, so the last operation may lack its last tokens. A pop without
      its element is still asked.
    """

    type: ClassVar[str] = "stack"
    title: ClassVar[str] = "Stacks"
    source: ClassVar[str] = "arXiv:2510.26692, section 5.1"
    stacks: int = 64
    elements: int = 64

    def __post_init__(self) -> None:
        at_least(1, length=self.length, stacks=self.stacks)
        at_least(2, elements=self.elements)
        if self.length < 5:
            raise ConfigError(
                f"length must be at least 5: a push, and a pop up to its stack; got {self.length}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("#", self.stacks), *numbered("e", self.elements), "<push>", "<pop>")

    @property
    def operations(self) -> int:
        """Operations of an example, the one that may be cut included."""
        return -(-self.length // 3)

    @property
    def chance(self) -> float:
        return 1 / self.elements

    def _draws(self) -> int:
        return 3 * self.operations

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        for_stacks, for_elements, for_coins = np.split(random, 3, axis=1)
        stack = below(self.stacks, for_stacks)
        element = self.stacks + below(self.elements, for_elements)
        is_pop = below(2, for_coins).astype(bool)
        # A stack is a linked list: `top` is the operation that pushed its uppermost element (-1: empty), and
        # `under` is, for an operation that pushed, the one that pushed the element beneath.
        rows = np.arange(len(random))
        top = np.full((len(random), self.stacks), -1)
        under = np.empty_like(stack)
        for step in range(self.operations):
            at = rows, stack[:, step]
            last = top[at]
            is_pop[:, step] &= last >= 0
            pop = is_pop[:, step]
            element[:, step] = np.where(pop, element[rows, last], element[:, step])
            under[:, step] = last
            top[at] = np.where(pop, under[rows, last], step)

        push = self.stacks + self.elements
        inputs = np.stack([push + is_pop, stack, element], axis=2).reshape(len(random), 3 * self.operations)
        targets = ignored(inputs)
        targets[:, 1::3] = np.where(is_pop, element, targets[:, 1::3])
        return inputs[:, : self.length], targets[:, : self.length]
