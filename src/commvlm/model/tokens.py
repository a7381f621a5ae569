"""What a bundle of visual tokens is, and bringing one grid of them to another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """count: how many. dim: channels of each. grid: (rows, columns) in row-major order, None where they are no one grid."""

    count: int
    dim: int
    grid: Grid | None = None

    @classmethod
    def of(cls, grid: Grid, dim: int) -> Tokens:
        """The tokens of a whole grid."""
        return cls(grid[0] * grid[1], dim, grid)


def describe(tokens: Tokens) -> str:
    """For errors and tables: "24 x 24", or "720 tokens" where there is no one grid."""
    return f"{tokens.count} tokens" if tokens.grid is None else f"{tokens.grid[0]} x {tokens.grid[1]}"


def resample(tokens: Tensor, grid: Grid, to: Grid) -> Tensor:
    """(b, n, d) of one grid -> (b, m, d) of another: bilinear, antialiased when it shrinks, computed in float32."""
    if grid == to:
        return tokens
    b, _, d = tokens.shape
    square = tokens.transpose(1, 2).reshape(b, d, *grid).float()
    small = F.interpolate(square, size=to, mode="bilinear", align_corners=False, antialias=True)
    return small.flatten(2).transpose(1, 2).to(tokens.dtype)
