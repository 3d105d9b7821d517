"""Tasks of text: a context, a question and its answer in words, for models that come with a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from intarsia.data import Tokenizer
from intarsia.errors import ConfigError
from intarsia.model.loss import IGNORED
from intarsia.tasks.base import Dice, ExampleSplit, OneByOneTask, at_least, key_of


class Written(NamedTuple):
    """An example in words."""

    prompt: str
    """The context and the question, up to where the answer begins."""
    answer: str
    """What must come next, with the space before it."""


@dataclass(frozen=True)
class TextTask:
    """A task of text: its fields are the options. `bound` makes it one of tokens, with a tokenizer.

    An example has as much context as fits into `length` tokens. A model has answered rightly when each token of
    the answer is its most likely one after what stands before, so when greedy decoding would say it word for
    word.
    """

    type: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    length: int

    def __post_init__(self) -> None:
        at_least(1, length=self.length)

    def bound(self, tokenizer: Tokenizer) -> BoundTask:
        """The task of a tokenizer's tokens.

        Raises:
            ConfigError: the length leaves no room for the question and what must stand in the context.
        """
        return BoundTask(self.length, task=self, tokenizer=tokenizer)

    def _write(self, dice: Dice, size: int) -> Written:
        """An example whose context has `size` pieces, 1 or more; what is asked is the same for any size."""
        raise NotImplementedError


@dataclass(frozen=True)
class BoundTask(OneByOneTask):
    """A task of text in the tokens of a tokenizer."""

    type: ClassVar[str] = "text"
    task: TextTask = field(kw_only=True)
    tokenizer: Tokenizer = field(kw_only=True, compare=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def chance(self) -> float:
        """Nobody guesses an answer of several tokens."""
        return 0.0

    def show(self, tokens: Tensor) -> str:
        """The text of what is read, and of each token that is asked; `[T]`."""
        return self.tokenizer.decode([token for token in tokens.tolist() if token != IGNORED])

    def _key(self, seed: int, split: ExampleSplit) -> NDArray[np.uint64]:
        return key_of(self.task.type, seed, split)

    def _example(self, dice: Dice) -> tuple[list[int], dict[int, int]]:
        prompt, answer = self._tokens(dice, 1)
        if len(prompt) + len(answer) - 1 > self.length:
            raise ConfigError(
                f"the task {self.task.type!r} needs at least {len(prompt) + len(answer) - 1} tokens of this "
                f"tokenizer; the length is {self.length}"
            )
        # The text grows with its size in nearly equal steps: aim, then step back until it fits.
        longer, _ = self._tokens(dice, 9)
        size = max(1, 1 + (self.length - len(prompt) - len(answer)) * 8 // max(1, len(longer) - len(prompt)))
        while size > 1:
            made, said = self._tokens(dice, size)
            over = len(made) + len(said) - 1 - self.length
            if over <= 0:
                prompt, answer = made, said
                break
            size = max(1, size - max(1, over * size // (2 * len(made))))
        first = len(prompt) - 1
        return prompt + answer[:-1], {first + place: token for place, token in enumerate(answer)}

    def _tokens(self, dice: Dice, size: int) -> tuple[list[int], list[int]]:
        written = self.task._write(dice.again(), size)
        return self.tokenizer.encode(written.prompt), self.tokenizer.encode(written.answer)


def sentences(path: str) -> list[str]:
    """The lines of a local text that are not empty.

    Raises:
        ConfigError: there is none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text {path} cannot be read: {error}") from None
    found = [line for line in lines if line]
    if not found:
        raise ConfigError(f"the text {path} has no words")
    return found
