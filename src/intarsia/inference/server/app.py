"""The HTTP interface.

Handlers run on one event loop and the engine on a thread of its own; what is between them is `Answering`. Nothing is
kept outside of the application that `create_app` makes.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from intarsia import __version__
from intarsia.errors import ConfigError, DataError, IntarsiaError
from intarsia.inference import requests as engine_requests
from intarsia.inference.server.answering import Answering, Piece, TooSlowError
from intarsia.inference.server.completions import (
    Form,
    chat_form,
    chat_requests,
    completion_form,
    completion_requests,
)
from intarsia.inference.server.metrics import Metrics
from intarsia.inference.server.served import Served
from intarsia.inference.server.wire import ChatRequest, CompletionRequest, StreamOptions, error_body, usage

RETRY_AFTER = "1"
"""Seconds after which a client that was turned away may come again."""


class ErrorBody(BaseModel):
    """What is answered to a request that is not served: `message`, `type`, `param` and `code`."""

    error: dict[str, Any]


def _said(*codes: int) -> dict[int | str, dict[str, Any]]:
    """For the description of the interface: which errors an address answers with."""
    return {code: {"model": ErrorBody} for code in codes}


class _BodyLimit:
    """Refuses bodies that are too large, as soon as that is known."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            return await self._refuse(scope, receive, send)
        read, too_large = 0, False

        async def counted() -> Message:
            nonlocal read, too_large
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                too_large = True
                raise _TooLargeError
            return message

        async def sent(message: Message) -> None:
            if not too_large:  # what the application makes of half a body interests nobody
                await send(message)

        with suppress(_TooLargeError):
            await self._app(scope, counted, sent)
        if too_large:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the request is larger than {self._most} bytes"
        await JSONResponse(error_body(message), 413)(scope, receive, send)


class _TooLargeError(Exception):
    """A body has more bytes than it may."""


