"""Two servers behind a router that is installed: the turns of one dialogue go where its beginning is known."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from intarsia.inference import EngineSettings
from intarsia.inference.server import Served
from intarsia.model import InferenceModel
from support.serving import NAME, running, served, small_model

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
COMMANDS = {
    "haproxy.cfg": ["haproxy", "-f"],
    "nginx.conf": ["nginx", "-c"],
}
DIALOGUES = 8


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return small_model()


@pytest.fixture(params=COMMANDS)
def configuration(request: pytest.FixtureRequest) -> str:
    (program, _), name = COMMANDS[request.param], request.param
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    return str(name)


@contextmanager
def router(name: str, folder: Path, addresses: list[str]) -> Iterator[str]:
    """The example, with other ports."""
    text, port = (EXAMPLES / name).read_text(), _free_port()
    for given, mine in zip(("127.0.0.1:8001", "127.0.0.1:8002"), addresses, strict=True):
        assert text.count(given) == 1
        text = text.replace(given, mine.removeprefix("http://"))
    assert text.count("127.0.0.1:8080") == 1
    (folder / name).write_text(text.replace("127.0.0.1:8080", f"127.0.0.1:{port}"))
    command = [*COMMANDS[name], str(folder / name)]
    if name == "nginx.conf":
        command += ["-p", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(200):
            assert process.poll() is None, process.communicate()[1]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(client: Any, messages: list[dict[str, str]], number: int, session: bool, stream: bool) -> Any:
    headers = {"X-Session": f"dialogue {number}"} if session else {}
    asked = {"model": NAME, "messages": messages, "max_tokens": 4, "seed": number, "extra_headers": headers}
    if not stream:
        answer = client.chat.completions.create(**asked)
        return answer.choices[0].message.content, answer.usage
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    return "".join(p.choices[0].delta.content or "" for p in parts if p.choices), parts[-1].usage


def test_dialogues_go_where_they_are_known(configuration: str, model: InferenceModel, tmp_path: Path) -> None:
    session = configuration == "nginx.conf"
    with ExitStack() as stack:
        both = [served(model, settings=EngineSettings(sequences=4, tokens=12000)) for _ in range(2)]
        addresses = [stack.enter_context(running(each)) for each in both]
        address = stack.enter_context(router(configuration, tmp_path, addresses))
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        dialogues = [
            [
                {"role": "system", "content": "Be brief, and say what you know."},
                {"role": "user", "content": f"Tell me about the number {n}, as much as you can, please."},
            ]
            for n in range(DIALOGUES)
        ]
        for turn in range(3):
            for n, messages in enumerate(dialogues):
                said, usage = ask(client, messages, n, session, stream=bool(n % 2))
                if turn:  # all of the turn before but half a character at its end
                    assert usage.prompt_tokens_details.cached_tokens >= read_before(messages)
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
        shares = [_produced(each) for each in both]
        assert sum(shares) <= 3 * DIALOGUES * 4
        assert min(shares) > 0, "all dialogues went to one server"


def test_a_server_that_is_gone_is_left_out(configuration: str, model: InferenceModel, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(running(served(model)))
        with running(served(model)) as second:
            address = stack.enter_context(router(configuration, tmp_path, [first, second]))
        body = {"model": NAME, "prompt": "x", "max_tokens": 2}
        codes = []
        for n in range(DIALOGUES):
            asked = {**body, "prompt": f"text {n}"}
            codes.append(
                httpx.post(
                    f"{address}/v1/completions", json=asked, headers={"X-Session": f"s{n}"}, timeout=30
                ).status_code
            )
        assert codes == [200] * DIALOGUES


def read_before(messages: list[dict[str, str]]) -> int:
    """At least so many bytes of a dialogue had been read when its last answer began."""
    return sum(len(f"[{each['role']}] {each['content']}\n") for each in messages[:-2])


def _produced(what: Served) -> int:
    return what.worker.report.produced
