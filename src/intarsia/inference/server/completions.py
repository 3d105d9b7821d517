"""`/v1/completions` and `/v1/chat/completions`: what a request means, and the form of its answers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from intarsia.errors import ConfigError
from intarsia.inference.requests import Request
from intarsia.inference.server.answering import Piece, TokenFacts
from intarsia.inference.server.served import Served
from intarsia.inference.server.wire import Asked, ChatRequest, CompletionRequest, head


@dataclass(frozen=True)
class Form:
    """How answers to a request look: `whole` of all pieces of one, and `part` of one in a stream."""

    identity: str
    kind: str
    part_kind: str
    whole: Callable[[int, list[Piece]], dict[str, Any]]
    part: Callable[[Piece], dict[str, Any]]
    opening: dict[str, Any] | None = None
    """What a stream begins each answer with."""

    def body(self, served: Served, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """An answer, or a part of one in a stream."""
        kind = self.part_kind if streamed else self.kind
        return {**head(self.identity, kind, served.name), "choices": choices}


def completion_requests(served: Served, asked: CompletionRequest) -> list[Request]:
    """What the engine is asked for: one request a prompt.

    Raises:
        ConfigError: it cannot be served.
    """
    given = asked.prompt
    prompts: list[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    tokens = [
        served.tokens_of_text(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts
    ]
    return [_request(served, asked, each, asked.max_tokens or 16, asked.logprobs) for each in tokens]


def chat_requests(served: Served, asked: ChatRequest) -> list[Request]:
    """The same of a dialogue.

    Raises:
        ConfigError: it cannot be served.
        DataError: the model's template refuses it.
    """
    options = dict(asked.chat_template_kwargs or {})
    if asked.tools and asked.tool_choice != "none":
        options["tools"] = asked.tools
    try:
        messages = [message.plain() for message in asked.messages]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tokens = served.tokens_of_messages(messages, options)
    most = asked.max_completion_tokens or asked.max_tokens or served.limits.most_tokens
    return [_request(served, asked, tokens, most, (asked.top_logprobs or 0) if asked.logprobs else None)]


def _request(served: Served, asked: Asked, tokens: list[int], most: int, logprobs: int | None) -> Request:
    count = asked.n or 1
    if count > served.limits.answers:
        raise ConfigError(f"n is {count}, and this server gives {served.limits.answers} answers at most")
    return Request(
        tuple(tokens),
        max_tokens=most,
        sampling=served.sampling(asked.temperature, asked.top_p, asked.min_p),
        # A request without one is not repeated exactly: of two, each has its own.
        seed=uuid.uuid4().int % (1 << 62) if asked.seed is None else asked.seed,
        stop=served.conduct.stop,
        count=count,
        logprobs=logprobs,
        priority=asked.priority,
    )


def completion_form(served: Served) -> Form:
    """The form of `/v1/completions`."""

    def choice(index: int, text: str, facts: list[TokenFacts], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if facts:
            spelled = [served.tokenizer.decode([each.token]) for each in facts]
            logprobs = {
                "tokens": spelled,
                "token_logprobs": [each.logprobs.token for each in facts],
                "top_logprobs": [
                    {served.tokenizer.decode([token]): value for token, value in each.logprobs.top}
                    for each in facts
                ],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    return Form(
        f"cmpl-{uuid.uuid4().hex}",
        "text_completion",
        "text_completion",
        lambda index, pieces: choice(index, *_joined(pieces)),
        lambda piece: choice(piece.index, piece.text, list(piece.facts), piece.reason),
    )


def chat_form(served: Served) -> Form:
    """The form of `/v1/chat/completions`."""

    def logprobs(facts: list[TokenFacts]) -> dict[str, Any] | None:
        if not facts:
            return None

        def entry(token: int, value: float) -> dict[str, Any]:
            text = served.tokenizer.decode([token])
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            "content": [
                {
                    **entry(each.token, each.logprobs.token),
                    "top_logprobs": [entry(token, value) for token, value in each.logprobs.top],
                }
                for each in facts
            ],
            "refusal": None,
        }

    def whole(index: int, pieces: list[Piece]) -> dict[str, Any]:
        text, facts, reason = _joined(pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs(facts), "finish_reason": reason}

    def part(piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": logprobs(list(piece.facts)),
            "finish_reason": piece.reason,
        }

    opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return Form(
        f"chatcmpl-{uuid.uuid4().hex}", "chat.completion", "chat.completion.chunk", whole, part, opening
    )


def _joined(pieces: list[Piece]) -> tuple[str, list[TokenFacts], str | None]:
    """All pieces of one answer as one."""
    facts = [fact for piece in pieces for fact in piece.facts]
    reason = next((piece.reason for piece in pieces if piece.reason is not None), None)
    return "".join(piece.text for piece in pieces), facts, reason
