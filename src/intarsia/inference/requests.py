"""What an engine is asked for, what it tells, and a text while it is being read and continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from intarsia.errors import ConfigError, IntarsiaError
from intarsia.inference.sampling import Sampler, Sampling

Reason = Literal["stop", "length", "cancelled", "error"]
"""How an answer ended: by a token that ends it, by its length, from outside, or since something went wrong."""


class Constraint(Protocol):
    """What an answer must look like, a token at a time: a grammar and how far the answer is in it."""

    def allowed(self) -> Tensor:
        """Which tokens may come next, `[vocab]` bool on the CPU; one at least. Where the answer may end, the tokens
        that end it are among them.

        Raises:
            IntarsiaError: it cannot be said; the answer ends with that.
        """
        ...

    def accept(self, token: int) -> None:
        """Go on by an allowed token, which is none that ends the answer."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids, one at least.
        max_tokens: of an answer, at most; fewer where the engine's memory holds no more.
        sampling, seed: how tokens are chosen. The answer of number `n` has the seed `seed + n`. The same request gives
            the same answers whatever runs beside it, but for rounding.
        stop: tokens that end an answer, of which they are no part.
        count: how many answers; they share the reading of the prompt.
        logprobs: with each token its log-probability, and those of so many of the most probable ones; None: without.
        priority: of two requests that wait the one with the larger number comes first, then the older one. What does
            not fit makes way in the reverse order.
        constraint: makes what each answer must obey.

    Raises:
        ConfigError: a number out of range.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: frozenset[int] = frozenset()
    count: int = 1
    logprobs: int | None = None
    priority: int = 0
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("the prompt holds no token: begin with the tokenizer's separator")
        for name, least in (("max_tokens", 1), ("count", 1), ("logprobs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Logprobs:
    """The log-probability of a token, and the most probable tokens with theirs. Of the model's own distribution,
    whatever it was drawn by."""

    token: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Produced:
    """A token of an answer."""

    request: int
    number: int
    token: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Ended:
    """An answer has ended; it has `tokens` tokens.

    Attributes:
        prompt: tokens of the prompt.
        cached: of these, how many were not read since there was a state behind them.
        error: what went wrong, if anything.
    """

    request: int
    number: int
    reason: Reason
    prompt: int
    cached: int
    tokens: int
    error: IntarsiaError | None = None


Event = Produced | Ended


class Text:
    """One answer's text: the prompt and what has been produced, and how much of it the state in `slot` has seen.

    Attributes:
        identity, number: of the request, and of this answer to it.
        tokens: all of it.
        most: how many tokens the answer may have.
        seen: how many of these the state has seen.
        slot: where the state is; None while the text waits.
        ready: the logits behind all tokens, `[vocab]`, where they are there without reading anything.
        cached: tokens of the prompt that were found read when the text was first taken up.
        places: after how many tokens it leaves other texts, where a state is worth keeping.
        draft_slot: where a draft model has its state.
        alone: whether it goes through the model with no other, since a step of which it was part has failed.
    """

    def __init__(self, request: Request, identity: int, number: int) -> None:
        self.request, self.identity, self.number = request, identity, number
        self.tokens = list(request.prompt)
        self.sampler, self.constraint = self._chooser()
        self.most = request.max_tokens
        self.seen = 0
        self.slot: int | None = None
        self.ready: Tensor | None = None
        self.cached: int | None = None
        self.places: set[int] = set()
        self.draft_slot: int | None = None
        self.alone = False
        self.ended = False

    @property
    def order(self) -> tuple[int, int, int]:
        """Texts with the smaller one come first."""
        return -self.request.priority, self.identity, self.number

    @property
    def produced(self) -> int:
        """How many tokens of an answer there are."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """How many tokens the state has not seen."""
        return len(self.tokens) - self.seen

    def begin_again(self) -> None:
        """Nothing of it has been read. What chooses its tokens stands behind the last one."""
        self.slot, self.seen, self.ready, self.draft_slot = None, 0, None, None
        self.places.clear()
        self.sampler, self.constraint = self._chooser()
        for token in self.tokens[len(self.request.prompt) :]:
            self.sampler.point()
            if self.constraint is not None:
                self.constraint.accept(token)

    def part(self, begin: int, end: int) -> Sequence[int]:
        """The tokens from `begin` to `end`."""
        return self.tokens[begin:end]

    def _chooser(self) -> tuple[Sampler, Constraint | None]:
        made = self.request.constraint
        return Sampler(
            self.request.sampling, self.request.seed + self.number
        ), None if made is None else made()

    def check_integrity(self) -> None:
        """Raise IntarsiaError unless this can be."""
        if not 0 <= self.seen <= len(self.tokens) or (self.slot is None and self.seen):
            raise IntarsiaError(
                f"a text of {len(self.tokens)} tokens has seen {self.seen} in slot {self.slot}"
            )
        if self.tokens[: len(self.request.prompt)] != list(self.request.prompt) or self.produced > self.most:
            raise IntarsiaError(f"a text is not its prompt and at most {self.most} tokens behind it")
        if self.ready is not None and self.pending:
            raise IntarsiaError("there are logits behind tokens that have not been read")
