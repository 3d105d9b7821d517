"""Calls of tools are read out of an answer, wherever its pieces end."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.inference.tool_calls import CallForm, CallPart, CallReader, form_of

SCHEMAS = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {"type": "object"}},
    }
}
CITY = 'Zürich "old" </tool '


def kimi(name: str, arguments: str, number: int = 0) -> str:
    return f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def section(*calls: str) -> str:
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(name: str, **parameters: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def read(form: CallForm, pieces: list[str]) -> tuple[str, list[tuple[str, str]], list[CallPart]]:
    """The text that is said, and each call's name and arguments."""
    reader = CallReader(form, SCHEMAS)
    spoken = [*map(reader.push, pieces), reader.finish()]
    parts = [part for each in spoken for part in each.calls]
    named = [part for part in parts if part.name is not None]
    calls = [
        (str(part.name), "".join(p.arguments for p in parts if p.number == part.number)) for part in named
    ]
    assert [part.number for part in named] == list(range(reader.calls))
    return "".join(each.text for each in spoken), calls, parts


ARGUMENTS = json.dumps({"city": CITY, "days": 3, "more": {"a": ["}", "{"]}}, ensure_ascii=False)
CASES: list[tuple[CallForm, str, str, list[tuple[str, Any]]]] = [
    ("kimi", "Let me see." + section(kimi("get_weather", ARGUMENTS)), "Let me see.", [("get_weather", 0)]),
    ("kimi", section(kimi("get_weather", ARGUMENTS), kimi("now", "{}", 1)), "", [("get_weather", 0), ("now", {})]),
    ("hermes", "I look.\n\n" + hermes("get_weather", ARGUMENTS), "I look.", [("get_weather", 0)]),
    (
        "hermes",
        f"{hermes('get_weather', ARGUMENTS)}\n{hermes('now', '{}')}",
        "",
        [("get_weather", 0), ("now", {})],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', "", [("now", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    (
        "xml",
        "So:\n" + xml("get_weather", city=CITY, days="3", more='{"a": ["}", "{"]}'),
        "So:",
        [("get_weather", 0)],
    ),
    ("xml", f"{xml('now')}\n{xml('get_weather', city='12')}", "", [("now", {}), ("get_weather", {"city": "12"})]),
    ("xml", xml("other", days="3", text="a\nb"), "", [("other", {"days": 3, "text": "a\nb"})]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES)
def test_calls_are_read_in_any_pieces(form: CallForm, text: str, said: str, calls: list[Any]) -> None:
    expected = [(name, json.loads(ARGUMENTS) if found == 0 else found) for name, found in calls]
    chance = random.Random(0)
    splits = [list(text), [text]]
    for _ in range(20):
        ends = sorted(chance.sample(range(len(text)), 5))
        splits.append([text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)])
    for pieces in splits:
        found_text, found, parts = read(form, pieces)
        assert found_text == said
        assert [(name, json.loads(arguments)) for name, arguments in found] == expected
        assert [part.number for part in parts if part.ends] == list(range(len(expected)))


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader("hermes")
    text = hermes("get_weather", '{"city": "Rome"}')
    at = text.index('{"city') + 8
    first = reader.push(text[:at])
    assert [(part.name, part.arguments) for part in first.calls] == [("get_weather", ""), (None, '{"city":')]
    rest = reader.push(text[at:])
    assert rest.calls[-1].ends


def test_the_identity_of_kimi_is_kept_and_others_get_one() -> None:
    _, _, parts = read("kimi", [section(kimi("get_weather", "{}", 7))])
    assert parts[0].identity == "functions.get_weather:7"
    _, _, parts = read("hermes", [hermes("a", "{}"), hermes("a", "{}")])
    identities = [part.identity for part in parts if part.identity is not None]
    assert len(set(identities)) == 2


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("kimi", "<|tool_call_begin|>no arguments<|tool_call_end|> then"),
        ("hermes", "<tool_call>not JSON</tool_call> then"),
        ("hermes", "<tool_call>[1]</tool_call>"),
        ("hermes", "a <tool_call>{"),
        ("xml", "<tool_call>\n{}\n</tool_call>."),
        ("xml", "<tool_call>\n<function="),
        ("hermes", "a < b <tool_cal"),
        ("hermes", "  spaces  \n"),
    ],
)
def test_what_is_no_call_stays_text(form: CallForm, text: str) -> None:
    for pieces in ([text], list(text)):
        said, calls, _ = read(form, pieces)
        assert calls == []
        assert "".join(said.split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("form", "text", "arguments"),
    [
        ("kimi", section(kimi("now", '{"a": 12}')).partition("2}")[0], '{"a": 1'),
        ("hermes", hermes("now", '{"a": 12}').partition("2}")[0], '{"a": 1'),
        ("hermes", hermes("now", '{"a": 12}').partition("}}")[0] + "}", '{"a": 12}'),
        ("xml", xml("now", a="1", b="2").partition("\n</parameter>\n</")[0], '{"a": 1'),
    ],
)
def test_a_call_that_is_cut_off_is_told_as_far_as_it_came(form: CallForm, text: str, arguments: str) -> None:
    said, calls, parts = read(form, list(text))
    assert (said, [name for name, _ in calls]) == ("", ["now"])
    assert calls[0][1].startswith(arguments)
    assert parts[-1].ends


@given(
    st.text(alphabet='<tool_cal/>|{}"\\ \n:functio=param,nesgbd', max_size=120),
    st.sampled_from(["kimi", "hermes", "xml"]),
)
def test_any_text_is_read_the_same_in_any_pieces(text: str, form: CallForm) -> None:
    whole, one_by_one = read(form, [text]), read(form, list(text))
    assert whole[:2] == one_by_one[:2]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ tools }}<|tool_call_begin|>{{ id }}", "kimi"),
        ("<tools>{{ tools }}</tools><tool_call>\n{{ name }}", "hermes"),
        ("{{ tools }}<tool_call>\n<function={{ name }}>", "xml"),
        ("{{ tools }}[TOOL_CALLS]", None),
    ],
)
def test_the_form_is_seen_in_the_template(template: str, form: str | None) -> None:
    assert form_of(template) == form