def create_app(served: Served) -> FastAPI:
    """The application, which starts the worker when it starts and stops it when it ends."""
    limits, worker = served.limits, served.worker
    registry = CollectorRegistry()
    metrics = Metrics(worker, registry)
    clients: Counter[str] = Counter()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    app = FastAPI(title="Intarsia", version=__version__, lifespan=lifespan, redoc_url=None, docs_url=None)
    app.add_middleware(_BodyLimit, most=limits.body_bytes)
    _answer_errors(app)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if limits.key is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {limits.key}".encode()
        ):
            raise HTTPException(401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    guarded = Depends(check_key)

    def check_model(name: str) -> None:
        if name != served.name:
            raise HTTPException(404, f"there is no model {name!r} here; there is {served.name!r}")

    async def answer(
        request: Request,
        asked: CompletionRequest | ChatRequest,
        make: Callable[[], list[engine_requests.Request]],
        form: Form,
    ) -> Response:
        check_model(asked.model)
        if not worker.is_alive:
            raise HTTPException(503, "the engine has stopped")
        client = "" if request.client is None else request.client.host
        if clients.total() >= limits.open_requests or clients[client] >= limits.open_per_client:
            metrics.turned_away.inc()
            raise HTTPException(
                429, "too many requests are open: come again soon", {"Retry-After": RETRY_AFTER}
            )
        clients[client] += 1  # before anything is waited for: others come in between

        def leave() -> None:
            clients[client] -= 1
            if not clients[client]:
                del clients[client]

        streams = False
        try:
            answering = Answering(served, await asyncio.to_thread(make), asked.stops)
            streams = bool(asked.stream)
            if streams:
                options = asked.stream_options or StreamOptions()
                return _Stream(_events(answering, served, form, options, metrics), leave)
            return JSONResponse(await _whole(request, answering, served, form, metrics))
        finally:
            if not streams:
                leave()

    completion_errors = _said(400, 401, 404, 413, 429, 500, 503, 504)

    @app.post("/v1/completions", dependencies=[guarded], responses=completion_errors)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        return await answer(
            request, asked, lambda: completion_requests(served, asked), completion_form(served)
        )

    @app.post("/v1/chat/completions", dependencies=[guarded], responses=completion_errors)
    async def chat(request: Request, asked: ChatRequest) -> Response:
        return await answer(request, asked, lambda: chat_requests(served, asked), chat_form(served))

    about = {"id": served.name, "object": "model", "created": 0, "owned_by": "intarsia"}

    @app.get("/v1/models", dependencies=[guarded], responses=_said(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}", dependencies=[guarded], responses=_said(401, 404))
    async def model(name: str) -> dict[str, Any]:
        check_model(name)
        return about

    @app.get("/health", responses=_said(503))
    async def health() -> dict[str, str]:
        if not worker.is_alive:
            raise HTTPException(503, "the engine has stopped")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status", dependencies=[guarded], responses=_said(401))
    async def status() -> dict[str, Any]:
        report = worker.report
        return {
            "model": served.name,
            "chat": served.template is not None,
            "running": report.running,
            "waiting": report.waiting,
            "state_bytes": report.state_bytes,
            "page_bytes": report.page_bytes,
            "used_pages": report.used_pages,
            "snapshots": report.snapshots,
            "tokens": worker.engine.settings.tokens,
            "saved_tokens": report.hits.saved_tokens,
            "misses": report.hits.misses,
        }

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return files("intarsia.inference.server").joinpath("page.html").read_text(encoding="utf-8")

    return app


def _answer_errors(app: FastAPI) -> None:
    """Let every error have the form that clients know."""

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error"
        )
        return JSONResponse(error_body(str(error.detail), kind), error.status_code, headers=error.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        what = f"{'.'.join(place)}: {first['msg']}" if place else first["msg"]
        return JSONResponse(error_body(what, param=place[0] if place else None), 400)

    async def refused(request: Request, error: Exception) -> Response:
        code = (
            400
            if isinstance(error, ConfigError | DataError)
            else 504
            if isinstance(error, TooSlowError)
            else 500
        )
        kind = "invalid_request_error" if code == 400 else "server_error"
        return JSONResponse(error_body(str(error), kind), code)

    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(IntarsiaError, refused)


async def _whole(
    request: Request, answering: Answering, served: Served, form: Form, metrics: Metrics
) -> dict[str, Any]:
    """The answer in one, unless the client goes away before."""
    pieces: dict[int, list[Piece]] = {}

    async def collect() -> None:
        with metrics.watch() as watch:
            async with answering:
                async for piece in answering.pieces():
                    watch.note(answering.written)
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
    choices = [form.whole(index, pieces[index]) for index in sorted(pieces)]
    told = usage(answering.prompt, answering.cached, answering.written)
    return {**form.body(served, choices, streamed=False), "usage": told}


class _Stream(StreamingResponse):
    """Server-sent events, and what is to be done when they have come to their end, or the client has gone."""

    def __init__(self, events: AsyncIterator[str], at_the_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._at_the_end = at_the_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_the_end()


async def _events(
    answering: Answering, served: Served, form: Form, options: StreamOptions, metrics: Metrics
) -> AsyncIterator[str]:
    """The answer as server-sent events. A client that goes away cancels it."""
    opened: set[int] = set()

    def data(body: Any) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    try:
        with metrics.watch() as watch:
            async with answering:
                async for piece in answering.pieces():
                    watch.note(answering.written)
                    if form.opening is not None and piece.index not in opened:
                        opened.add(piece.index)
                        yield data(form.body(served, [{"index": piece.index, **form.opening}], streamed=True))
                    yield data(form.body(served, [form.part(piece)], streamed=True))
        if options.include_usage:
            told = usage(answering.prompt, answering.cached, answering.written)
            yield data({**form.body(served, [], streamed=True), "usage": told})
        yield "data: [DONE]\n\n"
    except IntarsiaError as error:  # the status has been sent
        yield data(error_body(str(error), "server_error"))
