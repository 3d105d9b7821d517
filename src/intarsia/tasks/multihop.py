"""Multi-hop tasks: an answer that no single fact of the context gives, but several that lead from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

from intarsia.errors import ConfigError
from intarsia.tasks.base import Dice, OneByOneTask, at_least, numbered

FILLER = "_"
Order = Literal["random", "forward", "backward"]


@dataclass(frozen=True)
class KHop(OneByOneTask):
    """k-hop induction: from each letter, `k` times to what followed the last time that the letter came.

        input    h2 a b c a b d a
        target   .  ~ ~ ~ ~ ~ ~ c

    One hop leads from a place to the latest place before it, or at it, whose predecessor is the letter of the
    first. The first token says how many hops, from 0 to `most_hops` unless `hops` fixes them; every letter
    asks, and `~` is the answer where there is no such place. No letter comes twice in a row. As published:
    length 100, 4 letters, up to 16 hops.
    """

    type: ClassVar[str] = "k-hop"
    title: ClassVar[str] = "k-hop induction"
    source: ClassVar[str] = "arXiv:2402.09268"
    hops: int | None = None
    most_hops: int = 16
    letters: int = 4

    def __post_init__(self) -> None:
        at_least(2, length=self.length, letters=self.letters)
        at_least(0, most_hops=self.most_hops, hops=self.hops or 0)
        if self.hops is not None and self.hops > self.most_hops:
            raise ConfigError(
                f"most_hops are the hops of the vocabulary, {self.most_hops}; hops must not be more, got {self.hops}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("h", self.most_hops + 1), *numbered("a", self.letters), "~")

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        hops = dice.below(self.most_hops + 1) if self.hops is None else self.hops
        letters = [dice.below(self.letters)]
        for step in dice.several(self.letters - 1, self.length - 2):
            letters.append((letters[-1] + 1 + step) % self.letters)
        # Of each place the one that a hop leads to; -1, which leads to itself, for none.
        followed: dict[int, int] = {}
        to = []
        for place, letter in enumerate(letters):
            if place:
                followed[letters[place - 1]] = place
            to.append(followed.get(letter, -1))
        to.append(-1)
        at = [*range(len(letters)), -1]
        for _ in range(hops):
            at = [to[place] for place in at]
        first, nowhere = self.most_hops + 1, self.vocab_size - 1
        asked = {
            1 + place: nowhere if found < 0 else first + letters[found] for place, found in enumerate(at[:-1])
        }
        return [hops, *(first + letter for letter in letters)], asked


@dataclass(frozen=True)
class FactsTask(OneByOneTask):
    """Facts with filler between them, and one question at the end.

    `hops` facts lead from what is asked to its answer. `chains` such chains are in the context, of which one is
    asked, and `distractors` facts that belong to none. `distance` tokens of filler stand behind every fact, the
    last one too; filler in front makes the length exact, so that no dial moves another. `order` is that of the
    facts of each chain; those of different chains are mixed.
    """

    hops: int = 2
    chains: int = 2
    distractors: int = 0
    distance: int = 0
    symbols: int = 64
    order: Order = "random"

    def __post_init__(self) -> None:
        at_least(1, length=self.length, hops=self.hops, chains=self.chains)
        at_least(0, distractors=self.distractors, distance=self.distance)
        at_least(2, symbols=self.symbols)
        if self.order not in get_args(Order):
            raise ConfigError(f"order must be one of {', '.join(get_args(Order))}; got {self.order!r}")
        if self._least_symbols() > self.symbols:
            raise ConfigError(
                f"{self.chains} chains of {self.hops} hops and {self.distractors} distractors need "
                f"{self._least_symbols()} symbols; got {self.symbols}"
            )
        if self.least_length > self.length:
            raise ConfigError(
                f"{self._facts()} facts with {self.distance} tokens behind each and the question take "
                f"{self.least_length} tokens; the length is {self.length}"
            )

    @property
    def least_length(self) -> int:
        """Tokens without filler in front."""
        fact, question = self._sizes()
        return self._facts() * (fact + self.distance) + question

    def _facts(self) -> int:
        return self.chains * self.hops + self.distractors

    def _sizes(self) -> tuple[int, int]:
        """Tokens of a fact, and of the question."""
        raise NotImplementedError

    def _least_symbols(self) -> int:
        """Symbols that an example takes: all are different."""
        return self.chains * (self.hops + 1) + 2 * self.distractors

    def _ordered(self, dice: Dice, chains: list[list[list[int]]], others: list[list[int]]) -> list[list[int]]:
        """The facts of all chains and the others, mixed: each chain's in the task's order."""
        turns = dice.shuffled(
            [number for number, chain in enumerate(chains) for _ in chain] + [-1] * len(others)
        )
        rest = [iter(self._in_order(dice, chain)) for chain in chains]
        free = iter(others)
        return [next(free if turn < 0 else rest[turn]) for turn in turns]

    def _in_order(self, dice: Dice, chain: list[list[int]]) -> list[list[int]]:
        if self.order == "random":
            return dice.shuffled(chain)
        return chain if self.order == "forward" else chain[::-1]

    def _laid_out(
        self, facts: list[list[int]], question: list[int], answer: int
    ) -> tuple[list[int], dict[int, int]]:
        filler = [self.names.index(FILLER)]
        tokens = [token for fact in facts for token in fact + self.distance * filler] + question
        return (self.length - len(tokens)) * filler + tokens, {self.length - 1: answer}


@dataclass(frozen=True)
class Chains(FactsTask):
    """Association chains: a pair says which symbol comes after which; asked is what comes `hops` symbols later.

        input    s3 s7 s1 s9 s7 s2 s9 s5 ? s3      hops 2
        target   .  .  .  .  .  .  .  .  . s2

    All symbols of the chains differ, so each pair is used in one way alone. Distractors are pairs of their own.
    """

    type: ClassVar[str] = "chains"
    title: ClassVar[str] = "Association chains"
    source: ClassVar[str] = "here"

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("s", self.symbols), "?", FILLER)

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def _sizes(self) -> tuple[int, int]:
        return 2, 2

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        links = self.hops + 1
        drawn = dice.choose(self.symbols, self._least_symbols())
        chains = [drawn[start : start + links] for start in range(0, self.chains * links, links)]
        others = drawn[self.chains * links :]
        pairs = [[[*pair] for pair in pairwise(chain)] for chain in chains]
        facts = self._ordered(dice, pairs, [others[i : i + 2] for i in range(0, len(others), 2)])
        asked = chains[dice.below(self.chains)]
        return self._laid_out(facts, [self.symbols, asked[0]], asked[-1])


@dataclass(frozen=True)
class Variables(FactsTask):
    """Variable tracking: a variable is set to a value or to another one; asked is the value of a chain's last.

        input    x4 = v2 x1 = x4 x7 = v0 ? x1       hops 2
        target   .  .  . .  .  . .  .  . . v2

    `hops` assignments lead from the variable to the value, which is one of `values`. Distractors are variables
    with values of their own. With `order="forward"`, which is usual in programs, a variable is set before it is
    used.
    """

    type: ClassVar[str] = "variables"
    title: ClassVar[str] = "Variable tracking"
    source: ClassVar[str] = "arXiv:2404.06654, of tokens"
    order: Order = "forward"
    values: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, values=self.values)

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("x", self.symbols), *numbered("v", self.values), "=", "?", FILLER)

    @property
    def chance(self) -> float:
        return 1 / self.values

    def _sizes(self) -> tuple[int, int]:
        return 3, 2

    def _least_symbols(self) -> int:
        return self.chains * self.hops + self.distractors

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        equals = self.symbols + self.values
        drawn = dice.choose(self.symbols, self._least_symbols())
        value = [self.symbols + v for v in dice.several(self.values, self.chains + self.distractors)]
        chains, named = [], []
        for number in range(self.chains):
            variables = drawn[number * self.hops : (number + 1) * self.hops]
            named.append(variables)
            chains.append(
                [[to, equals, of] for of, to in zip([value[number], *variables], variables, strict=False)]
            )
        free = drawn[self.chains * self.hops :]
        others = [[variable, equals, v] for variable, v in zip(free, value[self.chains :], strict=True)]
        asked = dice.below(self.chains)
        return self._laid_out(
            self._ordered(dice, chains, others), [equals + 1, named[asked][-1]], value[asked]
        )


@dataclass(frozen=True)
class Relations(FactsTask):
    """Relation composition: facts of a subject, a relation and an object; asked is the end of a path of relations.

        input    e3 r1 e7 e7 r0 e2 e3 r0 e5 ? e3 r1 r0      hops 2
        target   .  .  .  .  .  .  .  .  .  . .  .  e2

    Each entity of the asked path has a fact of another relation too, as far as `distractors` go: so relations
    must be read. Further distractors, and the other chains, are among entities of their own.
    """

    type: ClassVar[str] = "relations"
    title: ClassVar[str] = "Relation composition"
    source: ClassVar[str] = "here"
    relations: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, relations=self.relations)

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("e", self.symbols), *numbered("r", self.relations), "?", FILLER)

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def _sizes(self) -> tuple[int, int]:
        return 3, 2 + self.hops

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        links, first = self.hops + 1, self.symbols
        drawn = dice.choose(self.symbols, self._least_symbols())
        facts = []
        paths = []
        for start in range(0, self.chains * links, links):
            path, by = drawn[start : start + links], dice.several(self.relations, self.hops)
            paths.append((path, [first + relation for relation in by]))
            facts.append([[a, first + r, b] for a, r, b in zip(path, by, path[1:], strict=False)])
        path, by = paths[dice.below(self.chains)]
        free = drawn[self.chains * links :]
        others = []
        for number in range(self.distractors):
            subject, to = free[2 * number : 2 * number + 2]
            relation = dice.below(self.relations)
            if number < self.hops:
                subject = path[number]
                relation = (by[number] - first + 1 + dice.below(self.relations - 1)) % self.relations
            others.append([subject, first + relation, to])
        question = [first + self.relations, path[0], *by]
        return self._laid_out(self._ordered(dice, facts, others), question, path[-1])
