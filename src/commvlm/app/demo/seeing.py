"""What each encoder sees: how alike one patch is to all others, layer by layer (the paper's Figure 1), of one image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from ...data.example import Point
from ...data.images import open_image
from ..answering import Answerer

SIDE = 224
"""Pixels of a map's picture."""
HEAT = 0.62
"""Share of the map's colour in its picture; the rest is the image in grey."""
COLORS = matplotlib.colormaps["inferno"]


@dataclass(frozen=True)
class Map:
    """encoder, what ("layer 12", "merged"); picture: SIDE x SIDE; low: the least cosine in it, -1 to 1 (the most is the
    patch's with itself, 1)."""

    encoder: str
    what: str
    picture: Image.Image
    low: float


@dataclass(frozen=True)
class _Tokens:
    encoder: str
    what: str
    grid: tuple[int, int]
    unit: np.ndarray
    """(rows x columns, d), each of length 1."""


class Seeing:
    """One image's patch tokens of a few layers of each encoder, and of its merged branch, held to be compared."""

    def __init__(self, answerer: Answerer, image: Path) -> None:
        picture = open_image(image)
        self.view = answerer.view(*picture.size)
        shown = answerer.processor.image_processor.shown(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        self.grey = np.asarray(shown.convert("L"), dtype=np.float32)[..., None].repeat(3, axis=2)
        self.tokens = _read(answerer, picture)

    def maps(self, point: Point) -> list[Map]:
        """How alike each patch is to the one at `point` (pixels of the image): cosines, an encoder's layers from shallow to
        deep."""
        u, v = self.view.forward_point(point)
        return [self._map(tokens, u, v) for tokens in self.tokens]

    def _map(self, tokens: _Tokens, u: float, v: float) -> Map:
        rows, columns = tokens.grid
        row, column = min(int(v * rows), rows - 1), min(int(u * columns), columns - 1)
        cosines = (tokens.unit @ tokens.unit[row * columns + column]).reshape(rows, columns)
        low = float(cosines.min())
        heat = Image.fromarray(((cosines - low) / max(1 - low, 1e-6)).clip(0, 1).astype(np.float32), mode="F")
        colored = COLORS(np.asarray(heat.resize((SIDE, SIDE), Image.Resampling.NEAREST)))[..., :3] * 255
        mixed = (HEAT * colored + (1 - HEAT) * self.grey).clip(0, 255).astype(np.uint8)
        picture = Image.fromarray(mixed)
        patch = [column * SIDE / columns, row * SIDE / rows, (column + 1) * SIDE / columns, (row + 1) * SIDE / rows]
        draw = ImageDraw.Draw(picture)
        draw.rectangle(patch, outline="black", width=5)
        draw.rectangle([patch[0] + 1, patch[1] + 1, patch[2] - 1, patch[3] - 1], outline="white", width=2)
        return Map(tokens.encoder, tokens.what, picture, low)


@torch.inference_mode()
def _read(answerer: Answerer, image: Image.Image) -> list[_Tokens]:
    """Of every encoder the layers of `shown_places`, then its branch as it goes to the fusion, where that is one grid."""
    vision: Any = answerer.model.model.vision_tower
    pixels = answerer.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    found = []
    states = vision.read(pixels.to(answerer.device))
    for setting in vision.config.branches:
        name, branch = setting["name"], vision.branches[setting["name"]]
        for place in shown_places(len(setting["layers"])):
            what, grid = f"layer {setting['layers'][place]}", vision.config.grid_of(name)
            found.append(_Tokens(name, what, grid, _unit(states[name][place][0])))
        if branch.out.grid is not None:
            found.append(_Tokens(name, "merged", branch.out.grid, _unit(branch(states[name])[0])))
    return found


def _unit(tokens: torch.Tensor) -> np.ndarray:
    return F.normalize(tokens.float(), dim=-1).cpu().numpy()


def shown_places(count: int) -> list[int]:
    """Up to three of `count` layers: the first, the middle one and the last."""
    return sorted({0, (count - 1) // 2, count - 1})
