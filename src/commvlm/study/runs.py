"""Runs: a row with a seed, known by the hash of everything that its result depends on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..evaluate.receipts import fingerprint, write_json
from ..model.checkpoints import ask_hub
from ..model.spec import build_config
from ..model.storage import write_text
from ..train.assemble import BOOKKEEPING, located, model_settings
from ..train.recipe import Model, Recipe, Source, Train, as_yaml, load_recipe
from .rows import Row
from .settings import Scale

FORMAT = 2
"""Counted up when a run's result would be another one for the same recipe."""
FORMATS = {"conv-layerscale": 2}
"""Of merges, counted up likewise: only the runs that have one are run anew."""
BUSY = os.EX_TEMPFAIL
"""Exit code of a worker that leaves its run to another process, which is at work on it."""
LOSSY = ("bf16", "int8")
PLACES = ("_name_or_path", "transformers_version")
"""Keys of a folder's config that say where it lies; a hub checkpoint's has others that tell nothing, `BOOKKEEPING`."""
BESIDE = ("features", "save_every", "keep", "report_to")
"""Of a recipe's training, what changes no result: where features lie, and what is written beside it."""
ABOUT = ("card.json", "pretraining.json", "README.md")
"""Files beside a model's weights that say how it was made and how good it is, and change nothing."""


@dataclass(frozen=True)
class Run:
    """key: its folder's name. recipe: what is trained and asked."""

    row: Row
    seed: int
    recipe: Recipe
    key: str

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


@dataclass(frozen=True)
class Places:
    """Where a study keeps what it makes: jobs/KEY.yaml, runs/KEY/, results/KEY.json, logs/KEY.txt, features/, figures/,
    failed.json."""

    root: Path

    @property
    def figures(self) -> Path:
        """Pictures that are drawn once."""
        return self.root / "figures"

    @property
    def failures(self) -> Path:
        return self.root / "failed.json"

    def job(self, key: str) -> Path:
        return self.root / "jobs" / f"{key}.yaml"

    def run(self, key: str) -> Path:
        return self.root / "runs" / key

    def result(self, key: str) -> Path:
        return self.root / "results" / f"{key}.json"

    def view(self, key: str) -> Path:
        """Of the feature stores, what a run reads."""
        return self.root / "features" / "views" / key

    def log(self, key: str) -> Path:
        return self.root / "logs" / f"{key}.txt"

    def clock(self, key: str) -> Path:
        """Seconds of a run's processes, while it is not done."""
        return self.root / "clocks" / f"{key}.json"

    def lock(self, key: str) -> Path:
        return self.root / "locks" / key

    def done(self, key: str) -> bool:
        return self.result(key).is_file()


def runs_of(scale: Scale, rows: Iterable[Row], *, data: str) -> list[Run]:
    """Every row with each of its seeds, seeds outermost: after the first third of the time every row has one result.
    Rows that are one run by two names have the seeds of the one that has more.

    data: the folder of the data. Raises ValueError as `settled_of` does.
    """
    rows = list(rows)
    settled = settled_of(rows)
    same = {row.name: (settled[row.name], row.pixels) for row in rows}
    seeds: dict[tuple[str, str], int] = {}
    for row in rows:
        seeds[same[row.name]] = max(scale.seeds_of(row.name), seeds.get(same[row.name], 0))
    made = []
    for seed in range(max(seeds.values(), default=0)):
        for row in rows:
            if seed < seeds[same[row.name]]:
                recipe = recipe_of(scale, row, seed, data=data)
                made.append(Run(row, seed, recipe, _key(recipe, settled[row.name], scale)))
    return made


def settled_of(rows: Sequence[Row]) -> dict[str, str]:
    """Each row's model in full, by the row's name. Raises ValueError naming every row that cannot be built."""
    settled: dict[str, str] = {}
    impossible: dict[str, list[str]] = {}
    for name in {name for row in rows for name in _weights(row.model)}:
        ask_hub(name)
    for row in rows:
        try:
            settled[row.name] = _settled(row)
        except ValueError as error:
            impossible.setdefault(str(error), []).append(row.name)
    if impossible:
        count = sum(len(names) for names in impossible.values())
        said = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in impossible.items())
        raise ValueError(f"{count} of {len(rows)} rows cannot be run: {said}")
    return settled


def recipe_of(scale: Scale, row: Row, seed: int, *, data: str) -> Recipe:
    """The base recipe with the row's model, what it sees, and the seed."""
    base = scale.base
    return replace(
        base,
        name=f"{scale.name}: {row.name}",
        model=row.model,
        data=replace(base.data, root=data, pixels=row.pixels),
        train=replace(base.train, seed=seed),
    )


def _settled(row: Row) -> str:
    """The model in full, so that two ways to say one thing ("-1", "8") are one run; neither what an encoder is called nor
    where its files lie on this machine makes another one."""
    branches = row.model.encoders
    config = build_config(**model_settings(row.model)).to_dict()
    hub = not all(Path(located(name)).is_dir() for name in _weights(row.model))
    renamed = {branch.name: f"encoder {k}" for k, branch in enumerate(branches)}
    weights = [branch.weights for branch in branches]
    files = [weights_hash(branch.checkpoint) for branch in branches]
    plain = _portable(config, renamed, BOOKKEEPING if hub else PLACES)
    said = [plain, weights, files, weights_hash(row.model.language_model)]
    said += [
        f"{merge} {FORMATS[merge]}" for merge in sorted({_kind(branch.merge) for branch in branches} & set(FORMATS))
    ]
    return json.dumps(said, sort_keys=True, default=str)


