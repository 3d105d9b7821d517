"""The bodies of requests: refused when they are too large, or too slow."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from intarsia.inference.server.wire import error_body


class BodyLimit:
    """Refuses bodies that are too large, as soon as that is known, and those that do not come in time.

    Args:
        most: bytes.
        seconds: until all of a body must be there.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            return await self._refuse(scope, receive, send, 413)
        end = asyncio.get_running_loop().time() + self._seconds
        read, whole, refused = 0, False, None

        async def counted() -> Message:
            nonlocal read, whole, refused
            if whole:  # what comes now is that the client goes away, and that may take as long as it likes
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                refused = 408
                raise _RefusedError from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self._most:
                refused = 413
                raise _RefusedError
            return message

        async def sent(message: Message) -> None:
            if refused is None:  # what the application makes of half a body interests nobody
                await send(message)

        with suppress(_RefusedError):
            await self._app(scope, counted, sent)
        if refused is not None:
            await self._refuse(scope, receive, send, refused)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, code: int) -> None:
        message = (
            f"the request is larger than {self._most} bytes"
            if code == 413
            else f"the request was not there after {self._seconds:g} s"
        )
        await JSONResponse(error_body(message), code, {"Connection": "close"})(scope, receive, send)


class _RefusedError(Exception):
    """A body is not taken."""
