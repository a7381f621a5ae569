"""One unit of a probe: the heads of all seeds on one place of one source, and what they got on each test image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..model.feature_store import FeatureStore
from .heads import standardise
from .problem import Grid, Truth, patch_centers
from .tasks import Effort, Material, read_out

MERGES = ("mean(half)", "mean(all)", "lln-layerscale(all)")
"""Places beside single layers: the mean of the second half of the layers, of all, and a merge learned with the head."""
CODES = 128
_BROKEN = (OSError, ValueError, KeyError, EOFError, BadZipFile)
"""What NumPy raises on a damaged file."""


@dataclass(frozen=True)
class Source:
    """What features come from. kind: "trained", "twin" (its random weights), "random" or "position" (no image at all).
    encoder: the name that its curve goes by. layers: those that are read, of `depth`. identity: hash of what its features
    depend on. folder: of its store; None for "position". image_size, weights: as `recipe.Encoder` says them. family: the
    library's name of its architecture."""

    name: str
    kind: str
    encoder: str
    checkpoint: str
    grid: Grid
    depth: int
    layers: tuple[int, ...]
    identity: str
    folder: Path | None
    image_size: int | None = None
    weights: str = "checkpoint"
    family: str = ""


@dataclass(frozen=True)
class Unit:
    """place: a layer's number as text, or one of `MERGES`."""

    source: Source
    place: str
    seeds: int
    heads: tuple[str, ...]

    @property
    def cost(self) -> int:
        """How long it takes beside others, roughly."""
        return self.seeds * len(self.heads) * (8 if self.place.startswith("lln") else 1)


def unit_path(folder: Path, unit: Unit) -> Path:
    """The file of a unit's results."""
    return folder / f"{unit.source.name}.{unit.place}.npz"


def unit_done(folder: Path, unit: Unit) -> bool:
    """Whether the unit's results are there, whole, from these weights."""
    path = unit_path(folder, unit)
    if not path.exists():
        return False
    try:
        with np.load(path) as file:
            return str(file["identity"]) == unit.source.identity
    except _BROKEN:
        return False


@dataclass(frozen=True)
class Fitting:
    """What every unit shares. out: folder of the results. truths: grid -> (train, test). train, test: the images' keys in the
    stores."""

    out: Path
    truths: dict[Grid, tuple[Truth, Truth]]
    train: tuple[str, ...]
    test: tuple[str, ...]
    categories: int
    tasks: tuple[str, ...]
    effort: Effort

    def done(self, unit: Unit) -> bool:
        """Whether the unit's results are there, from these weights."""
        return unit_done(self.out, unit)

    def fit(self, unit: Unit) -> None:
        """Fits and scores the unit's heads and writes its file, whole."""
        material = self._material(unit)
        arrays: dict[str, np.ndarray] = {"identity": np.array(unit.source.identity)}
        for head in unit.heads:
            found = [
                read_out(material, self.tasks, head=head, seed=seed, effort=self.effort) for seed in range(unit.seeds)
            ]
            for metric in found[0]:
                arrays[f"{head}/{metric}/sums"] = np.stack([tallies[metric].sums for tallies in found])
                arrays[f"{head}/{metric}/counts"] = found[0][metric].counts
        path = unit_path(self.out, unit)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(part, path)

    def _material(self, unit: Unit) -> Material:
        train, test = self.truths[unit.source.grid]
        fitted, asked = (place_features(unit.source, unit.place, keys) for keys in (self.train, self.test))
        if fitted.ndim == 3:
            fitted, asked = standardise(fitted, asked)
        return Material(unit.source.grid, self.categories, fitted, asked, train, test)


def place_features(source: Source, place: str, keys: Sequence[str]) -> Tensor:
    """(images, N, d) float32 of a layer or a mean; (images, N, layers, d) bfloat16 of all layers for a learned merge."""
    if source.folder is None:
        return position_codes(source.grid).expand(len(keys), -1, -1)
    store = FeatureStore(source.folder)
    if place.isdigit():
        return store.layer(int(place), keys)
    if place == "lln-layerscale(all)":
        first = store.layer(source.layers[0], keys)
        states = first.new_empty((*first.shape[:2], len(source.layers), first.shape[2]), dtype=torch.bfloat16)
        for number, layer in enumerate(source.layers):
            states[:, :, number] = store.layer(layer, keys)
        return states
    layers = [layer for layer in source.layers if place == "mean(all)" or layer > source.depth // 2]
    total = store.layer(layers[0], keys)
    for layer in layers[1:]:
        total += store.layer(layer, keys)
    return total / len(layers)


def position_codes(grid: Grid) -> Tensor:
    """(1, N, 128): sines and cosines of each patch's column and row, 32 frequencies each, half to eight waves an image."""
    waves = torch.logspace(0, 4, CODES // 4, base=2.0) * torch.pi
    angles = patch_centers(grid)[:, :2, None] * waves
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)[None]


def tallies_of(path: Path) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(head, metric) -> sums (seeds, images) and counts (images,) of a unit's file. Raises ValueError for a broken one."""
    try:
        with np.load(path) as file:
            names = [name.split("/")[:2] for name in file.files if name.endswith("/sums")]
            return {(h, m): (file[f"{h}/{m}/sums"], file[f"{h}/{m}/counts"]) for h, m in names}
    except _BROKEN as error:
        raise ValueError(
            f"{path} is no results of a probe, or damaged; remove it and run the same command again"
        ) from error


_shared: Fitting | None = None


def set_up(fitting: Fitting) -> None:
    """Of a process that fits: one thread, and what units share."""
    global _shared
    torch.set_num_threads(1)
    _shared = fitting


def fit_unit(unit: Unit) -> Unit:
    """One unit, in a process that was set up."""
    assert _shared is not None
    _shared.fit(unit)
    return unit
