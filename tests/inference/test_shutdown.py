"""SIGTERM while many are being answered: what has begun comes to its end, unless it is sent twice."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from support.serving import serving_process

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to handle")
CLIENTS, RUNNING, TOKENS = 28, 24, 300
NAME = "kimi-linear-nano"


def read(port: int, number: int, tokens: int, begun: threading.Semaphore) -> list[str]:
    """The data of a stream, to its end or as far as it came."""
    body: dict[str, Any] = {
        "model": NAME, "prompt": f"{number} ", "max_tokens": tokens, "stream": True,
        "temperature": 0,  # random weights never say the end then
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    found: list[str] = []
    try:
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120
        ) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line:
                    if not found:
                        begun.release()
                    found.append(line.removeprefix("data: "))
    except httpx.TransportError:
        found.append("cut off")
    return found


def readers(threads: ThreadPoolExecutor, port: int, tokens: int) -> list[Future[list[str]]]:
    """All clients, of which those that run have got a part of their answers; the others wait."""
    begun = threading.Semaphore(0)
    told = [threads.submit(read, port, n, tokens, begun) for n in range(CLIENTS)]
    for _ in range(RUNNING):
        assert begun.acquire(timeout=120)
    return told


def test_what_has_begun_comes_to_its_end() -> None:
    with (
        serving_process(NAME, "--sequences", str(RUNNING)) as (process, port),
        ThreadPoolExecutor(CLIENTS) as threads,
        socket.create_connection(("127.0.0.1", port)) as says_nothing,
    ):
        told = readers(threads, port, TOKENS)
        process.send_signal(signal.SIGTERM)
        assert not any(each.done() for each in told), "some were answered before they could be interrupted"
        says_nothing.settimeout(60)
        assert says_nothing.recv(1) == b""
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))
        for each in told:
            *parts, usage, end = each.result(timeout=120)
            assert end == "[DONE]"
            assert json.loads(parts[-1])["choices"][0]["finish_reason"] == "length"
            assert json.loads(usage)["usage"]["completion_tokens"] == TOKENS
        assert process.wait(30) == 0
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))


def test_a_second_signal_ends_it_at_once() -> None:
    with (
        serving_process(NAME, "--sequences", str(RUNNING)) as (process, port),
        ThreadPoolExecutor(CLIENTS) as threads,
    ):
        told = readers(threads, port, 2000)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        assert {each.result(timeout=30)[-1] for each in told} == {"cut off"}
