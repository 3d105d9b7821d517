"""What goes over the wire: the requests that are taken, checked, and the form of what is answered.

The names are OpenAI's. A parameter that is not served is refused by name and never ignored; those whose only value is
without effect are taken.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Count = Annotated[int, Field(ge=1, le=1 << 31)]
TokenId = Annotated[int, Field(ge=0, le=1 << 31)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """What a stream tells at its end."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class PlainFormat(BaseModel):
    """An answer of any kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class ObjectFormat(BaseModel):
    """An answer that is a JSON object."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["json_object"]


class JsonSchema(BaseModel):
    """A schema under a name. Answers keep to it whatever `strict` says."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(BaseModel):
    """An answer in JSON that a schema allows."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["json_schema"]
    json_schema: JsonSchema


class GrammarFormat(BaseModel):
    """An answer that a grammar, or a regular expression, describes."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: Annotated[str, Field(min_length=1, max_length=1 << 20)]


Format = Annotated[PlainFormat | ObjectFormat | SchemaFormat | GrammarFormat, Field(discriminator="type")]


class Asked(BaseModel):
    """What requests of both kinds may say."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=1024)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    response_format: Format | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    user: Annotated[str, Field(max_length=1024)] | None = None
    # Those that say what is done anyway.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        """Whether a stream tells at its end how many tokens it took."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Asked):
    """A text to continue, or several."""

    prompt: (
        Annotated[str, Field(max_length=1 << 24)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: None = None
    suffix: None = None


class Message(BaseModel):
    """A message; what else it holds is the template's to understand."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """As templates take it: the text parts of a message as one text."""
        given = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            strange = next((part.get("type") for part in self.content if part.get("type") != "text"), None)
            if strange is not None:
                raise ValueError(f"messages may hold text alone; got a part of type {strange!r}")
            given["content"] = "".join(str(part.get("text", "")) for part in self.content)
        return given


Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(BaseModel):
    """A function that a model may ask for."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    description: Annotated[str, Field(max_length=1 << 20)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool, which is a function."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    """A function by its name."""

    model_config = ConfigDict(extra="forbid")
    name: Name


class NamedTool(BaseModel):
    """The tool that must be called."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["auto", "none", "required"] | NamedTool


class ChatRequest(Asked):
    """A dialogue to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """How many tokens a request took."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """What is answered to a request that is not served."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def head(identity: str, kind: str, model: str) -> dict[str, Any]:
    """What every answer begins with."""
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}
