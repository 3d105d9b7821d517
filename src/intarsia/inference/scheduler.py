"""Which texts take part in the next step of an engine, and with how many tokens each."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from intarsia.errors import ConfigError
from intarsia.inference.requests import Text


@dataclass(frozen=True)
class Settings:
    """What an engine may do at once, and its memory.

    Attributes:
        sequences: texts that run together, at most.
        snapshots: states that are kept for later texts, at most. Texts that run and snapshots have a slot each.
        tokens: of all texts and snapshots together; what is shared counts once. In layers whose states grow there are
            pages for so many.
        page_size: tokens of a page.
        step_tokens: that the model reads in one step, at most: the more, the faster prompts are read, and the longer
            the others wait for their next token.
        step_seconds: that a step should take while texts are being continued: so much of prompts is read in it as fits,
            by what the steps before took. None: `step_tokens` alone decides.
        piece: of one prompt in one step, at most.
        prefix_cache: whether states are kept for texts that begin alike.
        snapshot_every: a state is kept every so many tokens.
        drafts: tokens that are guessed ahead in a step, at most, where something guesses.

    Raises:
        ConfigError: a number that cannot be.
    """

    sequences: int = 16
    snapshots: int = 48
    tokens: int = 65536
    page_size: int = 16
    step_tokens: int = 512
    step_seconds: float | None = None
    piece: int = 512
    prefix_cache: bool = True
    snapshot_every: int = 1024
    drafts: int = 4

    def __post_init__(self) -> None:
        for name in ("sequences", "tokens", "page_size", "step_tokens", "piece", "snapshot_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("snapshots", "drafts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.step_seconds is not None and not self.step_seconds > 0:
            raise ConfigError(f"step_seconds must be above 0, got {self.step_seconds}")
        if self.step_tokens < self.sequences:
            raise ConfigError(
                f"step_tokens must be at least sequences, so that each can go on in a step; "
                f"got {self.step_tokens} and {self.sequences}"
            )

    @property
    def slots(self) -> int:
        """Of texts and snapshots; guessing ahead takes one more a text."""
        return self.sequences * (2 if self.drafts else 1) + self.snapshots


class Scheduler:
    """Texts that wait and texts that run. Those that are being continued come before those that are being read, so that
    a long prompt holds up nobody; among each, the order is that of their requests.

    Attributes:
        waiting: in that order.
        running: in the order in which they were taken up.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.waiting: list[Text] = []
        self.running: list[Text] = []

    def add(self, text: Text) -> None:
        """Let a text wait."""
        bisect.insort(self.waiting, text, key=lambda each: each.order)

    def start(self, text: Text) -> None:
        """Let a text run that does not yet."""
        if text in self.waiting:
            self.waiting.remove(text)
        self.running.append(text)

    def wait(self, text: Text) -> None:
        """Let a text that runs wait again."""
        self.running.remove(text)
        self.add(text)

    def remove(self, text: Text) -> None:
        """Forget a text."""
        (self.running if text in self.running else self.waiting).remove(text)

    @property
    def is_full(self) -> bool:
        """Whether no text more may run."""
        return len(self.running) >= self._settings.sequences

    @property
    def last(self) -> Text:
        """The one that makes way first, of those that run."""
        return max(self.running, key=lambda text: text.order)

    def pieces(self, reading_beside: int | None = None) -> list[tuple[Text, int]]:
        """The texts of the next step, and how many of their pending tokens each brings.

        Args:
            reading_beside: tokens of prompts, at most, where texts are being continued.
        """
        left, pieces = self._settings.step_tokens, []
        alone = [text for text in self.running if text.alone and text.pending]
        if alone:
            text = min(alone, key=lambda each: each.order)
            return [(text, min(text.pending, self._settings.piece, left, self._to_next_place(text)))]
        continued = [text for text in self.running if self.continues(text)]
        for text in continued:
            pieces.append((text, min(text.pending, left)))
            left -= text.pending
        if continued and reading_beside is not None:
            left = min(left, reading_beside)
        reading = [text for text in self.running if text.pending and text not in continued]
        for text in sorted(reading, key=lambda each: each.order):
            if left > 0:
                n = min(text.pending, self._settings.piece, left, self._to_next_place(text))
                pieces.append((text, n))
                left -= n
        return pieces

    def continues(self, text: Text) -> bool:
        """Whether a text is being continued; else, where anything of it is pending, it is being read."""
        return bool(text.produced) and 0 < text.pending <= self._ahead

    def is_place(self, text: Text) -> bool:
        """Whether a state is kept where the text stands now: where it leaves others, at the end of its prompt, and
        every so many tokens."""
        every = text.seen % self._settings.snapshot_every == 0
        return every or text.seen in text.places or text.seen == len(text.request.prompt)

    @property
    def _ahead(self) -> int:
        """The most tokens that a text which is being continued has pending."""
        return self._settings.drafts + 1

    def _to_next_place(self, text: Text) -> int:
        """How many tokens the text is before the next place where its state is kept."""
        if not self._settings.prefix_cache:
            return text.pending
        every = self._settings.snapshot_every
        places = [text.seen + every - text.seen % every, len(text.request.prompt), *text.places]
        return min(place - text.seen for place in places if place > text.seen)
