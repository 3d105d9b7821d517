"""The form of answers at `/v1/completions` and `/v1/chat/completions`, whole and in a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from intarsia.inference.server.answering import Piece, TokenFacts
from intarsia.inference.server.served import Served
from intarsia.inference.server.wire import error_body, head, usage
from intarsia.inference.tool_calls import CallPart

Body = dict[str, Any]
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Counts:
    """Tokens that a request took: of its prompts, those of them that were found read, and of its answers."""

    prompt: int
    cached: int
    written: int


def event(body: Body, name: str | None = None) -> str:
    """A server-sent event."""
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {json.dumps(body, ensure_ascii=False)}\n\n"


class Form(Protocol):
    """How the answer to one request looks. One form is for one request: it may remember what it has told."""

    def whole(self, pieces: Mapping[int, Sequence[Piece]], counts: Counts) -> Body:
        """The answer in one, of all pieces of each."""
        ...

    def opening(self) -> Iterator[str]:
        """What a stream begins with, as server-sent events."""
        ...

    def part(self, piece: Piece) -> Iterator[str]:
        """A piece in a stream."""
        ...

    def closing(self, counts: Counts) -> Iterator[str]:
        """What a stream ends with."""
        ...

    def failed(self, message: str) -> Iterator[str]:
        """What it ends with when something went wrong."""
        ...


class _Choices:
    """What the two forms have in common: answers are `choices`."""

    kind = part_kind = prefix = ""

    def __init__(self, served: Served, with_usage: bool) -> None:
        self._served, self._with_usage = served, with_usage
        self._identity = f"{self.prefix}-{uuid.uuid4().hex}"

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Body:
        raise NotImplementedError

    def _body(self, kind: str, choices: list[Body]) -> Body:
        return {**head(self._identity, kind, self._served.name), "choices": choices}

    def whole(self, pieces: Mapping[int, Sequence[Piece]], counts: Counts) -> Body:
        choices = [self._choice(index, pieces[index]) for index in sorted(pieces)]
        return {
            **self._body(self.kind, choices),
            "usage": usage(counts.prompt, counts.cached, counts.written),
        }

    def opening(self) -> Iterator[str]:
        return iter(())

    def closing(self, counts: Counts) -> Iterator[str]:
        if self._with_usage:
            told = usage(counts.prompt, counts.cached, counts.written)
            yield event({**self._body(self.part_kind, []), "usage": told})
        yield DONE

    def failed(self, message: str) -> Iterator[str]:
        yield event(error_body(message, "server_error"))


class CompletionForm(_Choices):
    """The form of `/v1/completions`."""

    kind = part_kind = "text_completion"
    prefix = "cmpl"

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Body:
        text, facts, reason = joined(pieces)
        return {"index": index, "text": text, "logprobs": self._logprobs(facts), "finish_reason": reason}

    def part(self, piece: Piece) -> Iterator[str]:
        yield event(self._body(self.part_kind, [self._choice(piece.index, [piece])]))

    def _logprobs(self, facts: Sequence[TokenFacts]) -> Body | None:
        if not facts:
            return None
        decode = self._served.tokenizer.decode
        return {
            "tokens": [decode([each.token]) for each in facts],
            "token_logprobs": [each.logprobs.token for each in facts],
            "top_logprobs": [
                {decode([token]): value for token, value in each.logprobs.top} for each in facts
            ],
        }


class ChatForm(_Choices):
    """The form of `/v1/chat/completions`."""

    kind, part_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, served: Served, with_usage: bool) -> None:
        super().__init__(served, with_usage)
        self._opened: set[int] = set()
        self._called: set[int] = set()

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Body:
        text, facts, reason = joined(pieces)
        calls = whole_calls(pieces)
        message: Body = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {
                    "id": each.identity,
                    "type": "function",
                    "function": {"name": each.name, "arguments": each.arguments},
                }
                for each in calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._served, facts),
            "finish_reason": _ending(reason, bool(calls)),
        }

    def part(self, piece: Piece) -> Iterator[str]:
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            yield self._chunk(piece.index, {"role": "assistant", "content": ""})
        if piece.calls:
            self._called.add(piece.index)
        delta: Body = {"content": piece.text} if piece.text else {}
        calls = [_call_delta(each) for each in piece.calls if each.name is not None or each.arguments]
        if calls:
            delta["tool_calls"] = calls
        reason = _ending(piece.reason, piece.index in self._called)
        yield self._chunk(piece.index, delta, chat_logprobs(self._served, piece.facts), reason)

    def _chunk(self, index: int, delta: Body, logprobs: Body | None = None, reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event(self._body(self.part_kind, [choice]))


def _ending(reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and reason == "stop" else reason


def _call_delta(call: CallPart) -> Body:
    function: Body = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.number, "function": function}
    return {
        "index": call.number,
        "id": call.identity,
        "type": "function",
        "function": {"name": call.name, **function},
    }


@dataclass(frozen=True)
class WholeCall:
    """A call of a tool with all of its arguments."""

    identity: str
    name: str
    arguments: str


def whole_calls(pieces: Sequence[Piece]) -> list[WholeCall]:
    """The calls of one answer."""
    parts = [part for piece in pieces for part in piece.calls]
    begun = [part for part in parts if part.name is not None]
    return [
        WholeCall(
            first.identity or "",
            first.name or "",
            "".join(part.arguments for part in parts if part.number == first.number),
        )
        for first in begun
    ]


def chat_logprobs(served: Served, facts: Sequence[TokenFacts]) -> Body | None:
    """The log-probabilities of tokens, as chats tell them."""
    if not facts:
        return None
    return {
        "content": [
            {
                **_entry(served, each.token, each.logprobs.token),
                "top_logprobs": [_entry(served, token, value) for token, value in each.logprobs.top],
            }
            for each in facts
        ],
        "refusal": None,
    }


def _entry(served: Served, token: int, value: float) -> Body:
    text = served.tokenizer.decode([token])
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def joined(pieces: Sequence[Piece]) -> tuple[str, list[TokenFacts], str | None]:
    """All pieces of one answer as one."""
    facts = [fact for piece in pieces for fact in piece.facts]
    reason = next((piece.reason for piece in pieces if piece.reason is not None), None)
    return "".join(piece.text for piece in pieces), facts, reason
