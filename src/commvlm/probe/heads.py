"""Heads on frozen features: a linear map or a small MLP, fitted in seconds, the same for every encoder and layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ..model.merges import MERGES
from ..model.vision import initialise

HIDDEN = 256
HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda dim, out: nn.Linear(dim, out),
    "mlp": lambda dim, out: nn.Sequential(nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, out)),
}
RATES = {"linear": 1e-2, "mlp": 3e-3}
"""Learning rate at the start; it falls to 0 linearly."""


class Merged(nn.Module):
    """A head behind one of the model's own merges: (b, layers, d) -> (b, out)."""

    def __init__(self, merge: nn.Module, head: nn.Module):
        super().__init__()
        self.merge, self.head = merge, head

    def forward(self, states: Tensor) -> Tensor:
        shape = states.shape[:-2]
        rows = states.reshape(-1, 1, *states.shape[-2:])  # every row is an image of one patch
        return self.head(self.merge(list(rows.unbind(2)))[:, 0]).view(*shape, -1)


class Pooled(Merged):
    """The same for means over patches of `normalised` tokens, (b, layers, d): what follows that is linear, so this
    is the mean of the patches' merged tokens, in which every patch went through its own LayerNorm."""

    def forward(self, states: Tensor) -> Tensor:
        merge: Any = self.merge
        pairs = [merge.pair(place) for place in range(states.shape[-2])]
        each = [linear(states[..., k, :] * norm.weight + norm.bias) for k, (norm, linear) in enumerate(pairs)]
        return self.head((torch.stack(each, dim=-1) * merge.weights).sum(-1))


def normalised(states: Tensor) -> Tensor:
    """(..., d): what LayerNorm does before its own scale and shift, in float32."""
    return layer_norm(states.float(), states.shape[-1:])


def standardise(fitted: Tensor, *others: Tensor) -> list[Tensor]:
    """Channels to mean 0 and deviation 1 by the first tensor's: (n, N, d) each."""
    mean, deviation = fitted.mean((0, 1)), fitted.std((0, 1)) + 1e-6
    return [(tensor - mean) / deviation for tensor in (fitted, *others)]


def fit(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    *,
    rows: int,
    batch: int,
    steps: int,
    rate: float,
    seed: int,
    decay: float = 1e-2,
) -> None:
    """`steps` updates of AdamW. loss: row numbers (batch,), drawn evenly from `rows` -> the loss of those rows."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=decay, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss(torch.randint(rows, (batch,), generator=generator)).backward()
        optimizer.step()


def new_head(kind: str, features: Tensor, out: int, *, seed: int, pooled: bool = False) -> nn.Module:
    """A head for rows of features (b, d); for rows of several layers (b, layers, d), one behind LLN-Layerscale. pooled: rows
    of several layers are means as `Pooled` takes them. First weights of its own seed."""
    dim = features.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = HEADS[kind](dim, out)
        if features.ndim == 2:
            return head
        merge = MERGES["lln-layerscale"](features.shape[-2], dim, (1, 1))
        merge.apply(initialise)
        return Pooled(merge, head) if pooled else Merged(merge, head)
