"""The tiny supervised ViT: classify the dominant object, as DeiT III (Touvron et al., arXiv 2204.07118) and its kin do.

The label is the colour and category (80 classes) of the object with the largest box, of what is shown; objects that
tie share it. The tiny CLIP's curriculum: windows around an object first, then whole scenes with half of the patches
dropped, at the end all patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from ..scene import COLORS, DIFFICULTIES, Thing
from .checkpoint import export
from .loop import Pretraining, go_on
from .optim import autocast, optimizers
from .pool import scene_pool
from .views import kept_half, window
from .vit import keep_patches, new_vit, normalised


@dataclass(frozen=True)
class DeiTBudget:
    """windows, halves: shares of the updates spent on windows and on half scenes; the rest sees all patches."""

    updates: int = 1500
    batch: int = 48
    windows: float = 0.55
    halves: float = 0.35
    muon_lr: float = 0.015
    adam_lr: float = 1e-3
    scenes: int = 40000
    seed: int = 0
    difficulty: str = "easy"


def dominant(things: Sequence[Thing]) -> list[Thing]:
    """The objects with the largest box: one, or more where they tie."""

    def area(thing: Thing) -> int:
        x1, y1, x2, y2 = thing.box
        return (x2 - x1) * (y2 - y1)

    most = max(map(area, things), default=0)
    return [thing for thing in things if area(thing) == most]


class DeiTTrainer(Pretraining[ViTForImageClassification]):
    def __init__(self, budget: DeiTBudget, cache: Path) -> None:
        torch.manual_seed(budget.seed)
        self.budget = budget
        kinds = [(color, category) for color in COLORS for category in DIFFICULTIES[budget.difficulty].categories]
        self.classes = {kind: i for i, kind in enumerate(kinds)}
        self.model = new_vit(len(self.classes))
        self.optimizers = optimizers(self.model, muon_lr=budget.muon_lr, adam_lr=budget.adam_lr)
        self.scenes, self.pixels = scene_pool(cache, budget.scenes, budget.difficulty)

    def batch(self, update: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """(pixels, kept patches or None, (b, classes) the share of the label that each class has)."""
        b = self.budget
        rng = np.random.Generator(np.random.Philox(key=[b.seed + 404, update]))
        chosen = rng.integers(len(self.scenes), size=b.batch)
        scenes = [self.scenes[i] for i in chosen]
        pixels = normalised(torch.from_numpy(self.pixels[chosen]), "deit")
        pixels = pixels * torch.from_numpy(rng.uniform(0.85, 1.15, (b.batch, 1, 1, 1))).float()
        phase = update / b.updates
        if phase < b.windows:
            views = [window(scene, rng) for scene in scenes]
            kept = torch.from_numpy(np.stack([v[0] for v in views]))
            shown = [dominant(v[1]) for v in views]
        else:
            shown = [dominant(scene.things) for scene in scenes]
            kept = kept_half(b.batch, rng) if phase < b.windows + b.halves else None
        target = torch.zeros(b.batch, len(self.classes))
        for row, things in zip(target, shown, strict=True):
            for thing in things:
                row[self.classes[thing.color, thing.category]] += 1 / len(things)
        return pixels, kept, target

    def loss(self, update: int) -> tuple[Tensor, dict[str, float]]:
        """(cross-entropy; right: the share of images whose first class is a dominant object's)."""
        pixels, kept, target = self.batch(update)
        with autocast():
            if kept is None:
                logits = self.model(pixels).logits
            else:
                with keep_patches(self.model.vit.embeddings, kept):
                    logits = self.model(pixels).logits
        logits = logits.float()
        right = target.gather(1, logits.argmax(1, keepdim=True)) > 0
        return -(target * logits.log_softmax(1)).sum(1).mean(), {"right": right.float().mean().item()}


def pretrain_deit(out: Path, budget: DeiTBudget, *, cache: Path, minutes: float | None = None) -> Path:
    """Trains the tiny supervised ViT into `out`; resumes from what is there. Returns the folder of its encoder."""
    trainer = DeiTTrainer(budget, cache)
    settings = {"objective": "supervised: colour and category of the dominant object", **asdict(budget)}
    facts = go_on(trainer, out, "deit", settings, minutes=minutes)
    return export(trainer.model.vit, out, {**facts, "views": facts["updates"] * budget.batch})
