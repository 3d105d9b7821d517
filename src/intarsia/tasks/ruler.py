"""RULER's tasks (Hsieh et al. 2024, arXiv:2404.06654): needles, variables, frequent words, questions.

The tasks are RULER's with words of our own: keys are made of syllables, and prompts are short. Eight hide
needles; those whose haystack is text, and the two of questions, take a local file (`text=FILE`) in place of the
essays and data sets that RULER downloads: so their numbers are not RULER's. An answer counts when it comes at
once and in the order of the text; RULER looks for each part anywhere in what is generated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

from intarsia.errors import ConfigError
from intarsia.tasks.base import Dice, at_least
from intarsia.tasks.text import TextTask, Written, sentences

SOURCE = "arXiv:2404.06654"
Hay = Literal["noise", "needles", "text"]
Kind = Literal["word", "number", "uuid"]
NOISE = "The wind is cold. The river is wide. The road is long. There and back again."


@dataclass(frozen=True)
class RulerNeedles(TextTask):
    """Needles, each a key with its value, in a haystack; asked are the values of some keys."""

    source: ClassVar[str] = SOURCE
    hay: ClassVar[Hay] = "noise"
    key: ClassVar[Kind] = "word"
    value: ClassVar[Kind] = "number"
    needles: ClassVar[int] = 1
    values: ClassVar[int] = 1
    questions: ClassVar[int] = 1

    def _hay(self, dice: Dice, size: int) -> list[str]:
        if self.hay == "noise":
            return [NOISE] * size
        return [_needle(_word(dice, self.key), _word(dice, self.value)) for _ in range(size)]

    def _write(self, dice: Dice, size: int) -> Written:
        keys = _words(dice, self.key, self.needles)
        pairs = dice.shuffled([(key, _word(dice, self.value)) for key in keys for _ in range(self.values)])
        lines = _spread(dice, self._hay(dice, size), [_needle(key, value) for key, value in pairs])
        asked = keys[: self.questions]
        answers = [value for key in asked for of, value in pairs if of == key]
        return Written("\n".join([*lines, f"The value of {_listed(asked)} is"]), " " + _listed(answers))


@dataclass(frozen=True)
class NiahSingle1(RulerNeedles):
    """One number in a haystack of a repeated line."""

    type: ClassVar[str] = "ruler-niah-single-1"
    title: ClassVar[str] = "RULER: a needle in noise"


@dataclass(frozen=True)
class NiahMultikey2(RulerNeedles):
    """One number in a haystack of other needles."""

    type: ClassVar[str] = "ruler-niah-multikey-2"
    title: ClassVar[str] = "RULER: a needle among needles"
    hay: ClassVar[Hay] = "needles"


@dataclass(frozen=True)
class NiahMultikey3(RulerNeedles):
    """One needle of two long random strings, in a haystack of others."""

    type: ClassVar[str] = "ruler-niah-multikey-3"
    title: ClassVar[str] = "RULER: a needle of random strings among needles"
    hay: ClassVar[Hay] = "needles"
    key: ClassVar[Kind] = "uuid"
    value: ClassVar[Kind] = "uuid"


@dataclass(frozen=True)
class RulerNeedlesInText(RulerNeedles):
    """Needles between the lines of a local text, taken in turn from a line that is drawn."""

    hay: ClassVar[Hay] = "text"
    text: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _needs(self.type, "text", self.text)
        sentences(self.text)

    def _hay(self, dice: Dice, size: int) -> list[str]:
        lines = sentences(self.text)
        first = dice.below(len(lines))
        return [lines[(first + number) % len(lines)] for number in range(size)]


@dataclass(frozen=True)
class NiahSingle2(RulerNeedlesInText):
    """One number in a text."""

    type: ClassVar[str] = "ruler-niah-single-2"
    title: ClassVar[str] = "RULER: a needle in text"


@dataclass(frozen=True)
class NiahSingle3(RulerNeedlesInText):
    """One long random string in a text."""

    type: ClassVar[str] = "ruler-niah-single-3"
    title: ClassVar[str] = "RULER: a random string in text"
    value: ClassVar[Kind] = "uuid"


@dataclass(frozen=True)
class NiahMultikey1(RulerNeedlesInText):
    """Four needles in a text, of which one is asked."""

    type: ClassVar[str] = "ruler-niah-multikey-1"
    title: ClassVar[str] = "RULER: one of four needles in text"
    needles: ClassVar[int] = 4


@dataclass(frozen=True)
class NiahMultivalue(RulerNeedlesInText):
    """One key with four numbers in a text, which are asked in the order of the text."""

    type: ClassVar[str] = "ruler-niah-multivalue"
    title: ClassVar[str] = "RULER: four values of a key in text"
    values: ClassVar[int] = 4


@dataclass(frozen=True)
class NiahMultiquery(RulerNeedlesInText):
    """Four needles in a text, all of which are asked, in the order of the question."""

    type: ClassVar[str] = "ruler-niah-multiquery"
    title: ClassVar[str] = "RULER: four needles in text"
    needles: ClassVar[int] = 4
    questions: ClassVar[int] = 4


@dataclass(frozen=True)
class RulerVariables(TextTask):
    """A chain of assignments between noise; asked are the variables that have the first one's value."""

    type: ClassVar[str] = "ruler-vt"
    title: ClassVar[str] = "RULER: variable tracking"
    source: ClassVar[str] = SOURCE
    hops: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, hops=self.hops)

    def _write(self, dice: Dice, size: int) -> Written:
        names = [name.upper() for name in _words(dice, "word", self.hops + 1)]
        value = _word(dice, "number")
        facts = [f"VAR {names[0]} = {value}", *(f"VAR {to} = VAR {of}" for of, to in pairwise(names))]
        lines = _spread(dice, [NOISE] * size, facts)
        return Written("\n".join([*lines, f"The variables with the value {value} are"]), " " + _listed(names))


