"""Every layer of several frozen encoders, and of controls, under the same questions: features once, then small heads.

OUT/features/NAME     a store for each encoder (`model.feature_store`); a random twin's is removed when it has been read
OUT/units/*.npz       one file a source and place: what each seed got on each test image
OUT/probe.json        what was asked of what, so that another call goes on or is refused
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..model.feature_store import image_key
from ..model.feature_writer import store_features
from ..model.frozen import FrozenEncoder, open_frozen
from ..model.spec import EncoderSpec, vision_config
from ..model.storage import write_text, writing
from .fitting import MERGES, Fitting, Source, Unit, fit_unit, set_up, unit_done
from .problem import Grid, Picture, Problem, truth_of
from .tasks import TASKS, Effort

VERSION = 2
"""2: in presence and region a learned merge sees each patch before the mean is taken."""


@dataclass(frozen=True)
class Settings:
    """What is asked. layers: of every encoder; merges are read where that is all of them. seeds: of heads. twins: every
    encoder's random twin, one seed. kept: how features are kept (`model.feature_store.KEPT`)."""

    layers: str = "all"
    tasks: tuple[str, ...] = TASKS
    heads: tuple[str, ...] = ("linear", "mlp")
    seeds: int = 3
    twins: bool = True
    merges: bool = True
    kept: str = "bf16"
    effort: Effort = field(default_factory=Effort)


def run_probe(
    problem: Problem, encoders: Sequence[EncoderSpec], out: Path, *, settings: Settings, jobs: int = 2, batch: int = 32
) -> list[Source]:
    """Reads every encoder into OUT and returns what was read; an interrupted call is repeated, one with more encoders adds
    those. jobs: processes of one thread that fit heads. batch: images encoded at once.

    Raises ValueError where OUT holds other questions, or features of other weights; OSError when the disk is full.
    """
    with writing(out):
        return _run(problem, encoders, out, settings, jobs=jobs, batch=batch)


def _run(
    problem: Problem, encoders: Sequence[EncoderSpec], out: Path, settings: Settings, *, jobs: int, batch: int
) -> list[Source]:
    specs = list(_specs(encoders, settings))
    for spec, _ in specs:
        vision_config(
            [spec], fuse="channel-concat", reduce="none", language_width=1
        )  # its layers, and what it is read by
    _claim(out, problem, settings)
    passes = _Passes(problem, out, settings, batch=batch)
    sources = [passes.source(spec, kind) for spec, kind in specs]
    fitting = passes.fitting(sources)
    sources += [_position(grid) for grid in sorted(fitting.truths)]
    units = [unit for source in sources for unit in units_of(source, settings)]
    _record(out, sources)
    _fit_all(fitting, units, jobs=jobs)
    for source in sources:
        if source.kind == "twin" and source.folder is not None:
            shutil.rmtree(source.folder, ignore_errors=True)
    return sources


def _claim(out: Path, problem: Problem, settings: Settings) -> None:
    """Makes OUT this probe's. Raises ValueError where it holds another one's, naming what differs."""
    path = out / "probe.json"
    asked = json.loads(json.dumps({"data": problem.name, "questions": problem.fingerprint(), **asdict(settings)}))
    if path.exists():
        kept = read_record(out)["asked"]
        differs = next((name for name in asked if kept.get(name) != asked[name]), None)
        if differs is not None:
            raise ValueError(
                f"{out} was made with {differs} {kept.get(differs)!r}, now it is {asked[differs]!r}; choose another --out"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no probe; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    words = {"words": list(problem.words), "categories": problem.categories}
    images = {"train": len(problem.train), "test": len(problem.test)}
    write_text(path, json.dumps({"version": VERSION, "asked": asked, **words, **images, "sources": {}}, indent=1))


def read_record(out: Path) -> dict[str, Any]:
    """What OUT/probe.json says. Raises ValueError where there is none."""
    try:
        record = json.loads((out / "probe.json").read_text(encoding="utf-8"))
        if record["version"] == VERSION:
            return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{out} holds no probe (no usable probe.json); run commvlm probe ENCODER --out {out}"
        ) from error
    raise ValueError(f"{out} holds a probe of version {record['version']}, not {VERSION}; run it again elsewhere")


def _record(out: Path, sources: Sequence[Source]) -> None:
    """Adds what was read."""
    record = read_record(out)
    for source in sources:
        record["sources"][source.name] = {**asdict(source), "folder": None if source.folder is None else source.name}
    write_text(out / "probe.json", json.dumps(record, indent=1))


