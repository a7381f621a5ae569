"""What is said while a grid goes on: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..model.storage import last_row
from ..train.recipe import Recipe

EVERY = 180.0
"""Seconds after which what is at work is said again, where there is no terminal."""

Tell = Callable[[Sequence[str], str, str], None]
"""(what is said of runs that have just ended, those at work with their shares, time left) -> it is said, where it is new."""


@contextmanager
def telling(console: Console, total: int, done: int) -> Iterator[Tell]:
    """How far a grid is, as a bar on a terminal; elsewhere as a line when a run ends, and at least every `EVERY` seconds."""
    if not console.is_interactive:
        yield _lines(console, total, done)
        return
    columns = (
        TextColumn("runs"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[now]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=done, left="", now="")
        yield lambda ended, now, left: bar.update(task, advance=len(ended), left=left, now=now)


def _lines(console: Console, total: int, done: int) -> Tell:
    count, said_at = done, -math.inf

    def tell(ended: Sequence[str], now: str, left: str) -> None:
        nonlocal count, said_at
        count += len(ended)
        if ended or time.monotonic() - said_at >= EVERY:
            said_at = time.monotonic()
            at_work = [f"at work: {now}"] if now else []
            say(console, "; ".join([*ended, f"{count} of {total} runs, {left}", *at_work]))

    return tell


def say(console: Console, text: str, style: str = "") -> None:
    """One line, however long and whatever is in it."""
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def time_left(took: Sequence[Mapping[str, float]], waiting: int, shares: Sequence[float], jobs: int) -> str:
    """Of so many runs that wait and of those at work, `jobs` at once: every run is as long as the mean of those that are
    done, and as much of it is training. Answers are not counted while they are given: one that answers is trained, no more.

    took: seconds of those that are done, by what they went into. shares: of the steps of those at work.
    """
    if not took:
        return "time left unknown until a run is done"
    whole = sum(sum(one.values()) for one in took)
    trained = sum(one.get("train", 0.0) for one in took) / whole if whole else 1.0
    runs = waiting + sum(1 - share * trained for share in shares)
    minutes = runs * whole / len(took) / max(1, min(jobs, waiting + len(shares))) / 60
    return f"about {minutes / 60:.1f} h left" if minutes > 90 else f"about {minutes:.0f} min left"


def stand(share: float) -> str:
    """Where a run is: of its steps, rounded down, or at its questions after them."""
    return "answering" if share >= 1 else f"{math.floor(100 * share)}%"


def share_done(folder: Path, recipe: Recipe) -> float:
    """Of a run's training steps, by its log; all of them where training has ended."""
    if (folder / "run.json").is_file():
        return 1.0
    row = last_row(folder / "log.jsonl")
    if row is None:
        return 0.0
    stages = recipe.train.stages
    total = sum(stage.steps for stage in stages)
    names = [stage.name for stage in stages]
    before = sum(stage.steps for stage in stages[: names.index(row["stage"])]) if row["stage"] in names else 0
    return (before + int(row["step"])) / total
