"""More merges: the paper's with convolutions, DenseConnector's three, and weights that each token chooses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .merge import Layerscale, LLNLayerscale, Merge, in_place
from .tokens import Grid, Tokens


class ConvLayerscale(Layerscale):
    """Conv-Layerscale: Layerscale with convolution and BatchNorm in LLN's place, `sum_i w_i * BN_i(Conv_i(z_i))`.

    kernel: side of the convolution over the grid of patches, odd; the paper does not state it. share, weight: as in
    LLN-Layerscale. While it is trained, BatchNorm's statistics are those of the images at hand on one device.
    """

    def __init__(
        self, layers: int, dim: int, grid: Grid = (1, 1), *, kernel: int = 3, share: str = "per-layer",
        weight: str = "softmax",
    ):  # fmt: skip
        super().__init__(layers, dim, grid, weight=weight)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"conv-layerscale has kernel={kernel}: it needs an odd one, such as 3")
        if share not in ("per-layer", "shared"):
            raise ValueError(f"conv-layerscale has share={share!r}; valid: per-layer, shared")
        pairs = 1 if share == "shared" else layers
        self.share = share
        # BatchNorm takes the mean away again, and with it a convolution's own bias.
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, kernel, padding=kernel // 2, bias=False) for _ in range(pairs))
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(pairs))

    def step(self, merged: Tensor | None, index: int, state: Tensor, weights: Tensor) -> Tensor:
        place = 0 if self.share == "shared" else index
        conv: Any = self.convs[place]
        norm: Any = self.norms[place]
        square = state.unflatten(1, self.grid).permute(0, 3, 1, 2)
        if in_place(state) and not norm.training:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            shift = norm.bias - norm.running_mean * scale
            tokens = conv(square).flatten(2).transpose(1, 2)
            tokens.mul_(scale * weights[index]).add_(shift * weights[index])
            return tokens if merged is None else merged.add_(tokens)
        tokens = weights[index] * norm(conv(square)).flatten(2).transpose(1, 2)
        return tokens if merged is None else merged + tokens


class LayerAttention(LLNLayerscale):
    """LLN-Layerscale whose weights every token chooses for itself, from the image alone: `softmax_i(a_i + q_i . LN_i(z_i) /
    sqrt(d))`. A learned query per layer attends over the layers, as the pooling by attention of Set Transformer (Lee et al.,
    arXiv 1810.00825) does over a set, here over depth (compare MRLA, Fang et al., arXiv 2302.03985).

    It starts with q = 0 and a = 0: as LLN-Layerscale. `weights` is softmax(a), the share of each layer for a token of no
    preference.
    """

    def __init__(self, layers: int, dim: int, grid: Grid = (1, 1), *, share: str = "per-layer"):
        super().__init__(layers, dim, grid, share=share)
        self.queries = nn.Parameter(torch.zeros(layers, dim))

    def step(self, merged: Any, index: int, state: Tensor, weights: Tensor) -> Any:
        """merged: (sum of weighted tokens (b, n, d), the largest score so far and the sum of weights, both (b, n, 1)): a
        softmax over layers that come one at a time."""
        if merged is None:
            b, n, d = state.shape
            low = torch.finfo(torch.float32).min
            merged = (
                state.new_zeros(b, n, d),
                torch.full((b, n, 1), low, device=state.device),
                torch.zeros(b, n, 1, device=state.device),
            )
        if not in_place(state):
            return self._attend(merged, index, state)
        # An eighth of the tokens at a time: the work needs some four times its own size.
        for parts in zip(*(t.chunk(8, dim=1) for t in (*merged, state)), strict=True):
            for old, new in zip(parts[:3], self._attend(parts[:3], index, parts[3]), strict=True):
                old.copy_(new)
        return merged

    def _attend(self, merged: Any, index: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, top, mass = merged
        norm, linear = self.pair(index)
        normed = norm(state)
        score = (normed @ self.queries[index])[..., None].float() * self.dim**-0.5 + self.logits[index]
        new_top = torch.maximum(top, score.detach())  # cancels out, so it needs no gradient
        keep, share = torch.exp(top - new_top), torch.exp(score - new_top)
        return total * keep.to(total.dtype) + share.to(total.dtype) * linear(normed), new_top, mass * keep + share

    def finish(self, merged: Any) -> Tensor:
        """The weighted sum over the sum of weights."""
        total, _, mass = merged
        return torch.div(total, mass.to(total.dtype), out=total if in_place(total) else None)


class _Channels(Merge):
    """Slots along channels, each a mean over some layers: the last asked layer first, then the others' slots."""

    slots: list[list[int]]

    def _settle(self, slots: list[list[int]]) -> None:
        self.slots = slots
        self.out = Tokens(self.out.count, self.dim * len(slots), self.out.grid)

    def weights_without(self, off: Collection[int]) -> Tensor:
        """(slots, layers): the share of each layer in each slot. A slot whose layers are all off is zero."""
        table = torch.zeros(len(self.slots), self.layers, device="cpu")
        for row, members in zip(table, self.slots, strict=True):
            on = [index for index in members if index not in off]
            row[on] = 1 / max(len(on), 1)
        return table

    def step(self, merged: Tensor | None, index: int, state: Tensor, weights: Tensor) -> Tensor:
        if merged is None:
            merged = state.new_zeros(*state.shape[:2], self.out.dim)
        for slot, share in enumerate(weights[:, index].tolist()):
            if share:
                merged[..., slot * self.dim : (slot + 1) * self.dim].add_(state, alpha=share)
        return merged


