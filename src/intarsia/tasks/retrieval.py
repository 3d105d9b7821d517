"""Copying, needles in haystacks of tokens, and retrieval over several rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import ConfigError
from intarsia.tasks.base import (
    Dice,
    Integers,
    OneByOneTask,
    Task,
    at_least,
    below,
    ignored,
    numbered,
)


@dataclass(frozen=True)
class Copying(Task):
    """Random tokens, a separator, and the tokens again; from the separator on each token asks for the next.

    input    s4 s1 s1 <sep> s4 s1 s1
    target   .  .  .  s4    s1 s1 .
    """

    type: ClassVar[str] = "copying"
    title: ClassVar[str] = "Copying"
    source: ClassVar[str] = "arXiv:2402.01032"
    symbols: int = 64

    def __post_init__(self) -> None:
        at_least(3, length=self.length)
        at_least(2, symbols=self.symbols)

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("s", self.symbols), "<sep>")

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def _draws(self) -> int:
        return self.length // 2

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        tokens = below(self.symbols, random)
        half = tokens.shape[1]
        separator = np.full_like(tokens[:, :1], self.symbols)
        # An even length leaves out the last token, which asks for nothing.
        inputs = np.concatenate([tokens, separator, tokens], axis=1)[:, : self.length]
        targets = ignored(inputs)
        targets[:, half : 2 * half] = tokens
        return inputs, targets


@dataclass(frozen=True)
class Needle(OneByOneTask):
    """Needles in a haystack of random tokens: marked keys with their values, of which one is asked at the end.

        input    h3 h0 <key> k5 v1 v8 h3 h7 h1 <key> k5 v1        values 2
        target   .  .  .     .  .  .  .  .  .  .     v1 v8

    `needles` stand in the hay, which has `hay` tokens, each with `values` values; the key of one is asked at
    the end and its values in their order, the first at the key. `depth` is where the asked one stands, in
    percent of the hay (0: at the beginning); without it, anywhere.
    """

    type: ClassVar[str] = "needle"
    title: ClassVar[str] = "Needle in a haystack"
    source: ClassVar[str] = "arXiv:2404.06654, of tokens"
    needles: int = 1
    values: int = 1
    depth: int | None = None
    keys: int = 32
    symbols: int = 32
    hay: int = 32

    def __post_init__(self) -> None:
        at_least(1, length=self.length, needles=self.needles, values=self.values, hay=self.hay)
        at_least(2, keys=self.keys, symbols=self.symbols)
        if self.depth is not None and not 0 <= self.depth <= 100:
            raise ConfigError(f"depth is in percent, from 0 to 100; got {self.depth}")
        if self.needles > self.keys:
            raise ConfigError(
                f"needles have different keys, of which there are {self.keys}; got {self.needles}"
            )
        if self._hay < 0:
            raise ConfigError(
                f"{self.needles} needles of {self.values} values and the question take {self.length - self._hay} "
                f"tokens; the length is {self.length}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("h", self.hay), *numbered("k", self.keys), *numbered("v", self.symbols), "<key>")

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def _hay(self) -> int:
        """Tokens of hay."""
        return self.length - self.needles * (2 + self.values) - 1 - self.values

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        mark, room = self.vocab_size - 1, self._hay
        keys = [self.hay + key for key in dice.choose(self.keys, self.needles)]
        values = [
            [self.hay + self.keys + value for value in dice.several(self.symbols, self.values)] for _ in keys
        ]
        where = dice.several(room + 1, self.needles)
        if self.depth is not None:
            where[0] = round(room * self.depth / 100)
        hay = dice.several(self.hay, room)
        tokens: list[int] = []
        at = 0
        for place, needle in sorted(zip(where, range(self.needles), strict=True)):
            tokens += [*hay[at:place], mark, keys[needle], *values[needle]]
            at = place
        tokens += [*hay[at:], mark, keys[0], *values[0][:-1]]
        first = self.length - self.values
        return tokens, {first + number: value for number, value in enumerate(values[0])}


@dataclass(frozen=True)
class MultiRound(OneByOneTask):
    """Rounds of pairs and questions: a question concerns a pair of any round so far, and a key's latest value counts.

        input    k1 v4 k3 v0 ? k3 v0 | k3 v7 k2 v2 ? k1 v4     2 rounds of 2 pairs and 1 question
        target   .  .  .  .  . v0 .  . .  .  .  .  . v4 .

    `back` is how many rounds ago the asked key was last set, 0 for the same; without it, any. The answer stands
    behind the question, as in a conversation. Rounds fill the length as far as they go.
    """

    type: ClassVar[str] = "multi-round"
    title: ClassVar[str] = "Retrieval over several rounds"
    source: ClassVar[str] = "here"
    pairs: int = 4
    questions: int = 2
    back: int | None = None
    keys: int = 32
    values: int = 32

    def __post_init__(self) -> None:
        at_least(1, length=self.length, pairs=self.pairs, questions=self.questions)
        at_least(2, keys=self.keys, values=self.values)
        if self.pairs > self.keys:
            raise ConfigError(f"the keys of a round differ; there are {self.keys}, got {self.pairs} pairs")
        if self.back is not None:
            at_least(0, back=self.back)
        least = 1 + (self.back or 0)
        if self.rounds < least:
            size = 2 * self.pairs + 3 * self.questions + 1
            raise ConfigError(
                f"a round takes {size} tokens and {least} are needed; the length is {self.length}"
            )

    @property
    def rounds(self) -> int:
        """Rounds of an example."""
        return (self.length + 1) // (2 * self.pairs + 3 * self.questions + 1)

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("k", self.keys), *numbered("v", self.values), "?", "|", "_")

    @property
    def chance(self) -> float:
        return 1 / self.values

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        ask = self.keys + self.values
        tokens: list[int] = []
        asked: dict[int, int] = {}
        known: dict[int, tuple[int, int]] = {}
        for number in range(self.rounds):
            if number:
                tokens.append(ask + 1)
            for key in dice.choose(self.keys, self.pairs):
                value = self.keys + dice.below(self.values)
                known[key] = number, value
                tokens += [key, value]
            about = [key for key, (set_in, _) in known.items() if self.back in (None, number - set_in)]
            for _ in range(self.questions if about else 0):
                key = about[dice.below(len(about))]
                asked[len(tokens) + 1] = known[key][1]
                tokens += [ask, key, known[key][1]]
        return tokens, asked
