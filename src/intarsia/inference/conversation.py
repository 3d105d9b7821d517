"""A dialogue in turns: the states stay, and only what is new is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from intarsia.errors import ConfigError
from intarsia.inference.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from intarsia.data import Tokenizer
    from intarsia.data.chat import ChatTemplate
    from intarsia.model import InferenceModel, ModelStates

Message = dict[str, str]
Ended = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        kept: tokens that were read in earlier turns and are not read again.
        read: tokens that the model has read before its answer.
        written: tokens of the answer.
        ended: by a token that ends it, by its length, or from outside.
        seconds_to_first, seconds: until the first token was chosen, and in all.
    """

    kept: int
    read: int
    written: int
    ended: Ended
    seconds_to_first: float
    seconds: float


@dataclass(frozen=True)
class _Mark:
    """A place in the text to go on from: the states there, and the tokens before it that they have not seen."""

    text: str
    states: ModelStates
    pending: tuple[int, ...]


class Conversation:
    """A dialogue with a model.

    Two places are remembered, with the model's states there: behind the last answer, and behind the message before it.
    The next turn goes on from the later one that the template leaves as it was. Usually that is the answer, so that
    the new message is all that is read; a template that takes thoughts out of earlier answers changes it, and then the
    answer as it is now is read too. If neither holds, all is read again.

    Args:
        template: how messages become text; None: they are texts, each of which follows what there is on a new line.
        system: the instruction before all messages; only with a template.
        begin: tokens before the text, where there is no template that writes them.
        stop: tokens that end an answer.
        max_tokens: of an answer.
        prefill_chunk: as in `generate`; it is also how soon a long message can be interrupted.

    Attributes:
        messages: the dialogue, whole turns only.
        last: what the last turn took.

    Raises:
        ConfigError: an instruction without a template.
    """

    def __init__(
        self,
        model: InferenceModel,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        system: str | None = None,
        begin: Sequence[int] = (),
        stop: Collection[int] = (),
        sampling: Sampling | None = None,
        seed: int = 0,
        max_tokens: int = 1024,
        prefill_chunk: int = 512,
    ) -> None:
        if system is not None and template is None:
            raise ConfigError("an instruction stands where a chat template puts it, and this model has none")
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._begin, self._stop = () if template is not None else tuple(begin), frozenset(stop)
        self._sampler = Sampler(sampling or Sampling(), seed)
        self._max_tokens, self._chunk = max_tokens, prefill_chunk
        self.last: Turn | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all that was said."""
        self.messages: list[Message] = [*self._system]
        self._plain = ""
        self._beginning = _Mark("", self._model.init_states(1), self._begin)
        self._marks: list[_Mark] = []

    def say(self, message: str, interrupted: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Answer a message, in pieces of text as they come.

        An answer that is `interrupted` stays as far as it has come, and the dialogue goes on behind it; a turn that is
        interrupted before its answer has begun has not been.

        Raises:
            DataError: the template does not take the messages.
            ConfigError: a token that the model does not have.
        """
        started = time.perf_counter()
        messages = [*self.messages, {"role": "user", "content": message}]
        mark, ids, behind, text, asked_text = self._to_read(messages, message)
        states, first, logits = mark.states, None, None
        ended: Ended = "interrupted"
        answer: list[int] = []
        pieces: list[str] = []
        fed = 0
        stream = self._tokenizer.decode_stream()
        asked: _Mark | None = None
        try:
            for start, end in _steps(behind, len(ids), self._chunk):
                if interrupted():
                    break
                logits, states = self._advance(ids[start:end], states)
                if end == behind and self._template is not None:
                    asked = _Mark(asked_text, states, ())
            else:
                assert logits is not None
                while not interrupted():
                    token = self._sampler.choose(logits)
                    first = first or time.perf_counter()
                    if token in self._stop:
                        ended = "stop"
                        break
                    answer.append(token)
                    if piece := stream.push(token):
                        pieces.append(piece)
                        yield piece
                    if len(answer) == self._max_tokens:
                        ended = "length"
                        break
                    logits, states = self._advance([token], states)
                    fed += 1
                if rest := stream.finish():
                    pieces.append(rest)
                    yield rest
        finally:
            now = time.perf_counter()
            kept = mark.states.tokens[0]
            self.last = Turn(kept, len(ids), len(answer), ended, (first or now) - started, now - started)
            if first is not None:
                said = "".join(pieces)
                self.messages = [*messages, {"role": "assistant", "content": said}]
                self._plain = text + said
                after = _Mark(text + said, states, tuple(answer[fed:]))
                self._marks = [after] if asked is None else [after, asked]

    def _to_read(self, messages: list[Message], message: str) -> tuple[_Mark, list[int], int, str, str]:
        """From where to go on, the tokens to read, after how many of them the message ends (0: that is within one of
        them, or before), and the texts that all of it makes and that it makes up to there."""
        template, tokenizer = self._template, self._tokenizer
        if template is None:
            text = f"{self._plain}\n{message}" if self._plain else message
            asked, encode = text, tokenizer.encode
        else:
            text, asked = template.render(messages), template.render(messages, answer=False)
            encode = tokenizer.encode_chat
        mark = next((mark for mark in self._marks if text.startswith(mark.text)), self._beginning)
        new = encode(text[len(mark.text) :])
        behind = 0
        if text.startswith(asked) and len(asked) > len(mark.text):
            before = encode(asked[len(mark.text) :])
            if before + encode(text[len(asked) :]) == new:
                behind = len(mark.pending) + len(before)
        ids = [*mark.pending, *new]
        if not ids:
            raise ConfigError("there is nothing to read: say something")
        wrong = next((token for token in ids if token >= self._model.config.vocab_size), None)
        if wrong is not None:
            raise ConfigError(
                f"the tokenizer makes the token {wrong}, and the model has {self._model.config.vocab_size}: "
                "is it another model's?"
            )
        return mark, ids, behind, text, asked

    def _advance(self, ids: list[int], states: ModelStates) -> tuple[torch.Tensor, ModelStates]:
        """Read some tokens; the logits after the last, and the states."""
        out = self._model(torch.tensor([ids], device=self._model.device), states)
        assert out.logits is not None
        assert out.states is not None
        return out.logits[0, -1], out.states


def _steps(behind: int, count: int, chunk: int) -> Iterator[tuple[int, int]]:
    """The pieces in which `count` tokens are read, one of which ends at `behind`."""
    for start, end in ((0, behind), (behind, count)):
        for at in range(start, end, chunk):
            yield at, min(at + chunk, end)
