"""Merging strategies, alignments, fuses and projections: modules that take numbers, never configs.

A merge turns the patch tokens of several layers of one encoder, `[layer](b n d)`, into one `(b n d)` (section 3.2 of
the paper). An alignment is what stands between one encoder's merge and the fuse. To add a row: write the module (its
keyword-only arguments are its options in a config) and name it in the table below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .names import choice

ORDERS = ("linear(ln)", "ln(linear)")
SHARES = ("per-layer", "shared")
WEIGHTS = ("softmax", "free")


class Mean(nn.Module):
    """The mean over the asked layers: Mean(half), Mean(all); over one layer, that layer itself."""

    def __init__(self, layers: int, dim: int):
        super().__init__()
        self.layers = layers
        self.dim = dim

    @property
    def weights(self) -> Tensor:
        """(layers,), each 1 / layers."""
        return torch.full((self.layers,), 1 / self.layers)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """[layer](b n d) -> (b n d)."""
        return states[0] if self.layers == 1 else torch.stack(tuple(states)).mean(dim=0)


class LLNLayerscale(nn.Module):
    """LLN-Layerscale: `sum_i w_i * LLN_i(z_i)`, w learned.

    The paper leaves three points open; the first value of each is the default.
    order: "linear(ln)" is Linear(LN(z)), as in the equation; "ln(linear)" is LN(Linear(z)), as in the words.
    share: "per-layer" gives each layer its own LN and Linear; "shared" uses one pair for all.
    weight: "softmax" of logits that start at 0, so uniform, positive and summing to 1; "free" starts at 1 / layers and
    is not constrained.
    """

    def __init__(
        self, layers: int, dim: int, *, order: str = "linear(ln)", share: str = "per-layer", weight: str = "softmax"
    ):
        super().__init__()
        self.layers = layers
        self.dim = dim
        self.order = choice(order, of=ORDERS, what="order of lln-layerscale")
        self.share = choice(share, of=SHARES, what="share of lln-layerscale")
        self.weight = choice(weight, of=WEIGHTS, what="weight of lln-layerscale")
        pairs = 1 if share == "shared" else layers
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(pairs))
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in range(pairs))
        self.logits = nn.Parameter(torch.full((layers,), self.first_logit))

    @property
    def first_logit(self) -> float:
        """What every logit (or free weight) starts from: equal weights that sum to 1."""
        return 0.0 if self.weight == "softmax" else 1 / self.layers

    @property
    def weights(self) -> Tensor:
        """(layers,): the weight of each asked layer, in ascending order of layers."""
        return self.logits.softmax(dim=0) if self.weight == "softmax" else self.logits

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """[layer](b n d) -> (b n d)."""
        weights = self.weights
        merged = weights[0] * self.lln(0, states[0])
        for index in range(1, self.layers):
            merged = merged + weights[index] * self.lln(index, states[index])
        return merged

    def lln(self, index: int, state: Tensor) -> Tensor:
        """LLN of the index-th asked layer (0-based): (b n d) -> (b n d)."""
        pair = 0 if self.share == "shared" else index
        norm, linear = self.norms[pair], self.linears[pair]
        return linear(norm(state)) if self.order == "linear(ln)" else norm(linear(state))


MERGES: dict[str, Callable[..., nn.Module]] = {"mean": Mean, "lln-layerscale": LLNLayerscale}


class Identity(nn.Module):
    """No alignment."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class Linear(nn.Linear):
    """One linear layer, `dim -> dim`, or `dim -> out` as a projection."""

    def __init__(self, dim: int, out: int | None = None):
        super().__init__(dim, dim if out is None else out)


class MLP(nn.Sequential):
    """`hidden` hidden layers of `ratio * dim`: Linear(d, r d), GELU, [Linear(r d, r d), GELU]..., Linear(r d, d).

    The defaults are Table 6's best row for DINOv2, "2 MLP, ratio 4", read as two hidden layers. COMM's own setting is
    not stated in the paper.
    """

    def __init__(self, dim: int, *, hidden: int = 2, ratio: float = 4.0):
        if hidden < 1 or ratio <= 0:
            raise ValueError(f"mlp has hidden={hidden}, ratio={ratio}: it needs hidden >= 1 and ratio > 0")
        super().__init__(*_stack([dim, *[round(dim * ratio)] * hidden, dim]))


class ProjectionMLP(nn.Sequential):
    """LLaVA-1.5's projection: Linear(in, out), GELU, Linear(out, out); `hidden` hidden layers as wide as the output."""

    def __init__(self, dim: int, out: int, *, hidden: int = 1):
        if hidden < 1:
            raise ValueError(f"mlp has hidden={hidden}: it needs hidden >= 1")
        super().__init__(*_stack([dim, *[out] * hidden, out]))


def _stack(widths: list[int]) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        modules += [nn.GELU(), nn.Linear(inside, outside)]
    return modules[1:]


ALIGNS: dict[str, Callable[..., nn.Module]] = {"identity": Identity, "linear": Linear, "mlp": MLP}
PROJECTS: dict[str, Callable[..., nn.Module]] = {"linear": Linear, "mlp": ProjectionMLP}


class ChannelConcat(nn.Module):
    """Concatenation along channels: N tokens stay N, their width is the sum of the branches' widths."""

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        self.dim = sum(dims)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """[branch](b n d_i) -> (b n sum d_i)."""
        return torch.cat(tuple(tokens), dim=-1)


FUSES: dict[str, Callable[..., nn.Module]] = {"channel-concat": ChannelConcat}
