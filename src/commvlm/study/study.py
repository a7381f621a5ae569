"""`commvlm study`: experiments -> rows -> runs -> report, in one folder that any call goes on with."""

from __future__ import annotations

import fcntl
import glob
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ..app.answer_planning import Load
from ..app.planning import machine
from ..app.questions import questions_of
from ..microworld.writer import write_world
from ..model.storage import writing
from ..train.keys import nearest_key
from ..train.run import check
from .bundle import keep, read_bundle
from .cost import grid_cost
from .executors import EXECUTORS, worker_command
from .experiments import FIGURE_1, experiments_named, rows_of
from .features import prepare_features, readable
from .maps import draw_figure_1
from .ready import have_checkpoints, have_stores
from .report import write_report
from .results import costs
from .rows import Row
from .runs import Places, Run, runs_of, seconds_of, settled_of, write_grid, write_jobs
from .schedule import Failure, go_over, locked
from .settings import Scale, fits, load_scale

MEASURED = 5
"""Forward passes of which a visual half's milliseconds are the median: at scales that make their own world, and on a GPU."""


@dataclass(frozen=True)
class Asked:
    """What a call wants. names: experiments. root: the study's folder. data: of a scale without a world of its own.
    gpu: by which such a scale's cost is counted, and said before anything starts. only: patterns of row names, such as
    "COMM*"; no other row is trained by this call. word: the scale as it was asked for, a name or a file."""

    names: Sequence[str]
    scale: Scale
    root: Path
    data: Path | None = None
    gpu: str = "h100"
    only: Sequence[str] = ()
    word: str = ""


def asked(
    names: Sequence[str], *, scale: str, out: Path | None, seeds: int | None = None, data: Path | None = None,
    processes: int | None = None, gpu: str | None = None, only: Sequence[str] = (),
) -> Asked:  # fmt: skip
    """Raises ValueError for an experiment or a scale that there is not, naming the nearest, and for data or a GPU that it
    would not use."""
    experiments_named(list(names))
    found = load_scale(scale)
    for flag, value, use in (("--data", data, "reads no"), ("--gpu", gpu, "counts no hours of a")):
        if value is not None and found.world is not None:
            raise ValueError(
                f"scale {found.name} makes its own micro world and {use} {flag}: leave it out, or use another scale"
            )
    given = {"seeds": seeds, "processes": processes}
    found = replace(found, **{name: value for name, value in given.items() if value is not None})
    if seeds is not None:
        found = replace(found, more_seeds={})
    root = (out or Path("runs/study") / found.name).resolve()  # for workers that start in another folder
    return Asked(tuple(names), found, root, data, gpu or Asked.gpu, tuple(only), scale)


def planned(asked: Asked) -> tuple[list[Row], list[Run]]:
    """The rows and the runs; makes the micro world where there is one. Raises ValueError for more seeds of a row that there
    is not, and for rows that cannot be run, all of them named before any data are made."""
    rows = rows_of(asked.scale, list(asked.names))
    every = rows_of(asked.scale, ["all"])
    _known(asked.scale.more_seeds, [row.name for row in every], "more_seeds", "--list without it names")
    settled_of(rows)
    runs = [_reading(run, asked) for run in runs_of(asked.scale, rows, data=str(_data(asked)))]
    for run in runs:
        check(run.recipe, count=asked.scale.processes)
    return rows, runs


