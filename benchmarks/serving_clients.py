"""Servers in processes of their own, and clients that read their streams and write down when each token came."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from intarsia.errors import UnsupportedError

MODEL = "example"
START = 120.0
"""Seconds that a server may take to start."""


class Server:
    """A server in a process of its own, to be used in `with`.

    Args:
        command: starts it; it listens at `port` of this machine and answers `/health`.
        options: what each request says beside the prompt and the number of tokens.
    """

    def __init__(self, command: Sequence[str], port: int, options: dict[str, Any] | None = None) -> None:
        self.port, self._options = port, options or {}
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Server:
        end = time.perf_counter() + START
        while time.perf_counter() < end and self._process.poll() is None:
            with suppress(OSError):
                self.read("/health")
                return self
            time.sleep(0.1)
        self._process.kill()
        raise UnsupportedError(f"the server did not start: {self._process.args!r}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def peak_memory(self) -> int:
        """Bytes that the process has had at most."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    def read(self, address: str) -> str:
        """What is at an address."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{address}", timeout=10) as answer:
            found: str = answer.read().decode()
        return found

    def body(self, prompt: Sequence[int], tokens: int) -> bytes:
        """A request."""
        asked = {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        return json.dumps({**asked, **self._options}).encode()


@dataclass
class Told:
    """When the tokens of one answer came, in seconds after the request, and how it ended."""

    times: list[float] = field(default_factory=list)
    text: str = ""
    error: str | None = None

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def tokens(self) -> list[int]:
        """Those of the answer, whose text is words with their numbers."""
        return [int(number) for number in re.findall(r"w(\d+)", self.text)]

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


async def ask(
    server: Server, prompt: Sequence[int], tokens: int, until: Callable[[], bool] | None = None
) -> Told:
    """One request, read to its end, or left when `until` says so."""
    told, body = Told(), server.body(prompt, tokens)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 24)
    begun = time.perf_counter()
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        async for line in _lines(reader):
            if line.startswith("data: {"):
                part = json.loads(line[6:])
                told.error = json.dumps(part["error"]) if "error" in part else told.error
                said = "".join(choice.get("text") or "" for choice in part.get("choices", []))
                told.text += said
                if said:
                    told.times.append(time.perf_counter() - begun)
            elif line.startswith('{"error'):
                told.error = line
            if until is not None and until():
                break
    finally:
        writer.close()
    return told


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    while line := await reader.readline():
        yield line.decode(errors="replace").strip()


def together(server: Server, prompts: Iterable[Sequence[int]], tokens: int) -> tuple[list[Told], float]:
    """All prompts at once; the answers, and the seconds until the last came to its end.

    Raises:
        UnsupportedError: an answer is not as long as it should be.
    """

    async def everybody() -> list[Told]:
        return list(await asyncio.gather(*(ask(server, prompt, tokens) for prompt in prompts)))

    begun = time.perf_counter()
    answers = asyncio.run(everybody())
    seconds = time.perf_counter() - begun
    for each in answers:
        # A token of half a character, or a sign, shows nothing by itself.
        if each.error is not None or not 0.9 * tokens <= len(each.times) <= tokens:
            raise UnsupportedError(f"an answer has {len(each.times)} of {tokens} tokens: {each.error}")
    return answers, seconds


def beside(
    server: Server, prompt: Sequence[int], document: Sequence[int], alone: float, seconds: float
) -> tuple[Told, int, float | None]:
    """A request that is continued for `alone` seconds and then `seconds` more, or until the answer begins, beside one
    with a document as its prompt.

    Returns:
        The first one's tokens, how many of them had come when the document was sent, and the seconds until the document
        was read; None: it was not by then.
    """
    done = False
    told: list[Told] = []

    async def both() -> tuple[Told, int, float | None]:
        nonlocal done
        chat = asyncio.create_task(ask(server, prompt, 1 << 16, lambda: done))
        await asyncio.sleep(alone)
        begun = time.perf_counter()
        reading = asyncio.create_task(ask(server, document, 1))
        finished, _ = await asyncio.wait([reading], timeout=seconds)
        took = time.perf_counter() - begun
        done = True
        if not finished:
            reading.cancel()
        told.append(await chat)
        if finished and reading.result().error is not None:
            raise UnsupportedError(f"the document was not read: {reading.result().error}")
        before = sum(time_of <= alone for time_of in told[0].times)
        return told[0], before, took if finished else None

    return asyncio.run(both())
