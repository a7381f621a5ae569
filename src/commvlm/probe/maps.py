"""Figure 1 of the paper for any image: how alike one patch's token is to all others; and features as colours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..data.example import Point
from ..data.geometry import GEOMETRIES, View
from ..model.frozen import FrozenEncoder
from .problem import Grid


def view_of(image: Image.Image, source: FrozenEncoder) -> View:
    """What the encoder is shown of an image."""
    return GEOMETRIES[source.images.geometry](*image.size)


def patch_at(point: Point, view: View, grid: Grid) -> int:
    """The patch, row by row, in which a point of the image lies. Raises ValueError for a point beyond the image."""
    x, y = point
    if not (0 <= x < view.width and 0 <= y < view.height):
        raise ValueError(f"the point {x:g},{y:g} is not in the image of {view.width} x {view.height} pixels")
    across, down = view.forward_point(point)
    return min(int(down * grid[0]), grid[0] - 1) * grid[1] + min(int(across * grid[1]), grid[1] - 1)


def similarity(tokens: Tensor, patch: int) -> Tensor:
    """(N, d) -> (N,) cosines of every token with the one at `patch`."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    return unit @ unit[patch]


def principal(tokens: Tensor, *, count: int = 3) -> Tensor:
    """(N, d) -> (N, count) in [0, 1]: the tokens' first principal components, each from its 2nd to its 98th percentile. A
    component's sign is that which makes its largest loading positive, so the colours are the same on every machine."""
    centred = tokens.float() - tokens.float().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:count]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    parts = centred @ (axes * largest.sign()).T
    low, high = torch.quantile(parts, torch.tensor([0.02, 0.98]), dim=0)
    return ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def layer_tokens(source: FrozenEncoder, image: Image.Image) -> dict[int, Tensor]:
    """Layer -> (N, d) of one image."""
    return dict(zip(source.layers, source.read([image])[0], strict=True))


def shares(values: Sequence[float] | Tensor, grid: Grid) -> Tensor:
    """(N, ...) -> (rows, columns, ...)."""
    tensor = torch.as_tensor(values)
    return tensor.reshape(*grid, *tensor.shape[1:])
