"""Tools in a request: whether the model's template takes them, how calls are read, and what an answer must obey."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.errors import ConfigError
from intarsia.inference.grammar import Structure
from intarsia.inference.server.served import Served
from intarsia.inference.server.wire import NamedTool, Tool, ToolChoice
from intarsia.inference.tool_calls import (
    CALL,
    CALL_END,
    KIMI,
    KIMI_ARGUMENTS,
    KIMI_END,
    SECTION,
    SECTION_END,
    CallForm,
    CallReader,
    form_of,
)

_TAKES_TOOLS = re.compile(r"\btools\b")
_TAKES_TEXT = re.compile(r"arguments\W{0,4}\s+is\s+string")
ANY = {"type": "object"}


@dataclass(frozen=True)
class ToolUse:
    """How an answer may call tools.

    Attributes:
        form: in which the model writes calls.
        tools: what the template is given.
        structure: what the answer must look like; None: anything.
        single: it ends with its first call.
    """

    form: CallForm
    tools: tuple[dict[str, Any], ...]
    structure: Structure | None
    single: bool

    def reader(self) -> CallReader:
        """Takes the calls out of one answer."""
        functions = [tool["function"] for tool in self.tools]
        return CallReader(self.form, {each["name"]: each.get("parameters") or {} for each in functions})


def tool_use(
    served: Served, tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None
) -> ToolUse | None:
    """What a request says of tools; None: nothing, or that none is to be called.

    Raises:
        ConfigError: the model's template takes no tools, or has calls of a form that is not read; a choice that there
            is not.
    """
    if not tools or choice == "none":
        if isinstance(choice, NamedTool) or choice == "required":
            raise ConfigError("tool_choice says that a tool must be called, and there is none in `tools`")
        return None
    if served.template is None or not _TAKES_TOOLS.search(served.template.source):
        raise ConfigError(f"{served.name} has no chat template that takes tools: leave `tools` out")
    form = form_of(served.template.source)
    if form is None:
        raise ConfigError(
            f'{served.name} calls tools in a form that is not read here: say tool_choice "none", or leave `tools` out'
        )
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ConfigError("two of the tools have one name")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise ConfigError(f"tool_choice names {choice.function.name!r}; the tools are {', '.join(names)}")
        callable_now = [tool for tool in tools if tool.function.name == choice.function.name]
    else:
        callable_now = list(tools)
    for tool in tools:
        _check_parameters(tool)
    must = choice is not None and choice != "auto"
    single = parallel is False or isinstance(choice, NamedTool)
    structure = None
    if must or any(tool.function.strict for tool in callable_now):
        structure = Structure("lark", _Grammar(served, form).of(callable_now, must, single))
    given = tuple(tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools)
    return ToolUse(form, given, structure, single)


def _check_parameters(tool: Tool) -> None:
    given = tool.function.parameters or {}
    properties, needed = given.get("properties") or {}, given.get("required") or []
    is_object = given.get("type", "object") == "object" and isinstance(properties, Mapping)
    if not is_object or not isinstance(needed, list):
        raise ConfigError(f"the parameters of {tool.function.name!r} must be a JSON schema of an object")


def said_calls(served: Served, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the model's template takes them: the arguments of calls are texts where it can have them so, which
    stay as the model wrote them, and else objects.

    Raises:
        ConfigError: arguments that are not a JSON object.
    """
    as_text = served.template is not None and _TAKES_TEXT.search(served.template.source) is not None
    return [_said(message, as_text) for message in messages]


def _said(message: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConfigError("a message's tool_calls must have a function with a name and arguments")
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, str) and not as_text:
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise ConfigError(f"the arguments of {function['name']!r} are not JSON: {error}") from None
        if not isinstance(arguments, str | dict):
            raise ConfigError(f"the arguments of {function['name']!r} must be a JSON object")
        made.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": made}


