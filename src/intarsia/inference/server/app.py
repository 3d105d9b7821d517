"""The HTTP interface.

Handlers run on one event loop and the engine on a thread of its own; what is between them is `Answering`. Nothing is
kept outside of the application that `create_app` makes.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from intarsia import __version__
from intarsia.errors import ConfigError, DataError, IntarsiaError
from intarsia.inference.server.answering import Answering, Mailbox, TooSlowError
from intarsia.inference.server.bodies import BodyLimit
from intarsia.inference.server.completions import chat_requests, completion_requests
from intarsia.inference.server.delivery import Stream, events, whole
from intarsia.inference.server.forms import ChatForm, CompletionForm, Form
from intarsia.inference.server.metrics import Metrics
from intarsia.inference.server.responses import ResponseForm, ResponseRequest
from intarsia.inference.server.served import Served
from intarsia.inference.server.tools import tool_use
from intarsia.inference.server.wire import ChatRequest, CompletionRequest, error_body

RETRY_AFTER = "1"
"""Seconds after which a client that was turned away may come again."""


class ErrorBody(BaseModel):
    """What is answered to a request that is not served: `message`, `type`, `param` and `code`."""

    error: dict[str, Any]


def _said(*codes: int) -> dict[int | str, dict[str, Any]]:
    """For the description of the interface: which errors an address answers with."""
    return {code: {"model": ErrorBody} for code in codes}


def create_app(served: Served) -> FastAPI:
    """The application, which starts the worker when it starts and stops it when it ends."""
    limits, worker = served.limits, served.worker
    registry = CollectorRegistry()
    metrics = Metrics(worker, registry)
    mailbox = Mailbox()
    clients: Counter[str] = Counter()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        mailbox.open()
        worker.on_told = mailbox.send
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    app = FastAPI(title="Intarsia", version=__version__, lifespan=lifespan, redoc_url=None, docs_url=None)
    app.add_middleware(BodyLimit, most=limits.body_bytes, seconds=limits.body_seconds)
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
        request: Request, name: str, stream: bool | None, form: Form, make: Callable[[], Answering]
    ) -> Response:
        check_model(name)
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
            answering = await asyncio.to_thread(make)
            streams = bool(stream)
            if streams:
                return Stream(events(answering, form, metrics), limits.seconds + limits.body_seconds, leave)
            return JSONResponse(await whole(request, answering, form, metrics))
        finally:
            if not streams:
                leave()

    completion_errors = _said(400, 401, 404, 413, 429, 500, 503, 504)

    @app.post("/v1/completions", dependencies=[guarded], responses=completion_errors)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        def make() -> Answering:
            return Answering(served, mailbox, completion_requests(served, asked), asked.stops)

        return await answer(
            request, asked.model, asked.stream, CompletionForm(served, asked.wants_usage), make
        )

    @app.post("/v1/chat/completions", dependencies=[guarded], responses=completion_errors)
    async def chat(request: Request, asked: ChatRequest) -> Response:
        def make() -> Answering:
            tools = tool_use(served, asked.tools, asked.tool_choice, asked.parallel_tool_calls)
            return Answering(served, mailbox, chat_requests(served, asked, tools), asked.stops, tools)

        return await answer(request, asked.model, asked.stream, ChatForm(served, asked.wants_usage), make)

    @app.post("/v1/responses", dependencies=[guarded], responses=completion_errors)
    async def respond(request: Request, asked: ResponseRequest) -> Response:
        def make() -> Answering:
            tools = tool_use(served, asked.chat_tools, asked.chat_choice, asked.parallel_tool_calls)
            return Answering(served, mailbox, chat_requests(served, asked.as_chat(), tools), (), tools)

        return await answer(request, asked.model, asked.stream, ResponseForm(served, asked), make)

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
            "unread": report.unread,
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
