"""The table of merges: a config's names and their modules."""

from __future__ import annotations

from collections.abc import Callable

from .merge import Layerscale, LLNLayerscale, Mean, Merge
from .merge_more import ConvLayerscale, DenseChannels, LayerAttention, SparseChannels, SparseTokens

MERGES: dict[str, Callable[..., Merge]] = {
    "mean": Mean,
    "layerscale": Layerscale,
    "lln-layerscale": LLNLayerscale,
    "conv-layerscale": ConvLayerscale,
    "layer-attention": LayerAttention,
    "sti": SparseTokens,
    "sci": SparseChannels,
    "dci": DenseChannels,
}
