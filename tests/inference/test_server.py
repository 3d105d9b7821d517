"""The HTTP interface, over a socket, with OpenAI's client."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from intarsia.errors import ConfigError
from intarsia.inference import EngineSettings, generate
from intarsia.inference.server import Limits
from intarsia.model import InferenceModel
from support.serving import NAME, TOKENIZER, running, served, settled, small_model

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return small_model()


@pytest.fixture(scope="module")
def address(model: InferenceModel) -> Iterator[str]:
    with running(served(model)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def expected(model: InferenceModel, prompt: str, most: int, seed: int = 0) -> str:
    tokens = generate(model, TOKENIZER.encode(prompt), max_tokens=most, seed=seed, stop={TOKENIZER.separator})
    return TOKENIZER.decode(tokens)


def test_a_completion_is_what_the_model_says(client: Any, model: InferenceModel) -> None:
    asked = {"model": NAME, "prompt": "def f(x):", "max_tokens": 20, "seed": 5}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text == expected(model, "def f(x):", 20, 5)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 20)
    again = client.completions.create(**asked)
    assert again.choices[0].text == answer.choices[0].text
    assert again.usage.prompt_tokens_details.cached_tokens == 9


def test_a_stream_is_the_same_in_pieces(client: Any, model: InferenceModel) -> None:
    stream = client.completions.create(
        model=NAME,
        prompt="import os",
        max_tokens=15,
        seed=3,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    for part in stream:
        for choice in part.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        usage = part.usage or usage
    assert texts == {n: expected(model, "import os", 15, 3 + n) for n in range(2)}
    assert reasons == {0: "length", 1: "length"}
    assert usage.completion_tokens == 30


def test_several_prompts_and_tokens_as_prompts(client: Any, model: InferenceModel) -> None:
    answer = client.completions.create(model=NAME, prompt=["a", "bc"], max_tokens=4, n=2, seed=1)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == [
        expected(model, prompt, 4, 1 + n) for prompt in ("a", "bc") for n in range(2)
    ]
    tokens = client.completions.create(model=NAME, prompt=TOKENIZER.encode("bc"), max_tokens=4, seed=1)
    assert tokens.choices[0].text == answer.choices[2].text


def test_a_chat_reads_each_turn_once(client: Any, model: InferenceModel) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    first = client.chat.completions.create(model=NAME, messages=messages, max_tokens=12, seed=2)
    text = "[system] Be brief.\n[user] Hello?\n[assistant] "
    assert first.choices[0].message.content == expected(model, text, 12, 2)
    said = first.choices[0].message.content
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "then?"}]
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": parts}]
    stream = client.chat.completions.create(
        model=NAME,
        messages=messages,
        max_completion_tokens=5,
        seed=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    found, usage, roles = "", None, []
    for part in stream:
        for choice in part.choices:
            found += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
        usage = part.usage or usage
    whole = f"{text}{said}\n[user] And then?\n[assistant] "
    assert found == expected(model, whole, 5, 2)
    assert roles == ["assistant"]
    assert usage.prompt_tokens == len(whole.encode())
    # Half a character at the end of an answer does not come back as it was.
    if "�" not in said:
        assert usage.prompt_tokens_details.cached_tokens >= len(text.encode()) + 11


def test_a_stop_string_ends_an_answer(client: Any, model: InferenceModel) -> None:
    whole = expected(model, "stop", 40, 9)
    stop = whole[10:12]
    answer = client.completions.create(
        model=NAME, prompt="stop", max_tokens=40, seed=9, stop=[stop, "never there"]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(client: Any) -> None:
    asked = {"model": NAME, "max_tokens": 6, "seed": 1, "temperature": 0}
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=3, **asked
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 6
    assert all(
        len(each.top_logprobs) == 3 and each.logprob == each.top_logprobs[0].logprob for each in content
    )
    plain = client.completions.create(prompt="x", logprobs=0, **asked)
    assert len(plain.choices[0].logprobs.token_logprobs) == 6


def test_models_and_health(client: Any, address: str) -> None:
    assert [each.id for each in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "intarsia"
    with pytest.raises(openai.NotFoundError, match="there is 'small'"):
        client.models.retrieve("other/one")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{address}/metrics").text
    assert "intarsia_produced_tokens_total" in metrics
    assert 'intarsia_requests_total{result="done"}' in metrics
    assert httpx.get(f"{address}/status").json()["page_bytes"] > 0
    page = httpx.get(address).text
    assert "<title>Intarsia" in page
    assert "http://" not in page and "https://" not in page  # noqa: PT018


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("{", 400, "JSON"),
        ("[]", 400, "valid dictionary"),
        ({"prompt": "x"}, 400, "model: Field required"),
        ({"model": NAME, "prompt": ""}, 200, ""),
        ({"model": NAME, "prompt": []}, 400, "prompt"),
        ({"model": NAME, "prompt": [99999]}, 400, "outside the vocabulary"),
        ({"model": NAME, "prompt": "x" * 5000}, 400, "has memory for 4000"),
        ({"model": "gpt-9", "prompt": "x"}, 404, "there is no model 'gpt-9'"),
        ({"model": NAME, "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"model": NAME, "prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ({"model": NAME, "prompt": "x", "temperature": float("nan")}, 400, "temperature"),
        ({"model": NAME, "prompt": "x", "n": 17}, 400, "gives 16 answers at most"),
        ({"model": NAME, "prompt": "x", "stop": ""}, 400, "stop"),
        ({"model": NAME, "prompt": "x", "echo": True}, 400, "echo"),
        ({"model": NAME, "prompt": "x", "presence_penalty": 1}, 400, "presence_penalty"),
        ({"model": NAME, "prompt": "x", "made_up": 1}, 400, "made_up: Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_said(address: str, body: Any, code: int, message: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = httpx.post(
        f"{address}/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == code, answer.text
    if code != 200:
        assert message in answer.json()["error"]["message"]


def test_messages_that_hold_no_text_and_models_without_a_template(
    address: str, model: InferenceModel
) -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    answer = httpx.post(f"{address}/v1/chat/completions", json={"model": NAME, "messages": image})
    assert (answer.status_code, "text alone" in answer.text) == (400, True)
    with running(served(model, chat=False)) as other:
        hello = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{other}/v1/chat/completions", json=hello)
        assert (answer.status_code, "use /v1/completions" in answer.text) == (400, True)


def test_a_key_is_wanted(model: InferenceModel) -> None:
    with running(served(model, key="secret")) as address:
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        assert right.completions.create(model=NAME, prompt="x", max_tokens=1).choices
        wrong = openai.OpenAI(base_url=f"{address}/v1", api_key="sécret", max_retries=0)
        for call in (lambda: httpx.get(f"{address}/v1/models"), lambda: httpx.get(f"{address}/status")):
            assert call().status_code == 401
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            wrong.completions.create(model=NAME, prompt="x")
        assert httpx.get(f"{address}/health").status_code == 200


def test_too_large(model: InferenceModel) -> None:
    with running(served(model, body_bytes=1000)) as address:
        url = f"{address}/v1/completions"
        assert httpx.post(url, json={"model": NAME, "prompt": "x" * 2000}).status_code == 413

        def parts() -> Iterator[bytes]:
            yield b'{"prompt": "'
            for _ in range(30):
                yield b"x" * 100

        assert httpx.post(url, content=parts()).status_code == 413


def test_too_slow(model: InferenceModel) -> None:
    what = served(model, endless=True, seconds=0.3)
    with running(what) as address:
        body = {"model": NAME, "prompt": "x", "max_tokens": 3900}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 504
        assert "0.3 s" in answer.json()["error"]["message"]
        settled(what)


@pytest.mark.parametrize(
    "limits", [{"open_per_client": 2}, {"open_requests": 2, "open_per_client": 3}], ids=["client", "all"]
)
def test_too_many(model: InferenceModel, limits: dict[str, int]) -> None:
    what = served(model, endless=True, **limits)
    with running(what) as address, httpx.Client(timeout=60) as client:
        url, long = f"{address}/v1/completions", {"model": NAME, "prompt": "x", "max_tokens": 3900}
        short = {**long, "max_tokens": 1}
        with (
            client.stream("POST", url, json={**long, "stream": True}) as first,
            client.stream("POST", url, json={**long, "stream": True}) as second,
        ):
            assert (first.status_code, second.status_code) == (200, 200)
            turned = client.post(url, json=short)
            assert turned.status_code == 429
            assert turned.headers["retry-after"] == "1"
        settled(what)
        codes = [client.post(url, json=short).status_code]
        while codes[-1] == 429 and len(codes) < 300:  # until the server has seen both leave
            time.sleep(0.02)
            codes.append(client.post(url, json=short).status_code)
        assert codes[-1] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels(model: InferenceModel, stream: bool) -> None:
    what = served(model, endless=True)
    body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 3900, "stream": stream}).encode()
    with running(what) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            while not what.worker.report.running:
                time.sleep(0.01)
        settled(what)
        assert what.worker.report.produced < 3900


def test_many_slow_clients_and_one_that_is_not(model: InferenceModel) -> None:
    what = served(model, settings=EngineSettings(sequences=8, tokens=4000))
    with running(what) as address:
        host, port = address.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(200)]
        for each in idle[:50]:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        answer = httpx.post(
            f"{address}/v1/completions", json={"model": NAME, "prompt": "x", "max_tokens": 5}, timeout=30
        )
        assert answer.status_code == 200
        for each in idle:
            each.close()
        settled(what)


def test_an_engine_that_fails_says_so(model: InferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    what = served(model)
    with running(what) as address:
        url, body = f"{address}/v1/completions", {"model": NAME, "prompt": "x", "max_tokens": 5}

        def fails(*arguments: object) -> None:
            raise RuntimeError("out of order")

        monkeypatch.setattr(what.worker.engine, "_forward", fails)
        broken = httpx.post(url, json=body)
        assert (broken.status_code, "out of order" in broken.text) == (500, True)
        streamed = httpx.post(url, json={**body, "stream": True}).text
        assert "out of order" in streamed
        monkeypatch.undo()
        assert httpx.post(url, json=body).status_code == 200
        settled(what)


@pytest.mark.parametrize(
    "limits", [{"body_bytes": 0}, {"seconds": -1}, {"key": "  "}, {"open_per_client": 0}]
)
def test_limits_that_cannot_be(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Limits(**limits)


def test_the_description_of_the_interface_is_kept(model: InferenceModel) -> None:
    """Fuzzed by schemathesis from the interface's own description: no answer that it does not name, and no crash."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    with running(served(model, most_tokens=4, settings=EngineSettings(sequences=4, tokens=300))) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        for operation in (result.ok() for result in schema.get_all_operations()):

            @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def fuzz(case: Any) -> None:
                answer = case.call()
                assert answer.status_code < 500, answer.text
                assert str(answer.status_code) in case.operation.definition.raw["responses"]

            fuzz()
