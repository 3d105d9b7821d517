"""`/v1/responses`: text in, text and calls of tools out. Nothing is stored, so each request brings the whole dialogue.

A request is made into one of `/v1/chat/completions`; what comes of it is told as items: a message, or calls.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from intarsia.errors import ConfigError
from intarsia.inference.requests import Reason
from intarsia.inference.server.answering import Piece, TokenFacts
from intarsia.inference.server.forms import Body, Counts, chat_logprobs, event, joined, whole_calls
from intarsia.inference.server.served import Served
from intarsia.inference.server.wire import (
    ChatRequest,
    Count,
    Format,
    Function,
    FunctionName,
    GrammarFormat,
    JsonSchema,
    Message,
    NamedTool,
    ObjectFormat,
    PlainFormat,
    SchemaFormat,
    StreamOptions,
    Tool,
    ToolChoice,
)
from intarsia.inference.tool_calls import CallPart


class TextSchema(JsonSchema):
    """An answer in JSON that a schema allows."""

    type: Literal["json_schema"]


class TextOptions(BaseModel):
    """What the text of an answer must look like."""

    model_config = ConfigDict(extra="forbid")
    format: (
        Annotated[PlainFormat | ObjectFormat | TextSchema | GrammarFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: None = None


class FunctionTool(Function):
    """A function that a model may ask for."""

    type: Literal["function"]


class NamedFunction(FunctionName):
    """The function that must be called."""

    type: Literal["function"]


class ResponseRequest(BaseModel):
    """A dialogue to answer."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=1024)]
    input: (
        Annotated[str, Field(max_length=1 << 24)]
        | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    )
    instructions: Annotated[str, Field(max_length=1 << 24)] | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    # Those that say what is done anyway. Nothing is stored, whatever `store` says, so nothing can be gone on from.
    store: bool | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    truncation: Literal["disabled"] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def chat_tools(self) -> list[Tool] | None:
        """The tools as chats have them."""
        if self.tools is None:
            return None
        return [
            Tool(type="function", function=Function(**tool.model_dump(exclude={"type"})))
            for tool in self.tools
        ]

    @property
    def chat_choice(self) -> ToolChoice | None:
        """Which of them is to be called, as chats say it."""
        choice = self.tool_choice
        if isinstance(choice, NamedFunction):
            return NamedTool(type="function", function=FunctionName(name=choice.name))
        return choice

    @property
    def with_logprobs(self) -> bool:
        """Whether tokens are told with their log-probabilities."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or [])

    def as_chat(self) -> ChatRequest:
        """The same as a request to `/v1/chat/completions`, but for its tools.

        Raises:
            ConfigError: an item of the dialogue that is none of a chat.
        """
        begin = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        return ChatRequest(
            model=self.model, messages=[*begin, *_messages(items)], max_tokens=self.max_output_tokens,
            temperature=self.temperature, top_p=self.top_p, min_p=self.min_p, seed=self.seed,
            priority=self.priority, response_format=self._format(), logprobs=self.with_logprobs,
            top_logprobs=self.top_logprobs,
        )  # fmt: skip

    def _format(self) -> Format | None:
        given = None if self.text is None else self.text.format
        if not isinstance(given, TextSchema):
            return given
        schema = JsonSchema.model_validate(given.model_dump(by_alias=True, exclude={"type"}))
        return SchemaFormat(type="json_schema", json_schema=schema)


def _messages(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The items of a dialogue as messages: calls that follow one another are of one message."""
    messages: list[Message] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call":
            call = {
                "id": _text(item, "call_id"), "type": "function",
                "function": {"name": _text(item, "name"), "arguments": _text(item, "arguments")},
            }  # fmt: skip
            last = messages[-1] if messages and messages[-1].role == "assistant" else None
            if last is None:
                last = Message(role="assistant", content="")
                messages.append(last)
            assert last.model_extra is not None
            last.model_extra.setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append(_message("tool", item.get("output"), tool_call_id=_text(item, "call_id")))
        elif kind == "message":
            role = _text(item, "role")
            messages.append(_message("system" if role == "developer" else role, item.get("content")))
        elif kind != "reasoning":  # which no template is given
            raise ConfigError(
                f"the input holds an item of type {kind!r}; messages, function_call and function_call_output are served"
            )
    if not messages:
        raise ConfigError("the input holds no message")
    return messages


def _message(role: str, content: Any, **more: str) -> Message:
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        strange = [p.get("type") for p in parts if p.get("type") not in ("input_text", "output_text", "text")]
        if strange or not all(isinstance(part.get("text"), str) for part in parts):
            raise ConfigError(f"messages may hold text alone; got a part of type {(*strange, None)[0]!r}")
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise ConfigError(f"the content of a message must be text, got {type(content).__name__}")
    return Message(role=role, content=content, **more)


def _text(item: Mapping[str, Any], name: str) -> str:
    found = item.get(name)
    if not isinstance(found, str):
        raise ConfigError(f"an item of the input has no {name}, which must be a text")
    return found


