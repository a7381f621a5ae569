"""Goes over a grid of runs: what is done is not done again, what fails is told and the rest goes on."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..model.storage import SAID, writing
from .executors import Executor, Job, in_one_line
from .progress import say, share_done, stand, telling, time_left
from .runs import BUSY, Places, Run, at_work, note_failed, seconds_of

POLL = 0.5
"""Seconds between two looks at what the runs have written."""
REFUSED = 3
"""Runs in a row that the executor would not start, after which no other is tried."""


@dataclass(frozen=True)
class Failure:
    """run, and the last line that it said, with what the executor says of its end."""

    run: Run
    reason: str


@dataclass
class _Active:
    """said: bytes that earlier attempts left in the run's log."""

    run: Run
    job: Job
    said: int


@dataclass(frozen=True)
class _Elsewhere:
    """A job of another process, such as one whose study was killed: it has the run for as long as it holds `lock`."""

    lock: Path

    def exit_code(self) -> int | None:
        return None if at_work(self.lock) else BUSY

    def reason(self) -> str:
        return ""

    def cancel(self) -> None:
        """Nothing: it is not ours to end."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """This process alone works on the study at `root`. Raises ValueError, naming the other one, where one does already."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip() or "unknown"
            raise ValueError(f"process {other} works on {root} already: wait for it, or choose another --out") from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def go_over(
    runs: Sequence[Run], places: Places, executor: Executor, *, jobs: int, command: Callable[[str], Sequence[str]],
    console: Console,
) -> list[Failure]:  # fmt: skip
    """Executes what has no result yet, at most `jobs` at once; returns those that failed, and keeps them in failed.json. Runs
    of one key are one. A run that another process has counts as one of `jobs`, comes first and is left to it; only if it ends
    there without a result it is executed here. After one that found the disk full, or `REFUSED` in a row that could not be
    started, no other is started.

    command: a run's key -> what makes its result. What is still going on when this is interrupted is ended.
    """
    every = {run.key: run for run in runs}
    grid = _Grid(every.values(), places, executor, command, console)
    with telling(console, len(every), len(every) - len(grid.waiting)) as tell:
        try:
            while grid.waiting or grid.active:
                grid.start(jobs)
                time.sleep(POLL)
                ended = grid.ended()
                shares = [share_done(places.run(one.run.key), one.run.recipe) for one in grid.active]
                now = [f"{one.run.name} {stand(share)}" for one, share in zip(grid.active, shares, strict=True)]
                tell(ended, ", ".join(now), time_left(grid.took, len(grid.waiting), shares, jobs))
        finally:
            for one in grid.active:
                one.job.cancel()
    return grid.failed


class _Grid:
    """The runs on their way. waiting: not started yet. active: at work. took: seconds of each that is done."""

    def __init__(
        self, runs: Collection[Run], places: Places, executor: Executor, command: Callable[[str], Sequence[str]],
        console: Console,
    ) -> None:  # fmt: skip
        self.places, self.executor, self.command, self.console = places, executor, command, console
        left = [run for run in runs if not places.done(run.key)]
        self.waiting = sorted(left, key=lambda run: not at_work(places.lock(run.key)))
        self.active: list[_Active] = []
        self.failed: list[Failure] = []
        self.took = seconds_of(places, [run.key for run in runs])
        self.refused = 0
        self.news: list[str] = []

    def start(self, jobs: int) -> None:
        """As many of those that wait as `jobs` leaves room for."""
        while self.waiting and len(self.active) < jobs:
            run = self.waiting.pop(0)
            lock = self.places.lock(run.key)
            if self.places.done(run.key):  # by another process, while it waited
                self._done(run)
            elif at_work(lock):
                say(self.console, f"{run.name} is at work in another process: waiting for its result")
                self.active.append(_Active(run, _Elsewhere(lock), 0))
            else:
                self._submit(run)

    def _submit(self, run: Run) -> None:
        log = self.places.log(run.key)
        said = log.stat().st_size if log.exists() else 0
        try:
            with writing(self.places.root):
                job = self.executor.submit(self.command(run.key), log)
        except Exception as error:  # whatever a cluster's client raises
            self.refused += 1
            self._fail(run, f"it could not be started: {in_one_line(error)}")
        else:
            self.refused = 0
            self.active.append(_Active(run, job, said))

    def ended(self) -> list[str]:
        """Takes out what has ended; returns what is said of each since the last look."""
        for one in list(self.active):
            code = one.job.exit_code()
            if code is None:
                continue
            self.active.remove(one)
            if self.places.done(one.run.key):
                self._done(one.run)
            elif code == BUSY:
                self.waiting.insert(0, one.run)
            else:
                self._fail(one.run, _reason(one, self.places.log(one.run.key), code))
        news, self.news = self.news, []
        return news

    def _done(self, run: Run) -> None:
        (seconds,) = seconds_of(self.places, [run.key])
        self.took.append(seconds)
        self.news.append(f"{run.name} done in {sum(seconds.values()):.0f} s")
        note_failed(self.places)

    def _fail(self, run: Run, reason: str) -> None:
        self.failed.append(Failure(run, reason))
        self.news.append(f"{run.name} failed")
        note_failed(self.places, (run, reason.replace(f"{self.places.root}/", "")))  # the folder may be read elsewhere
        say(self.console, f"failed: {run.name}: {reason}", "red")
        why = SAID if SAID in reason else f"{REFUSED} in a row could not be started" if self.refused == REFUSED else ""
        if why and self.waiting:
            say(self.console, f"{why}: {len(self.waiting)} runs are not started", "red")
            self.waiting.clear()


def _reason(one: _Active, log: Path, code: int) -> str:
    """In one line: the last one that the run said, and the executor's own."""
    said = log.read_bytes()[one.said :].decode("utf-8", errors="replace") if log.exists() else ""
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    told = "; ".join(part[-300:] for part in (last, one.job.reason()) if part) or "it said nothing"
    return f"{told} (exit code {code}; all of it in {log})"
