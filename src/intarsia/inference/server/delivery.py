"""From the pieces of an answer to a response: in one, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from intarsia.errors import IntarsiaError
from intarsia.inference.server.answering import Answering, Piece
from intarsia.inference.server.forms import Counts, Form
from intarsia.inference.server.metrics import Metrics


async def whole(request: Request, answering: Answering, form: Form, metrics: Metrics) -> dict[str, Any]:
    """The answer in one, unless the client goes away before."""
    pieces: dict[int, list[Piece]] = {}

    async def collect() -> None:
        with metrics.watch() as watch:
            async with answering:
                async for found in answering.pieces():
                    watch.note(answering.written)
                    for piece in found:
                        pieces.setdefault(piece.index, []).append(piece)

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    tasks = [asyncio.create_task(collect()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(499, "the client has gone")
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return form.whole(pieces, _counts(answering))


class Stream(StreamingResponse):
    """Server-sent events, and what is to be done when they have come to their end, or the client has gone.

    Args:
        seconds: until a client that takes nothing any more is left.
    """

    def __init__(self, events: AsyncIterator[str], seconds: float, at_the_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._seconds, self._at_the_end = seconds, at_the_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the server closes what has no end
        finally:
            self._at_the_end()


async def events(answering: Answering, form: Form, metrics: Metrics) -> AsyncIterator[str]:
    """The answer as server-sent events. A client that goes away cancels it."""
    try:
        with metrics.watch() as watch:
            async with answering:
                if opening := "".join(form.opening()):
                    yield opening
                async for found in answering.pieces():
                    watch.note(answering.written)
                    yield "".join(event for piece in found for event in form.part(piece))
        yield "".join(form.closing(_counts(answering)))
    except IntarsiaError as error:  # the status has been sent
        yield "".join(form.failed(str(error)))


def _counts(answering: Answering) -> Counts:
    return Counts(answering.prompt, answering.cached, answering.written)
