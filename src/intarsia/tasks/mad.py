"""The six tasks of mechanistic architecture design (Poli et al. 2024, arXiv:2403.17844)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from intarsia.errors import ConfigError
from intarsia.tasks.base import Dice, OneByOneTask, at_least, numbered

SOURCE = "arXiv:2403.17844"


@dataclass(frozen=True)
class InContextRecall(OneByOneTask):
    """Keys and values in turn; a key that came before asks for the value that it had.

        input    k1 v3 k0 v2 k1 v3
        target   .  .  .  .  v3 .

    Each key of an example has one value, drawn for the example.
    """

    type: ClassVar[str] = "mad-recall"
    title: ClassVar[str] = "MAD: in-context recall"
    source: ClassVar[str] = SOURCE
    keys: int = 8
    values: int = 8

    def __post_init__(self) -> None:
        _check(self.length, 4, keys=self.keys, values=self.values)

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("k", self.keys), *numbered("v", self.values), "_")

    @property
    def chance(self) -> float:
        return 1 / self.values

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        value = [self.keys + drawn for drawn in dice.several(self.values, self.keys)]
        tokens: list[int] = []
        asked: dict[int, int] = {}
        seen: set[int] = set()
        for key in dice.several(self.keys, self.length // 2):
            if key in seen:
                asked[len(tokens)] = value[key]
            seen.add(key)
            tokens += [key, value[key]]
        return tokens, asked


@dataclass(frozen=True)
class NoisyRecall(InContextRecall):
    """In-context recall with tokens of noise between the pairs, a share of `noise` percent of all places for one.

    input    k1 v3 n5 k0 v2 n1 n5 k1 v3
    target   .  .  .  .  .  .  .  v3 .
    """

    type: ClassVar[str] = "mad-noisy-recall"
    title: ClassVar[str] = "MAD: noisy in-context recall"
    noise: int = 20
    noise_symbols: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, noise=self.noise)
        at_least(1, noise_symbols=self.noise_symbols)
        if self.noise > 99:
            raise ConfigError(f"noise is in percent and at most 99; got {self.noise}")

    @property
    def names(self) -> tuple[str, ...]:
        return (
            *numbered("k", self.keys),
            *numbered("v", self.values),
            *numbered("n", self.noise_symbols),
            "_",
        )

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        clean, about = super()._example(dice)
        first = self.keys + self.values
        tokens: list[int] = []
        asked: dict[int, int] = {}
        for place in range(0, len(clean), 2):
            while dice.below(100) < self.noise:
                tokens.append(first + dice.below(self.noise_symbols))
            if place in about:
                asked[len(tokens)] = about[place]
            tokens += clean[place : place + 2]
        tokens = tokens[: self.length]
        return tokens, {place: answer for place, answer in asked.items() if place < self.length}


@dataclass(frozen=True)
class FuzzyRecall(OneByOneTask):
    """In-context recall of keys and values of one to `most` tokens each.

        input    k1 k4 v3 k0 v2 v2 v5 k1 k4 v3
        target   .  .  .  .  .  .  .  .  v3 .

    Each key of an example is a sequence of its own, and none is the beginning of another. When a key comes
    again, its last token asks for the first of the value, and so on to the value's last.
    """

    type: ClassVar[str] = "mad-fuzzy-recall"
    title: ClassVar[str] = "MAD: fuzzy in-context recall"
    source: ClassVar[str] = SOURCE
    keys: int = 8
    values: int = 8
    pairs: int = 8
    most: int = 3

    def __post_init__(self) -> None:
        _check(self.length, 4 * self.most, keys=self.keys, values=self.values)
        at_least(1, pairs=self.pairs, most=self.most)
        if self.pairs > self.keys:
            raise ConfigError(
                f"keys begin with different tokens, of which there are {self.keys}; got {self.pairs} pairs"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("k", self.keys), *numbered("v", self.values), "_")

    @property
    def chance(self) -> float:
        return 1 / self.values

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        # Different first tokens make keys that do not begin one another.
        keys = [
            [first, *dice.several(self.keys, dice.below(self.most))]
            for first in dice.choose(self.keys, self.pairs)
        ]
        values = [[self.keys + v for v in dice.several(self.values, 1 + dice.below(self.most))] for _ in keys]
        tokens: list[int] = []
        asked: dict[int, int] = {}
        seen: set[int] = set()
        while True:
            pair = dice.below(self.pairs)
            end = len(tokens) + len(keys[pair])
            if end + len(values[pair]) > self.length:
                return tokens, asked
            if pair in seen:
                asked |= {end - 1 + place: value for place, value in enumerate(values[pair])}
            seen.add(pair)
            tokens += keys[pair] + values[pair]


@dataclass(frozen=True)
class SelectiveCopying(OneByOneTask):
    """Tokens scattered among blanks; at the end they are asked in their order.

        input    _ s3 _ _ s1 _ s3 <copy> <copy> <copy>
        target   . .  . . .  . .  s3     s1     s3

    `copies` tokens are to be copied. Answers are not in the input.
    """

    type: ClassVar[str] = "mad-selective-copying"
    title: ClassVar[str] = "MAD: selective copying"
    source: ClassVar[str] = SOURCE
    copies: int = 16
    symbols: int = 14

    def __post_init__(self) -> None:
        _check(self.length, 2 * self.copies, copies=self.copies, symbols=self.symbols)

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("s", self.symbols), "<copy>", "_")

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        room = self.length - self.copies
        what = dice.several(self.symbols, self.copies)
        tokens = [self.symbols + 1] * room + [self.symbols] * self.copies
        for place, token in zip(sorted(dice.choose(room, self.copies)), what, strict=True):
            tokens[place] = token
        return tokens, {room + place: token for place, token in enumerate(what)}


@dataclass(frozen=True)
class Compression(OneByOneTask):
    """Random tokens, a token to compress them into, and places that are asked in random order.

        input    s3 s1 s0 <c> #2 #0
        target   .  .  .  .   s0 s3

    MAD has a decoder of its own that sees the output at `<c>` alone. Here the model that has read goes on; so
    this examines how much a state of fixed size keeps, and attention may look back.
    """

    type: ClassVar[str] = "mad-compression"
    title: ClassVar[str] = "MAD: compression"
    source: ClassVar[str] = SOURCE
    symbols: int = 16
    questions: int = 8

    def __post_init__(self) -> None:
        _check(self.length, 3, symbols=self.symbols)
        at_least(1, questions=self.questions)
        if self._compressed < self.questions:
            raise ConfigError(
                f"{self.questions} places cannot be asked of {max(0, self._compressed)} tokens; take a longer "
                "length or fewer questions"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("s", self.symbols), *numbered("#", self._compressed), "<c>")

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def _compressed(self) -> int:
        return self.length - 1 - self.questions

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        said = dice.several(self.symbols, self._compressed)
        places = dice.choose(self._compressed, self.questions)
        first = self._compressed + 1
        tokens = [*said, self.vocab_size - 1, *(self.symbols + place for place in places)]
        return tokens, {first + number: said[place] for number, place in enumerate(places)}


@dataclass(frozen=True)
class Memorization(OneByOneTask):
    """A dictionary that is the same in all examples and stands in none: each key asks for its value.

        input    k1 k7 k1
        target   v3 v0 v3

    `dictionary` says which one. MAD asks at a token behind the key.
    """

    type: ClassVar[str] = "mad-memorization"
    title: ClassVar[str] = "MAD: memorization"
    source: ClassVar[str] = SOURCE
    keys: int = 128
    values: int = 128
    dictionary: int = 0

    def __post_init__(self) -> None:
        _check(self.length, 1, keys=self.keys, values=self.values)
        at_least(0, dictionary=self.dictionary)

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("k", self.keys), *numbered("v", self.values))

    @property
    def entries(self) -> tuple[int, ...]:
        """The number of each key's value."""
        key = np.random.SeedSequence(self.dictionary).generate_state(2, np.uint64).astype(np.uint64)
        return tuple(Dice(key, 0).several(self.values, self.keys))

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        keys, entries = dice.several(self.keys, self.length), self.entries
        return keys, {place: self.keys + entries[key] for place, key in enumerate(keys)}


def _check(length: int, least: int, **options: int) -> None:
    at_least(1, length=length)
    at_least(1, **options)
    if length < least:
        raise ConfigError(f"length must be at least {least}; got {length}")
