"""What requests for completions mean: what the engine is asked for."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from intarsia.errors import ConfigError
from intarsia.inference.grammar import ANY_OBJECT, Structure
from intarsia.inference.requests import Constraint, Request
from intarsia.inference.server.served import Served
from intarsia.inference.server.tools import ToolUse, said_calls
from intarsia.inference.server.wire import (
    Asked,
    ChatRequest,
    CompletionRequest,
    Format,
    GrammarFormat,
    ObjectFormat,
    SchemaFormat,
)

Constrain = Callable[[], Constraint]


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
    most, constraint = asked.max_tokens or 16, constraint_of(served, asked.response_format)
    return [_request(served, asked, each, most, asked.logprobs, constraint) for each in tokens]


def chat_requests(served: Served, asked: ChatRequest, tools: ToolUse | None) -> list[Request]:
    """The same of a dialogue.

    Raises:
        ConfigError: it cannot be served.
        DataError: the model's template refuses it.
    """
    options = dict(asked.chat_template_kwargs or {})
    constraint = constraint_of(served, asked.response_format)
    if tools is not None:
        options["tools"] = list(tools.tools)
        constraint = _of_tools(served, tools, constraint)
    try:
        messages = said_calls(served, [message.plain() for message in asked.messages])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tokens = served.tokens_of_messages(messages, options)
    most = asked.max_completion_tokens or asked.max_tokens or served.limits.most_tokens
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    return [_request(served, asked, tokens, most, logprobs, constraint)]


def _of_tools(served: Served, tools: ToolUse, other: Constrain | None) -> Constrain | None:
    if other is not None:
        raise ConfigError(
            "response_format says what the whole answer is, so that no tool can be called: leave out one of the two"
        )
    return None if tools.structure is None else served.grammars.constraint(tools.structure)


def _request(
    served: Served,
    asked: Asked,
    tokens: list[int],
    most: int,
    logprobs: int | None,
    constraint: Constrain | None,
) -> Request:
    count = asked.n or 1
    if count > served.limits.answers:
        raise ConfigError(f"n is {count}, and this server gives {served.limits.answers} answers at most")
    return Request(
        tuple(tokens),
        max_tokens=most,
        sampling=served.sampling(asked.temperature, asked.top_p, asked.min_p),
        # A request without one is not repeated exactly: of two, each has its own.
        seed=uuid.uuid4().int % (1 << 62) if asked.seed is None else asked.seed,
        stop=served.conduct.stop if constraint is None else served.ends,
        count=count,
        logprobs=logprobs,
        priority=asked.priority,
        constraint=constraint,
    )


def constraint_of(served: Served, given: Format | None) -> Constrain | None:
    """What answers must obey; None: nothing.

    Raises:
        ConfigError: a schema or a grammar that is wrong.
    """
    if isinstance(given, SchemaFormat):
        structure = Structure.of_schema(given.json_schema.schema_)
    elif isinstance(given, GrammarFormat):
        structure = Structure(given.syntax, given.definition)
    elif isinstance(given, ObjectFormat):
        structure = ANY_OBJECT
    else:
        return None
    return served.grammars.constraint(structure)