def chosen(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """The runs of the rows whose names fit one of the patterns; all without any. Raises ValueError for one that fits none."""
    _known(patterns, list(dict.fromkeys(run.row.name for run in runs)), "--rows", "--list names")
    return [run for run in runs if not patterns or any(fits(run.row.name, one) for one in patterns)]


def _known(patterns: Iterable[str], names: Sequence[str], where: str, told: str) -> None:
    """Raises ValueError for a pattern that fits no row's name."""
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise ValueError(f"{where}: no row is called {pattern!r}{nearest_key(pattern, names)}; {told} them all")


def _reading(run: Run, asked: Asked) -> Run:
    """The run with its features read from the study's stores, where it can."""
    if asked.scale.features is None or not readable(run):
        return run
    view = str(Places(asked.root).view(run.key).resolve())
    return replace(run, recipe=replace(run.recipe, train=replace(run.recipe.train, features=view)))


def _data(asked: Asked) -> Path:
    world = asked.scale.world
    if world is None:
        return (asked.data or Path(asked.scale.base.data.root)).resolve()
    folder = asked.root / "world"
    asked.root.mkdir(parents=True, exist_ok=True)
    with (asked.root / ".world.lock").open("a") as lock:  # --list may come while a study draws it
        fcntl.flock(lock, fcntl.LOCK_EX)
        return write_world(folder, train=world.train, test=world.test, difficulty=world.difficulty).resolve()


def study(asked: Asked, *, jobs: int, executor: str, console: Console) -> tuple[Path, list[Failure]]:
    """Runs what has no result yet, and writes the report; returns its path and the runs that failed.

    Raises ValueError for rows that cannot be run (all of them named, before anything starts), for tasks that the recipe does
    not ask, for an executor that there is not, and where another process works on the folder; OSError when the disk is full.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: at least one run must be able to go on")
    with locked(asked.root), writing(asked.root):
        rows, every = planned(asked)
        places, runs = Places(asked.root), chosen(every, asked.only)
        load = load_of(runs, asked, console)
        engine = EXECUTORS[executor](asked.root, asked.scale.processes)
        try:
            if asked.scale.world is None and runs:
                said = priced(asked, runs, load, console)
                console.print(said, highlight=False, soft_wrap=True, markup=False)
                left = [run for run in runs if not places.done(run.key)]
                have_checkpoints(left, console)
                have_stores(left, console)
            remember(places, every, asked)
            write_jobs(places, runs)
            _make_ready(asked, places, rows, runs)
            scale = asked.scale
            command = partial(worker_command, asked.root, tasks=scale.tasks, keep=scale.keep, processes=scale.processes)
            failed = go_over(runs, places, engine, jobs=jobs, command=command, console=console)
        finally:
            engine.close()
        return write_report(places, asked.scale), failed


def _make_ready(asked: Asked, places: Places, rows: Sequence[Row], runs: Sequence[Run]) -> None:
    """Figure 1, what the visual halves cost, and the features that runs read; without models that a kill left."""
    if not asked.scale.keep:
        for run in runs:
            if places.done(run.key):
                shutil.rmtree(places.run(run.key) / "model", ignore_errors=True)
    if FIGURE_1 in experiments_named(list(asked.names)):
        draw_figure_1(asked.scale, _data(asked), places.figures)
    passes = MEASURED if asked.scale.world or torch.cuda.is_available() else 0
    precision = asked.scale.base.train.precision
    costs({row.name: row for row in rows}, asked.root / "costs.json", runs=passes, precision=precision)
    if asked.scale.features is not None:
        prepare_features(places, runs, kept=asked.scale.features)


def take(asked: Asked, source: Path) -> tuple[int, int]:
    """Puts those results of a file of `bundle.pack` that the grid lacks into its folder; returns how many, and how many runs
    of it are done now. Raises ValueError as `study` and `bundle.read_bundle` do, and has taken nothing then."""
    if not source.is_file():
        raise ValueError(f"{source} is no file: give one that `commvlm study --export` wrote")
    with locked(asked.root), writing(asked.root):
        _, runs = planned(asked)
        places, keys = Places(asked.root), {run.key for run in runs}
        found = read_bundle(source, keys, places, tasks=asked.scale.tasks)
        remember(places, runs, asked)
        write_jobs(places, runs)
        keep(found, source, places)
        return len(found), sum(places.done(key) for key in keys)


def remember(places: Places, runs: Sequence[Run], asked: Asked) -> None:
    """grid.json, with the rows, experiments and seeds of earlier calls on this folder kept.

    Raises ValueError where the folder is another scale's.
    """
    path = places.root / "grid.json"
    scale = asked.scale
    facts = {
        "scale": scale.name,
        "word": asked.word or scale.name,
        "world": None if scale.world is None else {"train": scale.world.train, "test": scale.world.test},
        "experiments": list(experiments_named(list(asked.names))),
    }
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if (kept["scale"], kept["world"]) != (facts["scale"], facts["world"]):
            raise ValueError(f"{places.root} holds a study of scale {kept['scale']!r}; choose another --out")
        names = [*kept["experiments"], *facts["experiments"]]
        facts["experiments"] = list(dict.fromkeys(names))
        every = rows_of(scale, facts["experiments"])
        seeds = {glob.escape(name): len(row["runs"]) for name, row in kept["rows"].items()}
        scale = replace(scale, more_seeds={**scale.more_seeds, **seeds})
        runs = runs_of(scale, every, data=str(_data(asked)))
    write_grid(places, runs, facts)


def load_of(runs: Sequence[Run], asked: Asked, console: Console) -> Load:
    """What each run is asked. Raises ValueError where the recipe asks nothing of what the scale scores."""
    with console.status("reading what is asked"):
        sets = questions_of(runs[0].recipe, asked.scale.tasks) if runs else []
    return Load(sum(len(one.examples) for one in sets), sum(len({e.image for e in one.examples}) for one in sets))


def priced(asked: Asked, runs: Sequence[Run], load: Load, console: Console) -> str:
    """The cost of what is not done, on as many GPUs of one kind as a run has processes."""
    with console.status("counting a training step"):
        on = machine(asked.gpu, asked.scale.processes)
        return grid_cost(runs, Places(asked.root), on, load=load, keep=asked.scale.keep).table()


def grid_table(asked: Asked, runs: Sequence[Run], console: Console) -> str:
    """What would be run, what is done already, and what the rest costs: counted, or from the runs that are done."""
    places, rows = Places(asked.root), list(dict.fromkeys(run.row.name for run in runs))
    keys = {run.key for run in runs}
    took = seconds_of(places, keys)
    counted = f"{len(rows)} rows, {len(keys)} runs, {len(took)} of them done"
    if asked.scale.world is None and runs:
        return f"{priced(asked, runs, load_of(runs, asked, console), console)}\n{counted}"
    if took:
        each = sum(sum(one.values()) for one in took) / len(took)
        counted += f"; {each:.0f} s a run, so {each * (len(keys) - len(took)) / 3600:.1f} core-hours are left"
    return "\n".join([*rows, counted])
