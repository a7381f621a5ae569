"""The demo: COMM and its controls, trained and evaluated side by side on the micro world, then the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..evaluate.scores import read_scores, scores_table
from ..evaluate.tasks import Score
from ..microworld.writer import write_world
from ..model.storage import last_row
from ..train.recipe import Recipe, difference, load_recipe
from ..train.sources import named_examples
from .report import write_report
from .variants import RECIPE, VARIANTS, overrides

TRAIN_SCENES, TEST_SCENES = 5000, 200
TASKS = ("rec", "reg", "pope", "vqa", "caption")
POLL = 0.5
"""Seconds between two looks at what the runs have written."""


def run_quickstart(
    out: Path, *, jobs: int = 2, recipe: str = RECIPE, train: int = TRAIN_SCENES, test: int = TEST_SCENES
) -> Path:
    """Writes the world, trains and evaluates every variant (at most `jobs` at a time, one core each), and the report,
    whose path is returned. The same call goes on where another one stopped; what is finished is not done again.

    Raises ValueError with the failed run's last line and where the rest of its output is.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: at least one run must be able to go on")
    console = Console(stderr=True)
    console.print(f"micro world: {train} training and {test} test scenes")
    world = write_world(out / "world", train=train, test=test).resolve()
    runs = [Run(name, out, world, recipe) for name in VARIANTS]
    for run in runs:
        run.check()
    asked = named_examples(runs[0].recipe.evaluate.sources, world).values()
    questions = sum(example.task in TASKS for examples in asked for example in examples)
    _go_on(runs, jobs=jobs, questions=questions, console=console)
    _write(out / "run.json", json.dumps({"model": "comm/model"}))
    report = write_report(out)
    print(scores_table({VARIANTS[name].label: scores for name, scores in _scores(out).items()}))
    return report


@dataclass
class Run:
    """One variant's commands, the process that is at one of them, and how far it is."""

    name: str
    demo: Path
    world: Path
    base: str
    process: subprocess.Popen[bytes] | None = None
    waiting: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder, self.output = self.demo / self.name, self.demo / "logs" / f"{self.name}.txt"
        self.options = overrides(self.name, world=self.world, recipe=self.base)
        self.recipe: Recipe = load_recipe(self.base, self.options)
        self.steps = sum(stage.steps for stage in self.recipe.train.stages)
        command = [sys.executable, "-m", "commvlm.cli"]
        self.waiting = [
            [*command, "train", self.base, "--out", str(self.folder), *self.options],
            [*command, "evaluate", str(self.folder), "--tasks", ",".join(TASKS)],
        ]

    def check(self) -> None:
        """Raises ValueError when the folder holds another recipe's run."""
        kept = self.folder / "recipe.yaml"
        if kept.exists() and (was := load_recipe(kept)) != self.recipe:
            reason = f"{self.folder} was made with another recipe ({difference(was, self.recipe)})"
            raise ValueError(f"{reason}; remove {self.demo} or choose another --out")

    def finished(self) -> bool:
        """Whether every task has its score, from this recipe (see `check`)."""
        scores = self.folder / "scores.json"
        return scores.exists() and set(read_scores(scores)) >= set(TASKS)

    def start_next(self) -> None:
        """Starts the first command that waits, on one core."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.waiting.pop(0), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
            )

    def failure(self) -> ValueError:
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        code = None if self.process is None else self.process.returncode
        return ValueError(f"run {self.name} failed (exit code {code}): {last}; its whole output is in {self.output}")

    def progress(self) -> tuple[int, str]:
        """How many training steps and answers are done, and what it is at, in words."""
        row = last_row(self.folder / "log.jsonl")
        if row is None:
            return 0, "starting"
        done = 0
        for stage in self.recipe.train.stages:
            if stage.name == row["stage"]:
                break
            done += stage.steps
        done += int(row["step"])  # type: ignore[call-overload]
        if not (self.folder / "run.json").exists():
            return done, f"{row['stage']} {row['step']}/{row['of']}, loss {float(row['loss']):.3f}"  # type: ignore[arg-type]
        answers = _answers(self.folder / "predictions")
        return self.steps + sum(answers.values()), f"answering {next(reversed(answers), '')}".strip()


def _go_on(runs: list[Run], *, jobs: int, questions: int, console: Console) -> None:
    """Runs what is not finished, with a bar each; ends the others and raises when one fails."""
    columns = (
        TextColumn("{task.fields[label]:<16}"),
        BarColumn(24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    waiting, active = [run for run in runs if not run.finished()], list[Run]()
    with Progress(*columns, console=console) as progress:
        bars = {
            run.name: progress.add_task(
                "waiting", label=VARIANTS[run.name].label, total=run.steps + questions, start=False
            )
            for run in runs
        }
        for run in runs:
            if run not in waiting:
                progress.update(bars[run.name], completed=run.steps + questions, description="done before")
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    active.append(waiting.pop(0))
                    active[-1].start_next()
                    progress.start_task(bars[active[-1].name])
                time.sleep(POLL)
                active = [run for run in active if _still_at_it(run, progress, bars[run.name])]
        finally:
            _end(active)


def _still_at_it(run: Run, progress: Progress, bar: TaskID) -> bool:
    """Looks at a run, starts its next command when one has ended. Raises ValueError when it failed."""
    assert run.process is not None
    code = run.process.poll()
    done, words = run.progress()
    progress.update(bar, completed=done, description=words)
    if code is None:
        return True
    if code != 0:
        progress.update(bar, description="failed")
        raise run.failure()
    if run.waiting:
        progress.console.print(f"{run.name}: trained")
        run.start_next()
        return True
    progress.update(bar, completed=progress.tasks[bar].total, description="done")
    progress.stop_task(bar)
    progress.console.print(f"{run.name}: evaluated")
    return False


def _end(runs: list[Run]) -> None:
    """Ends processes that are still running, and waits for them."""
    started = [run.process for run in runs if run.process is not None and run.process.poll() is None]
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(predictions: Path) -> dict[str, int]:
    """Answers written so far, by task; the file that is being written comes last."""
    files = sorted(predictions.glob("*.jsonl*"), key=lambda path: path.suffix == ".partial")
    return {path.name.split(".")[0]: path.read_bytes().count(b"\n") for path in files}


def _scores(out: Path) -> Mapping[str, Mapping[str, Score]]:
    return {name: read_scores(out / name / "scores.json") for name in VARIANTS}


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
