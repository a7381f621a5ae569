"""A recipe's encoders on its training images, once: what `train.features` then reads in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..data.images import OPENERS
from ..data.store import image_codes
from ..model.feature_store import FeatureStore
from ..model.feature_writer import store_features
from ..model.frozen import open_frozen
from ..model.layers import LayerSpec
from .assemble import encoder_spec
from .recipe import Recipe
from .sources import training_examples


def store_recipe(
    recipe: Recipe, out: Path, *, layers: LayerSpec | None = None, kept: str = "bf16", batch: int = 32
) -> dict[str, FeatureStore]:
    """Features of every encoder of the recipe on every image of its sources, in OUT/NAME of each; resumes.

    layers: of every encoder; None is those that the recipe asks for. "all" serves every recipe that differs in layers and
    merges only. They are computed in train.precision, as training would. Raises as `store_features` does, and ValueError for
    an image that cannot be opened, unless data.faults is skip.
    """
    found = training_examples(recipe.data)
    paths = list(dict.fromkeys(path for examples in found.values() for path in image_codes(examples)[0]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stores = {}
    for encoder in recipe.model.encoders:
        spec = encoder_spec(encoder)
        source = open_frozen(
            spec if layers is None else dataclasses.replace(spec, layers=layers),
            pad_color=recipe.model.pad_color,
            seed=recipe.train.seed,
            device=device,
        )
        images = _pictures(recipe, paths, said=f"features of {encoder.name}")
        folder = out / encoder.name
        stores[encoder.name] = store_features(
            folder, source, images, kept=kept, computed=recipe.train.precision, batch=batch
        )
    return stores


def _pictures(recipe: Recipe, paths: list[Path], *, said: str) -> Iterator[Image.Image]:
    """The images as training shows them, with a bar on stderr."""
    opened = OPENERS[recipe.data.pixels]
    for path in track(paths, said, console=Console(stderr=True)):
        try:
            image = opened(path)
        except ValueError:
            if recipe.data.faults == "refuse":
                raise
            continue
        yield image
