"""Guessing ahead: tokens that a model need only confirm, several in one step (Leviathan et al. 2023).

A guess is taken if it is the token that the model chooses there anyway, by its own sampling and seed, so the answer is
the same with and without. What guesses wrong costs time alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from intarsia.errors import ConfigError, PoolError
from intarsia.inference.requests import Text
from intarsia.model import InferenceModel
from intarsia.ops import Sequences


class Drafts(Protocol):
    """What guesses the next tokens of texts."""

    def propose(self, texts: Sequence[Text], most: int) -> list[list[int]]:
        """For each text what may come next, `most` tokens or fewer."""
        ...

    def release(self, text: Text) -> None:
        """Forget a text, which has ended or waits."""
        ...


class LookUp:
    """Guesses that what followed the last few tokens before will follow them again: in code, in quotations, in answers
    that repeat what was asked (prompt lookup). Needs no model.

    Args:
        longest, shortest: how many of the last tokens must be the same; the longest that there is decides.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ConfigError(f"shortest must be from 1 to longest, got {shortest} and {longest}")
        self._sizes = range(longest, shortest - 1, -1)
        # Of each text how many tokens are listed, and where the last run of tokens that is the same ended.
        self._known: dict[Text, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, texts: Sequence[Text], most: int) -> list[list[int]]:
        """See `Drafts.propose`."""
        return [self._propose(text, most) for text in texts]

    def release(self, text: Text) -> None:
        """See `Drafts.release`."""
        self._known.pop(text, None)

    def _propose(self, text: Text, most: int) -> list[int]:
        tokens = text.tokens
        listed, ends = self._known.get(text, (0, {}))
        # The last run itself is not listed: it would be found.
        for end in range(listed + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    ends[tuple(tokens[end - size : end])] = end
        self._known[text] = max(len(tokens) - 1, 0), ends
        for size in self._sizes:
            found = ends.get(tuple(tokens[-size:])) if size < len(tokens) else None
            if found is not None:
                return tokens[found : found + most]
        return []


class DraftModel:
    """Guesses by a smaller model of the same vocabulary, which takes the most probable token each time. Its state has
    seen what is certain; guesses are made on a fork of it, which is dropped.

    Args:
        sequences: texts that it keeps a state of, at most; of more it guesses nothing.
        tokens: of all of them together.
        piece: tokens of a text that are read at once.
    """

    def __init__(
        self, model: InferenceModel, sequences: int = 16, tokens: int = 65536, piece: int = 512
    ) -> None:
        self.model, self._piece = model, piece
        self._pool = model.new_pool(2 * sequences, tokens)

    def propose(self, texts: Sequence[Text], most: int) -> list[list[int]]:
        """See `Drafts.propose`."""
        guesses: dict[Text, list[int]] = {}
        for text in texts:
            if text.draft_slot is None and len(self._pool.free_slots) >= 2:
                text.draft_slot = self._pool.take()
        known = [text for text in texts if text.draft_slot is not None]
        try:
            last = {text: self._catch_up(text) for text in known}
            for text in known[: len(self._pool.free_slots)]:
                guesses[text] = [last[text]]
            self._go_on(guesses, most)
        except PoolError:  # it holds no more: texts are continued without guesses
            for text in known:
                self.release(text)
            guesses.clear()
        return [guesses.get(text, [])[:most] for text in texts]

    def release(self, text: Text) -> None:
        """See `Drafts.release`."""
        if text.draft_slot is not None:
            self._pool.free(text.draft_slot)
            text.draft_slot = None

    def _catch_up(self, text: Text) -> int:
        """Read what is new, and the most probable token behind it."""
        assert text.draft_slot is not None
        slots = [text.draft_slot]
        (seen,) = self._pool.tokens(slots)
        best = -1
        for begin in range(seen, len(text.tokens), self._piece):
            (best,) = self._advance(slots, [text.part(begin, begin + self._piece)])
        return best

    def _go_on(self, guesses: dict[Text, list[int]], most: int) -> None:
        """Append to each text's guesses until there are `most`."""
        forks = {text: self._pool.fork(text.draft_slot) for text in guesses if text.draft_slot is not None}
        try:
            for _ in range(most - 1 if forks else 0):
                chosen = self._advance(list(forks.values()), [[guesses[text][-1]] for text in forks])
                for text, token in zip(forks, chosen, strict=True):
                    guesses[text].append(token)
        finally:
            for slot in forks.values():
                self._pool.free(slot)

    def _advance(self, slots: list[int], pieces: Sequence[Sequence[int]]) -> list[int]:
        row = torch.tensor([[token for piece in pieces for token in piece]], device=self.model.device)
        states = self._pool.view(slots)
        out = self.model(row, states, Sequences(tuple(map(len, pieces))))
        assert out.logits is not None
        best: list[int] = out.logits[0].argmax(-1).tolist()
        return best
