"""What every task is: a configuration that makes examples from a seed alone and scores answers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.model.loss import IGNORED
from intarsia.tasks.score import Score, score

ExampleSplit = Literal["train", "validation", "test"]
Integers = NDArray[np.int64]
Item = TypeVar("Item")


class Examples(NamedTuple):
    """Examples of a task."""

    inputs: Tensor
    """`[N, T]` int64."""
    targets: Tensor
    """`[N, T]` int64: what is to be predicted at each input, `IGNORED` (-100) where nothing is asked."""


@dataclass(frozen=True)
class Task:
    """A task: its fields are the options, JSON-able, and `examples` makes what a model is examined on.

    An example is a function of the task's options, the seed, the split and the example's index: it is the same
    whichever others are made with it, and no generator but its own is read or moved. The splits of a seed are
    independent streams; a train example equals a test example only by chance, as two train examples do.

    Subclasses are frozen dataclasses that say how the vocabulary is laid out (`names`), how many random numbers
    an example takes (`_draws`) and what it makes of them (`_make`).
    """

    type: ClassVar[str]
    """The name in the table of tasks."""
    title: ClassVar[str]
    source: ClassVar[str]
    """Where the task was published."""
    length: int
    """Tokens of an example, exactly."""

    def __post_init__(self) -> None:
        at_least(1, length=self.length)

    @property
    def names(self) -> tuple[str, ...]:
        """What each token is called, for people to read."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """How many different tokens there are."""
        return len(self.names)

    @property
    def chance(self) -> float:
        """The share of right answers of whoever gives the answer that comes most often, and reads nothing.

        Where the source of a task makes the answers not equally frequent, the share is that of the first 2000
        validation examples of seed 0.
        """
        targets = self.examples(0, 2000, "validation").targets
        asked = targets[targets != IGNORED]
        return float(asked.bincount().max() / len(asked)) if len(asked) else 0.0

    def examples(self, seed: int, indices: int | range, split: ExampleSplit = "train") -> Examples:
        """The examples of a seed and split whose indices are given: the first so many, or a range.

        Args:
            seed: any integer from 0 on.
            indices: a count, or a range of step 1 from 0 or later.
            split: "train", "validation" or "test", each with examples of its own.

        Raises:
            ConfigError: a seed, an index or a split that does not exist.
        """
        rows = range(indices) if isinstance(indices, int) and not isinstance(indices, bool) else indices
        if not isinstance(rows, range) or rows.step != 1 or rows.start < 0 or rows.stop < rows.start:
            raise ConfigError(f"indices must be a count or a range of step 1, from 0 on; got {indices!r}")
        arrays = self._arrays(seed, rows, split)
        return Examples(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def score(self, answers: Tensor, targets: Tensor) -> Score:
        """How many of the targets were met, by token and by sequence; see `intarsia.tasks.score`."""
        return score(answers, targets)

    def show(self, tokens: Tensor) -> str:
        """The names of a row of tokens or targets `[T]`, "." where nothing is asked."""
        names = self.names
        return " ".join("." if token == IGNORED else names[token] for token in tokens.tolist())

    def _arrays(self, seed: int, rows: range, split: ExampleSplit) -> tuple[Integers, Integers]:
        """Inputs and targets `[N, T]` of the examples of these indices."""
        return self._make(self._random(seed, rows, split))

    def _draws(self) -> int:
        """How many random numbers an example takes."""
        raise NotImplementedError

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        """Inputs and targets `[N, T]` from random numbers `[N, draws]`, uniform over all 64 bits."""
        raise NotImplementedError

    def _random(self, seed: int, rows: range, split: ExampleSplit) -> NDArray[np.uint64]:
        """The random numbers of some examples, `[len(rows), draws]`.

        Philox is a cipher of a counter: each example owns a range of counters, so any of them can be reached at
        once, and many that follow one another in one call.
        """
        draws = self._draws()
        blocks = -(-draws // _BLOCK)
        philox = np.random.Philox(key=self._key(seed, split), counter=rows.start * blocks)
        random = philox.random_raw(len(rows) * blocks * _BLOCK).reshape(len(rows), blocks * _BLOCK)
        return random[:, :draws]

    def _key(self, seed: int, split: ExampleSplit) -> NDArray[np.uint64]:
        """Philox's key for a seed and a split of this task."""
        return key_of(self.type, seed, split)


