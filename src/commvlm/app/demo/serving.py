"""The demo's server: loopback by default, requests bounded, nothing asked of any other machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, which is below
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from gradio.themes import Base
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..answering import Answerer
from ..conversation import history_of
from .page import HERE, Page
from .session import MAX_BYTES

WAITING = 16
"""Questions that may wait for the model; one more is told to come back."""
VISITORS = 64
"""Whose images and patch tokens are held at once (some 20 MB each with COMM's own encoders); the oldest go first."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'self'; form-action 'self'"
)
"""What a browser may load for the page: this server's own files. gradio makes functions of text, hence unsafe-eval."""


class Bounded:
    """Answers 413 to a request of more than MAX_BYTES, said or sent, and puts POLICY on every page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        got, begun = 0, False

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > MAX_BYTES:
                raise _TooLarge
            return message

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", POLICY.encode())]}
            await send(message)

        said = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if not said.isdigit() or int(said) > MAX_BYTES:
                raise _TooLarge
            await self.app(scope, counted, guarded)
        except _TooLarge:
            if not begun:
                await send(
                    {"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain")]}
                )
                await send({"type": "http.response.body", "body": f"more than {MAX_BYTES} bytes".encode()})


class _TooLarge(Exception):
    pass


def serve(
    checkpoint: Path, *, host: str = "127.0.0.1", port: int = 7860, history: int | None = None,
    max_new_tokens: int = 256, block: bool = True,
) -> gr.Blocks:  # fmt: skip
    """Serves the demo of a checkpoint until it is interrupted (or at once returns the running page, with block False).

    history: how many former turns go with a question; None is what the checkpoint was trained for. Raises ValueError for a
    folder that is no checkpoint and for a port that is taken.
    """
    _check_port(host, port)
    print(f"loading {checkpoint}", file=sys.stderr, flush=True)
    if history is None:
        history = history_of(checkpoint)
    answerer = Answerer(checkpoint, max_new_tokens=max_new_tokens)
    page = Page(answerer, title=Path(checkpoint).resolve().name, history=history).build()
    page.queue(max_size=WAITING, default_concurrency_limit=4)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _, url, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False,
        mcp_server=False, enable_monitoring=False, run_history=False, pwa=False, footer_links=[], max_file_size=MAX_BYTES,
        state_session_capacity=VISITORS,
        theme=Base(primary_hue="teal", neutral_hue="slate", font=["system-ui"], font_mono=["ui-monospace", "monospace"]),
        css=(HERE / "demo.css").read_text("utf-8"),
        app_kwargs={"middleware": [Middleware(Bounded)]},
    )  # fmt: skip
    print(f"{url}   Ctrl-C ends it", flush=True)
    if host not in LOOPBACK:
        print(f"anybody who reaches {host} can use it: there is no password", flush=True)
    if block:
        page.block_thread()
    return page


def _check_port(host: str, port: int) -> None:
    """Raises ValueError where nobody can listen, before anything is loaded."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}:{port} cannot be listened at ({error}); choose another --port or --host") from error
