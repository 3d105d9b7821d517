"""A thousand clients that are slow in every way there is, and one that is not."""

from __future__ import annotations

import itertools
import json
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from support.serving import serving_process

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

CLIENTS = 1000
NAME = "kimi-linear-nano"
BODY = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 40, "stream": True, "seed": 1}).encode()
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    % len(BODY)
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc"),
]


@contextmanager
def many_files(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"a process may have {hard} open files here, and {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def slow(port: int, count: int) -> list[socket.socket]:
    """Clients of which a quarter each says nothing, half of its header, half of its body, and takes no answer."""
    found = []
    for n in range(count):
        client = socket.create_connection(("127.0.0.1", port))
        found.append(client)
        client.sendall([b"", HEAD[:20], HEAD + BODY[:10], HEAD + BODY][n % 4])
    return found


def drip(clients: list[socket.socket]) -> None:
    """A byte more of a header, and a byte taken of an answer."""
    for n, client in enumerate(clients):
        if n % 4 == 1:
            client.sendall(b"x")
        elif n % 4 == 3:
            client.settimeout(0)
            with suppress(BlockingIOError):
                client.recv(1)


def answer(port: int) -> tuple[float, list[float]]:
    """The seconds to the first token of an answer, and between those behind it."""
    body: dict[str, Any] = {
        "model": NAME,
        "prompt": "fast",
        "max_tokens": 30,
        "stream": True,
        "seed": 2,
        "priority": 9,
    }
    begun, times = time.perf_counter(), []
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as told:
        assert told.status_code == 200
        for line in told.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times[0] - begun, [b - a for a, b in itertools.pairwise(times)]


def memory(process: subprocess.Popen[bytes]) -> float:
    """Megabytes that a process has."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def open_requests(port: int) -> tuple[int, int]:
    status = httpx.get(f"http://127.0.0.1:{port}/status").json()
    return status["running"], status["waiting"]


def test_a_thousand_slow_clients() -> None:
    limit = str(CLIENTS)
    with (
        many_files(CLIENTS + 100),
        serving_process(NAME, "--max-open", limit, "--max-open-per-client", limit, "--draft", "none") as (
            process,
            port,
        ),
    ):
        answer(port)
        alone = [answer(port) for _ in range(5)]
        after: list[float] = []
        for _ in range(3):
            clients = slow(port, CLIENTS)
            beside = []
            for _ in range(5):
                drip(clients)
                beside.append(answer(port))
            for client in clients:
                client.close()
            for _ in range(600):
                if open_requests(port) == (0, 0):
                    break
                time.sleep(0.1)
            assert open_requests(port) == (0, 0)
            after.append(memory(process))
        gaps, gaps_alone = ([gap for _, each in found for gap in each] for found in (beside, alone))
        print(
            f"gaps {statistics.median(gaps_alone):.4f} -> {statistics.median(gaps):.4f} s, memory {after} MB"
        )
        # A quarter of them is served as well: sixteen at a time, where it was one.
        assert statistics.median(gaps) < 20 * statistics.median(gaps_alone)
        assert max(first for first, _ in beside) < 10
        # What the first thousand took is used again by the next.
        assert after[-1] < after[0] * 1.05
