"""The trained visual half, from numbers alone: a branch per encoder (merge -> align), then fuse, then reduce."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from .align import ALIGNS
from .fuse import FUSES, REDUCES
from .merge import Fold
from .merges import MERGES
from .tokens import Grid, Tokens, resample


def without_kind(spec: dict[str, Any]) -> dict[str, Any]:
    """The options of a settled choice."""
    return {name: value for name, value in spec.items() if name != "kind"}


class Branch(nn.Module):
    """What is trained of one encoder's branch: merge -> align, then resampled to the common grid when there is one.

    layers: how many are asked. dim: channels of the encoder. grid: rows and columns of its patches. common: the grid that all
    branches are brought to.
    out: what it gives. Raises ValueError for a merge whose tokens are no grid and cannot be resampled.
    """

    def __init__(
        self,
        *,
        layers: int,
        dim: int,
        grid: Grid,
        merge: dict[str, Any],
        align: dict[str, Any],
        common: Grid | None = None,
    ):
        super().__init__()
        self.merge = MERGES[merge["kind"]](layers, dim, grid, **without_kind(merge))
        given: Tokens = self.merge.out
        self.align = ALIGNS[align["kind"]](given.dim, **without_kind(align))
        if common is not None and given.grid is None:
            raise ValueError(
                f"merge {merge['kind']!r} gives {given.count} tokens that are no grid; fuse without a grid"
            )
        self.grid, self.common = given.grid, common
        width: int = self.align.out_dim  # type: ignore[assignment]
        self.out = Tokens(given.count, width, given.grid) if common is None else Tokens.of(common, width)

    def finish(self, merged: Tensor) -> Tensor:
        """What follows the merge: (b n d) -> (b m d')."""
        aligned = self.align(merged)
        if self.common is None or self.grid is None:
            return aligned
        return resample(aligned, self.grid, self.common)

    def forward(self, states: Sequence[Tensor], off: Collection[int] = ()) -> Tensor:
        """[layer](b n d) -> (b m d'). off: places (0-based) of asked layers that are left out."""
        return self.finish(self.merge(states, off))

    def fold(self, off: Collection[int] = ()) -> Fold:
        """The merge, to be given its layers one at a time."""
        return Fold(self.merge, off)


def make_branches(
    settings: Sequence[dict[str, Any]], dims: Sequence[int], grids: Sequence[Grid], *, common: Grid | None
) -> list[Branch]:
    """One branch per encoder, in order. settings: with "name", "layers", "merge" and "align" in full. Errors name theirs."""
    branches = []
    for setting, dim, grid in zip(settings, dims, grids, strict=True):
        try:
            branches.append(
                Branch(
                    layers=len(setting["layers"]),
                    dim=dim,
                    grid=grid,
                    merge=setting["merge"],
                    align=setting["align"],
                    common=common,
                )
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"encoder {setting['name']!r}: {error}") from error
    return branches


def make_fuse(fuse: dict[str, Any], branches: Sequence[Branch]) -> nn.Module:
    """The fuse of those branches; its `out` says what it gives. The common grid is the branches' matter."""
    options = {name: value for name, value in without_kind(fuse).items() if name != "grid"}
    try:
        return FUSES[fuse["kind"]]([branch.out for branch in branches], **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"fuse {fuse['kind']!r}: {error}") from error


def make_reduce(reduce: dict[str, Any], given: Tokens) -> nn.Module:
    """The reduction of those tokens; its `out` says what it gives."""
    try:
        return REDUCES[reduce["kind"]](given, **without_kind(reduce))
    except (ValueError, TypeError) as error:
        raise ValueError(f"reduce {reduce['kind']!r}: {error}") from error