class ResponseForm:
    """The form of the answer to one request to `/v1/responses`. See `Form`."""

    def __init__(self, served: Served, asked: ResponseRequest) -> None:
        self._served, self._asked = served, asked
        self._identity, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._sent = 0
        self._items: list[_Item] = []
        self._reason: Reason | None = None

    def whole(self, pieces: Mapping[int, Sequence[Piece]], counts: Counts) -> Body:
        text, facts, reason = joined(pieces[0])
        items: list[_Item] = []
        calls = whole_calls(pieces[0])
        if text or not calls:
            items.append(_Message(text, facts))
        items += [_Call(call.identity, call.name, call.arguments) for call in calls]
        return self._body(_status(reason), items, counts)

    def opening(self) -> Iterator[str]:
        yield self._event("response.created", response=self._body("in_progress", []))
        yield self._event("response.in_progress", response=self._body("in_progress", []))

    def part(self, piece: Piece) -> Iterator[str]:
        self._reason = piece.reason or self._reason
        if piece.text or (piece.reason is not None and not self._items and not piece.calls):
            if not self._items or not isinstance(self._items[-1], _Message):
                yield from self._end_last()
                yield from self._begin(_Message("", []))
            message = self._items[-1]
            assert isinstance(message, _Message)
            message.text += piece.text
            message.facts += piece.facts
            if piece.text:
                yield self._event(
                    "response.output_text.delta", **self._place(message, True), delta=piece.text,
                    logprobs=self._logprobs(piece.facts),
                )  # fmt: skip
        for call in piece.calls:
            yield from self._call(call)

    def closing(self, counts: Counts) -> Iterator[str]:
        yield from self._end_last()
        status = _status(self._reason)
        yield self._event(f"response.{status}", response=self._body(status, self._items, counts))

    def failed(self, message: str) -> Iterator[str]:
        body = {**self._body("failed", self._items), "error": {"code": "server_error", "message": message}}
        yield self._event("response.failed", response=body)

    def _call(self, call: CallPart) -> Iterator[str]:
        if call.name is not None:
            yield from self._end_last()
            yield from self._begin(_Call(call.identity or "", call.name, ""))
        item = self._items[-1]
        assert isinstance(item, _Call)
        item.arguments += call.arguments
        if call.arguments:
            yield self._event(
                "response.function_call_arguments.delta", **self._place(item, False), delta=call.arguments
            )

    def _begin(self, item: _Item) -> Iterator[str]:
        self._items.append(item)
        where = self._place(item, isinstance(item, _Message))
        yield self._event(
            "response.output_item.added",
            output_index=where["output_index"],
            item=item.body("in_progress", []),
        )
        if isinstance(item, _Message):
            yield self._event("response.content_part.added", **where, part=item.part([]))

    def _end_last(self) -> Iterator[str]:
        item = self._items[-1] if self._items else None
        if item is None or item.ended:
            return
        item.ended = True
        where = self._place(item, isinstance(item, _Message))
        if isinstance(item, _Message):
            logprobs = self._logprobs(item.facts)
            yield self._event("response.output_text.done", **where, text=item.text, logprobs=logprobs)
            yield self._event("response.content_part.done", **where, part=item.part(logprobs))
        else:
            yield self._event(
                "response.function_call_arguments.done", **where, name=item.name, arguments=item.arguments
            )
        body = self._item(item, _status(self._reason))
        yield self._event("response.output_item.done", output_index=where["output_index"], item=body)

    def _place(self, item: _Item, in_message: bool) -> Body:
        place = {"item_id": item.identity, "output_index": self._items.index(item)}
        return {**place, "content_index": 0} if in_message else place

    def _logprobs(self, facts: Sequence[TokenFacts]) -> list[Body]:
        told = chat_logprobs(self._served, facts)
        return [] if told is None else told["content"]

    def _item(self, item: _Item, status: str) -> Body:
        return item.body(status, self._logprobs(item.facts) if isinstance(item, _Message) else [])

    def _event(self, kind: str, **body: Any) -> str:
        number, self._sent = self._sent, self._sent + 1
        return event({"type": kind, "sequence_number": number, **body}, kind)

    def _body(self, status: str, items: Sequence[_Item], counts: Counts | None = None) -> Body:
        asked = self._asked
        told = asked.model_dump(by_alias=True, exclude_none=True, include={"tools", "tool_choice", "text"})
        return {
            "id": self._identity,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._served.name,
            "output": [
                self._item(item, "completed" if status == "completed" else "incomplete") for item in items
            ],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": asked.top_p,
            "top_logprobs": asked.top_logprobs or 0,
            "truncation": "disabled",
            "usage": None if counts is None else _usage(counts),
            **told,
        }


class _Message:
    """A text that is said."""

    def __init__(self, text: str, facts: list[TokenFacts]) -> None:
        self.identity, self.text, self.facts, self.ended = f"msg_{uuid.uuid4().hex}", text, facts, False

    def part(self, logprobs: list[Body]) -> Body:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprobs}

    def body(self, status: str, logprobs: list[Body]) -> Body:
        content = [] if status == "in_progress" else [self.part(logprobs)]
        return {
            "id": self.identity, "type": "message", "status": status, "role": "assistant", "content": content,
        }  # fmt: skip


class _Call:
    """A tool that is called."""

    def __init__(self, call: str, name: str, arguments: str) -> None:
        self.identity, self.call, self.name, self.arguments = f"fc_{uuid.uuid4().hex}", call, name, arguments
        self.ended = False

    def body(self, status: str, logprobs: list[Body]) -> Body:
        return {
            "id": self.identity, "type": "function_call", "status": status, "call_id": self.call, "name": self.name,
            "arguments": self.arguments,
        }  # fmt: skip


_Item = _Message | _Call


def _status(reason: str | None) -> str:
    return "incomplete" if reason == "length" else "completed"


def _usage(counts: Counts) -> Body:
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts.prompt + counts.written,
    }
