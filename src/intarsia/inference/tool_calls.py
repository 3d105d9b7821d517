"""Calls of tools in the text of an answer, in the forms that released models write them in.

| form | written as | by |
| --- | --- | --- |
| `kimi` | a section of special tokens; `functions.NAME:N`, then the arguments as JSON | Kimi K2, Kimi Linear |
| `hermes` | `<tool_call>` around `{"name": NAME, "arguments": {...}}` | Qwen 2.5, Qwen 3, Qwen3-Next, Ling |
| `xml` | `<tool_call>` around `<function=NAME>` with a `<parameter=KEY>` for each argument | Qwen3-Coder, Qwen 3.5 |
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

CallForm = Literal["kimi", "hermes", "xml"]
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
KIMI, KIMI_ARGUMENTS, KIMI_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
_HERMES = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_PARAMETER_END = "</parameter>"


def form_of(template: str) -> CallForm | None:
    """The form in which a model writes calls, by the text of its chat template; None: it knows of none."""
    if KIMI in template:
        return "kimi"
    if CALL not in template:
        return None
    return "xml" if "<function=" in template else "hermes"


@dataclass(frozen=True)
class CallPart:
    """A part of a call: of call number `number` of the answer its identity and name, which come first, and a piece of
    its arguments, which together are JSON if the model has written such. `ends` with the last of them."""

    number: int
    identity: str | None = None
    name: str | None = None
    arguments: str = ""
    ends: bool = False


@dataclass(frozen=True)
class Spoken:
    """What a piece of text turned out to be."""

    text: str
    calls: tuple[CallPart, ...] = ()


class CallReader:
    """Takes the calls out of an answer as it comes. What is no whole beginning of a call stays text.

    Args:
        schemas: of the tools by name: what `xml` writes without quotes is a text where the schema says so.

    Attributes:
        calls: how many have begun.
    """

    def __init__(self, form: CallForm, schemas: Mapping[str, Any] | None = None) -> None:
        self._form, self._schemas = form, schemas or {}
        self._markers = (SECTION, SECTION_END, KIMI) if form == "kimi" else (CALL,)
        self._held = ""
        self._inside: _Call | None = None
        self.calls = 0

    def push(self, text: str) -> Spoken:
        """Take a piece of the answer."""
        self._held += text
        said: list[str] = []
        parts: list[CallPart] = []
        while self._step(said, parts):
            pass
        return Spoken("".join(said), tuple(parts))

    def finish(self) -> Spoken:
        """What is still held back, at the end of the answer."""
        held, inside, self._held, self._inside = self._held, self._inside, "", None
        if inside is None:
            return Spoken("" if self.calls and not held.strip() else held)
        if inside.number is None:
            return Spoken(inside.opening + held)
        # A call that was cut off: what came of its arguments has been told, and its client sees that they have no end.
        rest = {"kimi": held, "hermes": held[: inside.scanned], "xml": ""}[inside.form]
        return Spoken("", (CallPart(inside.number, arguments=rest, ends=True),))

    def _step(self, said: list[str], parts: list[CallPart]) -> bool:
        """Go on by one marker, or one part of a call; whether there may be more in what is held."""
        if self._inside is not None:
            return self._read_call(self._inside, said, parts)
        found = [(at, marker) for marker in self._markers if (at := self._held.find(marker)) >= 0]
        if not found:
            keep = _held_back(self._held, self._markers)
            said.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
            return False
        at, marker = min(found)
        # The spaces before a call, and between two, are the template's.
        said.append(self._held[:at].rstrip())
        self._held = self._held[at + len(marker) :]
        if marker in (KIMI, CALL):
            self._inside = _Call(self._form, marker)
        return True

    def _read_call(self, call: _Call, said: list[str], parts: list[CallPart]) -> bool:
        read = {"kimi": self._kimi, "hermes": self._hermes, "xml": self._xml}[call.form]
        return read(call, said, parts)

    def _begin(self, call: _Call, identity: str | None, name: str, parts: list[CallPart]) -> None:
        call.number, call.name, self.calls = self.calls, name, self.calls + 1
        parts.append(CallPart(call.number, identity or f"call_{uuid.uuid4().hex}", name))

    def _end(self, call: _Call, arguments: str, parts: list[CallPart]) -> bool:
        assert call.number is not None
        parts.append(CallPart(call.number, arguments=arguments, ends=True))
        self._inside = None
        return True

    def _no_call(self, call: _Call, end: int, said: list[str]) -> bool:
        """What began as a call is none: it stays text."""
        said.append(call.opening + self._held[:end])
        self._held, self._inside = self._held[end:], None
        return True

    def _kimi(self, call: _Call, said: list[str], parts: list[CallPart]) -> bool:
        if call.number is None:
            head, marker, rest = self._held.partition(KIMI_ARGUMENTS)
            if not marker:
                at = self._held.find(KIMI_END)
                return at >= 0 and self._no_call(call, at + len(KIMI_END), said)
            identity = head.strip()
            # The model's own identity, which its template writes again before the result.
            self._begin(
                call, identity, identity.removeprefix("functions.").rpartition(":")[0] or identity, parts
            )
            self._held = rest
        at = self._held.find(KIMI_END)
        if at >= 0:
            arguments, self._held = self._held[:at], self._held[at + len(KIMI_END) :]
            return self._end(call, arguments, parts)
        return self._give(call, _held_back(self._held, (KIMI_END,)), parts)

    def _hermes(self, call: _Call, said: list[str], parts: list[CallPart]) -> bool:
        if call.number is None:
            found = _HERMES.match(self._held)
            if found is None:
                return self._whole(call, said, parts)
            self._begin(call, None, json.loads(found[1]), parts)
            self._held = self._held[found.end() :]
        if not call.arguments_end(self._held):
            return self._give(call, 0, parts)
        at = self._held.find(CALL_END, call.scanned)
        if at < 0:
            return False
        arguments, self._held = self._held[: call.scanned], self._held[at + len(CALL_END) :]
        return self._end(call, arguments, parts)

    def _whole(self, call: _Call, said: list[str], parts: list[CallPart]) -> bool:
        """A call in JSON whose names come in another order, or none."""
        at = self._held.find(CALL_END)
        if at < 0:
            return False
        try:
            found = json.loads(self._held[:at])
            name, arguments = found["name"], found.get("arguments", found.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError):
            return self._no_call(call, at + len(CALL_END), said)
        self._begin(call, None, str(name), parts)
        self._held = self._held[at + len(CALL_END) :]
        return self._end(call, arguments if isinstance(arguments, str) else json.dumps(arguments), parts)

    def _xml(self, call: _Call, said: list[str], parts: list[CallPart]) -> bool:
        if call.number is None:
            found = _FUNCTION.match(self._held)
            if found is None:
                at = self._held.find(CALL_END)
                return at >= 0 and self._no_call(call, at + len(CALL_END), said)
            self._begin(call, None, found[1].strip(), parts)
            self._held = self._held[found.end() :]
        parameter = _PARAMETER.match(self._held)
        if parameter is not None and (at := self._held.find(_PARAMETER_END, parameter.end())) >= 0:
            key, value = parameter[1].strip(), self._held[parameter.end() : at].removesuffix("\n")
            written = f"{json.dumps(key)}: {self._value(call, key, value)}"
            assert call.number is not None
            parts.append(CallPart(call.number, arguments=("{" if not call.parameters else ", ") + written))
            call.parameters += 1
            self._held = self._held[at + len(_PARAMETER_END) :]
            return True
        at = self._held.find(CALL_END) if parameter is None else -1
        if at < 0:
            return False
        self._held = self._held[at + len(CALL_END) :]
        return self._end(call, "}" if call.parameters else "{}", parts)

    def _value(self, call: _Call, key: str, value: str) -> str:
        """A parameter as JSON: as it stands where it is that and the schema does not want a text."""
        schema = self._schemas.get(call.name, {}).get("properties", {}).get(key, {})
        if isinstance(schema, Mapping) and schema.get("type") == "string":
            return json.dumps(value, ensure_ascii=False)
        try:
            json.loads(value)
        except ValueError:
            return json.dumps(value, ensure_ascii=False)
        return value.strip()

    def _give(self, call: _Call, keep: int, parts: list[CallPart]) -> bool:
        """Tell what has come of the arguments, but for the last `keep` characters."""
        assert call.number is not None
        given = self._held[: len(self._held) - keep]
        if given:
            parts.append(CallPart(call.number, arguments=given))
        self._held = self._held[len(given) :]
        call.scanned = 0
        return False


class _Call:
    """A call that is being read."""

    def __init__(self, form: CallForm, opening: str) -> None:
        self.form, self.opening = form, opening
        self.number: int | None = None
        self.name = ""
        self.parameters = 0
        self.scanned = self._depth = 0
        self._quoted = self._escaped = self._done = False

    def arguments_end(self, held: str) -> bool:
        """Whether a JSON object ends in what is held, all but `scanned` characters of which have been looked at. Then
        `scanned` is where."""
        while not self._done and self.scanned < len(held):
            sign = held[self.scanned]
            self.scanned += 1
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = sign == "\\", sign != '"'
            elif sign == '"':
                self._quoted = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                self._done = self._depth == 0
        return self._done


def _held_back(text: str, markers: tuple[str, ...]) -> int:
    """How many of the last characters may be the beginning of a marker, with the spaces before it."""
    keep = max(
        (n for marker in markers for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0
    )
    before = text[: len(text) - keep]
    return keep + len(before) - len(before.rstrip())
