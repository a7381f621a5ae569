"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """A registry of its own, so that two servers in one process do not add up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "commvlm_requests", "Chat completions by HTTP status; 499: the client left", ["status"], **here
        )
        self.seconds = Histogram(
            "commvlm_request_seconds", "From a request's head to its last byte", buckets=SECONDS, **here
        )
        self.tokens = Counter("commvlm_tokens", "Tokens read and said", ["kind"], **here)
        self.waiting = Gauge("commvlm_waiting", "Requests that wait for a place in the batch", **here)
        self.growing = Gauge("commvlm_growing", "Answers that grow together now", **here)
        self.batch = Histogram(
            "commvlm_batch_rows", "Rows of the model's steps", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **here
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
