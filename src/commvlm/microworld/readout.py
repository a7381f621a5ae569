"""The micro world under the probe's questions: scenes with their truth, and what an encoder's features say of them.

A random-initialised twin of an encoder is read the same way, which is what it must beat before it may be called trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from ..model.encoders import read_layers
from ..probe.heads import standardise
from ..probe.problem import Picture, Problem, Truth, truth_of
from ..probe.problem import Thing as Named
from ..probe.tasks import Effort, Material
from ..probe.tasks import read_out as ask
from .pretrain.symbols import GRID
from .pretrain.vit import normalised
from .scene import COLORS, SIDE, Scene, render, sample_scene, world_of


@dataclass(frozen=True)
class Seen:
    """Scenes of one split and their truth on the tiny encoders' grid. categories: how many of the words are."""

    scenes: list[Scene]
    truth: Truth
    categories: int


@dataclass(frozen=True)
class Reading:
    """presence: mean AUC over categories (linear). rec: share of named objects whose box is found with IoU >= 0.5 (MLP)."""

    presence: float
    rec: float


def micro_problem(*, train: int, test: int, difficulty: str = "easy") -> Problem:
    """Rendered scenes that no encoder was trained on: where is the red star, is there a star, what is this patch of."""
    words = (*world_of(difficulty).categories, *COLORS)
    pictures = []
    for split, count in (("probe-train", train), ("probe-test", test)):
        said = f"drawing {count} {difficulty} scenes"
        places = track(range(count), said, console=Console(stderr=True), transient=True)
        pictures.append(tuple(_picture(sample_scene(split, index, difficulty), difficulty) for index in places))
    return Problem(f"micro:{difficulty}", words, len(words) - len(COLORS), train=pictures[0], test=pictures[1])


def _picture(scene: Scene, difficulty: str) -> Picture:
    pixels = render(scene, difficulty)
    return Picture(f"{difficulty}/{scene.name}", (SIDE, SIDE), partial(Image.fromarray, pixels), _named(scene))


def _named(scene: Scene) -> tuple[Named, ...]:
    """Every object, named by its category and colour, which no other object of the scene has both."""
    return tuple(
        Named(tuple(float(v) for v in t.box), (t.category, t.color), ((t.category, t.color),))  # type: ignore[arg-type]
        for t in scene.things
    )


def probe_scenes(split: str, count: int, difficulty: str) -> tuple[Seen, Tensor]:
    """`count` scenes of a split with their truth, and their pixels uint8 (count, 64, 64, 3)."""
    scenes = [sample_scene(split, index, difficulty) for index in range(count)]
    words = (*world_of(difficulty).categories, *COLORS)
    categories = len(words) - len(COLORS)
    pictures = [Picture(scene.name, (SIDE, SIDE), Image.Image, _named(scene)) for scene in scenes]
    pixels = torch.from_numpy(np.stack([render(scene, difficulty) for scene in scenes]))
    return Seen(scenes, truth_of(words, pictures, (GRID, GRID)), categories), pixels


def features(encoder: PreTrainedModel, pixels: Tensor, *, family: str, layers: Sequence[int]) -> list[Tensor]:
    """[layer](scenes, 64, d) in float32. pixels: uint8 (scenes, 64, 64, 3)."""
    parts = [read_layers(encoder, normalised(p, family), layers=layers) for p in pixels.split(256)]
    return [torch.cat([part[k] for part in parts]).float() for k in range(len(layers))]


def read_out(train: tuple[Tensor, Seen], test: tuple[Tensor, Seen], *, steps: int = 1200, seed: int = 0) -> Reading:
    """Two of the probe's heads fitted on one layer's training features (`steps` updates) and scored on its test features."""
    (x, seen), (y, held) = train, test
    fitted, asked = standardise(x, y)
    material = Material((GRID, GRID), seen.categories, fitted, asked, seen.truth, held.truth)
    effort = Effort(steps=steps)
    presence = ask(material, ("presence",), head="linear", seed=seed, effort=effort)["auc"]
    rec = ask(material, ("rec",), head="mlp", seed=seed, effort=effort)["rec"]
    return Reading(presence.value, rec.value)
