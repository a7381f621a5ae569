"""Muon on the matrices, AdamW on the rest, one schedule for both, and the precision: what every pretraining here uses."""

from __future__ import annotations

import torch
from torch import nn


def optimizers(model: nn.Module, *, muon_lr: float, adam_lr: float, decay: float = 0.05) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for embeddings, convolutions, norms and biases."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if p.ndim == 2 and "embed" not in name else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=decay, momentum=0.95, ns_steps=4),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(update: int, *, total: int, warmup: int = 60, hold: float = 0.6, floor: float = 0.03) -> float:
    """The rate's factor: linear warm-up, constant up to `hold` of the run, then linear down to `floor`."""
    if update < warmup:
        return (update + 1) / warmup
    start = hold * total
    return 1.0 if update < start else max(floor, 1 - (1 - floor) * (update - start) / (total - start))


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], factor: float, *, clip: float = 1.0) -> float:
    """One update at `factor` times the initial rates; returns the gradient's norm."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


def autocast() -> torch.autocast:
    """bf16 where the CPU multiplies it in tiles (AMX); elsewhere fp32, which is faster there."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu.get_capabilities().get("amx_bf16", False))
