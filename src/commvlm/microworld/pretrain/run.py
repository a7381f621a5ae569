"""One entry for every pretraining: the part's trainer with its default budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .clip import CLIPBudget, pretrain_clip
from .deit import DeiTBudget, pretrain_deit
from .dino import DINOBudget, pretrain_dino
from .lm import LMBudget, pretrain_lm
from .mae import MAEBudget, pretrain_mae

ENCODERS: dict[str, tuple[type, Callable[..., Path]]] = {
    "clip": (CLIPBudget, pretrain_clip),
    "dinov2": (DINOBudget, pretrain_dino),
    "mae": (MAEBudget, pretrain_mae),
    "deit": (DeiTBudget, pretrain_deit),
}
PARTS = ("lm", *ENCODERS)


def pretrain(
    part: str,
    out: Path,
    *,
    cache: Path,
    updates: int | None = None,
    scenes: int | None = None,
    seed: int | None = None,
    minutes: float | None = None,
) -> Path:
    """Pretrains a part into `out` on one thread and returns its model's folder; what is there already is continued.

    updates: the whole run's length, by which the schedule is laid; the budget's own by default. scenes: how many an encoder
    learns from; the budget's own by default (the LM draws new ones all the time). seed: of weights and draws; 0, as shipped,
    by default. minutes: stop after so many. Raises ValueError for an unknown part, or a folder of other settings.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r} to pretrain; parts: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    given = {"updates": updates, "seed": seed}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if part == "lm":
        return pretrain_lm(out, dataclasses.replace(LMBudget(), **changed), minutes=minutes)
    changed |= {} if scenes is None else {"scenes": scenes}
    budget, trainer = ENCODERS[part]
    return trainer(out, budget(**changed), cache=cache, minutes=minutes)