def key_of(name: str, seed: int, split: ExampleSplit) -> NDArray[np.uint64]:
    """Philox's key for a name, a seed and a split."""
    at_least(0, seed=seed)
    if split not in get_args(ExampleSplit):
        raise ConfigError(f"split must be one of {', '.join(get_args(ExampleSplit))}; got {split!r}")
    entropy = (seed, zlib.crc32(name.encode()), get_args(ExampleSplit).index(split))
    return np.random.SeedSequence(entropy).generate_state(2, np.uint64).astype(np.uint64)


class Dice:
    """Random numbers of one example, as many as it likes: a range of Philox's counter of its own."""

    def __init__(self, key: NDArray[np.uint64], row: int) -> None:
        # The counter has 256 bits: the lower 64 belong to the example.
        self._from = key, row
        self._philox = np.random.Philox(key=key, counter=row << 64)

    def again(self) -> Dice:
        """Dice that will show what these have shown from the beginning."""
        return Dice(*self._from)

    def below(self, limit: int) -> int:
        """A number from 0 to `limit - 1`."""
        return int(self._philox.random_raw()) % limit

    def several(self, limit: int, count: int) -> list[int]:
        """So many of them, with repetition."""
        return [int(number) % limit for number in self._philox.random_raw(count)]

    def choose(self, limit: int, count: int) -> list[int]:
        """`count` different numbers from 0 to `limit - 1`, in random order."""
        moved: dict[int, int] = {}
        found = []
        for position in range(
            count
        ):  # the first steps of Fisher and Yates' shuffle, of a list that is never made
            other = position + self.below(limit - position)
            found.append(moved.get(other, other))
            moved[other] = moved.get(position, position)
        return found

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The same in random order."""
        return [items[index] for index in self.choose(len(items), len(items))]


@dataclass(frozen=True)
class OneByOneTask(Task):
    """A task whose examples are made one after the other, each from dice of its own (`_example`)."""

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        """The tokens of an example, at most `length`, and what is asked: the target of each position that asks.

        What is missing at the end is filled with the last token of the vocabulary.
        """
        raise NotImplementedError

    def _arrays(self, seed: int, rows: range, split: ExampleSplit) -> tuple[Integers, Integers]:
        key = self._key(seed, split)
        inputs = np.full((len(rows), self.length), self.vocab_size - 1, dtype=np.int64)
        targets = ignored(inputs)
        for place, row in enumerate(rows):
            tokens, asked = self._example(Dice(key, row))
            inputs[place, : len(tokens)] = tokens
            for position, answer in asked.items():
                targets[place, position] = answer
        return inputs, targets


_BLOCK = 4
"""The numbers that Philox makes of one value of its counter."""


def below(limit: int, random: NDArray[np.uint64]) -> Integers:
    """Random numbers of 64 bits as integers from 0 to `limit - 1`, uniform to within `limit / 2**64`."""
    return (random % np.uint64(limit)).astype(np.int64)


def at_least(least: int, **values: int) -> None:
    """Raise ConfigError for the first value that is no integer or too small."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}; got {value!r}")


def ignored(like: Integers) -> Integers:
    """Targets that ask for nothing, in the shape of `like`."""
    return np.full_like(like, IGNORED)


def numbered(letter: str, count: int) -> tuple[str, ...]:
    """`letter0`, `letter1`, ... as names of tokens."""
    return tuple(f"{letter}{number}" for number in range(count))
