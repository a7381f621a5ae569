"""What a server takes, and how it refuses the rest."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi.responses import JSONResponse

MEGABYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """body: bytes of one request; bodies: of all that are being read. side: pixels of an image's longer side. tokens: of an
    answer. batch: answers that grow at once; queue: requests that wait for them. read_seconds: until a request must have
    arrived whole; seconds: until its answer must be."""

    body: int = 20 * MEGABYTE
    bodies: int = 256 * MEGABYTE
    side: int = 6_000
    tokens: int = 256
    batch: int = 32
    queue: int = 128
    read_seconds: float = 20.0
    seconds: float = 120.0

    @property
    def connections(self) -> int:
        """Beyond these the server answers 503 without looking."""
        return 2 * (self.batch + self.queue) + 16


class Refusal(Exception):
    """A request that is not answered: an HTTP status, one line that says why, and a code as OpenAI's API has them."""

    def __init__(self, status: int, message: str, *, code: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def body(self) -> dict[str, object]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)
