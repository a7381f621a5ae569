"""`commvlm probe`: names become encoders, data becomes questions; then curves, maps, and the page."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..microworld.readout import micro_problem
from ..model.checkpoints import find_checkpoint
from ..model.families import family_of, vision_half
from ..model.frozen import FrozenEncoder, open_frozen
from ..model.spec import EncoderSpec, build_config
from ..model.storage import write_text
from ..probe.advise import Agreement, advise, recipe_text
from ..probe.curves import Probe
from ..probe.problem import Picture, Problem
from ..probe.refer import refer_problem
from ..probe.run import Settings, run_probe
from ..train.assemble import MICRO, located, model_settings
from ..train.recipe import load_recipe
from .cards import shipped_parts
from .probe_maps import draw_maps
from .probe_report import TRAINED, agreements, write_probe_report

EVERY = "micro"
"""Stands for all tiny encoders that are shipped, and, as data, for rendered scenes."""
SIZE = 360
"""Pixels of a map's side in the page."""


def encoder_specs(
    names: Sequence[str], *, weights: str = "checkpoint", image_size: int | None = None
) -> list[EncoderSpec]:
    """Encoders by name: a shipped tiny one's ("clip"), a folder, a hub id, NAME=any of these to call it NAME, or "micro" for
    all shipped tiny ones. Raises CheckpointError, naming the nearest one, for a checkpoint that there is not."""
    found = []
    for given in names:
        name, _, checkpoint = given.rpartition("=")
        for each in tiny_encoders() if checkpoint == EVERY else [checkpoint]:
            path = located(f"{MICRO}{each}" if each in tiny_encoders() else each)
            own = name or re.sub(r"\W", "_", each.rstrip("/").removeprefix(MICRO).rpartition("/")[2])
            find_checkpoint(path)
            found.append(EncoderSpec(own, path, image_size=image_size, weights=weights))
    return found


def tiny_encoders() -> list[str]:
    """The shipped tiny encoders, in the order that reports show them: CLIP, DINOv2, then the others by name."""
    names = []
    for folder in sorted(shipped_parts().iterdir()):
        if not (folder / "config.json").exists():
            continue
        try:
            family_of(vision_half(find_checkpoint(str(folder)).config))
        except ValueError:
            continue  # the language model
        names.append(folder.name)
    first = [name for name in ("clip", "dinov2") if name in names]
    return first + [name for name in names if name not in first]


def problem_of(data: str, *, images: Path | None, train: int, test: int) -> Problem:
    """ "micro" or "micro:hard": rendered scenes; otherwise a folder or file of referring expressions (`probe.refer`)."""
    kind, _, difficulty = data.partition(":")
    if kind == EVERY and not Path(data).exists():
        return micro_problem(train=train, test=test, difficulty=difficulty or "easy")
    if not Path(data).exists():
        raise ValueError(f"{data}: there is no such folder or file; give one of referring expressions, or micro")
    return refer_problem(Path(data), images=images, train=train, test=test)


def probe(
    encoders: Sequence[EncoderSpec], problem: Problem, out: Path, *, settings: Settings, jobs: int, batch: int
) -> Path:
    """Runs the probe, draws the maps of one test image, writes OUT/findings.md and OUT/report.html; returns the latter."""
    sources = run_probe(problem, encoders, out, settings=settings, jobs=jobs, batch=batch)
    shown = next(picture for picture in problem.test if picture.things)
    asked = {source.encoder for source in sources if source.kind in ("trained", "random")}
    _maps([spec for spec in encoders if spec.name in asked], shown, out / "maps", geometry=problem.geometry)
    return write_probe_report(out)


def _maps(encoders: Sequence[EncoderSpec], picture: Picture, out: Path, *, geometry: str) -> None:
    """Figure 1 of the largest object's centre in one test image, and its principal components: a shallow, a middle, a deep
    layer of each encoder."""
    out.mkdir(exist_ok=True)
    image = picture.open()
    x1, y1, x2, y2 = max((thing.box for thing in picture.things), key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
    sources = [open_frozen(spec, geometry=geometry) for spec in encoders]
    places = [(source, shown_layers(source)) for source in sources]
    for name, point in (("similarity", ((x1 + x2) / 2, (y1 + y2) / 2)), ("principal", None)):
        draw_maps(image, places, out / f"{name}.png", at=point, side=SIZE)


def shown_layers(source: FrozenEncoder) -> list[int]:
    """A shallow, a middle and the last layer: a quarter, a half and the whole of what is read."""
    layers = source.layers
    return sorted({layers[max(0, round(len(layers) * share) - 1)] for share in (0.25, 0.5, 1.0)})


def open_maps(
    image: Path, names: Sequence[str], layers: str, out: Path, *, at: tuple[float, float] | None, weights: str
) -> Path:
    """`commvlm probe simmap` and `pca`: the maps of one image as a PNG. layers: of every encoder; "" for three of each."""
    from ..data.images import open_image

    asked = [entry.strip() for entry in layers.split(",")] if layers else "all"
    picture: Image.Image = open_image(image)
    places = []
    for spec in encoder_specs(names, weights=weights):
        source = open_frozen(EncoderSpec(spec.name, spec.checkpoint, layers=asked, weights=spec.weights))  # type: ignore[arg-type]
        places.append((source, list(source.layers) if layers else shown_layers(source)))
    return draw_maps(picture, places, out, at=at)


def advise_recipe(out: Path, tasks: Sequence[str], *, head: str, extends: str, recipe: Path | None) -> str:
    """The advised recipe as YAML, its evidence at its head; written to `recipe`, OUT/advised.yaml by default, and checked.

    Raises ValueError for tasks that were not asked, and for a recipe that cannot be built from the advice.
    """
    probe = Probe(out)
    named = list(tasks) or list(probe.record["asked"]["tasks"])
    advices = [advise(probe, task, head=head) for task in named]
    checkpoints = {name: _as_said(probe.sources[name]["checkpoint"]) for name in probe.encoders()}
    text = recipe_text(probe, advices, checkpoints=checkpoints, extends=extends, name=f"advised-{'-'.join(named)}")
    path = recipe or out / "advised.yaml"
    unchecked = path.with_name(f".unchecked-{path.name}")
    try:
        write_text(unchecked, text)
        build_config(**model_settings(load_recipe(unchecked).model))
        os.replace(unchecked, path)
    finally:
        unchecked.unlink(missing_ok=True)
    return text


def _as_said(checkpoint: str) -> str:
    """A shipped tiny one's name in a recipe; other checkpoints as they are."""
    path = Path(checkpoint)
    return f"{MICRO}{path.name}" if path.parent == shipped_parts() else checkpoint


def compare_trained(out: Path, trained: Path, *, head: str) -> dict[str, Agreement]:
    """Task -> rank correlation of the probe with trained models; the file is kept in OUT, and the page is written again."""
    found = agreements(Probe(out), trained, head=head)
    if trained.resolve() != (out / TRAINED).resolve():
        write_text(out / TRAINED, trained.read_text(encoding="utf-8"))
    write_probe_report(out)
    return found