@dataclass(frozen=True)
class CommonWords(TextTask):
    """A list of words in which ten come thirty times and the others three times; asked are the ten, in the
    order of the alphabet."""

    type: ClassVar[str] = "ruler-cwe"
    title: ClassVar[str] = "RULER: common words"
    source: ClassVar[str] = SOURCE
    common: int = 10
    often: int = 30
    seldom: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, common=self.common, seldom=self.seldom)
        if self.often <= self.seldom:
            raise ConfigError(f"often must be more than seldom, {self.seldom}; got {self.often}")

    def _write(self, dice: Dice, size: int) -> Written:
        common = sorted(_words(dice, "word", self.common))
        others = [word for word in _words(dice, "word", size + self.common) if word not in common][:size]
        words = dice.shuffled(common * self.often + others * self.seldom)
        return Written(
            " ".join(words) + f"\nThe {self.common} most common words, in the order of the alphabet, are",
            " " + _listed(common),
        )


@dataclass(frozen=True)
class FrequentWords(TextTask):
    """Words whose frequency falls by a power law; asked are the three most frequent, the first one first.

    Word number r comes in proportion to `1 / r ** power`; the second and third once less than the one before at
    least, so that the order is one.
    """

    type: ClassVar[str] = "ruler-fwe"
    title: ClassVar[str] = "RULER: most frequent words"
    source: ClassVar[str] = SOURCE
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ConfigError(f"power must be above 0; got {self.power!r}")

    def _write(self, dice: Dice, size: int) -> Written:
        counts = [max(1, int(10 * size / rank**self.power)) for rank in range(1, size + 5)]
        for rank in (2, 1, 0):
            counts[rank] = max(counts[rank], counts[rank + 1] + 1)
        words = _words(dice, "word", len(counts))
        said = dice.shuffled([word for word, count in zip(words, counts, strict=True) for _ in range(count)])
        return Written(
            " ".join(said) + "\nThe three most frequent words, the most frequent first, are",
            " " + _listed(words[:3]),
        )


@dataclass(frozen=True)
class RulerQuestions(TextTask):
    """A question about one of several paragraphs, from a local file in the form of SQuAD."""

    type: ClassVar[str] = "ruler-qa-1"
    title: ClassVar[str] = "RULER: question answering"
    source: ClassVar[str] = SOURCE
    text: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _needs(self.type, "text", self.text)
        _questions(self.text)

    def _write(self, dice: Dice, size: int) -> Written:
        found = _questions(self.text)
        context, question, answer = found[dice.below(len(found))]
        others = [
            paragraph for paragraph in dict.fromkeys(c for c, _, _ in found) if paragraph not in context
        ]
        order = dice.shuffled(others)
        lines = _spread(dice, order[: size - 1], context.split("\n\n"))
        return Written("\n\n".join([*lines, f"Question: {question}\nAnswer:"]), " " + answer)


@dataclass(frozen=True)
class RulerHops(RulerQuestions):
    """A question about two of several paragraphs, from a local file in the form of HotpotQA."""

    type: ClassVar[str] = "ruler-qa-2"
    title: ClassVar[str] = "RULER: question answering over two paragraphs"


RULER: tuple[type[TextTask], ...] = (
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultivalue,
    NiahMultiquery,
    RulerVariables,
    CommonWords,
    FrequentWords,
    RulerQuestions,
    RulerHops,
)
"""All thirteen."""


def _needle(key: str, value: str) -> str:
    return f"Remember: the value of {key} is {value}."


def _spread(dice: Dice, hay: list[str], facts: list[str]) -> list[str]:
    """The hay with the facts in it, in their order, each at a place that is drawn."""
    places = sorted(dice.below(len(hay) + 1) for _ in facts)
    lines: list[str] = []
    at = 0
    for place, fact in zip(places, facts, strict=True):
        lines += [*hay[at:place], fact]
        at = place
    return lines + hay[at:]


def _word(dice: Dice, kind: Kind) -> str:
    if kind == "number":
        return str(1_000_000 + dice.below(9_000_000))
    if kind == "uuid":
        digits = f"{dice.below(1 << 60):015x}{dice.below(1 << 60):015x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:]))
    return "".join("bdfgklmnprstvz"[dice.below(14)] + "aeiou"[dice.below(5)] for _ in range(4))


def _words(dice: Dice, kind: Kind, count: int) -> list[str]:
    """So many different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_word(dice, kind)] = None
    return list(found)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _needs(name: str, option: str, value: str) -> None:
    if not value:
        raise ConfigError(
            f"{option} is missing: {name} is made of a text on this machine, {name}:length=…,{option}=FILE"
        )


@cache
def _questions(path: str) -> list[tuple[str, str, str]]:
    """Paragraphs (with an empty line between two), a question and its answer, of a file of SQuAD or HotpotQA."""
    found: list[tuple[str, str, str]] = []
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(values, list):
            for entry in values:
                by_title = {title: " ".join(lines) for title, lines in entry["context"]}
                needed = dict.fromkeys(title for title, _ in entry["supporting_facts"])
                found.append(
                    ("\n\n".join(by_title[title] for title in needed), entry["question"], entry["answer"])
                )
        else:
            found = [
                (paragraph["context"], asked["question"], asked["answers"][0]["text"])
                for article in values["data"]
                for paragraph in article["paragraphs"]
                for asked in paragraph["qas"]
                if asked["answers"]
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} has no questions in the form of SQuAD or HotpotQA: {error}") from None
    if not found:
        raise ConfigError(f"{path} has no questions")
    return found
