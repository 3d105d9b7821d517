"""Zoology's multi-query associative recall: queries at distances drawn from a power law (arXiv:2312.04927)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import ConfigError
from intarsia.tasks.base import Integers, Task, at_least, below, ignored


@dataclass(frozen=True)
class ZoologyMQAR(Task):
    """Pairs of a key and a value; behind them each key once more, between filler, where it asks for its value.

        input    4 9 1 7 0 1 0 0 4 0
        target   . . . . . 7 . . 9 .

    The vocabulary is `vocabulary` numbers: 0 is filler, keys are the other ones below half of it, values the
    upper half. Both are drawn without repetition. A key is asked at one of the even places behind the pairs;
    the i-th of them has a probability in proportion to `i ** (power - 1)`, and no place is taken twice.

    Zoology predicts the value as the next token and fills with random tokens where nothing is asked unless told
    otherwise; here filler is 0, as in its published figure, and the value is asked at the key and is not part
    of the input.
    """

    type: ClassVar[str] = "zoology-mqar"
    title: ClassVar[str] = "Multi-query associative recall of zoology"
    source: ClassVar[str] = "arXiv:2312.04927"
    pairs: int = 4
    vocabulary: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        at_least(1, length=self.length, pairs=self.pairs)
        at_least(4, vocabulary=self.vocabulary)
        if 4 * self.pairs > self.length:
            raise ConfigError(
                f"{self.pairs} pairs and two places for each query take {4 * self.pairs} tokens; the length "
                f"is {self.length}"
            )
        if self.pairs > min(self.num_keys, self.num_values):
            raise ConfigError(
                f"keys and values of an example differ: a vocabulary of {self.vocabulary} has {self.num_keys} keys; "
                f"got {self.pairs} pairs"
            )
        if not self.power > 0:
            raise ConfigError(f"power must be above 0; got {self.power!r}")

    @property
    def num_keys(self) -> int:
        """Keys of the vocabulary."""
        return self.vocabulary // 2 - 1

    @property
    def num_values(self) -> int:
        """Values of the vocabulary."""
        return self.vocabulary - self.vocabulary // 2

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(number) for number in range(self.vocabulary))

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    @property
    def places(self) -> int:
        """Places at which a query may stand."""
        return (self.length - 2 * self.pairs) // 2

    def _draws(self) -> int:
        return 2 * self.pairs * 2 + self.places

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        pairs, half = self.pairs, self.vocabulary // 2
        for_keys, for_values, for_places = np.split(random, [2 * pairs, 4 * pairs], axis=1)
        key = 1 + _different(self.num_keys, pairs, for_keys)
        value = half + _different(self.num_values, pairs, for_values)
        # The largest `pairs` of log(u) / weight are a weighted draw without repetition (Efraimidis and Spirakis).
        weight = np.arange(1, self.places + 1, dtype=np.float64) ** (self.power - 1)
        uniform = (for_places >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
        place = np.argsort(np.log(uniform) / weight, axis=1, kind="stable")[:, ::-1][:, :pairs]
        at = 2 * pairs + 2 * place

        inputs = np.zeros((len(random), self.length), dtype=np.int64)
        inputs[:, 0 : 2 * pairs : 2] = key
        inputs[:, 1 : 2 * pairs : 2] = value
        np.put_along_axis(inputs, at, key, axis=1)
        targets = ignored(inputs)
        np.put_along_axis(targets, at, value, axis=1)
        return inputs, targets


def _different(limit: int, count: int, random: NDArray[np.uint64]) -> Integers:
    """`count` different numbers below `limit` from random numbers `[N, 2 * count]`: Floyd's sample, shuffled."""
    chosen = np.empty((len(random), count), dtype=np.int64)
    for index in range(count):
        top = limit - count + index
        drawn = below(top + 1, random[:, index])
        taken = (chosen[:, :index] == drawn[:, None]).any(1)
        chosen[:, index] = np.where(taken, top, drawn)
    return np.take_along_axis(chosen, np.argsort(random[:, count:], axis=1, kind="stable"), axis=1)
