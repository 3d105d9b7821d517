"""Answers that have a structure, tools that are called, and `/v1/responses`, with OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from intarsia.model import InferenceModel
from support.serving import NAME, running, served, small_model

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")


# Templates in the forms of the released families, as short as they can be.
HEAD = (
    "{% if tools %}[tools] {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content or '' }}{% for c in m.tool_calls or [] %}"
)
TAIL = "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
TEMPLATES = {
    "kimi": (
        f"{HEAD}<|tool_calls_section_begin|><|tool_call_begin|>{{{{ c.id }}}}<|tool_call_argument_begin|>"
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% endif %}<|tool_call_end|>"
        f"<|tool_calls_section_end|>{TAIL}"
    ),
    "hermes": (
        f'{HEAD}<tool_call>\n{{"name": "{{{{ c.function.name }}}}", "arguments": '
        f"{{{{ c.function.arguments | tojson }}}}}}\n</tool_call>{TAIL}"
    ),
    "xml": (
        f"{HEAD}<tool_call>\n<function={{{{ c.function.name }}}}>\n"
        "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}"
        f"</function>\n</tool_call>{TAIL}"
    ),
}


class Reply(BaseModel):
    """What is asked for in these tests."""

    colour: Literal["red", "green"]
    count: int = Field(ge=0, le=9)


SCHEMA = {**Reply.model_json_schema(), "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}}
HELLO = [{"role": "user", "content": "Hello?"}]
TOOL = {
    "type": "function",
    "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA},
}
OTHER = {"type": "function", "function": {"name": "wait"}}


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return small_model()


@pytest.fixture(scope="module", params=TEMPLATES)
def client(request: pytest.FixtureRequest, model: InferenceModel) -> Iterator[Any]:
    with running(served(model, TEMPLATES[request.param])) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def plain(model: InferenceModel) -> Iterator[Any]:
    with running(served(model)) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_answers_are_of_a_schema(plain: Any) -> None:
    chat = plain.chat.completions.create(
        model=NAME, messages=HELLO, response_format=FORMAT, n=2, max_tokens=400, seed=1
    )
    assert [choice.finish_reason for choice in chat.choices] == ["stop"] * 2
    found = [Reply.model_validate_json(choice.message.content) for choice in chat.choices]
    assert len({repr(each) for each in found}) > 1
    # The client makes the schema of the class, and an object of the answer.
    parsed = plain.chat.completions.parse(
        model=NAME, messages=HELLO, response_format=Reply, max_tokens=400, seed=1
    )
    assert parsed.choices[0].message.parsed == found[0]
    text = plain.completions.create(
        model=NAME, prompt="x", max_tokens=400, extra_body={"response_format": FORMAT}
    )
    Reply.model_validate_json(text.choices[0].text)


def test_a_structured_stream_ends_at_a_stop_string(plain: Any) -> None:
    asked = {"model": NAME, "messages": HELLO, "response_format": FORMAT, "max_tokens": 400, "seed": 5}
    whole = plain.chat.completions.create(**asked).choices[0].message.content
    parts = list(plain.chat.completions.create(**asked, stream=True, stop=['"count"']))
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == whole[: whole.index('"count"')]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_objects_and_grammars(plain: Any) -> None:
    asked = {"model": NAME, "messages": HELLO, "seed": 2}
    found = plain.chat.completions.create(**asked, response_format={"type": "json_object"}, max_tokens=60)
    text, reason = found.choices[0].message.content, found.choices[0].finish_reason
    assert text.lstrip()[0] == "{"
    assert reason == "length" or isinstance(json.loads(text), dict)
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "yes" | "no"'}
    answer = plain.chat.completions.create(
        **asked, max_tokens=9, extra_body={"response_format": grammar}, logprobs=True
    )
    assert answer.choices[0].message.content in ("yes", "no")
    assert len(answer.choices[0].logprobs.content) == len(answer.choices[0].message.content)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "json_schema"}, "json_schema"),
        ({"type": "xml"}, "response_format"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "name"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wrong"}}},
            "Invalid type: wrong",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {"type": "null"}}}},
            "Unimplemented keys",
        ),
        ({"type": "grammar", "syntax": "lark", "definition": "start: x"}, "unknown name"),
        ({"type": "grammar", "syntax": "regex", "definition": "("}, "regular expression cannot be used"),
        ({"type": "grammar", "syntax": "gbnf", "definition": "x"}, "'lark' or 'regex'"),
    ],
)
def test_structures_that_cannot_be_are_said(plain: Any, given: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        plain.chat.completions.create(model=NAME, messages=HELLO, extra_body={"response_format": given})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_tool_is_called(client: Any, choice: Any) -> None:
    asked = {"model": NAME, "tools": [TOOL, OTHER], "tool_choice": choice, "max_tokens": 700, "seed": 4}
    whole = client.chat.completions.create(**asked, messages=HELLO)
    message = whole.choices[0].message
    assert (whole.choices[0].finish_reason, message.content) == ("tool_calls", None)
    for call in message.tool_calls:
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "paint" or (call.function.name, arguments) == ("wait", {})
        assert call.function.name == "wait" or Reply.model_validate(arguments)
    if choice != "required":
        assert [call.function.name for call in message.tool_calls] == ["paint"]
    with client.chat.completions.stream(**asked, messages=HELLO) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in streamed.message.tool_calls] == [
        (call.function.name, call.function.arguments) for call in message.tool_calls
    ]
    assert len(deltas) >= len(message.tool_calls)
    # The call goes back as it came, and its result with it; the model has read all of that but what is new.
    result = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in message.tool_calls]
    dialogue = [*HELLO, message.model_dump(exclude_none=True), *result]
    after = client.chat.completions.create(
        model=NAME, messages=dialogue, tools=[TOOL, OTHER], tool_choice="none", max_tokens=3
    )
    assert after.choices[0].message.tool_calls is None


def test_calls_may_be_left_to_the_model(client: Any) -> None:
    """Of a model that has not learned to call, the answer is text; a strict tool binds no more than its calls."""
    asked = {"model": NAME, "messages": HELLO, "max_tokens": 30, "seed": 6}
    free = client.chat.completions.create(**asked, tools=[TOOL])
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    bound = client.chat.completions.create(**asked, tools=[strict], parallel_tool_calls=False)
    assert free.choices[0].message.tool_calls is None
    assert len(bound.choices[0].message.content) > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": [TOOL, TOOL]}, "one name"),
        ({"tool_choice": "required"}, "there is none in `tools`"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "the tools are paint"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOL], "response_format": FORMAT}, "leave out one of the two"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
             "tool_choice": "required"},
            "'f' must be a JSON schema of an object",
        ),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_are_said(client: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model=NAME, messages=HELLO, **more)


def test_a_template_without_tools(plain: Any, model: InferenceModel) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template that takes tools"):
        plain.chat.completions.create(model=NAME, messages=HELLO, tools=[TOOL])
    with running(
        served(model, "{{ tools }}[CALLS]{% for m in messages %}{{ m.content }}{% endfor %}")
    ) as address:
        other = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="in a form that is not read here"):
            other.chat.completions.create(model=NAME, messages=HELLO, tools=[TOOL])


def test_a_response_is_what_a_chat_says(plain: Any) -> None:
    asked = {"model": NAME, "extra_body": {"seed": 3}}
    chat = plain.chat.completions.create(
        model=NAME, messages=[{"role": "system", "content": "Be brief."}, *HELLO], max_tokens=12, seed=3
    )
    found = plain.responses.create(**asked, input="Hello?", instructions="Be brief.", max_output_tokens=12)
    assert found.output_text == chat.choices[0].message.content
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == 12
    assert found.usage.input_tokens_details.cached_tokens > 0
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello?"}]},
    ]
    again = plain.responses.create(**asked, input=messages, max_output_tokens=12)
    assert again.output_text == found.output_text


def test_a_response_in_events(plain: Any) -> None:
    asked = {"model": NAME, "input": "Hello?", "max_output_tokens": 15, "extra_body": {"seed": 8}}
    whole = plain.responses.create(**asked, include=["message.output_text.logprobs"], top_logprobs=2)
    events = list(plain.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 15
    logprobs = whole.output[0].content[0].logprobs
    assert len(logprobs) == 15
    assert {len(each.top_logprobs) for each in logprobs} == {2}


def test_a_response_of_a_schema(plain: Any) -> None:
    asked = {"model": NAME, "input": "Hello?", "text_format": Reply, "extra_body": {"seed": 1}}
    found = plain.responses.parse(**asked)
    assert isinstance(found.output_parsed, Reply)
    assert found.status == "completed"
    with plain.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_parsed == found.output_parsed
    assert kinds[-1] == "response.completed"


def test_a_response_calls_a_tool(client: Any) -> None:
    tools = [{"type": "function", "name": "paint", "parameters": SCHEMA, "strict": True}]
    asked = {
        "model": NAME, "tools": tools, "tool_choice": {"type": "function", "name": "paint"},
        "extra_body": {"seed": 2},
    }  # fmt: skip
    found = client.responses.create(**asked, input="Hello?")
    (call,) = found.output
    assert (call.type, call.name, found.status) == ("function_call", "paint", "completed")
    Reply.model_validate_json(call.arguments)
    with client.responses.stream(**asked, input="Hello?") as stream:
        events = list(stream)
        (streamed,) = stream.get_final_response().output
    assert streamed.arguments == call.arguments
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    done = {"type": "function_call_output", "call_id": call.call_id, "output": "painted"}
    items = [{"role": "user", "content": "Hello?"}, call.model_dump(exclude_none=True), done]
    after = client.responses.create(
        model=NAME, input=items, tools=tools, tool_choice="none", max_output_tokens=4
    )
    assert after.output[0].type == "message"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "an item of type 'item_reference'"),
        ({"input": [{"type": "message", "content": "x"}]}, "has no role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text alone"),
        ({"input": [{"role": "user", "content": 3}]}, "must be text"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "wrong"}}}},
         "Invalid type"),
    ],
)  # fmt: skip
def test_responses_that_cannot_be_are_said(plain: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        plain.responses.create(model=NAME, **more)


def test_what_fails_in_a_stream_is_told(model: InferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    what = served(model)
    with running(what) as address:

        def fails(*arguments: object) -> None:
            raise RuntimeError("out of order")

        monkeypatch.setattr(what.worker.engine, "_forward", fails)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        events = list(client.responses.create(model=NAME, input="x", stream=True))
        assert events[-1].type == "response.failed"
        assert "out of order" in events[-1].response.error.message