class SparseChannels(_Channels):
    """Sparse Channel Integration of DenseConnector (Yao et al., arXiv 2405.13800): the last asked layer and the others,
    concatenated along channels; their setting is layers 8, 16 and the last."""

    def __init__(self, layers: int, dim: int, grid: Grid = (1, 1)):
        super().__init__(layers, dim, grid)
        self._settle([[layers - 1], *([index] for index in range(layers - 1))])


class DenseChannels(_Channels):
    """Dense Channel Integration of DenseConnector (Yao et al., arXiv 2405.13800): the last asked layer, then the mean of each
    of `groups` runs of neighbouring layers, concatenated along channels; their setting is all layers in 2 groups."""

    def __init__(self, layers: int, dim: int, grid: Grid = (1, 1), *, groups: int = 2):
        super().__init__(layers, dim, grid)
        if groups < 1 or layers % groups:
            raise ValueError(
                f"dci has groups={groups}, which does not divide its {layers} layers; ask for other layers"
            )
        size = layers // groups
        self._settle([[layers - 1], *(list(range(g * size, (g + 1) * size)) for g in range(groups))])


class SparseTokens(Merge):
    """Sparse Token Integration of DenseConnector (Yao et al., arXiv 2405.13800): the tokens of the last asked layer, then
    those of the others, `stride` neighbours in a row averaged to one; their setting is layers 8, 16 and the last, stride 8:
    576 + 72 + 72 tokens."""

    def __init__(self, layers: int, dim: int, grid: Grid = (1, 1), *, stride: int = 8):
        super().__init__(layers, dim, grid)
        if not 1 <= stride <= self.out.count:
            raise ValueError(f"sti has stride={stride}: it needs 1 to {self.out.count}, the patches there are")
        self.stride = stride
        self.few = self.out.count // stride
        if layers > 1:
            self.out = Tokens(self.out.count + (layers - 1) * self.few, dim)

    def step(self, merged: Tensor | None, index: int, state: Tensor, weights: None) -> Tensor:
        if merged is None:
            merged = state.new_zeros(state.shape[0], self.out.count, self.dim)
        if index == self.layers - 1:
            merged[:, : state.shape[1]] = state
        else:
            start = state.shape[1] + index * self.few
            pooled = F.avg_pool1d(state.transpose(1, 2), self.stride).transpose(1, 2)
            merged[:, start : start + self.few] = pooled
        return merged
