"""Small servers for tests over a socket: on a thread, and in a process of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from intarsia.data.byte_tokenizer import ByteTokenizer
from intarsia.data.chat import ChatTemplate
from intarsia.data.published import Conduct
from intarsia.inference import Engine, EngineSettings, LookUp
from intarsia.inference.server import Limits, Served
from intarsia.inference.worker import Worker
from intarsia.model import InferenceModel, LanguageModel, presets

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TOKENIZER = ByteTokenizer()
NAME = "small"


def small_model() -> InferenceModel:
    made = LanguageModel(presets.get("kimi-linear-nano", vocab_size=TOKENIZER.vocab_size))
    made.init_weights(0)
    return InferenceModel(made.double())


def served(
    model: InferenceModel,
    chat: bool | str = True,
    settings: EngineSettings | None = None,
    endless: bool = False,
    **limits: Any,
) -> Served:
    """
    Args:
        chat: whether there is a chat template, or one.
        endless: no token ends an answer: it is as long as the request says.
    """
    engine = Engine(model, settings or EngineSettings(sequences=4, tokens=4000), LookUp())
    stop = frozenset[int]() if endless else frozenset([TOKENIZER.separator])
    template = ChatTemplate(chat if isinstance(chat, str) else TEMPLATE) if chat else None
    return Served(NAME, Worker(engine), TOKENIZER, template, Conduct(stop=stop), Limits(**limits))


@contextmanager
def running(what: Served) -> Iterator[str]:
    """A server on a thread; its address."""
    from intarsia.inference.server.app import create_app

    config = uvicorn.Config(create_app(what), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def settled(what: Served) -> None:
    """Wait until nothing runs any more; then nothing is held but snapshots."""
    engine = what.worker.engine
    for _ in range(300):
        if not what.worker.open and not what.worker.report.running:
            engine.check_integrity()
            return
        time.sleep(0.02)
    raise AssertionError(f"still running: {what.worker.report}")


@contextmanager
def serving_process(model: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`intarsia serve` in a process of its own, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "intarsia", "serve", model, "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "INTARSIA_API_KEY": ""})
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        yield process, port
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
