"""A request's body, read no further than the limits go."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from .limits import MEGABYTE, Limits, Refusal


class Intake:
    """Counts the bytes of all bodies that are held, so that many large requests cannot fill the memory together."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._held = 0

    @contextmanager
    def room(self) -> Iterator[list[int]]:
        """Inside, `take` may be called with the list; afterwards its bytes are free again."""
        sizes: list[int] = []
        try:
            yield sizes
        finally:
            self._held -= sum(sizes)

    def take(self, sizes: list[int], size: int) -> None:
        """Raises Refusal: 413 for a body that is too large, 503 where all bodies together are."""
        if sum(sizes) + size > self.limits.body:
            raise Refusal(
                413,
                f"the body is larger than {self.limits.body // MEGABYTE} MB; shrink the image",
                code="body_too_large",
            )
        if self._held + size > self.limits.bodies:
            raise Refusal(503, "too many large requests at once; try again", code="unavailable")
        self._held += size
        sizes.append(size)

    async def body(self, request: Request, sizes: list[int]) -> bytes:
        """Raises Refusal: 415 for what is no plain JSON, 413, 503, and 408 for what does not arrive in time."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"content-type is {kind[:60]!r}; send application/json", code="unsupported_media_type")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "compressed bodies are not taken", code="unsupported_media_type")
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated[:19]) > self.limits.body:
            self.take(sizes, int(stated[:19]))
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    self.take(sizes, len(part))
                    parts.append(part)
        except TimeoutError:
            message = f"the body did not arrive within {self.limits.read_seconds:g} seconds"
            raise Refusal(408, message, code="timeout") from None
        return b"".join(parts)


def check_key(request: Request, key: str | None) -> None:
    """Raises Refusal (401) unless the request carries the key, where there is one."""
    given = request.headers.get("authorization", "")
    if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise Refusal(
            401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY", code="invalid_api_key"
        )
