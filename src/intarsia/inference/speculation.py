"""Guessed tokens on their way through the model, and the states behind those of them that were right."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.errors import ConfigError
from intarsia.inference.batch import Part
from intarsia.inference.drafts import DraftModel, Drafts
from intarsia.inference.requests import Text
from intarsia.inference.room import Room


class Speculation:
    """Lets texts that are being continued bring guesses of what comes next. Where a state cannot go back, guesses are
    read on a fork of it, a trial, and the state itself reads what is certain alone.

    Args:
        drafts: what guesses; None: nothing does.
        room: where the texts have their states.
        vocabulary: the model's number of tokens.
        most: tokens that are guessed ahead of a text, at most.

    Attributes:
        guessed, confirmed: tokens so far that were guessed, and those of them that were right.

    Raises:
        ConfigError: a draft model of another vocabulary.
    """

    def __init__(self, drafts: Drafts | None, room: Room, vocabulary: int, most: int) -> None:
        if isinstance(drafts, DraftModel) and drafts.model.config.vocab_size != vocabulary:
            raise ConfigError(
                f"the draft model has {drafts.model.config.vocab_size} tokens and the model {vocabulary}: "
                "they must have one tokenizer"
            )
        self._drafts = drafts if most else None
        self._room, self._vocabulary, self._most = room, vocabulary, most
        self.guessed = self.confirmed = 0

    def guess(self, parts: Sequence[Part], left: int) -> bool:
        """Guess what comes next in the texts that are being continued, `left` tokens in all at most, those that are
        read twice among them; whether there is something that guesses."""
        if self._drafts is None:
            return False
        some = [part for part in parts if part.text.produced and part.chooses]
        proposed = self._drafts.propose([part.text for part in some], self._most) if some else []
        for part, guesses in zip(some, proposed, strict=True):
            # The last token of an answer is not read, so there is nothing to guess behind the one before it.
            most = min(part.text.most - part.text.produced - 1, left)
            guesses = [token for token in guesses if token < self._vocabulary][: max(most, 0)]
            assert part.text.slot is not None
            if guesses and not self._room.shortens:
                part.trial = self._room.fork(part.text.slot)
            if guesses and (self._room.shortens or part.trial is not None):
                part.guesses = guesses
                left -= len(guesses) + (part.trial is not None) * part.count
        return True

    def drop(self, parts: Sequence[Part]) -> None:
        """Let the forks of a step go that does not come about."""
        for part in parts:
            if part.trial is not None:
                self._room.pool.free(part.trial)
                part.trial = None

    def settle(self, part: Part, right: int) -> None:
        """Let the state of a text be that behind those guesses alone that were right."""
        text, pool = part.text, self._room.pool
        assert text.slot is not None
        self.guessed += len(part.guesses)
        self.confirmed += right
        if part.trial is None:
            text.seen += right
            pool.view([text.slot]).truncated([text.seen])
        elif right == len(part.guesses):
            pool.free(text.slot)
            text.slot, text.seen = part.trial, text.seen + right
        else:
            pool.free(part.trial)

    def release(self, text: Text) -> None:
        """Forget a text, which has ended or waits."""
        if self._drafts is not None:
            self._drafts.release(text)
