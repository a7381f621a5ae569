"""`commvlm serve`: the app on a socket, until it is interrupted."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from ..answering import Answerer
from ..checkpoint import resolve_checkpoint
from .http import make_app
from .limits import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Place:
    """host, port: where it listens; port 0 takes a free one. name: what clients call the model. key: see `make_app`."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    key: str | None = None
    limits: Limits = field(default_factory=Limits)


def serve(
    checkpoint: Path, place: Place, *, precision: str = "fp32", device: str | None = None, bits: int | None = None
) -> None:
    """Returns when it is interrupted. precision, device, bits: see `Answerer`. Raises ValueError for what is no checkpoint,
    and for an address that cannot be listened on."""
    folder = resolve_checkpoint(checkpoint)
    name = place.name or checkpoint.absolute().name
    with _listening(place) as listening:
        answerer = Answerer(folder, precision=precision, device=device, bits=bits)
        host, port = listening.getsockname()[:2]
        if place.host not in LOOPBACK and place.key is None:
            print("warning: without --api-key, whoever reaches this address may ask", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} is served on http://{shown}:{port}/v1 ({answerer.device}); ctrl-c ends it", flush=True)
        with suppress(KeyboardInterrupt):  # uvicorn raises it once more when it has ended all that ran
            make_server(answerer, place, name=name).run(sockets=[listening])


def make_server(answerer: Answerer, place: Place, *, name: str) -> uvicorn.Server:
    app = make_app(answerer, name=name, limits=place.limits, key=place.key)
    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=5,
            limit_concurrency=place.limits.connections,
        )
    )  # fmt: skip


def _listening(place: Place) -> socket.socket:
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        return socket.create_server((place.host, place.port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"{place.host}:{place.port} cannot be listened on ({reason}); choose another --port"
        ) from error
