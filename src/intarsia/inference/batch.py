"""What goes through the model together in one step of an engine, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from intarsia.inference.requests import Text


@dataclass
class Entry:
    """A row of tokens for a state in the next step, and of how many of its last ones the logits are wanted."""

    slot: int
    tokens: Sequence[int]
    logits: int


@dataclass
class Part:
    """What a text does in the next step: it brings `count` of its pending tokens, and tokens that were guessed behind
    them. These go on in a fork, `trial`, where the state cannot go back: its own reads what is certain alone."""

    text: Text
    count: int
    guesses: list[int] = field(default_factory=list)
    trial: int | None = None

    @property
    def chooses(self) -> bool:
        """Whether a token can be chosen then."""
        return self.count == self.text.pending

    def entries(self) -> list[Entry]:
        text = self.text
        assert text.slot is not None
        own = text.part(text.seen, text.seen + self.count)
        both, logits = [*own, *self.guesses], (1 + len(self.guesses)) * self.chooses
        if self.trial is None:
            return [Entry(text.slot, both, logits)]
        return [Entry(text.slot, own, 0), Entry(self.trial, both, logits)]


@dataclass
class Choice:
    """The logits from which a text's next tokens are chosen, `[1 + guesses, vocab]`."""

    text: Text
    logits: Tensor
    part: Part | None = None

    @property
    def guesses(self) -> list[int]:
        return [] if self.part is None else self.part.guesses
