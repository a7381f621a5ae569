"""Merging strategies: the patch tokens of several layers of one encoder, `[layer](b n d)`, into one `(b n d)` (section 3.2
of the paper, and beyond it in `merge_more.py`).

A merge is a fold: it takes the asked layers in ascending order, one at a time, so that an encoder can hand each over as its
block finishes and nothing but the sum so far is held. Where no gradient is wanted, the sum is updated in place, at the cost
of at most one more feature map. Keyword-only arguments of a merge are its options in a config; to add one, write the module
and name it in `merges.MERGES`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .names import choice
from .tokens import Grid, Tokens

ORDERS = ("linear(ln)", "ln(linear)")
SHARES = ("per-layer", "shared")
WEIGHTS = ("softmax", "free")


class Merge(nn.Module):
    """What every merge is. layers: how many are asked. dim: channels. grid: rows and columns of patches.

    out: what it gives. weights: (layers,), the share of each asked layer in ascending order; None where it has no such
    numbers.
    """

    def __init__(self, layers: int, dim: int, grid: Grid = (1, 1)):
        super().__init__()
        self.layers = layers
        self.dim = dim
        self.grid = grid
        self.out = Tokens.of(grid, dim)

    @property
    def weights(self) -> Tensor | None:
        """(layers,) as they are now, or None."""
        return None

    def weights_without(self, off: Collection[int]) -> Tensor | None:
        """The weights with those at the places `off` (0-based) at 0 and the others as much larger as keeps their sum."""
        weights = self.weights
        if weights is None or not off:
            return weights
        on = weights.masked_fill(_places(off, weights), 0.0)
        total = on.sum()
        return torch.where(total.abs() > 1e-6, on * (weights.sum() / total), on)  # free weights may cancel out

    def step(self, merged: Any, index: int, state: Tensor, weights: Tensor | None) -> Any:
        """What is merged so far (None at first) and the index-th asked layer (b, n, d) -> what is merged then. It must not
        write to `state`."""
        raise NotImplementedError

    def finish(self, merged: Any) -> Tensor:
        """What is merged after the last layer, as tokens."""
        return merged

    def forward(self, states: Sequence[Tensor], off: Collection[int] = ()) -> Tensor:
        """[layer](b n d) -> (b n d). off: places (0-based) of asked layers that are left out, not all of them."""
        fold = Fold(self, off)
        for index, state in enumerate(states):
            fold.take(index, state)
        return fold.result()


class Fold:
    """One run of a merge over its layers; `take` is what `encoders.stream_layers` calls."""

    def __init__(self, merge: Merge, off: Collection[int] = ()):
        self.merge = merge
        self.off = off
        self.weights = merge.weights_without(off)
        self.merged: Any = None

    def take(self, index: int, state: Tensor) -> None:
        """The index-th asked layer's tokens (b, n, d)."""
        if index not in self.off:
            self.merged = self.merge.step(self.merged, index, state, self.weights)

    def result(self) -> Tensor:
        """The merged tokens."""
        return self.merge.finish(self.merged)


def _places(off: Collection[int], weights: Tensor) -> Tensor:
    """(layers,) True where off."""
    return torch.tensor([index in off for index in range(len(weights))], device=weights.device)


