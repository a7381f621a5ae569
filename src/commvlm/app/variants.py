"""The demo's runs: COMM, and the controls it is read against. Each is the same recipe with one thing changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..train.recipe import Encoder, Recipe, load_recipe

RECIPE = "micro"


@dataclass(frozen=True)
class Variant:
    """label, change: for the report. encoders: the recipe's encoders -> this run's. options: further recipe options."""

    label: str
    change: str
    encoders: Callable[[Sequence[Encoder]], list[Encoder]] = list
    options: tuple[str, ...] = ()


def _clip_last(encoders: Sequence[Encoder]) -> list[Encoder]:
    return [dataclasses.replace(e, layers=-1, merge="mean") for e in encoders if e.name == "clip"]


def _random_twin(encoders: Sequence[Encoder]) -> list[Encoder]:
    return [dataclasses.replace(e, weights="random") if e.name == "dinov2" else e for e in encoders]


VARIANTS: dict[str, Variant] = {
    "comm": Variant("COMM", "CLIP, all layers, and DINOv2, deep layers"),
    "clip-last": Variant("CLIP last layer", "the last layer of CLIP alone", encoders=_clip_last),
    "random-twin": Variant("random twin", "COMM with random weights in DINOv2's place", encoders=_random_twin),
    "blind": Variant("blind", "COMM, every image replaced by grey", options=("--data.pixels", "grey")),
}


def overrides(name: str, *, world: Path, recipe: str = RECIPE) -> list[str]:
    """The options that make the recipe this variant's, its data in the folder `world`."""
    variant = VARIANTS[name]
    given: Recipe = load_recipe(recipe)
    encoders = variant.encoders(given.model.encoders)
    changed = [] if encoders == given.model.encoders else ["--model.encoders", json.dumps(_brief(encoders))]
    return [*changed, *variant.options, "--data.root", str(world)]


def _brief(encoders: Sequence[Encoder]) -> list[dict[str, object]]:
    """Encoders as a recipe writes them, without what is left at its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(Encoder)}
    return [{k: v for k, v in dataclasses.asdict(e).items() if v != defaults[k]} for e in encoders]
