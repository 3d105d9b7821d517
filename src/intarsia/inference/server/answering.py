"""From the events of an engine to the pieces of answers, as a client reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from intarsia.errors import IntarsiaError
from intarsia.inference.requests import Event, Logprobs, Produced, Reason, Request
from intarsia.inference.server.served import Served
from intarsia.inference.server.tools import ToolUse
from intarsia.inference.text_stream import TextStream
from intarsia.inference.tool_calls import CallPart, CallReader
from intarsia.inference.worker import Ticket


class TooSlowError(IntarsiaError):
    """An answer took longer than a request may."""


@dataclass(frozen=True)
class TokenFacts:
    """A token of an answer whose log-probabilities are wanted."""

    token: int
    logprobs: Logprobs


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: text that is final, parts of calls of tools, the tokens that it is of where their
    log-probabilities are wanted, and how the answer ended if it has."""

    index: int
    text: str
    facts: tuple[TokenFacts, ...] = ()
    reason: Reason | None = None
    calls: tuple[CallPart, ...] = ()


Told = tuple[int, Event] | None
"""The number of a request and what became of it; None: its time is over."""


@dataclass
class _Answer:
    stream: TextStream
    reader: CallReader | None
    facts: list[TokenFacts] = field(default_factory=list)
    ended: bool = False
    """For the client: by a stop string before the engine knows."""


class Mailbox:
    """Carries what the engine's thread tells to the event loop: all of a step in one wake-up, since each takes the
    interpreter from the engine.

    `put` and `send` are for the engine's thread; the loop is that of `open`.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[asyncio.Queue[Told], Told]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Take letters for the loop that runs."""
        self._loop = asyncio.get_running_loop()

    def put(self, queue: asyncio.Queue[Told], told: Told) -> None:
        """Keep something for a queue."""
        self._waiting.append((queue, told))

    def send(self) -> None:
        """Send what is kept on its way."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        for _ in range(len(self._waiting)):
            queue, told = self._waiting.popleft()
            queue.put_nowait(told)


class Answering:
    """One client's request while it is being answered; to be used in `async with`, at whose end whatever still runs is
    cancelled.

    Args:
        requests: one a prompt. Their answers are numbered through.
        stops: strings that end an answer.
        tools: how calls are read out of answers; None: they are text.

    Attributes:
        prompt, cached, written: tokens so far: of the prompts, of these found, and of the answers.

    Raises:
        ConfigError: the engine cannot serve a request; none is begun then.
    """

    def __init__(
        self,
        served: Served,
        mailbox: Mailbox,
        requests: Sequence[Request],
        stops: Sequence[str] = (),
        tools: ToolUse | None = None,
    ) -> None:
        self._served, self._mailbox, self._requests = served, mailbox, requests
        self._single = tools is not None and tools.single
        self._events: asyncio.Queue[Told] = asyncio.Queue()
        self._answers = [
            _Answer(TextStream(served.tokenizer, stops), None if tools is None else tools.reader())
            for each in requests
            for _ in range(each.count)
        ]
        self._first = [sum(each.count for each in requests[:n]) for n in range(len(requests))]
        self._left = len(self._answers)
        self._tickets: list[Ticket] = []
        self.prompt = sum(len(each.prompt) for each in requests)
        self.cached = self.written = 0
        for request in requests:
            served.worker.engine.check(request)

    async def __aenter__(self) -> Answering:
        end = self._served.limits.seconds
        self._alarm = asyncio.get_running_loop().call_later(end, self._events.put_nowait, None)
        for n, request in enumerate(self._requests):

            def tell(event: Event, n: int = n) -> None:
                self._mailbox.put(self._events, (n, event))

            self._tickets.append(self._served.worker.submit(request, tell))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alarm.cancel()
        for ticket in self._tickets:
            if ticket.open:
                self._served.worker.cancel(ticket)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """The pieces of all answers, as they come: what came together is given together.

        Raises:
            TooSlowError: not all of them came in time.
            IntarsiaError: the engine has failed with one.
        """
        while self._left:
            told = [await self._events.get()]
            while not self._events.empty():
                told.append(self._events.get_nowait())
            found = [piece for each in told if (piece := self._piece(each)) is not None]
            if found:
                yield found

    def _piece(self, told: Told) -> Piece | None:
        if told is None:
            raise TooSlowError(f"the answer was not done in {self._served.limits.seconds:g} s")
        n, event = told
        index = self._first[n] + event.number
        answer = self._answers[index]
        if isinstance(event, Produced):
            return None if answer.ended else self._continued(n, index, answer, event)
        if event.number == 0:
            self.cached += event.cached
        self._left -= 1
        if answer.ended:
            return None
        if event.error is not None:
            raise event.error
        if event.reason == "cancelled":
            raise IntarsiaError("the server is shutting down")
        answer.ended = True
        facts, answer.facts = tuple(answer.facts), []
        text, calls = _read(answer, answer.stream.finish())
        if answer.reader is not None:
            rest = answer.reader.finish()
            text, calls = text + rest.text, calls + rest.calls
        return Piece(index, text, facts, "stop" if answer.stream.stopped else event.reason, calls)

    def _continued(self, n: int, index: int, answer: _Answer, event: Produced) -> Piece | None:
        self.written += 1
        if event.logprobs is not None:
            answer.facts.append(TokenFacts(event.token, event.logprobs))
        text, calls = _read(answer, answer.stream.push(event.token))
        if self._single and any(call.ends for call in calls):
            answer.ended = True
        if answer.stream.stopped:
            answer.ended = True
            if answer.reader is not None:
                rest = answer.reader.finish()
                text, calls = text + rest.text, calls + rest.calls
        if answer.ended:
            count = self._requests[n].count
            if all(each.ended for each in self._answers[self._first[n] : self._first[n] + count]):
                self._served.worker.cancel(self._tickets[n])
        elif not text and not calls:
            return None
        facts, answer.facts = tuple(answer.facts), []
        return Piece(index, text, facts, "stop" if answer.ended else None, calls)


def _read(answer: _Answer, text: str) -> tuple[str, tuple[CallPart, ...]]:
    """The text that is said, and the calls in it."""
    if answer.reader is None:
        return text, ()
    spoken = answer.reader.push(text)
    return spoken.text, spoken.calls