def _specs(encoders: Sequence[EncoderSpec], settings: Settings) -> Iterator[tuple[EncoderSpec, str]]:
    """What is encoded: every encoder, and its random twin where it is trained."""
    names = [spec.name for spec in encoders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two encoders are called {twice!r}; name them apart, as NAME=CHECKPOINT")
    for spec in encoders:
        asked = dataclasses.replace(spec, layers=[entry.strip() for entry in settings.layers.split(",")])
        yield asked, "random" if spec.weights == "random" else "trained"
        if settings.twins and spec.weights != "random":
            yield dataclasses.replace(asked, weights="random"), "twin"


class _Passes:
    """The encoders' passes over the images, each made once; what is stored already is not encoded again."""

    def __init__(self, problem: Problem, out: Path, settings: Settings, *, batch: int) -> None:
        self.problem, self.out, self.settings, self.batch = problem, out, settings, batch
        self.keys_path = out / "keys.json"
        self.keys: dict[str, str] = json.loads(self.keys_path.read_text()) if self.keys_path.exists() else {}

    def source(self, spec: EncoderSpec, kind: str) -> Source:
        """Encodes what lacks."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        frozen = open_frozen(spec, geometry=self.problem.geometry, device=device)
        name = f"{spec.name}-twin" if kind == "twin" else spec.name
        identity = hashlib.sha256(json.dumps(frozen.identity()).encode()).hexdigest()[:16]
        source = Source(
            name, kind, spec.name, spec.checkpoint, frozen.grid, frozen.depth, frozen.layers, identity,
            self.out / "features" / name, spec.image_size, spec.weights, frozen.encoder.config.model_type,
        )  # fmt: skip
        lacking = [u for u in units_of(source, self.settings) if not unit_done(self.out / "units", u)]
        if lacking or not self.keys.keys() >= {p.identity for p in (*self.problem.train, *self.problem.test)}:
            self._encode(source, frozen)
        return source

    def _encode(self, source: Source, frozen: FrozenEncoder) -> None:
        assert source.folder is not None
        pictures = [*self.problem.train, *self.problem.test]
        with _bar() as bar:
            images = self._shown(bar, f"encoding with {source.name}", pictures)
            store_features(source.folder, frozen, images, kept=self.settings.kept, batch=self.batch)
        write_text(self.keys_path, json.dumps(self.keys))

    def _shown(self, bar: Progress, said: str, pictures: Iterable[Picture]) -> Iterator[Image.Image]:
        for picture in bar.track(list(pictures), description=said):
            image = picture.open()
            self.keys[picture.identity] = image_key(image)
            yield image

    def fitting(self, sources: Sequence[Source]) -> Fitting:
        """What the units share."""
        problem = self.problem
        grids: dict[Grid, Any] = dict.fromkeys(source.grid for source in sources)
        for grid in grids:
            grids[grid] = tuple(
                truth_of(problem.words, pictures, grid, geometry=problem.geometry)
                for pictures in (problem.train, problem.test)
            )
        (self.out / "units").mkdir(exist_ok=True)
        return Fitting(
            self.out / "units", grids, tuple(self.keys[p.identity] for p in problem.train),
            tuple(self.keys[p.identity] for p in problem.test), problem.categories, self.settings.tasks, self.settings.effort,
        )  # fmt: skip


def units_of(source: Source, settings: Settings) -> list[Unit]:
    """The source's places: its layers, then merges of them. Twins and the position control have one seed and no merges."""
    if source.kind == "position":
        return [Unit(source, "none", 1, settings.heads)]
    if source.kind == "twin":
        return [Unit(source, str(layer), 1, settings.heads) for layer in source.layers]
    units = [Unit(source, str(layer), settings.seeds, settings.heads) for layer in source.layers]
    if settings.merges and len(source.layers) == source.depth > 1:
        # A learned merge is read by the MLP alone: it has linear maps of its own.
        units += [
            Unit(source, place, settings.seeds, ("mlp",) if place.startswith("lln") else settings.heads)
            for place in MERGES
        ]
    return units


def _position(grid: Grid) -> Source:
    name = f"position-{grid[0]}x{grid[1]}"
    return Source(name, "position", name, "", grid, 0, (), f"position {grid}", None)


def _fit_all(fitting: Fitting, units: Sequence[Unit], *, jobs: int) -> None:
    """What is not done, with a bar that knows what is left. The dearest come last: what is stopped early has its curves."""
    waiting = sorted((unit for unit in units if not fitting.done(unit)), key=lambda unit: unit.cost)
    total = sum(unit.cost for unit in units)
    with _bar() as bar:
        task = bar.add_task("fitting heads", total=total, completed=total - sum(unit.cost for unit in waiting))
        if jobs == 1 or len(waiting) < 2:
            set_up(fitting)
            for unit in waiting:
                bar.update(task, advance=fit_unit(unit).cost)
            return
        with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=set_up, initargs=(fitting,)) as pool:
            futures = [pool.submit(fit_unit, unit) for unit in waiting]
            try:
                for future in as_completed(futures):
                    bar.update(task, advance=future.result().cost)
            except BrokenProcessPool as error:
                raise ValueError(
                    "a process that fits heads was ended from outside, most likely for want of memory: repeat the command "
                    "with --jobs 1, what is done is kept; or go to another --out with --no-merges or fewer --train and --test"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
