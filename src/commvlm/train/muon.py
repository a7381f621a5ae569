"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): momentum, made orthogonal, on matrices.

The library's own `torch.optim.Muon` does the same in bf16, matrix by matrix. On a CPU without units for bf16 that takes many
times as long as the rest of a step of the micro world, and comes out otherwise than on one with them; so here matrices of one
shape are stacked, small ones all together, large ones one by one, and fp32 stays fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients of the quintic whose iteration takes every singular value to about one (Jordan et al., 2024)."""
AT_ONCE = 2**24
"""Numbers in a stack of matrices, where one matrix alone is not larger: small ones gain by company, large ones by room."""
COPIES = 5
"""Times a stack is in memory within a step, at most: what came, its like before and after an iteration, two grams."""


class Muon(Optimizer):
    """params: matrices, or groups of them. lr: what it would be for AdamW, since a step has the size of AdamW's (0.2 times
    the root of the longer side, https://arxiv.org/abs/2502.16982, equation 4). Raises ValueError for what is no matrix."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, weight_decay: float = 0.0, momentum: float = 0.95,
        iterations: int = 5,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "iterations": iterations}
        super().__init__(params, defaults)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon steps on matrices, one parameter has the shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(tuple(p.shape), []).append(p)
            for some in (stack for every in alike.values() for stack in stacks(every)):
                steps = orthogonal(torch.stack([self._momentum(p, group) for p in some]), group["iterations"])
                size = -group["lr"] * 0.2 * math.sqrt(max(some[0].shape))
                for p, own in zip(some, steps, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(own, alpha=size)

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov's."""
        assert p.grad is not None
        state, kept = self.state[p], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        return p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - kept), kept)


def stacks(matrices: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Matrices of one shape -> those that are stepped on at once."""
    each = max(1, AT_ONCE // matrices[0].numel())
    return [matrices[k : k + each] for k in range(0, len(matrices), each)]


def orthogonal(x: Tensor, iterations: int = 5) -> Tensor:
    """(k, r, c) -> the same with singular vectors kept and singular values of about one, from 0.7 to 1.2."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT, iterations).mT
    a, b, c = NEWTON_SCHULZ
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
