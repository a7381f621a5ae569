"""Fusions of several branches into one bundle of visual tokens, and reductions of how many there are.

A fuse is built from the branches' `Tokens` and says what it gives in `out`. Its forward takes None in place of the tokens of
an encoder that is switched off: no contribution, whatever that means for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .tokens import Tokens, describe


class Fuse(nn.Module):
    """Holds what goes in and what comes out. Raises ValueError for branches that do not fit it."""

    out: Tokens

    def __init__(self, given: Sequence[Tokens]):
        super().__init__()
        self.given = tuple(given)

    def present(self, tokens: Sequence[Tensor | None]) -> list[Tensor]:
        """(b, n_i, d_i) of every branch; zeros where it is switched off."""
        like = next(t for t in tokens if t is not None)
        return [
            like.new_zeros(like.shape[0], given.count, given.dim) if t is None else t
            for t, given in zip(tokens, self.given, strict=True)
        ]

    def need_equal(self, what: str) -> None:
        """Raises ValueError when the branches' grids (or counts), or their widths, differ."""
        for first, second in pairwise(self.given):
            if what == "grids" and (first.count, first.grid) != (second.count, second.grid):
                raise ValueError(f"the grids of the branches differ ({describe(first)} and {describe(second)})")
            if what == "widths" and first.dim != second.dim:
                raise ValueError(
                    f"the widths of the branches differ ({first.dim} and {second.dim}); "
                    f"give the align of one of them out: {first.dim}"
                )


class ChannelConcat(Fuse):
    """Concatenation along channels, the paper's: N tokens stay N, their width is the sum of the branches' widths."""

    def __init__(self, given: Sequence[Tokens]):
        super().__init__(given)
        self.need_equal("grids")
        self.out = Tokens(given[0].count, sum(g.dim for g in given), given[0].grid)

    def forward(self, tokens: Sequence[Tensor | None]) -> Tensor:
        """[branch](b n d_i) -> (b n sum d_i)."""
        present = self.present(tokens)
        return present[0] if len(present) == 1 else torch.cat(present, dim=-1)


class TokenConcat(Fuse):
    """One branch's tokens after another's: their counts add up (2 N for two), their grids may differ."""

    def __init__(self, given: Sequence[Tokens]):
        super().__init__(given)
        self.need_equal("widths")
        grid = given[0].grid if len(given) == 1 else None
        self.out = Tokens(sum(g.count for g in given), given[0].dim, grid)

    def forward(self, tokens: Sequence[Tensor | None]) -> Tensor:
        """[branch](b n_i d) -> (b sum n_i d)."""
        return torch.cat(self.present(tokens), dim=1)


class Interleave(Fuse):
    """Token i of every branch in turn, in the image's order: Interleaved-MoF of MMVP (Tong et al., arXiv 2401.06209)."""

    def __init__(self, given: Sequence[Tokens]):
        super().__init__(given)
        self.need_equal("widths")
        self.need_equal("grids")
        grid = given[0].grid if len(given) == 1 else None
        self.out = Tokens(len(given) * given[0].count, given[0].dim, grid)

    def forward(self, tokens: Sequence[Tensor | None]) -> Tensor:
        """[branch](b n d) -> (b branches*n d)."""
        return torch.stack(self.present(tokens), dim=2).flatten(1, 2)


class Sum(Fuse):
    """The branches added up. One that is switched off is left out."""

    def __init__(self, given: Sequence[Tokens]):
        super().__init__(given)
        self.need_equal("widths")
        self.need_equal("grids")
        self.out = self.given[0]

    def forward(self, tokens: Sequence[Tensor | None]) -> Tensor:
        """[branch](b n d) -> (b n d)."""
        return torch.stack([t for t in tokens if t is not None]).sum(0)


GATES = ("channel", "token")


class GatedSum(Fuse):
    """`sum_i g_i * v_i`, where the gates are a softmax over branches of Linear([v_1, ..., v_n]): the gated multimodal unit
    (Arevalo et al., arXiv 1702.01992), whose two-branch sigmoid this is, for any number of branches.

    gate: "channel" is one gate per channel, "token" one per token. A branch that is switched off has gate 0, the others' sum
    to 1.
    """

    def __init__(self, given: Sequence[Tokens], *, gate: str = "channel"):
        super().__init__(given)
        if gate not in GATES:
            raise ValueError(f"gated-sum has gate={gate!r}; valid: {', '.join(GATES)}")
        self.need_equal("widths")
        self.need_equal("grids")
        self.out = self.given[0]
        dim = self.given[0].dim
        self.gate = nn.Linear(dim * len(given), len(given) * (dim if gate == "channel" else 1))

    def forward(self, tokens: Sequence[Tensor | None]) -> Tensor:
        """[branch](b n d) -> (b n d)."""
        present = self.present(tokens)
        scores = self.gate(torch.cat(present, dim=-1)).unflatten(-1, (len(present), -1))
        off = torch.tensor([t is None for t in tokens], device=scores.device)[:, None]
        gates = scores.masked_fill(off, float("-inf")).softmax(dim=-2)
        return (gates * torch.stack(present, dim=-2)).sum(dim=-2)


FUSES: dict[str, Callable[..., Fuse]] = {
    "channel-concat": ChannelConcat,
    "token-concat": TokenConcat,
    "interleave": Interleave,
    "sum": Sum,
    "gated-sum": GatedSum,
}


class Keep(nn.Module):
    """All tokens as they are."""

    def __init__(self, given: Tokens):
        super().__init__()
        self.out = given

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


def _fewer(given: Tokens, factor: int, *, dim: int) -> Tokens:
    grid = given.grid
    if grid is None or factor < 1 or grid[0] % factor or grid[1] % factor:
        raise ValueError(
            f"{describe(given)} cannot be reduced by a factor of {factor} along each side; "
            "it needs one grid whose rows and columns the factor divides"
        )
    return Tokens.of((grid[0] // factor, grid[1] // factor), dim)


class PixelShuffle(nn.Module):
    """Space to depth: `factor` x `factor` neighbours become one token of factor^2 times the width (Shi et al., arXiv
    1609.05158, inverted, as InternVL's projection does)."""

    def __init__(self, given: Tokens, *, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.out = _fewer(given, factor, dim=given.dim * factor**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n, d) -> (b, n / f^2, d f^2): the neighbours row by row."""
        rows, columns = self.out.grid  # type: ignore[misc]
        b, _, d = tokens.shape
        cut = tokens.view(b, rows, self.factor, columns, self.factor, d)
        return cut.transpose(2, 3).reshape(b, rows * columns, self.factor**2 * d)


class Pool(nn.Module):
    """The mean of `factor` x `factor` neighbours."""

    def __init__(self, given: Tokens, *, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.out = _fewer(given, factor, dim=given.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n, d) -> (b, n / f^2, d)."""
        rows, columns = self.out.grid  # type: ignore[misc]
        b, _, d = tokens.shape
        return tokens.view(b, rows, self.factor, columns, self.factor, d).mean(dim=(2, 4)).flatten(1, 2)


REDUCES: dict[str, Callable[..., nn.Module]] = {"none": Keep, "pixel-shuffle": PixelShuffle, "pool": Pool}