def in_place(state: Tensor) -> bool:
    """Whether sums may be updated in place: nobody differentiates, and dtypes are what they say."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(state.device.type)


class Mean(Merge):
    """The mean over the asked layers: Mean(half), Mean(all); over one layer, that layer itself."""

    @property
    def weights(self) -> Tensor:
        """(layers,), each 1 / layers."""
        return torch.full((self.layers,), 1 / self.layers, device="cpu")

    def weights_without(self, off: Collection[int]) -> Tensor:
        """(layers,) as in `Merge`; a plain count, so exact."""
        on = [0.0 if index in off else 1.0 for index in range(self.layers)]
        return torch.tensor(on, device="cpu") / sum(on)

    def step(self, merged: Tensor | None, index: int, state: Tensor, weights: Tensor) -> Tensor:
        weight = float(weights[index])
        if merged is None:
            return state if weight == 1 else state * weight
        return torch.add(merged, state, alpha=weight, out=merged if in_place(state) else None)


class Layerscale(Merge):
    """Layerscale: `sum_i w_i * z_i`, w learned, summing to 1.

    weight: "softmax" of logits that start at 0, so uniform, positive and summing to 1; "free" starts at 1 / layers and is
    not constrained.
    """

    def __init__(self, layers: int, dim: int, grid: Grid = (1, 1), *, weight: str = "softmax"):
        super().__init__(layers, dim, grid)
        self.weight = choice(weight, of=WEIGHTS, what="weight of the merge")
        self.logits = nn.Parameter(torch.full((layers,), self.first_logit))

    @property
    def first_logit(self) -> float:
        """What every logit (or free weight) starts from: equal weights that sum to 1."""
        return 0.0 if self.weight == "softmax" else 1 / self.layers

    @property
    def weights(self) -> Tensor:
        """(layers,): the weight of each asked layer, in ascending order of layers."""
        return self.logits.softmax(dim=0) if self.weight == "softmax" else self.logits

    def step(self, merged: Tensor | None, index: int, state: Tensor, weights: Tensor) -> Tensor:
        if merged is None:
            return weights[index] * state
        if in_place(state):
            return merged.addcmul_(state, weights[index])
        return merged + weights[index] * state


class LLNLayerscale(Layerscale):
    """LLN-Layerscale: `sum_i w_i * LLN_i(z_i)`, w learned: COMM's merge.

    The paper leaves three points open; the first value of each is the default.
    order: "linear(ln)" is Linear(LN(z)), as in the equation; "ln(linear)" is LN(Linear(z)), as in the words.
    share: "per-layer" gives each layer its own LN and Linear; "shared" uses one pair for all.
    weight: as in Layerscale.
    """

    def __init__(
        self, layers: int, dim: int, grid: Grid = (1, 1), *, order: str = "linear(ln)", share: str = "per-layer",
        weight: str = "softmax",
    ):  # fmt: skip
        super().__init__(layers, dim, grid, weight=weight)
        self.order = choice(order, of=ORDERS, what="order of the merge")
        self.share = choice(share, of=SHARES, what="share of the merge")
        pairs = 1 if share == "shared" else layers
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(pairs))
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in range(pairs))

    def pair(self, index: int) -> tuple[nn.LayerNorm, nn.Linear]:
        """LN and Linear of the index-th asked layer (0-based)."""
        place = 0 if self.share == "shared" else index
        return self.norms[place], self.linears[place]  # type: ignore[return-value]

    def lln(self, index: int, state: Tensor) -> Tensor:
        """LLN of the index-th asked layer (0-based): (b n d) -> (b n d)."""
        norm, linear = self.pair(index)
        return linear(norm(state)) if self.order == "linear(ln)" else norm(linear(state))

    def step(self, merged: Tensor | None, index: int, state: Tensor, weights: Tensor) -> Tensor:
        if not in_place(state):
            scaled = weights[index] * self.lln(index, state)
            return scaled if merged is None else merged + scaled
        if merged is None:
            merged = torch.zeros(state.shape, dtype=state.dtype, device=state.device)
        # A state without its prefix tokens is contiguous image by image only; LayerNorm would copy it as a whole.
        whole = state.is_contiguous()
        for total, tokens in zip(merged[None] if whole else merged, state[None] if whole else state, strict=True):
            self._add(total.flatten(0, -2), tokens.flatten(0, -2), index, weights[index])
        return merged

    def _add(self, total: Tensor, tokens: Tensor, index: int, weight: Tensor) -> None:
        """total (m, d) += weight * LLN(tokens (m, d)), with one feature map of working memory."""
        norm, linear = self.pair(index)
        if self.order == "linear(ln)":  # the weight goes into LN's own scale and shift, which are d numbers each
            scaled = F.layer_norm(tokens, norm.normalized_shape, norm.weight * weight, norm.bias * weight, norm.eps)
            total.addmm_(scaled, linear.weight.T).add_(linear.bias * weight)
            return
        for part, piece in zip(total.chunk(2), tokens.chunk(2), strict=True):
            part.add_(
                F.layer_norm(linear(piece), norm.normalized_shape, norm.weight * weight, norm.bias * weight, norm.eps)
            )
