"""One entry for every pretraining: the part's trainer with its default budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .clip import CLIPBudget, pretrain_clip
from .dino import DINOBudget, pretrain_dino
from .lm import LMBudget, pretrain_lm

PARTS = ("lm", "clip", "dinov2")


def pretrain(part: str, out: Path, *, cache: Path, updates: int | None = None, minutes: float | None = None) -> Path:
    """Pretrains a part into `out` on one thread and returns its model's folder; what is there already is continued.

    updates: the whole run's length, by which the schedule is laid; the budget's own by default. minutes: stop after so
    many. Raises ValueError for an unknown part, or a folder of other settings.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r} to pretrain; parts: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    changed = {} if updates is None else {"updates": updates}
    if part == "lm":
        return pretrain_lm(out, dataclasses.replace(LMBudget(), **changed), minutes=minutes)
    if part == "clip":
        return pretrain_clip(out, dataclasses.replace(CLIPBudget(), **changed), cache=cache, minutes=minutes)
    return pretrain_dino(out, dataclasses.replace(DINOBudget(), **changed), cache=cache, minutes=minutes)
