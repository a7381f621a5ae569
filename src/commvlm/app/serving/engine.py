"""One thread that owns the model: answers of all requests grow together, and new ones join between two steps."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..answering import Answerer
from ..growing import Growing, Prompt, Row, Sampling
from .asking import Asked
from .limits import Limits, Refusal
from .metrics import Metrics


@dataclass(frozen=True)
class Update:
    """What became of an answer since the last update: new ids, and why it ended if it has. failed: the server's fault."""

    ids: tuple[int, ...]
    finish: str | None = None
    failed: bool = False


@dataclass(eq=False)
class Ticket:
    """A request's place. Its updates arrive in the event loop that submitted it, the last one with a `finish` or failed.

    stepwise: an update for every step, as a stream needs; or a single one at the end, which wakes nobody before.
    """

    asked: Asked
    sampling: Sampling | None
    stepwise: bool
    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    row: Row | None = None
    told: int = 0
    left: bool = False


class Engine:
    """Started by `start`, ended by `stop`. All other methods may be called from the event loop's thread."""

    def __init__(self, answerer: Answerer, *, limits: Limits, metrics: Metrics) -> None:
        self.answerer, self.limits, self.metrics = answerer, limits, metrics
        self._waiting: deque[Ticket] = deque()
        self._growing: list[Ticket] = []
        self._stopping = False
        self._changed = threading.Condition()
        with answerer.autocast():
            answerer.decoder.settle()
        self._thread = threading.Thread(target=self._run, name="commvlm-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step that runs now; what still grows is told that it failed."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, asked: Asked, *, sampling: Sampling | None, stepwise: bool) -> Ticket:
        """Raises Refusal: 429 where the queue is full, 400 for sampling from a model that is asked by `generate`, 503 when
        the server is ending."""
        if sampling is not None and not self.answerer.decoder.shares_prefixes:
            raise Refusal(
                400, "this language model is asked greedily only; leave temperature out", code="unsupported",
                field="temperature",
            )  # fmt: skip
        ticket = Ticket(asked, sampling, stepwise, asyncio.get_running_loop())
        with self._changed:
            if self._stopping or not self.alive:
                raise Refusal(503, "the server is ending", code="unavailable")
            if len(self._waiting) >= self.limits.queue:
                raise Refusal(429, f"{self.limits.queue} requests wait already; try again", code="queue_full")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its row ends before the next step. Calling it for one that has ended is harmless."""
        with self._changed:
            ticket.left = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # by whatever it ended: nobody waits for an answer that cannot come
            with self._changed:
                self._stopping = True
            self._fail()

    def _serve(self) -> None:
        growing = self.answerer.decoder.start()
        while (change := self._next()) is not None:
            gone, joining = change
            try:
                growing.leave(gone)
                with self.answerer.autocast():
                    self._join(growing, joining)
                    if growing.rows:
                        self.metrics.batch.observe(len(growing.rows))
                        growing.step()
            except Exception:  # whatever it was, the others' requests go on
                traceback.print_exc(file=sys.stderr)
                self._fail()
                growing = self.answerer.decoder.start()
            self._tell()

    def _next(self) -> tuple[list[Row], list[Ticket]] | None:
        """Waits for something to do. -> the rows that nobody waits for any more, and who joins now; None at the end."""
        with self._changed:
            while not (self._stopping or self._waiting or self._growing):
                self._changed.wait()
            if self._stopping:
                return None
            gone = [ticket for ticket in self._growing if ticket.left]
            room = self.limits.batch - len(self._growing) + len(gone)
            joining = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self.metrics.waiting.set(len(self._waiting))
        self._growing = [ticket for ticket in self._growing if not ticket.left] + joining
        self.metrics.growing.set(len(self._growing))
        return [ticket.row for ticket in gone if ticket.row is not None], joining

    def _join(self, growing: Growing, tickets: Sequence[Ticket]) -> None:
        if not tickets:
            return
        pixels = {t.asked.image: t.asked.pixels for t in tickets if t.asked.pixels is not None}

        def stacked(images: list[Hashable]) -> Tensor:
            return torch.stack([pixels[image] for image in images])  # type: ignore[index]

        features = self.answerer.visual_tokens(pixels, stacked)
        for ticket in tickets:
            asked = ticket.asked
            shown = None if asked.image is None else features[asked.image]
            ticket.row = Row(Prompt(asked.ids, asked.image, shown), asked.most, ticket.sampling)
        self.answerer.decoder.begin(growing, [ticket.row for ticket in tickets if ticket.row is not None])

    def _tell(self) -> None:
        """Hands new ids to the event loops, all in one call each."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Update]]] = {}
        for ticket in self._growing:
            row = ticket.row
            if row is not None and (row.finish is not None or (ticket.stepwise and len(row.said) > ticket.told)):
                update = Update(tuple(row.said[ticket.told :]), row.finish)
                ticket.told = len(row.said)
                news.setdefault(ticket.loop, []).append((ticket, update))
        self._growing = [t for t in self._growing if t.row is None or t.row.finish is None]
        self.metrics.growing.set(len(self._growing))
        _send(news)

    def _fail(self) -> None:
        with self._changed:
            lost = [*self._growing, *self._waiting] if self._stopping else self._growing
            self._growing = []
            if self._stopping:
                self._waiting.clear()
        news: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Update]]] = {}
        for ticket in lost:
            news.setdefault(ticket.loop, []).append((ticket, Update((), failed=True)))
        _send(news)


def _send(news: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Update]]]) -> None:
    for loop, updates in news.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_deliver, updates)


def _deliver(updates: Sequence[tuple[Ticket, Update]]) -> None:
    for ticket, update in updates:
        ticket.updates.put_nowait(update)
