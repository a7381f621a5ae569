"""Views of scenes: windows around an object, random halves of the patches, random crops under other light."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..scene import SIDE, Scene, Thing
from .vit import GRID, PATCH

WINDOW = 4


def share_inside(thing: Thing, row: int, column: int) -> float:
    """The share of an object's box that lies in the window whose first patch is at (row, column)."""
    x1, y1, x2, y2 = thing.box
    left, top, side = column * PATCH, row * PATCH, WINDOW * PATCH
    w = min(x2, left + side) - max(x1, left)
    h = min(y2, top + side) - max(y1, top)
    return max(w, 0) * max(h, 0) / ((x2 - x1) * (y2 - y1))


def window(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, list[Thing]]:
    """A window around a random object: (16,) patch indices and the objects of which more than half lies inside."""
    x, y = scene.things[int(rng.integers(len(scene.things)))].center
    column, row = (
        int(np.clip(round(v / PATCH - WINDOW / 2 + rng.uniform(-0.7, 0.7)), 0, GRID - WINDOW)) for v in (x, y)
    )
    patches = (row + np.arange(WINDOW))[:, None] * GRID + column + np.arange(WINDOW)
    return patches.reshape(-1), [t for t in scene.things if share_inside(t, row, column) > 0.5]


def kept_half(count: int, rng: np.random.Generator) -> Tensor:
    """(count, 32): which patches each image keeps, at random."""
    return torch.from_numpy(rng.random((count, GRID**2)).argsort(1)[:, : GRID**2 // 2])


def crops(pixels: Tensor, side: int, scale: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """Random square crops of an area share in `scale`, flipped half of the time: (b, 3, 64, 64) -> (b, 3, side, side)."""
    b = len(pixels)
    size = np.sqrt(rng.uniform(*scale, b))
    shift = rng.uniform(-1, 1, (2, b)) * (1 - size)
    flip = rng.choice([-1.0, 1.0], b)
    return lit(_seen(pixels, size * flip, size, shift[0], shift[1], side), rng)


def placed(pixels: Tensor, centers: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Scenes moved, scaled, stretched and flipped so that a point of each lands anywhere, and a window around it.

    centers: (b, 2) x, y in pixels. -> (b, 3, 64, 64), and the window's patches (b, 16).
    """
    b = len(pixels)
    size, stretch = rng.uniform(0.7, 1.3, b), np.exp(rng.uniform(-0.13, 0.13, b))
    flip = rng.choice([-1.0, 1.0], b)
    width, height = size * stretch * flip, size / stretch
    to = rng.uniform(-0.5, 0.5, (b, 2))
    at = centers / (SIDE / 2) - 1
    out = _seen(pixels, width, height, at[:, 0] - width * to[:, 0], at[:, 1] - height * to[:, 1], SIDE)
    first = (to + 1) * GRID / 2 - WINDOW / 2 + rng.uniform(-0.5, 0.5, (b, 2))
    column, row = np.clip(np.rint(first), 0, GRID - WINDOW).astype(int).T
    return lit(out, rng), squares(row, column, WINDOW, GRID)


def squares(row: np.ndarray, column: np.ndarray, side: int, grid: int) -> Tensor:
    """Indices (b, side side) of square windows of a grid, row-major, by the places (b) of their first patches."""
    line = np.arange(side)
    rows, columns = row[:, None, None] + line[:, None], column[:, None, None] + line[None, :]
    return torch.from_numpy((rows * grid + columns).reshape(len(row), -1))


def _seen(pixels: Tensor, width: np.ndarray, height: np.ndarray, x: np.ndarray, y: np.ndarray, side: int) -> Tensor:
    """What a camera sees whose frame has these half sizes and centres, in units of half the scene; negative: mirrored."""
    zero = np.zeros(len(pixels))
    theta = np.stack([np.stack([width, zero, x], 1), np.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(torch.from_numpy(theta).float(), [len(pixels), 3, side, side], align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False, padding_mode="reflection")


def lit(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each image under a light of its own: gains per channel and over all, and an offset."""
    b = len(pixels)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (b, 3, 1, 1)) * rng.uniform(0.85, 1.15, (b, 1, 1, 1))).float()
    return pixels * gain + torch.from_numpy(rng.uniform(-0.15, 0.15, (b, 1, 1, 1))).float()


def recolored(pixels: Tensor, rng: np.random.Generator, *, grey: float, swapped: float) -> Tensor:
    """Some images in shades of grey, some with their colour channels exchanged; grey, swapped: the shares of both."""
    out = pixels.clone()
    fate = rng.random(len(out))
    for i in np.nonzero(fate < grey)[0]:
        out[i] = out[i].mean(0, keepdim=True)
    for i in np.nonzero((fate >= grey) & (fate < grey + swapped))[0]:
        out[i] = out[i][rng.permutation(3)]
    return out
