"""The tiny DINOv2: self-distillation without labels, on images alone.

The losses of DINOv2 (Oquab et al., arXiv 2304.07193): the teacher's class token over two global crops is predicted by the
student from other crops (DINO, multi-crop), the teacher's patch tokens are predicted where the student's are masked
(iBOT), both centred by Sinkhorn-Knopp; KoLeo spreads the class tokens. The teacher is the student's moving average and is
what is exported.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..scene import SIDE
from .checkpoint import Progress, export, load_progress, save_progress
from .optim import optimizers, schedule, step
from .pool import scene_pool
from .vit import GRID, new_dinov2, normalised


@dataclass(frozen=True)
class DINOBudget:
    updates: int = 8000
    batch: int = 24
    locals: int = 4
    prototypes: int = 512
    muon_lr: float = 0.005
    adam_lr: float = 1e-3
    momentum: float = 0.992
    scenes: int = 40000
    seed: int = 0
    difficulty: str = "easy"


def crops(pixels: Tensor, side: int, scale: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """Random square crops of an area share in `scale`, flipped half of the time: (b, 3, 64, 64) -> (b, 3, side, side)."""
    b = len(pixels)
    size = np.sqrt(rng.uniform(*scale, b))
    shift = rng.uniform(-1, 1, (2, b)) * (1 - size)
    flip = rng.choice([-1.0, 1.0], b)
    zero = np.zeros(b)
    theta = np.stack([np.stack([size * flip, zero, shift[0]], 1), np.stack([zero, size, shift[1]], 1)], 1)
    grid = F.affine_grid(torch.from_numpy(theta).float(), [b, 3, side, side], align_corners=False)
    out = F.grid_sample(pixels, grid, align_corners=False, padding_mode="reflection")
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (b, 3, 1, 1)) * rng.uniform(0.85, 1.15, (b, 1, 1, 1))).float()
    return out * gain + torch.from_numpy(rng.uniform(-0.15, 0.15, (b, 1, 1, 1))).float()


def block_masks(count: int, rng: np.random.Generator) -> Tensor:
    """(count, 64) True where masked: half of the images get 10 to 50 % of their patches masked in blocks."""
    masks = np.zeros((count, GRID, GRID), dtype=bool)
    for mask in masks[: count // 2]:
        wanted = rng.uniform(0.1, 0.5) * GRID**2
        while mask.sum() < wanted:
            h, w = rng.integers(1, 5, size=2)
            y, x = rng.integers(0, GRID - h + 1), rng.integers(0, GRID - w + 1)
            mask[y : y + h, x : x + w] = True
    return torch.from_numpy(masks[rng.permutation(count)].reshape(count, -1))


class Head(nn.Module):
    """MLP to a unit sphere, then cosine to `prototypes` directions: (..., width) -> (..., prototypes)."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)
        )
        self.embed_prototypes = nn.Parameter(torch.randn(prototypes, 64) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.layers(x).float(), dim=-1)
        return x @ F.normalize(self.embed_prototypes, dim=-1).T


class Student(nn.Module):
    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.backbone = new_dinov2()
        self.image_head = Head(128, prototypes)
        self.patch_head = Head(128, prototypes)

    def forward(self, pixels: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> class tokens (b, d) and patch tokens (b, n, d) after the final norm."""
        out = self.backbone(pixels, bool_masked_pos=masks).last_hidden_state
        return out[:, 0], out[:, 1:]


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Teacher's assignment with every prototype used alike: (b, k) scores -> (b, k) rows that sum to one."""
    q = torch.exp((scores - scores.max()) / temperature).T
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True).clamp(min=1e-12) / q.shape[0]
        q = q / q.sum(0, keepdim=True).clamp(min=1e-12) / q.shape[1]
    return (q * q.shape[1]).T


