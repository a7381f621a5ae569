"""The tiny MAE: masked pixels put back (He et al., arXiv 2111.06377), on images alone.

Three patches in four are hidden. The encoder sees the rest only; a small decoder, thrown away afterwards, says the hidden
ones' pixels, each patch without its own mean colour and deviation. Model and masking are the library's own. Close-ups of
scenes come first: there an object is so large that the patches that are left of it tell what it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ViTMAEForPreTraining

from ..scene import SIDE
from .checkpoint import export
from .loop import Pretraining, go_on
from .optim import autocast, optimizers
from .pool import scene_pool
from .views import crops
from .vit import GRID, new_mae, normalised

FLOOR = 0.05
"""Added to a patch's variance before its square root is divided by. He et al. add 1e-6; here most patches are plain
background and hold nothing but sensor noise (variance 0.005 in these units), which that would blow up to full contrast."""


@dataclass(frozen=True)
class MAEBudget:
    """close: the share of the updates spent on close-ups, which show 12 to 50 % of a scene; the rest shows 30 to 100 %."""

    updates: int = 1100
    batch: int = 64
    close: float = 0.6
    muon_lr: float = 0.015
    adam_lr: float = 1e-3
    scenes: int = 40000
    seed: int = 0
    difficulty: str = "easy"


def masked_targets(patches: Tensor) -> Tensor:
    """What the decoder has to say: (b, n, p p 3) pixels of patches, without each one's mean colour and deviation.

    The mean is taken per channel, unlike He et al.'s: plain background, most of a scene, would else be most of the loss.
    """
    b, n, values = patches.shape
    colors = patches.view(b, n, values // 3, 3)
    shape = (colors - colors.mean(2, keepdim=True)).reshape(b, n, values)
    return shape / (shape.square().mean(-1, keepdim=True) + FLOOR).sqrt()


class MAETrainer(Pretraining[ViTMAEForPreTraining]):
    def __init__(self, budget: MAEBudget, cache: Path) -> None:
        torch.manual_seed(budget.seed)
        self.budget = budget
        self.model = new_mae()
        self.optimizers = optimizers(self.model, muon_lr=budget.muon_lr, adam_lr=budget.adam_lr)
        _, self.pixels = scene_pool(cache, budget.scenes, budget.difficulty)

    def loss(self, update: int) -> tuple[Tensor, dict[str, float]]:
        """(mean squared error over the hidden patches; unexplained: the share of their variance that it leaves)."""
        b = self.budget
        rng = np.random.Generator(np.random.Philox(key=[b.seed + 303, update]))
        chosen = rng.integers(len(self.pixels), size=b.batch)
        shown = (0.12, 0.5) if update < b.close * b.updates else (0.3, 1.0)
        pixels = crops(normalised(torch.from_numpy(self.pixels[chosen]), "mae"), SIDE, shown, rng)
        order = torch.from_numpy(rng.random((b.batch, GRID**2))).float()
        with autocast():
            seen = self.model.vit(pixels, noise=order)
            said = self.model.decoder(seen.last_hidden_state, seen.ids_restore).logits
        hidden = seen.mask.bool()
        targets = masked_targets(self.model.patchify(pixels))[hidden]
        error = (said.float()[hidden] - targets).square().mean()
        return error, {"unexplained": (error.detach() / targets.square().mean()).item()}


def pretrain_mae(out: Path, budget: MAEBudget, *, cache: Path, minutes: float | None = None) -> Path:
    """Trains the tiny MAE into `out`; resumes from what is there. Returns the folder of its encoder."""
    trainer = MAETrainer(budget, cache)
    settings = {"objective": "masked pixels, 75 % hidden", **asdict(budget)}
    facts = go_on(trainer, out, "mae", settings, minutes=minutes)
    return export(trainer.model.vit, out, {**facts, "views": facts["updates"] * budget.batch})
