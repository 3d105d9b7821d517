"""State tracking: what is true now depends on all that happened, each event of which may change everything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import ConfigError
from intarsia.tasks.base import Integers, Task, at_least, below, ignored

GroupName = Literal["s3", "s4", "s5", "a4", "a5"]


@dataclass(frozen=True)
class Parity(Task):
    """Bits, each of which asks whether an odd number of ones has been read so far.

        input    1 0 1 1 0
        target   1 1 0 1 1

    Every prefix is asked, which examines all lengths up to `length` at once. `asked_from` leaves out the tokens before:
    a model that learned with 40 tokens is examined beyond them by `length=256,asked_from=40`.
    """

    type: ClassVar[str] = "parity"
    title: ClassVar[str] = "Parity"
    source: ClassVar[str] = "arXiv:2411.12537"
    asked_from: int = 0

    def __post_init__(self) -> None:
        _check(self.length, self.asked_from)

    @property
    def names(self) -> tuple[str, ...]:
        return ("0", "1")

    @property
    def chance(self) -> float:
        return 1 / 2

    def _draws(self) -> int:
        return self.length

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        bits = below(2, random)
        return bits, _asked(bits.cumsum(1) % 2, self.asked_from)


@dataclass(frozen=True)
class ModularCounting(Task):
    """Steps and stays; each token asks how many steps there were, modulo `modulus`.

        input    + - + + -            modulus 3
        target   1 1 2 0 0

    For a modulus above two, a state that is multiplied by real, diagonal or triangular matrices cannot do it beyond a
    length that its precision sets (arXiv:2411.12537).
    """

    type: ClassVar[str] = "modular-counting"
    title: ClassVar[str] = "Counting modulo a number"
    source: ClassVar[str] = "arXiv:2411.12537"
    modulus: int = 3
    asked_from: int = 0

    def __post_init__(self) -> None:
        _check(self.length, self.asked_from)
        at_least(2, modulus=self.modulus)

    @property
    def names(self) -> tuple[str, ...]:
        return (*(str(number) for number in range(self.modulus)), "+", "-")

    def _draws(self) -> int:
        return self.length

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        stays = below(2, random)
        counts = (1 - stays).cumsum(1) % self.modulus
        return self.modulus + stays, _asked(counts, self.asked_from)


@dataclass(frozen=True)
class WordProblem(Task):
    """Elements of a group of permutations; each asks for the product of all up to it, the latest on the left.

    `p102` maps 0 to 1, 1 to 0 and 2 to 2. Groups: `s3`, `s4` and `s5`, all permutations of so many things, and `a4` and
    `a5`, the even ones. S5 and A5 are not solvable: their word problem is complete for NC1, out of reach of
    transformers and diagonal recurrences of a fixed depth (arXiv:2404.08819). With `generators` an example has two
    elements alone, of which all are products: a cycle of all things (or all but one), and a swap of two, or a cycle of
    three where swaps are odd. That is as hard to track, and there is less to learn by heart (arXiv:2411.12537).
    """

    type: ClassVar[str] = "word-problem"
    title: ClassVar[str] = "Products in a permutation group"
    source: ClassVar[str] = "arXiv:2404.08819"
    group: GroupName = "s3"
    asked_from: int = 0
    generators: bool = False

    def __post_init__(self) -> None:
        _check(self.length, self.asked_from)
        if self.group not in get_args(GroupName):
            raise ConfigError(f"group must be one of {', '.join(get_args(GroupName))}; got {self.group!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple("p" + "".join(map(str, element)) for element in _elements(self.group))

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    def _draws(self) -> int:
        return self.length

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        if self.generators:
            inputs = np.array(_generators(self.group))[below(2, random)]
        else:
            inputs = below(self.vocab_size, random)
        product, products = _table(self.group), np.empty_like(inputs)
        state = np.zeros(len(inputs), dtype=np.int64)  # the identity comes first
        for step in range(self.length):
            state = product[inputs[:, step], state]
            products[:, step] = state
        return inputs, _asked(products, self.asked_from)


def _check(length: int, asked_from: int) -> None:
    at_least(1, length=length)
    at_least(0, asked_from=asked_from)
    if asked_from >= length:
        raise ConfigError(f"asked_from must be below the length, {length}; got {asked_from}")


def _asked(answers: Integers, first: int) -> Integers:
    """The answers, of which those before a position are not asked."""
    targets = ignored(answers)
    targets[:, first:] = answers[:, first:]
    return targets


@cache
def _elements(group: GroupName) -> tuple[tuple[int, ...], ...]:
    """The permutations of a group in the order of their images: the identity first."""
    every = permutations(range(int(group[1])))
    return tuple(element for element in every if group[0] == "s" or _is_even(element))


def _generators(group: GroupName) -> tuple[int, int]:
    """The numbers of two elements that generate a group."""
    size = int(group[1])
    even = group[0] == "a"
    first = 1 if even and size % 2 == 0 else 0  # a cycle is even if its length is odd
    cycle = (*range(first), *range(first + 1, size), first)
    short = ((1, 2, 0) if even else (1, 0)) + tuple(range(3 if even else 2, size))
    elements = _elements(group)
    return elements.index(cycle), elements.index(short)


def _is_even(element: tuple[int, ...]) -> bool:
    return sum(a > b for place, a in enumerate(element) for b in element[place + 1 :]) % 2 == 0  # inversions


@cache
def _table(group: GroupName) -> Integers:
    """`table[a, b]` is the number of "b, then a"."""
    elements = np.array(_elements(group))
    numbers = {element: number for number, element in enumerate(_elements(group))}
    return np.array([[numbers[tuple(row)] for row in a[elements].tolist()] for a in elements])
