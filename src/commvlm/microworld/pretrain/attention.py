"""Shared-prefix attention that shows its weights: k branches of equal length n, each of which sees one prefix of p tokens and
itself. The pretraining supervises where in the prefix a branch looks (see `model.attention` for training proper).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "shown-prefix"


def _causal(scores: Tensor) -> Tensor:
    """Adds minus infinity above the diagonal of the last n x n columns: (..., n, m) with m >= n."""
    n = scores.shape[-2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., -n:].masked_fill_(hidden, float("-inf"))
    return scores


def shown_prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float, prefix_length: int, branches: int, dropout: float = 0.0, **kwargs: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query (b, h, p + k n, d), key and value (b, g, p + k n, d), g dividing h -> output (b, p + k n, h, d) and the
    branches' attention to the prefix (b, h, k, n, p). Right padding inside a branch is harmless; dropout is not offered.
    """
    if dropout:
        raise ValueError("shown-prefix attention has no dropout: set the language model's attention_dropout to 0")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    b, h, _, d = query.shape
    p, k = prefix_length, branches
    query = query * scaling
    q0, k0, v0 = (t[:, :, :p] for t in (query, key, value))
    q1, k1, v1 = (t[:, :, p:].reshape(b, h, k, -1, d) for t in (query, key, value))
    head = _causal(q0 @ k0.transpose(-1, -2)).softmax(-1) @ v0
    n = q1.shape[3]
    to_prefix = (q1.reshape(b, h, k * n, d) @ k0.transpose(-1, -2)).view(b, h, k, n, p)
    scores = _causal(torch.cat([to_prefix, q1 @ k1.transpose(-1, -2)], dim=-1)).softmax(-1)
    tail = (scores[..., :p].reshape(b, h, k * n, p) @ v0).view(b, h, k, n, d) + scores[..., p:] @ v1
    out = torch.cat([head, tail.reshape(b, h, k * n, d)], dim=2)
    return out.transpose(1, 2).contiguous(), scores[..., :p]


AttentionInterface.register(NAME, shown_prefix_attention)
