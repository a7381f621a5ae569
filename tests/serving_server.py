"""A live server on loopback, in a thread of this process."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commvlm.app.answering import Answerer
from commvlm.app.serving.limits import Limits
from commvlm.app.serving.run import Place, make_server

CHAT = "/v1/chat/completions"


@dataclass
class Live:
    port: int
    answerer: Answerer
    service: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, said = self.send("POST", CHAT, raw, **{"content_type": "application/json", **headers})
        return status, json.loads(said)

    def metric(self, line: str) -> float:
        _, text = self.send("GET", "/metrics")
        return next((float(one.split()[-1]) for one in text.decode().splitlines() if one.startswith(f"{line} ")), 0.0)

    def until(self, true: Any, *, seconds: float = 20.0) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if true():
                return True
            time.sleep(0.02)
        return False


@contextmanager
def live(
    checkpoint: Path, *, name: str = "tiny", endless: bool = False, key: str | None = None, **limits: Any
) -> Iterator[Live]:
    """endless: no answer says its end token."""
    answerer = Answerer(checkpoint, device="cpu")
    if endless:
        answerer.model.generation_config.eos_token_id = None
    server = make_server(answerer, Place(key=key, limits=Limits(**limits)), name=name)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            one = Live(listening.getsockname()[1], answerer, server.config.app.state.service)  # type: ignore[union-attr]
            assert one.until(lambda: server.started)
            yield one
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def user(text: str, *parts: dict[str, Any], image: Path | None = None) -> dict[str, Any]:
    shown = [] if image is None else [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    return {"role": "user", "content": [*shown, *parts, {"type": "text", "text": text}]}
