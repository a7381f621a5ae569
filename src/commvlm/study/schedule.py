"""Goes over a grid of runs: what is done is not done again, what fails is told and the rest goes on."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..model.storage import SAID, writing
from ..train.recipe import Recipe
from .executors import Executor, Job, in_one_line
from .runs import Places, Run, note_failed, seconds_of

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
    of one key are one. After one that found the disk full, or `REFUSED` in a row that could not be started, no other is
    started.

    command: a run's key -> what makes its result. What is still going on when this is interrupted is ended.
    """
    every = {run.key: run for run in runs}
    waiting = [run for run in every.values() if not places.done(run.key)]
    failed: list[Failure] = []
    active: list[_Active] = []
    took, jobs = seconds_of(places, every), min(jobs, max(len(waiting), 1))
    refused = 0
    with _bar(console) as progress:
        bar = progress.add_task("", total=len(every), completed=len(every) - len(waiting), left="", now="")

        def fail(run: Run, reason: str) -> None:
            failed.append(Failure(run, reason))
            note_failed(places, (run, reason.replace(f"{places.root}/", "")))  # the folder may be read elsewhere
            console.print(f"failed: {run.name}: {reason}", style="red", highlight=False, markup=False)
            why = SAID if SAID in reason else f"{REFUSED} in a row could not be started" if refused == REFUSED else ""
            if why and waiting:
                console.print(f"{why}: {len(waiting)} runs are not started", style="red", highlight=False)
                waiting.clear()

        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.pop(0)
                    log = places.log(run.key)
                    said = log.stat().st_size if log.exists() else 0
                    try:
                        with writing(places.root):
                            job = executor.submit(command(run.key), log)
                    except Exception as error:  # whatever a cluster's client raises
                        refused += 1
                        fail(run, f"it could not be started: {in_one_line(error)}")
                        progress.advance(bar)
                    else:
                        refused = 0
                        active.append(_Active(run, job, said))
                time.sleep(POLL)
                for one in list(active):
                    code = one.job.exit_code()
                    if code is None:
                        continue
                    active.remove(one)
                    if places.done(one.run.key):
                        took += seconds_of(places, [one.run.key])
                        note_failed(places)
                    else:
                        fail(one.run, _reason(one, places.log(one.run.key), code))
                    progress.advance(bar)
                shares = [share_done(places.run(one.run.key), one.run.recipe) for one in active]
                names = ", ".join(f"{one.run.name} {share:.0%}" for one, share in zip(active, shares, strict=True))
                left = time_left(took, len(waiting) + sum(1 - share for share in shares), jobs)
                progress.update(bar, left=left, now=names)
        finally:
            for one in active:
                one.job.cancel()
    return failed


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("runs"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[now]}", markup=False),
    )  # fmt: skip
    return Progress(*columns, console=console)


def time_left(took: Sequence[float], runs: float, jobs: int) -> str:
    """Of so many runs, `jobs` at once. took: seconds of those that are done."""
    if not took:
        return "time left unknown until a run is done"
    minutes = runs * sum(took) / len(took) / jobs / 60
    return f"about {minutes / 60:.1f} h left" if minutes > 90 else f"about {minutes:.0f} min left"


def share_done(folder: Path, recipe: Recipe) -> float:
    """Of a run's training steps, by its log."""
    row = _last_row(folder / "log.jsonl")
    if row is None:
        return 0.0
    stages = recipe.train.stages
    total = sum(stage.steps for stage in stages)
    names = [stage.name for stage in stages]
    before = sum(stage.steps for stage in stages[: names.index(row["stage"])]) if row["stage"] in names else 0
    return (before + int(row["step"])) / total


def _last_row(log: Path) -> dict[str, Any] | None:
    """The last whole line of a log that is being written."""
    if not log.exists():
        return None
    whole = log.read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2]
    try:
        return json.loads(whole)
    except json.JSONDecodeError:
        return None


def _reason(one: _Active, log: Path, code: int) -> str:
    """In one line: the last one that the run said, and the executor's own."""
    said = log.read_bytes()[one.said :].decode("utf-8", errors="replace") if log.exists() else ""
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    told = "; ".join(part[-300:] for part in (last, one.job.reason()) if part) or "it said nothing"
    return f"{told} (exit code {code}; all of it in {log})"