def _kind(merge: str | dict[str, Any]) -> str:
    return merge if isinstance(merge, str) else str(merge.get("kind"))


def _weights(model: Model) -> list[str]:
    return [*(branch.checkpoint for branch in model.encoders), model.language_model]


def _portable(value: Any, renamed: Mapping[str, str], dropped: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {renamed.get(k, k): _portable(v, renamed, dropped) for k, v in value.items() if k not in dropped}
    if isinstance(value, list | tuple):
        return [_portable(item, renamed, dropped) for item in value]
    return renamed.get(value, value) if isinstance(value, str) else value


@lru_cache(maxsize=64)
def weights_hash(checkpoint: str) -> str:
    """Of a recipe's checkpoint: of its folder's files but those that only tell about it, or the hub id itself."""
    folder = Path(located(checkpoint))
    if not folder.is_dir():
        return checkpoint
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in ABOUT)
    said = [f"{path.name} {fingerprint(path)['sha256']}" for path in files]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _key(recipe: Recipe, settled: str, scale: Scale) -> str:
    """Of the settled model, all else that the recipe says and that a result may depend on, the files that it reads,
    what is asked, and how features are kept where that loses something."""
    bare = replace(
        recipe,
        name="",
        model=replace(recipe.model, encoders=[], language_model=""),
        data=replace(recipe.data, root="", workers=0),
        train=replace(recipe.train, **{name: getattr(Train(), name) for name in BESIDE}),
    )
    sources = [*recipe.data.sources, *recipe.data.held_out, *recipe.evaluate.sources]
    files = sorted({path for source in sources for path in _paths(source, recipe.data.root)})
    read = [_file_hash(path, *_stamp(path)) for path in files]
    kept = scale.features if scale.features in LOSSY else "exact"
    said = "\0".join([str(FORMAT), as_yaml(bare), settled, *sorted(scale.tasks), kept, *read])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _paths(source: Source, root: str) -> list[str]:
    return [str(Path(root) / file) for file in source.files.values()]


def _stamp(path: str) -> tuple[int, int]:
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the study's data are not complete (docs/data.md)") from error
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=256)
def _file_hash(path: str, size: int, stamp: int) -> str:
    return str(fingerprint(Path(path))["sha256"])


class AtWork(ValueError):
    """Another process makes the result."""


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """This process alone makes a result. Raises AtWork where another one does, such as one whose study was killed."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AtWork(f"{lock.name} is at work in another process: wait for it, then run the study again") from None
        yield


def at_work(lock: Path) -> bool:
    """Whether a process makes the result now. The kernel holds a lock for as long as its process lives, so this is tried out
    by having it for a moment: not to be asked of a run that has just been started."""
    try:
        with alone(lock) if lock.is_file() else nullcontext():
            return False
    except AtWork:
        return True


def write_jobs(places: Places, runs: Iterable[Run]) -> None:
    """jobs/KEY.yaml of every run that is not done. One that was begun is left as it is, and goes on so, whatever its recipe
    says now of what is written beside a result; but where its data, features or weights are no longer where it says, since
    the study or they were moved, it is written anew and begun again. Rows of one key are one run, however they are called.

    Raises AtWork where a process is still at work on what would be begun again.
    """
    for run in runs:
        job, text = places.job(run.key), as_yaml(run.recipe)
        if places.done(run.key) or _kept(job) == text or (places.run(run.key).exists() and _holds(job, run.recipe)):
            continue
        with alone(places.lock(run.key)):
            shutil.rmtree(places.run(run.key), ignore_errors=True)
            job.parent.mkdir(parents=True, exist_ok=True)
            write_text(job, text)


def _kept(job: Path) -> str:
    return job.read_text(encoding="utf-8") if job.is_file() else ""


def _holds(job: Path, recipe: Recipe) -> bool:
    """Whether a job's places are those of a recipe of the same key, or hold the same; not so of none, or a broken one."""
    try:
        old = load_recipe(job)
    except ValueError:
        return False
    places = (old.data.root, old.train.features) == (recipe.data.root, recipe.train.features)
    return places and [*map(weights_hash, _weights(old.model))] == [*map(weights_hash, _weights(recipe.model))]


def seconds_of(places: Places, keys: Iterable[str]) -> list[dict[str, float]]:
    """What training and asking each of these runs that is done took, by its result. Raises ValueError for a broken one."""
    return [_json(places.result(key))["seconds"] for key in keys if places.done(key)]


def failed(places: Places) -> dict[str, dict[str, Any]]:
    """Of each run that failed and is not done yet, by its key: row, seed and reason."""
    said = _json(places.failures) if places.failures.is_file() else {}
    return {key: about for key, about in said.items() if not places.done(key)}


def note_failed(places: Places, *new: tuple[Run, str]) -> None:
    """failed.json with these runs and their reasons, and without those that are done. A disk that is full keeps the old one:
    what goes on may still end."""
    about = {run.key: {"row": run.row.name, "seed": run.seed, "reason": reason} for run, reason in new}
    if about or places.failures.is_file():
        with suppress(OSError):
            write_json({**failed(places), **about}, places.failures)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error.msg}); remove it and run the study again") from error


def write_grid(places: Places, runs: Iterable[Run], facts: dict[str, Any]) -> None:
    """grid.json: what the study at this folder is made of; the report is drawn from it."""
    rows: dict[str, Any] = {}
    for run in runs:
        row = rows.setdefault(
            run.row.name,
            {"at": dict(run.row.at), "pixels": run.row.pixels, "model": asdict(run.row.model), "runs": {}},
        )
        row["runs"][str(run.seed)] = run.key
    write_json({**facts, "rows": rows}, places.root / "grid.json")
