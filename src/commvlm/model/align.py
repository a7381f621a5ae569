"""Alignments and projections: what stands between one encoder's merge and the fuse, and between the fuse and the language
model. Keyword-only arguments are their options in a config; `out_dim` is the width of what they give."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn


class Identity(nn.Module):
    """Nothing: the tokens as they are. As a projection it needs a fuse as wide as the language model."""

    def __init__(self, dim: int, out: int | None = None):
        super().__init__()
        if out not in (None, dim):
            raise ValueError(f"projection 'identity' gives tokens of width {dim}, the language model needs {out}")
        self.out_dim = dim

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class Linear(nn.Linear):
    """One linear layer (Table 6's "Linear"; the paper's projection)."""

    def __init__(self, dim: int, *, out: int | None = None):
        super().__init__(dim, dim if out is None else out)
        self.out_dim = self.out_features


class MLP(nn.Sequential):
    """`hidden` hidden layers of `ratio * dim`: Linear(d, r d), GELU, [Linear(r d, r d), GELU]..., Linear(r d, out).

    The defaults are Table 6's best row for DINOv2, "2 MLP, ratio 4", read as two hidden layers; its other rows are hidden 1,
    4, 8 and ratio 8, 16. COMM's own setting is not stated in the paper. out: width of the result, the input's by default;
    "language-model" in a recipe is the language model's.
    """

    def __init__(self, dim: int, *, hidden: int = 2, ratio: float = 4.0, out: int | None = None):
        if hidden < 1 or ratio <= 0:
            raise ValueError(f"mlp has hidden={hidden}, ratio={ratio}: it needs hidden >= 1 and ratio > 0")
        width = dim if out is None else out
        super().__init__(*_stack([dim, *[round(dim * ratio)] * hidden, width]))
        self.out_dim = width


class LinearProjection(Linear):
    """The paper's projection and LLaVA's first: Linear(in, out)."""

    def __init__(self, dim: int, out: int):
        super().__init__(dim, out=out)


class MLPProjection(nn.Sequential):
    """LLaVA-1.5's projection: Linear(in, out), GELU, Linear(out, out); `hidden` hidden layers as wide as the output.

    ratio: width of the first hidden layer as a multiple of the input's; Prismatic's is hidden 2, ratio 4 (arXiv 2402.07865).
    """

    def __init__(self, dim: int, out: int, *, hidden: int = 1, ratio: float | None = None):
        if hidden < 1 or (ratio is not None and ratio <= 0):
            raise ValueError(f"mlp has hidden={hidden}, ratio={ratio}: it needs hidden >= 1 and ratio > 0")
        first = out if ratio is None else round(dim * ratio)
        super().__init__(*_stack([dim, first, *[out] * (hidden - 1), out]))
        self.out_dim = out


def _stack(widths: list[int]) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        modules += [nn.GELU(), nn.Linear(inside, outside)]
    return modules[1:]


ALIGNS: dict[str, Callable[..., nn.Module]] = {"identity": Identity, "linear": Linear, "mlp": MLP}
PROJECTS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearProjection,
    "mlp": MLPProjection,
    "identity": Identity,
}