class _Grammar:
    """Writes the grammar of calls, in llguidance's variant of Lark's language."""

    def __init__(self, served: Served, form: CallForm) -> None:
        self._tokenizer, self._form = served.tokenizer, form
        self._rules: list[str] = []

    def of(self, tools: Sequence[Tool], must: bool, single: bool) -> str:
        """
        Args:
            must: the answer is calls, and nothing else; else there may be text, and none.
            single: one call.
        """
        for n, tool in enumerate(tools):
            self._call(n, tool)
        rules = [*self._rules, "call: " + " | ".join(f"call_{n}" for n in range(len(tools)))]
        more = "" if single else ' ("\\n" call)*' if self._form != "kimi" else " call*"
        first, last = (SECTION, SECTION_END) if self._form == "kimi" else (CALL, "")
        # A call begins with the marker that also ends the text before it.
        opening, rest = self._sign(first), f"first{more} {self._sign(last)}"
        firsts = " | ".join(f"begun_{n}" for n in range(len(tools)))
        if self._form == "kimi":
            rules.append("first: call")
        else:
            rules.append(f"first: {firsts}")
        if must:
            start = f"start: {opening} {rest}"
        else:
            start = f"start: TEXT | lead {rest}\nTEXT: /(.|\\n)*/\n" + (
                f"lead: TEXT {opening}" if opening.startswith("<") else f"lead[lazy]: TEXT {opening}"
            )
        return "\n".join(["%llguidance {}", start, *rules])

    def _sign(self, marker: str) -> str:
        """A marker: as a special token where it is one."""
        if not marker:
            return ""
        tokens = self._tokenizer.encode_chat(marker)
        if len(tokens) == 1 and tokens[0] in self._tokenizer.special_tokens:
            return marker
        return json.dumps(marker)

    def _call(self, n: int, tool: Tool) -> None:
        """The rules of one tool: `call_N`, and `begun_N` without its first marker."""
        function = tool.function
        schema = json.dumps(
            function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        )
        if self._form == "kimi":
            self._rules.append(
                f"call_{n}: {self._sign(KIMI)} {json.dumps(f'functions.{function.name}:')} /[0-9]{1, 3}/ "
                f"{self._sign(KIMI_ARGUMENTS)} %json {schema} {self._sign(KIMI_END)}"
            )
            return
        if self._form == "hermes":
            head = f'\n{{"name": {json.dumps(function.name)}, "arguments": '
            body = f"{json.dumps(head)} %json {schema} {json.dumps('}' + chr(10))} {self._sign(CALL_END)}"
        else:
            parameters = " ".join(self._parameter(n, k, *each) for k, each in enumerate(_properties(tool)))
            body = (
                f"{json.dumps(f'{chr(10)}<function={function.name}>{chr(10)}')} {parameters} "
                f"{json.dumps(f'</function>{chr(10)}')} {self._sign(CALL_END)}"
            )
        self._rules += [f"begun_{n}: {body}", f"call_{n}: {self._sign(CALL)} begun_{n}"]

    def _parameter(self, n: int, k: int, key: str, schema: Any, needed: bool) -> str:
        name, end = f"p_{n}_{k}", "\n</parameter>\n"
        begin = json.dumps(f"<parameter={key}>\n")
        if isinstance(schema, Mapping) and schema.get("type") == "string" and "enum" not in schema:
            self._rules += [f"{name}: {begin} v_{n}_{k}", f"v_{n}_{k}[suffix={json.dumps(end)}]: /(.|\\n)*/"]
        elif isinstance(schema, Mapping) and all(isinstance(one, str) for one in schema.get("enum") or [0]):
            values = " | ".join(json.dumps(one) for one in schema["enum"])
            self._rules.append(f"{name}: {begin} ({values}) {json.dumps(end)}")
        else:
            self._rules.append(f"{name}: {begin} %json {json.dumps(schema)} {json.dumps(end)}")
        return name if needed else f"{name}?"


def _properties(tool: Tool) -> list[tuple[str, Any, bool]]:
    """Each parameter's name and schema, and whether a call must have it."""
    parameters = tool.function.parameters or {}
    properties, needed = parameters.get("properties") or {}, parameters.get("required") or []
    return [(key, schema, key in needed) for key, schema in properties.items()]