def koleo(x: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour on the sphere (Sablayrolles et al., arXiv 1806.03198)."""
    x = F.normalize(x.float(), dim=-1)
    similarity = x @ x.T
    nearest = similarity.fill_diagonal_(-2).argmax(1)
    return -torch.log(F.pairwise_distance(x, x[nearest]) + 1e-6).mean()


class DINOTrainer:
    def __init__(self, budget: DINOBudget, cache: Path) -> None:
        torch.manual_seed(budget.seed)
        self.budget = budget
        self.student = Student(budget.prototypes)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.both = nn.ModuleDict({"student": self.student, "teacher": self.teacher})
        self.optimizers = optimizers(self.student, muon_lr=budget.muon_lr, adam_lr=budget.adam_lr)
        _, self.pixels = scene_pool(cache, budget.scenes, budget.difficulty)

    def loss(self, update: int) -> tuple[Tensor, dict[str, float]]:
        b = self.budget
        rng = np.random.Generator(np.random.Philox(key=[b.seed + 202, update]))
        chosen = rng.integers(len(self.pixels), size=b.batch)
        pixels = normalised(torch.from_numpy(self.pixels[chosen]), "dinov2")
        wide = torch.cat([crops(pixels, SIDE, (0.4, 1.0), rng) for _ in range(2)])
        narrow = torch.cat([crops(pixels, SIDE // 2, (0.1, 0.4), rng) for _ in range(b.locals)])
        masks = block_masks(2 * b.batch, rng)
        warm = min(1.0, update / (0.15 * b.updates))
        temperature = 0.04 + 0.02 * warm
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                t_image, t_patches = self.teacher(wide)
                t_scores = self.teacher.image_head(t_image).float()
                t_masked = self.teacher.patch_head(t_patches[masks]).float()
            s_image, s_patches = self.student(wide, masks)
            s_scores = torch.cat([self.student.image_head(s_image), self.student.image_head(self.student(narrow)[0])])
            s_masked = self.student.patch_head(s_patches[masks])
        targets = sinkhorn(t_scores, temperature).chunk(2)
        logs = (s_scores.float() / 0.1).log_softmax(-1).chunk(2 + b.locals)
        pairs = [(t, s) for t in range(2) for s in range(2 + b.locals) if s != t]
        image = torch.stack([-(targets[t] * logs[s]).sum(-1).mean() for t, s in pairs]).mean()
        patch_targets = sinkhorn(t_masked, temperature)
        patch = -(patch_targets * (s_masked.float() / 0.1).log_softmax(-1)).sum(-1).mean()
        spread = torch.stack([koleo(part) for part in s_image.chunk(2)]).mean()
        total = image + patch + 0.1 * spread
        return total, {"image": image.item(), "patch": patch.item(), "koleo": spread.item()}

    @torch.no_grad()
    def follow(self, update: int) -> None:
        """The teacher moves towards the student, ever more slowly."""
        b = self.budget
        momentum = 1 - (1 - b.momentum) * (math.cos(math.pi * update / b.updates) + 1) / 2
        for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            t.lerp_(s, 1 - momentum)


def pretrain_dino(out: Path, budget: DINOBudget, *, cache: Path, minutes: float | None = None) -> Path:
    """Trains the tiny DINOv2 into `out`; resumes from what is there. Returns the folder of the teacher's backbone."""
    trainer = DINOTrainer(budget, cache)
    progress = Progress(out, "dinov2", total=budget.updates, minutes=minutes)
    settings = {"objective": "self-distillation (DINO + iBOT + KoLeo)", **asdict(budget)}
    start = load_progress(out, trainer.both, trainer.optimizers, settings)
    for update in progress.updates(start):
        began = time.perf_counter()
        loss, parts = trainer.loss(update)
        loss.backward()
        norm = step(trainer.student, trainer.optimizers, schedule(update, total=budget.updates, warmup=200, hold=0.5))
        trainer.follow(update)
        progress.log(update, {"loss": loss.item(), **parts, "norm": norm, "seconds": time.perf_counter() - began})
        if progress.due():
            save_progress(out, trainer.both, trainer.optimizers, update + 1, settings)
    save_progress(out, trainer.both, trainer.optimizers, progress.done, settings)
    facts = {**settings, "updates": progress.done, "views": progress.done * budget.batch * (2 + budget.locals)}
    return export(trainer.teacher.backbone, out, {**facts, "seconds": progress.spent()})
