"""The server's addresses: /v1/chat/completions, /v1/models, /health, /metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..answering import Answerer
from ..growing import Sampling
from .asking import Asked, prepare
from .engine import Engine, Ticket
from .intake import Intake, check_key
from .limits import Limits, Refusal
from .messages import ChatRequest, read_dialogue, read_request
from .metrics import Metrics
from .saying import DONE, Completion, Text, event

LEFT = 499
"""Counted for a client that left before its answer was whole."""
PREPARING = 2
"""Images that are decoded at once; each may take some hundred megabytes."""


class Service:
    """What the addresses share: the engine, the limits, the counts."""

    def __init__(self, answerer: Answerer, *, name: str, limits: Limits, key: str | None) -> None:
        self.answerer, self.name, self.limits, self.key = answerer, name, limits, key
        self.metrics, self.intake, self.started = Metrics(), Intake(limits), int(time.time())
        self.engine = Engine(answerer, limits=limits, metrics=self.metrics)
        self.preparing = ThreadPoolExecutor(PREPARING, thread_name_prefix="commvlm-prepare")

    async def chat(self, request: Request) -> Response:
        """One chat completion, whole or streamed. Raises Refusal."""
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        asked, wanted = await self._asked(request)
        ticket = self.engine.submit(asked, sampling=_sampling(wanted), stepwise=bool(wanted.stream or wanted.stops))
        text = Text(self.answerer.processor.tokenizer, stops=wanted.stops)
        completion = Completion(self.name, text, asked.view, self.answerer.collator.codec, len(asked.ids))
        self.metrics.tokens.labels("prompt").inc(len(asked.ids))
        if wanted.stream:
            usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            events = self._events(ticket, completion, deadline, usage=usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        finish = await _unless_gone(request, self._whole(ticket, completion, deadline))
        return JSONResponse(completion.whole(finish))

    async def _asked(self, request: Request) -> tuple[Asked, ChatRequest]:
        """The request, checked and made ready; its body is let go."""
        with self.intake.room() as sizes:
            wanted = read_request(await self.intake.body(request, sizes))
            if wanted.model != self.name:
                message = f"there is no model {wanted.model[:80]!r}; this server has {self.name!r}"
                raise Refusal(404, message, code="model_not_found", field="model")
            dialogue = read_dialogue(wanted.messages)
            tokens = wanted.max_completion_tokens or wanted.max_tokens
            wanted.messages.clear()
            asked = await asyncio.get_running_loop().run_in_executor(
                self.preparing, lambda: prepare(dialogue, self.answerer, limits=self.limits, tokens=tokens)
            )
        return asked, wanted

    async def _pieces(self, ticket: Ticket, text: Text, deadline: float) -> AsyncIterator[tuple[str, str | None]]:
        """The answer's pieces, each with why it ended; None until it has. Raises Refusal: 504 at the deadline, 500."""
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    update = await ticket.updates.get()
                if update.failed:
                    raise Refusal(500, "the model failed on this request; see the server's log", code="internal_error")
                self.metrics.tokens.labels("answer").inc(len(update.ids))
                piece = text.take(update.ids, last=update.finish is not None)
                finish = "stop" if text.stopped else update.finish
                yield piece, finish
                if finish is not None:
                    return
        except TimeoutError:
            raise Refusal(504, f"no answer within {self.limits.seconds:g} seconds", code="timeout") from None
        finally:
            self.engine.leave(ticket)

    async def _whole(self, ticket: Ticket, completion: Completion, deadline: float) -> str:
        ended = None
        async for _, finish in self._pieces(ticket, completion.text, deadline):
            ended = finish
        assert ended is not None
        return ended

    async def _events(
        self, ticket: Ticket, completion: Completion, deadline: float, *, usage: bool
    ) -> AsyncIterator[str]:
        pieces = self._pieces(ticket, completion.text, deadline)
        try:
            yield completion.chunk()
            async for piece, finish in pieces:
                if piece:
                    yield completion.chunk(piece)
                if finish is not None:
                    yield completion.chunk(finish=finish)
            if usage:
                yield completion.usage_chunk()
            yield DONE
        except Refusal as refusal:  # the status has been sent already
            yield event(refusal.body())
        finally:
            self.engine.leave(ticket)


def _sampling(wanted: ChatRequest) -> Sampling | None:
    """None for the likeliest token at every step, as without a temperature."""
    if not wanted.temperature:
        return None
    generator = torch.Generator()
    if wanted.seed is None:
        generator.seed()
    else:
        generator.manual_seed(wanted.seed)
    return Sampling(wanted.temperature, 1.0 if wanted.top_p is None else wanted.top_p, generator)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, str]) -> str:
    """The work's result. A client that hangs up ends it: ClientDisconnect."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(answerer: Answerer, *, name: str, limits: Limits | None = None, key: str | None = None) -> FastAPI:
    """name: what clients call the model. key: of `Authorization: Bearer`, None for a server that is open to all who reach it.

    The engine's thread lives as long as the app's lifespan.
    """
    service = Service(answerer, name=name, limits=limits or Limits(), key=key)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)
            service.preparing.shutdown()

    # The pages of documentation would load scripts from elsewhere; /openapi.json is there.
    app = FastAPI(title="commvlm", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    _count(app, service.metrics)
    _add_routes(app, service)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return Refusal(error.status_code, str(error.detail), code="not_found").response()

    return app


def _count(app: FastAPI, metrics: Metrics) -> None:
    """Answers refusals, and counts and times chat completions to their last byte."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=LEFT)

    app.add_middleware(Counting, metrics=metrics)


class Counting:
    """ASGI middleware: status and seconds of every chat completion, streams to their end."""

    def __init__(self, app: Callable[..., Any], *, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/chat/completions":
            await self.app(scope, receive, send)
            return
        start, status, whole = time.perf_counter(), 500, False

        async def sending(message: dict[str, Any]) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            self.metrics.requests.labels(str(status if whole or status != 200 else LEFT)).inc()
            self.metrics.seconds.observe(time.perf_counter() - start)


def _add_routes(app: FastAPI, service: Service) -> None:
    model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "commvlm"}
    schema = {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}, "required": True}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": schema})
    async def chat(request: Request) -> Response:
        check_key(request, service.key)
        return await service.chat(request)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request, service.key)
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        check_key(request, service.key)
        if name != service.name:
            raise Refusal(
                404, f"there is no model {name[:80]!r}; this server has {service.name!r}", code="model_not_found"
            )
        return JSONResponse(model)

    @app.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "ended"}, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
