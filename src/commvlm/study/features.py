"""Encoders run once for the whole study: a store of every layer's features per encoder, and each run's view of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..train.features import store_recipe
from ..train.recipe import Encoder, Recipe
from .runs import Places, Run, weights_hash


def readable(run: Run) -> bool:
    """Whether a run's encoders can be read from a store: trained ones, on the images themselves. Random twins are others
    with every seed, and controls see other images."""
    return run.row.pixels == "given" and all(branch.weights == "checkpoint" for branch in run.recipe.model.encoders)


def prepare_features(places: Places, runs: Iterable[Run], *, kept: str) -> None:
    """Makes the stores that lack, and every run's folder of links to its own: what `train.features` of its recipe names.

    kept: "fp32", "bf16" or "int8". Raises what `train.features.store_recipe` does.
    """
    made = set[Path]()
    wanted = [run for run in runs if readable(run) and not places.done(run.key)]
    for run in wanted:
        view = places.view(run.key)
        view.mkdir(parents=True, exist_ok=True)
        for branch in run.recipe.model.encoders:
            store = places.root / "features" / _store_name(branch, run.recipe.model.pad_color, kept)
            if store not in made:
                store_recipe(_alone(run.recipe, branch), store, layers="all", kept=kept)
                made.add(store)
            _link(view / branch.name, store / _own_name(branch))


def _alone(recipe: Recipe, branch: Encoder) -> Recipe:
    """The recipe with one encoder, every layer of it, whatever a row calls it."""
    bare = Encoder(_own_name(branch), branch.checkpoint, image_size=branch.image_size, final_norm=branch.final_norm)
    return replace(recipe, model=replace(recipe.model, encoders=[bare]), train=replace(recipe.train, features=None))


def _own_name(branch: Encoder) -> str:
    """By its checkpoint: "micro_clip"."""
    return re.sub(r"\W", "_", branch.checkpoint.rstrip("/").rpartition("/")[2])


def _store_name(branch: Encoder, pad_color: Sequence[int], kept: str) -> str:
    said = [weights_hash(branch.checkpoint), branch.image_size, branch.final_norm, list(pad_color), kept]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.resolve() == target.resolve():
        return
    part = link.with_name(link.name + ".part")
    part.unlink(missing_ok=True)
    part.symlink_to(target.resolve(), target_is_directory=True)
    os.replace(part, link)
