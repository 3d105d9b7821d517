"""What is served: a model with its tokenizer and manners, and how much of it one may have."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from intarsia.data.chat import ChatTemplate
from intarsia.data.published import Conduct
from intarsia.data.tokenizer import Tokenizer
from intarsia.errors import ConfigError
from intarsia.inference.grammar import Grammars
from intarsia.inference.sampling import Sampling
from intarsia.inference.worker import Worker


@dataclass(frozen=True)
class Limits:
    """What clients may ask for.

    Attributes:
        key: that requests must bring; None: none.
        body_bytes: of a request, at most.
        body_seconds: until a request must be there, and an answer that is done must have been taken.
        open_requests: at one time, of all clients; more are told to come again.
        open_per_client: of one client, which is its address.
        seconds: until an answer is cut off.
        answers: to one request, at most.
        most_tokens: of an answer, where a request does not say.
    """

    key: str | None = None
    body_bytes: int = 8 << 20
    body_seconds: float = 60.0
    open_requests: int = 256
    open_per_client: int = 64
    seconds: float = 600.0
    answers: int = 16
    most_tokens: int = 1024

    def __post_init__(self) -> None:
        positive = (
            "body_bytes",
            "body_seconds",
            "open_requests",
            "open_per_client",
            "seconds",
            "answers",
            "most_tokens",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.key is not None and not self.key.strip():
            raise ConfigError("the key is empty: leave it out to serve without one")


@dataclass(frozen=True)
class Served:
    """A model that is served, under a name.

    Attributes:
        template: how messages become text; None: the model takes texts alone.
    """

    name: str
    worker: Worker
    tokenizer: Tokenizer
    template: ChatTemplate | None
    conduct: Conduct
    limits: Limits = field(default_factory=Limits)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer of a structure, which can only be ended when it is complete."""
        return self.conduct.stop or frozenset([self.tokenizer.separator])

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Of answers of a structure. Made when the first is asked for, which takes a second where the vocabulary is
        large."""
        return Grammars(self.tokenizer, self.worker.engine.model.config.vocab_size, self.ends)

    def sampling(self, temperature: float | None, top_p: float | None, min_p: float | None) -> Sampling:
        """As a request says, else as the model's files do, else the model's own distribution."""

        def first(*values: float | None) -> float:
            return next(value for value in values if value is not None)

        return Sampling(
            first(temperature, self.conduct.temperature, 1.0),
            first(top_p, self.conduct.top_p, 1.0),
            first(min_p, self.conduct.min_p, 0.0),
        )

    def tokens_of_text(self, text: str) -> list[int]:
        """The tokens of a text to continue."""
        return [*self.conduct.begin, *self.tokenizer.encode(text)] or [self.tokenizer.separator]

    def tokens_of_messages(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> list[int]:
        """The tokens of a dialogue, up to where the answer begins.

        Raises:
            ConfigError: the model has no template.
            DataError: the template refuses the messages.
        """
        if self.template is None:
            raise ConfigError(
                f"{self.name} has no chat template, so it has not learned to answer messages: use /v1/completions"
            )
        template = replace(self.template, options={**self.template.options, **options})
        return self.tokenizer.encode_chat(template.render(messages))
