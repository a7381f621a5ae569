"""The training loss from the supervised positions alone: no (b, n, vocabulary) tensor is made.

Of a visual dialogue's tokens one in ten or fewer is an answer's; logits of the others are a step's largest tensor and
are thrown away. Where many are supervised, their logits are made a slice at a time and made again for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
AT_ONCE = 2**25
"""Logits that are held at once: 1,048 positions of a vocabulary of 32,000, 134 MB in fp32."""


def supervised_loss(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *, vocabulary: int,
    number: Tensor | int | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy of head(hidden) with the next position's labels, summed over supervised tokens, by `number` or theirs.

    hidden (b, n, d); labels (b, n), IGNORED where not supervised. The sum is in fp32. Without a supervised token it is 0, a
    mean NaN.
    """
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    chosen = following != IGNORED
    states, targets = hidden[chosen.to(hidden.device)], following[chosen].to(hidden.device)
    total = summed_loss(head, states, targets, vocabulary=vocabulary)
    return total / (len(targets) if number is None else number)


def summed_loss(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, *, vocabulary: int) -> Tensor:
    """Sum of the cross entropies of head(states (n, d)) with targets (n,), at most AT_ONCE logits at a time.

    Where the head's weights are shared out, all processes must ask; each calls it as often as the one with most targets.
    """

    def total(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, reduction="sum")

    rows = max(1, AT_ONCE // vocabulary)
    count = -(-len(targets) // rows)
    if _gathers(head):
        most = torch.tensor(count, device=states.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        count = int(most)
    if count <= 1:
        return total(states, targets)
    sizes = [min(rows, max(0, len(targets) - start)) for start in range(0, count * rows, rows)]
    parts = zip(states.split(sizes), targets.split(sizes), strict=True)
    return torch.stack([checkpoint(total, *part, use_reentrant=False) for part in parts]).sum()  # type: ignore[arg-type]


def _gathers(head: Callable[[Tensor], Tensor]) -> bool:
    """Whether a call of the head is one of all processes: it puts weights together (FSDP2's unit, ZeRO-3's parameters)."""
    if not isinstance(head, nn.Module):
        return False
    return isinstance(head, FSDPModule) or any(hasattr(parameter, "ds_id") for parameter in head.parameters())
